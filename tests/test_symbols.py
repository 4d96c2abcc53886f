"""What the shared library exports and needs."""

import re
import subprocess
from pathlib import Path

import qinfer._cdef

from package_build import ROOT, symbols

LIBRARY = Path(qinfer._cdef.__file__).with_name("libqinfer.so")

# The libraries every supported system has; the last three are empty shells on newer ones.
SYSTEM_LIBRARIES = re.compile(r"lib(c|m|pthread|dl|rt)\.so\.\d|ld-linux.*\.so\.\d")


def test_the_library_exports_the_header_and_nothing_else() -> None:
    header = (ROOT / "vendor/runtime/include/qinfer.h").read_text("utf-8")
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    declared = set(re.findall(r"\b(qi_\w+)\(", code))
    assert len(declared) > 50
    assert symbols(LIBRARY, "-D", "--defined-only") == declared


def test_the_library_needs_nothing_but_the_system() -> None:
    dynamic = subprocess.check_output(["readelf", "-d", "-W", str(LIBRARY)], text=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert [name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name)] == []
    assert not re.search("RPATH|RUNPATH", dynamic)
