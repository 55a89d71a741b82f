#!/usr/bin/env python3
"""Compiles every kernel for every architecture and fails on a spill, a stack frame or a missing mma. Needs no GPU.

python csrc/cuda/compile_gate.py [--architectures 80,86,89,90,100,120]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
# mma.sync in the PTX of one kernel: per 64 bytes of k, a warp's 32 x 32 products take 2 x 4 blocks of mma; strips
# (norms of one chunk, norms of several, positives) take one, unrolled by 4 with up to 3 left over.
BLOCKS = 2 * 4 + 3 * (4 + 3)
MMA = {"split": 3 * BLOCKS, "half": 2 * BLOCKS, "bfloat": 2 * BLOCKS, "simt32": 0, "simt64": 0}
MMA["split, dense"] = MMA["split"]
MMA["widen"] = 0
MATH = ("split", "half", "bfloat", "simt32", "simt64")  # in the order of facenet_ext::cuda::Math
LIMIT = 128  # registers of each of 512 threads


def nvcc(*arguments: str) -> str:
    command = [
        os.environ.get("NVCC", "nvcc"),
        "-std=c++17",
        "-O3",
        "-DFACENET_EXT_WITH_CUDA",
        f"-I{HERE.parent}",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout + done.stderr


def kernel_name(mangled: str) -> str:
    if "widen_kernel" in mangled:
        return "widen, " + re.search(r"INS0_\d(Half|Bfloat)E", mangled)[1].lower()
    math = MATH[int(re.search(r"MathE(\d)", mangled)[1])]
    if "dense_kernel" in mangled:
        return f"{math}, dense"
    kind = re.search(r"MathE\dE(NS0_4Half|NS0_6Bfloat|f|d)E", mangled)[1]
    return f"{math}, {({'f': 'float32', 'd': 'float64'}).get(kind, kind[5:].lower())}"


def to_ptx(source: Path, architecture: str, directory: Path) -> tuple[Path, dict[str, int]]:
    """The PTX of one .cu file, and how often each of its kernels says mma."""
    ptx = directory / f"{source.stem}_{architecture}.ptx"
    nvcc(f"-arch=compute_{architecture}", "-ptx", str(source), "-o", str(ptx))
    bodies = re.split(r"^\s*\.visible \.entry ", ptx.read_text(), flags=re.M)[1:]
    return ptx, {kernel_name(body.split("(", 1)[0]): len(re.findall(r"\bmma\.sync", body)) for body in bodies}


def check(ptx: Path, mma: dict[str, int], architecture: str) -> list[tuple]:
    """Rows (architecture, kernel, registers, spilled, stack, mma) of one file's PTX for one architecture."""
    report = nvcc(
        f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", str(ptx), "-o", str(ptx.with_suffix(f".{architecture}"))
    )
    rows = []
    for part in report.split("Compiling entry function '")[1:]:
        name = kernel_name(part.split("'", 1)[0])
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        rows.append((int(architecture), name, registers, int(stores) + int(loads), int(stack), mma[name]))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", default="80,86,89,90,100,120", help="comma-separated (default: %(default)s)")
    architectures = parser.parse_args().architectures.split(",")
    sources = sorted([*HERE.glob("triplet_*.cu"), HERE / "dense.cu"])
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        # As CMakeLists.txt does: from the source to PTX once, from there to each architecture from sm_80 on.
        ptx = {
            (source, virtual): pool.submit(to_ptx, source, virtual, Path(directory))
            for virtual in sorted({min(a, "80", key=int) for a in architectures})
            for source in sources
        }
        checked = [
            pool.submit(check, *made.result(), a)
            for (_, virtual), made in ptx.items()
            for a in architectures
            if min(a, "80", key=int) == virtual
        ]
        rows = sorted(row for each in checked for row in each.result())
    failed = 0
    print(f"{'sm':>4} {'kernel':20} {'registers':>9} {'spilled':>8} {'stack':>6} {'mma':>4}")
    for architecture, name, registers, spilled, stack, mma in rows:
        tensor = int(architecture) >= 80
        good = (
            spilled == 0
            and stack == 0
            and registers <= LIMIT
            and (mma == MMA.get(name, MMA[name.split(",")[0]]) or not tensor)
        )
        failed += not good
        row = f"{architecture:>4} {name:20} {registers:>9} {spilled:>8} {stack:>6} {mma:>4}"
        print(row if good else f"{row}   <- FAILED")
    expected = 12 * len(architectures)  # of them simt32: empty from sm_80 on; widen stands in two files
    if len(rows) != expected:
        print(f"{len(rows)} kernels were compiled, expected {expected}")
        failed += 1
    print("compile gate:", "failed" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
