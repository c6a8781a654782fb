"""Emu3's decoder: token ids in, hidden states, logits and the loss out.

B batch  T query position  S key position  D width  N heads  K kv heads  H head dim  F ffn
V vocab  L layers

Pre-norm RMSNorm, rotary positions (half-split), grouped-query attention, SwiGLU, no biases, untied
head (arXiv 2409.18869, table 3, and the released configuration). Nothing here knows what a token
stands for: text and vision share the table, the layers and the head.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from emu3_jax import cache as cache_lib
from emu3_jax import params as params_lib
from emu3_jax.attention import attention, balanced
from emu3_jax.cache import Cache
from emu3_jax.kernels import mask
from emu3_jax.loss import HIDDEN, cross_entropy
from emu3_jax.mesh import einsum, linear, place, spec, turn, turned
from emu3_jax.params import Param
from emu3_jax.update import Task

# remat policy by name, from least to most recomputation -> what the backward pass finds saved
# instead of computing it again: "dots" every matrix product and attention, "attention" all but the
# feed-forward's. fit.fitting tries them in this order where remat is "auto".
_saved = jax.checkpoint_policies.save_only_these_names
REMAT = {
    "none": None,
    "dots": _saved("attention", "qkv", "ffn"),
    "attention": _saved("attention", "qkv"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass
class Transformer(Task):
    """The decoder's sizes; the defaults are Emu3-8B's (8,492,011,520 weights).

    `first_visual` is the id of code 0; only the metrics use it, to report the loss of vision and
    text apart. `dropout` acts on embeddings, both residual branches and attention probabilities, as
    in the released modelling code, and only while training. `init_std` is the standard deviation of
    every initial matrix. `context` says how attention meets rows cut over the mesh axis of that
    name, "gather" or "ring", `kernel` what computes it, "" for the device's usual one (see
    attention.py). The weights hold ids up to a multiple of `vocab_multiple`, which a mesh can
    split; those beyond `vocab` are never predicted, and leave with the conversion to PyTorch.
    `loss_tile` is in ids (see loss.py), `z_loss` the weight of the squared log partition sum (PaLM,
    arXiv 2204.02311, takes 1e-4). `unroll` layers are compiled one by one in each round of the loop
    over layers: more compilation, and on CPU twice the speed.
    """

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    ffn: int = 14336
    vocab: int = 184_622
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    dropout: float = 0.1
    init_std: float = 0.02
    first_visual: int = 151_854
    dtype: str = "bfloat16"
    context: str = "gather"
    kernel: str = ""
    remat: str = "full"
    vocab_multiple: int = 1
    loss_tile: int = 8192
    z_loss: float = 0.0
    unroll: int = 1

    policies = tuple(REMAT)
    row = dict(tokens="int32", targets="int32", segments="int32", positions="int32",
               weights="float32")  # fmt: skip

    def params(self) -> dict:
        """The weights as a tree of `Param`; layers are stacked on a leading L."""
        sizes = dict(L=self.layers, D=self.width, N=self.heads, K=self.kv_heads, H=self.head_dim,
                     F=self.ffn, V=-(-self.vocab // self.vocab_multiple) * self.vocab_multiple)

        def norm(dims):
            return Param(dims, tuple(sizes[dim] for dim in dims))

        def weight(dims):
            return Param(dims, tuple(sizes[dim] for dim in dims), self.init_std)

        return dict(
            embed=weight("VD"),
            layers=dict(
                attn=dict(norm=norm("LD"), q=weight("LDNH"), k=weight("LDKH"), v=weight("LDKH"),
                          o=weight("LNHD")),
                mlp=dict(norm=norm("LD"), gate=weight("LDF"), up=weight("LDF"),
                         down=weight("LFD")),
            ),
            norm=norm("D"),
            head=weight("DV"),
        )

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        """Initial (weights, variables); the decoder has no variables."""
        return params_lib.init(self.params(), key), {}

    def decays(self) -> dict:
        """True for each weight that weight decay shrinks: all but the norms."""
        return params_lib.decays(self.params())

    def adapted(self, params: dict) -> dict:
        """Weights (NumPy arrays) of the same vocabulary with another padding."""
        rows = self.params()["embed"].shape[0]
        if min(len(params["embed"]), rows) < self.vocab or len(params["embed"]) == rows:
            return params
        padding = (0, rows - self.vocab), (0, 0)
        embed_VD, head_DV = params["embed"][: self.vocab], params["head"][:, : self.vocab]
        return params | dict(embed=np.pad(embed_VD, padding), head=np.pad(head_DV, padding[::-1]))

    def loss(self, params, variables, batch, key) -> tuple[jax.Array, tuple[dict, dict]]:
        """Weighted mean cross-entropy of a batch of packed rows (batch contract: see packing.py).

        Returns (loss, (variables, metrics)); `key` None means evaluation, without dropout. The
        metrics count tokens and give the unweighted loss in nats of text and of vision targets.
        """
        order_T = balanced(batch["tokens"].shape[1]) if self.context == "ring" else None
        if order_T is not None:
            whole = {name: place(x_BT, "BS") for name, x_BT in batch.items()}
            batch = {name: place(x_BS.at[:, order_T].get(out_sharding=spec("BS")), "BT")
                     for name, x_BS in whole.items()}
        x_BTD = self.hidden(params, batch["tokens"], batch["segments"], batch["positions"], key)
        nll_BT, lse_BT = cross_entropy(
            x_BTD, params["head"], batch["targets"], self.vocab, self.loss_tile
        )
        weights_BT = batch["weights"]
        total = jnp.sum((nll_BT + self.z_loss * lse_BT**2) * weights_BT)
        loss = total / jnp.maximum(jnp.sum(weights_BT), 1e-9)
        metrics = {}
        visual_BT = batch["targets"] >= self.first_visual
        for name, kind_BT in dict(text=~visual_BT, vision=visual_BT).items():
            counted_BT = kind_BT & (weights_BT > 0)
            total = jnp.sum(jnp.where(counted_BT, nll_BT, 0))
            metrics[f"loss_{name}"] = total / jnp.maximum(jnp.sum(counted_BT, dtype=jnp.float32), 1)
        return loss, (variables, metrics)

    def weight(self, batch) -> jax.Array:
        """The sum of the targets' weights: what the loss is a mean over."""
        return jnp.sum(batch["weights"])

    def counts(self, batch) -> dict:
        """Tokens of a batch, and the FLOPs of training on it (see `flops`).

        `flops` counts what the packing leaves to do: real tokens, and the pairs of query and key
        within a document. `flops_dense` counts every row as one document without padding.
        """
        here_BT = batch["segments"] > 0
        tokens = jnp.sum(here_BT)
        pairs = jnp.sum(jnp.where(here_BT, batch["positions"] + 1, 0), dtype=jnp.float32)
        B, T = batch["segments"].shape
        return dict(tokens=tokens, flops=self.flops(tokens, pairs), flops_dense=self.dense(B, T))

    def dense(self, rows: int, length: int) -> float:
        """FLOPs of a training step on rows that are one document each."""
        return self.flops(rows * length, rows * length * (length + 1) / 2)

    def flops(self, tokens, pairs):
        """Of a training step, recomputation left out: 6 a weight of a matrix and token, and 12 a
        head dimension and pair of query and key that sees it (PaLM, arXiv 2204.02311, app. B)."""
        declared = self.params()
        matrices = params_lib.count([p for p in jax.tree.leaves(declared["layers"]) if p.std])
        matrices += self.width * self.vocab  # the head; looking up a row multiplies nothing
        return 6.0 * matrices * tokens + 12.0 * self.layers * self.heads * self.head_dim * pairs

    def logits(self, params, tokens_BT, segments_BT, positions_BT) -> jax.Array:
        """Scores of the next token at every position -> float32 logits_BTV."""
        x_BTD = self.hidden(params, tokens_BT, segments_BT, positions_BT)
        return self.scores(params, x_BTD)

    def scores(self, params, x_BTD) -> jax.Array:
        """Final hidden states -> float32 logits_BTV."""
        head_DV = params["head"].astype(self.dtype)
        logits_BTV = einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=jnp.float32)
        id_V = place(jnp.arange(head_DV.shape[1]), "V")
        return jnp.where(id_V < self.vocab, logits_BTV, HIDDEN)

    def hidden(self, params, tokens_BT, segments_BT, positions_BT, key=None) -> jax.Array:
        """Final hidden states x_BTD of packed rows; with a `key`, dropout acts."""
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} is none of {', '.join(REMAT)}")
        rate = 0.0 if key is None else self.dropout
        key = jax.random.key(0) if key is None else key
        where = segments_BT, positions_BT
        rope = _rope(positions_BT, self.head_dim, self.rope_theta)

        def layer(x_BTD, inputs):
            p, index = inputs
            keys = jax.random.split(jax.random.fold_in(key, index), 3)

            def attend(*qkv):
                return attention(*qkv, *where, dropout=rate, key=keys[0], context=self.context,
                                 kernel=self.kernel)  # fmt: skip

            drops = [functools.partial(_dropout, where=where, key=k, rate=rate) for k in keys[1:]]
            return _layer(p, x_BTD, rope, attend, self.norm_eps, *drops), None

        x_BTD = _embed(params["embed"], tokens_BT, self.dtype)
        x_BTD = _dropout(x_BTD, where, jax.random.fold_in(key, self.layers), rate)
        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.remat], prevent_cse=False)
        inputs = (params["layers"], jnp.arange(self.layers))
        x_BTD, _ = jax.lax.scan(layer, x_BTD, inputs, unroll=self.unroll)
        return _rms_norm(x_BTD, params["norm"], self.norm_eps)

    def apart(self, params) -> dict:
        """The weights as `read` takes them: of the model's type, turned, layers one by one.

        Where layers are stacked, a loop copies each before it is used. That is little beside a
        training step, and as much as all of a step that reads one token.
        """
        params = jax.tree.map(lambda w: w.astype(self.dtype), params)
        declared = self.params()["layers"]

        def of_layer(i: int, p: Param, w_L):
            return turn(p.dims[1:], w_L[i]) if p.std else w_L[i]

        layers = [jax.tree.map(functools.partial(of_layer, i), declared, params["layers"])
                  for i in range(self.layers)]  # fmt: skip
        return params | dict(layers=layers, head=turn("DV", params["head"]))

    def read(self, params, tokens_BT, segments_BT, positions_BT, cache: Cache, first=False):
        """(final hidden states x_BTD, the cache with these tokens in it), of weights `apart`.

        The tokens are written behind those that the cache holds and see all of it that they may.
        As the `first` ones they see each other, by the kernel that training uses.
        """
        where, index = (place(segments_BT, "BT"), place(positions_BT, "BT")), cache.length
        rope = _rope(positions_BT, self.head_dim, self.rope_theta)
        cache, layers = cache.behind(*where), []

        def attend(q_BTNH, k_BTKH, v_BTKH):
            layers.append(cache_lib.written(cache.layers[len(layers)], k_BTKH, v_BTKH, index))
            if first:
                return attention(q_BTNH, k_BTKH, v_BTKH, *where, kernel=self.kernel)
            return cache_lib.attention(q_BTNH, layers[-1], *where, cache)

        x_BTD = _embed(params["embed"], tokens_BT, self.dtype)
        for p in params["layers"]:
            x_BTD = _layer(p, x_BTD, rope, attend, self.norm_eps, product=turned)
        return _rms_norm(x_BTD, params["norm"], self.norm_eps), cache._replace(layers=tuple(layers))

    def empty_cache(self, batch: int, slots: int, dtype: str = "") -> Cache:
        """A cache for so many tokens of `batch` rows, of the model's type or `dtype` (int8)."""
        return cache_lib.empty(self.layers, batch, slots, self.kv_heads, self.head_dim,
                               dtype or self.dtype)  # fmt: skip


def _embed(table_VD, tokens_BT, dtype):
    """Rows of a table of which no device holds more than its piece, as `dtype`.

    The devices that cut D look up one another's tokens, each in its own columns, and swap; those
    that cut V add up what each one has. So what travels is as large as the result, not the table.
    """
    (cut_V, cut_D) = spec("VD")

    def local(table_VD, tokens_BT):
        tokens_BT = jax.lax.all_gather(tokens_BT, cut_D, axis=0, tiled=True)
        row_BT = tokens_BT - jax.lax.axis_index(cut_V) * len(table_VD)
        held_BT = (row_BT >= 0) & (row_BT < len(table_VD))
        x_BTD = jnp.where(held_BT[..., None], table_VD[jnp.where(held_BT, row_BT, 0)], 0)
        swap = dict(split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(jax.lax.all_to_all(x_BTD.astype(dtype), cut_D, **swap), cut_V)

    layout = dict(in_specs=(spec("VD"), spec("BT")), out_specs=spec("BTD"), check_vma=False)
    return jax.shard_map(local, **layout)(place(table_VD, "VD"), place(tokens_BT, "BT"))


def _layer(p, x_BTD, rope, attend, eps, *drops, product=linear):
    """One layer; `attend` makes o_BTNH of queries, keys and values, `drops` act on the branches."""
    drop_attn, drop_mlp = drops or (lambda x: x, lambda x: x)
    h_BTD = _rms_norm(x_BTD, p["attn"]["norm"], eps)
    q_BTNH = checkpoint_name(rope(product("BTD,DNH->BTNH", h_BTD, p["attn"]["q"])), "qkv")
    k_BTKH = checkpoint_name(rope(product("BTD,DKH->BTKH", h_BTD, p["attn"]["k"])), "qkv")
    v_BTKH = checkpoint_name(product("BTD,DKH->BTKH", h_BTD, p["attn"]["v"]), "qkv")
    o_BTNH = attend(q_BTNH, k_BTKH, v_BTKH)
    h_BTD = checkpoint_name(product("BTNH,NHD->BTD", o_BTNH, p["attn"]["o"]), "attention")
    x_BTD += drop_attn(h_BTD)
    h_BTD = _rms_norm(x_BTD, p["mlp"]["norm"], eps)
    return x_BTD + drop_mlp(_mlp(p["mlp"], h_BTD, product))


def _mlp(p, h_BTD, product):
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    gate_BTF = checkpoint_name(product("BTD,DF->BTF", h_BTD, p["gate"]), "ffn")
    up_BTF = checkpoint_name(product("BTD,DF->BTF", h_BTD, p["up"]), "ffn")
    return product("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, p["down"])


def _rms_norm(x, scale, eps):
    """In float32, cast back, then scaled: the order of the released code."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * place(scale, ".").astype(x.dtype)


def _rope(positions_BT, head_dim, theta):
    """Rotates the two halves of each head by angles position * theta**(-2i/H), in float32."""
    freq_H = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_BTH = positions_BT[..., None].astype(jnp.float32) * freq_H
    cos_BTNH, sin_BTNH = jnp.cos(angle_BTH)[:, :, None], jnp.sin(angle_BTH)[:, :, None]

    def rotate(x_BTNH):
        a, b = jnp.split(x_BTNH, 2, axis=-1)
        cos, sin = cos_BTNH.astype(x_BTNH.dtype), sin_BTNH.astype(x_BTNH.dtype)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    return rotate


def _dropout(x_BTD, where, key, rate):
    """Drops by a hash of row, segment, position and feature: the same on every mesh and ring."""
    if not rate:
        return x_BTD
    index_B, index_D = (place(jnp.arange(size), dim) for size, dim in
                        ((x_BTD.shape[0], "B"), (x_BTD.shape[2], ".")))  # fmt: skip
    hash_BTD = mask.query_hash(jax.random.bits(key), index_B, *where, index_D)
    return jnp.where(mask.above(hash_BTD, rate), x_BTD / (1 - rate), 0).astype(x_BTD.dtype)
