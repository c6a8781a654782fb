"""A step that does not repeat itself, or copies that are not the same: the device is named."""

import functools
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from emu3_jax import data, mesh, optim, replay, update
from emu3_jax.mesh import sharding
from tests import toy

HOST, ROOT = socket.gethostname(), pathlib.Path(__file__).parent.parent
PROCESS = """
import os
import jax, numpy as np
from emu3_jax import launch, mesh, replay
from tests.test_replay import altered

launch.join(os.environ)
device_mesh = mesh.Mesh(data=4, fsdp=1).make()
with jax.set_mesh(device_mesh):
    sound = jax.device_put(np.arange(6.0, dtype=np.float32), mesh.sharding(device_mesh, ""))
    state = dict(sound=sound, odd=altered(sound, *[1] * jax.process_index()))
    try:
        replay.Replay(lambda state, batch, step: (state, {})).check(state, {}, 2)
    except replay.Corrupted as error:
        print(f"found: {error}", flush=True)
"""


@pytest.fixture(scope="module")
def device_mesh():
    """Three and more copies along data, two along fsdp, of what these do not cut."""
    device_mesh = mesh.Mesh(data=4, fsdp=2).make()
    with jax.set_mesh(device_mesh):
        yield device_mesh


@pytest.fixture(scope="module")
def training(device_mesh):
    """(check, state, batch) of the tiny decoder, its moments in the host's memory."""
    model = toy.model(layers=1, dropout=0.1)
    optimizer = optim.AdamW(offload=True).make(10, model.decays())
    state = jax.jit(functools.partial(update.init, model, optimizer))(0)
    batch = next(data.batches(toy.Counting().open(8), 0, 1, device_mesh))
    step = functools.partial(update.train_step, model, optimizer, 0)
    return replay.Replay(step).check, state, batch


def altered(x: jax.Array, *devices: int) -> jax.Array:
    """`x` with one bit of what it has on some devices flipped, another one on each."""
    pieces = [np.array(piece.data) for piece in x.addressable_shards]
    for at in devices:
        words = pieces[at].reshape(-1).view(np.uint32)
        words[at % words.size] ^= 1 << (9 + at)
    put = [jax.device_put(piece, shard.device)
           for piece, shard in zip(pieces, x.addressable_shards, strict=True)]  # fmt: skip
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, put)


def test_a_sound_step_passes_and_its_state_stays(training):
    check, state, batch = training
    before = jax.tree.map(np.asarray, state)
    check(state, batch, 0)
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_a_bit_that_flips_in_a_copy_of_the_weights_names_the_device(training):
    """Though the gradients are the same everywhere, as they were summed."""
    check, state, batch = training
    device = jax.devices()[5]
    norm = altered(state["params"]["norm"], 5)
    with pytest.raises(replay.Corrupted) as error:
        check(state | dict(params=state["params"] | dict(norm=norm)), batch, 7)
    assert str(error.value) == (
        f"step 7: params.norm differ between copies; at fault may be device {device.id} "
        f"(process 0, host {HOST})"
    )
    assert error.value.devices == [device.id] and error.value.hosts == [HOST]


def test_of_two_copies_either_may_be_wrong_of_three_the_odd_one(device_mesh):
    """As in a step that keeps its state: what is wrong in it stays."""
    check = replay.Replay(lambda state, batch, step: (state, {})).check
    rows = jax.device_put(np.arange(16.0, dtype=np.float32), sharding(device_mesh, ""))
    pairs = jax.device_put(rows, jax.NamedSharding(device_mesh, jax.P("data")))
    state = dict(pairs=pairs, rows=rows, rest=[rows] * 5)
    check(state, {}, 3)

    def named(state) -> tuple[list[int], str]:
        with pytest.raises(replay.Corrupted) as error:
            check(state, {}, 3)
        return error.value.devices, str(error.value)

    ids = [device.id for device in device_mesh.devices.flat]
    assert named(state | dict(pairs=altered(pairs, 4)))[0] == ids[4:6]
    assert named(state | dict(rows=altered(rows, 1, 6)))[0] == [ids[1], ids[6]]
    assert named(state | dict(rows=altered(rows, 0, 1, 2, 3)))[0] == ids  # no majority
    devices, message = named(state | dict(rest=[altered(rows, 2)] * 5))
    assert devices == [ids[2]]
    assert message.startswith("step 3: rest.0, rest.1, rest.2, rest.3 and 1 more differ between")


@pytest.mark.parametrize("wrong", [{2}, set(range(8))], ids=["one", "all"])
def test_a_step_that_gives_something_else_the_second_time(device_mesh, wrong):
    """On one device: after the sum over devices. On all of them: before it."""
    calls = dict.fromkeys(range(8), 0)

    def called(at):
        calls[int(at)] += 1
        return np.float32(calls[int(at)] if int(at) in wrong else 0)

    def local(x):
        at = jax.lax.axis_index(device_mesh.axis_names)
        return x + jax.pure_callback(called, jax.ShapeDtypeStruct((), jnp.float32), at)

    def step(state, batch, step):
        layout = mesh.spec("D")
        add = jax.shard_map(local, in_specs=layout, out_specs=layout, check_vma=False)
        return dict(state, b=add(state["b"])), {}

    b = jax.device_put(np.zeros(4, np.float32), sharding(device_mesh, "D"))
    with pytest.raises(replay.Corrupted) as error:
        replay.Replay(step).check(dict(a=b, b=b), {}, 0)
    found = [device.id for device in device_mesh.devices.flat[sorted(wrong)]]
    assert error.value.devices == found and set(calls.values()) == {2}
    assert str(error.value) == "step 0: b differ between two runs; " + (
        "no host stands out, as all devices differ" if len(wrong) > 1 else
        f"at fault may be device {found[0]} (process 0, host {HOST})")  # fmt: skip


def test_where_the_compiler_lays_out():
    """Of a task with Auto axes: a copy of the weights is wrong on one device."""

    def step(state, batch, step):
        slope = jax.grad(lambda w_DF: jnp.square(batch @ w_DF).mean())(state["w_DF"])
        return dict(w_DF=state["w_DF"] - slope), {}

    device_mesh = mesh.Mesh(data=8, fsdp=1).make(axis_type=AxisType.Auto)
    with jax.set_mesh(device_mesh):
        batch = jax.device_put(jnp.ones((16, 4)), sharding(device_mesh, "B"))
        w_DF = jax.device_put(jnp.ones((4, 3)), sharding(device_mesh, ""))
        check = replay.Replay(step).check
        check(dict(w_DF=w_DF), batch, 0)
        with pytest.raises(replay.Corrupted) as error:
            check(dict(w_DF=altered(w_DF, 6)), batch, 0)
    assert error.value.devices == [device_mesh.devices.flat[6].id]


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_name_the_same_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = os.environ | dict(
        XLA_FLAGS="--xla_force_host_platform_device_count=2", EMU3_NUM_PROCESSES="2",
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", EMU3_INITIALIZATION_TIMEOUT="60",
    )  # fmt: skip
    children = [subprocess.Popen(
        [sys.executable, "-c", PROCESS], cwd=ROOT, env=environ | dict(EMU3_PROCESS_ID=str(index)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) for index in range(2)]  # fmt: skip
    try:
        told = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for out, err in told:
        assert re.search(r"found: step 2: odd differ between copies; at fault may be device \d+ "
                         rf"\(process 1, host {re.escape(HOST)}\)\n", out), err  # fmt: skip
