"""transformers' tiny Emu3 with weights that depend on nothing but each tensor's name.

Shared by the parity tests; no test of its own.
"""

import zlib

import numpy as np
import torch
import transformers

# 40 text ids, 3 controls, 12 extras, image token/start/end, 64 codes: 122 ids in Emu3's order, with
# the extras that Emu3 uses in the places of extras 8 to 11.
TEXT_IDS, EXTRAS, CODES = 40, 12, 64
_RENAMED = {0: "<image>", 8: "<|extra_200|>", 9: "<|extra_201|>"}
_RENAMED |= {10: "<|extra_203|>", 11: "<|extra_204|>"}

VQ = dict(
    codebook_size=CODES,
    embed_dim=4,
    latent_channels=4,
    double_latent=False,
    in_channels=3,
    out_channels=3,
    temporal_downsample_factor=4,
    base_channels=32,
    channel_multiplier=[1, 2, 2, 4],
    num_res_blocks=2,
    attn_resolutions=[3],
    hidden_size=128,
    num_attention_heads=1,
    attention_dropout=0.0,
)


def vocabulary() -> dict[str, int]:
    """String -> id of the 122 ids."""
    names = [f"t{i}" for i in range(TEXT_IDS)] + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += [_RENAMED.get(i, f"<|extra_{i}|>") for i in range(EXTRAS)]
    names += ["<|image token|>", "<|image start|>", "<|image end|>"]
    names += [f"<|visual token {code:06d}|>" for code in range(CODES)]
    return {name: i for i, name in enumerate(names)}


def text_config() -> dict:
    """The decoder's sizes: 2 layers of width 64, 4 heads over 2."""
    ids = vocabulary()
    return dict(
        vocab_size=len(ids),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_act="silu",
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
        attention_dropout=0.1,
        initializer_range=0.02,
        tie_word_embeddings=False,
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|extra_203|>"],
        eos_token_id=ids["<|extra_204|>"],
    )


def emu3() -> transformers.Emu3ForConditionalGeneration:
    """The tiny model in float32, in evaluation mode, with `weights` everywhere."""
    config = transformers.Emu3Config(
        vq_config=transformers.Emu3VQVAEConfig(**VQ),
        text_config=transformers.Emu3TextConfig(**text_config()),
        vocabulary_map=vocabulary(),
    )
    model = transformers.Emu3ForConditionalGeneration._from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    state = {name: weights(name, tuple(t.shape)) for name, t in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model.eval()


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's values, from its name alone (transformers' names in memory)."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = rng.standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        values = 0.5 + np.abs(values)
    elif name.endswith("running_mean"):
        values = 0.1 * values
    elif name.endswith("bias"):
        values = 0.05 * values
    elif name.endswith("weight") and values.ndim == 1:
        values = 1 + 0.1 * values
    elif not name.endswith("quantize.embedding.weight"):
        fan_in = shape[1] if "embed_tokens" in name else int(np.prod(shape[1:]))
        # The 4-channel layers over time see zero frames first and shrink: more gain keeps codes
        # apart from ties.
        large, medium = ("time_conv", "quant_conv"), ("time_res_stack",)
        gain = 4 if any(n in name for n in large) else 2 if any(n in name for n in medium) else 1
        values = gain * values / np.sqrt(fan_in)
    return values.astype(np.float32)
