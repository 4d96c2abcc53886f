"""One build of the package, sdist first and the wheel from it, for the tests that look inside."""

import functools
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Build:
    """Where the results lie; `folder` keeps them alive until the interpreter ends."""

    sdist: Path
    wheel: Path
    objects: list[Path]
    folder: tempfile.TemporaryDirectory[str]


def call_backend(
    project: Path, hook: str, output: Path, settings: dict[str, str], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs one build hook in `project` the way an installer does: a process of its own."""
    code = f"import qinfer_build; print(qinfer_build.{hook}({str(output)!r}, {settings!r}))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project / "build_backend"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def _built(project: Path, hook: str, output: Path, settings: dict[str, str]) -> Path:
    done = call_backend(project, hook, output, settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return output / done.stdout.splitlines()[-1]


@functools.cache
def build() -> Build:
    folder = tempfile.TemporaryDirectory(prefix="qinfer-build-")
    output = Path(folder.name)
    sdist = _built(ROOT, "build_sdist", output, {})
    with tarfile.open(sdist) as archive:
        archive.extractall(output, filter="data")
    project = output / sdist.name.removesuffix(".tar.gz")
    # As far from the sources as the presets' folders, so that a compiler cache knows the objects.
    tree = project / "build" / "tree"
    wheel = _built(project, "build_wheel", output, {"build-dir": str(tree)})
    return Build(sdist, wheel, sorted(tree.rglob("*.o")), folder)


def symbols(path: Path, *options: str) -> set[str]:
    """The names in a library or an object file, as `nm` with these options lists them."""
    lines = subprocess.check_output(["nm", *options, str(path)], text=True).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}
