"""Encoding images: ours beside Hugging Face's Emu3VQVAE in PyTorch, on the same weights.

    python -m benchmarks.tokenizer_encode                  CPU, float32, 256 and 512 pixels
    python -m benchmarks.tokenizer_encode --platform=gpu   GPU, bfloat16 and float32, 512 pixels
    python -m benchmarks.tokenizer_encode --tiny           seconds, for tests

The tokenizer has Emu3's size and random weights, written by transformers and read by both sides.
Each side runs in processes of its own, in the order A B A B, on all cores; a process encodes one
batch to warm up (PyTorch on a CPU, which compiles nothing, a corner of it), then the batch for each
round. What counts is the median of all rounds, and the peak memory: of the process on a CPU, of the
device's arrays on a GPU. Prints one JSON line with both sides, their ratio and the share of equal
codes. It needs what tests need.
PyTorch's side passes every image four times through the 2-D layers, as a clip; ours once.

Legend: B images, H rows, W columns, C colours; h w the code grid.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

SIDES = ("jax", "torch")
CASES = {  # pixels, dtype, images a batch
    "cpu": ((256, "float32", 1), (512, "float32", 1)),
    "gpu": ((512, "bfloat16", 16), (512, "float32", 16)),
    "tiny": ((32, "float32", 2),),
}


def main(argv: list[str]) -> None:
    """Measures all cases and prints the JSON line; with --side it is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="of each of the two processes")
    parser.add_argument("--side", choices=("weights", *SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.side == "weights":
        write_weights(arguments.directory, arguments.tiny)
    elif arguments.side:
        print(json.dumps(measure(arguments)))
    else:
        cases = CASES["tiny" if arguments.tiny else arguments.platform]
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(compare(argv, cases, pathlib.Path(directory))))


def compare(argv: list[str], cases: tuple, directory: pathlib.Path) -> dict:
    """Runs the processes, and sets their figures side by side."""
    start(argv, directory, "weights")
    results = []
    for case in cases:
        runs = {side: [] for side in SIDES}
        for side in SIDES * 2:
            runs[side].append(start(argv, directory, side, case))
        speed = {side: images_per_second(case, runs[side]) for side in SIDES}
        codes = [np.load(directory / f"{side}.npy") for side in SIDES]
        results.append(
            {
                "pixels": case[0], "dtype": case[1], "batch": case[2],
                "images_per_second": speed,
                "ratio": round(speed["jax"] / speed["torch"], 2),
                "peak_gib": {s: max(run["peak_gib"] for run in runs[s]) for s in SIDES},
                "equal_codes": round(float((codes[0] == codes[1]).mean()), 5),
                "different_codes": len(np.unique(codes[0])),
            }
        )  # fmt: skip
    machine = {"device": runs["jax"][0]["device"], "cores": os.cpu_count()}
    return {"benchmark": "tokenizer_encode", **machine, "cases": results}


def start(argv: list[str], directory: pathlib.Path, side: str, case: tuple = ()) -> dict:
    """What one process has found; nothing of the one that writes the weights."""
    flags = [f"--side={side}", f"--directory={directory}", f"--case={json.dumps(case)}"]
    command = [sys.executable, "-m", "benchmarks.tokenizer_encode", *argv, *flags]
    environ = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ).stdout
    return json.loads(out.splitlines()[-1]) if case else {}


def images_per_second(case: tuple, runs: list[dict]) -> float:
    seconds = statistics.median([s for run in runs for s in run["seconds"]])
    return float(f"{case[2] / seconds:.4g}")


def write_weights(directory: pathlib.Path, tiny: bool) -> None:
    """A tokenizer with random weights as transformers saves it."""
    import torch
    import transformers

    from tests import reference

    config = transformers.Emu3VQVAEConfig(**(reference.VQ if tiny else {}))
    model = transformers.Emu3VQVAE(config)
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(reference.weights(name, tuple(tensor.shape))))
    model.save_pretrained(directory)


def measure(arguments: argparse.Namespace) -> dict:
    """Seconds a round and peak memory of one side; leaves its codes in the directory."""
    pixels, dtype, batch = arguments.case
    x_BHWC = np.random.default_rng(0).integers(0, 256, (batch, pixels, pixels, 3), np.uint8)
    sides = {"jax": jax_side, "torch": torch_side}
    encode, device, peak = sides[arguments.side](arguments, dtype, x_BHWC)
    seconds = []
    for _ in range(arguments.rounds):
        begin = time.perf_counter()
        codes_Bhw = encode()
        seconds.append(time.perf_counter() - begin)
    np.save(arguments.directory / f"{arguments.side}.npy", codes_Bhw)
    return {"seconds": seconds, "peak_gib": round(peak() / 2**30, 2), "device": device}


def jax_side(arguments: argparse.Namespace, dtype: str, x_BHWC: np.ndarray) -> tuple:
    """What encodes the batch, the device's name and what reads the peak memory in bytes."""
    if arguments.platform == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from data_pipelines import encoder
    from tokenizer import convert

    codes = x_BHWC[..., 0].size // 64
    tokenizer = encoder.Encoder(convert.load(arguments.directory, dtype), tokens=codes)
    device = jax.local_devices()[0]

    def encode() -> np.ndarray:
        return tokenizer.images(x_BHWC)()[:, 0]

    def peak() -> int:
        return device.memory_stats()["peak_bytes_in_use"]

    encode()
    on_cpu = device.platform == "cpu"
    return encode, device.device_kind, peak_of_process if on_cpu else peak


def torch_side(arguments: argparse.Namespace, dtype: str, x_BHWC: np.ndarray) -> tuple:
    """The same of PyTorch."""
    import torch
    import transformers

    device = "cuda" if arguments.platform == "gpu" else "cpu"
    torch.set_num_threads(os.cpu_count())
    model = transformers.Emu3VQVAE.from_pretrained(arguments.directory, dtype=dtype).to(device)
    x_BCHW = torch.from_numpy(x_BHWC).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
    sizes = torch.tensor([x_BCHW.shape[2:]] * len(x_BCHW))

    @torch.inference_mode()
    def encode(pixels: int = len(x_BHWC[0])) -> np.ndarray:
        tokens = model.encode(x_BCHW[:, :, :pixels, :pixels], sizes).image_tokens
        return torch.stack(tokens).cpu().numpy()

    encode(64 if device == "cpu" else len(x_BHWC[0]))
    return encode, device, torch.cuda.max_memory_allocated if device == "cuda" else peak_of_process


def peak_of_process() -> int:
    """Bytes, of the whole life of this process."""
    kibibytes = sys.platform != "darwin"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if kibibytes else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
