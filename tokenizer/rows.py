"""Rows of an image and a clip through the tokenizer, as training sees them.

A row is an image, a clip or both, and every frame of it counts alike. Cut over devices, a row stays
on one of them.

Legend: B batch of rows, F frames of a row, T frames of a clip, H height, W width, C channels; t h w
the latent grid, N clips of a batch, M clips of a row, E code dim.
"""

import jax
import jax.numpy as jnp

from tokenizer import pixels, quantize, vq


def frames(batch: dict) -> tuple[jax.Array, bool]:
    """x_BFHWC in [-1, 1] of a batch, and whether the first frame of a row is an image.

    What follows is the row's clip. Raises ValueError if image and clip differ in size.
    """
    parts = [batch[name] for name in ("image", "clip") if name in batch]
    if len({x.shape[-3:] for x in parts}) > 1:
        (height, width, _), (clip_height, clip_width, _) = (x.shape[-3:] for x in parts)
        raise ValueError(
            f"a batch holds images of {height}x{width} pixels and clips of "
            f"{clip_height}x{clip_width}; give them one size"
        )
    parts = [pixels.to_float(x) if x.dtype == jnp.uint8 else x for x in parts]
    parts = [x[:, None] if x.ndim == 4 else x for x in parts]
    return jnp.concatenate(parts, axis=1), "image" in batch


def reconstruct(model: vq.VQ, x_BFHWC: jax.Array, image: bool) -> tuple[jax.Array, ...]:
    """Rows of frames through the codes and back -> y_BFHWC, z_NthwE, q_NthwE, codes_Nthw, and what
    z_NthwE is outside of training: by batch norm's recorded statistics, and without a gradient.

    Of a row the first frame is an image, if `image`, and the others are a clip. Images pass the
    layers over time together with the clips, as clips that stand still: so batch norm sees both.
    """
    batch, frames = x_BFHWC.shape[:2]
    length, factor = frames - image, model.config.temporal_factor
    if length % factor:
        raise ValueError(
            f"clips of {length} frames are no multiple of temporal_factor {factor}; cut them"
        )
    model.check_size(x_BFHWC)
    z_BFhwC = vq.per_frame(model.encoder.frames, x_BFHWC)
    clips = [jnp.repeat(z_BFhwC[:, :1], length or factor, axis=1)] if image else []
    clips += [z_BFhwC[:, image:]] if length else []
    z_BMThwC = jnp.stack(clips, axis=1)
    z_NThwC = z_BMThwC.reshape(-1, *z_BMThwC.shape[2:])
    z_NthwE = model.quant_conv(model.encoder.time(z_NThwC, True))
    later_NthwE = jax.lax.stop_gradient(model.quant_conv(model.encoder.time(z_NThwC, False)))
    codes_Nthw = jax.lax.stop_gradient(model.quantize.nearest(z_NthwE))
    q_NthwE = model.quantize.lookup(codes_Nthw)
    st_NthwE = quantize.straight_through(z_NthwE, q_NthwE)
    both = model.decoder.time(
        model.post_quant_conv(st_NthwE), st_NthwE, True, first_frame=not length
    )

    def of_rows(z_NThwC: jax.Array) -> jax.Array:
        z_BMThwC = z_NThwC.reshape(batch, -1, *z_NThwC.shape[1:])
        stills = [z_BMThwC[:, 0, :1]] if image else []
        return jnp.concatenate(stills + ([z_BMThwC[:, -1]] if length else []), axis=1)

    y_BFHWC = vq.per_frame(model.decoder.frames, *map(of_rows, both))
    return y_BFHWC, z_NthwE, q_NthwE, codes_Nthw, later_NthwE
