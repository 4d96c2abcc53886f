"""PEP 517 hooks: scikit-build-core's, after translating our settings and checking the machine."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scikit_build_core import build as core

Settings = dict[str, str | list[str]] | None

# What `pip install -C<name>=<value>` takes beside scikit-build-core's own settings.
_CHOICES = {
    "native": ("cmake.define.QINFER_NATIVE", {"on": "ON", "off": "OFF"}),
    "cuda": ("cmake.define.QINFER_CUDA", {"off": "off", "jit": "jit", "embed": "embed"}),
}

# 12.9 is the newest whose cubins load on drivers of CUDA 12 and 13 alike.
_NVRTC = "nvidia-cuda-nvrtc-cu12==12.9.*"


def _translate(settings: Settings) -> dict[str, str | list[str]]:
    translated: dict[str, str | list[str]] = {}
    for name, value in (settings or {}).items():
        if name not in _CHOICES:
            translated[name] = value
            continue
        define, allowed = _CHOICES[name]
        if not isinstance(value, str) or value not in allowed:
            sys.exit(f"-C{name}={value}: the allowed values are {', '.join(allowed)}.")
        translated[define] = allowed[value]
    return translated


def _embeds_cubins(settings: Settings) -> bool:
    return (settings or {}).get("cuda") == "embed"


def _requires(settings: Settings, found: list[str]) -> list[str]:
    return [*found, _NVRTC] if _embeds_cubins(settings) else found


@contextmanager
def _with_cubins(settings: Settings) -> Iterator[Settings]:
    """The translated settings; with -Ccuda=embed, of a build that finds compiled kernels."""
    translated = _translate(settings)
    if not _embeds_cubins(settings):
        yield translated
        return
    with tempfile.TemporaryDirectory(prefix="qinfer-cubins-") as folder:
        command = [sys.executable, str(Path(__file__).with_name("cubins.py")), folder]
        done = subprocess.run(command, check=False)
        if done.returncode != 0:
            sys.exit(done.returncode)
        translated["cmake.define.QINFER_CUBINS"] = str(Path(folder, "cubins.cpp"))
        yield translated


def _check_machine() -> None:
    libc, version = platform.libc_ver()
    supported = (
        sys.platform == "linux"
        and platform.machine() in ("x86_64", "aarch64")
        and libc == "glibc"
        and tuple(map(int, version.split("."))) >= (2, 28)
    )
    if not supported:
        sys.exit(
            "qinfer runs on Linux with glibc 2.28 or newer, on x86-64 and aarch64; "
            f"this is {platform.system()} with {libc or 'another C library'} {version} "
            f"on {platform.machine()}."
        )
    chosen = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(shutil.which(name) for name in chosen or ("c++", "g++", "clang++")):
        sys.exit(
            f"qinfer compiles its runtime and found no C++ compiler {' '.join(chosen)}".rstrip()
            + ": install GCC 11 or Clang 14 or newer (on Debian and Ubuntu: apt install g++), "
            "or name one in CXX."
        )


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return core.get_requires_for_build_sdist(_translate(config_settings))


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    _check_machine()
    found = core.get_requires_for_build_wheel(_translate(config_settings))
    return _requires(config_settings, found)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    _check_machine()
    found = core.get_requires_for_build_editable(_translate(config_settings))
    return _requires(config_settings, found)


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return core.prepare_metadata_for_build_wheel(metadata_directory, _translate(config_settings))


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return core.prepare_metadata_for_build_editable(metadata_directory, _translate(config_settings))


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _check_machine()
    with _with_cubins(config_settings) as settings:
        return core.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _check_machine()
    with _with_cubins(config_settings) as settings:
        return core.build_editable(wheel_directory, settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    settings = _translate(config_settings)
    if not (Path(".git").exists() and shutil.which("git")):
        return core.build_sdist(sdist_directory, settings)
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(head)
        file.flush()
        # An sdist has no history to ask, so it carries the hash of the commit it was made from.
        settings[f"sdist.force-include.{file.name}"] = "vendor/runtime/git-hash"
        return core.build_sdist(sdist_directory, settings)
