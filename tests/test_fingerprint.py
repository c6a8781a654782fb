"""A checksum is of the bits and their places, not of how they lie on devices or disk."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from emu3_jax import compile as compile_lib
from emu3_jax import fingerprint, hlo, mesh, optim

TYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint32", "int8", "bool")
SHAPE = (4, 8, 6)


def array(dtype: str, shape=SHAPE) -> np.ndarray:
    """Arbitrary values, negative ones among them."""
    values = np.random.default_rng(len(dtype)).integers(-99, 99, shape)
    return np.asarray(jnp.asarray(values).astype(dtype))


def trees() -> dict[str, np.ndarray]:
    """An array of each type, and each number of dimensions."""
    found = {dtype: array(dtype) for dtype in TYPES}
    return found | {f"{n}d": array("float32", SHAPE[:n]) for n in range(3)}


@pytest.mark.parametrize(
    "axis_type, sizes, spec",
    [(AxisType.Explicit, dict(data=8, fsdp=1), jax.P()),
     (AxisType.Explicit, dict(data=2, fsdp=2, tensor=2), jax.P("fsdp", "tensor")),
     (AxisType.Auto, dict(fsdp=2, context=2, tensor=2),
      jax.P(None, ("context", "fsdp"), "tensor"))],
)  # fmt: skip
def test_the_same_on_every_mesh_and_in_numpy(axis_type, sizes, spec):
    device_mesh, tree = mesh.Mesh(**sizes).make(axis_type=axis_type), trees()
    put = {name: jax.device_put(x, NamedSharding(device_mesh, jax.P(*spec[: x.ndim])))
           for name, x in tree.items()}  # fmt: skip
    got = fingerprint.of(put)
    assert got == {name: fingerprint.partial(x) for name, x in tree.items()}
    assert len(set(got.values())) == len(got)
    assert fingerprint.of(tree) == got  # without a mesh


def test_pieces_add_up(monkeypatch):
    """However an array is cut, also where a piece is taken block by block."""
    x = array("bfloat16", (6, 8, 10))
    whole = fingerprint.partial(x)
    monkeypatch.setattr(fingerprint, "BLOCK", 7)
    assert fingerprint.partial(x) == whole
    total = 0
    for i, j, k in itertools.product((0, 4), (0, 3), (0, 5)):
        piece = x[i : i + (4 if i == 0 else 2), j : j + (3 if j == 0 else 5), k : k + 5]
        total += fingerprint.partial(piece, (i, j, k))
    assert total % 2**32 == whole


def test_any_bit_and_any_swap_counts():
    x = array("float32", (5, 7))
    found = {fingerprint.partial(x)}
    for place, bit in itertools.product(np.ndindex(x.shape), range(32)):
        changed = x.copy().view(np.uint32)
        changed[place] ^= np.uint32(1 << bit)
        found.add(fingerprint.partial(changed.view(np.float32)))
    x = np.where(np.arange(35).reshape(5, 7) % 2, 1.0, -1.0).astype(np.float32)  # all but the sign
    found.add(fingerprint.partial(x))
    for one, two in itertools.combinations(np.ndindex(x.shape), 2):
        if x[one] != x[two]:
            changed = x.copy()
            changed[one], changed[two] = x[two], x[one]
            found.add(fingerprint.partial(changed))
    assert len(found) == 1 + 35 * 32 + 1 + 17 * 18
    square = array("int8", (4, 4))
    assert fingerprint.partial(square.T) != fingerprint.partial(square)


def test_64_bits_are_refused():
    with pytest.raises(ValueError) as error:
        fingerprint.partial(np.zeros(3))
    assert str(error.value) == "float64: a checksum is of elements of 8, 16 or 32 bits"


def test_a_training_state_by_its_names_also_from_the_hosts_memory():
    optimizer = optim.AdamW(offload=True).make(10, None)
    with jax.set_mesh(mesh.Mesh(data=2, fsdp=2, tensor=2).make()):
        params = dict(embed=mesh.place(array("float32", (4, 8)), "VD"), layers=dict(up=jnp.ones(3)))
        state = dict(params=params, optimizer=jax.jit(optimizer.init)(params))
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state)}
        assert "pinned_host" in kinds and len(kinds) == 2
        got = fingerprint.of(state)
    want = map(fingerprint.partial, jax.tree.leaves(jax.tree.map(np.asarray, state)))
    assert list(got.values()) == list(want)
    moments = {f"optimizer.1.0.{kind}.{name}" for kind in ("mu", "nu")
               for name in ("embed", "layers.up")}  # fmt: skip
    counts = {"optimizer.1.0.count", "optimizer.1.2.count"}
    assert got.keys() == {"params.embed", "params.layers.up"} | moments | counts


def test_nothing_is_gathered_and_little_is_held():
    """By TPU's compiler: no copy of an array, then one sum over all devices for all of them."""
    pytest.importorskip("libtpu", reason="libtpu has wheels for Linux on x86_64 only")
    device_mesh = mesh.Mesh(tensor=2).make(compile_lib.described("v5e:2x2"))
    for spec in (jax.P(), jax.P("fsdp", "tensor")):
        x = jax.ShapeDtypeStruct((512, 1024), "float32", sharding=NamedSharding(device_mesh, spec))
        compiled = fingerprint._local.lower(device_mesh, spec, x).compile()
        assert not hlo.read(compiled.as_text()).collective_bytes
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < 0.1 * memory.argument_size_in_bytes
    layout = NamedSharding(device_mesh, jax.P(*device_mesh.axis_names))
    sums = jax.ShapeDtypeStruct(device_mesh.axis_sizes, "uint32", sharding=layout)
    program = hlo.read(fingerprint._added.lower([sums] * 3).compile().as_text())
    assert program.collective_bytes.keys() == {"all-reduce"}
    assert sum(size for _, size, _ in program.all_reduces) < 100
