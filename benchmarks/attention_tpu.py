"""What the TPU kernels visit and what they compile to, beside splash attention. Needs no TPU.

    python -m benchmarks.attention_tpu [--quick] [--sweep]

Prints one JSON line. `visited`: blocks that our forward and backward kernels visit in three real
packings, against those that hold at least one visible pair (ideal) and against the causal
triangle of the same blocks, which splash attention (jax.experimental.pallas.ops.tpu) visits
whatever the segments. `compiled`: forward and backward compiled ahead of time by libtpu for one
chip at Emu3-8B's shape (32 heads, 8 kv heads, head size 128, bfloat16), ours and splash's:
seconds, VMEM of the largest kernel, memory a chip. `ring`: the same inside the ring over
context = 8 on v5p:4x4x8, and how many ring steps' sends enclose the kernel. `--quick` is one
compilation. `--sweep` compiles every block size instead and prints what fits, the source of
flash_tpu.BLOCKS. Speed is not measured here: that needs the chips.

T position in a row  I query blocks  J key blocks
"""

import argparse
import functools
import json
import os
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from benchmarks.packings import packing
from emu3_jax import mesh
from emu3_jax.attention import attention
from emu3_jax.compile import described
from emu3_jax.kernels import flash_tpu, mask

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
PACKINGS = (("images", 5120), ("short", 5120), ("short", 131_072), ("long", 131_072))
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RING = dict(topology="v5p:4x4x8", sizes=dict(fsdp=16, context=8), length=131_072)


def main() -> None:
    """Prints the JSON line; exits with 2 where libtpu is not installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    flags = parser.parse_args()
    try:
        described("v5e:2x2")
    except Exception as error:
        print(f"no TPU compiler ({str(error).splitlines()[0]}); install libtpu", file=sys.stderr)
        sys.exit(2)
    if flags.quick:
        result = dict(compiled=[compiled("v5e", 5120, ours)])
    elif flags.sweep:
        sizes = [(t, s) for t in (256, 512, 1024) for s in (256, 512, 1024, 2048)]
        result = dict(sweep=[sweep(chip, *size) for chip in CHIPS for size in sizes])
    else:
        result = dict(
            visited=[visited(*which) for which in PACKINGS],
            compiled=[compiled(chip, length, attend) for chip in CHIPS
                      for length in (5120, 131_072) for attend in (ours, splash)],
            ring=ring(),
        )  # fmt: skip
    print(json.dumps(dict(benchmark="attention_tpu", jax=jax.__version__, **result)))


def visited(name: str, length: int) -> dict:
    """Blocks that are visited in one row, and their ratios to the ideal and to the triangle."""
    segments_T, positions_T = packing(name, length)
    places = mask.Places(*(jnp.asarray(x)[None] for x in (segments_T, positions_T) * 2))
    figures = dict(packing=name, length=length, documents=int(segments_T.max()))
    for direction, (t, s) in zip(("forward", "backward"), flash_tpu.BLOCKS["TPU v5"], strict=True):
        padded = places.padded(-(-length // t) * t, -(-length // s) * s)
        visible_BIJ, whole_BIJ = mask.blocks(padded, t, s)
        count = int(mask.pairs(visible_BIJ, whole_BIJ).count)
        ideal, triangle = _ideal(segments_T, t, s), _triangle(length, t, s)
        figures[direction] = dict(
            block=[t, s], visited=count, ideal=ideal, triangle=triangle,
            over_ideal=round(count / ideal, 3), of_splash=round(count / triangle, 4),
        )  # fmt: skip
    # What no block size can beat: visible pairs against those of the causal triangle.
    lengths = np.bincount(segments_T)[1:].astype(float)
    figures["pairs_of_triangle"] = round(float((lengths**2).sum() / length**2), 4)
    return figures


def _ideal(segments_T, t: int, s: int) -> int:
    """Blocks with a visible pair, document by document: another way than the kernel's."""
    found = set()
    for segment in range(1, segments_T.max() + 1):
        at = np.flatnonzero(segments_T == segment)
        first, last = int(at[0]), int(at[-1])
        for i in range(first // t, last // t + 1):
            newest = min(last, (i + 1) * t - 1)
            found.update((i, j) for j in range(first // s, newest // s + 1))
    return len(found)


def _triangle(length: int, t: int, s: int) -> int:
    return sum(min((i + 1) * t - 1, length - 1) // s + 1 for i in range(-(-length // t)))


def ours(q, k, v, seg, pos):
    return attention(q, k, v, seg, pos)


def splash(q, k, v, seg, pos):
    """The same by splash attention, with our forward's block sizes throughout."""
    (t, s), (t_back, s_back) = flash_tpu.BLOCKS["TPU v5"]
    sizes = splash_attention.BlockSizes(
        block_q=t, block_kv=s, block_kv_compute=s, block_q_dkv=t_back, block_kv_dkv=s_back,
        block_kv_dkv_compute=s_back, block_q_dq=t_back, block_kv_dq=s_back,
    )  # fmt: skip
    causal = splash_attention.CausalMask((q.shape[1], k.shape[1]))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([causal] * q.shape[2]), block_sizes=sizes
    )
    q = q * HEAD_DIM**-0.5

    def row(q, k, v, seg):
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
        return kernel(q, k, v, splash_attention.SegmentIds(seg, seg)).swapaxes(0, 1)

    return jax.vmap(row)(q, k, v, seg)


def compiled(chip: str, length: int, attend) -> dict:
    """Forward and backward of one row on one chip."""
    where = mesh.Mesh().make(described(CHIPS[chip])[:1], _axis_type(attend))
    return dict(chip=chip, length=length, kernel=attend.__name__) | _compile(where, length, attend)


def _axis_type(attend):
    # splash knows nothing of explicit axes
    return jax.sharding.AxisType.Auto if attend is splash else jax.sharding.AxisType.Explicit


def _compile(device_mesh, length: int, attend) -> dict:
    text, figures = _lowered(device_mesh, length, attend)
    return figures if text is None else figures | dict(vmem_mb=_vmem_mb(text))


def _lowered(device_mesh, length: int, attend) -> tuple[str | None, dict]:
    """(compiled text, figures); the text is None and the figures an error if it fails."""
    with jax.set_mesh(device_mesh):
        (batch,) = mesh.shards("B")
    shapes = [((batch, length, n, HEAD_DIM), "bfloat16", "BTNH")
              for n in (HEADS, KV_HEADS, KV_HEADS)]  # fmt: skip
    shapes += [((batch, length), "int32", "BT")] * 2
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.sharding(device_mesh, dims))
        for shape, dtype, dims in shapes
    ]

    def step(q, k, v, seg, pos):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, seg, pos), q, k, v)
        return out, pullback(out)

    start = time.time()
    try:
        with jax.set_mesh(device_mesh):
            program = jax.jit(step).lower(*arguments).compile()
    except Exception as error:  # whatever the compiler says is the result
        return None, dict(error=" ".join(str(error).split())[:300])
    memory = program.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return program.as_text(), dict(seconds=round(time.time() - start, 1),
                                   memory_gb=round(used / 1e9, 3))  # fmt: skip


def _vmem_mb(text: str) -> float | None:
    """Fast memory of the largest Pallas kernel in a compiled program; None if it does not say."""
    sizes = [
        int(size)
        for line in text.splitlines() if "tpu_custom_call" in line
        for size in re.findall(r'"used_scoped_memory_configs":\[\{"memory_space":"1",'
                               r'"offset":"\d+","size":"(\d+)"', line)
    ]  # fmt: skip
    return round(max(sizes) / 1e6, 2) if sizes and max(sizes) else None


def ring() -> dict:
    """Forward and backward in the ring, one row of 131,072 a data shard."""
    device_mesh = mesh.Mesh(**RING["sizes"]).make(described(RING["topology"]))
    attend = functools.partial(attention, context="ring")
    text, figures = _lowered(device_mesh, RING["length"], attend)
    figures = RING | figures
    if text is not None:
        figures |= dict(vmem_mb=_vmem_mb(text), sends=_sends(text))
    return figures


def _sends(text: str) -> dict:
    """Of the collective permutes, how many have work between their start and their end."""
    total = overlapped = 0
    for computation in text.split("\n\n"):
        open_sends: dict[str, bool] = {}
        for line in computation.splitlines():
            name = line.strip().removeprefix("ROOT ").split(" ")[0]
            if " collective-permute-start(" in line:
                open_sends[name] = False
            elif " collective-permute-done(" in line:
                sent = re.search(r"collective-permute-done\((%[\w.\-]+)", line).group(1)
                total += 1
                overlapped += open_sends.pop(sent, False)
            elif " conditional(" in line or "tpu_custom_call" in line:
                open_sends = dict.fromkeys(open_sends, True)
    return dict(total=total, around_the_kernel=overlapped)


def sweep(chip: str, t: int, s: int) -> dict:
    """Whether blocks of this size compile, forward and backward, and what they need."""
    where = mesh.Mesh().make(described(CHIPS[chip])[:1])
    kind = described(CHIPS[chip])[0].device_kind
    usual, flash_tpu.BLOCKS[kind] = flash_tpu.BLOCKS[kind], ((t, s), (t, s))
    figures = _compile(where, 5120, ours)
    flash_tpu.BLOCKS[kind] = usual
    return dict(chip=chip, block=[t, s]) | figures


if __name__ == "__main__":
    main()
