"""TRL's trainers on transformers' GLM-4.1V with and without the ops: the same curves. `test_other_versions.py` runs it.

Tolerance 1e-3: single precision on both sides, which a few steps of Adam at 1e-3 spread. In GRPO also the sampled
tokens are the same, since sampling draws from logits that agree to 1e-5.
"""

from pathlib import Path

import pytest
import torch

from examples.make_checkpoint import make_checkpoint
from glm4v_ext.integrations.replacements import Replacement
from glm4v_ext.integrations.transformers import disable, enable

trl = pytest.importorskip("trl", reason="TRL is not installed; test_other_versions.py runs this where it is")

from datasets import Dataset, Image, List  # noqa: E402
from PIL import Image as Picture  # noqa: E402
from transformers import AutoTokenizer, Glm4vForConditionalGeneration  # noqa: E402
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil  # noqa: E402
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor  # noqa: E402

pytestmark = pytest.mark.slow
COMMON = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    "disable_tqdm": True, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "seed": 0,
}  # fmt: skip
STEPS = 5


class NoVideos:
    merge_size, model_input_names = 2, ("pixel_values_videos", "video_grid_thw")


class Processor(Glm4vProcessor):
    """Without torchvision transformers has no video processor."""

    def check_argument_for_proper_class(self, name, argument):
        return type(argument)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def processor(folder):
    images = Glm4vImageProcessorPil.from_pretrained(folder, size={"shortest_edge": 784, "longest_edge": 12544})
    template = (Path(folder) / "chat_template.jinja").read_text()
    return Processor(images, AutoTokenizer.from_pretrained(folder), NoVideos(), chat_template=template)


def rows(folder, answered):
    """Questions about plain pictures of different sizes."""
    found = []
    for i in range(4 * STEPS):
        path = folder / f"{i}.png"
        Picture.new("RGB", (56 + 28 * (i % 2), 56), (12 * i, 255 - 12 * i, 90)).save(path)
        question = {"role": "user", "content": f"Which colour is picture {i}?"}
        answer = {"role": "assistant", "content": "Red." if i % 3 else "The leaves are green."}
        messages = {"messages": [question, answer]} if answered else {"prompt": [question]}
        found.append({**messages, "images": [str(path)]})
    return Dataset.from_list(found).cast_column("images", List(Image()))


def stock(folder):
    return Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def enabled(folder):
    model = stock(folder)
    enable(model)
    return model


def enabled_before_loading(folder):
    """TRL loads the model."""
    enable()
    return str(folder)


@pytest.fixture(autouse=True)
def _restored():
    yield
    disable()


def curve(trainer, names):
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(history) == STEPS
    return torch.tensor([[float(entry.get(name, 0)) for name in names] for entry in history], dtype=torch.float64)


def replaced(trainer):
    return sum(isinstance(module, Replacement) for module in trainer.model.modules())


@pytest.mark.parametrize("make", [enabled, enabled_before_loading])
def test_sft(make, folder, tmp_path):
    def trained(make):
        options = {"max_steps": STEPS, "per_device_train_batch_size": 4, "model_init_kwargs": {"dtype": "float32"}}
        if make is not enabled_before_loading:
            del options["model_init_kwargs"]
        arguments = trl.SFTConfig(str(tmp_path), **COMMON, **options)
        trainer = trl.SFTTrainer(
            make(folder), arguments, train_dataset=rows(folder, True), processing_class=processor(folder)
        )
        return curve(trainer, ("loss", "grad_norm")), replaced(trainer)

    theirs, none = trained(stock)
    ours, some = trained(make)
    assert none == 0 and some > 20
    assert theirs[-1, 0] < theirs[0, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_grpo(folder, tmp_path):
    def share_of_letters(completions, **_):
        texts = [said[0]["content"] for said in completions]
        return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in texts]

    def trained(make):
        model = make(folder)
        pictures = [model.config.image_token_id, model.config.video_token_id]  # said, they would ask for features
        arguments = trl.GRPOConfig(
            str(tmp_path), **COMMON, max_steps=STEPS, per_device_train_batch_size=8, num_generations=4,
            max_completion_length=12, temperature=1.0, top_p=1.0, top_k=0, beta=0.05, num_iterations=2,
            generation_kwargs={"suppress_tokens": pictures},
        )  # fmt: skip
        data, reader = rows(folder, False), processor(folder)
        trainer = trl.GRPOTrainer(model, share_of_letters, args=arguments, train_dataset=data, processing_class=reader)
        names = ("loss", "grad_norm", "reward", "completions/mean_length", "entropy")
        return curve(trainer, names), replaced(trainer)

    theirs, none = trained(stock)
    ours, some = trained(enabled)
    assert none == 0 and some > 20
    assert theirs[:, 1].min() > 0 and theirs[:, 2].count_nonzero() == 3  # steps with new samples, that is
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
