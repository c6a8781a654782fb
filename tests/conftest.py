"""Eight CPU devices, and float32 matrix products at full precision."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# The last two make compilation three times as fast; the programs here are tiny.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402
import pytest  # noqa: E402

from emu3_jax import mesh  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module")
def one_device():
    """A single device is the current mesh."""
    with jax.set_mesh(mesh.Mesh().make(jax.devices()[:1])):
        yield
