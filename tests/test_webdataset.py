"""Tar shards are read as the same files in a folder are; damaged ones are told, bad records too."""

import io
import json
import re
import tarfile

import numpy as np
import pytest

from data_pipelines import image_folder, sources, webdataset
from tests import encoding


def write_tar(path, files, **options):
    """A tar of (name, bytes) in this order."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(numbers):
    """Records as WebDataset has them, captions by turns in .txt and in .json."""
    for i in numbers:
        caption = encoding.CAPTIONS[i]
        said = {"score": i / 2, "url": f"u{i}", "tags": ["no", "column"], "none": None}
        if i % 2:
            yield f"train/{i:04}.txt", caption.encode()
            said["caption"] = "not this one"
        else:
            said["caption"] = caption
        yield f"train/{i:04}.seg.jpg", b"a mask, of another ending"
        yield f"train/{i:04}.JPG", encoding.picture(i)
        yield f"train/{i:04}.json", json.dumps(said).encode()


@pytest.fixture
def shards(tmp_path):
    """Two tars with five records."""
    write_tar(tmp_path / "data/b-0.tar", members(range(2)))
    write_tar(tmp_path / "data/b-1.tar", members(range(2, 5)))
    (tmp_path / "data/notes.txt").write_text("no tar")
    return tmp_path / "data"


def test_records(shards):
    data = sources.WebDataset(str(shards)).open()
    assert len(data) == 5 and not data.has_videos
    assert [data.entry(i).caption for i in range(5)] == encoding.CAPTIONS
    assert data.entry(3).key == "b-1.tar/train/0003.JPG"
    assert data.entry(3).columns == {"score": 1.5, "url": "u3"}
    record = data[3]
    assert (record.key, record.caption) == ("b-1.tar/train/0003.JPG", "a bird\nin a tree")
    want_HWC = image_folder.decode_image("3", io.BytesIO(encoding.picture(3)))
    np.testing.assert_array_equal(record.image_HWC, want_HWC)
    with data.file(3) as file:
        assert file.name == f"{shards}/b-1.tar/train/0003.JPG"
        assert file.read() == encoding.picture(3)
        assert file.seek(-3, io.SEEK_END) == len(encoding.picture(3)) - 3
        assert file.read(9) == encoding.picture(3)[-3:] and file.read(9) == b""
    assert len(sources.WebDataset(f"{shards}/b-1*").open()) == 3
    with pytest.raises(IndexError, match="record 5 of 5"):
        data[5]


def test_a_store_of_shards_is_that_of_the_files_in_a_folder(tmp_path, shards):
    folder = encoding.folder(tmp_path / "folder", [f"{i}.jpg" for i in range(5)])
    want = encoding.documents(sources.Images(str(folder), ""), tmp_path / "want")
    found = encoding.documents(sources.WebDataset(str(shards)), tmp_path / "found")
    assert [d[1:] for d in found] == [d[1:] for d in want]
    assert [d[1] for d in found] == encoding.CAPTIONS
    assert [d[0] for d in found][0] == "b-0.tar/train/0000.JPG"


def test_videos_are_read_where_they_lie(tmp_path):
    films = {n: encoding.film(tmp_path / f"{n}.mp4", list(range(n, 99, 9))) for n in (20, 40)}
    files = [pair for n, data in films.items()
             for pair in ((f"{n}.mp4", data), (f"{n}.txt", b"film"))]  # fmt: skip
    files.insert(2, ("picture.jpg", encoding.picture(0)))
    write_tar(tmp_path / "shards/a.tar", files)
    data = sources.WebDataset(str(tmp_path / "shards")).open()
    assert data.has_videos and len(data) == 3
    video = data[2]
    assert (video.fps, video.height, video.width, video.caption) == (10, 16, 24, "film")
    want = sources.Videos(str(tmp_path), "").open()[1]
    for start in (0.0, 0.3):
        found_THWC, want_THWC = (list(v.frames(10, start)) for v in (video, want))
        np.testing.assert_array_equal(found_THWC, want_THWC)
    found = encoding.documents(sources.WebDataset(str(tmp_path / "shards")), tmp_path / "found")
    want = encoding.documents(sources.Videos(str(tmp_path), ""), tmp_path / "want")
    assert [d[2:] for d in found if d[3]] == [d[2:] for d in want] and len(want) == 2


def test_long_names_and_pax_headers(tmp_path):
    names = ["d/" * 80 + f"{i}.jpg" for i in range(2)]
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        files = [(name, encoding.picture(i)) for i, name in enumerate(names)]
        path = write_tar(tmp_path / f"{number}.tar", files, format=form)
        data = webdataset.WebDataset(str(path))
        assert [data.entry(i).key for i in range(2)] == [f"{number}.tar/{name}" for name in names]
        assert data.file(1).read() == encoding.picture(1)


def test_bad_records_are_named_and_counted(tmp_path, capsys):
    files = [*members(range(5))]
    files += [("nothing.txt", b"no picture"), ("x.jpg", b"junk"), ("y.jpg", encoding.picture(0)),
              ("y.json", b"{"), ("z.jpg", encoding.picture(0)), ("z.json", b"[1]")]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", files)
    found = encoding.documents(sources.WebDataset(str(path)), tmp_path / "store")
    assert [d[1] for d in found] == encoding.CAPTIONS
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.removeprefix(f"skipped: {path}/")[:30] for line in lines) == [
        "nothing: no image or video of ", "x.jpg: corrupt image (cannot i",
        "y.jpg: its .json is none (Expe", "z.jpg: its .json is no object",
    ]  # fmt: skip


def message(shards):
    with pytest.raises(ValueError) as error:
        sources.WebDataset(str(shards)).open()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_damaged_shards_are_told_when_they_are_opened(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", members(range(5))).read_bytes()
    starts = [m.offset for m in tarfile.open(tmp_path / "whole.tar")]
    path = tmp_path / "cut.tar"
    advice = "get it anew, or leave it out of shards"
    for end in (starts[3], starts[3] + 100, starts[3] + 512, starts[3] + 600, starts[-1] + 600):
        path.write_bytes(whole[:end])
        said = message(path)
        assert re.fullmatch(rf"{path} is (damaged or|no tar, or) cut short.*; {advice}", said), end
    path.write_bytes(whole[: starts[3]] + b"?" * 512 + whole[starts[3] + 512 :])
    assert message(path) == f"{path} is damaged or cut short at byte {starts[3]}; {advice}"
    for junk in (b"", b"no tar" * 999):
        path.write_bytes(junk)
        assert message(path).startswith(f"{path} is no tar, or cut short (")


def test_shards_that_are_not_there(tmp_path):
    assert message(tmp_path) == (
        f"{tmp_path}/*.tar matches no file; give a directory of .tar files or a pattern"
    )
    assert message(tmp_path / "a-*.tar").startswith(f"{tmp_path}/a-*.tar matches no file; ")
    write_tar(tmp_path / "a.tar", [("README", b"no record"), (".hidden.jpg", b"x")])
    assert message(tmp_path) == f"{tmp_path}: no record in 1 tar files; give those with some"
