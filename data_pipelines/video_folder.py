"""Video files: their frames at any rate, a directory of them as a source, writing them.

Times are seconds from a video's first frame. Files are not trusted: one may only be a video in one
of FORMATS (no playlist that opens other files), frames have at most MOST_PIXELS, which is looked at
before anything is decoded, and none stands for longer than LONGEST. Pixels are taken as square.
Legend: T frames, H rows, W columns, C colours of pixels.
"""

import contextlib
import dataclasses
import fractions
import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from data_pipelines import entries, image_folder

FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,gif"  # as FFmpeg calls them; mov is mp4 as well
MOST_PIXELS = 2**25  # of a frame: a little over 8K
LONGEST = 600.0  # seconds that one frame may stand: without it, a wrong time is endless repeats
LOST = 0.5  # seconds that may be missing at the end of a whole file
TOLERANCE = 1e-3  # seconds: Matroska and WebM round times to milliseconds
_THREADS = 1  # for one video: those who hurry read several, a second thread costs a third more
_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": FORMATS,
    "max_pixels": str(MOST_PIXELS),
    "threads": str(_THREADS),
}


class BadVideo(image_folder.BadFile):
    """A video that is corrupt, cut short, too small or too long; the message names it."""


@dataclasses.dataclass
class Video:
    """One video with its caption; `key` names it within its source. `fps` is the file's own rate,
    an average where it varies; height and width are those of the frames."""

    key: str
    path: pathlib.Path | BinaryIO
    caption: str
    fps: float
    height: int
    width: int

    def frames(
        self, fps: float = 0.0, start: float = 0.0, seconds: float = 0.0
    ) -> Iterator[np.ndarray]:
        """As `read_frames`."""
        return read_frames(self.path, fps, start, seconds)

    def clip(self, frames: int, fps: float = 0.0, start: float = 0.0) -> np.ndarray:
        """x_THWC: the first so many frames of `read_frames`, the last of them repeated where the
        video ends."""
        return _stack(list(itertools.islice(self.frames(fps, start), frames)), frames)


class VideoFolder(entries.Folder):
    """A random-access source: `folder[i]` is a Video or raises BadVideo."""

    def __init__(self, directory: str, list: str = "captions.jsonl"):
        """Raises ValueError for a missing directory or list, an empty one or one without `file`."""
        super().__init__(directory, list, "video")

    def __getitem__(self, index: int) -> Video:
        return open_video(self.entry(index), self.file(index))


def open_video(entry: entries.Entry, file: pathlib.Path | BinaryIO) -> Video:
    """A record of any source as a Video, or BadVideo."""
    _, fps, height, width = info(file)
    return Video(entry.key, file, entry.caption, fps, height, width)


def info(path: pathlib.Path | BinaryIO) -> tuple[int | None, float, int, int]:
    """(frames, frame rate, height, width) of a video, or BadVideo.

    The number of frames is what the file says, None if it does not say. Only one frame is decoded.
    """
    with _open(path) as video:
        height, width, _ = _pixels(next(video.frames()).frame).shape
        return video.count, video.fps, height, width


def read_frames(
    path: pathlib.Path | BinaryIO, fps: float = 0.0, start: float = 0.0, seconds: float = 0.0
) -> Iterator[np.ndarray]:
    """The frames of a video as uint8 x_HWC, RGB, turned as the file says; one at a time in memory.

    From the frame that is seen at `start`, for `seconds` (0: to the end). With `fps` 0 each of the
    file's frames once. Otherwise frame k is the one that is seen at start + k / fps, the last that
    begins then or earlier: frames repeat or drop out, also where the file's own rate varies.

    Raises BadVideo, maybe after some frames; ValueError for a negative argument.
    """
    if min(fps, start, seconds) < 0:
        raise ValueError(f"fps {fps}, start {start}, seconds {seconds}: none may be negative")
    stop = start + seconds if seconds else math.inf
    with _open(path) as video:
        empty = True
        for frame in _select(video.frames(start), fps, start, stop):
            empty = False
            yield _pixels(frame)
        if empty:
            name = entries.file_name(path)
            raise BadVideo(f"{name}: no frame from {start:g} s on; start earlier")


def random_clip(
    path: pathlib.Path, frames: int, fps: float, reach: float, random: float
) -> np.ndarray:
    """x_THWC: `frames` frames at `fps` (0: the file's) from a random time, or BadVideo.

    The number in [0, 1) says which time, moved to one less than `reach` seconds after a keyframe,
    since all in between must be decoded. Where the video ends, its last frame is repeated.
    """
    with _open(path) as video:
        start = random * max(0.0, video.seconds - frames / (fps or video.fps))
        shown = video.frames(start)
        first = next(shown)
        start = first.start + max(0.0, start - first.start) % reach
        chosen = _select(itertools.chain([first], shown), fps, start, math.inf)
        found = [_pixels(frame) for frame in itertools.islice(chosen, frames)]
        # Sound may go on when the pictures have ended: then nothing is found.
        return _stack(found or [_pixels(first.frame)], frames)


def write_video(
    path: pathlib.Path, frames: Iterable[np.ndarray], fps: float, quality: float = 18
) -> None:
    """Writes frames, uint8 x_HWC in RGB, as mp4 (H.264, 4:2:0, BT.709).

    `quality` is x264's constant rate factor: 0 is best, 18 looks like the original, 51 is worst.
    The file appears when it is complete. Raises ValueError for no frames, odd or changing sizes or
    a rate that is none.
    """
    frames = iter(frames)
    first_HWC = next(frames, None)
    if first_HWC is None:
        raise ValueError(f"{path}: no frames to write")
    height, width, _ = first_HWC.shape
    if height % 2 or width % 2:
        raise ValueError(f"{path}: frames of {width}x{height} px; mp4 takes even sides, cut one")
    if not 0 < fps < math.inf:
        raise ValueError(f"{path}: {fps} frames a second; give a rate above 0")
    path = pathlib.Path(path)
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(f"file:{half}", "w", "mp4", {"movflags": "faststart"}) as container:
            stream = _add_stream(container, height, width, fps, quality)
            for x_HWC in itertools.chain([first_HWC], frames):
                if x_HWC.shape != first_HWC.shape:
                    shapes = f"{first_HWC.shape} and {x_HWC.shape}"
                    raise ValueError(f"{path}: frames of {shapes}; make them alike")
                container.mux(stream.encode(_frame(x_HWC)))
            container.mux(stream.encode(None))
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


class _Shown(NamedTuple):
    """A frame that is seen from `start` until `end`, in seconds."""

    start: float
    end: float
    frame: av.VideoFrame


class _Video:
    """An open video: what its file says of it, and its frames in order of time."""

    def __init__(self, file: pathlib.Path | BinaryIO):
        self._file, self._name = file, entries.file_name(file)
        self._open()
        stream = self._stream
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise BadVideo(f"{self._name}: no frame rate")
        self.fps, self.count = float(rate), stream.frames or None
        self._origin = float((stream.start_time or 0) * stream.time_base)
        self._length = float((stream.duration or 0) * stream.time_base)
        self.seconds = self._length or (self._container.duration or 0) / av.time_base
        self._check(stream.codec_context.height, stream.codec_context.width)

    def close(self) -> None:
        self._container.close()

    def frames(self, start: float = 0.0) -> Iterator[_Shown]:
        """From the last keyframe at or before `start`, or from an earlier one."""
        if start > 0:
            offset = int((start + self._origin) / self._stream.time_base)
            self._container.seek(offset, stream=self._stream)
            shown = self._decode()
            first = next(shown, None)
            if first and first.start <= start + TOLERANCE:
                return itertools.chain([first], shown)
            self.close()  # transport streams have no index: seeking overshoots
            self._open()
        shown = self._decode()
        first = next(shown, None)
        if not first:
            raise BadVideo(f"{self._name}: no frames")
        return itertools.chain([first], shown)

    def _open(self) -> None:
        if isinstance(self._file, pathlib.Path):
            # "file:" so that no name is read as a protocol.
            self._container = av.open(f"file:{self._file}", options=_OPTIONS)
        else:
            self._file.seek(0)
            self._container = av.open(self._file, options=_OPTIONS)
        # The cover picture of a song is a video stream to FFmpeg.
        streams = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & Disposition.attached_pic
        ]
        if not streams:
            raise BadVideo(f"{self._name}: no video stream")
        if not streams[0].codec_context:
            raise BadVideo(f"{self._name}: no decoder for this video")
        self._stream = streams[0]
        self._stream.thread_count = _THREADS
        self._stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}

    def _check(self, height: int, width: int) -> None:
        if height * width > MOST_PIXELS:
            raise BadVideo(f"{self._name}: {width}x{height} px, more than {MOST_PIXELS} pixels")
        if problem := image_folder.size_problem(height, width):
            raise BadVideo(f"{self._name}: {problem}")

    def _decode(self) -> Iterator[_Shown]:
        """All frames from where the file stands; the end of one is the start of the next."""
        size, waiting, end = None, None, 0.0
        for frame in self._container.decode(self._stream):
            if frame.time is None:
                raise BadVideo(f"{self._name}: a frame has no time")
            size = size or (frame.height, frame.width)
            if (frame.height, frame.width) != size:
                raise BadVideo(
                    f"{self._name}: frames of {size[1]}x{size[0]} and "
                    f"{frame.width}x{frame.height} px"
                )
            time = frame.time - self._origin
            if waiting:
                yield self._shown(*waiting, time)
            duration = float((frame.duration or 0) * frame.time_base) or 1 / self.fps
            waiting, end = (time, frame), time + duration
        if waiting:
            yield self._shown(*waiting, end)
        if waiting and end < self._length - LOST:
            raise BadVideo(f"{self._name}: cut short after {end:.2f} of {self._length:.2f} s")

    def _shown(self, start: float, frame: av.VideoFrame, end: float) -> _Shown:
        if end - start > LONGEST:
            raise BadVideo(f"{self._name}: a frame of {end - start:.0f} s, more than {LONGEST:.0f}")
        return _Shown(start, end, frame)


@contextlib.contextmanager
def _open(file: pathlib.Path | BinaryIO) -> Iterator[_Video]:
    """An open video; what FFmpeg finds wrong with it while it is open becomes BadVideo."""
    video, name = None, entries.file_name(file)
    try:
        video = _Video(file)
        yield video
    except FileNotFoundError:
        raise BadVideo(f"{name}: no such file") from None
    except av.FFmpegError as error:
        raise BadVideo(f"{name}: corrupt video ({error.strerror})") from error
    except (IndexError, UnicodeDecodeError) as error:
        # PyAV's: of a stream that begins in the middle of a file; of titles that are not UTF-8.
        raise BadVideo(f"{name}: PyAV cannot read it ({error})") from error
    finally:
        if video:
            video.close()


def _select(
    frames: Iterator[_Shown], fps: float, start: float, stop: float
) -> Iterator[av.VideoFrame]:
    """Which frame is seen when, as `read_frames` says it."""
    if not fps:
        for shown in frames:
            if shown.start >= stop - TOLERANCE:
                return
            if start == 0 or shown.end > start + TOLERANCE:
                yield shown.frame
        return
    number = 0
    for shown in frames:
        while start + number / fps < min(shown.end, stop) - TOLERANCE:
            yield shown.frame
            number += 1
        if start + number / fps >= stop - TOLERANCE:
            return


def _stack(frames: list[np.ndarray], count: int) -> np.ndarray:
    return np.stack(frames + frames[-1:] * (count - len(frames)))


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """x_HWC as it is to be seen: the rotation is counterclockwise, as rot90's."""
    x_HWC = frame.to_ndarray(format="rgb24", threads=1)
    return np.ascontiguousarray(np.rot90(x_HWC, round(frame.rotation / 90)))


def _frame(x_HWC: np.ndarray) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(x_HWC, format="rgb24")
    colours = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
    return frame.reformat(format="yuv420p", threads=1, **colours)


def _add_stream(
    container: av.container.OutputContainer, height: int, width: int, fps: float, quality: float
) -> av.VideoStream:
    rate = fractions.Fraction(fps).limit_denominator(1001)  # 29.97... is 30000 / 1001
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(quality)})
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    context = stream.codec_context
    context.thread_count = _THREADS
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return stream
