"""The command: what it prints where, and how it ends."""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from glm4v import cli
from glm4v.chat import shown, timed, whole
from glm4v.generate import stream
from tests.glm4v.mock_model import MockModel

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).resolve().parents[2]
KEYS = ["text", "thinking", "answer", "box", "token_ids", "prompt_tokens", "finish_reason"]


@pytest.fixture
def glm4v(capsys):
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return end.value.code, out, err

    return run


def start(*arguments, command=(sys.executable, "-m", "glm4v"), **options):
    command = [*command, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    environment.pop("PYTHONUNBUFFERED", None)  # what is left in a buffer counts at exit
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **{**pipes, **options})


def test_json_is_one_object_on_stdout(tiny_checkpoint, photo, film):
    arguments = ("--model", tiny_checkpoint, "--max-new-tokens", 6, "--seed", 1, "--prompt", "-", "--json")
    process = start("generate", *arguments, "--image", photo, "--image", photo, "--video", film())
    out, err = process.communicate("What is\nthis?\n")
    assert process.returncode == 0
    answer = json.loads(out)
    assert list(answer) == KEYS
    assert len(answer["token_ids"]) <= 6 and answer["prompt_tokens"] > 90
    assert "tokens/s" in err and "Traceback" not in err


def test_a_prompt_of_a_file_that_was_made_on_windows(tiny_checkpoint):
    arguments = ("--model", tiny_checkpoint, "--max-new-tokens", 1, "--prompt", "-", "--json")
    counts = []
    for text in ("What is this?\n", "\ufeffWhat is this?\r\n"):
        process = start("generate", *arguments)
        counts.append(json.loads(process.communicate(text)[0])["prompt_tokens"])
    assert counts[0] == counts[1]


def test_ctrl_c_ends_cleanly(tiny_checkpoint, tmp_path):
    endless = shutil.copytree(tiny_checkpoint, tmp_path / "endless")
    (endless / "generation_config.json").write_text('{"eos_token_id": null}')
    process = start("generate", "--model", endless, "--prompt", "Hi", "--max-new-tokens", 60_000)
    assert process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "glm4v: interrupted" and "Traceback" not in err


def test_ctrl_c_is_not_lost_in_an_import(tiny_checkpoint):
    """torch's C++ imports NumPy, and goes on without it where that fails, for whatever reason."""
    program = """if True:
        import signal, sys
        from glm4v import cli

        class Strike:
            def find_spec(self, name, *_):
                if name == "numpy.linalg":
                    sys.meta_path.remove(self)
                    signal.raise_signal(signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        sys.meta_path.insert(0, Strike())
        cli.main(sys.argv[1:])
    """
    arguments = ("generate", "--model", tiny_checkpoint, "--prompt", "x", "--max-new-tokens", 1)
    process = start(*arguments, command=[sys.executable, "-c", program])
    out, err = process.communicate()
    assert (process.returncode, out, err) == (1, "", "glm4v: interrupted\n")


def test_a_reader_may_leave(tiny_checkpoint):
    process = start("generate", "--model", tiny_checkpoint, "--prompt", "Hi", "--max-new-tokens", 200)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert "Traceback" not in (err := process.stderr.read()) and "Broken pipe" not in err


@pytest.mark.parametrize("command", ["info", "generate", "chat"])
def test_closed_streams(command, tiny_checkpoint):
    options = ["--prompt", "-", "--image", "nowhere.png"] if command == "generate" else []
    options += ["--model", tiny_checkpoint]
    process = start(command, *options, preexec_fn=lambda: os.closerange(0, 2))
    err = process.communicate()[1]
    assert "Traceback" not in err and "NoneType" not in err
    assert process.returncode == (2 if command == "generate" else 0)  # there is no such image


def test_a_full_disk_is_not_the_inputs_fault():
    with open("/dev/full", "w") as full:
        process = start("info", stdout=full)
        err = process.communicate()[1]
    ours = [line for line in err.splitlines() if line.startswith("glm4v: ")]
    assert process.returncode == 1 and len(ours) == 1 and "Traceback" not in err, err
    assert "No space left on device" in ours[0]


def test_a_terminal_of_few_characters(glm4v, tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    whole(shown(stream(MockModel({"Q": "naïve 🌺"}), ["Q"]), Console(stderr=True)))
    sys.stdout.seek(0)
    assert sys.stdout.read() == "na?ve ?\n"
    sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("glm4v.Glm4v.stream", lambda *_, **__: stream(MockModel({"Q": "naïve 🌺"}), ["Q"]))
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", str(tiny_checkpoint), "--prompt", "x", "--json"])
    sys.stdout.seek(0)
    assert json.loads(sys.stdout.read())["text"] == "naïve 🌺"


def test_the_answer_goes_to_stdout(glm4v, tiny_checkpoint, photo):
    options = (
        "--model",
        tiny_checkpoint,
        "--image",
        photo,
        "--prompt",
        "What?",
        "--max-new-tokens",
        8,
        "--temperature",
        0,
    )
    code, plain, err = glm4v("generate", *options)
    assert code == 0 and "8 tokens" in err
    code, printed, _ = glm4v("generate", *options, "--json")
    assert code == 0
    assert json.loads(printed)["answer"] == plain.removesuffix("\n")


def test_options_reach_the_model(glm4v, tiny_checkpoint, photo):
    options = ("generate", "--model", tiny_checkpoint, "--prompt", "Hi", "--json", "--max-new-tokens", 12)
    seeded = [glm4v(*options, "--seed", seed, "--temperature", 2, "--top-k", 0, "--top-p", 1)[1] for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    answer = json.loads(glm4v(*options, "--thinking-budget", 3, "--dtype", "bfloat16")[1])
    assert answer["text"].partition("</think><answer>")[1]
    small = json.loads(glm4v(*options, "--image", photo, "--max-pixels", 2 * 56 * 56)[1])
    assert small["prompt_tokens"] < json.loads(glm4v(*options, "--image", photo)[1])["prompt_tokens"]
    stopped = json.loads(glm4v(*options, "--stop", answer["text"][0], "--seed", 0)[1])
    assert answer["text"][0] not in stopped["text"]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--prompt", "x", "--image", "nowhere.jpg"], "image: nowhere.jpg: no such file"),
        (["--prompt", "x", "--image", __file__], "test_cli.py: is not an image"),
        (["--prompt", "x", "--video", __file__], "video: "),
        (["--prompt", "x", "--image", "https://example.com/a.jpg"], "--allow-network"),
        ([], "--prompt: must be given where no --image or --video is"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["--prompt", "x", "--top-p", "0"], "top_p must be above 0"),
        (["--prompt", "x", "--temperature", "1e-99"], "temperature must be 0 or from 1e-6 to 1e6"),
        (["--prompt", "x", "--stop", ""], "stop must be strings of one character or more"),
        (["--prompt", "x", "--max-aspect-ratio", "0"], "--max-aspect-ratio"),
        (["--prompt", "x", "--max-aspect-ratio", "nan"], "--max-aspect-ratio"),
        (["--prompt", "x", "--image", "a" * 5000], "cannot be read: File name too long"),
        (["--prompt", "x", "--image", "data:image/png;base64,é"], "is not base64"),
        (["--prompt", "x", "--dtype", "int8"], "--dtype"),
        (["--prompt", "x", "--device", "gpu"], "--device: must be one that torch has here, got 'gpu': Expected one of"),
        (["--prompt", "x", "--device", "meta"], "--device: must be one that torch has here, got 'meta': Tensor.item()"),
        (["--bogus"], "--bogus"),
        (["--model", "zai-org/GLM-4.1V-9B-Thinking", "--prompt", "x"], "hf download zai-org/GLM-4.1V-9B-Thinking"),
        (["--model", "/nowhere", "--prompt", "x"], "checkpoint: /nowhere must be a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, text, glm4v, tiny_checkpoint):
    code, out, err = glm4v("generate", "--model", tiny_checkpoint, *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("glm4v: ") and text in line


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"]])
def test_settings_are_checked_before_the_weights(command, glm4v, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("glm4v.commands.load", lambda *_: pytest.fail("loaded"))
    code, _, err = glm4v(*command, "--model", tiny_checkpoint, "--repetition-penalty", 0)
    assert (code, err) == (2, "glm4v: generate: repetition_penalty must be from 1e-6 to 1e6, got 0.0\n")
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": "hot"}')
    code, _, err = glm4v(*command, "--model", folder)
    assert code == 2 and err.startswith("glm4v: generate: temperature must be a number, got hot (the checkpoint's")


def test_a_setting_without_effect_is_one_line(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"suppress_tokens": [5]}')
    process = start("generate", "--model", folder, "--prompt", "x", "--max-new-tokens", 1)
    _, err = process.communicate()
    said = f"glm4v: config: {folder}/generation_config.json: has no effect on generate: suppress_tokens"
    assert process.returncode == 0 and err.splitlines()[:-1] == [said]


def test_usage(glm4v, tiny_checkpoint):
    assert glm4v("bogus")[0] == 2
    assert glm4v("generate", "--prompt", "x")[0] == 2
    assert "Commands" in glm4v()[1]
    code, out, _ = glm4v("generate", "--help")
    assert code == 0 and "--thinking-budget" in out
    assert glm4v("--version")[1].strip().count(".") == 2


def test_failures_exit_with_1_and_name_the_place(glm4v, tiny_checkpoint, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("glm4v.commands.load", broken)
    code, _, err = glm4v("generate", "--model", tiny_checkpoint, "--prompt", "x")
    assert code == 1
    assert err.startswith("glm4v: RuntimeError: no such luck (test_cli.py:")


def test_missing_extras_name_the_pip_line(glm4v, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("av", "typer") else object())
    code, _, err = glm4v("info")
    assert (code, err) == (1, "glm4v: typer, av must be installed: pip install 'glm4v-ext[model]'\n")


def test_names_that_need_the_extra_say_so():
    program = "import sys; sys.modules['safetensors'] = None; from glm4v import Glm4v"
    _, err = start(command=[sys.executable, "-c", program]).communicate()
    said = "glm4v: safetensors must be installed: pip install 'glm4v-ext[model]'"
    assert err.splitlines()[-1] == f"ModuleNotFoundError: {said}"


def test_info(glm4v, tiny_checkpoint):
    code, out, _ = glm4v("info", "--model", tiny_checkpoint)
    facts = dict(line.split("  ", 1) for line in out.splitlines())
    assert code == 0
    assert facts["vision"].strip() == "2 layers, width 64, 4 heads"
    assert facts["parameters"].strip().startswith("665,792 (")
    assert "1.3 MB" in facts["memory, bfloat16"]
    assert facts["rms_norm"].strip().startswith("cpu: C++")
    assert facts["products"].strip().startswith("fp32: ") and "[" not in out
    assert "checkpoint" not in glm4v("info")[1]


# What a person sees

SAID = "<think>So.</think><answer>Forty <|begin_of_box|>42<|end_of_box|></answer>"


def test_thinking_and_answer_go_separate_ways(capsys):
    for folded, notes in ((False, "So."), (True, "thought for 6 tokens")):
        pieces = stream(MockModel({"Q": SAID}), ["Q"])
        answer = whole(shown(pieces, Console(stderr=True), folded))
        out, err = capsys.readouterr()
        assert out == f"{answer.answer}\n" == "Forty 42\n"
        assert err.strip() == notes


def test_a_terminal_counts_thoughts_alone(capsys):
    for said, counted in ((SAID, True), ("<answer>42</answer>", False)):
        whole(shown(stream(MockModel({"Q": said}), ["Q"]), Console(stderr=True, force_terminal=True), folded=True))
        assert ("thinking, " in capsys.readouterr().err) is counted  # an answer would be written over its beginning


def test_a_terminal_has_a_clock_while_the_prompt_is_read(capsys):
    for terminal in (True, False):
        answer = whole(timed(stream(MockModel({"Q": SAID}), ["Q"]), Console(stderr=True, force_terminal=terminal)))
        err = capsys.readouterr().err
        assert ("reading" in err) is terminal and answer.box == "42"
        assert not terminal or err.endswith("\x1b[2K")  # nothing of it stays


def test_a_terminal_obeys_no_answer(capsys, monkeypatch):
    for terminal, printed in ((False, "a\x1b[2Jb\tc\n"), (True, "a\ufffd[2Jb\tc\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        whole(shown(stream(MockModel({"Q": "a\x1b[2Jb\tc"}), ["Q"]), Console(stderr=True)))
        assert capsys.readouterr().out == printed


def test_an_answer_that_turns_out_to_be_thinking(capsys):
    whole(shown(stream(MockModel({"Q": "Hm</think>Yes"}), ["Q"]), Console(stderr=True)))
    assert capsys.readouterr().out == "Hm\nYes\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_is_not_lost_in_a_destructor():
    """Python prints and drops an exception that leaves ``__del__``."""

    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def pieces():
        for piece in stream(MockModel({"Q": "abcdef"}), ["Q"]):
            Dropped()  # goes at once, and the signal with it
            yield piece

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        whole(pieces())
    assert signal.getsignal(signal.SIGINT) is before


def test_chat_survives_bytes_that_are_no_text(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as most people's
    (tmp_path / "lines").write_bytes(b"\xff\nHi\n")
    with open(tmp_path / "lines", "rb") as lines:
        process = start("chat", "--model", tiny_checkpoint, "--max-new-tokens", 2, "--seed", 0, stdin=lines)
        out, err = process.communicate()
    assert process.returncode == 0 and out.strip(), err
    assert err.splitlines()[-1].endswith("text must be Unicode: surrogates not allowed")
