"""Compiled programs are counted right: FLOPs, kernels, bytes over the network, loops.

B batch  T query position  S key position  N heads  H head dim
"""

import re

import jax
import jax.numpy as jnp
import pytest

from emu3_jax import compile as compile_lib
from emu3_jax import hlo

DOT = 2 * 4 * 8 * 8  # f32[4,8] @ f32[8,8]
SIZE = 4 * 8 * 4  # bytes of f32[4,8]
COMPUTATIONS = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%a, %b)
}

%matmul (x.1: f32[4,8], w.1: f32[8,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %w.1 = f32[8,8]{1,0:T(8,128)} parameter(1)
  ROOT %dot.1 = f32[4,8]{1,0:T(8,128)} dot(%x.1, %w.1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%matmuls (x.2: f32[4,8], w.2: f32[8,8]) -> f32[4,8] {
  %x.2 = f32[4,8]{1,0} parameter(0)
  %w.2 = f32[8,8]{1,0} parameter(1)
  %y.2 = f32[4,8]{1,0} fusion(%x.2, %w.2), kind=kOutput, calls=%matmul
  ROOT %dot.2 = f32[4,8]{1,0} dot(f32[4,8]{1,0} %y.2, f32[8,8]{1,0} %w.2), \
lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def read(entry: str, *computations: str) -> hlo.Program:
    """Of a program on 8 devices whose entry computation has x f32[4,8] and w f32[8,8]."""
    return hlo.read(f"""HloModule jit_f, is_scheduled=true, num_partitions=8
{COMPUTATIONS}{"".join(computations)}
ENTRY %main (x: f32[4,8], w: f32[8,8]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  %w = f32[8,8]{{1,0}} parameter(1)
{entry}
}}
""")


def loop(name: str, work: str, limit="", step="constant(1)", test="compare(%i, %n), direction=LT",
         last="%i", kept="%n.0"):  # fmt: skip
    """Condition and body of a while over (i, x, w, n); `work` makes %y of %x and %w."""
    begin = """  %p = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}, /*index=3*/s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n.0 = s32[] get-tuple-element(%p), index=3
"""
    return f"""
%{name}.if (p: (s32[], f32[4,8], f32[8,8], s32[])) -> pred[] {{
{begin}  %n = s32[] {limit or "copy(%n.0)"}
  ROOT %go = pred[] {test}
}}

%{name}.do (p: (s32[], f32[4,8], f32[8,8], s32[])) -> (s32[], f32[4,8], f32[8,8], s32[]) {{
{begin}  %x = f32[4,8]{{1,0}} get-tuple-element(%p), index=1
  %w = f32[8,8]{{1,0}} get-tuple-element(%p), index=2
  %one = s32[] {step}
  %copy.1 = s32[] copy({last})
  %next = s32[] add(%copy.1, %one)
{work}
  ROOT %t = (s32[], f32[4,8], f32[8,8], s32[]) tuple(%next, %y, %w, {kept})
}}
"""


def run(name: str, start="constant(0)", limit="constant(5)", attributes="") -> str:
    return f"""  %{name}.start = s32[] {start}
  %{name}.limit = s32[] {limit}
  %{name}.t = (s32[], f32[4,8], f32[8,8], s32[]) tuple(%{name}.start, %x, %w, %{name}.limit)
  %{name} = (s32[], f32[4,8]{{1,0}}, f32[8,8]{{1,0}}, s32[]) while(%{name}.t), \
condition=%{name}.if, body=%{name}.do, metadata={{op_name="jit(f)/while"}}{attributes}
  %y = f32[4,8]{{1,0}} get-tuple-element(%{name}), index=1
"""


CALL = "  %y = f32[4,8]{1,0} fusion(%x, %w), kind=kOutput, calls=%matmul"
REDUCE = "  %y = f32[4,8]{1,0} all-reduce(%x), replica_groups={}, to_apply=%sum"


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.read("module @jit_f {\n}\n")


@pytest.mark.parametrize("how", ["fusion(%x, %w), kind=kOutput, calls=%matmuls",
                                 "call(%x, %w), to_apply=%matmuls"])  # fmt: skip
def test_dots_count_in_called_computations(how):
    assert read(f"  ROOT %y = f32[4,8]{{1,0}} {how}").matmul_flops == 2 * DOT


@pytest.mark.parametrize("branches", [
    "branch_computations={%matmul, %matmuls, %matmul}",
    "true_computation=%matmuls, false_computation=%matmul",
])  # fmt: skip
def test_the_largest_branch_counts(branches):
    assert read(f"  %y = f32[4,8] conditional(%x, %x, %w), {branches}").matmul_flops == 2 * DOT


@pytest.mark.parametrize(
    "turns, limit, step, test, start, passed, attributes",
    [
        # As noted, whatever the condition says; in new and in old syntax.
        (7, "", "constant(1)", "compare(%i, %n), direction=LT", "constant(0)", "add(%x, %x)",
         ', backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0"}}'),
        (7, "", "constant(1)", "compare(%i, %n), direction=LT", "constant(0)", "add(%x, %x)",
         ', backend_config="{\\"known_trip_count\\":{\\"n\\":\\"7\\"}}"'),
        # The limit in the condition, or passed in.
        (32, "constant(32)", "constant(1)", "compare(%i, %n), direction=LT", "constant(0)",
         "constant(1)", ""),
        (5, "", "constant(1)", "compare(%i, %n), direction=LT", "constant(0)", "constant(5)", ""),
        (6, "", "constant(1)", "compare(%n, %i), direction=GE", "constant(0)", "constant(5)", ""),
        (3, "constant(10)", "constant(3)", "compare(%i, %n), direction=LT", "constant(2)",
         "constant(1)", ""),
        (0, "constant(2)", "constant(1)", "compare(%i, %n), direction=LT", "constant(2)",
         "constant(1)", ""),
    ],
)  # fmt: skip
def test_loops_multiply(turns, limit, step, test, start, passed, attributes):
    program = read(run("loop", start, passed, attributes), loop("loop", CALL, limit, step, test))
    assert program.matmul_flops == turns * DOT
    assert program.unknown_loops == []


@pytest.mark.parametrize("start, parts", [
    ("parameter(2)", dict()),
    ("constant(0)", dict(step="multiply(%i, %i)")),
    ("constant(0)", dict(step="constant(0)")),
    ("constant(0)", dict(last="%n.0")),
    ("constant(0)", dict(kept="%next")),
    ("constant(0)", dict(test="compare(%i, %n), direction=NE")),
    ("constant(0)", dict(test="compare(%n.0, %n), direction=LT")),
    ("constant(0)", dict(test="and(%i, %n)")),
])  # fmt: skip
def test_a_loop_of_unknown_length_counts_once_and_is_named(start, parts):
    program = read(run("loop", start), loop("loop", CALL, **parts))
    assert program.matmul_flops == DOT
    assert program.unknown_loops == ["loop"]


def test_nested_loops_multiply_and_an_unknown_one_is_named_once():
    work = run("inner", limit="constant(3)") + "  %z = f32[4,8] fusion(%y, %w), calls=%matmul"
    program = read(run("outer"), loop("inner", CALL), loop("outer", work))
    assert program.matmul_flops == 5 * (3 + 1) * DOT
    work = run("inner", start="copy(%i)")
    program = read(run("outer"), loop("inner", CALL), loop("outer", work))
    assert (program.matmul_flops, program.unknown_loops) == (5 * DOT, ["inner"])


def test_a_condition_runs_once_more_than_its_body():
    kernel = '%{}.k = f32[4,8]{{1,0}} custom-call(%i), custom_call_target="tpu_custom_call"'
    condition = "constant(5)\n  " + kernel.format("if")
    program = read(run("loop"), loop("loop", CALL + "\n  " + kernel.format("do"), condition))
    assert program.kernels == {"do.k": 5, "if.k": 6}


def convolution(shapes: str, attributes: str) -> int:
    out, lhs, rhs = shapes.split()
    return read(f"""  %l = {lhs} parameter(2)
  %r = {rhs} parameter(3)
  %y = {out} convolution(%l, %r), {attributes}""").matmul_flops


@pytest.mark.parametrize("flops, shapes, attributes", [
    # What TPU makes of "bd,df->bf", and of weights and outputs with heads (Emu3-8B's own lines).
    (2 * 64 * 32 * 16, "f32[64,16] f32[64,32] f32[32,16]", "dim_labels=bf_io->bf"),
    (2 * 2 * 5120 * 4096 * 32 * 128, "bf16[2,5120,32,128] bf16[2,5120,4096,1] bf16[4096,32,128,1]",
     "window={size=1x32 pad=0_0x31_31 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f"),
    (2 * 2 * 5120 * 4096 * 8 * 128, "bf16[2,5120,4096,1] bf16[2,5120,8,128] bf16[4096,8,128,1]",
     "window={size=1x8}, dim_labels=0b1f_o1i0->0bf1"),
    (2 * 2 * 5120 * 4096 * 32 * 128, "f32[4096,32,128,1] bf16[2,5120,4096,1] bf16[2,5120,32,128]",
     "window={size=32x2 pad=31_31x0_0 rhs_reversal=1x0}, dim_labels=1fb0_1i0o->b0f1"),
    # "btnh,bsnh->bnts": both batch dimensions are spatial, with holes that leave one window each.
    (2 * 2 * 8 * 256 * 128 * 64, "bf16[2,8,256,128] bf16[2,256,8,64] bf16[2,128,8,64]",
     "window={size=2x8 stride=1x7 lhs_dilate=2x8}, dim_labels=0b1f_0o1i->01bf"),
    # Groups: 4 groups of 2 features that make 3 each; 4 groups of 5 rows for 6 outputs each.
    (2 * 5 * 12 * 2, "f32[5,12] f32[5,8] f32[2,12]", "dim_labels=bf_io->bf, feature_group_count=4"),
    (2 * 5 * 24 * 7, "f32[5,24] f32[20,7] f32[7,24]", "dim_labels=bf_io->bf, batch_group_count=4"),
    # 3 taps over 5 places with padding 1: 13 of 15 pairs. Over 3 places, dilated: 0, 2, 4 of 5.
    (2 * 13, "f32[1,5,1] f32[1,5,1] f32[3,1,1]",
     "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"),
    (2 * 7, "f32[1,5,1] f32[1,3,1] f32[3,1,1]",
     "window={size=3 pad=1_1 lhs_dilate=2}, dim_labels=b0f_0io->b0f"),
    # 2 taps, 3 apart, at 0, 2 and 4 of 6 places: the last tap falls off.
    (2 * 5, "f32[1,3,1] f32[1,6,1] f32[2,1,1]",
     "window={size=2 stride=2 pad=0_2 rhs_dilate=3}, dim_labels=b0f_0io->b0f"),
])  # fmt: skip
def test_convolutions_count_the_pairs_that_are_multiplied(flops, shapes, attributes):
    assert convolution(shapes, attributes) == flops


def test_a_cublas_call_counts_as_a_dot():
    text = """  %g = (f32[4,8]{1,0}, s8[4096]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}"""
    assert read(text).matmul_flops == DOT


def test_kernels_are_counted_by_name():
    work = "\n".join(
        f"  %{name} = f32[4,8]{{1,0}} custom-call(%x), "
        f'custom_call_target="{target}", metadata={{op_name="jit(f)/{op_name}"}}'
        for name, target, op_name in (
            ("y", "tpu_custom_call", "jvp()/while/body/shard_map/flash/pallas_call"),
            ("y.1", "mosaic_gpu_v2", "transpose(jvp(flash))/pallas_call"),
            ("y.2", "tpu_custom_call", "jvp()/while/body/closed_call/shard_map/pallas_call"),
            ("y.3", "Sharding", "jvp()/flash"),
        )
    )
    assert read(run("loop"), loop("loop", work)).kernels == {"flash": 10, "y.2": 5}


@pytest.mark.parametrize("n, groups", [
    (8, "{}"),
    (2, "{{0,1},{2,3},{4,5},{6,7}}"),
    (4, "[2,4]<=[8]"),
    (4, "[2,4]<=[4,2]T(1,0)"),
    (4, "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}"),
    (8, "mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}"),
    (4, "mesh['axis_0'=4,'axis_1'=2], device_ids=([4,2]<=[2,4]T(1,0)) {'axis_0':(2)2,'axis_1'}"),
    (1, "mesh['axis_0'=8] {}"),
])  # fmt: skip
@pytest.mark.parametrize("start", ["", "-start"])
def test_bytes_by_kind_and_group(n, groups, start):
    def received(kind, more=""):
        program = read(f"""  %y{start} = f32[4,8]{{1,0}} {kind}{start}(%x), channel_id=1, \
replica_groups={groups}, use_global_device_ids=true{more}
  %y.done = f32[4,8] {kind}-done(%y{start})""")
        assert list(program.collective_bytes) == [kind]
        return program.collective_bytes[kind]

    assert received("all-gather") == SIZE * n * (n - 1) / n
    assert received("reduce-scatter", ", dimensions={0}, to_apply=%sum") == SIZE * (n - 1) / n
    assert received("all-reduce", ", to_apply=%sum") == 2 * SIZE * (n - 1) / n
    assert received("all-to-all", ", dimensions={0}") == SIZE * (n - 1) / n
    assert received("collective-permute", ", source_target_pairs={{0,1},{1,0}}") == SIZE


def test_asynchronous_wrappers_count_once():
    wrapped = """
%wrapped (z: f32[4,8]) -> f32[1,8] {
  %z = f32[4,8]{1,0} parameter(0)
  ROOT %rs = f32[1,8]{1,0} reduce-scatter(%z), replica_groups=[2,4]<=[8], to_apply=%sum
}
"""
    text = """  %s = ((f32[4,8]{1,0}), f32[1,8]{1,0}, u32[]) async-start(%x), calls=%wrapped
  %u = ((f32[4,8]{1,0}), f32[1,8]{1,0}, u32[]) async-update(%s), calls=%wrapped
  %d = f32[1,8]{1,0} async-done(%u), calls=%wrapped"""
    assert read(text, wrapped).collective_bytes == {"reduce-scatter": SIZE * 3 / 4}


def test_an_async_collective_fusion_of_tpu_counts_once():
    gather = """
%{0} (p: f32[4,8]) -> f32[32,8] {{
  %p = f32[4,8]{{1,0}} parameter(0)
  %g = f32[32,8]{{1,0}} all-gather(%p), replica_groups={{}}, \
backend_config={{"async_collective_fusion_config":{{"flag_start":"-1","flag_end":"-1"}}}}
  ROOT %c = f32[32,8]{{1,0}} custom-call(%g), custom_call_target="{1}"
}}
"""
    text = "\n".join(f"  %{x} = f32[32,8] fusion(%x), kind=kCustom, calls=%{x}" for x in "abc")
    parts = zip("abc", ("AsyncCollectiveStart", "Other", "AsyncCollectiveDone"), strict=True)
    program = read(text, *(gather.format(*part) for part in parts))
    assert program.collective_bytes == {"all-gather": SIZE * 7}


SCATTER = """
%all-reduce-scatter (z: f32[4,8], at: s32[]) -> bf16[1,8] {
  %z = f32[4,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %r = (f32[4,8]{1,0}, f32[4,8]{1,0}) all-reduce(%z, %z), replica_groups={}, to_apply=%sum
  %e = f32[4,8]{1,0} get-tuple-element(%r), index=0
  %c = bf16[4,8]{1,0} convert(%e)
  %b = bf16[4,8]{1,0} bitcast(%c)
  ROOT %d = bf16[1,8]{1,0} dynamic-slice(%b, %at, %zero), dynamic_slice_sizes={1,8}
}
"""


def test_an_all_reduce_that_is_cut_in_its_own_fusion_is_a_reduce_scatter():
    text = "  %y = bf16[1,8]{1,0} fusion(%x, %x), kind=kCustom, calls=%all-reduce-scatter"
    program = read(text, SCATTER)
    assert program.collective_bytes == {"reduce-scatter": 2 * SIZE * 7 // 8}
    assert program.whole_all_reduces(0) == []
    # A call's computation runs as it stands: there the whole sum arrives before it is cut.
    program = read(text.replace("fusion(", "call("), SCATTER)
    assert program.collective_bytes == {"all-reduce": 2 * 2 * SIZE * 7 // 8}
    uncut = SCATTER.replace("dynamic-slice(%b", "dynamic-slice(%z")
    assert list(read(text, uncut).collective_bytes) == ["all-reduce"]


def test_what_comes_from_another_slice():
    """As in a sum over two slices by the TPU compiler: it passes through the host."""
    x = "f32[896,8,128]{2,1,0:T(8,128)}"
    host = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_%s"}'
    program = read(f"""  %s = ({x}, u32[], token[]) send(%x, %a), channel_id=2
  %r = ({x}, u32[], token[]) recv(%a), channel_id=1
  %s.1 = token[] send-done(%s), channel_id=2, {host % "megascale_runtime"}
  %r.1 = ({x}, token[]) recv-done(%r), {host % "megascale_runtime"}
  %r.2 = ({x}, token[]) recv-done(%r), {host % "python_callback"}
""")
    assert program.collective_bytes == {"between-slices": 4 * 896 * 8 * 128}


def test_whole_all_reduces_tell_how_often_how_large_and_what():
    work = """  %y = f32[4,8]{1,0} fusion(%x, %w), calls=%matmul, metadata={op_name="jit(f)/made"}
  %c = f32[4,8]{1,0} copy(%y)
  %s = f32[] constant(1)
  %both = (f32[4,8]{1,0}, f32[]) all-reduce(%c, %s), replica_groups={}, to_apply=%sum
  %own = bf16[4,8]{1,0} all-reduce(%x), to_apply=%sum, metadata={op_name="jit(f)/psum"}
  %alone = f32[4,8] all-reduce(%x), replica_groups={{0},{1}}, to_apply=%sum"""
    program = read(run("loop"), loop("loop", work))
    assert program.all_reduces == [(5, SIZE, "jit(f)/made"), (5, 4, ""), (5, SIZE, "jit(f)/psum")]
    assert program.whole_all_reduces(SIZE) == [(5, SIZE, "jit(f)/made"), (5, SIZE, "jit(f)/psum")]
    assert program.collective_bytes == {"all-reduce": 5 * 2 * (2 * SIZE + 4) * 7 // 8}
    program = read(run("loop"), loop("loop", REDUCE, test="compare(%i, %n), direction=LE"))
    assert program.all_reduces == [(6, SIZE, "")]


@pytest.mark.parametrize("size, dtype", [(32, "pred"), (16, "s4"), (32, "f8e4m3fn"), (64, "bf16"),
                                         (256, "c64"), (0, "token")])  # fmt: skip
def test_bytes_by_type(size, dtype):
    text = f"  %z = {dtype}[4,8] parameter(2)\n  %y = {dtype}[4,8] collective-permute(%z)"
    assert read(text).collective_bytes["collective-permute"] == size


def compiled(f, *shapes, sharding=None) -> str:
    arrays = [jax.ShapeDtypeStruct(s, "float32", sharding=sharding) for s in shapes]
    return jax.jit(f).lower(*arrays).compile().as_text()


def scanned(x, w, remat: bool):
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0].sum()


@pytest.mark.parametrize("remat, matmuls", [(False, 2 + 4), (True, 2 + 2 + 4)])
def test_a_scans_gradient_counts_its_forward_recomputed_and_backward_matmuls(remat, matmuls):
    text = compiled(jax.grad(lambda x, w: scanned(x, w, remat), (0, 1)), (64, 32), (5, 32, 32))
    assert hlo.read(text).matmul_flops == 5 * matmuls * 2 * 64 * 32 * 32
    unnoted, loops = re.subn(r'"known_trip_count":\{"n":"5"\}', '"nothing":{}', text)
    assert loops == 2
    assert hlo.read(unnoted) == hlo.read(text)


def test_a_batched_einsum_and_its_gradients():
    def scores(q, k):
        return jnp.einsum("btnh,bsnh->bnts", q, k)

    def both(q, k):
        return jax.vjp(scores, q, k)[1](jnp.sin(scores(q, k)))

    flops = hlo.read(compiled(both, (4, 64, 2, 16), (4, 32, 2, 16))).matmul_flops
    assert flops == 3 * 2 * (4 * 2) * 64 * 32 * 16


def test_a_while_loop_that_waits_for_data_is_unknown():
    program = hlo.read(compiled(
        lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x), (16, 16)
    ))  # fmt: skip
    assert program.matmul_flops == 2 * 16**3
    assert len(program.unknown_loops) == 1


def test_collectives_of_a_shard_map():
    """Of 8 pieces of 16 x 4 float32; each collective runs three times."""
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Explicit,))
    to_next = [(i, (i + 1) % 8) for i in range(8)]

    def turn(x, _):
        whole = jax.lax.all_gather(x, "x", tiled=True)
        x = x + jax.lax.psum_scatter(jnp.sin(whole), "x", tiled=True)
        x = x + jnp.cos(jax.lax.psum(x, "x"))
        return jax.lax.ppermute(jax.lax.all_to_all(x, "x", 0, 0, tiled=True), "x", to_next), None

    def turns(x):
        return jax.lax.scan(turn, x, None, length=3)[0]

    f = jax.shard_map(turns, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=False)
    program = hlo.read(compiled(f, (128, 4), sharding=jax.NamedSharding(mesh, jax.P("x"))))
    piece = 16 * 4 * 4
    assert program.collective_bytes == {
        "all-gather": 3 * piece * 7,
        "reduce-scatter": 3 * piece * 7,
        "all-reduce": 3 * 2 * piece * 7 // 8,
        "all-to-all": 3 * piece * 7 // 8,
        "collective-permute": 3 * piece,
    }
    assert [x[:2] for x in program.all_reduces] == [(3, piece)]


def test_what_the_tpu_compiler_makes_of_it():
    """Batched dots become convolutions, and the lengths of loops are not noted."""
    pytest.importorskip("libtpu", reason="libtpu has wheels for Linux on x86_64 only")
    B, T, S, N, H, L = 2, 256, 128, 8, 64, 3
    mesh = jax.make_mesh((4,), ("x",), devices=compile_lib.described("v5e:2x2"))

    def scores(q, k):
        return jnp.einsum("btnh,bsnh->bnts", q, k)

    def f(q, k, w):
        out = scores(q, k)
        dq, dk = jax.vjp(scores, q, k)[1](jnp.sin(out))
        w = jax.lax.all_gather(w, "x", tiled=True)
        x = jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), dq.reshape(-1, H), None, length=L)[0]
        return out, dk, x

    f = jax.shard_map(f, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=False)
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    text = compiled(f, (4 * B, T, N, H), (4 * B, S, N, H), (H, H), sharding=sharding)
    assert " convolution(" in text and " dot(" not in text and "known_trip_count" not in text
    program = hlo.read(text)
    assert program.matmul_flops == 3 * 2 * B * N * T * S * H + L * 2 * (B * T * N) * H * H
    assert program.collective_bytes == {"all-gather": H * H * 4 * 3 // 4}
    assert program.unknown_loops == []
