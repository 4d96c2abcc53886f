"""What qinfer found on this machine, and why something is not used."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path

from . import __version__, _cuda, _cuda_check, _machine
from .errors import QInferError

_PACKAGES = {
    "numpy": "arrays",
    "cffi": "the library",
    "tokenizers": "byte-level BPE vocabularies",
    "sentencepiece": "SentencePiece vocabularies",
    "jinja2": "chat templates",
    "safetensors": "checkpoints",
    "huggingface_hub": "downloads",
    "click": "the command line",
    "rich": "progress bars",
}
_GIB = 2**30
# The GPU that a model takes whose device nobody names.
_AUTO = 0


def findings() -> list[tuple[str, str]]:
    """What was found, as (subject, finding); measures the read bandwidth, which takes a second."""
    cpu = _machine.processor()
    level = cpu.isa
    if cpu.isa != cpu.best_isa:
        level += f" (this machine has {cpu.best_isa}; QINFER_ISA asks for less)"
    bandwidth = _machine.read_bandwidth(cpu.n_usable_cores)
    rows = [
        ("qinfer", __version__),
        ("python", f"{platform.python_version()}, {sys.executable}"),
        ("system", f"{platform.platform()}, {platform.machine()}"),
        ("processor", cpu.brand),
        ("features", " ".join(cpu.features)),
        ("level", level),
        ("cores", f"{cpu.n_usable_cores} usable of {cpu.n_physical_cores}"),
        ("memory", _memory()),
        ("bandwidth", f"{bandwidth / 1e9:.1f} GB/s read by {cpu.n_usable_cores} threads"),
        *_cuda_findings(),
        ("CANN", f"not used: this version does not compute on Ascend NPUs; {_ascend_driver()}"),
    ]
    for name, purpose in _PACKAGES.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = f"missing, needed for {purpose}: pip install {name}"
        rows.append((name, found))
    return rows


def _memory() -> str:
    free, total = _machine.available_memory(), _machine.total_memory()
    return f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f} GiB"


def _cuda_findings() -> list[tuple[str, str]]:
    """The verdict first, then what it rests on."""
    found = _cuda.info()
    if found.driver.problem:
        return [("CUDA", f"not used: {found.driver.problem}")]
    rows = [("  driver", f"for CUDA {found.driver.version}")]
    working = []
    for number in range(found.n_devices):
        computes, finding = _gpu(number)
        rows.append((f"  GPU {number}", finding))
        if computes:
            working.append(number)
    verdict = _verdict(working)
    rows.append(("  NVRTC", _library(found.nvrtc)))
    if found.n_embedded_cubins:
        rows.append(("  kernels", f"{found.n_embedded_cubins} came compiled with this package"))
    rows.append(("  cuBLAS", _library(found.cublas)))
    if verdict and found.cublas.problem:
        verdict += "; prompts go faster with cuBLAS, which is missing (see below)"
    return [("CUDA", verdict or "not used: no GPU computes (see below)"), *rows]


def _verdict(working: list[int]) -> str:
    """Which of the GPUs that compute `device="auto"` takes; empty where none computes."""
    if not working:
        return ""
    if _AUTO not in working:
        return (
            f"GPU {working[0]} computes, for --device cuda:{working[0]}; without the option GPU "
            f"{_AUTO} alone would be used, which does not (see below)"
        )
    verdict = f"GPU {_AUTO} computes and is used"
    known = _cuda_check.verdicts(_AUTO)
    if any(known.values()):
        verdict = f"GPU {_AUTO} computes, but not all of it right (see below)"
    elif not known:
        verdict += ", after its kernels have been tested with the first model"
    return verdict


def _tests(number: int) -> str:
    """What is known of the tests of a GPU's kernels, as far as it keeps the GPU from use."""
    failed = [f"of {types}: {why}" for types, why in _cuda_check.verdicts(number).items() if why]
    if not failed:
        return ""
    return (
        f"; not used without --device for weights {'; '.join(failed)} (as {_cuda_check.notes()} "
        "says; without that file the kernels are tested again)"
    )


def _gpu(number: int) -> tuple[bool, str]:
    """Whether a GPU computes, and what to say of it."""
    try:
        gpu = _cuda.gpu(number)
        major, minor = gpu.compute_capability
        name = f"{gpu.name}, compute capability {major}.{minor}"
        probe = _cuda.probe(number)
    except QInferError as error:
        return False, str(error)
    tests = _tests(number) if number == _AUTO else ""
    memory = f"{probe.free_bytes / _GIB:.1f} GiB free of {gpu.memory_bytes / _GIB:.1f} GiB"
    return True, f"{name}, {memory}; computes with a kernel that was {probe.kernel_origin}{tests}"


def _library(component: _cuda.Component) -> str:
    return component.problem or f"{component.version}, {component.path}"


def _ascend_driver() -> str:
    device = Path("/dev/davinci_manager")
    return "an Ascend driver is there" if device.exists() else "no Ascend driver is there either"


def render() -> str:
    """The findings as text."""
    return "\n".join(f"{subject:<16}{finding}" for subject, finding in findings())
