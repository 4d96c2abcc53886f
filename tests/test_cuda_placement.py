"""What of a model a GPU keeps, and when none is used; the stand-in is the GPU."""

from __future__ import annotations

import logging
from pathlib import Path

from test_cuda_model import DATA, STORIES, on_gpu
from test_sparsity import QUANTISED, Case


def test_budgets() -> None:
    """From nothing to everything: what fits is kept, and no budget is exceeded."""
    rows = on_gpu(
        "cuda_placement_cases.budgets",
        STORIES,
        ["0", "4MiB", "5MiB", "8MiB", "10MiB", "18MiB", "60MiB"],
    )
    kept = [row for row in rows if "refused" not in row]
    for row in rows[:1]:
        assert row["refused"] == "OutOfMemory"
        assert "one layer's attention" in row["message"]
    assert len(kept) >= 4
    for row in kept:
        assert row["used"] <= row["budget"]
        assert row["held"] <= row["budget"]
        assert row["error"] < 0.03  # int8 codes that flip; see test_quantised_weights
    layers = [row["n_layers"] for row in kept]
    assert layers == sorted(layers)
    assert 0 < layers[0] < layers[-1] == 6
    assert kept[-1]["has_head"]
    assert kept[-1]["n_neurons"] == 6 * 768
    assert any(0 < row["n_neurons"] < 6 * 768 for row in kept)


def test_what_is_kept_does_not_depend_on_contexts_before(tmp_path: Path) -> None:
    """Nor on whether the modes of sparsity had to be timed first."""
    found = on_gpu("cuda_placement_cases.placed_again", STORIES, tmp_path)
    assert found["in_turn"] == found["alone"]
    assert len({str(ids) for ids, *_ in found["alone"]}) > 3
    assert (found["first has times"], found["second has times"]) == (False, True)
    assert found["first"] == found["second"]
    assert found["left"] == 0


def test_a_budget_beyond_the_cards_memory_is_what_is_free() -> None:
    memory = (24 + 9) << 20  # of which the driver takes 24
    (row,) = on_gpu("cuda_placement_cases.budgets", STORIES, ["6GiB"], memory=memory)
    assert row["used"] <= row["budget"] <= 9 << 20
    assert row["error"] < 0.03
    assert 0 < row["n_neurons"] < 6 * 768
    (line,) = [line for line in row["log"] if "is the budget" in line]
    assert "6.00 GiB of its memory may be used" in line


def test_a_split_too_large_says_what_helps() -> None:
    says = on_gpu("cuda_placement_cases.too_large", STORIES)
    assert says.startswith("OutOfMemory: the given split puts ")
    assert says.endswith("a larger budget is needed, a split made for less, or a smaller context")


def test_a_budget_that_is_measured_leaves_room_for_code(tmp_path: Path) -> None:
    """And for recorded steps: what was promised is there when all of them are loaded."""
    path = Case("llama", "f16", sizes={"n_embd": 256, "n_head": 8, "n_ff": 512}).write(tmp_path)
    found = on_gpu("cuda_placement_cases.promised", path, devices=2)
    for budget, there in found:
        assert 0.99 * 2**30 - (64 << 20) < budget <= there
    first, other, again = (budget for budget, _ in found)
    assert first > other == again


def test_lists_of_neurons_are_checked(tmp_path: Path) -> None:
    path = QUANTISED["llama-q4_0-ordinary"].write(tmp_path)
    block, other = list(range(32, 64)), list(range(96, 128))
    lists = [block, block + other, block[:-1], [*block, 96], [3, 2], [-1], [160], []]
    answers = on_gpu("cuda_placement_cases.split_by", path, lists)
    assert answers[0] == answers[1] == answers[7] == ""
    for answer in answers[2:4]:
        assert answer.startswith("ArgumentError: layer 0: down is stored in blocks of 32 neurons")
    for answer in answers[4:7]:
        assert answer.startswith("ArgumentError: layer 0: neurons have to be ascending")
    assert "when the model's first context was made" in answers[8]


def test_contexts_beyond_the_first() -> None:
    """The processor alone computes those that find no room, and says so once."""
    found = on_gpu("cuda_placement_cases.contexts", STORIES)
    assert found["on_gpu"] == {
        "first": True, "second": False, "another": False, "third": True,
        "after a call": True, "larger": True, "last": True, "huge": False, "at last": True,
    }  # fmt: skip
    assert max(found["errors"].values()) < 0.03  # int8 codes that flip; see test_quantised_weights
    first, again = found["warnings"]
    assert first == again
    assert "takes " in first and " of 8.0 MiB are left beside the model" in first
    kept = found["kept"]
    assert 0 < kept["larger"] < kept["first"] == kept["third"] == kept["after a call"]
    assert kept["at last"] == kept["last"] == kept["first"]
    assert "one layer's attention" in found["why"]
    assert found["left"] == 0


def test_auto_uses_a_gpu_that_is_there(tmp_path: Path) -> None:
    found = on_gpu("cuda_placement_cases.automatic", DATA / "stories260K.F32.gguf")
    assert found["device"] == "Stand-in GPU 0 (cuda:0)"
    assert found["on_gpu"] is False
    assert sum("the processor alone computes this context" in line for line in found["small"]) == 1
    hidden = on_gpu("cuda_placement_cases.automatic", DATA / "stories260K.F32.gguf", devices=0)
    assert hidden["device"] is None
    assert sum("no GPU is used" in line for line in hidden["log"]) == 1


def test_auto_uses_no_gpu_whose_memory_is_full() -> None:
    full = on_gpu(
        "cuda_placement_cases.automatic",
        DATA / "stories260K.F32.gguf",
        {"vram_budget": 6},
        memory=1000,
    )
    assert full["device"] is None
    (line,) = [line for line in full["log"] if "no GPU is used" in line]
    assert line.startswith("no GPU is used, and vram_budget=6 has no effect: ")
    assert "out of memory" in line
    plain, _, _ = on_gpu(
        "gpu_option_cases.without_gpu", DATA / "stories260K.F32.gguf", {"n_ctx": 64}, memory=1000
    )
    assert plain[0][0] == logging.WARNING
    assert plain[0][1].startswith("no GPU is used: the GPU ran out of memory")


def test_auto_does_without_a_gpu_that_fails(tmp_path: Path) -> None:
    """Want of memory says nothing about kernels, and is not kept."""
    tests, noted, failed, again, lost = on_gpu(
        "gpu_option_cases.automatic_in_want", DATA / "stories260K.F32.gguf", tmp_path
    )
    assert tests["used"] is False
    assert sum("its kernels could not be tested: " in line for line in tests["log"]) == 1
    assert not noted
    assert again is True
    for found in (failed, lost):
        assert found["on_gpu"] is False
        assert sum("the processor alone computes this" in line for line in found["log"]) == 1


def test_auto_uses_no_gpu_that_computes_wrong(tmp_path: Path) -> None:
    """It is found out once, and remembered for the card."""
    broken, again, explicit = on_gpu(
        "cuda_placement_cases.distrusted", DATA / "stories260K.F32.gguf", tmp_path
    )
    assert broken["device"] is None
    assert sum("computes wrong: 1 of" in line for line in broken["log"]) == 1
    assert again["device"] is None
    checking = (
        "compiling kernels for Stand-in GPU 0 and holding them against the processor's (once)"
    )
    assert broken["log"].count(checking) == 1
    assert checking not in again["log"]
    assert explicit == "Stand-in GPU 0 (cuda:0)"
