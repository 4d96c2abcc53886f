"""Hugging Face `transformers` models as checkpoints with GGUF's names, row orders and metadata."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .checkpoint import Array, Checkpoint

LLAMA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.layers": LLAMA_LAYER,
    "model.norm": "output_norm",
    "lm_head": "output",
}
FALCON_LAYER = {
    "input_layernorm": "attn_norm",
    "ln_mlp": "attn_norm",
    "ln_attn": "attn_norm_2",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
FALCON = {
    "transformer.word_embeddings": "token_embd",
    "transformer.h": FALCON_LAYER,
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
OPT_LAYER = {
    "self_attn_layer_norm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "final_layer_norm": "ffn_norm",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}
OPT = {
    "model.decoder.embed_tokens": "token_embd",
    "model.decoder.embed_positions": "position_embd",
    "model.decoder.layers": OPT_LAYER,
    "model.decoder.final_layer_norm": "output_norm",
}
NAMES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "falcon": FALCON,
    "opt": OPT,
}


def checkpoint_from_hf(model: PreTrainedModel) -> Checkpoint:
    """Converts a model of one of the five families."""
    config = model.config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    tensors = {}
    for hf_name, parameter in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = gguf_name(NAMES[config.model_type], hf_name)
        tensors[name] = parameter.detach().to(torch.float64).numpy()
    metadata = common_metadata(config)
    if arch == "llama":
        tensors = {name: interleaved(name, data, config) for name, data in tensors.items()}
    if arch in ("llama", "qwen2"):
        metadata |= llama_metadata(config)
        if config.rope_parameters["rope_type"] == "llama3":
            tensors["rope_freqs.weight"] = llama3_divisors(config)
    if arch == "falcon":
        tensors = {name: regrouped_qkv(name, data, config) for name, data in tensors.items()}
        metadata |= {
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
            "attention.head_count_kv": falcon_kv_heads(config),
            "feed_forward_length": config.ffn_hidden_size,
        }
    if arch == "opt":
        metadata |= {
            "attention.layer_norm_epsilon": 1e-5,  # torch's, the configuration has none
            "feed_forward_length": config.ffn_dim,
        }
    keyed = {f"{arch}.{key}": value for key, value in metadata.items()}
    return Checkpoint({"general.architecture": arch} | keyed, tensors)


def gguf_name(names: dict[str, Any], hf_name: str) -> str:
    """GGUF's name of a parameter, for example blk.3.attn_q.weight."""
    module, _, kind = hf_name.rpartition(".")
    if module in names:
        return f"{names[module]}.{kind}"
    for prefix, layer_names in names.items():
        if module.startswith(prefix + "."):
            number, _, inner = module.removeprefix(prefix + ".").partition(".")
            return f"blk.{number}.{layer_names[inner]}.{kind}"
    raise KeyError(hf_name)


def common_metadata(config: Any) -> dict[str, Any]:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }


def llama_metadata(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    metadata = {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if config.model_type == "mistral" and config.sliding_window:
        metadata["attention.sliding_window"] = config.sliding_window
    if rope["rope_type"] in ("linear", "yarn"):
        metadata["rope.scaling.type"] = rope["rope_type"]
        metadata["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        metadata["rope.scaling.original_context_length"] = original
    return metadata


def interleaved(name: str, data: Array, config: Any) -> Array:
    """Reorders q and k rows so that a rotated pair (i, i + head_dim / 2) becomes (2i, 2i + 1)."""
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return data
    halves = data.reshape(heads, 2, len(data) // heads // 2, *data.shape[1:])
    return halves.swapaxes(1, 2).reshape(data.shape)


def falcon_kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def regrouped_qkv(name: str, data: Array, config: Any) -> Array:
    """From groups of (q heads, one k head, one v head) to all q, all k, all v."""
    if not name.endswith("attn_qkv.weight"):
        return data
    n_kv = falcon_kv_heads(config)
    per_group = config.num_attention_heads // n_kv
    head_dim = config.hidden_size // config.num_attention_heads
    groups = data.reshape(n_kv, per_group + 2, head_dim, config.hidden_size)
    parts = groups[:, :per_group], groups[:, per_group], groups[:, per_group + 1]
    return np.concatenate([part.reshape(-1, config.hidden_size) for part in parts])


def llama3_divisors(config: Any) -> Array:
    """Llama 3.1: divisors of each pair's frequency, 1 for short waves and `factor` for long."""
    rope = config.rope_parameters
    n_rot = config.hidden_size // config.num_attention_heads
    frequency = rope["rope_theta"] ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
    turns = rope["original_max_position_embeddings"] * frequency / (2.0 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept: Array = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / rope["factor"] + kept)
