"""The source tree keeps its own rules: length, heads, layers, no printing, a plain C header."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / "vendor" / "runtime"
HEADER = RUNTIME / "include" / "qinfer.h"

FOLDERS = ["qinfer", "build_backend", "tests", "tools", "vendor"]
SUFFIXES = {".py", ".h", ".cpp", ".c"}
SOURCES = sorted(
    path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in SUFFIXES
)
RUNTIME_SOURCES = [path for path in SOURCES if path.is_relative_to(RUNTIME / "src")]

# A folder of src/ uses those before it, never those after it.
LAYERS = [
    "base",
    "quant",
    "gguf",
    "kernels",
    "sparse",
    "device",
    "model",
    "sampling",
    "engine",
    "capi",
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_tree_is_here() -> None:
    assert len(SOURCES) > 50
    assert len(RUNTIME_SOURCES) > 20


def test_no_file_is_over_900_lines() -> None:
    lengths = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert {name: n for name, n in lengths.items() if n > 900} == {}


def test_every_file_begins_by_saying_its_subject() -> None:
    # A .cpp may leave that to the header of its name.
    begins = {".py": ('"""', "#!"), ".h": ("//", "/*"), ".cpp": ("//",), ".c": ("/*", "//")}
    headless = [
        name_of(path)
        for path in SOURCES
        if path.stat().st_size
        and not (path.suffix == ".cpp" and path.with_suffix(".h").exists())
        and not path.read_text("utf-8").startswith(begins[path.suffix])
    ]
    assert headless == []


def test_the_runtime_neither_prints_nor_ends_the_process() -> None:
    words = re.compile(
        r"#include <iostream>|std::c(out|err|log)\b|"
        r"\b(printf|fprintf|puts|perror|abort|exit|_exit|terminate)\("
    )
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in RUNTIME_SOURCES
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if words.search(line.split("//")[0])
    ]
    assert found == []


def test_includes_go_up_the_layers() -> None:
    assert {path.relative_to(RUNTIME / "src").parts[0] for path in RUNTIME_SOURCES} <= set(LAYERS)
    include = re.compile(r'^\s*#include "(\w+)/', re.MULTILINE)
    wrong = [
        f"{name_of(path)} includes {layer}/"
        for path in RUNTIME_SOURCES
        for layer in include.findall(path.read_text("utf-8"))
        if LAYERS.index(layer) > LAYERS.index(path.relative_to(RUNTIME / "src").parts[0])
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "command", [["cc", "-x", "c", "-std=c11"], ["c++", "-x", "c++", "-std=c++20"]], ids=["c", "c++"]
)
def test_the_header_is_plain_c_and_cpp(command: list[str]) -> None:
    flags = ["-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    done = subprocess.run(
        [*command, *flags, str(HEADER)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
