"""The page of what the model sees holds all of it, flags what is wrong; verify names all damage."""

import base64
import collections
import html.parser
import io
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from data_pipelines import anatomy, inspect, page, parts, statistics, store, verify
from emu3_jax import launch
from emu3_jax import vocab as vocabulary
from tokenizer import convert, pixels, vq

CODES, LENGTH, ROWS = 64, 160, 8
CONFIG = vq.VQConfig(
    codebook_size=CODES, width=32, multipliers=(1, 2), res_blocks=1, attention_levels=()
)
TRAINING = """
from data_pipelines.documents import Layout, Weights
from data_pipelines.mixture import Component, Mixture
from emu3_jax.train import Train
from tests import toy

def get_config(kind=""):
    data = Mixture(
        components=(
            Component("{root}/texts", Layout("text"), weight=0.4),
            Component("{root}/images", Layout("caption_first", caption_dropout=0.2), weight=0.4),
            Component("{root}/images", Layout("caption_last", weights=Weights(codes=0)), 0.2),
            Component("{root}/videos", Layout("caption_first"), weight=0.6),
            Component("{root}/talks", Layout("chat", weights=Weights.understanding()), 0.2),
        ),
        vocab="{root}/vocab.tiktoken", codes=64, length=160, window=16, seed=1,
    )
    return Train(task=toy.model(), data=toy.Counting() if kind else data, batch=4)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, a vocabulary of bytes, four stores of its codes, and a training run's config."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = vq.merge(CONFIG, *vq.init(CONFIG, jax.random.key(0)))
    convert.save(tokenizer, root / "tokenizer")
    ranks = {bytes([i]): i for i in range(256)}
    vocabulary.save_ranks(ranks, root / "vocab.tiktoken")
    vocab = vocabulary.Vocab(ranks, CODES)
    rng = np.random.default_rng(0)

    def text(words):
        return np.array(vocab.encode(words), np.uint32)

    def codes(t):
        return rng.integers(0, CODES, (t, 2, 3)).astype(np.uint16)

    turns = [len(text(words)) for words in ("You are. ", "USER: a? ASSISTANT:", "an answer")]
    talk = text("You are. USER: a? ASSISTANT:an answer")
    documents = dict(
        images=[store.Document(str(i), text(f"image <{i}> & ü"), codes(1)) for i in range(20)],
        videos=[store.Document(str(i), text(f"video {i}"), codes(5), 12.0, 20) for i in range(6)],
        texts=[store.Document(str(i), text(f"text {i} " * (i + 1))) for i in range(40)],
        talks=[store.Document(str(i), talk, codes(1), turns=np.array(turns)) for i in range(4)],
    )
    made = convert.fingerprint(tokenizer)
    for name, stored in documents.items():
        used = "" if name == "texts" else made
        video = "clips" if name == "videos" else ""
        prints = store.Fingerprints(vocab.fingerprint, used, "", "float32", video)
        for part in range(2):
            path = store.part_path(root / name, part, 2)
            parts.write(path, stored[part::2], prints, skipped=part, dropped={"aspect": 3})
        store.finish(root / name, 2, f"from {name}", "CC0")
    (root / "run.py").write_text(TRAINING.replace("{root}", str(root)))
    return root


class Read(html.parser.HTMLParser):
    """A page's rows: strips, documents (text, pictures), problems."""

    def __init__(self, text):
        super().__init__()
        self.rows, self._open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        kinds = (found.get("class") or "").split()
        if tag == "section":
            self.rows.append(collections.defaultdict(list))
        if self.rows and "segment" in kinds:
            width = float(found["style"].partition("width:")[2].partition("%")[0])
            piece = (int(found["data-tokens"]), width, "padding" in kinds)
            self.rows[-1]["strip"].append(piece)
        if "document" in kinds:
            self.rows[-1]["documents"].append(dict(text="", tags=[], images=[], colours=[]))
        if self.rows and "mark" in kinds:
            self.rows[-1]["marks"].append(found["style"])
        if tag == "img" and found["alt"] in ("image", "video frame"):
            self.rows[-1]["documents"][-1]["images"].append(found)
        if kinds and kinds[0] in ("text", "tag"):
            style = found["style"].removeprefix("background:")
            self.rows[-1]["documents"][-1]["colours"].append((kinds[0], style))
        if tag not in ("img", "meta"):
            self._open.append(kinds)

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if not self.rows or not self._open:
            return
        kinds = self._open[-1]
        if "text" in kinds:
            self.rows[-1]["documents"][-1]["text"] += data
        elif "tag" in kinds:
            self.rows[-1]["documents"][-1]["tags"].append(data)
        elif "problem" in kinds:
            self.rows[-1]["problems"].append(data)


def decode_png(uri):
    data = base64.b64decode(uri.partition("base64,")[2])
    return np.asarray(PIL.Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def made(world):
    """The page of some rows, read, and those rows."""
    out = world / "page"
    job = inspect.Inspect(
        f"{world}/run.py", tokenizer=f"{world}/tokenizer", rows=ROWS, step=1, directory=str(out)
    )
    job.run()
    packed = job.job().data.rows()
    text = (out / "inspect.html").read_text(encoding="utf-8")
    return Read(text), [packed[i] for i in range(4, 4 + ROWS)], text


@pytest.fixture(scope="module")
def vocab(world):
    return vocabulary.Vocab.load(world / "vocab.tiktoken", CODES)


def documents_of(row):
    """The ids of each document of a row, and the weights of all but the first."""
    for number in range(1, row["segments"].max() + 1):
        here = row["segments"] == number
        yield np.append(row["tokens"][here], row["targets"][here][-1]), row["weights"][here]


def test_the_page_holds_every_document(made, vocab):
    read, rows, text = made
    kinds = collections.Counter()
    for shown, row in zip(read.rows, rows, strict=True):
        documents = list(documents_of(row))
        assert len(shown["documents"]) == len(documents)
        for found, (ids, _) in zip(shown["documents"], documents, strict=True):
            pieces = vocab.parse(ids)
            words = "".join(p.text for p in pieces if isinstance(p, vocabulary.Text))
            assert found["text"] == words
            images = [p for p in pieces if isinstance(p, vocabulary.Image)]
            videos = [p for p in pieces if isinstance(p, vocabulary.Video)]
            alts = [image["alt"] for image in found["images"]]
            assert alts == ["image"] * len(images) + ["video frame"] * 4 * len(videos)
            whole = ids[0] == vocab.bos, ids[-1] == vocab.eos
            assert (found["tags"][:1] == ["BOS"], found["tags"][-1:] == ["EOS"]) == whole
            kinds.update(type(p).__name__ for p in pieces)
            kinds["split"] += whole != (True, True)
        assert not shown["problems"] and not shown["marks"]
    assert min(kinds[name] for name in ("Text", "Image", "Video", "split")) > 0
    assert "image <" not in text and "src='http" not in text and "<script" not in text


def test_strips_are_as_wide_as_tokens(made):
    read, rows, _ = made
    for shown, row in zip(read.rows, rows, strict=True):
        tokens, widths, padding = zip(*shown["strip"], strict=True)
        assert sum(tokens) == LENGTH
        np.testing.assert_allclose(widths, 100 * np.array(tokens) / LENGTH, atol=1e-3)
        unused = int((row["segments"] == 0).sum())
        assert sum(t for t, p in zip(tokens, padding, strict=True) if p) == unused
    assert any(row["segments"][-1] == 0 for row in rows)


def test_colours_are_those_of_the_weights(made, vocab):
    read, rows, _ = made
    colours = page.Colours([anatomy.take_apart(row, vocab) for row in rows])
    grey, half, full = (colours.weight(w) for w in (0.0, 0.5, 1.0))
    assert len({grey, half, full}) == 3
    for shown, row in zip(read.rows, rows, strict=True):
        for found, (ids, weights) in zip(shown["documents"], documents_of(row), strict=True):
            texts = {int(w) for i, w in zip(ids[1:], weights, strict=True) if i < vocab.text_size}
            here = {style for kind, style in found["colours"] if kind == "text"}
            if ids[0] == vocab.bos and not found["images"]:
                assert here == {(grey, full)[w] for w in texts}
            for image in found["images"]:
                weight = float(weights[ids[1:] >= vocab.visual][0])
                assert f"border-color:{colours.weight(weight)}" in image["style"]
            if "USER" in found["text"]:  # a question is not learnt, its answer is
                assert here == {grey, full}
    assert any("USER" in d["text"] for row in read.rows for d in row["documents"])


def test_pictures_are_what_the_tokenizer_decodes(made, world, vocab):
    read, rows, _ = made
    tokenizer = convert.load(world / "tokenizer")
    seen = collections.Counter()
    for shown, row in zip(read.rows, rows, strict=True):
        for found, (ids, _) in zip(shown["documents"], documents_of(row), strict=True):
            got = [decode_png(image["src"]) for image in found["images"]]
            for piece in vocab.parse(ids):
                if seen[type(piece)] == 2:  # enough: each takes a while
                    continue
                if isinstance(piece, vocabulary.Image):
                    wanted = tokenizer.decode(jnp.asarray(piece.codes_hw[None]))
                elif isinstance(piece, vocabulary.Video):
                    wanted = tokenizer.decode_clips(jnp.asarray(piece.codes_thw[None]))
                    wanted = wanted[0, ::4][np.array([0, 1, 3, 4])]
                else:
                    continue
                seen[type(piece)] += 1
                difference = np.stack(got).astype(int) - np.asarray(pixels.to_uint8(wanted))
                assert np.abs(difference).max() <= 1
    assert seen == {vocabulary.Image: 2, vocabulary.Video: 2}


def test_without_a_tokenizer_each_code_has_a_colour():
    codes_thw = np.arange(64).reshape(1, 8, 8)
    picture = inspect.Coloured()(anatomy.Block("8*8", codes_thw, 0.0, {}))[0]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 64
    again = inspect.Coloured()(anatomy.Block("8*8", codes_thw[:, ::-1], 0.0, {}))[0]
    np.testing.assert_array_equal(again, picture[::-1])


def test_a_stream_is_decoded_from_its_beginning(world):
    opened = {"s": types.SimpleNamespace(info=dict(tokenizer="", video="stream"))}
    codes_thw = np.random.default_rng(1).integers(0, CODES, (6, 2, 3))
    got = inspect.Decoded(f"{world}/tokenizer", opened)(anatomy.Block("", codes_thw, 12.0, {}))
    made = convert.load(world / "tokenizer").decode_video(jnp.asarray(codes_thw[None]))
    wanted = pixels.to_uint8(made[0, ::4][np.array([0, 2, 3, 5])])
    assert np.abs(np.stack(got).astype(int) - np.asarray(wanted)).max() <= 1


def good_row(vocab):
    """Two documents and padding: a captioned image, a text."""
    block = vocab.image_block(np.arange(4).reshape(2, 2)).tolist()
    first, second = [vocab.bos, 65, *block, vocab.eos], [vocab.bos, 66, 67, vocab.eos]
    row = {name: np.zeros(30, np.int32) for name in ("segments", "positions")}
    row |= {name: np.full(30, vocab.pad, np.int32) for name in ("tokens", "targets")}
    row["weights"] = np.zeros(30, np.float32)
    at = 0
    for number, ids in enumerate((first, second), 1):
        here = slice(at, at + len(ids) - 1)
        row["tokens"][here], row["targets"][here] = ids[:-1], ids[1:]
        row["segments"][here], row["positions"][here] = number, np.arange(len(ids) - 1)
        row["weights"][here] = 1.0
        at = here.stop
    return row


def crossing(row, edge):
    row["targets"][edge] = row["tokens"][edge + 1]


def cut_short(row, edge):
    """The image's last id goes, as if the row had ended there."""
    for name, value in (("segments", 0), ("weights", 0), ("tokens", 256), ("targets", 256)):
        row[name][edge - 3 :] = value


BROKEN = {
    "crosses into the next document": crossing,
    "the id after it": lambda row, edge: row["targets"].__setitem__(2, 5),
    "its position is 7, not 2": lambda row, edge: row["positions"].__setitem__(2, 7),
    "segment 0 stands first": lambda row, edge: row["segments"].__setitem__(slice(edge + 1), 0),
    "segment 0 follows 1": lambda row, edge: row["segments"].__setitem__(edge, 0),
    "segment 1 follows 2": lambda row, edge: row["segments"].__setitem__(slice(edge + 3, 30), 1),
    "padding has 0.5 for its weight": lambda row, edge: row["weights"].__setitem__(-1, 0.5),
    "padding has 9 for its target": lambda row, edge: row["targets"].__setitem__(-1, 9),
    "its target is padding": lambda row, edge: row["targets"].__setitem__(edge, 256),
    "its weight is nan": lambda row, edge: row["weights"].__setitem__(2, np.nan),
    "no <|image end|> follows": cut_short,
}  # fmt: skip


@pytest.mark.parametrize("reason", BROKEN)
def test_what_is_wrong_with_a_row_is_flagged(vocab, reason):
    row = good_row(vocab)
    assert not anatomy.take_apart(row, vocab).problems
    edge = int((row["segments"] == 1).sum()) - 1
    BROKEN[reason](row, edge)
    taken = anatomy.take_apart(row, vocab)
    assert [p for p in taken.problems if reason in p.reason], taken.problems
    colours = page.Colours([taken])
    text = page.make("", [], {"Row 0": taken}, colours, inspect.Coloured())
    (shown,) = Read(text).rows
    assert any(reason in line.replace("&lt;", "<") for line in shown["problems"])
    assert len(shown["marks"]) == len(taken.problems)
    if reason == "crosses into the next document":
        assert [p.position for p in taken.problems] == [edge]
        assert shown["marks"] == [f"left:{100 * (edge + 0.5) / 30:.4f}%"]


def test_figures_are_right(world, capsys):
    inspect.Inspect(f"{world}/run.py", rows=1, directory=str(world / "bare")).run()
    cells = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    first = {line[0]: line[1:] for line in cells}
    assert first["documents"] == ["40", "20", "6", "4"]
    assert first["texts"] == ["40", "0", "0", "0"] and first["videos"] == ["0", "0", "6", "0"]
    assert first["bad records skipped"] == ["1"] * 4 and first["left out: aspect"] == ["6"] * 4
    weights, lengths = (line[1:] for line in cells if line[0] == "texts (text)")
    assert float(weights[0].rstrip("%")) == pytest.approx(100 * 0.4 / 1.8, abs=0.01)
    assert float(weights[1].rstrip("%")) == pytest.approx(100 * 0.4 / 1.8, abs=2)
    ids_N = np.sort(store.Store(world / "texts").text_length_N) + 2
    assert lengths[:3] == ["40", str(ids_N[0]), str(ids_N[19])]
    assert float(lengths[3]) == pytest.approx(ids_N.mean(), abs=0.1)
    assert lengths[4:] == [str(ids_N[-1]), str((ids_N > LENGTH + 1).sum())]


def test_use_of_the_codes():
    """Two codes used alike are a perplexity of 2 and an entropy of a bit."""
    count_K = np.array([5, 0, 5, 0])
    table = statistics.use_of_codes({"s": (3, count_K)})
    assert table.rows == [["s", 3, 10, 2, "50.00%", 1.0, 2.0]]


def test_codes_are_counted_in_a_sample(world):
    opened = store.Store(world / "images")
    codes = np.concatenate([d.codes_thw.ravel() for d in opened.read(range(20))])
    documents, count_K = statistics.count_codes(opened, 0, CODES)
    assert documents == 20
    np.testing.assert_array_equal(count_K, np.bincount(codes, minlength=CODES))
    documents, count_K = statistics.count_codes(opened, 5, CODES)
    assert documents == 5 and 0 < count_K.sum() < len(codes)


def test_errors_name_the_setting(world, tmp_path, capsys):
    with pytest.raises(ValueError, match="run.py:x trains on Counting; Inspect wants a Mixture"):
        inspect.Inspect(f"{world}/run.py:x").run()
    with pytest.raises(ValueError, match="is a job Inspect; Inspect wants a Train"):
        inspect.Inspect("configs/inspect.py").run()
    other = vq.merge(CONFIG, *vq.init(CONFIG, jax.random.key(1)))
    convert.save(other, tmp_path)
    with pytest.raises(ValueError, match=r"was made with tokenizer \w{12}, .* is \w{12}; give"):
        inspect.Inspect(f"{world}/run.py", tokenizer=str(tmp_path)).run()
    assert launch.main(["--config=configs/inspect.py:verify"]) == 2
    assert "give --config.store=DIR" in capsys.readouterr().err
    assert launch.main(["--config=configs/inspect.py:verify", f"--config.store={tmp_path}/x"]) == 2
    assert "x does not exist; run its encode job first" in capsys.readouterr().err
    assert launch.main(["--config=configs/inspect.py:pages"]) == 2
    assert "no job 'pages'; take one of rows, verify" in capsys.readouterr().err


def small_store(directory):
    text = np.arange(9, dtype=np.uint32)
    codes = np.arange(12, dtype=np.uint16)
    grids, turns = (codes.reshape(1, 3, 4), codes.reshape(3, 2, 2)), np.array([1, 4, 4])
    for part in range(3):
        stored = [
            store.Document(f"{part}.{i}", text, grids[i % 2], 12.0 * (i % 2), 12 * (i % 2), turns)
            for i in range(5)
        ]
        parts.write(store.part_path(directory, part, 3), stored, store.Fingerprints())
    store.finish(directory, 3, "", "")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shard_of(path, column):
    """The file of a column's first shard."""
    first = path / column / "c" / "0"
    return first / "0" if first.is_dir() else first


def test_verify_names_every_damaged_column(tmp_path, capsys):
    small_store(tmp_path)
    wanted = set()
    for part in range(2):
        path = store.part_path(tmp_path, part, 3)
        for number, column in enumerate(parts.COLUMNS):
            if number % 2 == part:
                flip(shard_of(path, column), 2)
                wanted.add((path.name, column))
    argv = ["--config=configs/inspect.py:verify", f"--config.store={tmp_path}"]
    assert launch.main(argv) == 2
    said = capsys.readouterr()
    named = {tuple(line.split(" ")[:2]) for line in said.out.splitlines() if "part-" in line[:5]}
    assert named == {(f"{part}:", column) for part, column in wanted}
    assert said.err.startswith(
        f"error: store {tmp_path}: {len(parts.COLUMNS)} damaged columns in 2 parts "
        "(part-00000-of-00003, part-00001-of-00003); "
    )
    assert "0:00 left" in said.out


def test_verify_finds_what_is_missing_or_does_not_match(tmp_path, capsys):
    small_store(tmp_path)
    argv = ["--config=configs/inspect.py:verify", f"--config.store={tmp_path}"]
    assert launch.main(argv) == 0
    assert "3 parts, all as written" in capsys.readouterr().out
    paths = [store.part_path(tmp_path, part, 3) for part in range(3)]
    (paths[0] / "part.json").unlink()
    shard = shard_of(paths[1], "text")
    shard.write_bytes(shard.read_bytes()[:-1])
    shard_of(paths[1], "codes").unlink()
    info = json.loads((paths[2] / "part.json").read_text())
    info["crc32c"]["shape"] = "00000000"
    (paths[2] / "part.json").write_text(json.dumps(info))
    found = {(d.part, d.column, d.reason) for d in verify.Verify(str(tmp_path)).damages()}
    assert {(part, column) for part, column, _ in found} == {
        (paths[0].name, "part.json"), (paths[1].name, "text"), (paths[1].name, "codes"),
        (paths[2].name, "shape"),
    }  # fmt: skip
    reasons = {column: reason for _, column, reason in found}
    assert reasons["part.json"] == "is missing"
    assert reasons["shape"].endswith("part.json says 00000000")
    assert reasons["codes"].startswith("has 0 bytes of ")
