"""Writes the cffi type table of the runtime's public header: `cffi_table.py HEADER OUTPUT`."""

import sys
from pathlib import Path

import cffi


def main(header: Path, output: Path) -> None:
    """Cffi reads what stands between the header's two marker lines, and nothing else of it."""
    text = header.read_text(encoding="utf-8")
    _, begin, rest = text.partition("/* --- declarations begin --- */")
    declarations, end, _ = rest.partition("/* --- declarations end --- */")
    if not begin or not end:
        sys.exit(f"{header}: the lines that mark where declarations begin and end are missing.")
    ffi = cffi.FFI()
    ffi.cdef(declarations)
    ffi.set_source("qinfer._cdef", None)
    ffi.emit_python_code(str(output))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
