"""Drawing images: our sampler beside transformers' `generate`, on the same weights.

    python -m benchmarks.generate                              CPU, float32, a 300M model
    python -m benchmarks.generate --platform=gpu --size=8b --side-length=90 --before=45
                                                               GPU, bfloat16, 90x90 codes
    python -m benchmarks.generate --tiny                       seconds, for tests

The decoder has random weights, written by transformers and read by both sides. Both draw with
guidance 3 and top-k 2048 under the grid's grammar; transformers' side has a static cache and two
passes a token, with and without the prompt, as in Emu3's own code. Drawing all of an image would
take an hour on a CPU, so a few rows in its middle are timed: the prompt is a caption and as many
tokens as half an image has, and the first row, with which a side compiles, does not count. Each
side runs in a process of its own, in the order A B A B; what counts is the median. Prints one JSON
line: tokens a second of both (ends of rows among them) and their ratio.

B batch  T position
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

SIDES = ("jax", "torch")
SIZES = dict(  # layers, width, heads, kv_heads, ffn as in configs/emu3_8b_stage1.py
    tiny=(2, 256, 2, 1, 512), **{"300m": (24, 1024, 8, 2, 3584), "8b": (32, 4096, 32, 8, 14336)}
)
TEXT, VOCAB = 151_643, 184_622


def main(argv: list[str]) -> None:
    """Measures all batches and prints the JSON line; with --side it is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default="300m")
    parser.add_argument("--side-length", type=int, default=64, help="codes along an image's side")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--before", type=int, default=32, help="rows drawn already")
    parser.add_argument("--rows", type=int, default=2, help="of codes that are timed")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--side", choices=("weights", *SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.tiny:
        options.size, options.side_length, options.batches = "tiny", 6, [2]
        options.before, options.rows = 3, 1
    if options.side == "weights":
        write_weights(options)
    elif options.side:
        measure = by_jax if options.side == "jax" else by_torch
        print(json.dumps(measure(options)))
    else:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(compare(argv, options, directory)))


def compare(argv: list[str], options, directory: str) -> dict:
    """Runs the processes, and sets their figures side by side."""
    start(argv, directory, "weights")
    cases = []
    for batch in options.batches:
        runs = {side: [] for side in SIDES}
        for side in SIDES * 2:
            runs[side].append(start(argv, directory, side, batch))
        speed = {side: round(statistics.median(found), 2) for side, found in runs.items()}
        cases.append(dict(batch=batch, tokens_per_second=speed,
                          ratio=round(speed["jax"] / speed["torch"], 2), runs=runs))  # fmt: skip
        print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    kept = {name: getattr(options, name) for name in ("size", "side_length", "before", "platform")}
    return dict(benchmark="generate", **kept, cores=os.cpu_count(), cases=cases)


def start(argv: list[str], directory: str, side: str, batch: int = 0) -> float | None:
    """What one process has found; nothing of the one that writes the weights."""
    flags = [f"--side={side}", f"--directory={directory}", f"--batch={batch}"]
    command = [sys.executable, "-m", "benchmarks.generate", *argv, *flags]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1]) if batch else None


def write_weights(options) -> None:
    """A model of the size, as transformers saves it, with a tiny tokenizer."""
    import torch
    import transformers

    from emu3_jax import processor, vocab
    from tests import reference

    layers, width, heads, kv_heads, ffn = SIZES[options.size]
    text = transformers.Emu3TextConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32_768,
        rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=1e6),
        tie_word_embeddings=False,
    )  # fmt: skip
    config = transformers.Emu3Config(
        vq_config=transformers.Emu3VQVAEConfig(**reference.VQ), text_config=text,
        vocabulary_map=processor.vocabulary_map(vocab.special_ids(TEXT, vocab.EMU3_CODES)),
    )  # fmt: skip
    dtype = torch.float32 if options.platform == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = transformers.Emu3ForConditionalGeneration._from_config(config, dtype=dtype)
    model.save_pretrained(options.directory)


def prompts(options, ids) -> tuple[list[list[int]], list[int]]:
    """A prompt a row and the other branch's: as long as a caption and what is drawn before."""
    length = 50 + options.before * (options.side_length + 1)
    text_BT = np.random.default_rng(0).integers(0, 150_000, (options.batch + 1, length))
    found = [[ids.bos, *map(int, text_T), ids.boi, ids.img] for text_T in text_BT]
    return found[:-1], found[-1]


class Clock:
    """Is told when a row of codes is drawn, and stops the drawing when enough are timed."""

    def __init__(self, options):
        self.rows, self.tokens = options.rows, options.batch * (options.side_length + 1)
        self.times = []

    def tick(self) -> bool:
        """Whether all rows are timed."""
        self.times.append(time.perf_counter())
        return len(self.times) > self.rows

    def rate(self) -> float:
        """Tokens a second of all images together."""
        return self.tokens * self.rows / (self.times[self.rows] - self.times[0])


def by_jax(options) -> float:
    """Our sampler."""
    import jax

    from emu3_jax import convert, generate, mesh, vocab
    from emu3_jax.sampling import Sampling

    ids = vocab.special_ids(TEXT, vocab.EMU3_CODES)
    asked, null = prompts(options, ids)
    with jax.set_mesh(mesh.Mesh(fsdp=1).make(jax.devices()[:1])):
        model, params = convert.load(str(options.directory))
        generator = generate.Generator(model, params, ids, TEXT)
        del params
        clock, side = Clock(options), options.side_length
        size = 1, side - options.before, side

        def watch(drawn_RT, _) -> None:
            if drawn_RT.shape[1] >= side and clock.tick():
                raise StopIteration

        with contextlib.suppress(StopIteration):
            requests = [generate.Request(prompt, null, size) for prompt in asked]
            generator.codes(requests, Sampling(), watch)
        return clock.rate()


def by_torch(options) -> float:
    """transformers' generate, with Emu3's rule of what may follow."""
    import torch
    import transformers

    from emu3_jax import vocab

    ids = vocab.special_ids(TEXT, vocab.EMU3_CODES)
    asked, null = prompts(options, ids)
    device = "cpu" if options.platform == "cpu" else "cuda"
    model = transformers.Emu3ForConditionalGeneration.from_pretrained(
        options.directory, dtype="auto"
    ).to(device)
    side, codes = options.side_length, list(range(ids.visual, ids.visual + ids.codes))
    prompt_BT = torch.tensor(asked, device=device)
    null_BT = torch.tensor([null] * options.batch, device=device)

    def allowed(_, tokens_T) -> list[int]:
        behind = len(tokens_T) - prompt_BT.shape[1] + 1
        return [ids.eol] if behind % (side + 1) == 0 else codes

    clock, count = Clock(options), (side - options.before) * (side + 1)

    def stop(tokens_BT, _, **__):
        drawn = tokens_BT.shape[1] - prompt_BT.shape[1]
        done = drawn % (side + 1) == 0 and clock.tick()
        return torch.full((len(tokens_BT),), done, device=device)

    with torch.no_grad():
        model.generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=True, top_k=2048,
            max_new_tokens=count, min_new_tokens=count, guidance_scale=3.0,
            negative_prompt_ids=null_BT, negative_prompt_attention_mask=torch.ones_like(null_BT),
            prefix_allowed_tokens_fn=allowed, cache_implementation="static",
            stopping_criteria=[stop], pad_token_id=ids.pad, eos_token_id=ids.eos,
        )  # fmt: skip
    return clock.rate()


if __name__ == "__main__":
    main(sys.argv[1:])
