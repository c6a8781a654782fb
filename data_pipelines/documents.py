"""Stored documents become ids and loss weights, in Emu3's layouts, many at once.

    caption_first   BOS caption boi "h*w" img rows EOF eoi EOS     text to image (or video)
    caption_last    BOS boi "h*w" img rows EOF eoi caption EOS     image to text, in pretraining
    caption_either  one or the other, drawn anew each epoch
    text            BOS text EOS                                   nothing but the text
    chat            BOS head [boi ... eoi] question answer EOS [question answer EOS ...]

A weight belongs to the id it is a target for, by role:

    text      caption, text or answer, and the EOS behind it
    prompt    head and questions of a conversation
    meta      boi, the ids of "h*w", img, eoi
    codes     visual codes
    breaks    EOL after each row and EOF after each frame

The paper weighs vision 0.5 and text 1.0 in pretraining (section 2.4) without saying where the
controls belong. Here what lies between img and eoi is vision, so codes and breaks weigh 0.5 and
all else 1.0. Emu3's released fine-tuning script gives loss to codes alone (`Weights.generation`),
its understanding stages to answers (`Weights.understanding`). BOS is never a target, nor is EOS
where the caption was left out, or cut while it stands last: it would teach to say nothing.

Legend: D ids of one document, E of many end to end, M documents or pieces of such, N all of a
store's, S its shapes, K ids of an image block, P pieces of conversations.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from data_pipelines import store
from emu3_jax import vocab as vocabulary

CAPTIONS = ("caption_first", "caption_last", "caption_either")
LAYOUTS = (*CAPTIONS, "text", "chat")


@dataclasses.dataclass
class Weights:
    """Loss weights of target ids by role; the defaults are pretraining's."""

    text: float = 1.0
    prompt: float = 1.0
    meta: float = 1.0
    codes: float = 0.5
    breaks: float = 0.5

    @classmethod
    def generation(cls) -> "Weights":
        """Tuning for generation: visual codes alone, as in Emu3's released script."""
        return cls(text=0.0, prompt=0.0, meta=0.0, codes=1.0, breaks=0.0)

    @classmethod
    def understanding(cls) -> "Weights":
        """Tuning for understanding: answers and captions alone."""
        return cls(text=1.0, prompt=0.0, meta=0.0, codes=0.0, breaks=0.0)


@dataclasses.dataclass
class Layout:
    """How documents of a store are written; `name` is one of LAYOUTS.

    `caption_dropout` is the share of documents whose caption is left out (BOS stays) where it
    stands first, for classifier-free guidance; `last_share`, of caption_either, the share whose
    caption stands last. Which ones, is a function of seed, document and epoch.
    """

    name: str = "caption_first"
    caption_dropout: float = 0.0
    last_share: float = 0.5
    weights: Weights = dataclasses.field(default_factory=Weights)

    def check(self) -> None:
        """Raises ValueError for a layout that cannot be."""
        if self.name not in LAYOUTS:
            raise ValueError(f"layout {self.name!r} is none of {', '.join(LAYOUTS)}")
        for name in ("caption_dropout", "last_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is no share; take 0 to 1")
        if self.caption_dropout and self.name not in ("caption_first", "caption_either"):
            raise ValueError(
                f"caption_dropout {self.caption_dropout} with layout {self.name!r}; "
                "only caption_first and caption_either can drop it"
            )

    @property
    def last(self) -> float:
        """The share of documents whose caption stands last."""
        return dict(caption_last=1.0, caption_either=self.last_share).get(self.name, 0.0)


class Writer:
    """Documents of a store in a layout, as ids.

    lengths_N   how many ids each has, BOS to EOS, by index or slice: known without reading any
    """

    def __init__(self, opened: store.Store, layout: Layout, vocab: vocabulary.Vocab):
        """Raises ValueError if the store holds documents that the layout cannot write."""
        _check_kinds(opened, layout)
        self._store, self._layout, self._vocab = opened, layout, vocab
        self._block_S = np.array(
            [len(_template(vocab, layout.weights, tuple(s))[0]) for s in opened.shapes]
        )
        self.lengths_N = _Lengths(opened, layout, self._block_S)

    def start(
        self, index_M: np.ndarray, last_M: np.ndarray, begin_M: np.ndarray, count_M: np.ndarray
    ) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        """Begins to read documents; the result waits for them, end to end.

        Of each come ids begin to begin + count (so one more than `count`), int32, and the float32
        weight of each id as a target. `last_M` says whose caption stands behind the image. Where
        `count` is less than the whole of a document with an image, its caption is cut to that.
        Raises (when waited for) store.StoreError for a damaged part.
        """
        opened, text_M = self._store, self._store.text_length_N[index_M].astype(np.int64)
        shape_M = opened.shape_N[index_M]
        low_M, high_M = np.zeros_like(text_M), text_M
        if self._layout.name == "text":
            low_M, high_M = np.maximum(begin_M - 1, 0), np.minimum(begin_M + count_M, text_M)
        elif self._layout.name in CAPTIONS:
            high_M = count_M - 1 - self._block_S[shape_M]
        areas_M = opened.lengths("codes")(index_M)
        waits = [opened.start_read("text", index_M, low_M, high_M)]
        waits += [opened.start_read("codes", index_M, np.zeros_like(areas_M), areas_M)]
        if self._layout.name == "chat":
            turns_M = opened.turn_count_N[index_M].astype(np.int64)
            waits += [opened.start_read("turns", index_M, np.zeros_like(turns_M), turns_M)]

        def wait() -> tuple[np.ndarray, np.ndarray]:
            read = [one() for one in waits]
            pieces = Pieces(shape_M, text_M, low_M, high_M, last_M, begin_M, count_M, *read[:2])
            if self._layout.name == "chat":
                pieces.turn_count_M, pieces.turns_P = turns_M, read[2].astype(np.int64)
            return write(pieces, opened.shapes, self._layout, self._vocab)

        return wait


def build(
    document: store.Document, layout: Layout, vocab: vocabulary.Vocab,
    drop_caption: bool = False, last: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The int32 ids of one document from BOS to EOS, and each id's float32 weight as a target.

    `last` says where its caption stands, if the layout does not. Raises ValueError for a document
    that the layout cannot write.
    """
    codes_thw = document.codes_thw
    shape = (*codes_thw.shape, document.fps) if codes_thw is not None else (0, 0, 0, 0.0)
    kind = "chat" if document.turns is not None else "text" if codes_thw is None else "caption"
    if not layout.name.startswith(kind):
        raise ValueError(f"{document.key}: layout {layout.name!r} cannot write this {kind}")
    text = len(document.text)
    used = 0 if drop_caption else text
    answers = 0 if document.turns is None else (len(document.turns) - 1) // 2 - 1
    count = 1 + used + len(_template(vocab, layout.weights, shape)[0]) + answers
    one = [np.array([n]) for n in (0, text, 0, used)]
    behind = layout.last == 1.0 if last is None else last
    codes_E = np.zeros(0, np.uint16) if codes_thw is None else codes_thw.ravel()
    pieces = Pieces(
        *one, np.array([behind]), np.array([0]), np.array([count]), document.text[:used], codes_E
    )
    if document.turns is not None:
        pieces.turns_P = np.asarray(document.turns, np.int64)
        pieces.turn_count_M = np.array([len(document.turns)])
    return write(pieces, [shape], layout, vocab)


@dataclasses.dataclass
class Pieces:
    """What was read of documents, or of pieces of texts.

    shape_M, text_length_M   of the whole document, as stored
    low_M, high_M            which of its text ids are in text_E
    last_M                   whether its caption stands behind the image
    begin_M, count_M         ids begin to begin + count are wanted
    text_E, codes_E          text ids and codes, end to end
    turn_count_M, turns_P    pieces of conversations, and their lengths end to end
    """

    shape_M: np.ndarray
    text_length_M: np.ndarray
    low_M: np.ndarray
    high_M: np.ndarray
    last_M: np.ndarray
    begin_M: np.ndarray
    count_M: np.ndarray
    text_E: np.ndarray
    codes_E: np.ndarray
    turn_count_M: np.ndarray | None = None
    turns_P: np.ndarray | None = None


def write(
    pieces: Pieces, shapes: list, layout: Layout, vocab: vocabulary.Vocab
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all pieces end to end, count + 1 each, and their weights as targets."""
    length_M = pieces.count_M + 1
    end_M = np.cumsum(length_M)
    start_M = end_M - length_M
    ids_E, weights_E = np.zeros(end_M[-1], np.int32), np.zeros(end_M[-1], np.float32)
    weights, used_M = layout.weights, pieces.high_M - pieces.low_M
    # A store may have thousands of shapes, a batch has few of them.
    numbers, shape_M = np.unique(pieces.shape_M, return_inverse=True)
    templates = [_template(vocab, weights, tuple(shapes[number])) for number in numbers]
    block_M = np.array([len(ids_K) for ids_K, _, _ in templates])[shape_M]

    if layout.name == "chat":
        text_at_P, block_at_M, weight_P, eos_E = _conversations(pieces, start_M, block_M, weights)
        run_P = pieces.turns_P
        eos_weight_E = np.full(len(eos_E), weights.text)
    else:
        behind_M = np.where(pieces.last_M, 1 + block_M, 1)
        within_M = pieces.low_M + 1 - pieces.begin_M if layout.name == "text" else behind_M
        text_at_P, run_P = start_M + within_M, used_M
        weight_P = np.full(len(used_M), weights.text)
        block_at_M = start_M + np.where(pieces.last_M, 1, 1 + used_M)
        ends_M = np.ones(len(used_M), bool)
        taught_M = used_M == pieces.text_length_M
        taught_M |= (used_M > 0) & ~pieces.last_M
        taught_M &= pieces.text_length_M > 0
        if layout.name == "text":
            ends_M = pieces.begin_M + pieces.count_M == pieces.text_length_M + 1
            taught_M = ends_M
        eos_E = end_M[ends_M] - 1
        eos_weight_E = np.where(taught_M, weights.text, 0.0)[ends_M]
    text_at_E = np.repeat(text_at_P - (np.cumsum(run_P) - run_P), run_P) + np.arange(run_P.sum())
    ids_E[text_at_E], weights_E[text_at_E] = pieces.text_E, np.repeat(weight_P, run_P)
    ids_E[eos_E], weights_E[eos_E] = vocab.eos, eos_weight_E
    first_E = start_M[pieces.begin_M == 0]
    ids_E[first_E], weights_E[first_E] = vocab.bos, 0.0
    _write_blocks(pieces.codes_E, shape_M, templates, block_at_M, vocab.visual, ids_E, weights_E)
    return ids_E, weights_E


def _conversations(pieces: Pieces, start_M, block_M, weights: Weights) -> tuple:
    """Where each piece's text begins, where each image, the weight of each piece, and all EOS."""
    count_M, turns_P = pieces.turn_count_M, pieces.turns_P
    first_M = np.cumsum(count_M) - count_M
    number_P = np.arange(len(turns_P)) - np.repeat(first_M, count_M)
    before_P = np.cumsum(turns_P) - turns_P
    before_P -= np.repeat(before_P[first_M], count_M)
    answers_P = np.maximum(number_P - 1, 0) // 2
    block_P = np.where(number_P > 0, np.repeat(block_M, count_M), 0)
    at_P = np.repeat(start_M, count_M) + 1 + before_P + block_P + answers_P
    is_answer_P = (number_P > 0) & (number_P % 2 == 0)
    weight_P = np.where(is_answer_P, weights.text, weights.prompt)
    return at_P, start_M + 1 + turns_P[first_M], weight_P, (at_P + turns_P)[is_answer_P]


def _write_blocks(
    codes_E: np.ndarray, shape_M: np.ndarray, templates: list, at_M: np.ndarray, visual: int,
    ids_E: np.ndarray, weights_E: np.ndarray,
) -> None:
    areas_S = np.array([len(places) for _, _, places in templates])
    codes_end_M = np.cumsum(areas_S[shape_M])
    for number, (ids_K, weights_K, places) in enumerate(templates):
        if not len(ids_K):
            continue
        for m in np.flatnonzero(shape_M == number):
            block_K = ids_E[at_M[m] : at_M[m] + len(ids_K)]
            block_K[:] = ids_K
            codes = codes_E[codes_end_M[m] - len(places) : codes_end_M[m]]
            block_K[places] = codes.astype(np.int32) + visual
            weights_E[at_M[m] : at_M[m] + len(ids_K)] = weights_K


class _Lengths:
    """How many ids each document of a store has; nothing of 100 million is held."""

    def __init__(self, opened: store.Store, layout: Layout, block_S: np.ndarray):
        self._store, self._chat = opened, layout.name == "chat"
        self._more_S = block_S + (1 if self._chat else 2)

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        opened = self._store
        lengths = opened.text_length_N[index] + self._more_S[opened.shape_N[index]]
        return lengths + (opened.turn_count_N[index] - 1) // 2 if self._chat else lengths


def _check_kinds(opened: store.Store, layout: Layout) -> None:
    """Raises ValueError if the store holds documents that the layout cannot write."""
    where, name = f"store {opened.directory}", layout.name
    talks = opened.info["conversations"]
    if name == "chat":
        if talks < len(opened):
            raise ValueError(f"{where} has {len(opened) - talks} documents that are no "
                             "conversations; layout 'chat' is for those")  # fmt: skip
        return
    if talks:
        raise ValueError(f"{where} has {talks} conversations; take layout 'chat' for them")
    texts = sum(int(n) for (t, *_), n in zip(opened.shapes, opened.counts_S, strict=True) if not t)
    if name == "text" and texts < len(opened):
        raise ValueError(f"{where} has images or videos; layout 'text' is for text alone")
    if name != "text" and texts:
        raise ValueError(f"{where} has {texts} texts without image; take layout 'text' for them")


def _template(vocab: vocabulary.Vocab, weights: Weights, shape: tuple) -> tuple:
    """(ids_K, weights_K, where its codes go) of an image or video block; none for text."""
    return _cached_template(vocab, dataclasses.astuple(weights), shape)


@functools.lru_cache(maxsize=1 << 10)
def _cached_template(vocab: vocabulary.Vocab, weights: tuple, shape: tuple) -> tuple:
    t, h, w, fps = shape
    weights = Weights(*weights)
    if not t:
        return np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64)
    zeros_thw = np.zeros((int(t), int(h), int(w)), np.int32)
    ids_K = vocab.video_block(zeros_thw, fps) if fps else vocab.image_block(zeros_thw[0])
    weights_K = np.where(ids_K >= vocab.visual, weights.codes, weights.meta).astype(np.float32)
    weights_K[(ids_K == vocab.eol) | (ids_K == vocab.eof)] = weights.breaks
    return ids_K, weights_K, np.flatnonzero(ids_K >= vocab.visual)
