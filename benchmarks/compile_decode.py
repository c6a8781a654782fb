"""What drawing with Emu3-8B needs on TPUs that are not here: its loop, compiled by libtpu.

    python -m benchmarks.compile_decode

One 720x720 image (90x90 codes) with guidance, and a batch, in bfloat16, the weights split over the
chips. Memory is a chip's: weights, cache and the compiler's temporaries. The time of a token is at
least that of reading the layers' weights once, at the bandwidth that the chip's maker names; it is
an estimate, nothing ran. Prints one line of JSON a row.
"""

import json
import time

import jax

from configs.emu3_8b_stage1 import decoder
from emu3_jax import compile as compile_lib
from emu3_jax import generate, mesh, params, vocab
from emu3_jax.sampling import Sampling

ROWS = (  # topology, images at once, type of the cache, GB/s of a chip's memory
    ("v5e:2x4", 1, "", 819),
    ("v5e:2x4", 8, "int8", 819),
    ("v6e:2x2", 1, "", 1640),
    ("v6e:2x2", 8, "int8", 1640),
)
PROMPT = 120  # tokens: a caption, what is put behind it and the image's head


def main() -> None:
    """Compiles the rows one after the other."""
    for row in ROWS:
        print(json.dumps(compiled(*row)), flush=True)


def compiled(topology: str, images: int, dtype: str, bandwidth: int) -> dict:
    """The figures of one row."""
    devices = compile_lib.described(topology)
    device_mesh = mesh.Mesh(fsdp=1, tensor=len(devices)).make(devices)
    begun, ids, model = time.time(), vocab.special_ids(151_643, vocab.EMU3_CODES), decoder("8b")

    def abstract(p: params.Param) -> jax.ShapeDtypeStruct:
        sharding = mesh.sharding(device_mesh, p.dims)
        return jax.ShapeDtypeStruct(p.shape, "bfloat16", sharding=sharding)

    with jax.set_mesh(device_mesh):
        weights = jax.tree.map(abstract, model.params())
        generator = generate.Generator(model, weights, ids, 151_643, dtype)
        request = generate.Request([ids.img] * PROMPT, [ids.img] * PROMPT, (1, 90, 90))
        lowered = generator.lowered([request] * images, Sampling())
        memory = lowered.compile().memory_analysis()
    read = 2 * params.count(weights["layers"]) / len(devices)
    fields = dict(peak="peak_memory", arguments="argument_size", temporaries="temp_size")
    gib = {name: round(getattr(memory, f"{field}_in_bytes") / 2**30, 2)
           for name, field in fields.items()}  # fmt: skip
    return dict(topology=topology, images=images, cache=dtype or "bfloat16", gib=gib,
                weights_ms_a_token=round(read / bandwidth / 1e6, 2),
                compile_s=round(time.time() - begun))  # fmt: skip


if __name__ == "__main__":
    main()
