"""The text files beside published weights: tokenizer, processor, chat template, vocabulary map.

What transformers' Emu3Processor reads. Unlike the released -hf repositories, tokenizer.json cuts
text as Emu3 itself does (Qwen's rule and NFC, not GPT-2's rule), so ids agree with ours.
"""

import json
import pathlib
from typing import Any

from emu3_jax import bpe, vocab

# The names under which Emu3Processor looks for controls; <|extra_0|> is its image placeholder.
PLACEHOLDER = "<image>"
_NAMED = dict(
    bos_token="<|extra_203|>",
    eos_token="<|extra_204|>",
    pad_token="<|endoftext|>",
    image_token=PLACEHOLDER,
    boi_token="<|image start|>",
    eoi_token="<|image end|>",
    image_wrapper_token="<|image token|>",
    eof_token="<|extra_201|>",
)
# Emu3-Chat's prompt; the processor puts BOS in front and the image's codes for <image>.
CHAT_TEMPLATE = (
    "{{ 'You are a helpful assistant. ' }}{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '. ' if message['role'] == 'user' else '<|extra_204|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vocabulary_map(ids: vocab.Ids) -> dict[str, int]:
    """Returns string -> id of every special that Emu3Config's vocabulary_map is read for."""
    named = {
        "<|endoftext|>": ids.pad,
        PLACEHOLDER: ids.pad + 3,
        "<|extra_200|>": ids.eol,
        "<|extra_201|>": ids.eof,
        "<|extra_203|>": ids.bos,
        "<|extra_204|>": ids.eos,
        "<|image token|>": ids.img,
        "<|image start|>": ids.boi,
        "<|image end|>": ids.eoi,
    }
    first = len(vocab.special_names(0))
    visual = vocab.special_names(ids.codes)[first:]
    return named | {name: ids.visual + code for code, name in enumerate(visual)}


def write_tokenizer(words: vocab.Vocab, path: pathlib.Path, layout: str) -> None:
    """Writes the text tokenizer: tokenizer.json (hf), or the ranks and visual names (official)."""
    if layout == "official":
        bpe.save(words.ranks, path / "emu3.tiktoken")
        first = len(vocab.special_names(0)) - 3
        (path / "emu3_vision_tokens.txt").write_text("\n".join(words.names[first:]) + "\n")
        config = dict(
            auto_map=dict(AutoTokenizer=["tokenization_emu3.Emu3Tokenizer", None]),
            tokenizer_class="Emu3Tokenizer",
        )
        named = {name: _NAMED[name] for name in ("bos_token", "eos_token", "pad_token")}
        write_json(path / "tokenizer_config.json", config | named)
        return
    write_json(path / "tokenizer.json", _tokenizer(words))
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        processor_class="Emu3Processor",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={k: v for k, v in _NAMED.items() if k not in _STANDARD},
        **{name: _NAMED[name] for name in _STANDARD},
    )
    write_json(path / "tokenizer_config.json", config)


def write_processor(path: pathlib.Path, min_pixels: int, max_pixels: int, factor: int) -> None:
    """Writes the image processor's settings, the processor's and the chat template.

    Pixels end up in [-1, 1], sides in multiples of `factor`, areas between the two bounds.
    """
    images = dict(
        image_processor_type="Emu3ImageProcessor",
        processor_class="Emu3Processor",
        do_convert_rgb=True,
        do_normalize=True,
        do_pad=True,
        do_rescale=True,
        do_resize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        resample=3,
        rescale_factor=1 / 255,
        spatial_factor=factor,
    )
    write_json(path / "preprocessor_config.json", images)
    write_json(path / "processor_config.json", dict(processor_class="Emu3Processor"))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_STANDARD = ("bos_token", "eos_token", "pad_token")


def _tokenizer(words: vocab.Vocab) -> dict[str, Any]:
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    cut = dict(type="Split", pattern=dict(Regex=bpe.SPLIT), behavior="Isolated", invert=False)
    model = dict(
        type="BPE",
        dropout=None,
        unk_token=None,
        continuing_subword_prefix=None,
        end_of_word_suffix=None,
        fuse_unk=False,
        byte_fallback=False,
        ignore_merges=True,  # as tiktoken: a piece that is a token as a whole is that token
        vocab={spelled(token): rank for token, rank in words.ranks.items()},
        merges=[[spelled(left), spelled(right)] for left, right in bpe.merges(words.ranks)],
    )
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[_added(words.text_size + i, name) for i, name in enumerate(words.names)],
        normalizer=dict(type="NFC"),
        pre_tokenizer=dict(type="Sequence", pretokenizers=[cut, byte_level]),
        post_processor=None,
        decoder=byte_level,
        model=model,
    )


def _added(i: int, name: str) -> dict[str, Any]:
    return dict(
        id=i,
        content=PLACEHOLDER if name == "<|extra_0|>" else name,
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=False,
        special=True,
    )


def _letters() -> list[str]:
    """How byte-level tokenizers spell a byte: as itself if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
