"""Emu3's published tokenizer checkpoints to and from ours, tensor for tensor.

Two layouts on disk, both config.json and safetensors:
    official   the repository Emu3-VisionTokenizer (class Emu3VisionVQModel)
    hf         transformers' Emu3VQVAE, alone or under `vqmodel.` inside an Emu3 model's directory
Ours names the modules as the official one does. hf moves the attention norms out of the attention
blocks, makes the attention's 1x1 convolutions linear layers and renames some modules.

Every tensor keeps its dtype and its bits, there and back.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from emu3_jax import checkpoint, shards, untrusted
from tokenizer import vq

LAYOUTS = ("official", "hf")

# config.json's words for ours; what is not listed has one allowed value, see FIXED.
FIELDS = {
    "official": {
        "codebook_size": "codebook_size",
        "embed_dim": "code_dim",
        "z_channels": "latent_channels",
        "ch": "width",
        "ch_mult": "multipliers",
        "num_res_blocks": "res_blocks",
        "attn_resolutions": "attention_levels",
        "temporal_downsample_factor": "temporal_factor",
    },
    "hf": {
        "codebook_size": "codebook_size",
        "embed_dim": "code_dim",
        "latent_channels": "latent_channels",
        "base_channels": "width",
        "channel_multiplier": "multipliers",
        "num_res_blocks": "res_blocks",
        "attn_resolutions": "attention_levels",
        "temporal_downsample_factor": "temporal_factor",
    },
}
FIXED = {
    "official": {"double_z": False, "in_channels": 3, "out_channels": 3, "dropout": 0.0},
    "hf": {
        "double_latent": False,
        "in_channels": 3,
        "out_channels": 3,
        "num_attention_heads": 1,
        "attention_dropout": 0.0,
    },
}
MODEL_TYPES = {"Emu3VisionVQ": "official", "emu3_vqgan": "hf", "emu3": "hf"}
CODE = "BAAI/Emu3-VisionTokenizer--"  # where transformers finds the official classes

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "embedding": "embedding.weight",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}
TO_OFFICIAL = (
    (r"(time_conv\.\d+)\.", r"\1.conv.conv."),
    (r"(time_res_stack\.\d+\.conv\d)\.", r"\1.conv."),
    (r"^((?:post_)?quant_conv)\.", r"\1.conv."),
)
OFFICIAL_TO_HF = (
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\.attn_1\.norm\.", ".attn_norm."),
    (r"\.([qkv])\.", r".\1_proj."),
    (r"\.proj_out\.", ".out_proj."),
    (r"^encoder\.down\.", "encoder.down_block.down."),
    (r"^decoder\.up\.", "decoder.up_block.up."),
    (r"\.mid\.", ".middle_block."),
)
LINEAR = re.compile(r"\.[qkv]_proj\.|\.out_proj\.")


def load(path: str | pathlib.Path, dtype: str = "float32") -> vq.VQ:
    """The tokenizer in a directory of either layout or of a training run.

    The arrays keep their own dtypes; `dtype` is what it computes in, see `vq.merge`.

    Raises:
        ValueError: not a tokenizer checkpoint, or its files do not fit its config.json.
    """
    path = pathlib.Path(path)
    if (path / "checkpoints").is_dir():
        return load_run(path, dtype)
    layout, settings, prefix = read_config(path)
    config = parse_config(path, settings, layout)
    if not shards.is_there(path):
        raise ValueError(f"{path} has no .safetensors file; convert other formats first")
    files = {n.removeprefix(prefix): tensor for n, tensor in shards.read(path, prefix).items()}
    blocks = config.res_blocks * len(config.multipliers)
    if blocks > len(files):  # a billion of them would take for ever to lay out
        raise ValueError(f"{path} has {len(files)} tensors; its config.json wants {blocks} blocks")
    params, stats = vq.shapes(config)
    names = {rename(name, layout): name for name in params | stats}
    odd = sorted(names.keys() ^ files.keys())
    if odd:
        where = "its config.json" if odd[0] in files else "its safetensors"
        raise ValueError(f"{path}: {len(odd)} tensors are not in {where}, first {prefix}{odd[0]}")
    arrays = {}
    for theirs, tensor in files.items():
        name, value = names[theirs], tensor.read()
        arrays[name] = jnp.asarray(from_torch(value, name))
        want = (params | stats)[name].shape
        if arrays[name].shape != want:
            raise ValueError(
                f"{path}: {prefix}{theirs} has shape {value.shape}, which does not fit its "
                f"config.json; check that both come from the same model"
            )
    return vq.merge(config, {n: arrays[n] for n in params}, {n: arrays[n] for n in stats}, dtype)


def load_run(path: pathlib.Path, dtype: str = "float32") -> vq.VQ:
    """The tokenizer of a run's newest checkpoint; ValueError if the run trained something else."""
    task, params, variables, _ = checkpoint.restore_model(str(path))
    config = getattr(task, "config", None)
    if not isinstance(config, vq.VQConfig):
        raise ValueError(f"{path} is a run of {type(task).__name__}, not of a vision tokenizer")
    own, stats = vq.shapes(config)  # a discriminator's weights are not the tokenizer's
    params = {n: params[n] for n in own}
    return vq.merge(config, params, {n: variables["stats"][n] for n in stats}, dtype)


def save(tokenizer: vq.VQ, path: str | pathlib.Path, layout: str = "official"):
    """Writes config.json and model.safetensors. ValueError if the layout cannot hold it."""
    config = config_json(tokenizer.config, layout)
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.numpy.save_file(
        dict(tensors(tokenizer, layout)), path / "model.safetensors", metadata={"format": "pt"}
    )


def tensors(
    tokenizer: vq.VQ, layout: str = "official", prefix: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor as `layout` stores it; a full hf model's prefix is vqmodel."""
    params, stats = vq.split(tokenizer)
    for name, value in (params | stats).items():
        theirs = rename(name, layout)
        yield prefix + theirs, to_torch(np.asarray(value), name, theirs)


def config_json(config: vq.VQConfig, layout: str = "official") -> dict:
    """What config.json says of a tokenizer; in a full hf model it is the value of `vq_config`.

    Raises:
        ValueError: the layout's PyTorch code would compute something else.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    if config.norm_groups != 32:
        raise ValueError(
            f"norm_groups is {config.norm_groups}, but Emu3's PyTorch code fixes 32; "
            "train with norm_groups=32 to export"
        )
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS[layout].items()}
    fields = {theirs: list(v) if type(v) is tuple else v for theirs, v in fields.items()}
    fields |= FIXED[layout]
    if layout == "hf":
        return {
            "architectures": ["Emu3VQVAE"],
            "dtype": "float32",
            "model_type": "emu3_vqgan",
            **fields,
            "hidden_size": attention_width(config),
        }
    auto_map = {
        "AutoConfig": CODE + "configuration_emu3visionvq.Emu3VisionVQConfig",
        "AutoModel": CODE + "modeling_emu3visionvq.Emu3VisionVQModel",
    }
    return {
        "architectures": ["Emu3VisionVQModel"],
        "auto_map": auto_map,
        "model_type": "Emu3VisionVQ",
        "torch_dtype": "float32",
        **fields,
    }


def fingerprint(tokenizer: vq.VQ) -> str:
    """sha256 over the tensors in the official layout, names sorted; hex. Names what made codes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors(tokenizer, "official")):
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def attention_width(config: vq.VQConfig) -> int:
    # hf builds every attention block with one width, the middle block's too.
    widths = {config.widths[level] for level in config.attention_levels} | {config.widths[-1]}
    if len(widths) > 1:
        raise ValueError(
            f"attention_levels {config.attention_levels} have widths {sorted(widths)}, but the hf "
            "layout has one width for all attention; use the official layout"
        )
    return widths.pop()


def read_config(path: pathlib.Path) -> tuple[str, dict, str]:
    """(layout, the tokenizer's settings, the prefix of its tensors)."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} has no config.json; give a directory of a tokenizer checkpoint")
    settings = untrusted.read_object(file)
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{file} is not the config of a model; it names no model_type")
    vision = settings.get("vq_config") if kind == "emu3" else settings
    if kind not in MODEL_TYPES or not isinstance(vision, dict):
        raise ValueError(
            f"{path} is a checkpoint of {untrusted.short(kind)}, not of a tokenizer; known are "
            f"{', '.join(MODEL_TYPES)} (the last with a vq_config)"
        )
    if kind == "emu3":
        return "hf", vision, "vqmodel."
    return MODEL_TYPES[kind], settings, ""


def parse_config(path: pathlib.Path, settings: dict, layout: str) -> vq.VQConfig:
    # A key that is absent means the format's default, and ours are the same.
    fields = {ours: settings[k] for k, ours in FIELDS[layout].items() if k in settings}
    kinds = dict.fromkeys(fields, untrusted.size)
    kinds |= dict(multipliers=untrusted.sizes, attention_levels=untrusted.counts)
    try:
        untrusted.check(fields, {name: kinds[name] for name in fields})
        config = vq.VQConfig(**fields)
        config.check()
        fixed = dict(FIXED[layout])
        if layout == "hf":
            settings = {"hidden_size": 1024} | settings
            fixed["hidden_size"] = attention_width(config)
    except ValueError as error:
        raise ValueError(f"{path}: in its config.json, {error}") from None
    for key, value in fixed.items():
        if key in settings and settings[key] != value:
            found = untrusted.short(settings[key])
            raise ValueError(f"{path}: {key} is {found}; only {value} is supported")
    return config


def rename(name: str, layout: str) -> str:
    """Our dotted name to the layout's."""
    module, leaf = name.rsplit(".", 1)
    name = f"{module}.{LEAVES[leaf]}"
    for pattern, replacement in TO_OFFICIAL + (OFFICIAL_TO_HF if layout == "hf" else ()):
        name = re.sub(pattern, replacement, name)
    return name


def to_torch(value: np.ndarray, name: str, theirs: str) -> np.ndarray:
    """Our array as torch stores it: output channels first, 1x1 convolutions with their ones."""
    if name.endswith(".count"):
        return value.astype(np.int64)
    if not name.endswith(".kernel"):
        return value
    value = np.moveaxis(value, (-1, -2), (0, 1))
    if value.ndim == 2 and not LINEAR.search(theirs):
        value = value[:, :, None, None]
    return np.ascontiguousarray(value)


def from_torch(value: np.ndarray, name: str) -> np.ndarray:
    """The opposite of `to_torch`."""
    if name.endswith(".count"):
        return value.astype(np.int32)
    if not name.endswith(".kernel"):
        return value
    if value.shape[2:] == (1, 1) and not name.endswith("conv.kernel"):
        value = value[:, :, 0, 0]
    return np.ascontiguousarray(np.moveaxis(value, (0, 1), (-1, -2)))
