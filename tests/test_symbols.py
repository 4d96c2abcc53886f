"""What the shared library exports, and what our own object files call."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import qinfer._cdef

from package_build import ROOT, build

LIBRARY = Path(qinfer._cdef.__file__).with_name("libqinfer.so")

# The libraries every supported system has; the last three are empty shells on newer ones.
SYSTEM_LIBRARIES = re.compile(r"lib(c|m|pthread|dl|rt)\.so\.\d|ld-linux.*\.so\.\d")

# Ends the process, prints or touches its standard streams; formatting into memory is fine.
FORBIDDEN = re.compile(
    r"(_*abort|_*exit|_Exit|quick_exit|raise|kill|signal|sigaction|__assert_\w+|"
    r"(__)?v?(f|d)?printf(_chk)?|f?puts|f?putc|putchar|fwrite|perror|syslog|"
    r"stdout|stderr|stdin|_ZSt(4cout|4cerr|4clog)|_ZSt9terminatev|_ZNSt8ios_base4InitC[12]Ev)"
)

# The destructor of std::thread names it, for a thread that is neither joined nor detached.
STANDARD_LIBRARY = {
    ("thread_pool.cpp.o", "_ZSt9terminatev"),
    ("neuron_mover.cpp.o", "_ZSt9terminatev"),
}


def nm(arguments: list[str], paths: Iterable[Path]) -> set[str]:
    lines = subprocess.check_output(["nm", *arguments, *map(str, paths)], text=True).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line and not line.endswith(":")}


def test_the_library_exports_the_header_and_nothing_else() -> None:
    header = (ROOT / "vendor/runtime/include/qinfer.h").read_text("utf-8")
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    declared = set(re.findall(r"\b(qi_\w+)\(", code))
    assert len(declared) > 50
    assert nm(["-D", "--defined-only"], [LIBRARY]) == declared


def test_the_library_needs_nothing_but_the_system() -> None:
    dynamic = subprocess.check_output(["readelf", "-d", "-W", str(LIBRARY)], text=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert [name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name)] == []
    assert not re.search("RPATH|RUNPATH", dynamic)


def test_our_objects_neither_end_the_process_nor_print() -> None:
    objects = build().objects
    assert len(objects) > 20
    imported = {(path.name, name) for path in objects for name in nm(["--undefined-only"], [path])}
    assert "memcpy" in {name for _, name in imported}
    found = {(path, name) for path, name in imported if FORBIDDEN.fullmatch(name)}
    assert found <= STANDARD_LIBRARY
