"""Videos in: frame times first, without decoding; then the sampled frames, one at a time.

A file's packets carry the time of every frame, so that sampling, sizes and token counts are known before any frame is
decoded, for variable frame rates too. Decoding keeps only the sampled frames, already resized.
Dims: N frames, F sampled frames, H, W pixels.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import IO, Any, Protocol, TypeAlias

import av
import numpy as np
from av.container import InputContainer
from PIL import Image

from .errors import InputError
from .image import ImageLike, Picture
from .kinds import is_list
from .source import Source, find

VideoLike: TypeAlias = "str | os.PathLike[str] | bytes | Sequence[ImageLike] | np.ndarray"

MATROSKA_SEGMENT = b"\x18\x53\x80\x67"
TS_DISCONT = 0x200  # FFmpeg's flag for formats whose clock may jump
# Where a file keeps no times of showing, as AVI, FFmpeg's are wrong with these codecs: how far frames move is not known
# before they are decoded. Decoders put them in order, so that they are counted instead.
REORDERED = ("h264", "hevc", "vvc")


def rate_of(fps: float | None) -> float:
    """The rate that came with a sequence of frames, which has no clock of its own."""
    if fps is None:
        part = '{"type": "video", "video": […], "fps": …}'
        raise InputError(f"video: fps must be given for a list of frames, as in {part}, got none")
    return fps


def sample_frames(times: np.ndarray, duration: float, fps: float, max_duration: float) -> np.ndarray:
    """Indices of the frames that the model sees, an even count: ``fps`` per second up to ``max_duration`` seconds.

    At each multiple of ``1 / fps`` the first frame that is not earlier, the last frame at the latest, each frame once.
    Longer videos give ``max_duration * fps`` frames at equal distances. An odd count repeats the last frame. With
    evenly spaced frames this is transformers' `Glm4vVideoProcessor.sample_frames`.

    Args:
        times: seconds of each frame from the first one on, ascending.
        duration: seconds from the first frame to the end of the last.
        fps: frames wanted per second.
        max_duration: seconds up to which ``fps`` holds.
    """
    most = max(int(max_duration * fps), 1)
    if duration <= max_duration:
        targets = np.arange(max(int(duration * fps), 1)) / fps
    elif len(times) > most:
        targets = np.linspace(0, duration, most)
    else:
        targets = times
    # A microsecond of slack: the same instant reaches this line by two roundings.
    first_not_earlier = np.searchsorted(times, targets - 1e-6)
    indices = np.unique(np.minimum(first_not_earlier, len(times) - 1))
    return np.append(indices, indices[-1:]) if len(indices) % 2 else indices


class Reader(Protocol):
    """Frames with a clock. ``times [N]`` are seconds from the first frame on, ``duration`` reaches past the last."""

    source: Source
    height: int
    width: int
    times: np.ndarray
    duration: float

    def read(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """The wanted frames in order, upright RGB uint8 ``[H, W, 3]``, one at a time. ``indices`` ascend."""
        ...


class Film:
    """A video file. Its packets tell the frames' times; nothing is decoded before `read`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        with self._opened() as container:
            stream = container.streams.video[0]
            self.height, self.width = stream.codec_context.height, stream.codec_context.width
            self._counted = container.format.name == "avi" and stream.codec_context.name in REORDERED
            promised, present, known = len(stream.index_entries), 0, []
            for packet in _packets(container):
                present += packet.size > 0
                # Packets flagged to be discarded lie outside the file's edit list: no frame comes of them.
                time = packet.dts if self._counted else packet.pts
                if packet.size and time is not None and not packet.is_discard:
                    known.append((time, packet.duration or 0))
            known.sort()
            rate, tick = stream.average_rate, stream.time_base or Fraction(1)
            stated = _seconds(stream.metadata.get("DURATION"))
        if not known or not (self.height and self.width):
            raise source.error("has no frames with a time and a size")
        if present < promised:
            raise source.error(f"is cut off: {present} of {promised} frames are there")
        self._ticks = [time for time, _ in known]  # of the file's own clock
        # FLV and browsers' recordings say of no frame how long it lasts: the last one, as long as the one before it.
        last = known[-1][1] or known[-1][0] - known[-2:][0][0]
        span, end = (known[-1][0] + last - known[0][0]) * tick, (known[-1][0] + last) * tick
        longest = max((b - a for a, b in pairwise(self._ticks)), default=0) * tick
        if end < stated - max(3 * span / len(known), 2 * longest):  # the last one's time is counted in several ways
            if not _is_whole(source):
                raise source.error(f"is cut off: {float(end):.1f} of {stated:.1f} seconds are there")
            span += Fraction(stated) - end  # the last frame stays for long, as a slide does
        # Some containers round times to milliseconds; where the frame rate explains them, it is the exact duration.
        exact = len(known) / rate if rate else span
        self.duration = float(exact if abs(exact - span) <= 2 * tick else span)
        # One correctly rounded division, so that whole seconds stay whole.
        self.times = (np.array(self._ticks) - self._ticks[0]) * tick.numerator / tick.denominator

    def read(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        wanted, done = [self._ticks[index] for index in indices], 0
        with self._opened() as container:
            container.streams.video[0].thread_type = "AUTO"
            decoded = (frame for packet in _packets(container) for frame in packet.decode())
            for number, frame in enumerate(decoded):
                time = self._ticks[min(number, len(self._ticks) - 1)] if self._counted else frame.pts
                if time is None or time < wanted[done]:
                    continue
                upright = _upright(frame)
                while done < len(wanted) and wanted[done] <= time:
                    yield upright
                    done += 1
                if done == len(wanted):
                    return
        raise self.source.error(f"is cut off: decoding gave {done} of {len(wanted)} sampled frames")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[InputContainer]:
        """The file's container. What FFmpeg raises inside becomes one line that names the file."""
        # A playlist must not make FFmpeg fetch what it names; one that came as bytes, nothing at all.
        protocols = {"protocol_whitelist": "none" if isinstance(self.source.data, bytes) else "file"}
        try:
            with av.open(self.source.open(), container_options=protocols, metadata_errors="replace") as container:
                if container.format.name == "tty":  # FFmpeg would film a terminal that prints it
                    raise self.source.error("is a text, not a video")
                if not container.streams.video or container.streams.video[0].codec_context is None:
                    raise self.source.error("has no video stream in a known format")
                yield container
        except (av.FFmpegError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self.source.error(f"cannot be read as a video: {reason}") from None


def _packets(container: InputContainer) -> Iterator[Any]:
    """The film's packets in the file's order. A clock that starts again, as where MPEG streams were joined end to end,
    goes on instead; the rule is ffmpeg's."""
    stream = container.streams.video[0]
    restarts, ahead, due = container.format.flags & TS_DISCONT, 0, None
    for packet in container.demux(stream):
        if restarts and packet.dts is not None:
            if due is not None and (due - packet.dts - ahead) * packet.time_base > 0.1:
                ahead = due - packet.dts
            packet.dts += ahead
            due = packet.dts + (packet.duration or 0)
        if packet.pts is not None:
            packet.pts += ahead
        yield packet


def _is_whole(source: Source) -> bool:
    """Whether a Matroska file goes on to its end, by the sizes of its elements (RFC 8794). What was sent while it was
    recorded says none."""
    with io.BytesIO(source.data) if isinstance(source.data, bytes) else source.data.open("rb") as file:
        at, end = 0, file.seek(0, os.SEEK_END)
        while at < end:
            file.seek(at)
            name, size = _number(file), _number(file)
            if not name or not size:  # the zeros of a file whose place was reserved
                return False
            at = file.tell()
            after = at + int.from_bytes(size, "big") - (1 << 7 * len(size))
            if name == MATROSKA_SEGMENT and after <= end:  # the element that holds all others
                end = after
            else:
                at = after
    return at == end


def _number(file: IO[bytes]) -> bytes:
    """EBML's: as many zeros as further bytes, a one, and the value; empty where none begins."""
    first = file.read(1)
    return first + file.read(8 - first[0].bit_length()) if first.strip(b"\0") else b""


def _seconds(clock: str | None) -> float:
    """A time as Matroska's tags have it, ``01:02:03.4``; 0 where there is none."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", clock or "")
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """Pixels as they are shown: a phone stores an upright film lying on its side, or a selfie's in a mirror, and beside
    it the matrix ``[a, b, u, c, d, v, ...]`` that takes (right, down) to (a right + c down, b right + d down)."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix))
        if a * d < b * c:  # the angle is that of what lies to the right; here, what lies down goes the other way
            pixels = pixels[::-1]
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


class Slides:
    """Single images, shown at a rate of ``fps``."""

    def __init__(self, images: Sequence[ImageLike] | np.ndarray, fps: float | None, allow_network: bool) -> None:
        self.source = Source("video", "frames", b"")
        if not is_list(images):
            found = type(images).__name__
            raise InputError(f"video: must be a path, URL, bytes or a sequence of images, got {found}")
        if isinstance(images, np.ndarray) and images.ndim != 4:  # one picture would be a film of its rows
            raise InputError(f"video: an array must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
        fps = rate_of(fps)
        if not 0 < fps < math.inf or len(images) == 0:
            raise InputError(f"video: a sequence must have frames and a positive fps, got {len(images)} at {fps}")
        self._images, self._allow_network = images, allow_network
        first = self._open(0)
        self.height, self.width = first.height, first.width
        self.times, self.duration = np.arange(len(images)) / fps, len(images) / fps

    def read(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        for index in indices:
            picture = self._open(index)
            if (picture.height, picture.width) != (self.height, self.width):
                found = f"{picture.width}×{picture.height}"
                raise InputError(f"video: frames must all be {self.width}×{self.height}, frame {index} is {found}")
            yield picture.pixels(self.height, self.width)

    def _open(self, index: int) -> Picture:
        return Picture(self._images[index], self._allow_network)


class Video:
    """One video, sampled: ``height``, ``width``, ``num_frames`` and ``timestamps`` are known before decoding.

    ``timestamps`` are the seconds of the sampled frames. ``height`` and ``width`` are the stored ones; `frames` turns
    a film that lies on its side.
    """

    def __init__(
        self,
        source: VideoLike,
        fps: float | None = None,
        sample_fps: float = 2,
        max_duration: float = 300,
        allow_network: bool = False,
    ) -> None:
        """Reads headers and packet times.

        Args:
            source: a file's path, URL or bytes; or frames as a sequence of images or uint8 ``[N, H, W, 3]``.
            fps: rate of a sequence of frames, which must have one; files carry their own frame times.
            sample_fps: frames wanted per second.
            max_duration: seconds up to which ``sample_fps`` holds.
            allow_network: whether http(s) URLs are fetched.

        Raises:
            InputError: not a video, damaged, without frames, or frames without a rate.
        """
        if not isinstance(source, str | bytes | os.PathLike):
            self.reader: Reader = Slides(source, fps, allow_network)
        elif fps is None:
            self.reader = Film(find("video", source, allow_network))
        else:
            raise InputError("video: fps must be left out for files, which carry their own frame times")
        self.source, self.height, self.width = self.reader.source, self.reader.height, self.reader.width
        self.indices = sample_frames(self.reader.times, self.reader.duration, sample_fps, max_duration)
        self.timestamps: list[float] = self.reader.times[self.indices].tolist()
        self.num_frames = len(self.indices)

    def frames(self, height: int, width: int) -> np.ndarray:
        """The sampled frames, resized: uint8 ``[F, height, width, 3]``, or width by height where the film is turned.

        Raises:
            InputError: the video is damaged or cut off.
        """
        frames = np.empty((self.num_frames, height, width, 3), np.uint8)
        for position, frame in enumerate(self.reader.read(self.indices)):
            if position == 0 and (frame.shape[0] > frame.shape[1]) != (self.height > self.width):
                frames = frames.reshape(self.num_frames, width, height, 3)
            resized = Image.fromarray(frame).resize(frames.shape[2:0:-1], Image.Resampling.BICUBIC)
            frames[position] = np.asarray(resized)
        return frames
