"""Whether a GPU computes right: its kernels are held against the processor's once, and it is noted.

`device="auto"` asks before it uses a card that nobody named. What depends on the card, its driver,
this version and the weight types is asked again when one of them changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from . import _cuda
from ._alias import cache_folder
from ._files import whole_file
from ._slow import logger
from ._types import known_types
from .errors import FileError, OutOfMemory


def problem(types: Iterable[str], number: int = 0) -> str:
    """Why kernels for these weight types cannot be trusted on a GPU; empty where they can.

    Raises DeviceError where there is no GPU of that number, OutOfMemory where it has no room for
    the tests; that is noted nowhere.
    """
    wanted = {name.upper() for name in types}
    key = _of_gpu(number) + " ".join(sorted(wanted))
    known = _noted()
    if key in known:
        return known[key]
    known[key] = _run(wanted, number)
    # Another process may lose its entry to ours; it asks again then.
    with suppress(OSError, FileError):
        notes().parent.mkdir(parents=True, exist_ok=True)
        with whole_file(notes()) as file:
            file.write(json.dumps(known).encode())
    return known[key]


def verdicts(number: int) -> dict[str, str]:
    """What was found of a GPU so far: by weight types, why it is not trusted; empty where it is."""
    gpu = _of_gpu(number)
    return {key.removeprefix(gpu): why for key, why in _noted().items() if key.startswith(gpu)}


def notes() -> Path:
    """The file that keeps what was found; without it the tests are run again."""
    return cache_folder() / "gpu-checked.json"


def _of_gpu(number: int) -> str:
    """What entries of a GPU begin with, in this version and with this driver."""
    from . import __version__

    gpu = _cuda.gpu(number)
    return f"{__version__} {_cuda.info().driver.version} {gpu.name} {gpu.uuid} "


def _noted() -> dict[str, str]:
    known: object = None
    with suppress(OSError, ValueError):
        known = json.loads(notes().read_text())
    if not isinstance(known, dict):
        return {}
    return {key: why for key, why in known.items() if isinstance(why, str)}


def _run(wanted: set[str], number: int) -> str:
    every_type = set(known_types())
    numbers = [
        i
        for i, name in enumerate(_cuda.self_test_names())
        if set(name.upper().split()) & every_type <= wanted
    ]
    logger.info(
        "compiling kernels for %s and holding them against the processor's (once)",
        _cuda.gpu(number).name,
    )
    failed = []
    for test in _cuda.self_tests(number, numbers):
        if test.lacked_memory:
            raise OutOfMemory(f"its kernels could not be tested: {test.problem}")
        if not test.passed:
            failed.append(test)
    if not failed:
        return ""
    first = failed[0]
    why = first.problem or f"{first.error:.3g} times what rounding explains"
    return f"{len(failed)} of {len(numbers)} kernel tests fail, the first is '{first.name}': {why}"
