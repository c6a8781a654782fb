"""What a run needs, by compiling it: for devices that are here, and for TPUs that are not."""

import dataclasses
import functools
import json

import jax
import pytest

from benchmarks import compile_pods
from emu3_jax import chips, fit, hlo, launch, mesh, metrics, train
from emu3_jax import compile as compile_lib
from tests import toy

RUN = """
from emu3_jax import mesh, optim, train
from tests import toy


def get_config():
    return train.Train(
        toy.model(dropout=0.0), toy.Counting(), batch=8, steps=3, save_every=3, log_every=1,
        run_dir={run_dir!r}, mesh=mesh.Mesh(**{sizes}), optimizer=optim.AdamW(rate=0.02, warmup=1),
    )
"""


def config_file(tmp_path, **sizes) -> str:
    path = tmp_path / "run.py"
    path.write_text(RUN.format(run_dir=str(tmp_path / "run"), sizes=sizes))
    return str(path)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_report_of_this_machine(tmp_path, capsys):
    path = config_file(tmp_path, fsdp=2, context=2, tensor=2)
    compile_lib.Compile(train=path, topology="", set="batch=16 task.remat=full").run()
    report = last_line(capsys)
    model = toy.model()
    tokens, pairs = 16 * 16, 16 * 16 * 17 / 2
    layers = 2 * (2 * 16 * 4 * 8 + 2 * 16 * 2 * 8 + 3 * 16 * 24)
    assert model.flops(tokens, 0) == 6 * (layers + 16 * toy.VOCAB) * tokens
    assert model.flops(tokens, pairs) == model.flops(tokens, 0) + 12 * 2 * 4 * 8 * pairs
    assert report["devices"] == 8 and report["batch"] == 16 and report["remat"] == "full"
    assert report["mesh"] == dict(data=1, fsdp=2, context=2, tensor=2)
    assert report["fits"] is None  # nobody says how much memory a CPU's share is
    assert report["collective_gib_per_step"].keys() >= {"all-gather", "reduce-scatter"}
    assert report["argument_gib"] >= 0 and report["compile_seconds"] > 0
    assert {"topology", "peak_hbm_gib", "temp_gib", "model_tflops_per_step",
            "executed_matmul_tflops_per_step"} <= report.keys()  # fmt: skip


def test_an_executable_is_used_as_compiled(tmp_path, capsys, monkeypatch):
    path, saved = config_file(tmp_path, fsdp=8), tmp_path / "step"
    argv = [f"--config={path}"]
    job = compile_lib.Compile(train=path, topology="", save=str(saved))
    job.run()
    assert f"{saved}: " in capsys.readouterr().out
    assert launch.main(argv) == 0
    want = [record["loss"] for record in metrics.read(job.job().run_dir)]
    other = [f"--config.run_dir={tmp_path / 'other'}", f"--config.executable={saved}"]
    step_fn = train.Train.step_fn
    monkeypatch.setattr(train.Train, "step_fn", lambda job: _Shapes(step_fn(job)))
    assert launch.main(argv + other) == 0
    assert [record["loss"] for record in metrics.read(str(tmp_path / "other"))] == want


class _Shapes:
    """A step that only tells its shapes."""

    def __init__(self, step):
        self.step = step

    def __call__(self, state, batch, step):
        assert isinstance(batch["tokens"], jax.core.Tracer), "the step was compiled anew"
        return self.step(state, batch, step)


@pytest.mark.slow
def test_auto_takes_the_least_recomputation_that_fits(monkeypatch):
    """By the memory that each policy is measured to need."""
    run = train.Train(toy.model(remat="auto"), toy.Counting(length=64), batch=64)
    device_mesh = mesh.Mesh().make()
    needs = {}
    for policy in ("none", "full"):
        fixed = dataclasses.replace(run, task=toy.model(remat=policy))
        needs[policy] = fit.memory_needed(fit.fitting(fixed, device_mesh)[1])
    assert needs["full"] < needs["none"]
    for limit, policy in ((None, "none"), (needs["none"] + 1, "none"),
                          (needs["none"] - 1, "dots"), (1, "full")):  # fmt: skip
        monkeypatch.setattr(fit, "memory_limit", lambda *_, limit=limit: limit)
        job, compiled = fit.fitting(run, device_mesh)
        got = job.task.remat
        assert got == policy or (policy == "dots" and got in ("dots", "attention", "full")), limit


def test_a_run_settles_auto_by_itself(tmp_path, capsys):
    path = config_file(tmp_path, fsdp=8)
    assert launch.main([f"--config={path}", "--config.task.remat=auto"]) == 0
    assert f"{tmp_path / 'run'}: remat none" in capsys.readouterr().out


def test_what_does_not_fit_says_by_how_much_and_what_would(tmp_path, capsys, monkeypatch):
    path = config_file(tmp_path, fsdp=8)
    job = compile_lib.Compile(train=path, topology="", set="batch=64 task.remat=none")
    device_mesh = mesh.Mesh().make()
    half = dataclasses.replace(job, set="batch=32 task.remat=full").job()
    limit = fit.memory_needed(fit.fitting(half, device_mesh)[1]) + 1
    monkeypatch.setattr(compile_lib, "memory_limit", lambda *_: limit)
    job.run()
    out = capsys.readouterr().out
    assert "does not fit: " in out and "GiB too much with a margin of 10%" in out
    report = json.loads(out.splitlines()[-1])
    assert report["fits"] is False
    assert report["advice"] == "task.remat=full batch=32"
    assert 'it fits with --config.set="task.remat=full batch=32"' in out


@pytest.mark.parametrize("topology", ["v5p", "v9x:2x2", "v5e:2", "v5e:2x2x2x2", "3*:2x2"])
def test_a_topology_that_is_none(topology):
    with pytest.raises(ValueError) as error:
        compile_lib.described(topology)
    assert str(error.value).startswith(f"topology {topology!r} is not CHIP:SIZES as in v5e:16x16")


def test_compile_wants_a_training_run():
    with pytest.raises(ValueError, match="is a job Convert; Compile wants a Train"):
        compile_lib.Compile(train="configs/convert.py").run()


def test_chips_by_the_names_jax_gives():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    found = {kind: chips.chip(Device(kind)) for kind in (
        "TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite", "NVIDIA H100 80GB HBM3", "NVIDIA H200",
        "TPU v50", "cpu")}  # fmt: skip
    assert [chip and chip.flops / 1e12 for chip in found.values()] == [
        197, 459, 459, 918, 989, 989, None, None]  # fmt: skip


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="libtpu has wheels for Linux on x86_64 only")


def test_gradients_on_a_torus_are_reduce_scattered(libtpu, monkeypatch, tmp_path, capsys):
    """fsdp over both dimensions of a 4x4 slice: cut in two axes, and no matrix's gradient is
    summed whole anywhere, also where a device's piece has fewer columns than a register."""
    path = config_file(tmp_path, fsdp=-1)
    sizes = dict(width=1024, heads=4, kv_heads=2, head_dim=128, ffn=4096, vocab=8192)
    changes = [f"task.{key}={value}" for key, value in sizes.items()]
    changes += ["batch=16", "task.dtype=bfloat16", "task.remat=full", "task.loss_tile=4096"]
    devices = compile_lib.described("v5e:4x4")
    made = mesh.Mesh().make(devices)
    assert (made.shape["fsdp"], made.shape["fsdp_minor"]) == (4, 4)
    monkeypatch.setattr(toy.Counting, "length", 1024)
    compile_lib.Compile(train=path, topology="v5e:4x4", set=" ".join(changes)).run()
    report = last_line(capsys)
    assert report["fits"] and report["kernels"] == {"attention_forward": 4, "attention_backward": 2}
    received = report["collective_gib_per_step"]
    assert received["reduce-scatter"] > 100 * received["all-reduce"]
    assert report["largest_all_reduce_mib"] < 0.1  # norms: the smallest matrix has 8 MiB


def test_a_table_of_compilations_survives_a_failure(tmp_path, capsys, monkeypatch):
    path = config_file(tmp_path, fsdp=-1)
    rows = [compile_pods.Row(name, topology, "task.remat=full batch=16", path, 1.5)
            for name, topology in (("no slice", "v9x:2x2"), ("this machine", ""), ("absent", ""))]
    monkeypatch.setattr(compile_pods, "ROWS", rows)
    monkeypatch.setattr("sys.argv", ["compile_pods", "--only", "i"])  # "absent" has none
    compile_pods.main()
    *table, last = capsys.readouterr().out.splitlines()
    failed, good = json.loads(last)["rows"]
    assert "topology 'v9x:2x2' is not CHIP:SIZES" in failed["error"]
    assert good["batch"] == 16 and good["devices"] == 8 and "error" not in good
    assert [text.split(" | ")[0] for text in table[2:]] == ["| no slice", "| this machine"]
    assert {text.count("|") for text in table} == {table[0].count("|")}
    assert table[3].endswith(f"| {good['compile_seconds']} | 1.5 |")
    assert compile_pods.compiled(rows[1], 0.01) == dict(error="took longer than 0.01 s")


def test_slices_lie_along_data(libtpu):
    devices = compile_lib.described("2*v5e:2x2")
    made = mesh.Mesh(data=2).make(devices)
    for index in range(2):
        assert {device.slice_index for device in made.devices[index].flat} == {index}
    with pytest.raises(ValueError, match="data = 1 does not split over 2 slices"):
        mesh.Mesh(data=1).make(devices)


def test_only_a_gradients_pieces_cross_slices(libtpu):
    """Weights are gathered within a slice, not summed; gradients reduce-scattered there."""
    device_mesh = mesh.Mesh(data=2).make(compile_lib.described("2*v5p:4x4x4"))
    x_BTD, w_DF = (
        jax.ShapeDtypeStruct(shape, "bfloat16", sharding=mesh.sharding(device_mesh, dims))
        for shape, dims in (((128, 256, 1024), "BTD"), ((1024, 2048), "DF"))
    )
    y_BTF = jax.ShapeDtypeStruct((128, 256, 2048), "bfloat16", sharding=x_BTD.sharding)
    received = []
    with jax.set_mesh(device_mesh):
        for function, equation, *arrays in (
            (mesh.linear, "BTD,DF->BTF", x_BTD, w_DF),
            (mesh.weight_grad, "BTD,BTF->DF", x_BTD, y_BTF),
        ):
            compiled = jax.jit(functools.partial(function, equation)).lower(*arrays).compile()
            received.append(hlo.read(compiled.as_text()).collective_bytes)
    size = 1024 * 2048
    assert received == [
        {"all-gather": 2 * size * 63 // 64},
        {"reduce-scatter": 4 * size * 63 // 64, "between-slices": 4 * size // 64},
    ]


@pytest.mark.slow
def test_emu3_8b_stage_1_fits_64_chips(libtpu, capsys):
    job = compile_lib.Compile(set="task.remat=full")
    job.run()
    report = last_line(capsys)
    assert report["peak_hbm_gib"] <= 7.0
    assert report["largest_all_reduce_mib"] < 4096 * 14336 * 4 / 2**20 / 8
