"""Clips of videos as rows for the tokenizer, alone and beside images.

Legend: T frames, H rows, W columns, C colours of pixels.
"""

import dataclasses

import grain
import numpy as np

from data_pipelines import image_folder, shuffle, video_folder
from emu3_jax import data


@dataclasses.dataclass
class ClipRows(data.Data):
    """Rows {"clip": uint8 [frames, size, size, 3]} without end, shuffled as ImageRows are.

    A clip has `frames` frames at `fps` (0: the file's own) from a random time, less than `reach`
    seconds after a keyframe: more is more varied and slower. Where the video ends, its last frame
    is repeated. Frames are reduced, cut and mirrored as ImageRows does, all of a clip alike. Row i
    is a function of the files, this configuration and i; bad videos are skipped and counted.
    """

    directory: str = "runs/videos"
    list: str = "captions.jsonl"
    size: int = 0
    frames: int = 4
    fps: float = 0.0
    reach: float = 2.0
    seed: int = 0
    augment_flip: bool = False
    max_bad: int = 100

    def rows(self) -> grain.MapDataset:
        """The rows; ValueError for a missing or unusable list."""
        folder = video_folder.VideoFolder(self.directory, self.list)

        def read(index: int, row: int) -> dict[str, np.ndarray]:
            random_5 = shuffle.uniform(self.seed, row, range(5))
            path = folder.directory / folder.entries[index]["file"]
            x_THWC = video_folder.random_clip(path, self.frames, self.fps, self.reach, random_5[4])
            options = random_5[:4], self.size, self.augment_flip
            return {"clip": np.stack([image_folder.cut(x_HWC, *options) for x_HWC in x_THWC])}

        return grain.MapDataset.source(
            image_folder.Rows(self.directory, len(folder), read, self.seed, self.max_bad, "video")
        )


@dataclasses.dataclass
class MixedRows(data.Data):
    """Rows {"image": ..., "clip": ...}: row i of the images beside row i of the clips."""

    images: image_folder.ImageRows = dataclasses.field(default_factory=image_folder.ImageRows)
    clips: ClipRows = dataclasses.field(default_factory=ClipRows)

    def rows(self) -> grain.MapDataset:
        """The rows; ValueError for a missing or unusable list."""
        clips = self.clips.rows()
        return self.images.rows().map_with_index(lambda i, row: row | clips[i])
