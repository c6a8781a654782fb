"""What Emu3-8B needs on a TPU slice, by compiling it here, where there is none.

    python -m emu3_jax.launch --config=configs/compile_8b.py --config.topology=v5p:4x4x4 \\
        [--config.train=configs/emu3_8b_stage2.py] [--config.set="batch=64 mesh.tensor=4"]

Hardware: any Linux x86_64 machine with the package libtpu. Time: 1 to 10 minutes, longest where
remat=auto tries several. Expected result: a table and one line of JSON; README has those of stages
1 and 2. An empty --config.topology= compiles for the devices of this machine.
"""

from emu3_jax.compile import Compile


def get_config() -> Compile:
    """Stage 1 on 64 chips."""
    return Compile(train="configs/emu3_8b_stage1.py", topology="v5p:4x4x4")
