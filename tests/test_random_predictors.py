"""Predictors that know nothing: as many neurons as the true ones name, the same for every token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import random_predictors
from click.testing import CliRunner

from qinfer import Model
from qinfer._alias import embedded
from qinfer._gguf import GGUF

TEXT = "Once upon a time there was a little girl who loved to play in the park. " * 4
N_CTX, N_FF, N_LAYER = 32, 768, 6


def make(folder: Path, *options: str) -> Path:
    (folder / "text.txt").write_text(TEXT)
    out = folder / f"out{len(options)}.gguf"
    arguments = [str(embedded("stories")), str(out), "-f", str(folder / "text.txt"), "-c", "32"]
    done = CliRunner().invoke(random_predictors.main, [*arguments, *options])
    assert done.exit_code == 0, done.output
    return out


def signs(path: Path) -> np.ndarray:
    """Of the rows of all fc2, (n_layer, n_ff), which are of one sign each."""
    with GGUF(path) as file:
        tensors = [t for t in file.tensors if t.name.endswith(".fc2.weight")]
        blocks = [t.data.reshape(N_FF, 2, 34)[:, :, 2:].view(np.int8) for t in tensors]
    rows = np.sign(np.stack(blocks)).reshape(N_LAYER, N_FF, -1)
    assert (rows == rows[:, :, :1]).all()
    return rows[:, :, 0]


@pytest.mark.parametrize("options", [(), ("--frequent",)], ids=["random", "frequent"])
def test_they_name_as_many_neurons_as_the_true_ones(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    out = make(tmp_path, *options)
    with Model.demo() as model:
        chunk = model.tokenizer.encode(TEXT)[:N_CTX]
        n_chunks = len(model.tokenizer.encode(TEXT)) // N_CTX
    assert n_chunks == 2
    with Model(out) as model, model.context(sparsity="predict") as context:
        context.count_activations()
        context.feed(chunk, generated=True)
        layers = context.stats().layers
        active = np.stack([context.activation_counts(i) for i in range(N_LAYER)]) > 0
    named = signs(out) > 0
    assert [layer.n_predicted for layer in layers] == (N_CTX * named.sum(1)).tolist()
    assert active.any() and not active[~named].any()
    with Model.demo() as model, model.context(sparsity="predict") as context:
        for begin in range(0, n_chunks * N_CTX, N_CTX):
            context.truncate(0)
            chunk = model.tokenizer.encode(TEXT)[begin : begin + N_CTX]
            context.feed([model.tokenizer.bos_id, *chunk[1:]], generated=True)
        true = [layer.n_predicted / layer.n_tokens for layer in context.stats().layers]
    assert named.sum(1).tolist() == [round(n) for n in true]


def test_the_frequent_ones_are_active_more_often_than_random_ones(tmp_path: Path) -> None:
    found = []
    for path in (make(tmp_path), make(tmp_path, "--frequent"), make(tmp_path, "--seed", "1")):
        with Model(path) as model, model.context(sparsity="predict") as context:
            context.feed(model.tokenizer.encode(TEXT), generated=True)
            found.append(sum(layer.n_active for layer in context.stats().layers))
    assert found[1] > 1.5 * max(found[0], found[2])


def test_only_predictors_change_and_the_seed_says_how(tmp_path: Path) -> None:
    first, other = make(tmp_path), make(tmp_path, "--seed", "1")
    assert (signs(first) != signs(other)).mean() > 0.1
    with GGUF(embedded("stories")) as before, GGUF(first) as after:
        assert before.metadata.keys() == after.metadata.keys()
        for old, new in zip(before.tensors, after.tensors, strict=True):
            assert (old.name, old.shape, old.type) == (new.name, new.shape, new.type)
            assert (".fc" in old.name) != np.array_equal(old.data, new.data)


def test_a_text_shorter_than_a_chunk_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once")
    done = CliRunner().invoke(
        random_predictors.main,
        [str(embedded("stories")), str(tmp_path / "out"), "-f", str(tmp_path / "text.txt")],
    )
    assert done.exit_code == 1
    assert "the text has 2 tokens, fewer than -c 512" in done.output
    assert not (tmp_path / "out").exists()
