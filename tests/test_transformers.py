"""The oracle and the engine repeat what Hugging Face `transformers` computes, on random models."""

from __future__ import annotations

from pathlib import Path

import make_model
import numpy as np
import pytest

from oracle import errors, forward, write_gguf
from qinfer import Model

MISSING = "torch and transformers are not installed: pip install '.[test-hf]'"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)

from oracle.from_hf import checkpoint_from_hf  # noqa: E402

LLAMA = {
    "vocab_size": 301,
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
    "vocab_size": 301,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
}
OPT = {
    "vocab_size": 301,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "do_layer_norm_before": True,
    "activation_function": "relu",
}
CASES = {
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
    "falcon-7b": ("Falcon", FALCON | {"multi_query": True, "new_decoder_architecture": False}),
    "falcon-40b": ("Falcon", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "opt": ("OPT", OPT),
}
HIDDEN_ACT = {"llama-relu": "relu", "llama-gelu-tanh": "gelu_tanh"}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest):
    """A checkpoint, a text, and the logits of `transformers` in float64 for it."""
    family, options = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh models have norms of ones, biases of zeros and attention that hardly looks:
            # none of which could show a mistake.
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = 0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[1] ** 0.5
            parameter.normal_(centre, spread)
    tokens = torch.randint(0, config.vocab_size, (1, 60))
    with torch.no_grad():
        logits = model(tokens).logits[0].numpy()
    checkpoint = checkpoint_from_hf(model)
    if request.param in HIDDEN_ACT:
        checkpoint.metadata["qinfer.hidden_act"] = HIDDEN_ACT[request.param]
    return checkpoint, tokens[0].tolist(), logits


def test_oracle_repeats_transformers(case) -> None:
    """`transformers` keeps rotary angles in float32 even in a float64 model.

    Each of three layers errs by up to 60 positions times two roundings of 2^-24: about 2e-5 in all.
    """
    checkpoint, tokens, expected = case
    logits = forward(checkpoint, tokens)
    assert np.abs(logits - expected).max() < 5e-5 * expected.std()


def test_engine_repeats_transformers(case, tmp_path: Path) -> None:
    """Through a GGUF file; keys and values kept in F16 err by up to 2^-12 of each.

    Scores have a spread of about 2 here, so that an error of a key weighs about as much again.
    """
    checkpoint, tokens, expected = case
    words = make_model.vocabulary(expected.shape[1])
    path = write_gguf(tmp_path / "hf.gguf", checkpoint.metadata | words, checkpoint.tensors)
    with Model(path) as model, model.context() as context:
        context.feed(tokens, logits="all")
        difference = errors(context.all_logits, expected)
    assert np.median(difference) < 2e-3
    assert difference.max() < 1e-2
