"""Pictures and videos on their way to a server: it sees what the trainer sees."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glm4v import InputError, Processor
from glm4v.video import Video
from rlcs.data import read_tasks
from rlcs.engines.media import video_bytes, wire


def test_pictures_become_data_urls_that_hold_the_same_pixels(demo):
    processor = Processor.from_pretrained(demo / "model")
    tasks = {task.domain: task for task in read_tasks(demo / "train.jsonl")}
    array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    path = Path(tasks["ocr"].messages[0]["content"][0]["image"])
    for one in (array, str(path), path, path.as_uri(), path.read_bytes()):
        messages = [{"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": "?"}]}]
        sent = wire(messages)
        assert sent[0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        a, b = processor(messages), processor(sent)
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.pixel_values, b.pixel_values)
    messages = tasks["video"].messages
    sent = wire(messages)
    (url,) = [p["video_url"]["url"] for p in sent[0]["content"] if p["type"] == "video_url"]
    assert url.startswith("data:video/x-matroska;base64,")
    a, b = processor(messages), processor(sent)
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.pixel_values_videos, b.pixel_values_videos)
    again, mime = video_bytes(base64.b64decode(url.partition(",")[2]))
    assert mime == "video/mp4" and Video(again).num_frames == Video(messages[0]["content"][0]["video"], 1.0).num_frames
    frames = np.random.default_rng(0).integers(0, 256, (30, 28, 28, 3), dtype=np.uint8)
    film = {"type": "video", "video": frames}
    with pytest.raises(InputError, match=r"^video: fps must be given for a list of frames[^\n]*$"):
        wire([{"role": "user", "content": [film]}])
    messages = [{"role": "user", "content": [{**film, "fps": 24}, {"type": "text", "text": "?"}]}]
    a, b = processor(messages), processor(wire(messages))
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.pixel_values_videos, b.pixel_values_videos)
    text = [{"role": "user", "content": "Hi"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert wire(text) == text
    linked = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]
    assert wire(linked) == linked


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_greys_of_sixteen_bits_travel_as_the_eight_that_the_trainer_sees(ending, demo, tmp_path):
    """Servers would clip them to white, as Pillow and transformers do."""
    processor, file = Processor.from_pretrained(demo / "model"), tmp_path / f"scan.{ending}"
    grey = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint16)
    Image.fromarray(grey * 257).save(file)
    data = file.read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for one in (str(file), data, url, Image.open(file)):
        messages = [{"role": "user", "content": [{"type": "image", "image": one}]}]
        sent = wire(messages)
        png = base64.b64decode(sent[0]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png)).convert("L")), grey)
        assert torch.equal(processor(messages).pixel_values, processor(sent).pixel_values)
