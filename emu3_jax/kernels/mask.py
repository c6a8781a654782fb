"""What a query sees: element by element, block by block, and what dropout takes away again.

B batch  T query position  S key position  N heads  I query blocks  J key blocks
P pairs of a query block and a key block
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # score of what is not seen; finite, so that a row that sees nothing stays finite
NOTHING = -5e29  # a log-sum-exp below this is of a query that sees nothing
_NO_SEGMENT = jnp.iinfo(jnp.int32).max


class Places(NamedTuple):
    """Segment and position of every query and key.

    A key is visible if it has the query's segment and a position not after the query's. Segment 0
    is padding: it sees nothing and is not seen.
    """

    seg_BT: jax.Array
    pos_BT: jax.Array
    seg_BS: jax.Array
    pos_BS: jax.Array

    def padded(self, T: int, S: int) -> "Places":
        """The same with padding behind, to T queries and S keys."""
        return Places(*(jnp.pad(x, ((0, 0), (0, size - x.shape[1])))
                        for x, size in zip(self, (T, T, S, S), strict=True)))  # fmt: skip


class Dropout(NamedTuple):
    """Which probabilities are dropped: `rate`, and a hash of all that is known of the query."""

    rate: float
    hash_BTN: jax.Array | None


def visible(seg_T, pos_T, seg_S, pos_S):
    """True where the key is seen; the arguments broadcast against each other."""
    return (seg_T == seg_S) & (pos_S <= pos_T) & (seg_T > 0)


def query_hash(seed: jax.Array, b_B, seg_BT, pos_BT, n_N) -> jax.Array:
    """uint32 hash_BTN of the seed and of each query's row, segment, position and head.

    Neither blocks nor shards nor the order of a row's tokens enter, so a mask made of it is the
    same for every implementation on every mesh.
    """
    h_BT = _mix(seed ^ b_B.astype(jnp.uint32))[:, None]
    h_BT = _mix(_mix(h_BT ^ seg_BT.astype(jnp.uint32)) ^ pos_BT.astype(jnp.uint32))
    return _mix(h_BT[..., None] ^ n_N.astype(jnp.uint32))


def kept(hash_T, pos_S, rate: float):
    """True where a probability is kept, by the query's hash and the key's position (uint32)."""
    return above(_mix(hash_T ^ pos_S), rate)


def above(hash_T, rate: float):
    """True for all but a share `rate` of the hashes."""
    return hash_T >= jnp.uint32(rate * 2**32)


def _mix(h):
    """murmur3's finaliser."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return (h ^ (h >> 16)) + jnp.uint32(0x9E3779B9)


def blocks(places: Places, block_t: int, block_s: int) -> tuple[jax.Array, jax.Array]:
    """(visible_BIJ, whole_BIJ): may anything in the block be seen, and is all of it seen.

    `whole_BIJ` is exact. So is `visible_BIJ` where a row's documents stand one after the other
    with rising positions; elsewhere it may name a block in which nothing is seen, never leave
    one out. T and S are multiples of the block sizes.
    """
    q = _Block.of(places.seg_BT, places.pos_BT, block_t, axis=2)
    k = _Block.of(places.seg_BS, places.pos_BS, block_s, axis=1)
    first, last = jnp.maximum(q.first, k.first), jnp.minimum(q.last, k.last)
    # Of one shared segment the positions decide; of several, at least the middle ones are seen.
    newest = jnp.where(last == q.first, q.newest_first,
                       jnp.where(last == q.last, q.newest_last, _NO_SEGMENT))  # fmt: skip
    oldest = jnp.where(last == k.first, k.oldest_first,
                       jnp.where(last == k.last, k.oldest_last, 0))  # fmt: skip
    visible_BIJ = (first < last) | ((first == last) & (oldest <= newest))
    whole_BIJ = q.single & k.single & (q.first == k.first) & (k.newest_last <= q.oldest_first)
    return visible_BIJ, whole_BIJ


class _Block(NamedTuple):
    """Of each block: its first and last segment, and the oldest and newest position in them."""

    first: jax.Array
    last: jax.Array
    oldest_first: jax.Array
    newest_first: jax.Array
    oldest_last: jax.Array
    newest_last: jax.Array
    single: jax.Array  # one segment, no padding

    @classmethod
    def of(cls, seg_BT, pos_BT, size: int, axis: int) -> "_Block":
        """`axis` is where the other side's blocks will stand: [B, I, 1] or [B, 1, J]."""
        shape = (seg_BT.shape[0], seg_BT.shape[1] // size, size)
        seg_BIt, pos_BIt = seg_BT.reshape(shape), pos_BT.reshape(shape)
        first_BI = jnp.where(seg_BIt > 0, seg_BIt, _NO_SEGMENT).min(-1)
        last_BI = seg_BIt.max(-1)

        def ends(segment_BI):
            inside = seg_BIt == segment_BI[..., None]
            return (jnp.where(inside, pos_BIt, _NO_SEGMENT).min(-1),
                    jnp.where(inside, pos_BIt, -1).max(-1))  # fmt: skip

        single_BI = (seg_BIt == first_BI[..., None]).all(-1)
        fields = first_BI, last_BI, *ends(first_BI), *ends(last_BI), single_BI
        return cls(*(jnp.expand_dims(field, axis) for field in fields))


class Pairs(NamedTuple):
    """The visited pairs in the order of the visit, for a grid of `count` steps.

    Each of P entries holds two numbers of 16 bits in `at`, the outer block (whose result stays in
    fast memory) above the inner one, and in `row` the batch row above the flags below.
    """

    at_P: jax.Array
    row_P: jax.Array
    count: jax.Array


FLAGS = 4
FIRST, LAST, SEEN, MASKED = 1, 2, 4, 8  # of this outer block; compute at all; look at the mask


def pairs(visible_BIJ: jax.Array, whole_BIJ: jax.Array) -> Pairs:
    """Every visible pair, the outer blocks I one after the other.

    An outer block without any is visited once, without SEEN: its result has to be written, too.
    """
    B, I, J = visible_BIJ.shape  # noqa: E741
    lonely_BI1 = ~visible_BIJ.any(-1, keepdims=True)
    visited_BIJ = visible_BIJ | (lonely_BI1 & (jnp.arange(J) == 0))
    (flat_P,) = jnp.nonzero(visited_BIJ.ravel(), size=B * I * J, fill_value=0)
    flat_P = flat_P.astype(jnp.int32)
    outer_P = flat_P // J
    count = jnp.sum(visited_BIJ, dtype=jnp.int32)
    p_P = jnp.arange(B * I * J)
    first_P = (outer_P != jnp.roll(outer_P, 1)) | (p_P == 0)
    last_P = (outer_P != jnp.roll(outer_P, -1)) | (p_P == count - 1)
    flags_P = FIRST * first_P + LAST * last_P
    flags_P += SEEN * visible_BIJ.ravel()[flat_P] + MASKED * ~whole_BIJ.ravel()[flat_P]
    at_P = (outer_P % I) << 16 | flat_P % J
    return Pairs(at_P, outer_P // I << FLAGS | flags_P.astype(jnp.int32), count)
