"""What a configuration holds of a source of records: where it is. `open()` reads its list."""

import dataclasses

from data_pipelines import image_folder, video_folder
from tokenizer import records


@dataclasses.dataclass
class Images:
    """An ImageFolder, still closed."""

    directory: str = "runs/images"
    list: str = "captions.jsonl"

    def open(self) -> image_folder.ImageFolder:
        """ValueError for a missing or unusable list."""
        return image_folder.ImageFolder(self.directory, self.list)


@dataclasses.dataclass
class Videos:
    """A VideoFolder, still closed."""

    directory: str = "runs/videos"
    list: str = "captions.jsonl"

    def open(self) -> video_folder.VideoFolder:
        """ValueError for a missing or unusable list."""
        return video_folder.VideoFolder(self.directory, self.list)


@dataclasses.dataclass
class Tfds:
    """TfdsImages, still closed."""

    directory: str = "runs/tfds"
    split: str = "validation"
    image: str = "image"

    def open(self) -> records.Source:
        """ValueError for a directory, split or feature that cannot be used."""
        from data_pipelines import tfds_images  # TFDS takes seconds to import

        return tfds_images.TfdsImages(self.directory, self.split, self.image)
