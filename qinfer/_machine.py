"""What this machine has: memory that can still be had, the processor as the runtime sees it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ._native import check, ffi, lib, new_error, text
from .errors import ArgumentError

# Control groups, version 2 first: limit, use, and the line of its statistics that counts the page
# cache in that use.
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)


@dataclass(frozen=True, slots=True)
class Processor:
    """The processor: `isa` is the level in use, `best_isa` the best it could run."""

    brand: str
    isa: str
    best_isa: str
    features: tuple[str, ...]
    n_physical_cores: int
    n_usable_cores: int


def processor() -> Processor:
    """The processor as the runtime sees it."""
    out = ffi.new("qi_cpu_info *")
    error = new_error()
    check(lib.qi_get_cpu_info(out, error), error)
    return Processor(
        brand=text(out.brand),
        isa=text(out.isa),
        best_isa=text(out.best_isa),
        features=tuple(text(out.features).split()),
        n_physical_cores=out.n_physical_cores,
        n_usable_cores=out.n_usable_cores,
    )


def read_bandwidth(threads: int, n_bytes: int = 512 << 20) -> float:
    """Measured speed of plain reads from memory with `threads` threads, in bytes per second."""
    if threads < 1:
        raise ArgumentError(f"threads={threads} is not a positive integer")
    out = ffi.new("double *")
    error = new_error()
    check(lib.qi_measure_read_bandwidth(threads, n_bytes, out, error), error)
    return float(out[0])


def total_memory() -> int:
    """Bytes of memory this process may ever use: the machine's, or its container's if less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for limit, _ in _cgroup_memory())])


def available_memory() -> int:
    """Bytes of memory that can be had now without swapping, as the kernel estimates it."""
    free = total_memory()
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) << 10
    return max(0, min([free, *(limit - used for limit, used in _cgroup_memory())]))


def _cgroup_memory() -> list[tuple[int, int]]:
    """Limit and use, the page cache aside, of the control group this process is in."""
    found = []
    for folder, limit_name, used_name, cache_name in _CGROUPS:
        try:
            limit = int(Path(folder, limit_name).read_text())
            used = int(Path(folder, used_name).read_text())
            lines = Path(folder, "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # not this version, or no limit ("max")
            continue
        cache = sum(int(line.split()[1]) for line in lines if line.split()[0] == cache_name)
        found.append((limit, used - cache))
    return found
