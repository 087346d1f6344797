import math
import tracemalloc
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.video_utils import VideoMetadata

from glm4v import InputError
from glm4v.video import Video, sample_frames

CODECS = [
    ("film.mp4", None),
    ("film.webm", "libvpx-vp9"),
    ("film8.webm", "libvpx"),
    ("film.mkv", "mpeg4"),
    ("film.gif", "gif"),
    ("film.flv", "flv"),  # whose packets have no duration
]
CODECS = [
    pytest.param(name, codec, marks=pytest.mark.skipif(codec not in (None, *av.codecs_available), reason="no encoder"))
    for name, codec in CODECS
]


def transformers_frames(count, fps, duration=None):
    metadata = VideoMetadata(total_num_frames=count, fps=fps, duration=count / fps if duration is None else duration)
    return Glm4vVideoProcessor().sample_frames(metadata).tolist()


def definition(times, duration):
    """The sampling rule, word by word: 2 frames a second up to 300 s, 600 equally spaced ones beyond."""
    if duration <= 300:
        wanted = [i / 2 for i in range(max(math.floor(duration * 2), 1))]
    elif len(times) <= 600:
        wanted = times
    else:
        wanted = [duration * i / 599 for i in range(600)]
    chosen = []
    for second in wanted:
        later = [i for i, time in enumerate(times) if time >= second - 1e-6]
        index = later[0] if later else len(times) - 1
        if index not in chosen:
            chosen.append(index)
    return chosen + chosen[-1:] * (len(chosen) % 2)


@pytest.mark.parametrize("fps", [0.5, 1, 2, 2.5, 10, 12.5, 24000 / 1001, 24, 25, 30000 / 1001, 30, 50, 60, 120])
def test_even_frames_are_sampled_as_transformers_does(fps):
    for count in [1, 2, 3, 7, 24, 48, 49, 601, 750, 9000, 9001, 18001]:
        ours = sample_frames(np.arange(count) / fps, count / fps, 2, 300).tolist()
        assert ours == transformers_frames(count, fps)


@given(st.integers(1, 4000), st.floats(0.2, 130))
def test_any_even_frames_are_sampled_as_transformers_does(count, fps):
    grid = np.arange(count) * fps / 2
    assume(np.abs(grid - grid.round()).min(where=grid != grid.round(), initial=1) > 1e-3)  # where floats alone decide
    assume(abs(count / fps * 2 - round(count / fps * 2)) > 1e-3 and count / fps < 300)
    assert sample_frames(np.arange(count) / fps, count / fps, 2, 300).tolist() == transformers_frames(count, fps)


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=60), st.integers(1, 2000))
def test_uneven_frames_are_sampled_by_their_times(gaps, last):
    times = np.cumsum([0, *gaps]) / 1000
    duration = times[-1] + last / 1000
    assert sample_frames(times, duration, 2, 300).tolist() == definition(times.tolist(), duration)


def test_long_uneven_films():
    times = np.cumsum(np.random.default_rng(0).uniform(0.1, 1.0, 900))
    times -= times[0]
    chosen = sample_frames(times, times[-1] + 0.5, 2, 300)
    assert chosen.tolist() == definition(times.tolist(), times[-1] + 0.5)
    assert 300 < len(chosen) <= 600


def test_a_film_shows_something_however_few_frames_are_asked_for():
    assert sample_frames(np.arange(10) / 5, 2.0, 2, 0.3).tolist() == [0, 0]


def decode_all(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize(("name", "codec"), CODECS)
def test_files_give_the_sampled_frames(name, codec, film):
    rate = 10 if codec == "gif" else 24
    path = film(name, **({"codec": codec} if codec else {}), rate=rate, count=5 * rate // 2)
    wanted = transformers_frames(5 * rate // 2, rate)
    for source in (path, str(path), path.as_uri(), path.read_bytes()):
        video = Video(source)
        assert video.indices.tolist() == wanted
        assert (video.height, video.width, video.num_frames) == (64, 96, 6)
        assert np.allclose(video.timestamps, [i / rate for i in wanted], atol=1e-3)
    frames = decode_all(path)
    resized = [np.asarray(Image.fromarray(frames[i]).resize((56, 28), Image.Resampling.BICUBIC)) for i in wanted]
    assert np.array_equal(video.frames(28, 56), resized)


def test_variable_frame_rate_goes_by_the_clock(film):
    ticks = [0, 40, 500, 510, 900, 1700, 2300, 2310, 2320, 4000]
    path = film(ticks=ticks, count=len(ticks))
    video = Video(path)
    assert video.indices.tolist() == [0, 2, 5, 6, 9, 9]  # at 0, 0.5, 1, 1.5, 2, 2.5, ... seconds
    assert video.timestamps == [0, 0.5, 1.7, 2.3, 4, 4]
    assert np.array_equal(video.frames(64, 96), [decode_all(path)[i] for i in video.indices])


@pytest.mark.parametrize(("name", "codec"), [("film.ts", {}), ("film.mpg", {"codec": "mpeg2video"})])
def test_films_joined_end_to_end_go_on(name, codec, film):
    """Each has a clock of its own, which starts again at the seam."""
    first = film(name, **codec, count=72).read_bytes()
    second = film(name, **codec, count=48, photo=1).read_bytes()
    joined = Video(first + second)
    assert np.allclose(np.diff(joined.reader.times), 1 / 24, atol=1e-4) and len(joined.reader.times) == 120
    assert joined.indices.tolist() == transformers_frames(120, 24)
    parts = [Video(part).frames(64, 96) for part in (first, second)]
    assert np.array_equal(joined.frames(64, 96), np.concatenate(parts))


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="no encoder")
def test_reordered_frames_in_a_file_without_times_of_showing(film):
    path = film("film.avi", codec="libx264", count=60)  # with B-frames
    frames, video = decode_all(path), Video(path)  # decoders put them in order
    assert video.indices.tolist() == transformers_frames(60, 24)
    assert video.timestamps == [i / 24 for i in video.indices]
    assert np.array_equal(video.frames(64, 96), [frames[i] for i in video.indices])


def test_more_than_five_minutes(film):
    path = film(codec="mpeg4", rate=Fraction(5, 2), count=800, size=(32, 32))
    video = Video(path)  # 320 s
    assert video.indices.tolist() == transformers_frames(800, 2.5)
    assert video.num_frames == 600
    assert video.frames(28, 28).shape == (600, 28, 28, 3)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_a_phone_film_stands_upright(degrees, mirrored, film):
    path = film(rotation=(degrees, mirrored))  # counterclockwise, as FFmpeg counts; then left and right change places
    video = Video(path)
    lying = np.stack([decode_all(path)[i] for i in video.indices])
    upright = np.rot90(lying, degrees // 90, (1, 2))
    assert np.array_equal(video.frames(64, 96), upright[:, :, ::-1] if mirrored else upright)


def test_frames_with_a_rate(photos, tmp_path):
    stack = np.stack([photos[0][i : i + 60, :80] for i in range(20)])
    files = [tmp_path / f"{i}.png" for i in range(20)]
    for frame, file in zip(stack, files, strict=True):
        Image.fromarray(frame).save(file)
    for frames in (stack, list(stack), [Image.fromarray(frame) for frame in stack], files):
        video = Video(frames, fps=8)
        assert video.indices.tolist() == [0, 4, 8, 12, 16, 16] == transformers_frames(20, 8)
        assert video.timestamps == [0, 0.5, 1, 1.5, 2, 2]
        assert np.array_equal(video.frames(60, 80), stack[video.indices])
    without = r'^video: fps must be given for a list of frames, as in \{"type": "video", .*"fps": …\}, got none$'
    for frames in (stack, list(stack), files):  # transformers raises too
        with pytest.raises(InputError, match=without):
            Video(frames)
    with pytest.raises(InputError, match="video: frames must all be 80×60, frame 4 is 60×60"):
        Video([*stack[:4], stack[4][:, :60], *stack[5:]], fps=8).frames(60, 80)


def test_memory_holds_the_sampled_frames_alone(film):
    path = film(codec="mpeg4", size=(640, 360), count=120, rate=60)
    Video(path).frames(28, 56)
    tracemalloc.start()
    assert Video(path).frames(28, 56).shape[0] == 4
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 640 * 360 * 3  # of 120 frames


def test_bad_videos_are_one_line(film, tmp_path, photos):
    path = film()
    whole = path.read_bytes()
    sound = tmp_path / "sound.wav"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 8000, 800, "NONE", ""))
        file.writeframes(bytes(1600))
    playlist = tmp_path / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    notes = tmp_path / "notes.txt"
    notes.write_text("Not a film.\n" * 500)
    for source, text in [
        (tmp_path / "nowhere.mp4", ".*nowhere.mp4: no such file"),
        (b"plain text", "10 bytes: cannot be read as a video: Invalid data found when processing input"),
        (notes, ".*notes.txt: is a text, not a video"),
        (whole[: len(whole) // 2], r"\d+ bytes: cannot be read as a video: "),
        (sound, ".*sound.wav: has no video stream"),
        (playlist, ".*list.m3u8: cannot be read as a video: "),
        ("https://localhost/a.mp4", "https://localhost/a.mp4: network access is off"),
        (7, "must be a path, URL, bytes or a sequence of images, got int"),
        (np.zeros((), np.uint8), "must be a path, URL, bytes or a sequence of images, got ndarray"),
        (photos[0], r"an array must be uint8 \[N, H, W, 3\], got uint8 \[427, 640, 3\]"),
    ]:
        with pytest.raises(InputError, match=f"^video: {text}[^\n]*$"):
            Video(source)
    with pytest.raises(InputError, match="video: fps must be left out for files"):
        Video(path, fps=3)
    for fps in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match=f"positive fps, got 1 at {fps}"):
            Video([photos[0]], fps=fps)
    with pytest.raises(InputError, match=r"^video: a sequence must have frames and a positive fps, got 0 at 24$"):
        Video([], fps=24)


def test_bytes_name_no_local_files(film, monkeypatch):
    monkeypatch.chdir(film().parent)
    with pytest.raises(InputError, match=r"^video: 35 bytes: cannot be read as a video: [^\n]*$"):
        Video(b"ffconcat version 1.0\nfile film.mp4\n")


def test_a_film_that_is_cut_off(photos, tmp_path):
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(48):
            crop = np.ascontiguousarray(photos[1][200 + i : 264 + i, 200:296])  # detailed: most bytes are frames
            container.mux(stream.encode(av.VideoFrame.from_ndarray(crop, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    with pytest.raises(InputError, match=r"^video: \d+ bytes: is cut off: \d+ of 48 frames are there$"):
        Video(whole[: len(whole) // 2])


@pytest.mark.parametrize(("name", "codec"), [("film.mkv", "mpeg4"), ("film.webm", "libvpx")])
def test_matroska_that_is_cut_off(name, codec, film):
    whole = film(name, codec=codec, size=(320, 240)).read_bytes()
    assert Video(whole).num_frames == 4
    with pytest.raises(InputError, match=r"^video: \d+ bytes: is cut off: [01]\.\d of 2\.0 seconds are there$"):
        Video(whole[: len(whole) * 4 // 5])


@pytest.mark.parametrize("format", ["matroska", "webm"])
def test_matroska_whose_last_frame_stays_for_long(format, film, tmp_path):
    """As the last of some slides: no frame of such a file tells how long it lasts, but the file tells its length."""
    path, ticks = tmp_path / "slides", [0, *range(200, 5000, 100)]
    short = film("film.webm", codec="libvpx", count=len(ticks), ticks=ticks, size=(320, 240))
    with av.open(str(short)) as source, av.open(str(path), "w", format=format) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        packets[-1].duration = 5000
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
    whole = path.read_bytes()
    for file in (path, whole, whole + b"behind it"):
        reader = Video(file).reader
        assert reader.duration == pytest.approx(9.9) and np.allclose(reader.times * 1000, ticks)
    most = len(whole) * 4 // 5
    for damaged in (whole[:most], whole[:most] + bytes(len(whole) - most), whole[:-1]):
        with pytest.raises(InputError, match=r"^video: \d+ bytes: is cut off: [3-5]\.\d of 9\.9 seconds are there$"):
            Video(damaged)
