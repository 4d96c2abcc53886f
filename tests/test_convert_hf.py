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

from hf_models import (  # noqa: E402
    FALCON,
    FORTY,
    LLAMA,
    N_VOCAB,
    OPT,
    SEVEN,
    VARIANTS,
    YARN_ROPE,
    random_model,
    text_and_logits,
)

DENSE = VARIANTS | {
    "llama-biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn-attention": (
        "Llama",
        LLAMA | {"rope_parameters": YARN_ROPE | {
            "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    "qwen2-tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "falcon-11b": ("Falcon", FALCON | FORTY | {"num_ln_in_parallel_attn": 1}),
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
    model = random_model(family, options)
    model.save_pretrained(folder)
    write_tokenizer(folder, N_VOCAB)
    tokens, logits = text_and_logits(model.double())
    return json.loads((folder / "config.json").read_text()), tokens, logits


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
