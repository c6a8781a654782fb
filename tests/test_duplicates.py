"""Which pictures count as near-duplicates, against comparing all with all; the job's list, whoever
makes it and whatever interrupts it."""

import io
import json
import pathlib
import tarfile

import numpy as np
import PIL.Image
import pytest

from data_pipelines import duplicates, image_folder, perceptual_hash, photos, sources, video_folder

# Perceptual hashes


@pytest.fixture(scope="module")
def photographs():
    """Ten photographs of 200 pixels a side or less."""
    found = photos.photographs()
    for image in found.values():
        image.thumbnail((200, 200))
    return found


def distance(one: PIL.Image.Image, other: PIL.Image.Image) -> int:
    hashes = [perceptual_hash.hash_image(np.asarray(image)) for image in (one, other)]
    return int(np.bitwise_count(hashes[0] ^ hashes[1]))


def jpeg(image: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return PIL.Image.open(file)


def cropped(image: PIL.Image.Image, share: float) -> PIL.Image.Image:
    """Without so much of it at each of its sides."""
    width, height = image.size
    x, y = width * share, height * share
    return image.crop((round(x), round(y), round(width - x), round(height - y)))


CHANGES = {
    "jpeg": lambda image: jpeg(image, 30),
    "half": lambda image: jpeg(image.resize((image.width // 2, image.height // 2)), 80),
    "double": lambda image: image.resize((image.width * 2, image.height * 2)),
    "squeezed": lambda image: image.resize((image.width, image.height * 3 // 4)),
    "brighter": lambda image: image.point(lambda value: min(255, value + 20)),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "cropped": lambda image: cropped(image, 0.01),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_photograph_stays_near(photographs, change):
    far = {name: distance(image, CHANGES[change](image)) for name, image in photographs.items()}
    assert max(far.values()) <= duplicates.Duplicates.distance, far


def test_other_photographs_are_far(photographs):
    images = list(photographs.values())
    far = [distance(a, b) for i, a in enumerate(images) for b in images[:i]]
    assert min(far) >= 16
    mirrored = [distance(image, image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT))
                for image in images]  # fmt: skip
    assert min(mirrored) >= 16


def test_pictures_of_nothing_are_alike():
    stripes_HWC = np.zeros((90, 70, 3), np.uint8)
    stripes_HWC[::9] = 200
    for image_HWC in (stripes_HWC, np.full((50, 60, 3), 77, np.uint8), stripes_HWC[:40]):
        assert perceptual_hash.hash_image(image_HWC) == 0


def test_the_hash_is_of_the_frequencies_it_says():
    """A picture of one frequency: its bit alone is set."""
    for row, column in ((1, 1), (1, 8), (8, 1), (3, 6)):
        y_H, x_W = (np.cos(np.pi * f * (np.arange(64) + 0.5) / 64) for f in (row, column))
        image_HW = np.round(128 + 100 * np.outer(y_H, x_W)).astype(np.uint8)
        value = int(perceptual_hash.hash_image(np.repeat(image_HW[..., None], 3, axis=2)))
        assert value >> 63 - (8 * (row - 1) + column - 1) & 1


# All pairs


def hashes_with_near_ones(rng: np.random.Generator) -> np.ndarray:
    """300 hashes at random, then 600 that differ from one before in 0 to 14 bits: anywhere, in one
    quarter, or as many in each quarter as can be."""
    values = [int(value) for value in rng.integers(0, 2**64, 300, np.uint64)]
    for i in range(600):
        anywhere = rng.permutation(64)
        quarter = 16 * rng.integers(4) + rng.permutation(16)
        spread = rng.permutation(16)[:, None] + 16 * rng.permutation(4)
        bits = (anywhere, quarter, spread.ravel())[i % 3][: rng.integers(15)]
        values.append(values[rng.integers(len(values))] ^ sum(1 << bit for bit in bits.tolist()))
    return np.array(values, np.uint64)


@pytest.mark.parametrize("most", range(duplicates.FAR))
def test_none_is_missed_and_none_is_made_up(most, monkeypatch):
    """As comparing each with each before it, also where pairs are looked at in small pieces."""
    hash_N = hashes_with_near_ones(np.random.default_rng(most))
    expected = []
    for i, value in enumerate(hash_N):
        near_N = np.bitwise_count(hash_N[:i] ^ value) <= most
        staying = [j for j in np.flatnonzero(near_N).tolist() if expected[j] == j]
        expected.append(staying[0] if staying else i)
    assert 20 < sum(of != i for i, of in enumerate(expected)) < 700
    for pairs in (perceptual_hash._PAIRS, 7):
        monkeypatch.setattr(perceptual_hash, "_PAIRS", pairs)
        assert perceptual_hash.nearest_earlier(hash_N, most).tolist() == expected


def test_a_chain_does_not_carry_along_what_is_far():
    hash_N = np.array([0b0000, 0b0011, 0b1111], np.uint64)
    assert perceptual_hash.nearest_earlier(hash_N, 2).tolist() == [0, 0, 2]
    assert perceptual_hash.nearest_earlier(hash_N[:0], 2).tolist() == []


# The job


@pytest.fixture
def folder(tmp_path, photographs):
    """Ten photographs, then three changes of each, then a bad file, a video and a grey square."""
    directory = tmp_path / "images"
    directory.mkdir()
    names = []
    for change in ("as it is", "half", "cropped", "jpeg"):
        for name, image in photographs.items():
            changed = image if change == "as it is" else CHANGES[change](image)
            names.append(f"{name} {change}.png")
            changed.save(directory / names[-1], compress_level=0)
    PIL.Image.new("RGB", (20, 20), (90, 90, 90)).save(directory / "grey.png")
    (directory / "bad.png").write_bytes(b"?")
    video_folder.write_video(directory / "a.mp4", [np.zeros((16, 16, 3), np.uint8)], 10)
    names += ["bad.png", "a.mp4", "grey.png"]
    lines = [json.dumps({"file": name, "caption": ""}) + "\n" for name in names]
    (directory / "captions.jsonl").write_text("".join(lines))
    return directory


def find(folder: pathlib.Path, name: str, **settings) -> dict[str, bytes]:
    """Runs the job; the files it leaves."""
    directory = folder.parent / name
    source = sources.Images(str(folder))
    settings = dict(parts=5) | settings
    duplicates.Duplicates(source, str(directory), **settings).run()
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_changed_photographs_are_listed(folder, photographs, capsys):
    found = find(folder, "found")
    lines = [json.loads(line) for line in found["duplicates.jsonl"].decode().splitlines()]
    expected = [(f"{name} {change}.png", f"{name} as it is.png")
                for change in ("half", "cropped", "jpeg") for name in photographs]  # fmt: skip
    assert [(line["key"], line["of"]) for line in lines] == expected
    for line in lines:
        one, other = (PIL.Image.open(folder / line[key]) for key in ("key", "of"))
        assert line["distance"] == distance(one, other) <= 6
    out, err = capsys.readouterr()
    assert out.endswith("duplicates.jsonl: 30 near-duplicates among 41 images, 1 bad skipped\n")
    [line] = err.splitlines()
    assert line.startswith(f"skipped: {folder}/bad.png: corrupt image (")


def test_three_workers_leave_what_one_does(folder, capsys):
    alone = find(folder, "alone")
    assert sorted(alone) == ["duplicates.jsonl", *(f"part-0000{i}-of-00005.json" for i in range(5))]
    for worker in (2, 0, 1):
        files = find(folder, "three", workers=3, worker=worker)
        assert ("duplicates.jsonl" in files) == (worker == 1)
        said = "the last worker writes the list" in capsys.readouterr().out
        assert said == (worker != 1)
    assert files == alone


def test_what_is_interrupted_goes_on(folder, monkeypatch, capsys):
    whole = find(folder, "whole")
    calls, hash_image = [], perceptual_hash.hash_image

    def breaks(image_HWC):
        calls.append(1)
        if len(calls) == 21:
            raise KeyboardInterrupt
        return hash_image(image_HWC)

    monkeypatch.setattr(perceptual_hash, "hash_image", breaks)
    with pytest.raises(KeyboardInterrupt):
        find(folder, "again")
    left = sorted(path.name for path in (folder.parent / "again").iterdir())
    assert left == ["part-00000-of-00005.json", "part-00001-of-00005.json"]
    calls[:] = [1] * 21
    assert find(folder, "again") == whole
    assert len(calls) - 21 == 41 - 17  # the images of the parts that were missing
    capsys.readouterr()
    assert find(folder, "again") == whole
    assert "again: hashed (5 of 5 parts here)" in capsys.readouterr().out


def test_another_distance_needs_no_new_hashes(folder, monkeypatch):
    find(folder, "found")
    monkeypatch.setattr(perceptual_hash, "hash_image", None)
    lines = find(folder, "found", distance=0)["duplicates.jsonl"].decode().splitlines()
    assert 0 < len(lines) < 30 and all(json.loads(line)["distance"] == 0 for line in lines)


def test_images_of_a_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, value in enumerate((3, 3, 4)):
            noise_HWC = np.random.default_rng(value).integers(0, 256, (40, 40, 3), np.uint8)
            file = io.BytesIO()
            PIL.Image.fromarray(noise_HWC).save(file, "PNG")
            member = tarfile.TarInfo(f"{i}.png")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
    source = sources.WebDataset(str(tmp_path / "a.tar"))
    duplicates.Duplicates(source, str(tmp_path / "found")).run()
    [line] = (tmp_path / "found" / "duplicates.jsonl").read_text().splitlines()
    assert json.loads(line) == {"key": "a.tar/1.png", "of": "a.tar/0.png", "distance": 0}


def test_what_cannot_be_done_says_why(folder):
    def message(**settings):
        with pytest.raises(ValueError) as error:
            find(folder, "found", **settings)
        return str(error.value)

    assert message(parts=44) == "44 parts for 43 images; take 1 to that many"
    assert message(distance=12) == "distance is 12; take 0 to 11 of the 64 bits"
    assert message(worker=2) == "worker 2 of workers 0; they are counted from 0"
    assert message(max_bad=0).startswith(
        f"{folder}/captions.jsonl has more than max_bad = 0 bad files, the last: {folder}/bad.png: "
    )
    find(folder, "found")
    entries = image_folder.ImageFolder(str(folder)).entries
    lines = [json.dumps(entry) + "\n" for entry in reversed(entries)]
    (folder / "captions.jsonl").write_text("".join(lines))
    assert "/found/part-00000-of-00005.json has hashes of source " in (said := message())
    assert said.endswith(f"; remove {folder.parent}/found")
