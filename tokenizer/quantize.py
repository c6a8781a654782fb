"""From latent vectors to codes and back, and the losses that tie the two together.

Legend: N vectors, E code dim, K codes in the codebook, k codes of one tile; `...` any leading dims.
"""

import jax
import jax.numpy as jnp

CODE_TILE = 4096  # codes compared at a time: bounds the distances in memory at N x 4096
VECTOR_TILE = 4096  # and vectors, where there are many


def nearest_code(z_E: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    """Index of the nearest code by squared Euclidean distance in float32; ties to the lowest.

    Args:
        z_E: vectors, [..., E].
        codebook_KE: the codes.
    Returns:
        int32 codes, [...].
    """
    z_NE = z_E.reshape(-1, z_E.shape[-1]).astype(jnp.float32)
    codebook_KE = codebook_KE.astype(jnp.float32)
    best_N, code_N = tile_nearest(z_NE, codebook_KE[:CODE_TILE])
    whole = len(codebook_KE) // CODE_TILE * CODE_TILE
    if whole > CODE_TILE:
        tiles_LkE = codebook_KE[CODE_TILE:whole].reshape(-1, CODE_TILE, codebook_KE.shape[1])
        starts_L = CODE_TILE * (1 + jnp.arange(len(tiles_LkE)))

        def step(best, tile):
            tile_kE, start = tile
            return closer(best, tile_nearest(z_NE, tile_kE), start), None

        (best_N, code_N), _ = jax.lax.scan(step, (best_N, code_N), (tiles_LkE, starts_L))
    if CODE_TILE <= whole < len(codebook_KE):
        rest = tile_nearest(z_NE, codebook_KE[whole:])
        best_N, code_N = closer((best_N, code_N), rest, whole)
    return code_N.reshape(z_E.shape[:-1])


def distance_to_others(codebook_KE: jax.Array) -> jax.Array:
    """Squared distance of each code to the nearest other one -> float32 [K]."""

    def one(code_E, index):
        distance_K = jnp.square(codebook_KE - code_E).sum(-1)
        return jnp.where(jnp.arange(len(codebook_KE)) == index, jnp.inf, distance_K).min()

    indices_K = jnp.arange(len(codebook_KE))
    return jax.lax.map(lambda x: one(*x), (codebook_KE, indices_K), batch_size=256)


def means(z_NE: jax.Array, weight_N: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    """Each code moved to the weighted mean of the vectors nearest to it; those of none stay."""
    codes_N = jax.lax.map(
        lambda z_E: nearest_code(z_E, codebook_KE), z_NE, batch_size=VECTOR_TILE
    )
    sums_KE = jnp.zeros_like(codebook_KE).at[codes_N].add(z_NE * weight_N[:, None])
    total_K1 = jnp.zeros(len(codebook_KE)).at[codes_N].add(weight_N)[:, None]
    return jnp.where(total_K1 > 0, sums_KE / jnp.maximum(total_K1, 1e-9), codebook_KE)


def tile_nearest(z_NE: jax.Array, codes_kE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest distance to a tile (less |z|^2, which decides nothing) and the code's place."""
    dot_Nk = jnp.einsum("NE,kE->Nk", z_NE, codes_kE, precision=jax.lax.Precision.HIGHEST)
    distance_Nk = jnp.square(codes_kE).sum(-1) - 2 * dot_Nk
    best_N = distance_Nk.min(-1)
    # min, then the first place that equals it, vectorises where argmin does not.
    place_k = jnp.arange(len(codes_kE), dtype=jnp.int32)
    place_N = jnp.where(distance_Nk == best_N[:, None], place_k, len(codes_kE)).min(-1)
    return best_N, place_N


def closer(old, new, start: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    (old_best_N, old_code_N), (best_N, place_N) = old, new
    better_N = best_N < old_best_N
    code_N = jnp.where(better_N, place_N + start, old_code_N)
    return jnp.where(better_N, best_N, old_best_N), code_N


def straight_through(z_E: jax.Array, q_E: jax.Array) -> jax.Array:
    """The value of `q` with the gradient of `z`."""
    return z_E + jax.lax.stop_gradient(q_E - z_E)


def losses(z_E: jax.Array, q_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(commitment, codebook): the mean squared distance, once pulling `z` and once the code.

    Emu3 starts from SBER-MoVQGAN, whose quantizer weighs them in taming-transformers' older order:
    commitment 1, codebook 0.25.
    """
    commitment = jnp.square(z_E - jax.lax.stop_gradient(q_E)).mean()
    codebook = jnp.square(jax.lax.stop_gradient(z_E) - q_E).mean()
    return commitment, codebook
