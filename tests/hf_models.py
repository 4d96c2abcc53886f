"""Tiny random transformers models: their configurations, and the logits they give a text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

N_VOCAB = 301
LLAMA = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
FALCON = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
}
SEVEN = {"multi_query": True, "new_decoder_architecture": False}
FORTY = {"num_kv_heads": 2, "new_decoder_architecture": True}
OPT = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "do_layer_norm_before": True,
    "activation_function": "relu",
}
# The name of the class without its ending, and the configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama-tied": ("Llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-relu": ("Llama", LLAMA | {"hidden_act": "relu"}),
    "llama-gelu-tanh": ("Llama", LLAMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-wide-heads": ("Llama", LLAMA | {"head_dim": 32}),
    "llama-linear": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-yarn": ("Llama", LLAMA | {"rope_parameters": YARN_ROPE}),
    "llama3": ("Llama", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 7}),
    "qwen2": ("Qwen2", LLAMA),
    "falcon-7b": ("Falcon", FALCON | SEVEN),
    "falcon-40b": ("Falcon", FALCON | FORTY),
    "opt": ("OPT", OPT),
}


def random_model(family: str, options: dict[str, Any]) -> transformers.PreTrainedModel:
    """A model of a family in float32, always the same, with parameters that show mistakes."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model: transformers.PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh models have norms of ones, biases of zeros and attention that hardly looks:
            # none of which could show a mistake.
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = 0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[1] ** 0.5
            parameter.normal_(centre, spread)
    return model.eval()


def text_and_logits(
    model: transformers.PreTrainedModel,
) -> tuple[list[int], np.ndarray[Any, np.dtype[Any]]]:
    """60 random tokens, and the model's logits for them."""
    tokens = torch.randint(0, model.config.vocab_size, (1, 60))
    with torch.no_grad():
        logits = model(tokens).logits[0].numpy()
    return tokens[0].tolist(), logits
