"""The 1B model's training step on one H100 or H200, beside Hugging Face's in PyTorch.

    python -m benchmarks.train_gpu [--packing images|short] [--kernel NAME] [--tiny]

Prints one JSON line. Both sides take the same step (configs/emu3_1b.py: forward, backward, norm
clip, AdamW) on the same 8 packed rows of 5,120 (benchmarks/packings.py; random ids), again and
again, from the same weights, which the first side hands to the second. Dropout and z-loss are off
and every real token weighs 1, because PyTorch's model knows no other; so `losses` of both sides
agree: those of the steps that warm up, and of the last one. Each side runs in a process of its own.

emu3_jax: weights and moments float32, products bfloat16; the remat policy that `auto` takes; the
    attention kernel that is usual there, or `--kernel` (see emu3_jax/attention.py).
pytorch: Emu3ForCausalLM, SDPA, torch.compile, fused AdamW; no remat; gradients of as many rows at a
    time as memory takes. Three choices, each with its figures:
    weights    "float32" under autocast to bfloat16: the same numbers as ours; "bfloat16": weights
               and moments too, half the memory of ours and less exact
    attention  "documents" by a boolean mask: the same function as ours; "causal": each row as one
               document, for which SDPA has its fastest kernel, and which attends where it must not

`mfu` counts the pairs of query and key that the packing leaves, `mfu_dense` each row as one causal
document, on both sides; `peak_gib` is what the framework's allocator says. What fails has an
`error`. Without such a GPU: one line, and exit code 2. `--tiny` runs all of it on a CPU at toy
size in float32, compiled by dynamo alone: a check of the script, whose times mean nothing.

B batch  T position in a row  S key position
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks.packings import packing
from configs import emu3_1b
from emu3_jax import chips, convert, mesh
from emu3_jax.attention import KERNELS, usual_kernel
from emu3_jax.fit import DoesNotFit, fitting, memory_limit, memory_needed
from emu3_jax.optim import AdamW
from emu3_jax.train import Train

GIB = 2**30
WARMUP, STEPS = 3, 10
PARTS = (1, 2, 4, 8)  # in how many parts our step takes the rows, where fewer do not fit
AT_A_TIME = (4, 2, 1)  # rows for PyTorch: the logits of 8 take 90 GB, forward and backward
OTHERS = (("float32", "documents"), ("bfloat16", "documents"), ("bfloat16", "causal"))
TINY = dict(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab=1000,
            first_visual=900, init_std=0.1, loss_tile=256, dtype="float32")  # fmt: skip


def main() -> None:
    """Prints the JSON line; exits with 2 without a Hopper GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packing", default="images", choices=("images", "short"))
    parser.add_argument("--kernel", default="", choices=("", *KERNELS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)  # one side, in its process
    flags = parser.parse_args()
    if flags.side:
        name, path, *choices = flags.side
        side = dict(emu3_jax=emu3_jax, pytorch=pytorch)[name]
        job = training(flags.tiny, flags.kernel)
        print(json.dumps(side(job, flags.packing, path, *choices)))
        return
    device = "a CPU" if flags.tiny else _hopper()
    job = training(flags.tiny, flags.kernel)
    work = _work(job, rows(job, flags.packing))
    with tempfile.TemporaryDirectory() as path:
        ours = _apart(flags, work, "emu3_jax", path)
        others = [_apart(flags, work, "pytorch", path, *choices) for choices in OTHERS]
    print(json.dumps(dict(
        benchmark="train_gpu", device=device, packing=flags.packing, **work,
        warmup=WARMUP, steps=STEPS, dropout=job.task.dropout, z_loss=job.task.z_loss,
        optimizer=dataclasses.asdict(job.optimizer), model=dataclasses.asdict(job.task),
        emu3_jax=ours, pytorch=others,
    )))  # fmt: skip


def training(tiny: bool, kernel: str = "") -> Train:
    """The run that is timed: the 1B model's, without what PyTorch's model does not know."""
    job = emu3_1b.get_config()
    sizes = TINY if tiny else {}
    return dataclasses.replace(
        job,
        task=dataclasses.replace(job.task, dropout=0.0, z_loss=0.0, kernel=kernel, **sizes),
        data=dataclasses.replace(job.data, length=256 if tiny else job.data.length),
        optimizer=AdamW(rate=1e-3 if tiny else job.optimizer.rate, warmup=0),
    )


def rows(job: Train, name: str) -> dict[str, np.ndarray]:
    """A batch [B, T] of random ids in a packing, each row another one."""
    pairs = [packing(name, job.data.length, seed) for seed in range(job.batch)]
    segments_BT, positions_BT = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    ids = np.random.default_rng(0).integers(0, job.task.vocab, (job.batch, job.data.length + 1))
    ids = ids.astype(np.int32)
    return dict(tokens=ids[:, :-1], targets=ids[:, 1:], segments=segments_BT,
                positions=positions_BT, weights=(segments_BT > 0).astype(np.float32))  # fmt: skip


def emu3_jax(job: Train, name: str, path: str) -> dict:
    """Times our step; writes the weights it starts from to `path`."""
    device_mesh = job.mesh.make(jax.devices()[:1], job.task.axis_type)
    job, step_fn = _fitting(job, device_mesh)
    with jax.set_mesh(device_mesh):
        state = job.make()(job.seed)
        convert.save(job.task, state["params"], path, layout="official")
        layout = mesh.sharding(device_mesh, "BT")
        batch = {key: jax.device_put(x, layout) for key, x in rows(job, name).items()}
        at = jax.device_put(np.int32(0), mesh.sharding(device_mesh, ""))

        def update():
            nonlocal state
            state, values = step_fn(state, batch, at)
            return values["loss"]

        figures = _timed(update)
    used = device_mesh.devices.flat[0].memory_stats()  # None on a CPU
    return figures | dict(
        jax=jax.__version__, remat=job.task.remat, kernel=_kernel(job, device_mesh),
        rows_at_a_time=job.batch // job.accumulate,
        peak_gib=used and used["peak_bytes_in_use"] / GIB,
        compiled_gib=memory_needed(step_fn) / GIB,
    )  # fmt: skip


def _kernel(job: Train, device_mesh) -> str:
    """What computes attention in our step."""
    asked = dict(dtype=job.task.dtype, head_dim=job.task.head_dim, length=job.data.length,
                 ring=False, dropout=0.0, with_lse=False)  # fmt: skip
    return job.task.kernel or usual_kernel(device_mesh.abstract_mesh.abstract_device, **asked)


def _fitting(job: Train, device_mesh) -> tuple[Train, object]:
    """(job, its compiled step) in the fewest parts that fit the device."""
    limit = memory_limit(device_mesh.devices.flat[0], job.margin)
    for parts in PARTS:
        try:
            found = fitting(dataclasses.replace(job, accumulate=parts), device_mesh)
        except DoesNotFit:
            continue
        if limit is None or memory_needed(found[1]) <= limit:
            return found
    raise DoesNotFit("a single row does not fit; take a larger GPU")


def pytorch(job: Train, name: str, path: str, weights: str, attention: str) -> dict:
    """Times PyTorch's step from the weights in `path`, with as many rows at a time as fit."""
    import torch
    import transformers

    tried = {}
    for count in AT_A_TIME:
        try:
            figures = _timed(_pytorch_update(job, rows(job, name), path, weights, attention, count))
        except torch.OutOfMemoryError as error:
            tried[count] = " ".join(str(error).split())[:100]
            torch.cuda.empty_cache()
            continue
        used = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
        return figures | dict(
            torch=torch.__version__, transformers=transformers.__version__, weights=weights,
            attention=attention, rows_at_a_time=count, peak_gib=used, did_not_fit=tried,
        )  # fmt: skip
    raise DoesNotFit(f"a single row does not fit: {tried}")


def _pytorch_update(job: Train, batch, path: str, weights: str, attention: str, count: int):
    """A function that takes one step and returns its loss, not waited for."""
    import torch

    device, backend = "cpu", "eager"
    if torch.cuda.is_available():
        device, backend = "cuda", "inductor"
    model = _pytorch_model(job, path, device, getattr(torch, weights))
    compiled = torch.compile(model, backend=backend, dynamic=False)
    matrices, norms = ([p for p in model.parameters() if (p.ndim > 1) == big] for big in (1, 0))
    optim = job.optimizer
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=optim.weight_decay),
         dict(params=norms, weight_decay=0.0)],
        lr=optim.rate, betas=(optim.b1, optim.b2), eps=optim.eps, fused=True,
    )  # fmt: skip
    parts = [
        _pytorch_inputs({key: x[i : i + count] for key, x in batch.items()}, device, attention)
        for i in range(0, job.batch, count)
    ]
    total = int((batch["segments"] > 0).sum())
    mixed = torch.autocast(device, torch.bfloat16, enabled=job.task.dtype == "bfloat16")

    def update():
        sum_ = 0
        for part in parts:
            with mixed:
                loss = compiled(**part, num_items_in_batch=total, use_cache=False).loss
            loss.backward()
            sum_ += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        return sum_

    return update


def _pytorch_model(job: Train, path: str, device: str, dtype):
    import torch
    import transformers
    from safetensors.torch import load_file

    task = job.task
    config = transformers.Emu3TextConfig(
        vocab_size=task.vocab, hidden_size=task.width, intermediate_size=task.ffn,
        num_hidden_layers=task.layers, num_attention_heads=task.heads,
        num_key_value_heads=task.kv_heads, max_position_embeddings=job.data.length,
        rms_norm_eps=task.norm_eps, attention_dropout=0.0, pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=task.rope_theta),
    )  # fmt: skip
    with torch.device(device):
        model = transformers.Emu3ForCausalLM._from_config(config, attn_implementation="sdpa")
    model.model.embed_tokens.padding_idx = None  # it would have no gradient
    found = {}
    for file in pathlib.Path(path).glob("*.safetensors"):
        found |= load_file(file)
    model.load_state_dict(found)
    for parameter in model.parameters():  # not the rotary frequencies, which bfloat16 would ruin
        parameter.data = parameter.data.to(dtype)
    return model.train()


def _pytorch_inputs(batch: dict, device: str, attention: str) -> dict:
    import torch

    put = {key: torch.tensor(x, device=device) for key, x in batch.items()}
    seg_BT, pos_BT = put["segments"], put["positions"]
    labels_BT = torch.where(seg_BT > 0, put["targets"], -100).long()
    inputs = dict(input_ids=put["tokens"].long(), labels=labels_BT, shift_labels=labels_BT)
    if attention == "causal":
        return inputs
    seen_BTS = (seg_BT[:, :, None] == seg_BT[:, None]) & (pos_BT[:, None] <= pos_BT[:, :, None])
    return inputs | dict(attention_mask=seen_BTS[:, None], position_ids=pos_BT.long())


def _timed(update) -> dict:
    """Seconds of a step, many in a row, after those that compile and warm up."""
    losses = [float(update()) for _ in range(WARMUP)]
    start = time.perf_counter()
    for _ in range(STEPS):
        loss = update()
    losses.append(float(loss))  # waits for the device, which takes the steps in order
    seconds = (time.perf_counter() - start) / STEPS
    return dict(seconds_per_step=seconds, losses=losses)


def _work(job: Train, batch: dict) -> dict:
    """What a step is: tokens that are no padding, and FLOPs (see Transformer.counts)."""
    here_BT = batch["segments"] > 0
    tokens = int(here_BT.sum())
    pairs = int((batch["positions"] + 1)[here_BT].sum())
    return dict(batch=job.batch, length=job.data.length, tokens=tokens,
                flops=job.task.flops(tokens, pairs),
                flops_dense=job.task.dense(job.batch, job.data.length))  # fmt: skip


def _apart(flags, work: dict, *side: str) -> dict:
    """A side's figures, from a process of its own; an `error` if that fails."""
    again = [f"--packing={flags.packing}", f"--kernel={flags.kernel}", *["--tiny"] * flags.tiny]
    environ = os.environ | dict(XLA_PYTHON_CLIENT_MEM_FRACTION="0.95")  # JAX's own is 0.75
    environ |= dict(JAX_PLATFORMS="cuda")
    if flags.tiny:
        environ |= dict(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-m", "benchmarks.train_gpu", *again, "--side", *side],
                          capture_output=True, text=True, env=environ)  # fmt: skip
    if done.returncode:
        return dict(choices=side[2:], error=done.stderr.strip()[-300:])
    figures = json.loads(done.stdout.splitlines()[-1])
    seconds = figures["seconds_per_step"]
    figures["tokens_per_second"] = round(work["tokens"] / seconds, 1)
    for flops, mfu in (("flops", "mfu"), ("flops_dense", "mfu_dense")):
        peak = chips.CHIPS["NVIDIA H200"].flops  # the H100's too
        figures[mfu] = None if flags.tiny else round(work[flops] / seconds / peak, 4)
    return figures


def _hopper() -> str:
    """The GPU's name; exits with 2 if it is no Hopper."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    if name == "a CPU" or torch.cuda.get_device_capability()[0] != 9:
        print(f"needs a Hopper GPU (compute capability 9.0); this is {name}", file=sys.stderr)
        sys.exit(2)
    return name


if __name__ == "__main__":
    main()
