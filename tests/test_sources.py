"""Image folders and their bad images, rows for the tokenizer, encoding, OpenMoji's splits."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import PIL.Image
import pytest

from data_pipelines import encode, entries, image_folder, openmoji, sources, store
from emu3_jax import vocab as vocabulary
from tests import encoding


def save(path, size=(16, 16), color=(10, 200, 30), mode="RGB"):
    PIL.Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    """Twelve good images of two sizes and one each of every bad kind."""
    good = [f"good{i}.png" for i in range(12)]
    for i, name in enumerate(good):
        save(tmp_path / name, (16, 16) if i % 3 else (24, 16), (i * 20, 0, 0))
    save(tmp_path / "small.png", (7, 20))
    save(tmp_path / "long.png", (81, 16))
    (tmp_path / "corrupt.png").write_bytes((tmp_path / "good0.png").read_bytes()[:50])
    bad = ["small.png", "long.png", "corrupt.png", "absent.png"]
    names = good[:5] + bad + good[5:]
    lines = [json.dumps({"file": name, "caption": f"caption of {name}"}) for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "good.csv").write_text("file,caption\n" + "\n".join(f"{n},c" for n in good))
    return tmp_path


BAD = ["7x20 px, smaller than 8 px", "81x16 px, aspect ratio above 5", "corrupt image (", "no such"]


def test_folder_reads_records_and_names_bad_ones(folder):
    source = image_folder.ImageFolder(folder)
    record = source[4]
    assert (record.key, record.caption) == ("good4.png", "caption of good4.png")
    assert record.image_HWC.shape == (16, 16, 3) and record.image_HWC.dtype == np.uint8
    assert len(source) == 16
    for index, message in zip(range(5, 9), BAD, strict=True):
        with pytest.raises(image_folder.BadImage) as error:
            source[index]
        assert message in str(error.value) and "\n" not in str(error.value)
        assert source.entries[index]["file"] in str(error.value)
    assert len(image_folder.ImageFolder(folder, "good.csv")) == 12


def test_transparent_palette_and_grey_images_become_rgb_on_white(tmp_path):
    save(tmp_path / "a.png", color=(0, 0, 0, 0), mode="RGBA")
    assert (image_folder.read_image(tmp_path / "a.png") == 255).all()
    save(tmp_path / "b.png", color=77, mode="L")
    assert (image_folder.read_image(tmp_path / "b.png") == 77).all()
    image = PIL.Image.new("P", (9, 9), 3)
    image.putpalette([0, 0, 0] * 3 + [5, 6, 7])
    image.save(tmp_path / "c.png", transparency=3)
    assert (image_folder.read_image(tmp_path / "c.png") == 255).all()


def test_lists_that_cannot_be(tmp_path):
    with pytest.raises(
        ValueError, match="x.jsonl does not exist; write a list with the columns fi"
    ):
        image_folder.ImageFolder(tmp_path, "x.jsonl")
    for text, message in (
        ("", "lists no images; write one image a line"),
        ('{"file": "a"}\n{', "line 2 is no JSON"),
        ('{"name": "a"}', "entry 1 has no column 'file'; it reads {'name': 'a'}"),
    ):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            image_folder.ImageFolder(tmp_path, "x.jsonl")


def test_rows_hold_each_image_once_an_epoch_and_depend_on_the_index_alone(folder):
    config = image_folder.ImageRows(str(folder), "good.csv", size=16)
    rows = config.rows()
    reds = [rows[i]["image"][0, 0, 0] // 20 for i in range(48)]
    for epoch in range(4):
        assert sorted(reds[epoch * 12 : epoch * 12 + 12]) == list(range(12))
    assert len({tuple(reds[e * 12 : e * 12 + 12]) for e in range(4)}) == 4
    again = config.rows()
    assert [again[i]["image"][0, 0, 0] // 20 for i in reversed(range(48))] == reds[::-1]
    assert {rows[i]["image"].shape for i in range(48)} == {(16, 16, 3)}


def test_rows_skip_bad_images_and_name_each_once(folder, capsys):
    config = image_folder.ImageRows(str(folder), size=16)
    rows = config.rows()
    images = [rows[i]["image"] for i in range(64)]
    assert all(image.shape == (16, 16, 3) for image in images)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("skipped: ") for line in lines)
    again = config.rows()
    np.testing.assert_array_equal(again[63]["image"], images[63])
    limited = image_folder.ImageRows(str(folder), size=16, max_bad=2).rows()
    with pytest.raises(
        ValueError, match="has more than max_bad = 2 bad images, the last: .*raise m"
    ):
        [limited[i] for i in range(64)]


def test_augmentation_mirrors_and_moves(tmp_path):
    image_HWC = np.full((16, 16, 3), 255, np.uint8)
    image_HWC[4:8, 2:5] = 0
    PIL.Image.fromarray(image_HWC).save(tmp_path / "a.png")
    (tmp_path / "l.csv").write_text("file\na.png\n")
    plain = image_folder.ImageRows(str(tmp_path), "l.csv").rows()
    np.testing.assert_array_equal(plain[9]["image"], image_HWC)
    config = image_folder.ImageRows(str(tmp_path), "l.csv", augment_flip=True, augment_shift=2)
    rows, seen = config.rows(), collections.Counter()
    for i in range(400):
        dark = np.argwhere(rows[i]["image"][..., 0] == 0)
        assert len(dark) == 12
        seen[tuple(dark.min(0).tolist())] += 1
    places = itertools.product(range(2, 7), [*range(0, 5), *range(9, 14)])
    assert set(seen) == set(places) and max(seen.values()) < 30


@pytest.fixture
def vocab():
    return vocabulary.Vocab({bytes([i]): i for i in range(256)}, codes=64)


def encode_config(folder, **options):
    settings = {"min_pixels": 64, "max_pixels": 400, "parts": 2} | options
    places = {"source": sources.Images(str(folder)), "directory": str(folder / "store")}
    return encode.Encode(**places | settings)


def test_encoding_fills_a_store(folder, vocab, capsys):
    tokenizer = encoding.FakeTokenizer()
    assert encode.encode(encode_config(folder, licence="CC0"), tokenizer, "t" * 64, vocab)
    counts = {n: [shape[0] for shape in tokenizer.shapes if shape[2] == n] for n in (16, 24)}
    assert counts == {16: [3, 4, 1], 24: [2, 2]}
    opened = store.Store(str(folder / "store"), vocab.fingerprint, "t" * 64)
    assert opened.keys() == [f"good{i}.png" for i in range(12)]
    for i, document in enumerate(opened.read(range(12))):
        assert vocab.decode(document.text) == f"caption of good{i}.png"
        np.testing.assert_array_equal(document.codes_thw, np.full((1, 2, 2 if i % 3 else 3), i * 5))
    assert (opened.info["skipped"], opened.info["licence"]) == (4, "CC0")
    out, err = capsys.readouterr()
    assert len([line for line in err.splitlines() if line.startswith("skipped: ")]) == 4
    assert "part-00000-of-00002: 5 documents, 3 bad skipped\n" in out


def test_encoding_goes_on_with_the_missing_part(folder, vocab, capsys):
    first, second = (encode_config(folder, worker=w, workers=2) for w in (0, 1))
    assert not encode.encode(first, encoding.FakeTokenizer(), "t", vocab)
    with pytest.raises(store.StoreError, match="is incomplete"):
        store.Store(str(folder / "store"))
    half_written = store.part_path(folder / "store", 1, 2)
    half_written.mkdir()
    (half_written / "codes").write_text("rubbish")
    tokenizer = encoding.FakeTokenizer()
    encode.encode(first, tokenizer, "t", vocab)
    assert not tokenizer.shapes
    assert encode.encode(encode_config(folder), tokenizer, "t", vocab)
    assert sum(shape[0] for shape in tokenizer.shapes) == 7
    store.Store(str(folder / "store")).verify()
    capsys.readouterr()
    encode.encode(second, tokenizer, "t", vocab)
    assert capsys.readouterr().out == f"{folder / 'store'}: encoded (1 of 2 parts here)\n"


def test_encoding_refuses_another_tokenizer_list_or_too_many_bad(folder, vocab):
    encode.encode(encode_config(folder), encoding.FakeTokenizer(), "t" * 64, vocab)
    with pytest.raises(
        store.StoreError, match="with tokenizer tttttttttttt, this run has tokenizer"
    ):
        encode.encode(encode_config(folder), encoding.FakeTokenizer(), "u" * 64, vocab)
    with pytest.raises(store.StoreError, match="with source [0-9a-f]{12}, this run has source"):
        encode.encode(
            encode_config(folder, max_pixels=300), encoding.FakeTokenizer(), "t" * 64, vocab
        )
    with pytest.raises(
        store.StoreError, match="with dtype float32, this run has dtype bfloat16; use that dtype, r"
    ):
        encode.encode(
            encode_config(folder, dtype="bfloat16"), encoding.FakeTokenizer(), "t" * 64, vocab
        )
    strict = encode_config(folder, max_bad=1)
    strict.directory = str(folder / "other")
    with pytest.raises(ValueError, match="more than max_bad = 1 bad files, the last: .*long.png"):
        encode.encode(strict, encoding.FakeTokenizer(), "t" * 64, vocab)
    few = vocabulary.Vocab({bytes([i]): i for i in range(256)}, codes=9)
    with pytest.raises(
        ValueError, match="good3.png: code 15 does not fit a vocabulary of 9 codes; set co"
    ):
        encode.encode(
            dataclasses.replace(strict, max_bad=9), encoding.FakeTokenizer(), "t" * 64, few
        )
    with pytest.raises(ValueError, match="17 parts for 16 files; take 1 to 16"):
        encode.encode(encode_config(folder, parts=17), encoding.FakeTokenizer(), "t" * 64, vocab)
    for worker, workers in ((2, 2), (1, 0), (-1, 2)):
        third = encode_config(folder, worker=worker, workers=workers)
        with pytest.raises(ValueError, match=f"worker {worker} of workers {workers}; they are cou"):
            encode.encode(third, encoding.FakeTokenizer(), "t" * 64, vocab)


def test_a_directory_without_a_list(tmp_path):
    """Every image below, in the order of names, with the captions that are there."""
    names = ["b/c.d.webp", "b/a.JPEG", "a.png", "é.jpg", "b.jpg"]
    encoding.folder(tmp_path / "tree", names)
    for other in ("notes.txt", "b/d.gif", ".hidden.jpg"):
        (tmp_path / "tree" / other).write_text("x")
    images = sources.Images(str(tmp_path / "tree"), "").open()
    keys = ["a.png", "b.jpg", "b/a.JPEG", "b/c.d.webp", "é.jpg"]
    captions = [encoding.CAPTIONS[names.index(key)] for key in keys]
    assert [images.entry(i) for i in range(5)] == [
        entries.Entry(key, caption, {}) for key, caption in zip(keys, captions, strict=True)
    ]
    assert [(images[i].key, images[i].caption) for i in range(5)] == list(
        zip(keys, captions, strict=True)
    )
    lines = [json.dumps({"file": k, "caption": c}) for k, c in zip(keys, captions, strict=True)]
    (tmp_path / "tree/list.jsonl").write_text("\n".join(lines))
    found, want = (
        encoding.documents(sources.Images(str(tmp_path / "tree"), name), tmp_path / f"to{name}")
        for name in ("", "list.jsonl")
    )
    assert found == want and len(want) == 5
    with pytest.raises(ValueError, match="absent is no directory; give the one that holds the im"):
        sources.Images(str(tmp_path / "absent"), "").open()
    with pytest.raises(ValueError, match=r"tree holds no videos \(.mp4 .m4v"):
        sources.Videos(str(tmp_path / "tree"), "").open()


def test_other_columns_of_a_list_are_an_entrys(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "l.csv").write_text("file,caption,score,site\na.png,one,5.5,x\n")
    entry = sources.Images(str(tmp_path), "l.csv").open().entry(0)
    assert entry == entries.Entry("a.png", "one", {"score": "5.5", "site": "x"})
    (tmp_path / "l.jsonl").write_text('{"score": 5.5, "file": "a.png"}')
    entry = sources.Images(str(tmp_path), "l.jsonl").open().entry(0)
    assert entry == entries.Entry("a.png", "", {"score": 5.5})


@pytest.fixture(scope="module")
def emoji_lists(tmp_path_factory):
    """The lists of OpenMoji over a subset: some families with tones, some flags, some faces."""
    everything = openmoji.catalogue()
    families = ("man dancing", "woman dancing", "men wrestling", "waving hand", "grinning face")
    wanted = {p["family"] for p in everything if p["file"] < "1F4" and p["group"] != "symbols"}
    subset = [p for p in everything if p["family"] in wanted | set(families)]
    patch = pytest.MonkeyPatch()
    patch.setattr(openmoji, "catalogue", lambda: subset)
    path = tmp_path_factory.mktemp("emoji")
    job = openmoji.OpenMoji(str(path), tokenizer_heldout=60, skin_tone_heldout=20, processes=1)
    job.run()
    patch.undo()
    names = ("captions", "tokenizer_heldout", "tokenizer_train", "heldout_skin_tone", "train")
    return job, {name: entries.read_list(path / f"{name}.jsonl") for name in names}


def files(lines):
    return {entry["file"] for entry in lines}


def test_openmoji_splits_are_disjoint_and_by_subject(emoji_lists):
    job, lists = emoji_lists
    every, unseen, seen = (
        files(lists[n]) for n in ("captions", "tokenizer_heldout", "tokenizer_train")
    )
    asked, train = files(lists["heldout_skin_tone"]), files(lists["train"])
    assert not unseen & seen and not asked & seen and unseen | seen | asked == every
    assert asked | train == every and not asked & train
    assert 50 <= len(unseen) <= 60 and len(asked) == 20
    assert not {e["family"] for e in lists["tokenizer_heldout"]} & {
        e["family"] for e in lists["tokenizer_train"]
    }
    folder = image_folder.ImageFolder(job.directory)
    pixels = {
        name: {
            folder[i].image_HWC.tobytes() for i, e in enumerate(folder.entries) if e["file"] in f
        }
        for name, f in (("unseen", unseen), ("seen", seen))
    }
    assert not pixels["unseen"] & pixels["seen"]
    assert {image.shape for image in (folder[0].image_HWC, folder[99].image_HWC)} == {(32, 32, 3)}


def test_openmoji_heldout_tone_leaves_the_other_tones_in_training(emoji_lists):
    _, lists = emoji_lists
    tones = collections.Counter()
    for entry in lists["heldout_skin_tone"]:
        rest = {e["tone"] for e in lists["train"] if e["family"] == entry["family"]}
        assert rest == {"", *openmoji.TONES} - {entry["tone"]}
        assert entry["caption"].endswith(f"{entry['tone']} skin tone")
        tones[entry["tone"]] += 1
    assert len(tones) >= 4


def test_openmoji_selects_and_is_done_once(emoji_lists, capsys):
    job, lists = emoji_lists
    job.run()
    assert (
        capsys.readouterr().out
        == f"{job.directory}: complete ({len(lists['captions'])} pictures)\n"
    )
    everything = openmoji.catalogue()
    people = openmoji._select(everything, ("people",))
    assert {e["group"] for e in people} == {"people"} and any(not e["tone"] for e in people)
    both = openmoji._select(everything, ("flags", "grinning face"))
    assert {e["family"] for e in both if e["group"] != "flags"} == {"grinning face"}
    with pytest.raises(ValueError, match="select names 'peopel', .*; did you mean 'people'?"):
        openmoji._select(everything, ("peopel",))
    with pytest.raises(ValueError, match="pictures of 4 px; the least is 8"):
        openmoji.OpenMoji(job.directory, size=4).run()


def test_openmoji_catalogue_is_the_whole_one():
    everything = openmoji.catalogue()
    assert len(everything) == len({e["caption"] for e in everything}) == 3953
    assert {e["group"] for e in everything} == set(openmoji.GROUPS)
    tones = collections.Counter(e["tone"] for e in everything)
    assert all(tones[tone] == 330 for tone in openmoji.TONES)
