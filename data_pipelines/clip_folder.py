"""Short clips without loss in a folder, with lists of captions that the sources of videos read.

H.264 at 4:2:0 keeps one colour of four pixels, which at 32 pixels a side is most of the picture;
FFV1 in Matroska keeps all, and each frame can be read alone.

Legend: T frames, H rows, W columns, C colours of pixels.
"""

import json
import pathlib
from collections.abc import Iterable

import av
import numpy as np


def write_clip(path: pathlib.Path, x_THWC: np.ndarray, fps: int) -> None:
    """Writes a clip (uint8, RGB) as FFV1; `path` ends in .mkv."""
    with av.open(f"file:{path}", "w", "matroska") as container:
        stream = container.add_stream("ffv1", rate=fps)
        _, stream.height, stream.width, _ = x_THWC.shape
        stream.pix_fmt = "bgr0"
        stream.codec_context.thread_count = 1
        for x_HWC in x_THWC:
            frame = av.VideoFrame.from_ndarray(x_HWC, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0", threads=1)))
        container.mux(stream.encode(None))


def write_list(path: pathlib.Path, entries: Iterable[dict]) -> None:
    """Writes one entry a line: `file`, `caption` and whatever else each has."""
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_text("".join(lines), encoding="utf-8")
