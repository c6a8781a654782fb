"""Tokens from the decoder: images and video under the grammar, with guidance, and text.

R request  B row of the model's batch: with the prompts, then without  T position  D width  V vocab
F token read at once  t latent frames, h rows, w columns of codes

Of an image only the codes are not known before. So the end of a row or a frame is no step of its
own, but read together with the code before it, the last ends are not computed at all, and a step
multiplies with the visual columns of the head alone.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emu3_jax import vocab as vocab_lib
from emu3_jax.cache import Cache
from emu3_jax.mesh import place, shards, spec, turned
from emu3_jax.sampling import Sampling, sample

BUCKET = 64  # prompts and drawn tokens take a multiple of room, so that few sizes are compiled for
WATCHED = 100  # times that somebody who watches is told of a whole image


@dataclasses.dataclass(frozen=True)
class Request:
    """An image or a video that is to be drawn, or gone on with.

    `prompt` ends with img, or with the EOF of the last of its `given` latent frames. `null` is
    guidance's other branch, which ends alike. `size` is (latent frames in all, rows, columns).
    Equal requests differ by their `copy`.
    """

    prompt: Sequence[int]
    null: Sequence[int]
    size: tuple[int, int, int]
    given: int = 0
    copy: int = 0


class Generator:
    """Draws from one model; compiles once per shape of work, so like batches are cheap.

    `params` lie on the current mesh (jax.set_mesh): rows are cut over data and fsdp, heads over
    tensor. `ids` are the controls of the vocabulary (`Vocab.ids`), `text_size` its number of text
    ids. `cache_dtype` "int8" halves the memory of keys and values; "" is the model's type.
    """

    def __init__(self, model, params, ids: vocab_lib.Ids, text_size: int, cache_dtype: str = ""):
        if shards("T") != [1]:
            raise ValueError("a row's tokens come one after the other: take a mesh of context=1")
        self._model, self._ids, self._text_size = model, ids, text_size
        self._cache_dtype = cache_dtype
        self._params = _made(model.apart, params)
        self._visual_CD = _made(self._visual, self._params["head"])
        self._programs = functools.cache(self._programs)

    def codes(
        self, requests: Sequence[Request], sampling: Sampling, watch: Callable | None = None
    ) -> list[np.ndarray]:
        """The latent frames of each request that are not given -> int32 codes_thw.

        Sizes and prompts' lengths may differ. `watch(drawn_RT, steps)` is told now and then of the
        codes [requests, so far] and of how many there will be at most. Raises ValueError if a
        request does not end as it must.
        """
        work = self._work(requests, sampling)
        drawn_RT = self._run(work, watch)
        counts_R = work.grid.end_R - work.grid.begin_R
        return [row_T[:count].reshape(-1, *r.size[1:])
                for r, row_T, count in zip(requests, drawn_RT, counts_R, strict=False)]

    def text(
        self, prompts: Sequence[Sequence[int]], length: int, sampling: Sampling,
        copies: Sequence[int] = (), watch: Callable | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """At most `length` text ids after each prompt, up to EOS (which is left out).

        Guidance has no part in it. `watch` is told as in `codes`.
        """
        asked = len(prompts)
        prompts = _filled(prompts)
        copies = _filled(list(copies) or [0] * len(prompts))
        sampling = dataclasses.replace(sampling, guidance=1.0)
        grid = Grid.of_text(len(prompts), length)
        work = _Work(prompts, copies, grid, length, length, sampling, dict(wide=1, text=True))
        return [[int(i) for i in row_T[: _index(row_T, self._ids.eos)]]
                for row_T in self._run(work, watch)[:asked]]

    def lowered(self, requests: Sequence[Request], sampling: Sampling) -> jax.stages.Lowered:
        """The loop that draws these, to be compiled ahead of time: the weights may be abstract."""
        work = self._work(requests, sampling)
        length = -(-max(map(len, work.prompts)) // BUCKET) * BUCKET
        int_BT = jax.ShapeDtypeStruct((len(work.prompts), length), jnp.int32,
                                      sharding=spec("BT"))  # fmt: skip
        seeds_R = jax.ShapeDtypeStruct((len(work.copies),), jnp.uint32)
        key = jax.eval_shape(jax.random.key, 0)
        begin, advance = self._steps(work)
        state = jax.eval_shape(begin, self._params, self._visual_CD, [int_BT] * 3, seeds_R,
                               np.array(work.copies), key)  # fmt: skip
        return advance.lower(self._params, self._visual_CD, state, work.grid, work.steps)

    def _work(self, requests: Sequence[Request], sampling: Sampling) -> "_Work":
        for request in requests:
            name = "EOF" if request.given else "img"
            want = self._ids.eof if request.given else self._ids.img
            for branch in (request.prompt, request.null):
                if branch[-1] != want:
                    raise ValueError(f"a prompt ends with id {branch[-1]}, not with {name} {want}")
            if request.given >= request.size[0]:
                raise ValueError(f"all {request.size[0]} latent frames of a video are given")
        rows = _filled(requests)
        grid, wide = Grid.of(rows), 3 if max(r.size[0] for r in rows) > 1 else 2
        steps = int((grid.end_R - grid.begin_R).max())
        pieces = 1 + int(grid.ends(np.arange(1, steps)[:, None])[0].any(axis=1).sum())
        prompts = [r.prompt for r in rows]
        if sampling.guidance != 1:
            prompts += [r.null for r in rows]
        return _Work(prompts, [r.copy for r in rows], grid, steps, steps + (wide - 1) * pieces,
                     sampling, dict(wide=wide, text=False))  # fmt: skip

    def _run(self, work: "_Work", watch: Callable | None) -> np.ndarray:
        """Prefill, then pieces of the loop, between which somebody may watch -> drawn_RT.

        A piece of an image goes on to the end of a row.
        """
        work.sampling.check()
        begin, advance = self._steps(work)
        prompt, seeds_R = self._padded(work.prompts, len(work.copies))
        state = begin(self._params, self._visual_CD, prompt, seeds_R, np.array(work.copies),
                      jax.random.key(work.sampling.seed))  # fmt: skip
        told, every = 0, -(-work.steps // WATCHED) if watch else work.steps
        for until in range(every, work.steps + every, every):
            until = min(until, work.steps)
            state = advance(self._params, self._visual_CD, state, work.grid, until)
            if watch and (done := min(int(state.index), work.steps)) > told:
                told = done
                watch(np.asarray(state.drawn_RT)[:, :done], work.steps)
        return np.asarray(state.drawn_RT)[:, : work.steps]

    def _steps(self, work: "_Work") -> tuple:
        """The two programs, with all that is fixed when they are compiled."""
        sampling = dataclasses.replace(work.sampling, seed=0)  # which comes as a key
        room, slots = (-(-count // BUCKET) * BUCKET for count in (work.steps, work.slots))
        return self._programs(sampling, room, slots, **work.how)

    def _programs(self, sampling: Sampling, room: int, slots: int, wide: int, text: bool) -> tuple:
        begin = functools.partial(self._begin, room=room, slots=slots, text=text, sampling=sampling)
        advance = functools.partial(self._advance, wide=wide, text=text, sampling=sampling)
        return jax.jit(begin), jax.jit(advance, donate_argnums=2)

    def _padded(self, prompts, requests: int) -> tuple:
        """(tokens, segments, positions of the prompts [B, T]) and seeds_R of the first ones."""
        longest = -(-max(map(len, prompts)) // BUCKET) * BUCKET
        tokens_BT = np.full((len(prompts), longest), self._ids.pad, np.int32)
        segments_BT = np.zeros_like(tokens_BT)
        for row, prompt in enumerate(prompts):  # padding in front: all rows go on at one index
            tokens_BT[row, longest - len(prompt) :] = prompt
            segments_BT[row, longest - len(prompt) :] = 1
        positions_BT = np.maximum(np.cumsum(segments_BT, axis=1) - 1, 0).astype(np.int32)
        arrays = tokens_BT, segments_BT, positions_BT
        seeds_R = np.array([seed_of(prompt) for prompt in prompts[:requests]], np.uint32)
        return [place(jnp.asarray(x), "BT") for x in arrays], seeds_R

    def _visual(self, head_VD):
        """The columns of codes, filled up to what the mesh splits."""
        first, fill = self._ids.visual, -self._ids.codes % shards("V")[0]
        columns_CD = place(head_VD, ".D")[first : first + self._ids.codes]
        return place(jnp.pad(columns_CD, ((0, fill), (0, 0))), "VD")

    def _begin(
        self, params, visual_CD, prompt, seeds_R, copies_R, key, room, slots, text, sampling
    ):
        """The state after the prompts and the first token of each; runs under jit."""
        B, T = prompt[0].shape
        cache = self._model.empty_cache(B, T + slots, self._cache_dtype)
        x_BTD, cache = self._model.read(params, *prompt, cache, first=True)
        fold = jax.vmap(jax.random.fold_in)
        keys_R = fold(fold(jnp.broadcast_to(key, seeds_R.shape), seeds_R), copies_R)
        drawn_RT = jnp.zeros((len(seeds_R), room), jnp.int32)
        start_B = place(prompt[2][:, -1], "B") + 1
        state = State(cache, keys_R, start_B, drawn_RT, jnp.int32(0))
        return self._draw(params, visual_CD, state, x_BTD, text, sampling)

    def _advance(self, params, visual_CD, state, grid, until, wide, text, sampling):
        """Draws until each request has `until` tokens, or all have ended; runs under jit.

        Where an end stands before the next code, a step is `wide`. It begins a loop of the others,
        up to the next end: a condition would have XLA copy the whole cache at each step.
        """

        def step(count, state):
            x_BFD, cache = self._model.read(params, *self._next(state, grid, count, text),
                                            state.cache)  # fmt: skip
            state = state._replace(cache=cache)
            return self._draw(params, visual_CD, state, x_BFD[:, -1:], text, sampling)

        narrow, last = functools.partial(step, 1), (grid.end_R - grid.begin_R).max()

        def going(state):
            ended = (state.drawn_RT == self._ids.eos).any(axis=1).all() if text else False
            return (state.index < until) & ~jnp.bool_(ended)

        def within_row(state):
            return (state.index < last) & ~grid.ends(state.index)[0].any()

        def row(state):
            return jax.lax.while_loop(within_row, narrow, step(wide, state))

        return jax.lax.while_loop(going, narrow if wide == 1 else row, state)

    def _next(self, state, grid, count: int, text: bool) -> list[jax.Array]:
        """What is read before the next token: tokens, segments and positions [B, F].

        The token before and, of a code, the ends that follow it; padding in front.
        """
        last_R = jax.lax.dynamic_index_in_dim(state.drawn_RT, state.index - 1, 1, keepdims=False)
        row_R, frame_R = grid.ends(state.index)
        behind_F = jnp.arange(count)[::-1]  # tokens that come after this one
        which_RF = (row_R.astype(jnp.int32) + frame_R)[:, None] - behind_F
        last_R = last_R if text else last_R + self._ids.visual
        token_RF = jnp.select(
            [which_RF == 0, which_RF == 1, which_RF == 2],
            [last_R[:, None], self._ids.eol, self._ids.eof], self._ids.pad,
        )  # fmt: skip
        at_RF = grid.offset(state.index)[:, None] - 1 - behind_F
        branches = len(state.start_B) // len(last_R)
        tokens_BF, segments_BF, at_BF = (
            place(jnp.tile(x_RF, (branches, 1)), "BT")
            for x_RF in (token_RF, (which_RF >= 0).astype(jnp.int32), at_RF)
        )
        return tokens_BF, segments_BF, at_BF + state.start_B[:, None]

    def _draw(self, params, visual_CD, state, x_BTD, text: bool, sampling):
        """The state with one token more of each request, from the hidden states before it."""
        logits_BV = self._logits(params["head"] if text else visual_CD, x_BTD[:, -1:])[:, 0]
        id_V = jnp.arange(logits_BV.shape[-1])
        if text:
            legal_V = (id_V < self._text_size) | (id_V == self._ids.eos)
        else:
            logits_BV, legal_V = logits_BV[:, : self._ids.codes], True
        keys_R = jax.vmap(jax.random.fold_in, (0, None))(state.keys_R, state.index)
        token_R = sample(logits_BV, legal_V, keys_R, sampling)
        drawn_RT = jax.lax.dynamic_update_index_in_dim(
            state.drawn_RT, token_R.astype(jnp.int32), state.index, 1
        )
        return state._replace(drawn_RT=drawn_RT, index=state.index + 1)

    def _logits(self, head_VD, x_BTD) -> jax.Array:
        logits_BTV = turned("BTD,DV->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)
        return place(logits_BTV, "...")


class _Work(NamedTuple):
    """What is to be drawn: prompts of both branches, tokens of each request, slots of the cache."""

    prompts: list
    copies: list[int]
    grid: "Grid"
    steps: int
    slots: int
    sampling: Sampling
    how: dict


class State(NamedTuple):
    """What a loop carries: the keys of each request, the length of each row's prompt, and `index`
    tokens (codes without `ids.visual`, or ids of text) of each request in `drawn_RT`."""

    cache: Cache
    keys_R: jax.Array
    start_B: jax.Array
    drawn_RT: jax.Array
    index: jax.Array


class Grid(NamedTuple):
    """Where each request's codes stand: h rows of w columns, codes `begin` to `end` of the whole.

    Text is a row that does not end.
    """

    h_R: np.ndarray
    w_R: np.ndarray
    begin_R: np.ndarray
    end_R: np.ndarray

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Grid":
        """The grids of what is to be drawn."""
        t_R, h_R, w_R = np.array([request.size for request in requests], np.int32).T
        given_R = np.array([request.given for request in requests], np.int32)
        return cls(h_R, w_R, given_R * h_R * w_R, t_R * h_R * w_R)

    @classmethod
    def of_text(cls, requests: int, length: int) -> "Grid":
        """The grids of texts."""
        one_R = np.ones(requests, np.int32)
        return cls(one_R, one_R << 30, one_R, one_R + length)

    def ends(self, index) -> tuple:
        """Whether a row and whether a frame ends before the code drawn as `index`: bools_R."""
        at_R = self.begin_R + index
        drawn_R = at_R < self.end_R
        return drawn_R & (at_R % self.w_R == 0), drawn_R & (at_R % (self.h_R * self.w_R) == 0)

    def offset(self, index):
        """Tokens from the prompt's end to the code drawn as `index`, ends of rows included."""

        def tokens(at_R):
            return at_R + at_R // self.w_R + at_R // (self.h_R * self.w_R)

        return tokens(self.begin_R + index) - tokens(self.begin_R)


def _filled(rows: Sequence) -> list:
    """As many rows as the mesh splits, the last of them repeated."""
    return [*rows, *rows[-1:] * (-len(rows) % shards("B")[0])]


def _made(function, *args):
    """What a function makes of arrays; of abstract ones, the abstract result."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(args)):
        return jax.eval_shape(function, *args)
    return jax.jit(function)(*args)


def seed_of(prompt: Sequence[int]) -> int:
    """A number of 32 bits that stands for the prompt."""
    return zlib.crc32(np.array(prompt, np.int64).tobytes())


def _index(row, token) -> int:
    """Where `token` first stands in `row`, or its length."""
    (found,) = np.nonzero(row == token)
    return int(found[0]) if len(found) else len(row)
