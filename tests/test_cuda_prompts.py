"""Prompts on a GPU: by tiles, through cuBLAS, with the host's neurons, each token alone.

The stand-in is the GPU. What it cannot show is speed, and the rounding of cuBLAS's own kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cuda_standin
from test_cuda_model import on_gpu, products
from test_sparsity import CASES, QUANTISED


@pytest.mark.parametrize("name", ["llama-f16", "llama-q4_0", "llama-q4_0-ordinary"])
def test_prompts_through_cublas(name: str, tmp_path: Path) -> None:
    """Halves lose what tiles keep; both are close, and everything is counted."""
    path = (CASES | QUANTISED)[name].write(tmp_path)
    tiles, cublas = on_gpu("cuda_prompt_cases.prompts", path, ["cuda:0", "cuda:1"], devices=2)
    exact = name in CASES
    assert tiles["error"] < (2e-5 if exact else 2e-2)
    assert (2e-5 if exact else 0.0) < cublas["error"] < (2e-3 if exact else 3e-2)
    assert cublas["error"] != tiles["error"]
    for found in (tiles, cublas):
        assert 0 < found["held"] <= found["used"] <= found["budget"]
        assert found["log"] == []


def test_what_is_faster_is_measured_once(tmp_path: Path) -> None:
    path = CASES["llama-f16"].write(tmp_path)
    products(2).unlink(missing_ok=True)
    (first,) = on_gpu("cuda_prompt_cases.prompts", path, ["cuda:2"], devices=3)
    assert first["error"] < 2e-3
    head, *findings = products(2).read_text().splitlines()
    assert head.startswith("cuBLAS 13.0, ")
    cases = {tuple(line.split()[:3]) for line in findings}
    # The head computes 32 rows at a time.
    what = {("rows", "64"), ("rows", "32"), ("neurons", "64"), ("streamed", "64")}
    assert cases == {("F16", *case) for case in what}
    assert len(findings) == len(cases)
    for line in findings:
        winners = ("gpu", "host") if "streamed" in line else ("cublas", "tiles")
        assert line.split()[3] in winners
    written = products(2).stat()
    on_gpu("cuda_prompt_cases.prompts", path, ["cuda:2"], devices=3)
    assert products(2).stat().st_mtime_ns == written.st_mtime_ns
    products(2).write_text("\n".join(["cuBLAS 1.0", *findings]))
    on_gpu("cuda_prompt_cases.prompts", path, ["cuda:2"], devices=3)
    assert products(2).read_text().splitlines()[0] == head


def test_without_cublas_prompts_are_multiplied_by_tiles(tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    folder.mkdir()
    for library in cuda_standin.libraries().iterdir():
        if not library.name.startswith("libcublas"):
            (folder / library.name).symlink_to(library)
    variables = {
        "LD_LIBRARY_PATH": str(folder),
        "LD_PRELOAD": str(folder / "libnvrtc.so.13"),
        "CUDA_PATH": "",
    }
    path = CASES["llama-f16"].write(tmp_path)
    (found,) = on_gpu("cuda_prompt_cases.prompts", path, ["cuda:1"], devices=2, variables=variables)
    assert found["error"] < 2e-5
    (line,) = found["log"]
    assert "without cuBLAS" in line
    assert "libcublas.so.13" in line


@pytest.mark.parametrize("name", ["llama-wide", "opt", "llama-q4_0-ordinary"])
def test_neurons_of_the_host_are_brought_over(name: str, tmp_path: Path) -> None:
    """All or half of them, of llama-wide in more than two panels; the processor computes none."""
    path = (CASES | QUANTISED)[name].write(tmp_path)
    found = on_gpu("cuda_prompt_cases.streamed", path, ["none", "half"], devices=4)
    for share in ("none", "half"):
        # Neurons with biases, some of which are here, are computed a few tokens at a time.
        whole = name != "opt" or share == "none"
        check_streamed(found["cpu"], found[share], 2e-5 if name in CASES else 2e-2, whole)


def check_streamed(cpu: dict[str, Any], gpu: dict[str, Any], error: float, whole: bool) -> None:
    assert gpu["error"] < error
    assert gpu["host_seconds"] == 0
    assert gpu["held"] <= gpu["budget"]
    if whole:
        assert gpu["dense"] == cpu["dense"]
    for mine, expected in zip(gpu["exact"], cpu["exact"], strict=True):
        assert mine[0] == expected[0] == 40
        assert 0 < mine[1] == pytest.approx(expected[1], rel=5e-3)


@pytest.mark.parametrize("name", ["llama", "llama-q4_0-ordinary"])
def test_deterministic(name: str, tmp_path: Path) -> None:
    """The same bits however a prompt is cut."""
    found = on_gpu("cuda_prompt_cases.chunked", (CASES | QUANTISED)[name].write(tmp_path))
    assert found["dense"] == found["sparse"] == 1
    # Tiles add in another order, and a sum may then fall on the other side of an int8 code.
    assert 0 < found["distance"] < (1e-3 if name in CASES else 0.2)
    assert found["refused"].startswith("kv_step=0.1 follows the times that steps take")
