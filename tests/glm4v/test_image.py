import base64
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as hf_smart_resize

from glm4v import InputError, Processor
from glm4v.image import Picture, smart_resize
from glm4v.source import find

SIZES = [
    (1, 1), (1, 150), (1, 200), (5, 1000), (13, 14), (14, 14), (27, 28), (28, 28), (29, 57), (42, 70), (56, 56),
    (112, 112), (113, 2000), (200, 28), (336, 336), (427, 640), (640, 427), (700, 1234), (1080, 1920), (1344, 1344),
    (2100, 2800), (3000, 3000), (4320, 7680), (20000, 101), (199, 39800),
]  # fmt: skip


def stated(array, kind="PNG", **options):
    """The bytes of an image file."""
    file = BytesIO()
    (Image.fromarray(array) if isinstance(array, np.ndarray) else array).save(file, kind, **options)
    return file.getvalue()


def resized_or_error(function, *arguments):
    try:
        return function(*arguments)
    except ValueError:
        return "error"


@pytest.mark.parametrize("frames", [2, 4, 7, 600])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_of_transformers(size, frames):
    for low, high in [(12544, 9_633_792), (12544, 28 * 28 * 15000), (784, 50_000)]:
        wanted = resized_or_error(lambda *a, low=low, high=high: hf_smart_resize(*a, 2, 28, low, high), frames, *size)
        assert resized_or_error(smart_resize, frames, *size, low, high) == wanted


side = st.integers(1, 9000)


@given(st.integers(2, 700), side, side, st.integers(784, 10**5), st.integers(10**5, 10**8))
def test_any_size_is_that_of_transformers(frames, height, width, low, high):
    wanted = resized_or_error(hf_smart_resize, frames, height, width, 2, 28, low, high)
    assert resized_or_error(smart_resize, frames, height, width, low, high) == wanted


@given(st.integers(2, 700), side, side, st.integers(2 * 28 * 28, 10**5))
def test_a_limit_below_the_least_is_held(frames, height, width, high):
    if max(height, width) <= 20 * min(height, width):
        h, w = smart_resize(frames, height, width, 10**5 + 1, high)
        assert frames * h * w <= high or min(h, w) == 28


def test_a_limit_is_one_of_tokens(tiny_checkpoint, photos):
    """An image counts as two frames. The checkpoint's least number of pixels is twice this limit."""
    limited = Processor.from_pretrained(tiny_checkpoint, max_pixels=2 * 4 * 28 * 28)
    sizes = [(28, 28), (30, 30), (50, 90), (112, 112), (640, 427)]
    pictures = [{"type": "image", "image": Image.fromarray(photos[0]).resize(size)} for size in sizes]
    batch = limited([{"role": "user", "content": pictures}], pixels=False)
    tokens = (batch.image_grid_thw.prod(1) // 4).tolist()
    assert max(tokens) <= 4 and tokens[0] == tokens[3] == 4


@pytest.mark.parametrize("size", [(40, 60), (250, 333), (427, 640), (9, 300), (500, 30)])
def test_pixels_are_those_of_transformers(size, photos, processor, tiny_checkpoint):
    photo = np.asarray(Image.fromarray(photos[1]).resize(size[::-1]))
    theirs = Glm4vImageProcessorPil.from_pretrained(tiny_checkpoint)(photo, return_tensors="pt")
    ours = processor([{"role": "user", "content": [{"type": "image", "image": photo}]}])
    assert ours.image_grid_thw.tolist() == theirs["image_grid_thw"].tolist()
    difference = (ours.pixel_values - theirs["pixel_values"]).abs().max() * 0.2758  # back on the 0–1 scale
    assert difference <= 1e-6  # the bar is 2 / 255


@pytest.mark.parametrize("size", [(56, 84), (140, 224), (420, 616), (448, 672)])
def test_resizing_is_that_of_torch_too(size, photos):
    """transformers' torchvision processor resizes with this op: bicubic, antialias, bytes."""
    photo = torch.tensor(photos[1]).permute(2, 0, 1)[None]
    wanted = F.interpolate(photo, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    difference = torch.from_numpy(Picture(photos[1]).pixels(*size)).int() - wanted.int()
    assert difference.abs().max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "transparent palette"])
def test_modes_are_read_as_transformers_reads_them(mode, photos, tiny_checkpoint):
    photo = Image.fromarray(photos[0][:90, :120])
    if mode in ("LA", "RGBA"):
        photo.putalpha(Image.fromarray(photos[1][:90, :120, 0]))
    image = photo.convert("P" if mode == "transparent palette" else mode)
    if mode == "transparent palette":
        image.info["transparency"] = 3
    convert = partial(Glm4vImageProcessorPil().process_image, do_convert_rgb=True)
    if mode in ("LA", "RGBA") and not convert(Image.new("RGBA", (1, 1))).any():
        pytest.skip("this version of transformers drops transparency, and shows what lies behind")
    assert np.array_equal(Picture(image).pixels(90, 120), convert(image).transpose(1, 2, 0))
    if mode not in ("YCbCr", "HSV"):
        file = stated(image, "TIFF" if mode == "CMYK" else "PNG")
        assert np.array_equal(Picture(file).pixels(90, 120), Picture(image).pixels(90, 120))


def test_cmyk_jpeg_and_sixteen_bits(photos):
    photo = photos[0][:64, :96]
    jpeg = Picture(stated(Image.fromarray(photo).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(jpeg.pixels(64, 96).astype(int) - photo).mean() < 3
    grey = photo[..., 1].astype(np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(Picture(stated(grey * 257, kind)).pixels(64, 96), np.repeat(grey[..., None], 3, -1))
    # A copy of a PGM is of 32 bits and knows nothing of its file: it is read when it says what it is.
    for copied in (Image.open(BytesIO(stated(grey * 257, "PPM"))).copy(), Image.fromarray(257 * grey.astype(np.int32))):
        assert np.array_equal(Picture(copied.convert("I;16")).pixels(64, 96), np.repeat(grey[..., None], 3, -1))


@pytest.mark.parametrize("most", [255, 1000, 4095, 65535])
@pytest.mark.parametrize("kind", ["P2", "P5"])
def test_greys_of_netpbm(kind, most, photos, tmp_path):
    """In words or bytes, of as many bits as the file says: opened here or by the caller."""
    grey = photos[0][:64, :96, 1]
    values = np.rint(grey / 255 * most).astype(">u2" if most > 255 else np.uint8)
    pixels = values.tobytes() if kind == "P5" else " ".join(map(str, values.flat)).encode()
    file = tmp_path / "grey.pgm"
    file.write_bytes(f"{kind}\n# x-rays\n96 64\n{most}\n".encode() + pixels)
    for source in (file, file.read_bytes(), Image.open(file)):
        assert np.array_equal(Picture(source).pixels(64, 96), np.repeat(grey[..., None], 3, -1))


def test_pixels_of_32_bits(photos):
    """Bytes in wider numbers are bytes, as transformers has them; anything else is of no known brightness."""
    grey = photos[0][:64, :96, 1].astype(np.int32)
    for source in (Image.fromarray(grey), stated(grey, "TIFF")):
        image = Image.open(BytesIO(source)) if isinstance(source, bytes) else source
        theirs = Glm4vImageProcessorPil().process_image(image, do_convert_rgb=True)
        ours = Picture(source).pixels(64, 96)
        assert np.array_equal(ours, theirs.transpose(1, 2, 0)) and np.array_equal(ours[..., 0], grey)
    for pixels, found in (
        (grey * 257, f"{257 * grey.min()} to {257 * grey.max()}"),
        (-grey, f"{-grey.max()} to {-grey.min()}"),
    ):
        said = "pixels of 32 bits must be from 0 to 255, or greys of 16 bits as mode I;16 (image.convert), got " + found
        with pytest.raises(InputError, match=f"^image: image in memory: cannot be read: {re.escape(said)}$"):
            Picture(Image.fromarray(pixels)).pixels(64, 96)


def test_floating_point_pixels_are_refused():
    file = stated(np.full((4, 6), 0.5, np.float32), "TIFF")
    with pytest.raises(InputError, match="cannot be read: pixels must be integers of 8 or 16 bits"):
        Picture(file).pixels(28, 28)


def exif_last(png):
    """The same PNG with its EXIF chunk behind the pixels, which its specification allows."""
    start = png.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    return png[:start] + png[end:-12] + png[start:end] + png[-12:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG, EXIF last", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [0, *range(1, 9), 77])
def test_photographs_stand_upright(kind, orientation, photos):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = stated(photos[0][:60, :100], kind.partition(",")[0], exif=exif)
    file = exif_last(file) if kind.endswith("last") else file
    wanted = ImageOps.exif_transpose(Image.open(BytesIO(file))).convert("RGB")
    picture = Picture(file)
    assert (picture.width, picture.height) == wanted.size
    assert np.array_equal(picture.pixels(picture.height, picture.width), np.asarray(wanted))
    opened = Picture(Image.open(BytesIO(file)))
    assert np.array_equal(opened.pixels(picture.height, picture.width), np.asarray(wanted))


def test_an_image_that_was_closed_before(photos):
    with Image.open(BytesIO(stated(photos[0][:28, :28]))) as image:
        pass
    with pytest.raises(InputError, match=r"^image: image in memory: cannot be read: \w+"):
        Picture(image).pixels(28, 28)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind, photos):
    frames = [Image.fromarray(photo[:50, :70]) for photo in photos]
    exact = {"lossless": True} if kind == "WEBP" else {}
    still = stated(frames[0], kind, **exact)
    moving = stated(frames[0], kind, save_all=True, append_images=frames[1:], **exact)
    assert np.array_equal(Picture(moving).pixels(50, 70), Picture(still).pixels(50, 70))


def test_every_source_gives_the_same_pixels(photos, tmp_path):
    photo = photos[0][:50, :70]
    file, path = stated(photo), tmp_path / "a picture,ü.png"
    path.write_bytes(file)
    url = "data:image/png;base64," + base64.b64encode(file).decode()
    urls = [url, url.replace("data:image/png;base64", "DATA:;BASE64")]
    sources = [file, path, str(path), path.as_uri(), *urls, photo, Image.fromarray(photo)]
    for source in sources:
        picture = Picture(source)
        assert (picture.height, picture.width) == (50, 70)
        assert np.array_equal(picture.pixels(50, 70), photo)


@pytest.mark.parametrize("name", ["a:b.png", "c:data.png", "data", "http"])
def test_names_of_files_that_look_like_urls(name, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(stated(photos[0]))
    assert np.array_equal(Picture(name).pixels(*photos[0].shape[:2]), photos[0])


def test_sizes_need_the_header_alone(photos):
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        file = stated(photos[0], kind)
        picture = Picture(file[: len(file) // 2])
        assert (picture.height, picture.width) == (427, 640)
        with pytest.raises(InputError, match=r"^image: \d+ bytes: cannot be read: [^\n]*$"):
            picture.pixels(28, 28)


def bomb():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (b"plain text", "image: 10 bytes: is not an image"),
        (b"", "image: 0 bytes: is not an image"),
        (bomb(), r"image: 69 bytes: Image size \(3600000000 pixels\) exceeds limit .*bomb"),
        ("", "image: a file must have a name, got ''"),
        ("nowhere.png", "image: nowhere.png: no such file"),
        ("/", "image: /: is not a file"),
        ("a" * 5000, "image: a{300}: cannot be read: File name too long"),
        ("no\nwhere\x1b[2J.png", r"image: no where\\x1b\[2J.png: no such file"),
        ("file://[x", r"image: file://\[x: cannot be read: Invalid IPv6 URL"),
        ("data:image/png;base64,é", "image: data:image/png;base64,…: is not base64: "),
        ("http://localhost/a.png", "image: http://localhost/a.png: network access is off; allow_network=True"),
        ("data:image/png,abc", "image: data:image/png,…: a data URL must be data:<type>;base64,<bytes>"),
        ("data:image/png;base64,a", "image: data:image/png;base64,…: is not base64: "),
        (np.zeros((4, 4, 2), np.uint8), r"image: array must be uint8 \[H, W\] or .*, got uint8 \[4, 4, 2\]"),
        (np.zeros((4, 4, 3), np.float32), r"image: array must be uint8 .*, got float32 \[4, 4, 3\]"),
        (7, "image: must be a path, URL, bytes, PIL image or array, got int"),
        (Image.new("RGB", (0, 5)), "image: image in memory: has no pixels, it is 0×5"),
    ],
)
def test_a_bad_image_is_one_line(source, text):
    with pytest.raises(InputError, match=f"^{text}[^\n]*$"):
        Picture(source)


def test_a_file_that_changes_after_its_size_was_read(photos, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(stated(photos[0][:50, :70]))
    picture = Picture(path)
    path.write_bytes(stated(photos[0][:60, :70]))
    with pytest.raises(InputError, match=r"photo.png: cannot be read: is 70×60 now, its header said 70×50"):
        picture.pixels(28, 28)


def test_network_only_when_asked_for(monkeypatch, photos):
    file = stated(photos[0][:50, :70])
    asked = []

    class Response(BytesIO):
        length = None  # not announced

    def respond(url, timeout):
        asked.append(url)
        return Response(file)

    monkeypatch.setattr("urllib.request.urlopen", respond)
    url = "HTTPS://example.org/photo.png"
    with pytest.raises(InputError, match="network access is off"):
        find("image", url)
    assert not asked
    assert Picture(url, allow_network=True).pixels(50, 70).shape == (50, 70, 3)
    with pytest.raises(InputError, match=r"image: http://a b: cannot be downloaded: .*control characters"):
        monkeypatch.undo()
        find("image", "http://a b", allow_network=True)
    monkeypatch.setattr("urllib.request.urlopen", respond)
    monkeypatch.setattr("glm4v.source.DOWNLOAD_LIMIT_BYTES", 100)
    with pytest.raises(InputError, match="is larger than 100 bytes"):
        Picture(url, allow_network=True)
    assert asked == [url, url]


@pytest.mark.parametrize("lost", [0, 7])
def test_a_download_that_is_cut_off(lost, photos, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    file = stated(photos[0][:50, :70])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", len(file))
            self.end_headers()
            self.wfile.write(file[: len(file) - lost])

    with HTTPServer(("127.0.0.1", 0), Handler) as server, ThreadPoolExecutor() as pool:
        pool.submit(server.handle_request)
        url = f"http://127.0.0.1:{server.server_port}/花%20.png"
        if lost:
            with pytest.raises(
                InputError, match=f"^image: {url}: cannot be downloaded: the last 7 bytes did not come$"
            ):
                find("image", url, allow_network=True)
        else:
            assert find("image", url, allow_network=True).data == file


def test_extremes_when_asked_for(photos, processor, tiny_checkpoint):
    strip = Image.fromarray(photos[0]).resize((9000, 30))
    messages = [{"role": "user", "content": [{"type": "image", "image": strip}]}]
    error = r"image: image in memory: aspect ratio must be at most 200 \(max_aspect_ratio\), got 300$"
    for use in (processor, processor.count_tokens):
        with pytest.raises(InputError, match=error):
            use(messages)
    with pytest.raises(InputError, match=r"must be at most 200 \(max_aspect_ratio\), got 200\.036$"):
        processor([{"role": "user", "content": [{"type": "image", "image": strip.resize((5601, 28))}]}])
    wide = Processor.from_pretrained(tiny_checkpoint, max_aspect_ratio=400)
    assert wide(messages).image_grid_thw.tolist() == [[1, 2, 642]]
    screen = [{"role": "user", "content": [{"type": "image", "image": Image.new("L", (7680, 4320))}]}]
    assert processor.count_tokens(screen) < 6144 + 10
    large = Processor.from_pretrained(tiny_checkpoint, max_pixels=2 * 7700 * 4400)
    assert large.count_tokens(screen) == 274 * 154 + 8
