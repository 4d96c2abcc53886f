"""Kernels as the real NVRTC compiles them, tensor cores and all, run on the stand-in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cuda_standin import on_standin, run_program
from package_build import ROOT

sys.path.insert(0, str(ROOT / "build_backend"))

import cubins


def _nvrtc() -> str:
    try:
        return str(cubins.nvrtc_library())
    except SystemExit:
        return ""


NVRTC = _nvrtc()
pytestmark = pytest.mark.skipif(
    not NVRTC, reason="NVRTC 12 is not installed here: pip install 'nvidia-cuda-nvrtc-cu12==12.9.*'"
)

# ---- the kernels' own tests ----

# Of every kernel that holds inline PTX, and of some that exchange values between lanes.
SELF_TESTS = [
    "tile 128x64 Q4_0 ",  # bytes, K = 32
    "tile 32x32 Q4_0 ",
    "tile 32x16 Q6_K ",  # bytes, K = 16
    "tile 32x32 Q6_K ",
    "product Q4_0 1x32",
    "product Q4_0 6x",
    "attend tiles F16, 6 heads over 2 of 64, to 94, window 5",
    "attend tiles F16, 2 heads over 1 of 128, to 129",
    "attend tiles Q8_0, 2 heads over 2 of 64, to 94, window 0",
    "attend F16, 2 heads over 1 of 32, to 129",
    "down tiles Q8_0 83x160",
    "append Q8_0, head_dim 64, n_rot 32",
    "append F16, head_dim 20, n_rot 10",
    "lists of 4100 neurons, 10%",
    "best of 8193",
    "log-probabilities of 1000",
    "rounds with the host, 67 ",
    "quantise 97",
    "rms norm of 576",
]


def run_self_tests(
    tmp_path: Path, names: list[str], variables: dict[str, str] | None = None, **settings: object
) -> dict[str, str]:
    """What was wrong with each of the tests; empty: nothing."""
    code = f"""
import json
from qinfer import _cuda
names = _cuda.self_test_names()
wanted = [i for i, name in enumerate(names) if name.startswith(tuple({names!r}))]
tests = _cuda.self_tests(0, wanted)
print(json.dumps({{t.name: "" if t.passed else t.problem or f"{{t.error:.3g}}" for t in tests}}))
"""
    # A folder of its own: compiled kernels are told apart by their sources, not by this mode.
    done = run_program(
        code,
        timeout=300,
        variables={"QINFER_CACHE_DIR": str(tmp_path)} | (variables or {}),
        nvrtc=NVRTC,
        **settings,
    )
    print(done.stderr)  # the stand-in's words, where the driver has only a code
    assert done.returncode == 0
    found: dict[str, str] = json.loads(done.stdout)
    for name in names:
        assert any(key.startswith(name) for key in found), f"no test is called {name!r}"
    return found


@pytest.mark.parametrize("capability", [75, 86])
def test_what_nvrtc_makes_of_kernels(capability: int, tmp_path: Path) -> None:
    """sm_75 has smaller products of matrices than later ones."""
    found = run_self_tests(tmp_path, SELF_TESTS, capability=capability, seed=capability)
    assert {name: problem for name, problem in found.items() if problem} == {}


# A compiler of translated units that exchanges the second and third word of A in every product of
# 16 by 16 halves: two fragments swapped.
SWAPPING_COMPILER = r"""#!/bin/sh
product='<f32, 16, 16, 2> all = ..'
for word; do
    case "$word" in
        */unit.cpp) sed -E -i "s/($product[^,]+, )([^,]+), ([^,]+)/\1\3, \2/" "$word" ;;
    esac
done
exec c++ "$@"
"""


def test_swapped_words_of_a_fragment_are_found(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(SWAPPING_COMPILER)
    compiler.chmod(0o755)
    names = ["attend tiles F16, 2 heads over 2 of 64, to 94, window 0"]
    found = run_self_tests(tmp_path, names, cxx=compiler, cache=tmp_path, capability=80)
    assert all(found.values())


# ---- a model ----


def test_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token, a few, and a whole prompt at a time, as newer architectures compute them."""
    import numpy as np

    import test_cuda_model
    from test_sparsity import CASES

    monkeypatch.setattr(test_cuda_model, "kernel_cache", lambda: str(tmp_path))
    path = CASES["llama"].write(tmp_path)
    found = test_cuda_model.on_gpu(
        "compare", path, ["whole"], ["predict"], [1, 7, 24], nvrtc=NVRTC, capability=120
    )
    for errors in found["whole"]["predict"].values():
        assert np.median(errors) < 2e-5


# ---- single instructions ----


@on_standin(nvrtc=NVRTC)
def test_halves_are_converted_as_the_format_says() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module("""
extern "C" __global__ void widen(const unsigned short* h, float* f) {
    const int i = blockIdx.x * 256 + threadIdx.x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f[i]) : "h"(h[i]));
}
extern "C" __global__ void narrow(const float* f, unsigned short* h) {
    const int i = blockIdx.x * 256 + threadIdx.x;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h[i]) : "f"(f[i]));
}
""")
    halves = np.arange(65536, dtype=np.uint16)
    out = cu.allocate(4 * 65536)
    module.launch("widen", cu.upload(halves), out, grid=256, block=256)
    floats = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(cu.download(out, floats), floats)
    # What lies between two halves: ties and their neighbours, and what becomes infinite or zero.
    with np.errstate(invalid="ignore", over="ignore"):
        between = (floats + np.roll(floats, -1)) / 2
        below, above = np.nextafter(between, np.float32(-9e9)), np.nextafter(between, floats)
        for values in (floats, between, below, above, floats * np.float32(2**-26), floats * 16):
            module.launch("narrow", cu.upload(values), out, grid=256, block=256)
            found = cu.download(out, halves).view(np.float16)
            np.testing.assert_array_equal(found, values.astype(np.float16))


@on_standin(nvrtc=NVRTC)
def test_words_are_computed_as_the_isa_says() -> None:
    import client as cu
    import numpy as np

    cu.start()
    words = {
        "shl.b32 %0, %1, %2;": lambda a, b: a << b if b < 32 else 0,
        "shr.u32 %0, %1, %2;": lambda a, b: a >> b,
        "shr.s32 %0, %1, %2;": lambda a, b: signed(a) >> min(b, 31),
        "prmt.b32 %0, %1, %2, 0x9470;": lambda a, b: prmt(a, b, 0x9470),
        "bfi.b32 %0, %1, %2, 28, 9;": lambda a, b: (b & 0x0FFFFFFF) | (a & 15) << 28,
        "bfi.b32 %0, %1, %2, 4, 8;": lambda a, b: (b & ~0xFF0) | (a & 255) << 4,
        "bfe.s32 %0, %1, 8, 8;": lambda a, b: signed(a >> 8 & 255, 8),
        "bfe.s32 %0, %1, 28, 9;": lambda a, b: signed(a >> 28, 4),
        "bfind.shiftamt.u32 %0, %1;": lambda a, b: 32 - a.bit_length() if a else 0xFFFFFFFF,
        "brev.b32 %0, %1;": lambda a, b: int(f"{a:032b}"[::-1], 2),
        "popc.b32 %0, %1;": lambda a, b: a.bit_count(),
        "dp4a.s32.s32 %0, %1, %2, %2;": lambda a, b: b + dot(a, b),
        "mul.hi.s32 %0, %1, %2;": lambda a, b: signed(a) * signed(b) >> 32,
        "mad.lo.s32 %0, %1, %2, %1;": lambda a, b: a * b + a,
    }

    def signed(word: int, bits: int = 32) -> int:
        return word - (1 << bits) if word >> (bits - 1) else word

    def dot(a: int, b: int) -> int:
        return sum(signed(a >> 8 * i & 255, 8) * signed(b >> 8 * i & 255, 8) for i in range(4))

    def prmt(a: int, b: int, selector: int) -> int:
        data, result = (b << 32 | a).to_bytes(8, "little"), 0
        for i in range(4):
            choice = selector >> 4 * i & 15
            byte = data[choice & 7]
            result |= (byte if choice < 8 else 255 * (byte >> 7)) << 8 * i
        return result

    random = np.random.default_rng(1)
    a = random.integers(0, 1 << 32, 64, dtype=np.uint32)
    b = random.integers(0, 1 << 32, 64, dtype=np.uint32)
    b[:40], a[0] = np.arange(40), 0
    for code, expected in words.items():
        module = cu.Module(f"""
extern "C" __global__ void f(const unsigned* a, const unsigned* b, unsigned* out) {{
    const int i = threadIdx.x;
    asm("{code}" : "=r"(out[i]) : "r"(a[i]), "r"(b[i]));
}}
""")
        out = cu.allocate(256)
        module.launch("f", cu.upload(a), cu.upload(b), out, block=64)
        want = [expected(x, y) & 0xFFFFFFFF for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert cu.download(out, a).tolist() == want, code


@on_standin(nvrtc=NVRTC)
def test_floats_are_rounded_and_compared_as_the_isa_says() -> None:
    from fractions import Fraction

    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module("""
extern "C" __global__ void f(const float* a, const float* b, float* down, float* more,
                             int* not_less) {
    const int i = threadIdx.x;
    asm("fma.rm.f32 %0, %1, %2, %1;" : "=f"(down[i]) : "f"(a[i]), "f"(b[i]));
    more[i] = fmaxf(a[i], b[i]);
    not_less[i] = !(a[i] < b[i]);
}
""")
    random = np.random.default_rng(2)
    a = (random.standard_normal(256) * 2.0 ** random.integers(-20, 20, 256)).astype(np.float32)
    b = random.standard_normal(256).astype(np.float32)
    a[:4], b[1:5] = np.nan, np.nan
    a[5:7], b[5:7] = [-0.0, 0.0], [0.0, -0.0]
    down, more, not_less = (cu.allocate(1024) for _ in range(3))
    module.launch("f", cu.upload(a), cu.upload(b), down, more, not_less, block=256)
    for x, y, found in zip(a[5:], b[5:], cu.download(down, a)[5:], strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(x))
        above = np.nextafter(found, np.float32(np.inf))
        assert Fraction(float(found)) <= exact < Fraction(float(above))
    larger = cu.download(more, a)
    np.testing.assert_array_equal(larger, np.fmax(a, b))
    assert not np.signbit(larger[5:7]).any()
    np.testing.assert_array_equal(cu.download(not_less, a.view(np.int32)), ~(a < b))


# ---- what is wrong is said ----


@on_standin(nvrtc=NVRTC)
def test_an_unknown_instruction_does_not_compile() -> None:
    import client as cu

    for code, name in [
        ("sad.u32 %0, %1, %1, %1;", "sad.u32"),
        ("mul.f32 %0, %1, %1;", "mul.f32"),  # might be fused with a sum
        ("ex2.approx.f32 %0, %1;", "ex2.approx.f32"),
    ]:
        kind, type_name = ("f", "float") if "f32" in code else ("r", "int")
        try:
            cu.compile_cubin(f"""
extern "C" __global__ void f({type_name}* x) {{
    asm("{code}" : "={kind}"(x[0]) : "{kind}"(x[1]));
}}
""")
        except cu.CompileError as error:
            assert name in error.log, error.log
        else:
            raise AssertionError(f"{code} is known")


WRONG = {
    "misaligned address": "*reinterpret_cast<float4*>(out + 1) = float4{};",
    "outside of static shared memory": "out[0] = room[n];",
    "in different collectives": """
    if (threadIdx.x < 16) MMA
    else MMA""",
    "threads race for shared memory": "out[0] = room[threadIdx.x ^ 1];",
    "threads race": "__syncwarp(); out[0] = room[threadIdx.x]; room[threadIdx.x ^ 1] = 0;",
    "a thread ended": "if (threadIdx.x == 3) return; __shfl_sync(~0u, 1, 2);",
}
MMA = """asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 "
                     "{%0, %0}, {%1}, {%1}, {%1, %1};" : "=r"(d) : "r"(n));"""


@on_standin(nvrtc=NVRTC)
def test_threads_in_order_do_not_race() -> None:
    import client as cu
    import numpy as np

    cu.start()
    module = cu.Module("""
extern "C" __global__ void f(int* out) {
    __shared__ int room[64];
    __shared__ unsigned n;
    const int i = threadIdx.x;
    if (i == 0) n = 0;
    room[i] = i;
    __syncwarp();
    const int sum = room[i] + room[i ^ 1];
    __syncwarp();
    room[i] = sum;
    __syncthreads();
    atomicAdd(&n, 1u);
    out[i] = room[63 - i] + room[0];
    __syncthreads();
    room[63 - i] = n;
    room[i] = n;  // what the other one stores
    __syncthreads();
    out[i] += room[63 - i];
}
""")
    out = cu.allocate(256)
    module.launch("f", out, block=64)
    i = np.arange(64, dtype=np.int32)
    sums = i + (i ^ 1)
    np.testing.assert_array_equal(cu.download(out, i), sums[::-1] + sums[0] + 64)


@pytest.mark.parametrize("what", WRONG)
def test_what_hardware_would_not_do_is_reported(what: str) -> None:
    code = f"""
import client as cu
cu.start()
module = cu.Module('''
extern "C" __global__ void f(float* out, int n) {{
    __shared__ float room[32];
    int d;
    room[threadIdx.x] = n;
    {WRONG[what].replace("MMA", MMA)}
}}
''')
module.launch("f", cu.allocate(4096), 33, block=32)
cu.synchronize()
"""
    done = run_program(code, nvrtc=NVRTC)
    assert done.returncode != 0
    assert what in done.stderr, done.stderr
