"""Self-contained HTML pages: their frame, pictures and plots in them, and the evaluation's page.

H rows and W columns of pixels, C colours, K codes
"""

import base64
import html
import io
from collections.abc import Sequence

import matplotlib
import matplotlib.figure
import numpy as np
import PIL.Image

from tokenizer import tally

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em;
       color: #222; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .3em .8em; text-align: left; }
tr:nth-child(even) { background: #f6f6f6; } .said { color: #666; } .plot { max-width: 100%; }
th { white-space: nowrap; }
td.value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pairs { display: grid; gap: 10px; }
.pair { font-size: 12px; line-height: 1.35; min-width: 0; overflow-wrap: anywhere; }
.pair img { width: 100%; display: block; margin-bottom: 2px; }
.small img { image-rendering: pixelated; }
"""


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page of HTML parts; `style` is added to STYLE."""
    return f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>" \
           f"<style>{STYLE}{style}</style>{''.join(parts)}\n"  # fmt: skip


def image_uri(image_HWC: np.ndarray) -> str:
    """An 8-bit image as a PNG in a data URI."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image_HWC).save(buffer, "png")
    return _uri(buffer)


def plot(figure: matplotlib.figure.Figure, name: str) -> str:
    """A plot as an <img>; closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return f"<img class=plot alt='{html.escape(name)}' src='{_uri(buffer)}'>"


def _uri(buffer: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def evaluation(about: dict, results: dict[str, tally.Result], meaning: dict[str, str]) -> str:
    """The page of an evaluation: figures, what they mean, the use of the codes, pictures.

    `about` is evaluation.json, `results` has each source and size by name.
    """
    counts = {name: result.count_K for name, result in results.items()}
    tokenizer, fingerprint = html.escape(about["tokenizer"]), about["fingerprint"]
    parts = [
        f"<h1>Reconstruction</h1><p>Tokenizer <code>{tokenizer}</code>, {about['codebook_size']:,} "
        f"codes; sha256 of its weights <code>{fingerprint[:16]}</code></p>",
        "<h2>Figures</h2>", _figures(about["figures"], meaning),
        "<h2>Use of the codes</h2>", plot(ranks(counts), "use of the codes"),
        "<p class=said>How often each code was chosen, most frequent first; dashed: all codes "
        "alike.</p>",
    ]  # fmt: skip
    for name, result in results.items():
        parts.append(f"<h2>{name}</h2><p class=said>{html.escape(_origin(name, result.about))}</p>")
        for kind, cards in result.cards.items():
            parts.append(f"<h3>{kind.capitalize()} by PSNR</h3>" if kind != "random" else
                         "<h3>At random</h3>")  # fmt: skip
            parts.append(_pairs(cards))
    return page("Reconstruction", parts)


def _figures(figures: dict[str, dict[str, float]], meaning: dict[str, str]) -> str:
    rows = [f"<table><tr><th>figure{''.join(f'<th>{name}' for name in figures)}<th>what it means"]
    for name, text in meaning.items():
        if any(name in values for values in figures.values()):
            cells = (_number(values.get(name)) for values in figures.values())
            cells = "".join(f"<td class=value>{cell}" for cell in cells)
            rows.append(f"<tr><td><code>{name}</code>{cells}<td>{text}")
    return "".join(rows) + "</table>"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def ranks(counts: dict[str, np.ndarray]) -> matplotlib.figure.Figure:
    """Histograms of codes, sorted: the n-th most frequent code and how often it was chosen."""
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    for name, count_K in counts.items():
        sorted_K = np.sort(count_K)[::-1]
        used_k = sorted_K[sorted_K > 0]
        (line,) = axes.plot(np.arange(1, len(used_k) + 1), used_k, label=name)
        axes.axhline(count_K.mean(), color=line.get_color(), linestyle="--", linewidth=0.8)
    axes.set(xlabel="code, by frequency", ylabel="times chosen", yscale="log")
    axes.set_xlim(0, len(count_K) * 1.02)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _origin(name: str, about: dict) -> str:
    """What a source was, and what of a video is taken and shown, in a line."""
    source = dict(about["source"])
    place = source.pop("class").rpartition(":")[2]
    line = f"{place}: {', '.join(f'{key} {value}' for key, value in source.items())}"
    if name.startswith("videos"):
        line += f"; the first {about['frames']} frames at {about['fps']:g} a second, middle shown"
    return line


def _pairs(cards: list[tally.Card]) -> str:
    """Contact sheet: each real picture above what was made of it, with its figures."""
    shown = []
    for card in cards:
        values = "<br>".join(
            f"{name.removesuffix('_db')} {value:.4g}"
            for name, value in card.row.items() if name != "key"
        )  # fmt: skip
        pictures = "".join(
            f"<img alt={name} src='{image_uri(image_HWC)}'>"
            for name, image_HWC in (("real", card.real_HWC), ("made", card.made_HWC))
        )
        key = html.escape(card.row["key"])
        shown.append(f"<div class=pair>{pictures}<b>{key}</b><br>{values}</div>")
    small = " small" if cards and len(cards[0].real_HWC) < 128 else ""
    columns = f"grid-template-columns: repeat({max(4, min(8, len(cards)))}, 1fr)"
    return f"<div class='pairs{small}' style='{columns}'>{''.join(shown)}</div>"
