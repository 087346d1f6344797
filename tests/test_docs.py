"""The documentation: every public op has its page, every snippet runs, the site builds without a warning.

A page's ``python`` and ``sh`` blocks run in their order, in a folder with a small checkpoint, a photograph and a film
of the names that the pages use. ``console`` blocks, which install and build, are not run, nor README's ``sh`` blocks,
which are outlines.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

import glm4v_ext
from rlcs import rewards

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LONG = ("rlcs/index.md",)  # it trains


def name_of(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT)).removeprefix("docs/")


def marked(page: pathlib.Path):
    return pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in LONG else [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """What the pages ask about."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        from demo import PHOTOS, encode_film
        from make_checkpoint import make_checkpoint
    make_checkpoint(folder / "GLM-4.1V-9B-Thinking", "tiny")
    Image.open(PHOTOS[0]).resize((84, 56)).save(folder / "photo.jpg")
    encode_film(folder / "film.mp4", seconds=1, width=84, height=56)
    return folder


@pytest.fixture
def there(folder, tmp_path, monkeypatch) -> pathlib.Path:
    """That folder, with this tree's two commands on the path."""
    for name in ("glm4v", "rlcs"):
        script = tmp_path / name
        # As pip makes it: without the folder that it is called in on Python's path.
        command = f'from {name}.cli import main\n\nif __name__ == "__main__":\n    main()\n'
        script.write_text(f"#!{sys.executable}\n{command}")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'python'}")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", [marked(page) for page in [README, *PAGES] if BLOCK.search(page.read_text())])
def test_snippets_run(page, there):
    names: dict[str, object] = {"__name__": "snippet"}
    for language, text in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
            continue
        if page == README:
            continue
        done = subprocess.run(["bash", "-e", "-c", text], capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def test_every_public_name_has_a_page():
    texts = [page.read_text() for page in PAGES]
    name = re.compile(r"^\.\. auto(?:function|class):: glm4v_ext\.([\w.]+)", re.MULTILINE)
    documented = [found for text in texts for found in name.findall(text)]
    hooks = {"transformers": ["enable", "disable", "register_attention"]}
    hooks["rotary"] = ["Rotary", "apply_rotary_pos_emb", "apply_rotary_pos_emb_vision", "MRotaryEmbedding"]
    integrations = [f"integrations.{module}.{each}" for module, names in hooks.items() for each in names]
    assert sorted(documented) == sorted({*glm4v_ext.__all__, *integrations} - {"__version__"})


def test_every_op_has_a_page_of_its_name():
    listed = re.search(r"^set\(OPS\s(.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.DOTALL | re.MULTILINE)
    assert listed and set(listed[1].split()) == {page.stem for page in (ROOT / "docs/ops").glob("*.md")} - {"index"}


def test_every_domain_stands_with_a_truth_and_a_right_answer():
    page = (ROOT / "docs/rlcs/verifiers.md").read_text()
    rows = re.findall(r"^\| (`.*`) \| (.+) \| (.*?) ?\|.*\|$", page, re.MULTILINE)
    told = {name: (truth.strip("`"), answer) for names, truth, answer in rows for name in re.findall("`(.*?)`", names)}
    assert told.keys() == rewards.DOMAINS.keys()
    for domain, (truth, answer) in told.items():
        given = truth if answer == "the same" else answer.strip("`")
        response = f"<think></think><answer><|begin_of_box|>{given}<|end_of_box|></answer>"
        if domain != "general":
            assert rewards.verify(domain, response, truth).score == 1, domain


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)="((?:https?:)?//[^"]*)"', page.read_text()
        )
        assert not fetched, f"{page}: {fetched}"
    found = "".join(page.read_text() for page in (tmp_path / "ops").glob("*.html"))
    missing = [name for name in glm4v_ext.__all__ if f'id="glm4v_ext.{name}"' not in found]
    assert set(missing) <= {"__version__", "build_info", "Replayed"}, missing
