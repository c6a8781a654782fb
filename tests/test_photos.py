"""Photographs cut into tiles: training and held-out pixels are apart, and settings decide all."""

import json

import numpy as np
import PIL.Image
import pytest

from data_pipelines import image_folder, photos


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function that runs the job on a made photograph, whose pixels tell their place."""
    y_HW, x_HW = np.mgrid[:256, :300]
    image_HWC = np.stack([y_HW, x_HW % 256, 255 * (x_HW // 256)], axis=-1).astype(np.uint8)
    monkeypatch.setattr(photos, "photographs", lambda: {"map": PIL.Image.fromarray(image_HWC)})
    monkeypatch.setattr(photos, "SCALES", (1.0,))
    film = tmp_path / "film.mp4"
    film.write_bytes(b"film")
    monkeypatch.setattr(photos.packages, "fetch", lambda *_: film)

    def run(name, **settings):
        job = photos.Photos(str(tmp_path / name), train=40, heldout=40, **settings)
        job.run()
        return tmp_path / name

    return run


def places(path, name):
    """The set of (row, column) in the photograph that the tiles of a list hold."""
    found = set()
    for record in image_folder.ImageFolder(str(path), f"{name}.jsonl"):
        assert record.image_HWC.shape == (64, 64, 3) and record.caption == "map"
        columns = record.image_HWC[..., 1].astype(int) + 256 * (record.image_HWC[..., 2] > 0)
        found |= set(zip(record.image_HWC[..., 0].ravel().tolist(), columns.ravel().tolist(),
                         strict=True))  # fmt: skip
    return found


def test_training_sees_no_pixel_that_is_held_out(made):
    path = made("tiles")
    train, heldout = places(path, "train"), places(path, "heldout")
    assert not train & heldout
    assert len(train) > 20_000 and len(heldout) > 20_000
    assert json.loads((path / "videos_heldout.jsonl").read_text())["file"] == "film.mp4"


def test_the_settings_decide_the_tiles_and_are_cut_once(made, capsys):
    first, second, other = made("one"), made("two"), made("three", seed=1)
    tiles = [[(path / f"train-{i:05}.png").read_bytes() for i in range(40)]
             for path in (first, second, other)]  # fmt: skip
    assert tiles[0] == tiles[1] != tiles[2]
    capsys.readouterr()
    made("one")
    assert capsys.readouterr().out == f"{first}: cut\n"


def test_tiles_larger_than_a_cell_are_refused(made):
    with pytest.raises(ValueError, match="no cell of 128 pixels holds tiles of size 200"):
        made("large", size=200)
