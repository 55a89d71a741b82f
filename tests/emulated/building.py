"""Compiles csrc/cuda with the emulation, in several builds: the runner, a program that goes through cases."""

from __future__ import annotations

import functools
import os
import subprocess
import threading
from pathlib import Path

import work_ahead

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

SANITIZERS = {
    "plain": ([], []),
    # Compiles in 32 seconds of a core for 83 at -O1 and runs a quarter longer; ThreadSanitizer's would run half longer.
    "asan": (["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], ["-DEMU_ASAN"]),
    "tsan": (["-fsanitize=thread"], ["-DEMU_TSAN"]),
    "init": (["-fsanitize=thread"], ["-DEMU_INIT"]),  # its calls, but initcheck.cpp behind them
    # As nvcc may do it: one product of a difference of two goes unrounded into the sum.
    "contracted": (["-O3", "-ffp-contract=fast", "-mfma"], []),
}


def compile_all(jobs: list[list[str]], directory: Path) -> list[Path]:
    """Objects of compiler commands that end with their source; as many at a time as there are cores, of all builds."""
    directory.mkdir(parents=True, exist_ok=True)
    objects = [directory / (Path(job[-1]).name + ".o") for job in jobs]

    def compile_one(job: list[str], target: Path) -> None:
        done = subprocess.run([*job, "-o", str(target)], capture_output=True, text=True)
        if done.returncode != 0 or done.stderr:
            raise RuntimeError(f"{' '.join(job)}\n{done.stderr[-6000:]}")

    list(COMPILERS.map(compile_one, jobs, objects))
    return objects


COMPILERS = work_ahead.pool()
ONCE = threading.Lock()
# -g1: lines for what a sanitizer finds, without the types and variables that take a third of the compiler's time.
COMMON = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{HERE}", "-pthread"]


@functools.cache
def precompiled(flags: tuple[str, ...]) -> list[str]:
    """Options that bring emulated_cuda.h, compiled once for all builds with these flags: a quarter of a small one."""
    header = work_ahead.folder() / "emulated.h"
    header.write_text('#include "emulated_cuda.h"\n')
    to_header = [compiler(), *COMMON, *flags, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
    subprocess.run(to_header, check=True)
    return ["-include", str(header)]


@functools.cache
def support(sanitizer: str) -> list[Path]:
    """Runner and emulator: the same for every build with that sanitizer."""
    flags, emulator_flags = SANITIZERS[sanitizer]
    runner = ["-O1", "-ffp-contract=off", "-DFACENET_EXT_EMULATED", "-DFACENET_EXT_WITH_CUDA", *flags]
    # The emulator is not instrumented, and its loops must not become calls of memcpy, which the sanitizers intercept.
    emulator = ["-O2", "-fno-builtin", "-fno-tree-loop-distribute-patterns", *emulator_flags]
    files = [(runner, "runner.cpp"), (emulator, "emulator.cpp")]
    files += [(emulator, "initcheck.cpp")] if sanitizer == "init" else []
    jobs = [[compiler(), *COMMON, *options, "-c", str(HERE / file)] for options, file in files]
    return compile_all(jobs, work_ahead.folder())


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(
    directory: Path,
    sanitizer: str = "plain",
    warps_per_side: int = 2,
    sort_chunk: int = 64,
    sources: list[Path] | None = None,
    cuda_directory: Path | None = None,
    optimize: str = "-O1",
) -> Path:
    """Compiles the kernels (or `sources` in their place, as one unit) with the emulation and returns the program."""
    directory.mkdir(parents=True, exist_ok=True)
    cuda = cuda_directory or CSRC / "cuda"
    flags, _ = SANITIZERS[sanitizer]
    kernels = [optimize, "-ffp-contract=off", "-DFACENET_EXT_EMULATED", "-DFACENET_EXT_WITH_CUDA"]
    kernels += [f"-DFACENET_EXT_WARPS_PER_SIDE={warps_per_side}", f"-DFACENET_EXT_SORT_CHUNK={sort_chunk}", *flags]
    if sources is None:
        sources = sorted(cuda.glob("*.cu"))
    else:
        unit = directory / "unit.cu"
        unit.write_text("".join(f'#include "{source}"\n' for source in sources))
        sources = [unit]
        kernels += precompiled(tuple(kernels))
    kernels.append(f"-I{cuda}")
    jobs = [[compiler(), *COMMON, *kernels, "-x", "c++", "-c", str(source)] for source in sources]
    objects = compile_all(jobs, directory)
    with ONCE:
        objects += support(sanitizer)
    program = directory / "runner"
    link = ["-no-pie"] if sanitizer == "init" else flags
    subprocess.run([compiler(), *COMMON, *link, *map(str, objects), "-o", str(program)], check=True)
    return program
