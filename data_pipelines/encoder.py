"""The tokenizer on all devices of this process: uint8 pixels in, codes out, without waiting.

Each device encodes its share of a batch by itself, and processes know nothing of each other.

Legend: B images of a batch, n clips of a video, T frames, H rows, W columns, C colours of pixels;
t h w the grid of codes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tokenizer import pixels, vq

MODES = ("clips", "stream")


class Encoder:
    """A tokenizer that encodes about `tokens` codes, or frames of so many, on a device at a time.

    Videos are encoded in the mode `video`: "clips" of as many frames as one latent frame has, each
    by itself, which go to all devices; "stream" as a whole, of which the layers over time see all
    that came before, on one device.

    Results are functions that wait for codes: the devices work while the caller reads on.
    """

    def __init__(self, tokenizer: vq.VQ, tokens: int, video: str = "clips"):
        """Raises ValueError for a mode that there is not."""
        if video not in MODES:
            raise ValueError(f"video {video!r} is none of {', '.join(MODES)}")
        self._tokenizer, self._tokens, self._mode = tokenizer, tokens, video
        self._frames = tokenizer.config.temporal_factor
        devices = jax.sharding.Mesh(np.array(jax.local_devices()), "B")
        graph, state = nnx.split(tokenizer)
        self._state = jax.device_put(state, NamedSharding(devices, PartitionSpec()))
        self._split = NamedSharding(devices, PartitionSpec("B"))

        def on_all(encode: Callable) -> Callable:
            def share(state, x_B):
                return encode(nnx.merge(graph, state), pixels.to_float(x_B))

            in_specs, out_specs = (PartitionSpec(), PartitionSpec("B")), PartitionSpec("B")
            mapped = jax.shard_map(share, mesh=devices, in_specs=in_specs, out_specs=out_specs)
            return jax.jit(mapped)

        self._images, self._clips = on_all(vq.VQ.encode), on_all(vq.VQ.encode_clips)

    def batch(self, height: int, width: int) -> int:
        """How many images are encoded together."""
        return self._split.num_devices * self._share(height, width, 1)

    def images(self, x_BHWC: np.ndarray) -> Callable[[], np.ndarray]:
        """uint8 images, at most `batch` of them, to codes_Bthw, t = 1."""
        x_filled_BHWC = _fill(x_BHWC, self.batch(*x_BHWC.shape[1:3]))
        codes_Bhw = self._images(self._state, jax.device_put(x_filled_BHWC, self._split))
        return lambda: np.asarray(codes_Bhw)[: len(x_BHWC), None]

    def video(self, x_THWC: np.ndarray) -> Callable[[], np.ndarray]:
        """The uint8 frames of a video to codes_Bthw, B = 1. The last one is repeated to fill t."""
        x_nTHWC = vq.pad_frames(x_THWC, self._frames)
        x_nTHWC = x_nTHWC.reshape(-1, self._frames, *x_THWC.shape[1:])
        encode = self._encode_stream if self._mode == "stream" else self._encode_clips
        pieces_thw = encode(x_nTHWC)
        return lambda: np.concatenate([np.asarray(p) for p in pieces_thw])[None, : len(x_nTHWC)]

    def _encode_clips(self, x_nTHWC: np.ndarray) -> list[jax.Array]:
        count = self._split.num_devices * self._share(*x_nTHWC.shape[2:4], self._frames)
        placed = [jax.device_put(x_BTHWC, self._split) for x_BTHWC in _pieces(x_nTHWC, count)]
        return [self._clips(self._state, x_BTHWC)[:, 0] for x_BTHWC in placed]

    def _encode_stream(self, x_nTHWC: np.ndarray) -> list[jax.Array]:
        # What fills up the last piece comes after everything, so it changes no code before it.
        past, pieces_thw = None, []
        for piece_nTHWC in _pieces(x_nTHWC, self._share(*x_nTHWC.shape[2:4], self._frames)):
            x_BTHWC = jnp.asarray(piece_nTHWC.reshape(1, -1, *piece_nTHWC.shape[2:]))
            x_BTHWC = pixels.to_float(x_BTHWC)
            codes_Bthw, past = self._tokenizer.encode_stream(x_BTHWC, past)
            pieces_thw.append(codes_Bthw[0])
        return pieces_thw

    def _share(self, height: int, width: int, frames: int) -> int:
        """How many images, or clips of so many frames, a device encodes at a time."""
        factor = self._tokenizer.config.spatial_factor
        return max(1, self._tokens // (frames * (height // factor) * (width // factor)))


def _pieces(x_N: np.ndarray, count: int) -> list[np.ndarray]:
    return [_fill(x_N[i : i + count], count) for i in range(0, len(x_N), count)]


def _fill(x_N: np.ndarray, count: int) -> np.ndarray:
    """So many along the first axis, by repeating the last: one compiled program a size."""
    return np.concatenate([x_N, np.repeat(x_N[-1:], count - len(x_N), axis=0)])
