"""The CPU kernels without Python and torch in the way, AVX-512 emulated lane by lane: the logic of a path that the
machine at hand cannot execute is run all the same, beside AVX2 and the portable path, and under sanitizers.

    avx512_emulated.h   the AVX-512 intrinsics that the kernels use, as loops; force-included
    units.cpp           every function of a trait struct against a plain loop
    problem.h oracle.h  random problems (anchors: the candidates, some of them, or none) and a float64 brute force
    kernels.cpp         all paths on those problems, against the brute force and against each other
    gomp_threads.cpp    libgomp's entry points on std::thread, for ThreadSanitizer

Not seen here: the compiler's own AVX-512 code, and speed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import work_ahead

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
GXX = os.environ.get("CXX", "g++")
CPUINFO = Path("/proc/cpuinfo")
FLAGS = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
HAS_AVX2 = {"avx2", "fma", "f16c"} <= FLAGS
HAS_AVX512 = HAS_AVX2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= FLAGS

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the vector paths are x86-64's"),
    pytest.mark.skipif(shutil.which(GXX) is None, reason=f"no {GXX}"),
]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# With AVX2 at hand the emulation's loops become AVX2 instructions, and products fuse as in an AVX-512 build.
AVX512 = ["-include", str(HERE / "avx512_emulated.h"), *(AVX2 if HAS_AVX2 else [])]
TRUE_AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
PORTABLE = ["-ffp-contract=off"]
COMMON = ["-std=c++17", "-g1", "-fno-math-errno", "-Wno-psabi", f"-I{CSRC}"]
ADDRESS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-O1", "-fsanitize=thread"]


def run(*command: object, timeout: int = 900, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command[0]} returned {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def links(folder: Path, flags: list[str]) -> bool:
    """A compiler may come without a sanitizer's library."""
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    return subprocess.run([GXX, *flags, str(source), "-o", str(folder / "empty")], capture_output=True).returncode == 0


def build_kernels(flags: list[str], own_gomp: bool = False) -> Path:
    folder = work_ahead.folder()
    if not links(folder, flags):
        pytest.skip(f"{GXX} cannot link with {' '.join(flags)}")
    units = [
        (CSRC / "cpu" / "triplet_avx512.cpp", AVX512),
        (CSRC / "cpu" / "triplet_avx2.cpp", AVX2),
        (CSRC / "cpu" / "triplet_portable.cpp", PORTABLE),
        (CSRC / "cpu" / "triplet.cpp", []),
        (HERE / "kernels.cpp", []),
    ]
    if own_gomp:
        units.append((HERE / "gomp_threads.cpp", []))
    objects = [folder / f"{source.stem}.o" for source, _ in units]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(run, GXX, *COMMON, "-fopenmp", *flags, *own, "-c", source, "-o", target)
            for (source, own), target in zip(units, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    program = folder / "kernels"
    # The portable objects first: of an inline function that several hold, the linker keeps the first.
    run(GXX, *flags, *reversed(objects), "-pthread" if own_gomp else "-fopenmp", "-o", program)
    return program


def passed(output: str) -> None:
    assert ", 0 failures" in output, output[-6000:]


UNITS = {
    "avx512": ("avx512", "Avx512", AVX512),
    "avx512-itself": ("avx512", "Avx512", TRUE_AVX512),
    "avx512-double": ("generic", "Generic<double>", AVX512),
    "avx2": ("avx2", "Avx2", AVX2),
    "portable": ("generic", "Generic<float>", PORTABLE),
}
NEEDS_AVX512 = pytest.mark.skipif(not HAS_AVX512, reason="no AVX-512 here")
NEEDS_AVX2 = pytest.mark.skipif(not HAS_AVX2, reason="no AVX2 here")


def run_units(name: str) -> str:
    header, struct, flags = UNITS[name]
    folder = work_ahead.folder()
    sanitize = ADDRESS if links(folder, ADDRESS) else ["-O1"]
    define = [f'-DUNIT_HEADER="cpu/simd_{header}.h"', f"-DUNIT_STRUCT={struct}"]
    run(GXX, *COMMON, *sanitize, *flags, *define, HERE / "units.cpp", "-o", folder / "units")
    return run(folder / "units")


@pytest.mark.ahead(work=run_units, of=("name",))
@pytest.mark.parametrize(
    "name",
    [
        "avx512",
        pytest.param("avx512-itself", marks=NEEDS_AVX512),
        "avx512-double",
        pytest.param("avx2", marks=NEEDS_AVX2),
        "portable",
    ],
)
def test_units(ahead, name):
    passed(ahead())


def against_brute_force() -> str:
    return run(build_kernels(["-O1"]), 0, 200)


def under_address_and_undefined() -> str:
    return run(build_kernels(ADDRESS), 1020, 16, ASAN_OPTIONS="detect_leaks=0")


def under_thread() -> str:
    return run(build_kernels(THREAD, own_gomp=True), 2000, 3, "threaded", TSAN_OPTIONS="halt_on_error=1")


@pytest.mark.ahead(work=against_brute_force)
def test_every_path_against_brute_force(ahead):
    passed(ahead())


@pytest.mark.ahead(work=under_address_and_undefined)
def test_under_address_and_undefined_sanitizer(ahead):
    passed(ahead())


@pytest.mark.ahead(work=under_thread)
def test_under_thread_sanitizer(ahead):
    """Finds accesses of two threads to one place with no lock or join between them, also where the result is right."""
    passed(ahead())
