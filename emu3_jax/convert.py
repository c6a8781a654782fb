"""Emu3's published layouts <-> our weights, both ways, in memory that does not grow with the model.

official: config.json of type Emu3 and shards with model.* and lm_head (Emu3ForCausalLM).
hf:       config.json of type emu3 and shards with text_model.* and vqmodel.*, the decoder and the
          vision tokenizer in one directory (Emu3ForConditionalGeneration as it lies on disk).

PyTorch keeps a linear layer as (out, in), we as (in, out) with heads apart; both rotate the two
halves of a head, so nothing is permuted. Vision tensors pass through here by name only.

V vocab  D width  N heads  K kv heads  H head dim  F ffn  L layers
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from emu3_jax import checkpoint, processor, shards
from emu3_jax import release as release_lib
from emu3_jax import vocab as vocab_lib
from emu3_jax.params import Param
from emu3_jax.transformer import Transformer

_PREFIX = {"official": "", "hf": "text_model."}
# Where a weight is in our tree -> its published name, its output letters, its input letters.
_WHOLE = {
    ("embed",): ("model.embed_tokens.weight", "V", "D"),
    ("norm",): ("model.norm.weight", "D", ""),
    ("head",): ("lm_head.weight", "V", "D"),
}
_LAYER = {
    ("layers", "attn", "norm"): ("input_layernorm.weight", "D", ""),
    ("layers", "attn", "q"): ("self_attn.q_proj.weight", "NH", "D"),
    ("layers", "attn", "k"): ("self_attn.k_proj.weight", "KH", "D"),
    ("layers", "attn", "v"): ("self_attn.v_proj.weight", "KH", "D"),
    ("layers", "attn", "o"): ("self_attn.o_proj.weight", "D", "NH"),
    ("layers", "mlp", "norm"): ("post_attention_layernorm.weight", "D", ""),
    ("layers", "mlp", "gate"): ("mlp.gate_proj.weight", "F", "D"),
    ("layers", "mlp", "up"): ("mlp.up_proj.weight", "F", "D"),
    ("layers", "mlp", "down"): ("mlp.down_proj.weight", "D", "F"),
}


@dataclasses.dataclass
class Vision:
    """The vision tokenizer's part of the hf layout: Emu3VQVAE's tensors and its vq_config."""

    tensors: Iterable[tuple[str, np.ndarray]]
    config: dict[str, Any]


def load(path: str, scratch: str | None = None) -> tuple[Transformer, dict]:
    """Returns the decoder in `path`, of any format, and its weights as NumPy arrays as stored.

    With a `scratch` directory the arrays are files there, mapped (np.memmap), so that they need no
    memory. ValueError for an unknown directory or for missing, unknown or misshapen tensors.
    """
    if release_lib.recognise(path) == "emu3_jax":
        model, params, _, _ = checkpoint.restore_model(path)
        if not isinstance(model, Transformer):
            raise ValueError(f"{path} is a run of {type(model).__name__}, not of a Transformer")
        return model, params
    model, _ = release_lib.describe(path)
    tensors = _stored(path, model)
    params = {}
    for leaf_path, param in _leaves(model):
        weights = [weight for weight in _weights(model) if weight.path == leaf_path]
        dtype = tensors[weights[0].name].dtype
        leaf = _allocate(param, dtype, scratch, "-".join(leaf_path))
        for weight in weights:
            if tensors[weight.name].dtype != dtype:
                raise ValueError(
                    f"{path}: tensor {weight.name} is {tensors[weight.name].dtype} but "
                    f"{weights[0].name} is {dtype}; store all layers in one type"
                )
            _fill(leaf if weight.layer is None else leaf[weight.layer], weight, tensors)
        _put(params, leaf_path, leaf)
    model.dtype = str(params["embed"].dtype)
    return model, params


def save(
    model: Transformer,
    params: dict,
    path: str,
    layout: str = "hf",
    vocab: vocab_lib.Vocab | None = None,
    vision: Vision | None = None,
    release: release_lib.Release | None = None,
) -> None:
    """Writes weights (arrays, or anything sliced like one) as an `official` or `hf` directory.

    The hf layout needs `vision`. With `vocab` the tokenizer's files are written too; the processor
    files always are. config.json comes last: a directory with it is complete. Bits are kept.
    """
    tensors = [_from_leaf(weight, params) for weight in _weights(model)]
    _write(model, tensors, path, layout, vocab, vision, release or release_lib.Release())


def rewrite(
    source: str,
    target: str,
    layout: str,
    vocab: vocab_lib.Vocab | None = None,
    vision: Vision | None = None,
) -> None:
    """Writes an official or hf directory in `layout`, tensor by tensor; see `save`."""
    if pathlib.Path(source).resolve() == pathlib.Path(target).resolve():
        raise ValueError(f"source and target are both {source}; choose another target")
    model, release = release_lib.describe(source)
    tensors = list(_stored(source, model).values())
    model.dtype = str(tensors[0].dtype)
    _write(model, tensors, target, layout, vocab, vision, release)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One published tensor: its name, its place in our tree (layer None: whole), its shape."""

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool


def _leaves(model: Transformer) -> Iterator[tuple[tuple[str, ...], Param]]:
    for path, param in jax.tree_util.tree_leaves_with_path(model.params()):
        yield tuple(entry.key for entry in path), param


def _weights(model: Transformer) -> Iterator[_Weight]:
    """Yields the published tensors of a model, in the order of a forward pass."""
    declared = dict(_leaves(model))

    def weight(path, layer, name, out, into):
        dims = declared[path].dims.removeprefix("L")
        sizes = dict(zip(declared[path].dims, declared[path].shape, strict=True))
        sizes |= dict(V=model.vocab)  # the padding of our weights stays behind
        shape = [int(np.prod([sizes[dim] for dim in side])) for side in (out, into) if side]
        return _Weight(name, path, layer, tuple(shape), bool(into) and dims == into + out)

    first, *last = [weight(path, None, *names) for path, names in _WHOLE.items()]
    yield first
    for layer in range(model.layers):
        for path, (name, out, into) in _LAYER.items():
            yield weight(path, layer, f"model.layers.{layer}.{name}", out, into)
    yield from last


def _stored(path: str, model: Transformer) -> dict[str, shards.Tensor]:
    """The decoder's tensors in a directory by official name, checked against the model."""
    layout = release_lib.recognise(path)
    prefix = _PREFIX[layout]
    found = shards.read(pathlib.Path(path))
    tensors = {}
    for weight in _weights(model):
        stored = found.pop(prefix + weight.name, None)
        if stored is None:
            raise ValueError(f"{path} lacks tensor {prefix + weight.name}, which its config needs")
        if stored.shape != weight.shape:
            raise ValueError(
                f"{path}: tensor {stored.name} has shape {stored.shape}, "
                f"its config.json says {weight.shape}"
            )
        tensors[weight.name] = dataclasses.replace(stored, name=weight.name)
    # Old saves hold the rotary frequencies, which are no weights.
    known = ("vqmodel.",) if layout == "hf" else ()
    foreign = [
        n for n in found if not n.startswith(known) and not n.endswith("rotary_emb.inv_freq")
    ]
    if foreign:
        raise ValueError(f"{path} has {len(foreign)} unknown tensors, such as {foreign[0]}")
    return tensors


def _allocate(param: Param, dtype: np.dtype, scratch: str | None, name: str) -> np.ndarray:
    if scratch is None:
        return np.empty(param.shape, dtype)
    file = pathlib.Path(scratch) / f"{name}.array"
    file.parent.mkdir(parents=True, exist_ok=True)
    return np.memmap(file, dtype, mode="w+", shape=param.shape)


def _fill(leaf: np.ndarray, weight: _Weight, tensors: dict[str, shards.Tensor]) -> None:
    matrix = leaf.reshape(weight.shape[::-1] if weight.transposed else weight.shape)
    at = 0
    for chunk in tensors[weight.name].chunks():
        rows = slice(at, at + len(chunk))
        matrix[(slice(None), rows) if weight.transposed else rows] = (
            chunk.T if weight.transposed else chunk
        )
        at = rows.stop


def _put(tree: dict, path: tuple[str, ...], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _from_leaf(weight: _Weight, params: dict) -> shards.Tensor:
    leaf = params
    for key in weight.path:
        leaf = leaf[key]
    dtype = np.dtype(leaf.dtype.numpy_dtype if hasattr(leaf.dtype, "numpy_dtype") else leaf.dtype)

    def chunks():
        if weight.layer is not None:
            matrix = np.asarray(leaf[weight.layer])
            yield matrix.reshape(weight.shape[::-1]).T if weight.transposed else matrix
            return
        for rows in shards.row_ranges(weight.shape, dtype.itemsize):
            yield np.asarray(leaf[:, rows]).T if weight.transposed else np.asarray(leaf[rows])

    return shards.Tensor(weight.name, weight.shape, dtype, chunks)


def _write(model, tensors, path, layout, vocab, vision, release) -> None:
    if layout not in _PREFIX:
        raise ValueError(f"no layout {layout!r}; use {' or '.join(_PREFIX)}")
    ids = release.ids or release_lib.emu3_order(model)
    if vocab is not None and (vocab.size != model.vocab or vocab.ids != ids):
        raise ValueError(
            f"the vocabulary has {vocab.size} ids, codes from {vocab.visual}; the model has "
            f"{model.vocab}, codes from {ids.visual}; give the vocabulary it was trained with"
        )
    if layout == "hf" and vision is None:
        raise ValueError(
            f"{path}: the hf layout holds decoder and vision tokenizer; give a vision tokenizer too"
        )
    if layout == "official" and model.width != model.heads * model.head_dim:
        raise ValueError(
            f"the official layout has no head_dim: width {model.width} must be heads "
            f"{model.heads} * head_dim {model.head_dim}; use the hf layout"
        )
    root = pathlib.Path(path)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").unlink(missing_ok=True)
    shards.remove(root)
    tensors = [dataclasses.replace(t, name=_PREFIX[layout] + t.name) for t in tensors]
    if layout == "hf":
        tensors += [shards.Tensor.of(f"vqmodel.{name}", array) for name, array in vision.tensors]
    shards.write(tensors, root)
    if vocab is not None:
        processor.write_tokenizer(vocab, root, layout)
    if layout == "hf":
        factor = 2 ** (len(vision.config["channel_multiplier"]) - 1)
        processor.write_processor(root, release.min_pixels, release.max_pixels, factor)
    stored = str(tensors[0].dtype)
    vq_config = vision.config if layout == "hf" else None
    generation = release_lib.generation_config(model, release)
    config = release_lib.config_json(layout, model, release, stored, vq_config)
    processor.write_json(root / "generation_config.json", generation)
    processor.write_json(root / "config.json", config)
