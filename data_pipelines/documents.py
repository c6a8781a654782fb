"""A stored document becomes ids and loss weights, in Emu3's layouts.

    caption_first   BOS caption boi "h*w" img rows EOF eoi EOS     text to image (or video)
    caption_last    BOS boi "h*w" img rows EOF eoi caption EOS     image to text, as in
    pretraining text            BOS text EOS                                   nothing but the
    text

A weight belongs to the id it is a target for, by role:

    text      caption or text, and EOS
    meta      boi, the ids of "h*w", img, eoi
    codes     visual codes
    breaks    EOL after each row and EOF after each frame

The paper weighs vision 0.5 and text 1.0 in pretraining (section 2.4) without saying where the
controls belong. Here what lies between img and eoi is vision, so codes and breaks weigh 0.5 and
all else 1.0. Emu3's released fine-tuning script gives loss to codes alone: Weights(text=0,
meta=0, codes=1, breaks=0). BOS is never a target, nor is EOS where the caption was dropped.

Legend: D ids of one document, N documents, 3 = (t, h, w).
"""

import dataclasses

import numpy as np

from data_pipelines import store
from emu3_jax import vocab as vocabulary

LAYOUTS = ("caption_first", "caption_last", "text")


@dataclasses.dataclass
class Weights:
    """Loss weights of target ids by role; the defaults are pretraining's."""

    text: float = 1.0
    meta: float = 1.0
    codes: float = 0.5
    breaks: float = 0.5


@dataclasses.dataclass
class Layout:
    """How documents of a store are written; `name` is one of LAYOUTS.

    `caption_dropout` is the share of documents whose caption is left out (BOS stays), for
    classifier-free guidance; which ones, is drawn anew each epoch.
    """

    name: str = "caption_first"
    caption_dropout: float = 0.0
    weights: Weights = dataclasses.field(default_factory=Weights)

    def check(self) -> None:
        """Raises ValueError for a layout that cannot be."""
        if self.name not in LAYOUTS:
            raise ValueError(f"layout {self.name!r} is none of {', '.join(LAYOUTS)}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout {self.caption_dropout} is no share; take 0 to 1")
        if self.caption_dropout and self.name != "caption_first":
            raise ValueError(
                f"caption_dropout {self.caption_dropout} with layout {self.name!r}; "
                "only caption_first can drop it"
            )


def build(
    document: store.Document, layout: Layout, vocab: vocabulary.Vocab, drop_caption: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The int32 ids of a document from BOS to EOS, and each id's float32 weight as a target.

    Raises ValueError for an image or video with the layout "text" and for a text with another
    one.
    """
    weights = layout.weights
    text_D = np.zeros(0, np.int32) if drop_caption else document.text.astype(np.int32)
    text = (text_D, np.full(len(text_D), weights.text, np.float32))
    block = _block(document, weights, vocab)
    first, last = _ends(vocab, weights)
    if drop_caption:
        # Without its caption the document begins like caption_last: EOS would teach to say nothing.
        last = last[0], np.zeros(1, np.float32)
    middle = {
        "caption_first": [text, block],
        "caption_last": [block, text],
        "text": [text],
    }[layout.name]
    ids, weight = zip(first, *middle, last, strict=True)
    return np.concatenate(ids), np.concatenate(weight)


def lengths(opened: store.Store, layout: Layout, vocab: vocabulary.Vocab) -> np.ndarray:
    """How many ids `build` gives each document with its caption, int64 [N], without reading any.

    Raises ValueError if the store holds documents that the layout cannot write.
    """
    texts = int((opened.kind_N == store.TEXT).sum())
    if layout.name == "text" and texts < len(opened):
        raise ValueError(
            f"store {opened.directory} has images or videos; layout 'text' is for text alone"
        )
    if layout.name != "text" and texts:
        raise ValueError(
            f"store {opened.directory} has {texts} texts without image; take layout 'text' for them"
        )
    if layout.name == "text":
        return opened.text_length_N + 2
    shapes, which_N = np.unique(
        np.concatenate([opened.grid_N3, opened.fps_N[:, None]], axis=1), axis=0, return_inverse=True
    )
    blocks = [
        len(_ids(vocab, np.zeros((int(t), int(h), int(w)), np.int32), float(f)))
        for t, h, w, f in shapes
    ]
    return opened.text_length_N + 2 + np.array(blocks)[which_N.reshape(-1)]


def _ids(vocab: vocabulary.Vocab, codes_thw: np.ndarray, fps: float) -> np.ndarray:
    return vocab.video_block(codes_thw, fps) if fps else vocab.image_block(codes_thw[0])


def _block(document: store.Document, weights: Weights, vocab: vocabulary.Vocab) -> tuple:
    if document.codes_thw is None:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    ids_D = _ids(vocab, document.codes_thw, document.fps)
    weight_D = np.where(ids_D >= vocab.visual, weights.codes, weights.meta).astype(np.float32)
    weight_D[(ids_D == vocab.eol) | (ids_D == vocab.eof)] = weights.breaks
    return ids_D, weight_D


def _ends(vocab: vocabulary.Vocab, weights: Weights) -> list[tuple]:
    pairs = ((vocab.bos, 0.0), (vocab.eos, weights.text))
    return [(np.array([i], np.int32), np.array([w], np.float32)) for i, w in pairs]
