"""The model in the package: made as its recipe says, as good as the checkpoint it came from."""

from __future__ import annotations

from pathlib import Path

import make_demo_model
import pytest
from click.testing import CliRunner

from qinfer import Model
from qinfer._alias import embedded
from qinfer._gguf import GGUF
from qinfer.perplexity import perplexity
from qinfer.tools.convert import convert


@pytest.fixture(scope="module")
def checkpoint(test_data: Path) -> Path:
    return test_data / "models" / "relu-stories-15M"


def test_the_recipe_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.gguf"
    done = CliRunner().invoke(make_demo_model.main, [str(checkpoint), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == embedded("stories").read_bytes()


def test_quantising_costs_hardly_anything(
    checkpoint: Path, test_data: Path, tmp_path: Path
) -> None:
    whole = convert(checkpoint, checkpoint / "predictor", tmp_path / "f16.gguf", tied_head=True)
    text = (test_data / "texts" / "children-stories-en.txt").read_text(encoding="utf-8")[:15_000]
    for mode in ("off", "predict"):
        with Model(whole) as before, Model.demo() as after:
            a, b = (perplexity(m, text, n_ctx=256, sparsity=mode).value for m in (before, after))
        assert a == pytest.approx(b, rel=0.01)


def test_what_it_is() -> None:
    with GGUF(embedded("stories")) as file:
        assert file.info.is_powerinfer
        types = {tensor.name: tensor.type for tensor in file.tensors}
    assert types.pop("token_embd.weight") == "Q5_1"
    assert {kind for name, kind in types.items() if "norm" not in name} == {"Q8_0"}
    with Model.demo() as model:
        info = model.info
        assert (info.hidden_act, info.has_sparse_act, info.tied_head) == ("relu", True, True)
        assert (info.predictor_rank, info.down_by_neuron) == (64, True)


def test_its_stories_come_to_an_end() -> None:
    with Model.demo() as model:
        story = model.generate("Once upon a time", temperature=0.6, seed=1)
        assert story.finish_reason == "stop"
        assert 50 < story.usage.completion_tokens < 250
        assert story.text.startswith(", there was")
