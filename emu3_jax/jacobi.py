"""Several codes of an image at once, without another model and with the same distribution.

A window of guesses behind the last token is read in one pass. From its start, each guess x, drawn
from q, is kept with probability min(1, p(x) / q(x)), where p is what the pass says of it; the first
that is not is drawn anew from max(p - q, 0), and what stands behind it is guessed anew from its own
p. So every pass decides one token or more. This is speculative sampling (arXiv 2302.01318) whose
guesses are those of the pass before, a Jacobi iteration (arXiv 2410.01699). A code that nothing has
been said of yet is guessed to be the one above it.

R request  B row of the model's batch  W token of the window  D width  V vocab  C code
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emu3_jax import generate
from emu3_jax.cache import Cache
from emu3_jax.mesh import place
from emu3_jax.sampling import scores


class Guessing(NamedTuple):
    """What the loop carries: `done` tokens behind the prompt are decided, the last one is `last_R`.

    Of the next ones `guess_RW` are guessed, codes or ends, from q_RWC. `passes` counts.
    """

    cache: Cache
    keys_R: jax.Array
    start_B: jax.Array
    drawn_RT: jax.Array
    index: jax.Array  # codes that are decided
    done: jax.Array
    last_R: jax.Array
    guess_RW: jax.Array
    q_RWC: jax.Array
    passes: jax.Array


class Speculative(generate.Generator):
    """A Generator whose images come in passes over `window` tokens; all of a call are of one size.

    Text is drawn as ever. `passes` and `tokens` are those of the last call: their ratio is what a
    pass decides. All requests of a batch go at the pace of the slowest.
    """

    def __init__(self, *args, window: int = 16, **kwargs):
        super().__init__(*args, **kwargs)
        if window < 2:
            raise ValueError(f"window = {window}: want 2 or more tokens")
        self.window, self.passes, self.tokens = window, 0, 0

    def _work(self, requests, sampling):
        if len({(request.size, request.given) for request in requests}) > 1:
            raise ValueError("images of several sizes cannot be guessed together")
        work = super()._work(requests, sampling)
        return work._replace(slots=_tokens_before(work.grid, work.steps) + self.window)

    def _steps(self, work):
        begin, advance = super()._steps(work)

        def counted(*args):
            state = advance(*args)
            if not work.how["text"]:
                self.passes, self.tokens = int(state.passes), int(state.done)
            return state

        return begin, counted

    def _draw(self, params, visual_CD, state, x_BTD, text, sampling):
        state = super()._draw(params, visual_CD, state, x_BTD, text, sampling)
        if text:
            return state
        first_R = state.drawn_RT[:, 0]
        guess_RW = jnp.tile(first_R[:, None], (1, self.window))
        return Guessing(
            *state, done=jnp.int32(1), last_R=first_R + self._ids.visual, guess_RW=guess_RW,
            q_RWC=jax.nn.one_hot(guess_RW, self._ids.codes), passes=jnp.int32(0),
        )  # fmt: skip

    def _advance(self, params, visual_CD, state, grid, until, wide, text, sampling):
        if text:
            return super()._advance(params, visual_CD, state, grid, until, wide, text, sampling)

        def step(state):
            return self._pass(params, visual_CD, state, grid, sampling)

        return jax.lax.while_loop(lambda state: state.index < until, step, state)

    def _pass(self, params, visual_CD, state, grid, sampling) -> Guessing:
        """Reads the window, decides what it can and guesses what follows."""
        index_W, ahead_W = jnp.arange(self.window), state.done + jnp.arange(self.window)
        end_W, code_W = _places(grid, ahead_W)  # the id of an end or 0, the number of a code
        end_W = jnp.select([end_W == 1, end_W == 2], [self._ids.eol, self._ids.eof], 0)
        ids_RW = jnp.where(end_W > 0, end_W, state.guess_RW + self._ids.visual)
        read_RW = jnp.concatenate([state.last_R[:, None], ids_RW[:, :-1]], axis=1)
        branches = len(state.start_B) // len(state.keys_R)
        tokens_BW = place(jnp.tile(read_RW, (branches, 1)), "BT")
        at_BW = state.start_B[:, None] + ahead_W - 1
        before = state.cache.length
        x_BWD, cache = self._model.read(params, tokens_BW, jnp.ones_like(tokens_BW), at_BW,
                                        state.cache)  # fmt: skip
        logits_BWC = self._logits(visual_CD, x_BWD)[..., : self._ids.codes]
        scores_RWC = jax.vmap(
            lambda logits_BC: scores(logits_BC, True, len(state.keys_R), sampling), 1, 1
        )(logits_BWC)
        p_RWC = jax.nn.softmax(scores_RWC)

        keys_R = jax.vmap(jax.random.fold_in, (0, None))(state.keys_R, state.passes + 1)
        keep_R, anew_R, guess_R = jax.vmap(lambda key: tuple(jax.random.split(key, 3)))(keys_R)
        chance_RW = jax.vmap(lambda key: jax.random.uniform(key, (self.window,)))(keep_R)
        p_RW, q_RW = (jnp.take_along_axis(x_RWC, state.guess_RW[..., None], -1)[..., 0]
                      for x_RWC in (p_RWC, state.q_RWC))  # fmt: skip
        kept_RW = (end_W > 0) | (chance_RW * q_RW < p_RW)
        lead_R = jnp.cumprod(kept_RW.astype(jnp.int32), axis=1).sum(axis=1)
        at = jnp.minimum(lead_R.min(), self.window - 1)  # what stands here is the last decided

        rest_RC = jnp.maximum(p_RWC[:, at] - state.q_RWC[:, at], 0)
        anew_R = jax.vmap(jax.random.categorical)(anew_R, jnp.log(rest_RC))
        code_R = jnp.where(kept_RW[:, at], state.guess_RW[:, at], anew_R)
        codes_RW = state.guess_RW.at[:, at].set(code_R)
        place_W = jnp.where((index_W <= at) & (end_W == 0), code_W, state.drawn_RT.shape[1])
        drawn_RT = state.drawn_RT.at[:, place_W].set(codes_RW, mode="drop")

        fresh_RW = jax.vmap(jax.random.categorical)(guess_R, scores_RWC)
        later_W = at + 1 + index_W  # of this window; behind it nothing is known
        known_W, from_W = later_W < self.window, jnp.minimum(later_W, self.window - 1)
        _, next_W = _places(grid, state.done + later_W)
        above_W = jnp.clip(next_W - grid.w_R[0], 0, drawn_RT.shape[1] - 1)
        guess_RW = jnp.where(known_W, fresh_RW[:, from_W], drawn_RT[:, above_W])
        q_RWC = jnp.where(known_W[:, None], p_RWC[:, from_W],
                          jax.nn.one_hot(guess_RW, self._ids.codes))  # fmt: skip
        last_R = jnp.where(end_W[at] > 0, end_W[at], code_R + self._ids.visual)
        decided = ((index_W <= at) & (end_W == 0)).sum()
        return state._replace(
            cache=cache._replace(length=before + at + 1), drawn_RT=drawn_RT,
            index=state.index + decided, done=state.done + at + 1, last_R=last_R,
            guess_RW=guess_RW, q_RWC=q_RWC, passes=state.passes + 1,
        )  # fmt: skip


def _places(grid, token_W):
    """Of tokens behind the prompt: 1 for an EOL, 2 for an EOF, else 0; and the number of the code
    that stands there or comes next."""
    row, frame = grid.w_R[0] + 1, grid.h_R[0] * (grid.w_R[0] + 1) + 1
    at_W = token_W % frame  # what is given are whole frames
    end_W = jnp.where(at_W == frame - 1, 2, jnp.where(at_W % row == row - 1, 1, 0))
    code_W = token_W // frame * (frame - 1 - grid.h_R[0]) + at_W // row * (row - 1) + at_W % row
    return end_W, code_W


def _tokens_before(grid, codes: int) -> int:
    """Tokens up to the last of so many codes, ends among them."""
    w, h = int(grid.w_R[0]), int(grid.h_R[0])
    return codes + (codes - 1) // w + (codes - 1) // (h * w)
