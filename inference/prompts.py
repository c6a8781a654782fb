"""The prompt files of five benchmarks, as their authors publish them.

Each reader takes a path and gives the prompts in their order. Whatever is wrong with a file is a
ValueError that names it, and the line or entry.
"""

import dataclasses
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from emu3_jax import untrusted

MSCOCO = 30_000  # captions
FLICKERING = "temporal_flickering"  # a dimension of VBench, and the list of its prompts
FLICKERING_SAMPLES = 25


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, as it is given to the model.

    where     the file and line or entry that it is from
    index     its number in its file, from 0
    id        what its file is called by, where that is neither prompt nor index
    group     the folder of its files, ending with a slash, where there are several
    samples   how often it is drawn, where that is not as often as the others
    metadata  bytes that the scorer wants beside the files
    """

    text: str
    where: str
    index: int = 0
    id: str = ""
    group: str = ""
    samples: int = 0
    metadata: bytes = b""


def geneval(path: pathlib.Path) -> list[Prompt]:
    """GenEval's evaluation_metadata.jsonl: an object a line, with at least `prompt` and `tag`.

    A prompt's metadata is its line, byte for byte. Of its files the scorer looks at no other.
    """
    found = []
    for index, line in enumerate(_bytes(path).splitlines(keepends=True)):
        where = f"{path}, line {index + 1}"
        entry = _parsed(where, line)
        _check(where, entry, dict(prompt=untrusted.text, tag=untrusted.text))
        text = _filled(where, entry["prompt"])
        found.append(Prompt(text, where, index, metadata=line))
    return _some(path, found)


def t2i_compbench(path: pathlib.Path) -> list[Prompt]:
    """T2I-CompBench: a list of prompts, or a folder in which each *_val.txt is one, and a group.

    A prompt a line; of a line with tabs the part before the first, as in the benchmark's own
    GORS_finetune/inference_eval.py.
    """
    if not path.is_dir():
        return _t2i_list(path, "")
    lists = sorted(path.glob("*_val.txt"))
    return _some(path, [prompt for file in lists for prompt in _t2i_list(file, f"{file.stem}/")])


def _t2i_list(path: pathlib.Path, group: str) -> list[Prompt]:
    found = []
    for index, (where, line) in enumerate(_lines(path)):
        text = _filled(where, line.partition("\t")[0])
        found.append(Prompt(text, where, index, group=group))
    return _some(path, found)


def dpg(path: pathlib.Path) -> list[Prompt]:
    """DPG-Bench: a folder with a .txt a prompt, the name of which is the prompt's id."""
    if not path.is_dir():
        raise ValueError(f"{path} is no directory; give DPG-Bench's folder of prompts")
    files = sorted(path.glob("*.txt"))
    texts = [_filled(str(file), _text(file)).strip() for file in files]
    return _some(path, [Prompt(text, str(file), id=file.stem)
                        for file, text in zip(files, texts, strict=True)])  # fmt: skip


def mscoco(path: pathlib.Path) -> list[Prompt]:
    """MSCOCO: captions_val2014.json, or a list of objects with `caption` and `id` (or `image_id`).

    Of more than 30,000 captions as many are taken, at random, but always the same ones.
    """
    value = _parsed(str(path), _bytes(path))
    if isinstance(value, dict):
        _check(str(path), value, dict(annotations=_a_list))
        value = value["annotations"]
    elif not isinstance(value, list):
        raise ValueError(f"{path} holds {untrusted.short(value)}, want captions as MSCOCO has them")
    found = []
    for number, entry in enumerate(value, start=1):
        where = f"{path}, entry {number}"
        name = "id" if isinstance(entry, dict) and "id" in entry else "image_id"
        _check(where, entry, {"caption": untrusted.text, name: _a_number_or_word})
        text = _filled(where, entry["caption"]).strip()
        found.append(Prompt(text, where, id=str(entry[name])))
    if len(found) > MSCOCO:
        taken = sorted(random.Random(0).sample(range(len(found)), MSCOCO))
        found = [found[index] for index in taken]
    return _some(path, found)


def vbench(path: pathlib.Path) -> list[Prompt]:
    """VBench_full_info.json, or one of VBench's lists with a prompt a line.

    What two dimensions share is there twice, and drawn once. Prompts of the dimension (or the list)
    temporal_flickering are drawn 25 times: see prompts/README.md of the benchmark.
    """
    found: dict[str, Prompt] = {}
    for where, text, dimensions in _vbench(path):
        samples = FLICKERING_SAMPLES if FLICKERING in dimensions else 0
        if text not in found or samples:
            found[text] = Prompt(text, where, samples=samples)
    return _some(path, list(found.values()))


def _vbench(path: pathlib.Path) -> Iterator[tuple[str, str, list[str]]]:
    """(where it is from, prompt, dimensions) of each entry."""
    if path.suffix != ".json":
        for where, line in _lines(path):
            yield where, _filled(where, line).strip(), [path.stem]
        return
    value = _parsed(str(path), _bytes(path))
    if not isinstance(value, list):
        raise ValueError(f"{path} holds {untrusted.short(value)}, want VBench's list of objects")
    for number, entry in enumerate(value, start=1):
        where = f"{path}, entry {number}"
        _check(where, entry, dict(prompt_en=untrusted.text, dimension=_a_list))
        yield where, _filled(where, entry["prompt_en"]), entry["dimension"]


def _lines(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(FILE, line N; the line) of a text file, whatever ends its lines."""
    lines = _text(path).replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        yield f"{path}, line {number}", line


def _text(path: pathlib.Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 ({error.reason} at byte {error.start})") from None


def _bytes(path: pathlib.Path) -> bytes:
    try:
        if path.stat().st_size > untrusted.LARGEST_JSON:
            raise ValueError(f"{path} has more than {untrusted.LARGEST_JSON:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None


def _parsed(where: str, data: bytes) -> Any:
    try:
        return untrusted.parse(data)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {untrusted.first_line(error)}") from None


def _check(where: str, entry: Any, fields: dict[str, Callable[[Any], bool]]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {untrusted.short(entry)}, want an object")
    try:
        untrusted.check(entry, fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _filled(where: str, text: str) -> str:
    if not text.strip():
        raise ValueError(f"{where}: the prompt is empty")
    return text


def _some(path: pathlib.Path, found: list[Prompt]) -> list[Prompt]:
    if not found:
        raise ValueError(f"{path} holds no prompts")
    return found


def _a_list(value: Any) -> bool:
    return isinstance(value, list)


def _a_number_or_word(value: Any) -> bool:
    return untrusted.count(value) or (untrusted.text(value) and value != "")
