"""What a mixture and its stores hold, as tables for a page and a terminal.

Lengths and kinds come from columns; codes from a sample of the documents, so that a store of any
size takes seconds.

Legend: N documents of a store, M of them, L lengths, K codes.
"""

import collections
from collections.abc import Sequence

import numpy as np

from data_pipelines import anatomy, documents, page, store
from data_pipelines.mixture import Mixture, MixtureRows

_PIECE = 1 << 22  # lengths at a time
_AT_ONCE = 64  # documents of a read: videos are large


def kinds(opened: store.Store) -> dict[str, int]:
    """How many documents are texts, images and videos."""
    counts = dict.fromkeys(("texts", "images", "videos"), 0)
    for (t, _, _, fps), count in zip(opened.shapes, opened.counts_S.tolist(), strict=True):
        counts["videos" if fps else "images" if t else "texts"] += count
    return counts


def mixture(config: Mixture, packed: MixtureRows, steps: int) -> page.Table:
    """Each component's share of the tokens of the first steps, beside those asked for."""
    found = packed.figures(steps)
    stages = {0: [component.weight for component in config.components]}
    stages |= {stage.step: stage.weights for stage in config.schedule}
    lines = []
    for number, component in enumerate(config.components):
        asked = [f"{weights[number] / sum(weights):.2%}" for weights in stages.values()]
        share, epochs, dropped, cut = (
            found[f"{figure}/{component.title}"]
            for figure in ("share", "epochs", "dropped", "truncated")
        )
        lines.append([component.title, *asked, f"{share:.2%}", f"{epochs:.3f}", dropped, cut])
    asked = [f"asked from step {step}" if step else "share asked" for step in stages]
    head = ("component", *asked, "share of tokens", "epochs", "too long", "caption cut")
    rows = packed.row(steps)
    said = f"over the first {rows:,} rows ({steps:,} steps), which are {found['fill']:.2%} full"
    return page.Table("Mixture", head, lines, said)


def stores(opened: dict[str, store.Store]) -> page.Table:
    """Counts and origins, a column a store."""
    lines = [("documents", [len(s) for s in opened.values()])]
    counts = [kinds(s) for s in opened.values()]
    lines += [(f"  {kind}", [count[kind] for count in counts]) for kind in counts[0]]
    for key, name in (("text_tokens", "ids of text"), ("codes", "codes"), ("parts", "parts"),
                      ("skipped", "bad records skipped")):  # fmt: skip
        lines.append((name, [s.info[key] for s in opened.values()]))
    dropped = [s.info["dropped"] if "dropped" in s.info else {} for s in opened.values()]
    for reason in sorted({reason for counts in dropped for reason in counts}):
        counts = [d[reason] if reason in d else 0 for d in dropped]
        lines.append((f"left out: {reason}", counts))
    for key, name in (("read_from", "read from"), ("licence", "licence"), ("video", "video")):
        lines.append((name, [s.info[key] or "-" for s in opened.values()]))
    for key in ("tokenizer", "vocabulary"):
        lines.append((key, [s.info[key][:12] or "-" for s in opened.values()]))
    return page.Table("Stores", ("", *opened), [(name, *values) for name, values in lines])


def count_lengths(writer: documents.Writer) -> np.ndarray:
    """How many documents have each length in ids: count_L."""
    lengths_N, count_L = writer.lengths_N, np.zeros(1, np.int64)
    for begin in range(0, len(lengths_N), _PIECE):
        piece_L = np.bincount(lengths_N[begin : min(len(lengths_N), begin + _PIECE)])
        longer = max(len(count_L), len(piece_L))
        count_L = np.pad(count_L, (0, longer - len(count_L)))
        count_L[: len(piece_L)] += piece_L
    return count_L


def lengths(counts: dict[str, np.ndarray], row: int) -> page.Table:
    """Of count_L by component, against a row of `row` positions."""
    lines = []
    for name, count_L in counts.items():
        total = int(count_L.sum())
        median = int(np.searchsorted(np.cumsum(count_L), (total + 1) // 2))
        mean = float((count_L * np.arange(len(count_L))).sum() / total)
        shortest, longest = int(np.flatnonzero(count_L)[0]), len(count_L) - 1
        over = int(count_L[row + 2 :].sum())
        lines.append([name, total, shortest, median, round(mean, 1), longest, over])
    head = ("component", "documents", "shortest", "median", "mean", "longest", "over a row")
    said = f"in ids from BOS to EOS; a document of n ids takes n - 1 of a row's {row:,} positions"
    said += "; dashed: what fits a row"
    return page.Table("Lengths", head, lines, said)


def count_codes(opened: store.Store, sample: int, codes: int) -> tuple[int, np.ndarray]:
    """Of how many documents, `sample` drawn at random (0: all), and how often each code stands in
    them: count_K."""
    index_M = np.arange(len(opened))
    if 0 < sample < len(opened):
        index_M = np.random.default_rng(0).choice(len(opened), sample, replace=False)
    count_K = np.zeros(codes, np.int64)
    for start in range(0, len(index_M), _AT_ONCE):
        for document in opened.read(index_M[start : start + _AT_ONCE]):
            if document.codes_thw is not None:
                count_K += np.bincount(document.codes_thw.ravel(), minlength=codes)
    return len(index_M), count_K


def use_of_codes(counted: dict[str, tuple[int, np.ndarray]]) -> page.Table:
    """Of what `count_codes` gives, by store: the share of the codes in use, and the entropy."""
    lines = []
    for name, (sampled, count_K) in counted.items():
        share_k = count_K[count_K > 0] / count_K.sum()
        entropy = float(-(share_k * np.log2(share_k)).sum())
        lines.append(
            [name, sampled, int(count_K.sum()), len(share_k),
             f"{len(share_k) / len(count_K):.2%}", round(entropy, 3), round(2**entropy, 1)]
        )  # fmt: skip
    head = ("store", "documents read", "their codes", "different", "share of all", "entropy, bits",
            "perplexity")  # fmt: skip
    said = "the documents are drawn at random; a perplexity of n is that of n codes used alike, "
    said += "dashed: all codes used alike"
    return page.Table("Use of the codes", head, lines, said)


def targets(rows: Sequence[anatomy.Row], colours: page.Colours) -> page.Table:
    """What the loss of these rows consists of, by role and weight."""
    counts = sum((row.targets for row in rows), collections.Counter())
    total = sum(counts.values())
    loss = sum(weight * count for (_, weight), count in counts.items()) or 1.0
    order = sorted(counts, key=lambda key: (anatomy.ROLES.index(key[0]), -key[1]))
    lines = [
        (role, f"{weight:g}", counts[role, weight], f"{counts[role, weight] / total:.2%}",
         f"{weight * counts[role, weight] / loss:.2%}")
        for role, weight in order
    ]  # fmt: skip
    return page.Table(
        "Targets",
        ("role", "weight", "targets", "share", "share of the loss weights"),
        lines,
        "in the rows below; meta are the size of a picture and the ids around it, breaks the ends "
        "of its rows and frames",
        [colours.weight(weight) for _, weight in order],
    )
