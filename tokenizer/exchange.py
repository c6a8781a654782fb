"""Whole models, decoder and vision tokenizer together, between PyTorch's layouts and ours.

    hf        one directory for transformers' AutoModelForImageTextToText, vision tokenizer included
    official  Emu3's own repositories: the decoder in TARGET, vision in TARGET/vision_tokenizer
    emu3_jax  runs that training goes on from: TARGET/decoder and TARGET/tokenizer

The source is recognised from its files: one of these, or a decoder or tokenizer alone.
"""

import dataclasses
import pathlib
import tempfile

from emu3_jax import checkpoint, convert, processor, release, train, untrusted
from emu3_jax import config as config_lib
from emu3_jax import vocab as vocab_lib
from emu3_jax.transformer import Transformer
from tokenizer import convert as vision_convert
from tokenizer import train as vision_train
from tokenizer import vq

EMU3_SIZE = 184_622
_VISION = "vision_tokenizer"  # beside an official decoder, as we write it
_RECORD = "conversion.json"


@dataclasses.dataclass
class Convert:
    """Job: reads `source`, writes `target` in `format`; a finished target is left alone.

    tokenizer   where the vision tokenizer is, if not with the source (any format)
    vocab       ranks file of the text, "emu3", "none", or "auto": Emu3's where the ids are Emu3's
    context     positions, and least and greatest area of an image in pixels, to publish for a model
    min_pixels  of our own format, which does not say
    max_pixels
    """

    source: str = ""
    target: str = ""
    format: str = "hf"
    tokenizer: str = ""
    vocab: str = "auto"
    context: int = 9216
    min_pixels: int = 512 * 512
    max_pixels: int = 1024 * 1024

    def run(self) -> None:
        """Converts, or says that it is done. ValueError for whatever is not as it should be."""
        if not self.source or not self.target:
            raise ValueError("give --config.source=DIR and --config.target=DIR")
        if self.format not in release.FORMATS:
            raise ValueError(f"no format {self.format!r}; use one of {', '.join(release.FORMATS)}")
        decoder, vision = find(self.source)
        vision = self.tokenizer or vision
        record = dict(
            source=str(pathlib.Path(self.source).absolute()),
            format=self.format,
            vocab=self.vocab,
            files=_stamp(decoder) + _stamp(vision),
        )
        target = pathlib.Path(self.target)
        if _is_done(target, record):
            print(f"{target}: converted (from {self.source})")
            return
        if self.format == "hf" and decoder and not vision:
            raise ValueError(
                f"{self.source} has no vision tokenizer, which the hf layout holds too; "
                "give --config.tokenizer=DIR"
            )
        target.mkdir(parents=True, exist_ok=True)
        processor.write_json(target / _RECORD, record | dict(complete=False))
        tokenizer = vision_convert.load(vision) if vision else None
        if decoder is None:
            save_vision(tokenizer, str(target), self.format)
        elif self.format == "emu3_jax":
            self._to_runs(decoder, tokenizer)
        else:
            self._publish(decoder, tokenizer)
        processor.write_json(target / _RECORD, record | dict(complete=True))
        print(f"{target}: {self.format} from {self.source}")

    def _to_runs(self, decoder: str, tokenizer: vq.VQ | None) -> None:
        with tempfile.TemporaryDirectory(dir=self.target) as scratch:
            model, params = convert.load(decoder, scratch)
            save_run(f"{self.target}/decoder", model, params, {})
        if tokenizer is not None:
            save_vision(tokenizer, f"{self.target}/tokenizer", "emu3_jax")

    def _publish(self, decoder: str, tokenizer: vq.VQ | None) -> None:
        vision = None
        if self.format == "hf" and tokenizer is not None:
            tensors = vision_convert.tensors(tokenizer, "hf")
            vision = convert.Vision(tensors, vision_convert.config_json(tokenizer.config, "hf"))
        if release.recognise(decoder) == "emu3_jax":
            model, params = convert.load(decoder)
            about = release.Release(
                context=self.context, min_pixels=self.min_pixels, max_pixels=self.max_pixels
            )
            words = self._vocab(model)
            convert.save(model, params, self.target, self.format, words, vision, about)
        else:
            words = self._vocab(release.describe(decoder)[0])
            convert.rewrite(decoder, self.target, self.format, words, vision)
        if self.format == "official" and tokenizer is not None:
            save_vision(tokenizer, f"{self.target}/{_VISION}", "official")

    def _vocab(self, model: Transformer) -> vocab_lib.Vocab | None:
        codes = model.vocab - model.first_visual
        emu3 = (model.vocab, codes) == (EMU3_SIZE, vocab_lib.EMU3_CODES)
        if self.vocab == "none" or (self.vocab == "auto" and not emu3):
            return None
        return vocab_lib.Vocab.load("emu3" if self.vocab == "auto" else self.vocab, codes)


def find(source: str) -> tuple[str | None, str | None]:
    """Returns the directories of the decoder and of the vision tokenizer that `source` stands for.

    One of them may be None. ValueError for a directory that is no known checkpoint.
    """
    root = pathlib.Path(source)
    if (root / "decoder" / "checkpoints").is_dir():
        vision = root / "tokenizer"
        return str(root / "decoder"), str(vision) if vision.is_dir() else None
    if _holds_vision_alone(root):
        return None, source
    layout = release.recognise(source)
    if layout == "hf":
        return source, source
    beside = root / _VISION
    return source, str(beside) if layout == "official" and beside.is_dir() else None


def save_vision(tokenizer: vq.VQ, path: str, layout: str) -> None:
    """Writes a vision tokenizer alone, in any format."""
    if layout != "emu3_jax":
        vision_convert.save(tokenizer, path, layout)
        return
    task = vision_train.TokenizerTask(tokenizer.config)
    params, stats = vq.split(tokenizer)
    save_run(path, task, params, task.variables(stats))


def save_run(run_dir: str, task, params, variables) -> None:
    """Writes weights as step 0 of a run, which `checkpoint.restore_model` reads."""
    config = train.Train(task=task, data=None, run_dir=run_dir, steps=0)
    with checkpoint.Checkpoints(run_dir) as saved:
        if there := saved.newest():
            print(f"{run_dir}: there already (step {there[0]})")
            return
        saved.save(0, dict(params=params, variables=variables), config, {}, wait=True)
    processor.write_json(pathlib.Path(run_dir) / "config.json", config_lib.to_json(config))


def _holds_vision_alone(root: pathlib.Path) -> bool:
    config = root / "config.json"
    if (root / "checkpoints").is_dir():
        # A run's config.json names the class of its task.
        return config.is_file() and b"TokenizerTask" in config.read_bytes()
    if not config.is_file():
        return False
    try:
        kind = untrusted.read_object(config).get("model_type")
    except ValueError:
        return False
    return kind in [*vision_convert.MODEL_TYPES] and kind != "emu3"  # which may be a list


def _stamp(path: str | None) -> list[str]:
    """Names, sizes and times of the files that a conversion reads."""
    if path is None:
        return []
    root = pathlib.Path(path)
    files = [*root.glob("*.safetensors"), *root.glob("config.json"), *root.glob("checkpoints/*")]
    return [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in sorted(files)]


def _is_done(target: pathlib.Path, record: dict) -> bool:
    """Whether `target` is this very conversion; ValueError where it must not be written over."""
    done = target / _RECORD
    if done.is_file():
        found = untrusted.read_object(done)
        if found == record | dict(complete=True):
            return True
        if found == record | dict(complete=False) or "emu3_jax" not in (
            found.get("format"),
            record["format"],
        ):
            return False
    elif not any(target.glob("*")):
        return False
    raise ValueError(f"{target} holds something else already; choose another --config.target")
