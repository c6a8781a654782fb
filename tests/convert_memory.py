"""Prints in MB: a model's size, then how far anonymous memory rose while it was loaded, saved and
rewritten. Run by test_convert.py in a process of its own, with a scratch directory."""

import contextlib
import pathlib
import sys
import threading

import numpy as np

from emu3_jax import convert, processor, release, shards
from emu3_jax.transformer import Transformer

MB = 2**20
VQ = {"channel_multiplier": [1, 2, 2, 4]}


def main(root: pathlib.Path) -> None:
    model = Transformer(layers=6, width=1024, heads=8, kv_heads=4, ffn=4096, vocab=40_000)
    model.first_visual = 30_000
    about = release.Release()
    official = root / "official"
    official.mkdir()
    tensors = [_pattern(weight) for weight in convert._weights(model)]
    shards.write(tensors, official, shard_bytes=200 * MB)
    config = release.config_json("official", model, about, "float32", None)
    processor.write_json(official / "config.json", config)
    figures = [sum(tensor.nbytes for tensor in tensors)]
    with _rise(figures):
        model, params = convert.load(str(official), scratch=str(root / "scratch"))
    with _rise(figures):
        convert.save(model, params, str(root / "saved"), "hf", vision=convert.Vision([], VQ))
    with _rise(figures):
        convert.rewrite(str(official), str(root / "written"), "hf", vision=convert.Vision([], VQ))
    saved, written = shards.read(root / "saved"), shards.read(root / "written")
    for name in ("text_model.lm_head.weight", "text_model.model.layers.5.mlp.up_proj.weight"):
        for a, b in zip(saved[name].chunks(), written[name].chunks(), strict=True):
            assert np.array_equal(a, b)
    print(*(figure / MB for figure in figures))


def _pattern(weight) -> shards.Tensor:
    """A tensor of numbers that differ from row to row and are never in memory whole."""

    def chunks():
        for rows in shards.row_ranges(weight.shape, 4):
            chunk = np.arange(rows.start, rows.stop, dtype=np.float32)
            row = np.ones(weight.shape[1:], np.float32)
            yield np.multiply.outer(chunk, row) if row.ndim else chunk

    return shards.Tensor(weight.name, weight.shape, np.dtype(np.float32), chunks)


@contextlib.contextmanager
def _rise(figures: list):
    before, peak, done = _anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], _anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    figures.append(peak[0] - before)


def _anonymous() -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
