"""Converted checkpoints compute what Hugging Face `transformers` computes, on random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import RANK, write_predictors, write_tokenizer
from oracle import errors
from qinfer import Model
from qinfer._gguf import GGUF
from qinfer.tools.convert import convert
from qinfer.tools.convert_dense import convert_dense

MISSING = "torch and transformers are not installed: pip install '.[test-hf]'"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)

N_VOCAB = 301
LLAMA = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
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
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "do_layer_norm_before": True,
    "activation_function": "relu",
}
DENSE = {
    "llama": ("Llama", LLAMA),
    "llama-tied": ("Llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-relu": ("Llama", LLAMA | {"hidden_act": "relu"}),
    "llama-gelu-tanh": ("Llama", LLAMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-wide-heads": ("Llama", LLAMA | {"head_dim": 32}),
    "llama-biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-yarn": ("Llama", LLAMA | {"rope_parameters": YARN_ROPE}),
    "llama-yarn-attention": (
        "Llama",
        LLAMA | {"rope_parameters": YARN_ROPE | {
            "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    "llama3": ("Llama", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 7}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2-tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "falcon-7b": ("Falcon", FALCON | SEVEN),
    "falcon-40b": ("Falcon", FALCON | FORTY),
    "falcon-11b": ("Falcon", FALCON | FORTY | {"num_ln_in_parallel_attn": 1}),
    "opt": ("OPT", OPT),
    "opt-gelu": ("OPT", OPT | {"activation_function": "gelu"}),
}  # fmt: skip
SPARSE = {
    "llama": ("Llama", LLAMA | {"hidden_act": "relu"}),
    "llama-tied": ("Llama", LLAMA | {"hidden_act": "relu", "tie_word_embeddings": True}),
    "mistral": ("Mistral", LLAMA | {"hidden_act": "relu", "sliding_window": 7}),
    "falcon-7b": ("Falcon", FALCON | SEVEN | {"activation": "relu"}),
    "falcon-40b": ("Falcon", FALCON | FORTY | {"activation": "relu"}),
    "opt": ("OPT", OPT),
}


def saved(
    folder: Path, family: str, options: dict[str, Any]
) -> tuple[dict[str, Any], list[int], np.ndarray[Any, np.dtype[np.float64]]]:
    """Saves a random model; returns its configuration, a text, and its logits for it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh models have norms of ones, biases of zeros and attention that hardly looks:
            # none of which could show a mistake.
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = 0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[1] ** 0.5
            parameter.normal_(centre, spread)
    model.save_pretrained(folder)
    write_tokenizer(folder, N_VOCAB)
    tokens = torch.randint(0, N_VOCAB, (1, 60))
    with torch.no_grad():
        logits = model.double()(tokens).logits[0].numpy()
    return json.loads((folder / "config.json").read_text()), tokens[0].tolist(), logits


def assert_repeats(path: Path, tokens: list[int], expected: Any, **options: Any) -> None:
    """Keys and values kept in F16 err by up to 2^-12 of each; scores have a spread of about 2."""
    with Model(path, **options) as model, model.context() as context:
        context.feed(tokens, logits="all")
        difference = errors(context.all_logits, expected)
    assert np.median(difference) < 2e-3
    assert difference.max() < 1e-2


@pytest.mark.parametrize("name", DENSE)
def test_dense_files_repeat_transformers(name: str, tmp_path: Path) -> None:
    _, tokens, logits = saved(tmp_path, *DENSE[name])
    path = convert_dense(tmp_path)
    assert path.name == "ggml-model-f32.gguf"
    assert_repeats(path, tokens, logits)


@pytest.mark.parametrize("sparsity", ["off", "exact", "predict"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_files_repeat_transformers(name: str, sparsity: str, tmp_path: Path) -> None:
    """Predictors that call every neuron active leave the model as it was."""
    config, tokens, logits = saved(tmp_path, *SPARSE[name])
    write_predictors(tmp_path / "predictor", config, rank=RANK, threshold=-1e9)
    path = convert(tmp_path, tmp_path / "predictor", outtype="f32")
    assert_repeats(path, tokens, logits, sparsity=sparsity, prefill="sparse")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_converted_alike(zipped: bool, tmp_path: Path) -> None:
    """The state dict of a .bin, tied parameters and views of others included."""
    config, _, _ = saved(tmp_path / "a", *SPARSE["llama-tied"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    (tmp_path / "b").mkdir()
    model.config.save_pretrained(tmp_path / "b")
    write_tokenizer(tmp_path / "b", N_VOCAB)
    state = model.state_dict()
    assert "lm_head.weight" in state
    path = tmp_path / "b" / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    write_predictors(tmp_path / "predictor", config)
    tensors = []
    for name in "ab":
        out = convert(tmp_path / name, tmp_path / "predictor", tmp_path / f"{name}.gguf")
        with GGUF(out) as file:
            tensors.append([(t.name, t.type, t.shape, t.data.tobytes()) for t in file.tensors])
    assert tensors[0] == tensors[1]
