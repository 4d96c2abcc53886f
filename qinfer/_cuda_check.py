"""Whether a GPU computes right: its kernels are held against the processor's once, and it is noted.

`device="auto"` asks before it uses a card that nobody named. What depends on the card, its driver,
this version and the weight types is asked again when one of them changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress

from . import _cuda
from ._alias import cache_folder
from ._files import whole_file
from ._slow import logger
from ._types import known_types
from .errors import FileError


def problem(types: Iterable[str], number: int = 0) -> str:
    """Why kernels for these weight types cannot be trusted on a GPU; empty where they can.

    Raises DeviceError where there is no GPU of that number.
    """
    from . import __version__

    wanted = {name.upper() for name in types}
    gpu = _cuda.gpu(number)
    key = " ".join([__version__, _cuda.info().driver.version, gpu.name, gpu.uuid, *sorted(wanted)])
    path = cache_folder() / "gpu-checked.json"
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    if not isinstance(known, dict):
        known = {}
    if isinstance(known.get(key), str):
        return known[key]
    known[key] = _run(wanted, number)
    # Another process may lose its entry to ours; it asks again then.
    with suppress(OSError, FileError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps(known).encode())
    return known[key]


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
    failed = [test for test in _cuda.self_tests(number, numbers) if not test.passed]
    if not failed:
        return ""
    first = failed[0]
    why = first.problem or f"{first.error:.3g} times what rounding explains"
    return f"{len(failed)} of {len(numbers)} kernel tests fail, the first is '{first.name}': {why}"
