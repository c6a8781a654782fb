"""The loader on one core: ours beside Grain's packing over ArrayRecord, and Hugging Face datasets.

    python -m benchmarks.loader [--tiny]        (needs the package datasets: pip install datasets)

Prints one JSON line. `loaders`: packed tokens a second (positions in use) of each side for two
kinds of documents, from files that have been read once, each side in a process of its own on one
core, in turns, the median of the rounds. All sides give shuffled rows of ids with what tells
documents apart and weights; ours makes ids out of raw codes and text, the others find them ready:

    ours       a token store, best-fit in windows of 128 rows, any row by its index
    grain      ArrayRecord of pickled documents, FirstFitPackIterDataset with 64 bins
    datasets   Arrow, documents shuffled in a buffer of 1,000, end to end and cut into rows, so
               images are split (and it tells no documents apart)

`fill`: the share of positions in use of the mixtures that the rows are meant for. `start`:
seconds and memory to open a mixture over 100 million documents at step 1,000,000 and to plan the
rows of a step. `memory`: of planning 10 million rows, before and after. --tiny takes seconds.
"""

import argparse
import itertools
import json
import os
import pathlib
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from data_pipelines import arrays, documents, mixture, packing, parts, store
from emu3_jax import data
from emu3_jax import vocab as vocabulary

SIDES = ("ours", "grain", "datasets")
RANKS = {bytes([i]): i for i in range(256)}
CODES, ROWS = 32768, 16
LENGTHS = dict(images=8960, text=5120)  # two captioned images; a stage 1 row


def main(argv: list[str]) -> None:
    """Measures everything and prints the JSON line; with --side it is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("start", "memory", *SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=tuple(LENGTHS), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.side:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        sides = dict(start=start, memory=memory)
        run = sides[flags.side] if flags.side in sides else throughput
        print(json.dumps(run(flags)))
        return
    with tempfile.TemporaryDirectory() as directory:
        flags.directory = pathlib.Path(directory)
        report = dict(benchmark="loader", loaders=loaders(flags), fill=fill(flags.tiny))
        write_large(flags.directory / "large", 100_000 if flags.tiny else 100_000_000)
        report |= {side: child(flags, side) for side in ("start", "memory")}
    print(json.dumps(report))


def child(flags, side: str, kind: str = "text") -> dict:
    """What a process of its own measures, or the error that ended it."""
    command = [sys.executable, "-m", "benchmarks.loader", f"--side={side}", f"--kind={kind}",
               f"--directory={flags.directory}", *(["--tiny"] if flags.tiny else [])]  # fmt: skip
    environ = os.environ | dict(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if done.returncode:
        return dict(error=(done.stderr or done.stdout).strip().splitlines()[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])


def loaders(flags) -> dict:
    """All sides for each kind of documents, and how often ours is as fast as the others."""
    report = {}
    for kind in LENGTHS:
        write_documents(flags, kind)
        found = {side: [] for side in SIDES}
        for _ in range(flags.rounds):
            for side in SIDES:
                found[side].append(child(flags, side, kind))
        report[kind] = {side: median(results) for side, results in found.items()}
        ours = report[kind]["ours"]["tokens_per_second"]
        for side in SIDES[1:]:
            if "error" not in report[kind][side]:
                theirs = report[kind][side]["tokens_per_second"]
                report[kind][f"ours_over_{side}"] = round(ours / theirs, 2)
    return report


def median(results: list[dict]) -> dict:
    """The figures of the rounds, or the first error."""
    errors = [result for result in results if "error" in result]
    if errors:
        return errors[0]
    names = results[0]
    return {name: round(statistics.median(r[name] for r in results), 3) for name in names}


def make_documents(kind: str, tiny: bool) -> list[store.Document]:
    """Images of 64x64 codes with captions of 20 to 120 ids, or texts of 20 to 600."""
    rng = np.random.default_rng(0)
    count, side = ((64, 8) if tiny else (2000, 64)) if kind == "images" else (
        (200, 0) if tiny else (40_000, 0))  # fmt: skip
    low, high = (20, 120) if kind == "images" else (20, 600)
    found = []
    for i in range(count):
        text = rng.integers(0, 256, rng.integers(low, high)).astype(np.uint32)
        codes = rng.integers(0, CODES, (1, side, side)).astype(np.uint16) if side else None
        found.append(store.Document(str(i), text, codes))
    return found


def write_documents(flags, kind: str) -> None:
    """The same documents as each side's files."""
    import array_record.python.array_record_module as array_record

    vocab, here = vocabulary.Vocab(RANKS, CODES), flags.directory
    vocabulary.save_ranks(RANKS, here / "vocab.tiktoken")
    stored = make_documents(kind, flags.tiny)
    made = store.Fingerprints(vocab.fingerprint, "t" if kind == "images" else "")
    parts.write(store.part_path(here / kind, 0, 1), stored, made)
    store.finish(here / kind, 1, "", "")
    built = [documents.build(document, layout(kind), vocab) for document in stored]
    writer = array_record.ArrayRecordWriter(str(here / f"{kind}.array_record"), "group_size:1")
    for ids, weights in built:
        writer.write(pickle.dumps(dict(tokens=ids, weights=weights)))
    writer.close()
    try:
        import datasets
    except ImportError:
        return
    columns = dict(tokens=[ids for ids, _ in built], weights=[weights for _, weights in built])
    datasets.Dataset.from_dict(columns).save_to_disk(str(here / f"{kind}.arrow"))


def layout(kind: str) -> documents.Layout:
    """How documents of a kind are written."""
    return documents.Layout("text" if kind == "text" else "caption_first")


def throughput(flags) -> dict:
    """Packed tokens a second of one side: a pass to warm up, then twice as long."""
    length = LENGTHS[flags.kind] // (32 if flags.tiny and flags.kind == "images" else 1)
    batches = dict(ours=ours, grain=theirs_grain, datasets=theirs_datasets)[flags.side](
        flags, length
    )
    total = 4 if flags.tiny else 60
    begin, tokens, at = None, 0, 0
    for at, used in enumerate(batches, 1):
        if at == total // 3:
            begin, tokens = time.perf_counter(), 0
        tokens += used
        if at == total:
            break
    seconds = time.perf_counter() - begin
    fill = tokens / ((at - total // 3 + 1) * ROWS * length)
    return dict(tokens_per_second=tokens / seconds, fill=fill)


def ours(flags, length: int) -> Iterator[int]:
    """Positions in use of batches from our loader, as the trainer reads them."""
    component = mixture.Component(str(flags.directory / flags.kind), layout(flags.kind))
    config = mixture.Mixture(
        (component,), str(flags.directory / "vocab.tiktoken"), CODES, length=length
    )
    rows = config.open(ROWS)
    for step in itertools.count():
        block = rows.block(rows.row(step), ROWS)
        yield int((block["segments"] > 0).sum())


def theirs_grain(flags, length: int) -> Iterator[int]:
    """The same from Grain's own parts."""
    import grain

    path = flags.directory / f"{flags.kind}.array_record"
    source = grain.sources.ArrayRecordDataSource(str(path))
    sizes = dict(tokens=length, weights=length)
    documents_ = grain.MapDataset.source(source).shuffle(seed=0).repeat().map(pickle.loads)
    packed = grain.experimental.FirstFitPackIterDataset(
        documents_.to_iter_dataset(), length_struct=sizes, num_packing_bins=64
    )
    for block in packed.batch(ROWS):
        yield int((block["tokens_segment_ids"] > 0).sum())


def theirs_datasets(flags, length: int) -> Iterator[int]:
    """The same from Hugging Face datasets, concatenated and split."""
    import datasets

    read = datasets.load_from_disk(str(flags.directory / f"{flags.kind}.arrow"))
    stream = read.to_iterable_dataset().repeat(None).shuffle(seed=0, buffer_size=1000)

    def split(batch: dict) -> dict:
        joined = {name: np.concatenate(column) for name, column in batch.items()}
        rows = len(joined["tokens"]) // length
        return {name: x[: rows * length].reshape(rows, length) for name, x in joined.items()}

    stream = stream.with_format("numpy").map(split, batched=True, batch_size=1000)
    for block in stream.batch(ROWS):
        yield int(np.asarray(block["tokens"]).size)


def fill(tiny: bool) -> dict[str, float]:
    """The share of positions in use over 2,000 rows of the mixtures that rows are meant for."""
    rng = np.random.default_rng(0)
    count = 2_000 if tiny else 50_000
    image = 4160 + 12 + rng.integers(20, 400, count)  # 512x512 pixels, a caption
    text = np.minimum(rng.lognormal(5.5, 1.0, count).astype(int) + 3, 5000)
    video = rng.integers(4, 31, count) * 4161 + 120  # latent frames of 512x512 pixels
    cases = {
        "captioned images 0.8, text 0.2; rows of 5,120": ((image, text), (0.8, 0.2), 5120),
        "short text; rows of 5,120": ((text,), (1.0,), 5120),
        "video 0.6, images 0.3, text 0.1; rows of 131,072": (
            (video, image, text), (0.6, 0.3, 0.1), 131_072),
        "captioned images alone; rows of 5,120": ((image,), (1.0,), 5120),
    }  # fmt: skip
    found = {}
    for name, (lengths, weights, row) in cases.items():
        sources = [
            packing.Source(str(i), lengths_N, np.zeros_like(lengths_N), seed=i)
            for i, lengths_N in enumerate(lengths)
        ]
        plan = packing.Plan(sources, [packing.Stage(0, weights)], row)
        found[name] = round(plan.report(256 if tiny else 2000)["fill"], 4)
    return found


def write_large(path: pathlib.Path, count: int) -> None:
    """A store of so many texts, of which only what is read at the start is there."""
    rng, several = np.random.default_rng(0), 8
    vocab = vocabulary.Vocab(RANKS, CODES)
    made = store.Fingerprints(vocab.fingerprint)
    for number in range(several):
        part, size = store.part_path(path, number, several), count // several
        parts.write(part, [store.Document("", np.zeros(0, np.uint32))], made)
        length_N = rng.integers(20, 600, size).astype(np.uint32)
        arrays.write(part / "text_length", length_N, 1 << 16)
        arrays.write(part / "keys", np.full(size, 10, np.uint8), 1 << 16)
        arrays.write(part / "shape", np.zeros(size, np.uint32), 1 << 16)
        info = parts.read_json(part / "part.json")
        files = sorted(p for p in part.rglob("*") if p.is_file() and p.name != "part.json")
        info |= dict(documents=size, text_tokens=int(length_N.sum()), shapes=[[0, 0, 0, 0.0, size]],
                     files={str(p.relative_to(part)): p.stat().st_size for p in files})  # fmt: skip
        parts.write_json(part / "part.json", info)
    store.finish(path, several, "", "")


def start(flags) -> dict:
    """Opening a mixture over the large store far out in a run."""
    component = mixture.Component(str(flags.directory / "large"), documents.Layout("text"))
    config = mixture.Mixture((component,), str(flags.directory / "vocab.tiktoken"), CODES)
    first = config.open(128)
    state = first.state(0)
    step, row = 1_000_000, 128_000_000
    state |= dict(step=step, row=row)
    state["cursor"] |= dict(window=step, row=row, stage=0)
    state["cursor"]["sources"][component.title]["taken"] = row * 16
    del first
    before = time.perf_counter()
    opened = config.open(128, state, data.Positions(0, config.length, config.length))
    opened_after = time.perf_counter() - before
    opened._eras[0][1].plan.rows(range(row, row + 128))
    planned_after = time.perf_counter() - before
    bytes_ = len(json.dumps(opened.state(step)))
    documents_ = len(opened._eras[0][1].plan._sources[0].lengths_N)
    return dict(documents=documents_, open_seconds=round(opened_after, 2), state_bytes=bytes_,
                with_first_rows_seconds=round(planned_after, 2),
                resident_mib=resident())  # fmt: skip


def memory(flags) -> dict:
    """Memory while rows are planned, one document each."""
    lengths_N = np.full(100_000, 4000)
    source = packing.Source("s", lengths_N, np.zeros_like(lengths_N))
    plan = packing.Plan([source], [packing.Stage(0, (1.0,))], 5120)
    rows = 10_000 if flags.tiny else 10_000_000
    plan.cursor(rows // 100)
    before = resident()
    begin = time.perf_counter()
    plan.cursor(rows)
    seconds = time.perf_counter() - begin
    return dict(rows=rows, before_mib=before, after_mib=resident(), seconds=round(seconds, 1))


def resident() -> float:
    """Memory of this process now, in MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


if __name__ == "__main__":
    main(sys.argv[1:])
