"""What drawing with Emu3-8B needs on TPUs that are not here: its loop, compiled by libtpu.

    python -m benchmarks.compile_decode

One 720x720 image (90x90 codes) with guidance, and a batch, in bfloat16, the weights split over the
chips. Memory is a chip's: weights, cache and the compiler's temporaries. The time of a token is at
least that of reading all weights but the embedding once, at the bandwidth that the chip's maker
names; it is an estimate, nothing ran. Prints one line of JSON a row.
"""

import json
import time

import jax

from configs.emu3_8b_stage1 import decoder
from emu3_jax import compile as compile_lib
from emu3_jax import generate, mesh, params, vocab

ROWS = (  # topology, images at once, type of the cache, GB/s of a chip's memory
    ("v5e:2x4", 1, "", 819),
    ("v5e:2x4", 8, "int8", 819),
    ("v6e:2x2", 1, "", 1640),
    ("v6e:2x2", 8, "int8", 1640),
)
PROMPT = 120  # tokens: a caption, what is put behind it and the image's head


def main() -> None:
    """Compiles the rows one after the other."""
    ids = vocab.special_ids(151_643, vocab.EMU3_CODES)
    for topology, images, dtype, bandwidth in ROWS:
        devices = compile_lib.described(topology)
        begun = time.time()
        grid = mesh.Mesh(fsdp=1, tensor=len(devices)).make(devices)
        with jax.set_mesh(grid):
            model = decoder("8b")
            abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(
                p.shape, "bfloat16", sharding=mesh.sharding(grid, p.dims)), model.params())
            generator = generate.Generator(model, abstract, ids, 151_643, dtype)
            request = generate.Request([ids.img] * PROMPT, [ids.img] * PROMPT, (1, 90, 90))
            memory = generator.lowered([request] * images, generate.Sampling()).compile(
            ).memory_analysis()  # fmt: skip
        weights = 2 * params.count(jax.tree.leaves(model.params()["layers"])) / len(devices)
        print(json.dumps(dict(
            topology=topology, images=images, cache=dtype or "bfloat16",
            peak_gib=round(memory.peak_memory_in_bytes / 2**30, 2),
            arguments_gib=round(memory.argument_size_in_bytes / 2**30, 2),
            temporaries_gib=round(memory.temp_size_in_bytes / 2**30, 2),
            weights_ms_a_token=round(weights / bandwidth / 1e6, 2),
            compile_s=round(time.time() - begun),
        )), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
