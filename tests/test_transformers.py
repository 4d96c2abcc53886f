"""The oracle and the engine repeat what Hugging Face `transformers` computes, on random models."""

from __future__ import annotations

from pathlib import Path

import make_model
import numpy as np
import pytest

from oracle import errors, forward, write_gguf
from qinfer import Model

MISSING = "torch and transformers are not installed: pip install '.[test-hf]'"
pytest.importorskip("torch", reason=MISSING)
pytest.importorskip("transformers", reason=MISSING)

from hf_models import VARIANTS, random_model, text_and_logits  # noqa: E402
from oracle.from_hf import checkpoint_from_hf  # noqa: E402

HIDDEN_ACT = {"llama-relu": "relu", "llama-gelu-tanh": "gelu_tanh"}


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest):
    """A checkpoint, a text, and the logits of `transformers` in float64 for it."""
    model = random_model(*VARIANTS[request.param]).double()
    tokens, logits = text_and_logits(model)
    checkpoint = checkpoint_from_hf(model)
    if request.param in HIDDEN_ACT:
        checkpoint.metadata["qinfer.hidden_act"] = HIDDEN_ACT[request.param]
    return checkpoint, tokens, logits


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
