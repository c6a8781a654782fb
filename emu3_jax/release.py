"""What Emu3's published directories say beside the weights: config.json of both layouts.

official: Emu3ForCausalLM, model_type Emu3. hf: Emu3ForConditionalGeneration, model_type emu3, with
the decoder's settings under text_config and the vision tokenizer's under vq_config.
"""

import dataclasses
import pathlib
from typing import Any

from emu3_jax import processor, shards, untrusted
from emu3_jax import vocab as vocab_lib
from emu3_jax.transformer import Transformer

FORMATS = ("official", "hf", "emu3_jax")
_TYPES = {"Emu3": "official", "emu3": "hf"}
_VISUAL = "<|visual token "
_CONTROLS = ("pad", "bos", "eos", "eol", "eof", "img", "boi", "eoi")
_HF_NAMES = dict(
    eol="<|extra_200|>",
    eof="<|extra_201|>",
    img="<|image token|>",
    boi="<|image start|>",
    eoi="<|image end|>",
)


@dataclasses.dataclass
class Release:
    """What a published directory says beside the weights; the defaults are Emu3-Gen's.

    `context` in tokens, the others in pixels: the area of generated images and the least and
    greatest area an image is resized to. `ids` None stands for Emu3's order of special ids.
    """

    context: int = 9216
    image_area: int = 720 * 720
    min_pixels: int = 512 * 512
    max_pixels: int = 1024 * 1024
    ids: vocab_lib.Ids | None = None


def recognise(path: str) -> str:
    """Returns the format of a directory, one of FORMATS, from the files in it; else ValueError."""
    root = pathlib.Path(path)
    if (root / "checkpoints").is_dir():
        return "emu3_jax"
    if not (root / "config.json").is_file() or not shards.is_there(root):
        raise ValueError(
            f"{path} is no known checkpoint: it has neither config.json beside *.safetensors "
            "(official, hf) nor checkpoints/ (emu3_jax)"
        )
    kind = untrusted.read_object(root / "config.json").get("model_type")
    if kind not in [*_TYPES]:  # which need not be hashable
        raise ValueError(
            f"{path} is no Emu3 decoder: its config.json says model_type {untrusted.short(kind)}, "
            "expected 'Emu3' (official) or 'emu3' (hf)"
        )
    return _TYPES[kind]


def describe(path: str) -> tuple[Transformer, Release]:
    """Returns what config.json of an official or hf directory says; ValueError if not an Emu3."""
    root = pathlib.Path(path)
    layout, config = recognise(path), untrusted.read_object(root / "config.json")
    images = root / "preprocessor_config.json"
    pixels = {**_PIXELS, **(untrusted.read_object(images) if images.is_file() else {})}
    if layout == "hf":
        config = {"text_config": {}, "vocabulary_map": {}, **config}
        objects = dict.fromkeys(("text_config", "vocabulary_map"), untrusted.mapping)
        _check_kinds(path, config, objects)
    text = {**_TEXT_DEFAULTS, **(config["text_config"] if layout == "hf" else config)}
    _check_text(path, text)
    _check_kinds(path, pixels, dict.fromkeys(_PIXELS, untrusted.size))
    hf = layout == "hf"
    ids = _hf_ids(path, text, config["vocabulary_map"]) if hf else _official_ids(path, text)
    _check_supported(path, text)
    model = Transformer(
        layers=text["num_hidden_layers"],
        width=text["hidden_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        ffn=text["intermediate_size"],
        vocab=text["vocab_size"],
        rope_theta=float((text["rope_parameters"] or text)["rope_theta"]),
        norm_eps=text["rms_norm_eps"],
        dropout=text["attention_dropout"],
        init_std=text["initializer_range"],
        first_visual=ids.visual,
    )
    return model, Release(
        context=text["max_position_embeddings"],
        image_area=text["image_area"],
        min_pixels=pixels["min_pixels"],
        max_pixels=pixels["max_pixels"],
        ids=ids,
    )


def emu3_order(model: Transformer) -> vocab_lib.Ids:
    """Returns the ids of Emu3's order around the model's first visual id, else ValueError."""
    codes = model.vocab - model.first_visual
    text_size = model.first_visual - len(vocab_lib.special_names(0))
    if text_size < 1 or codes < 1:
        raise ValueError(
            f"a vocabulary of {model.vocab} ids with codes from {model.first_visual} is not in "
            "Emu3's order; give the ids of its specials"
        )
    return vocab_lib.special_ids(text_size, codes)


def config_json(
    layout: str, model: Transformer, release: Release, dtype: str, vq_config: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns config.json for weights of type `dtype`; `vq_config` is for the hf layout."""
    ids = release.ids or emu3_order(model)
    if layout == "official":
        return _official_config(model, ids, release, dtype)
    return _hf_config(model, ids, release, dtype, vq_config)


def generation_config(model: Transformer, release: Release) -> dict[str, Any]:
    """Returns generation_config.json: sampling as in Emu3's repository (top_k 2048)."""
    ids = release.ids or emu3_order(model)
    return dict(
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        pad_token_id=ids.pad,
        do_sample=True,
        top_k=2048,
        max_length=release.context,
    )


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "image_area",
)  # fmt: skip
_NUMBERS = ("rms_norm_eps", "attention_dropout", "initializer_range")
_PIXELS = dict(min_pixels=512 * 512, max_pixels=1024 * 1024)
# What a config.json that leaves a field out means: Emu3's own sizes, in either layout.
_TEXT_DEFAULTS = dict(
    vocab_size=184_622,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=None,
    hidden_act="silu",
    max_position_embeddings=9216,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    rope_parameters=None,
    rope_scaling=None,
    mlp_bias=False,
    attention_bias=False,
    attention_dropout=0.1,
    initializer_range=0.02,
    tie_word_embeddings=False,
    pad_token_id=151_643,
    bos_token_id=151_849,
    eos_token_id=151_850,
    img_token_id=151_851,
    boi_token_id=151_852,
    eoi_token_id=151_853,
    eol_token_id=151_846,
    eof_token_id=151_847,
    image_area=720 * 720,
)


def _check_kinds(path: str, record: dict[str, Any], fields: dict[str, Any]) -> None:
    try:
        untrusted.check(record, fields)
    except ValueError as error:
        raise ValueError(f"{path}: in its settings {error}") from None


def _check_text(path: str, text: dict[str, Any]) -> None:
    """ValueError for a size or number that is none; fills in those that follow from others."""
    for field in ("rope_parameters", "rope_scaling"):
        text[field] = {} if text[field] is None else text[field]
        _check_kinds(path, text, {field: untrusted.mapping})
    text["num_key_value_heads"] = text["num_key_value_heads"] or text["num_attention_heads"]
    _check_kinds(path, text, dict.fromkeys(_SIZES, untrusted.size))
    _check_kinds(path, text, dict.fromkeys(_NUMBERS, untrusted.number))
    _check_kinds(path, text["rope_parameters"] or text, dict(rope_theta=untrusted.number))
    text["head_dim"] = text["head_dim"] or text["hidden_size"] // text["num_attention_heads"]
    _check_kinds(path, text, dict(head_dim=untrusted.size))


def _check_supported(path: str, text: dict[str, Any]) -> None:
    required = dict(
        hidden_act="silu", mlp_bias=False, attention_bias=False, tie_word_embeddings=False
    )
    for field, value in required.items():
        if text[field] != value:
            raise ValueError(
                f"{path}: config.json has {field} {text[field]!r}; Emu3's decoder has {value!r}"
            )
    for field in ("rope_parameters", "rope_scaling"):
        kind = text[field].get("rope_type", "default")
        if kind != "default":
            raise ValueError(
                f"{path}: config.json has {field} of type {kind!r}; Emu3's decoder has 'default'"
            )


def _official_ids(path: str, text: dict[str, Any]) -> vocab_lib.Ids:
    _check_kinds(path, text, {f"{name}_token_id": untrusted.count for name in _CONTROLS})
    named = {name: text[f"{name}_token_id"] for name in _CONTROLS}
    visual = text["eoi_token_id"] + 1
    if not visual < text["vocab_size"]:
        raise ValueError(
            f"{path}: config.json has eoi_token_id {visual - 1} and vocab_size "
            f"{text['vocab_size']}, which leaves no visual ids"
        )
    return vocab_lib.Ids(visual=visual, codes=text["vocab_size"] - visual, **named)


def _hf_ids(path: str, text: dict[str, Any], names: dict[str, int]) -> vocab_lib.Ids:
    codes = sum(name.startswith(_VISUAL) for name in names)
    wanted = [*_HF_NAMES.values(), f"{_VISUAL}{0:06d}|>", f"{_VISUAL}{max(codes - 1, 0):06d}|>"]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"{path}: config.json's vocabulary_map lacks {missing[0]!r}")
    _check_kinds(path, names, dict.fromkeys(wanted, untrusted.count))
    first, last = names[wanted[-2]], names[wanted[-1]]
    if last - first != codes - 1:
        raise ValueError(
            f"{path}: config.json's vocabulary_map has {codes} visual tokens "
            f"on ids {first} to {last}; they must be one range"
        )
    named = {name: names[string] for name, string in _HF_NAMES.items()}
    for name in ("pad", "bos", "eos"):
        given = text[f"{name}_token_id"]
        named[name] = given[0] if isinstance(given, list) and given else given
    _check_kinds(path, named, dict.fromkeys(named, untrusted.count))
    return vocab_lib.Ids(visual=first, codes=codes, **named)


def _text_config(model: Transformer, ids: vocab_lib.Ids, release: Release) -> dict[str, Any]:
    return dict(
        attention_dropout=model.dropout,
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        pad_token_id=ids.pad,
        hidden_act="silu",
        hidden_size=model.width,
        initializer_range=model.init_std,
        intermediate_size=model.ffn,
        max_position_embeddings=release.context,
        num_attention_heads=model.heads,
        num_hidden_layers=model.layers,
        num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=False,
        use_cache=True,
        vocab_size=model.vocab,
    )


def _official_config(model, ids, release, dtype) -> dict[str, Any]:
    auto = dict(
        AutoConfig="configuration_emu3.Emu3Config",
        AutoModelForCausalLM="modeling_emu3.Emu3ForCausalLM",
    )
    return dict(
        architectures=["Emu3ForCausalLM"],
        auto_map=auto,
        model_type="Emu3",
        **_text_config(model, ids, release),
        **{f"{name}_token_id": getattr(ids, name) for name in ("img", "boi", "eoi", "eol", "eof")},
        image_area=release.image_area,
        pretraining_tp=1,
        rope_scaling=None,
        rope_theta=model.rope_theta,
        torch_dtype=dtype,
    )


def _hf_config(model, ids, release, dtype, vq_config) -> dict[str, Any]:
    text = dict(model_type="emu3_text_model", **_text_config(model, ids, release))
    text["rope_parameters"] = dict(rope_type="default", rope_theta=model.rope_theta)
    if model.width != model.heads * model.head_dim:
        text["head_dim"] = model.head_dim
    return dict(
        architectures=["Emu3ForConditionalGeneration"],
        model_type="emu3",
        dtype=dtype,
        text_config=text,
        vq_config=vq_config,
        tie_word_embeddings=False,
        vocabulary_map=processor.vocabulary_map(ids),
    )
