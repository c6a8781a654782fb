"""The page that shows what the model sees: tables and plots, then rows with their documents.

Legend: T position in a row, S columns of a strip, L lengths of documents; H rows, W columns, C
colours of pixels.
"""

import dataclasses
import html
from collections.abc import Callable, Sequence

import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np

from data_pipelines import anatomy
from tokenizer import report

STYLE = """
h2 { margin-bottom: .6em; } h3 { margin: 2em 0 .4em; font-size: 1.05em; }
h3 .said { font-weight: normal; font-size: .9em; }
td, th { padding: .2em .8em; } td.value, th.value { text-align: right; }
.swatch { display: inline-block; width: 1.1em; height: 1.1em; vertical-align: -.2em;
          border: 1px solid #0002; }
.legend > span { white-space: nowrap; margin-right: 1.4em; }
.strip { display: flex; position: relative; height: 1.7em; font-size: 12px; line-height: 1.7em; }
.segment { box-sizing: border-box; border-right: 1px solid #fff; overflow: hidden; color: #fff;
           text-align: center; text-decoration: none; min-width: 0; }
.padding { background: repeating-linear-gradient(135deg, #fff 0 4px, #ccc 4px 6px); border: none; }
.mark { position: absolute; top: -3px; bottom: -14px; width: 3px; background: #d00; }
.weights { display: block; width: 100%; height: 9px; image-rendering: pixelated; margin-top: 2px; }
.problem { color: #c00; font-weight: bold; margin: .3em 0; } .fine { color: #17732b; }
.documents { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr));
             gap: 10px; margin-top: 10px; align-items: start; }
.document { border: 1px solid #ddd; border-top: 4px solid; border-radius: 4px; padding: 6px 10px;
            min-width: 0; }
.document:target { outline: 3px solid #222; } .wide { grid-column: 1 / -1; }
.head { font-size: 12px; color: #666; } .head b { color: #222; }
.body { max-height: 34em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.tag { font: 11px ui-monospace, monospace; border: 1px solid #0003; border-radius: 3px;
       padding: 0 3px; margin: 0 1px; }
figure { margin: 4px 0; }
figure img { margin-right: 3px; max-width: 100%; border: 3px solid; box-sizing: border-box; }
figure .small { image-rendering: pixelated; }
figcaption { font-size: 12px; color: #666; white-space: normal; }
"""
_FORMS = ("#4e79a7", "#59a14f", "#9467bd", "#3a9a9a", "#8c6d46", "#5a6472", "#a5527f", "#7d8b2f")
_NO_WEIGHT, _LEAST, _MOST = (226, 226, 226), (255, 249, 232), (255, 203, 104)
_STRIP = 1040  # columns of a strip of weights: pixels of the page's width
_SMALL, _SHOWN = 128, 192  # pictures below so many pixels are enlarged to so many

Pictures = Callable[[anatomy.Block], list[np.ndarray]]


@dataclasses.dataclass
class Table:
    """A table for the page and the terminal; a column of `colours`, if any, is the page's alone."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    said: str = ""
    colours: Sequence[str] = ()

    def html(self) -> str:
        """The title, the table, and below it what is `said`."""
        swatches = [f"<td><span class=swatch style='background:{c}'></span>" for c in self.colours]
        head = "<th>" * bool(swatches) + _cells(self.head, "th")
        rows = [
            f"<tr>{swatches[i] if swatches else ''}{_cells(_formatted(row), 'td')}"
            for i, row in enumerate(self.rows)
        ]
        said = f"<p class=said>{html.escape(self.said)}</p>" if self.said else ""
        return (
            f"<h2>{html.escape(self.title)}</h2><table><tr>{head}{''.join(rows)}</table>{said}"
        )  # fmt: skip

    def text(self) -> str:
        """The same for a terminal."""
        rows = [list(self.head), *(_formatted(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.title.upper()]
        for first, *others in rows:
            cells = (c.rjust(width) for c, width in zip(others, widths[1:], strict=True))
            lines.append("  ".join([f"  {first:{widths[0]}}", *cells]))
        return "\n".join(lines + ([f"  ({self.said})"] if self.said else []))


def _formatted(row: Sequence[str | int | float]) -> list[str]:
    kinds = {int: ",", float: ",.4g"}
    return [format(cell, kinds[type(cell)] if type(cell) in kinds else "") for cell in row]


def _cells(cells: Sequence[str], tag: str) -> str:
    return "".join(
        f"<{tag}{' class=value' if i else ''}>{html.escape(cell)}" for i, cell in enumerate(cells)
    )


class Colours:
    """Which colour a form of document and a loss weight have, in these rows."""

    def __init__(self, rows: Sequence[anatomy.Row]):
        forms = dict.fromkeys(d.form for row in rows for d in row.documents)
        self.forms = {form: _FORMS[i % len(_FORMS)] for i, form in enumerate(forms)}
        weights_T = np.concatenate([np.zeros(1), *(row.weights_T for row in rows)])
        finite_T = weights_T[np.isfinite(weights_T)]
        self._most = float(finite_T.max()) or 1.0

    def weight(self, weight: float) -> str:
        """As CSS has it: grey for 0, the darker the larger."""
        return "rgb({}, {}, {})".format(*self.weights(np.array([weight]))[0])

    def weights(self, weights_T: np.ndarray) -> np.ndarray:
        """uint8 colours [T, 3]; the largest weight's where one is no number."""
        share_T = np.clip(np.nan_to_num(weights_T, nan=self._most) / self._most, 0, 1)[:, None]
        colour_TC = (1 - share_T) * _LEAST + share_T * _MOST
        return np.where(share_T > 0, colour_TC, _NO_WEIGHT).round().astype(np.uint8)


def make(
    said: str,
    blocks: Sequence[str],
    rows: dict[str, anatomy.Row],
    colours: Colours,
    pictures: Pictures,
) -> str:
    """The whole page: what is `said` of it all, `blocks` of HTML, then `rows` by name."""
    forms = "".join(
        f"<span>{_swatch(colour)} {html.escape(form)}</span>"
        for form, colour in colours.forms.items()
    )
    weights = "".join(
        f"<span>{_swatch(colours.weight(weight))} {weight:g}</span>"
        for weight in sorted({weight for row in rows.values() for _, weight in row.targets})
    )
    parts = [
        f"<h1>What the model sees</h1><p class=said>{html.escape(said)}</p>", *blocks,
        "<h2>Rows</h2><p class=said>The upper bar of a row has its documents, as wide as they have "
        "tokens; the lower one, the texts and the frames of pictures have the colours of their "
        "loss weights.</p>", f"<p class=legend>Documents: {forms}<span><span class='swatch "
        f"padding'></span> padding</span></p><p class=legend>Loss weights: {weights}</p>",
    ]  # fmt: skip
    for number, (name, row) in enumerate(rows.items()):
        parts.append(_row(name, number, row, colours, pictures))
    return report.page("What the model sees", parts, STYLE)


def _swatch(colour: str) -> str:
    return f"<span class=swatch style='background:{colour}'></span>"


def _row(
    name: str, number: int, row: anatomy.Row, colours: Colours, pictures: Pictures
) -> str:  # fmt: skip
    length = len(row.segments_T)
    about = f"{length - row.padding:,} of {length:,} positions, {len(row.documents)} documents"
    problems = "".join(
        f"<div class=problem>position {p.position:,}: {html.escape(p.reason)}</div>"
        for p in row.problems
    )
    documents = "".join(
        _document(f"{number}-{i}", i, document, colours, pictures)
        for i, document in enumerate(row.documents, start=1)
    )
    return (
        f"<section class=row><h3>{html.escape(name)} <span class=said>{about}</span></h3>"
        f"{_strip(number, row, colours)}{problems}<div class=documents>{documents}</div></section>"
    )


def _strip(number: int, row: anatomy.Row, colours: Colours) -> str:
    length, at, segments = len(row.segments_T), 0, []

    def padding(count: int) -> str:
        width = 100 * count / length
        return f"<div class='segment padding' data-tokens={count} style='width:{width:.4f}%'></div>"

    for i, document in enumerate(row.documents, start=1):
        segments += [padding(document.begin - at)] if document.begin > at else []
        at = document.begin + document.count
        segments.append(
            f"<a class=segment href='#{number}-{i}' data-tokens={document.count} "
            f"title='{i}: {html.escape(document.form)}, {document.count:,} positions' style='"
            f"width:{100 * document.count / length:.4f}%;background:{colours.forms[document.form]}'"
            f">{i}</a>"
        )
    segments += [padding(length - at)] if length > at else []
    marks = "".join(
        f"<div class=mark style='left:{100 * (p.position + 0.5) / length:.4f}%'></div>"
        for p in row.problems
    )
    return (
        f"<div class=strip>{''.join(segments)}{marks}</div>"
        f"<img class=weights alt='loss weights' src='{report.image_uri(_bar(row, colours))}'>"
    )


def _bar(row: anatomy.Row, colours: Colours) -> np.ndarray:
    """uint8 [1, S, 3]: the weights' colours along the row, each column the mean of its positions.

    Padding is white.
    """
    colour_TC = colours.weights(row.weights_T).astype(np.float64)
    colour_TC[row.segments_T == 0] = 255
    length = len(colour_TC)
    edges_S = np.arange(min(length, _STRIP) + 1) * length // min(length, _STRIP)
    sums_SC = np.add.reduceat(colour_TC, edges_S[:-1])
    return (sums_SC / np.diff(edges_S)[:, None]).round().astype(np.uint8)[None]


def _document(
    name: str, number: int, document: anatomy.Document, colours: Colours, pictures: Pictures
) -> str:
    last = document.begin + document.count - 1
    split = "" if document.starts else " begins in another row;"
    split += "" if document.ends else " goes on in another row;"
    body = "".join(_piece(piece, colours, pictures) for piece in document.pieces)
    video = any(isinstance(p, anatomy.Block) and p.fps for p in document.pieces)
    form = html.escape(document.form)
    return (
        f"<div class='document{' wide' * video}' id='{name}' style='border-top-color:"
        f"{colours.forms[document.form]}'><div class=head><b>{number}</b> {form};{split} "
        f"{document.count:,} positions from {document.begin:,} to {last:,}</div>"
        f"<div class=body>{body}</div></div>"
    )


def _piece(
    piece: anatomy.Run | anatomy.Block | anatomy.Broken, colours: Colours, pictures: Pictures
) -> str:
    if isinstance(piece, anatomy.Broken):
        return f"<div class=problem>{html.escape(piece.reason)}</div>"
    if isinstance(piece, anatomy.Block):
        return _figure(piece, colours, pictures(piece))
    kind = "tag" if piece.special else "text"
    title = "not learnt" if piece.weight == 0 else f"weight {piece.weight:g}"
    background = colours.weight(piece.weight)
    return (
        f"<span class={kind} title='{title}' style='background:{background}'>"
        f"{html.escape(piece.text)}</span>"
    )


def _figure(block: anatomy.Block, colours: Colours, shown: list[np.ndarray]) -> str:
    codes = block.weights["codes"]
    border = colours.weight(codes[-1] if codes else 0.0)
    size = " x ".join(map(str, block.codes_thw.shape[0 if block.fps else 1 :]))
    weights = ", ".join(
        f"{role} {'/'.join(f'{value:g}' for value in values)}"
        for role, values in block.weights.items()
        if values
    )
    said = f"<b>{html.escape(block.head)}</b>: {size} codes; weights: {weights}"
    images = []
    for image_HWC in shown:
        small = max(image_HWC.shape) < _SMALL
        width = f"width:{_SHOWN * image_HWC.shape[1] // max(image_HWC.shape)}px;" if small else ""
        images.append(
            f"<img{' class=small' * small} alt='{'video frame' if block.fps else 'image'}' style='"
            f"{width}border-color:{border}' src='{report.image_uri(image_HWC)}'>"
        )
    return f"<figure>{''.join(images)}<figcaption>{said}</figcaption></figure>"


def lengths(counts: dict[str, np.ndarray], row: int) -> matplotlib.figure.Figure:
    """Of how many documents have each length in ids (count_L, by name), histograms; dashed: what a
    row takes."""
    figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    low = min(int(np.flatnonzero(count_L)[0]) for count_L in counts.values())
    high = max(len(count_L) for count_L in counts.values())
    wide = high > 20 * low
    edges = np.unique((np.geomspace if wide else np.linspace)(low, high, 60).round())
    for name, count_L in counts.items():
        binned, _ = np.histogram(np.arange(len(count_L)), edges, weights=count_L)
        axes.stairs(binned, edges, label=name, fill=True, alpha=0.4)
    axes.axvline(row + 1, color="#222", linestyle="--", linewidth=1)
    axes.set(xlabel="ids", ylabel="documents", xscale="log" if wide else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
