"""Kernels as the real NVRTC compiles them, tensor cores and all, run on the stand-in from their PTX."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from cuda_standin import on_standin, run_program
from package_build import ROOT

sys.path.insert(0, str(ROOT / "build_backend"))

import cubins


def _nvrtc() -> str:
    try:
        return str(cubins.nvrtc_library())
    except SystemExit:
        return ""


NVRTC = _nvrtc()
pytestmark = pytest.mark.skipif(
    not NVRTC, reason="NVRTC 12 is not installed here: pip install 'nvidia-cuda-nvrtc-cu12==12.9.*'"
)

# ---- the kernels' own tests ----

# Of every kernel that holds inline PTX, and of some that exchange values between lanes.
SELF_TESTS = [
    "tile 128x64 Q4_0 ",  # bytes, K = 32
    "tile 32x32 Q4_0 ",
    "tile 32x16 Q6_K ",  # bytes, K = 16
    "tile 32x32 Q6_K ",
    "product Q4_0 1x32",
    "product Q4_0 6x",
    "attend tiles F16, 6 heads over 2 of 64, to 94, window 5",
    "attend tiles F16, 2 heads over 1 of 128, to 129",
    "attend tiles Q8_0, 2 heads over 2 of 64, to 94, window 0",
    "attend F16, 2 heads over 1 of 32, to 129",
    "down tiles Q8_0 83x160",
    "append Q8_0, head_dim 64, n_rot 32",
    "append F16, head_dim 20, n_rot 10",
    "lists of 4100 neurons, 10%",
    "best of 8193",
    "log-probabilities of 1000",
    "rounds with the host, 67 ",
    "quantise 97",
    "rms norm of 576",
]


def run_self_tests(
    tmp_path: Path, names: list[str], variables: dict[str, str] | None = None, **settings: object
) -> dict[str, str]:
    """What was wrong with each of the tests; empty: nothing."""
    code = f"""
import json
from qinfer import _cuda
names = _cuda.self_test_names()
wanted = [i for i, name in enumerate(names) if name.startswith(tuple({names!r}))]
tests = _cuda.self_tests(0, wanted)
print(json.dumps({{t.name: "" if t.passed else t.problem or f"{{t.error:.3g}}" for t in tests}}))
"""
    # A folder of its own: compiled kernels are told apart by their sources, not by this mode.
    done = run_program(
        code,
        timeout=300,
        variables={"QINFER_CACHE_DIR": str(tmp_path)} | (variables or {}),
        nvrtc=NVRTC,
        **settings,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    for name in names:
        assert any(key.startswith(name) for key in found), f"no test is called {name!r}"
    return found


@pytest.mark.parametrize("capability", [75, 86])
def test_what_nvrtc_makes_of_kernels(capability: int, tmp_path: Path) -> None:
    """sm_75 has smaller products of matrices than later ones."""
    found = run_self_tests(tmp_path, SELF_TESTS, capability=capability)
    assert {name: problem for name, problem in found.items() if problem} == {}
