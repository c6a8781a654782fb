"""Guessing codes ahead: how many a pass decides, and what that gains, on the demo's decoder.

    python -m benchmarks.jacobi [--run runs/demo] [--images 8]

Draws images for captions of the demo, one at a time, with the released settings (guidance 3, top-k
2048) and greedily: one code a pass, and with windows of 4, 8 and 16 tokens. Each is drawn twice;
the second time counts. Prints one line of JSON a row: tokens a pass (ends of rows among them, where
one by one takes one pass for each code), and codes a second beside those of one by one.
"""

import argparse
import dataclasses
import json
import statistics
import time

from data_pipelines import image_folder
from emu3_jax.sampling import PRESETS
from inference.artist import Model, Picture

WINDOWS = (0, 4, 8, 16)
SAMPLINGS = dict(drawn=PRESETS["official"],
                 greedy=dataclasses.replace(PRESETS["greedy"], guidance=1.5))  # fmt: skip


def main() -> None:
    """Measures all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/demo")
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()
    run = options.run
    folder = image_folder.ImageFolder(f"{run}/images", "train.jsonl")
    captions = [folder.entry(i).caption for i in range(options.images)]
    usual = {}
    for window in WINDOWS:
        model = Model(f"{run}/tokenizer", f"{run}/decoder", f"{run}/vocab.tiktoken", window=window)
        with model.load() as artist:
            for name, sampling in SAMPLINGS.items():
                seconds, tokens = [], []
                for caption in captions:
                    picture = [Picture(caption, (8, 8))]
                    artist.draw(picture, sampling)
                    begun = time.perf_counter()
                    artist.draw(picture, sampling)
                    seconds.append(time.perf_counter() - begun)
                    if window:
                        tokens.append(artist.generator.tokens / artist.generator.passes)
                rate = 64 / statistics.median(seconds)
                usual.setdefault(name, rate)
                print(json.dumps(dict(
                    sampling=name, window=window, codes_per_second=round(rate, 1),
                    tokens_a_pass=round(statistics.mean(tokens), 2) if tokens else 1,
                    ratio=round(rate / usual[name], 2),
                )), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
