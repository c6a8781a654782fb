"""Parquet files are read as the same images in a folder are, in row groups, few at a time."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import image_folder, parquet, sources
from tests import encoding


def table(numbers, structure=False, **columns):
    """Rows as data sets of pictures have them; a structure is Hugging Face's."""
    data = [encoding.picture(i) for i in numbers]
    return pa.table(
        {
            "image": [{"bytes": b, "path": "x.png"} for b in data] if structure else data,
            "caption": [encoding.CAPTIONS[i] or None for i in numbers],
            "name": [f"picture-{i}.jpg" for i in numbers],
            "score": [None if i == 1 else i / 2 for i in numbers],
            "embedding": [[1.0, 2.0] for _ in numbers],
        }
        | columns
    )


@pytest.fixture(params=[False, True], ids=["bytes", "structures"])
def files(tmp_path, request):
    """Two files with five rows in three groups."""
    directory = tmp_path / "data"
    directory.mkdir()
    pq.write_table(table(range(3), request.param), directory / "a.parquet", row_group_size=2)
    pq.write_table(table(range(3, 5), request.param), directory / "b.parquet")
    return directory


def test_records(files):
    data = sources.Parquet(str(files)).open()
    assert len(data) == 5 and not data.has_videos
    assert [data.entry(i).caption for i in range(5)] == encoding.CAPTIONS
    assert [data.entry(i).key for i in (2, 3)] == ["a.parquet/2", "b.parquet/0"]
    assert data.entry(2).columns == {"name": "picture-2.jpg", "score": 1.0}
    assert data.entry(1).columns == {"name": "picture-1.jpg"}  # a score that is none
    assert data.file(2).read() == encoding.picture(2)
    assert data.file(2).name == f"{files}/a.parquet, row 2"
    named = sources.Parquet(str(files / "b*.parquet"), caption="", key="name").open()
    entry = named.entry(1)
    assert (entry.key, entry.caption) == ("picture-4.jpg", "")
    assert entry.columns == {"caption": "fish", "score": 2.0}
    assert named[1].image_HWC.shape == (40, 40, 3)
    with pytest.raises(IndexError, match="record 2 of 2"):
        named[2]


def test_a_store_of_rows_is_that_of_the_files_in_a_folder(tmp_path, files):
    folder = encoding.folder(tmp_path / "folder", [f"picture-{i}.jpg" for i in range(5)])
    want = encoding.documents(sources.Images(str(folder), ""), tmp_path / "want")
    found = encoding.documents(sources.Parquet(str(files), key="name"), tmp_path / "found")
    assert found == want


def test_videos_in_rows(tmp_path):
    film = encoding.film(tmp_path / "film.mp4", list(range(40)))
    rows = {"image": [film, encoding.picture(0)], "key": ["film.mp4", "picture.jpg"]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    place = sources.Parquet(str(tmp_path), caption="", key="key")
    assert place.open().has_videos and place.open()[0].fps == 10
    found = encoding.documents(place, tmp_path / "store", fps=5.0, seconds=2.0)
    assert [(d[0], d[3], d[4]) for d in found] == [("film.mp4", 5.0, 10), ("picture.jpg", 0, 0)]


def test_row_groups_are_read_once_while_they_fit_in_memory(files, monkeypatch):
    reads = []
    iter_batches = pq.ParquetFile.iter_batches

    def read(self, rows, groups, columns):
        reads.append((*groups, columns))
        return iter_batches(self, rows, groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", read)
    data = sources.Parquet(str(files)).open()
    order = [0, 4, 1, 3, 2, 0]
    assert [data.file(i).read() for i in order] == [encoding.picture(i) for i in order]
    assert reads == [(0, ["image"]), (0, ["image"]), (1, ["image"])]
    reads.clear()
    assert [data.entry(i).caption for i in order] == [encoding.CAPTIONS[i] for i in order]
    assert [group for group, columns in reads if "image" not in columns] == [0, 0, 1]
    monkeypatch.setattr(parquet, "_HELD", 1)  # the last one stays whatever its size
    reads.clear()
    small = sources.Parquet(str(files)).open()
    assert [small.file(i).read() for i in order] == [encoding.picture(i) for i in order]
    assert [group for group, _ in reads] == [0, 0, 0, 0, 1, 0]


def test_bad_rows_are_named_and_counted(tmp_path, capsys):
    images = [encoding.picture(0), None, b"junk"]
    rows = pa.table({"image": images, "caption": ["one", "two", "three"]})
    pq.write_table(rows, tmp_path / "a.parquet")
    found = encoding.documents(sources.Parquet(str(tmp_path)), tmp_path / "store")
    assert [d[1] for d in found] == ["one"]
    name = f"skipped: {tmp_path}/a.parquet"
    none, junk = sorted(capsys.readouterr().err.splitlines())
    assert none == f"{name}, row 1: no bytes in column 'image'"
    assert junk.startswith(f"{name}, row 2: corrupt image (cannot identify")


def test_a_group_that_cannot_be_read_is_named(files):
    path = files / "b.parquet"
    data = sources.Parquet(str(files)).open()
    path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(
        image_folder.BadFile, match="b.parquet: row group 0 cannot be read"
    ) as error:
        data.file(3)
    assert "\n" not in str(error.value)


def test_a_group_is_read_no_further_than_memory_allows(files, monkeypatch):
    data = sources.Parquet(str(files)).open()
    monkeypatch.setattr(parquet, "LARGEST", 2000)
    monkeypatch.setattr(parquet, "_ROWS", 1)
    with pytest.raises(image_folder.BadFile) as error:
        data.file(0)
    assert str(error.value) == (
        f"{files}/a.parquet: row group 0 cannot be read (it has more than 2,000 bytes)"
    )


def message(place, **options):
    with pytest.raises(ValueError) as error:
        sources.Parquet(str(place), **options).open()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_cannot_be_used(tmp_path, files):
    path = tmp_path / "c.parquet"
    whole = (files / "a.parquet").read_bytes()
    for junk in (b"", b"junk" * 9, whole[:-20]):
        path.write_bytes(junk)
        assert message(path).startswith(f"{path} is no Parquet file, or cut short (")
        assert message(path).endswith("; get it anew, or leave it out of files")
    has = "image, caption, name, score, embedding"
    first = f"{files}/a.parquet"
    assert message(files, image="png") == f"{first} has no column 'png'; it has {has}"
    assert message(files, key="score") == (
        f"{first}: column 'score' is of double; take one of strings"
    )
    assert message(files, image="name").endswith("'name' is of string; take one of bytes or {byte"
                                                 "s, path}")  # fmt: skip
    pq.write_table(table([0]).drop_columns("score"), files / "c.parquet")
    assert message(files) == (
        f"{files}/c.parquet has columns image, caption, name, embedding of other kinds or names "
        f"than {first} with {has}; give files of one sort"
    )
    pq.write_table(table([]).cast(table([0]).schema), path)
    assert message(path) == f"{path}: no rows in 1 files; give those with some"
    assert message(tmp_path / "absent").startswith(f"{tmp_path}/absent matches no file; give a dir")
