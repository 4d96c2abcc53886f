"""Where tests find their data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tools"))  # for make_model, whose random models tests use


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """The trained TinyStories model of 260 000 parameters, F32."""
    return HERE / "data" / "stories260K.F32.gguf"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of larger test data."""
    folder = os.environ.get("QINFER_TEST_DATA")
    if not folder:
        pytest.skip("set QINFER_TEST_DATA to the folder of shared test data")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"QINFER_TEST_DATA is {folder}, which is not a folder")
    return path
