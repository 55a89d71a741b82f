#!/usr/bin/env python3
"""Compiles every kernel for every architecture and fails on a spill, a stack frame or a missing mma. Needs no GPU.

python csrc/cuda/compile_gate.py [--architectures 80,86,89,90,100,120] [--recorded FOLDER]

A build can leave its own kernels there to be checked, so that only those of other architectures are compiled:

CMAKE_CUDA_COMPILER_LAUNCHER="$(command -v python3);$PWD/csrc/cuda/compile_gate.py;--record;FOLDER" pip install .
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
# mma.sync in the PTX of one kernel: per 64 bytes of k, a warp's 32 x 32 products take 2 x 4 blocks of mma; strips
# (norms of one chunk, norms of several, positives) take one, unrolled by 4 with up to 3 left over.
BLOCKS = 2 * 4 + 3 * (4 + 3)
MMA = {"split": 3 * BLOCKS, "half": 2 * BLOCKS, "simt32": 0, "simt64": 0}
MMA["split, dense"] = MMA["split"]
MMA["widen"] = MMA["empty"] = 0
MATH = ("split", "half", "simt32", "simt64")  # in the order of facenet_ext::cuda::Math
INPUT = {"f": "float32", "d": "float64", "NS0_4Half": "half precision"}
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
        return "widen"
    if "empty_kernel" in mangled:
        return f"empty, {INPUT[re.search(r'empty_kernelI(NS0_4Half|f|d)', mangled)[1]]}"
    math = MATH[int(re.search(r"MathE(\d)", mangled)[1])]
    if "dense_kernel" in mangled:
        return f"{math}, dense"
    return f"{math}, {INPUT[re.search(r'MathE[0-9]E(NS0_4Half|f|d)E', mangled)[1]]}"


def to_ptx(source: Path, architecture: str, directory: Path) -> Path:
    ptx = directory / f"{source.stem}_{architecture}.ptx"
    nvcc(f"-arch=compute_{architecture}", "-ptx", str(source), "-o", str(ptx))
    return ptx


def assemble(ptx: Path, architecture: str, directory: Path) -> str:
    """What ptxas says of a file's kernels."""
    cubin = directory / f"{ptx.stem}.{architecture}"
    return nvcc(f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", str(ptx), "-o", str(cubin))


def rows_of(report: str, ptx: Path) -> list[tuple]:
    """(architecture, kernel, registers, spilled, stack, mma) for each kernel of a report."""
    bodies = re.split(r"^\s*(?:\.visible )?\.entry ", ptx.read_text(), flags=re.M)[1:]
    mma = {kernel_name(body.split("(", 1)[0]): len(re.findall(r"\bmma\.sync", body)) for body in bodies}
    rows = []
    for part in report.split("Compiling entry function '")[1:]:
        mangled, architecture = re.match(r"(\w+)' for 'sm_(\d+)'", part).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        name = kernel_name(mangled)
        rows.append((int(architecture), name, registers, int(stores) + int(loads), int(stack), mma[name]))
    return rows


def record(directory: Path, command: list[str]) -> int:
    """Runs a build's nvcc and keeps its PTX and what ptxas said."""
    kept = directory / Path(command[command.index("-c") + 1]).stem
    kept.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*command, "-Xptxas=-v", "--keep", f"--keep-dir={kept}"], capture_output=True, text=True)
    sys.stdout.write(done.stdout)
    if done.returncode == 0:
        (kept / "report.txt").write_text(done.stderr)
    else:
        sys.stderr.write(done.stderr)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", default="80,86,89,90,100,120", help="comma-separated (default: %(default)s)")
    parser.add_argument("--recorded", type=Path, help="folder in which a build left what it compiled")
    parser.add_argument("--record", nargs=argparse.REMAINDER, help="FOLDER NVCC ...: compile, and leave it there")
    arguments = parser.parse_args()
    if arguments.record:
        return record(Path(arguments.record[0]), arguments.record[1:])
    architectures = arguments.architectures.split(",")
    sources = sorted(HERE.glob("*.cu"))
    # As CMakeLists.txt does: from the source to PTX once, from there to each architecture from sm_80 on.
    virtual = {a: min(a, "80", key=int) for a in architectures}
    rows, ptx = [], {}
    if arguments.recorded:
        for source in sources:
            kept = arguments.recorded / source.stem
            ptx[source, "80"] = kept / f"{source.stem}.ptx"
            rows += rows_of((kept / "report.txt").read_text(), ptx[source, "80"])
    built = {str(row[0]) for row in rows}
    print("already built:", " ".join(sorted(built, key=int)) or "none")
    missing = list(product(sources, [a for a in architectures if a not in built]))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        directory = Path(name)
        wanted = {(source, virtual[a]) for source, a in missing} - ptx.keys()
        made = {key: pool.submit(to_ptx, *key, directory) for key in sorted(wanted)}
        ptx |= {key: each.result() for key, each in made.items()}
        reports = {(source, a): pool.submit(assemble, ptx[source, virtual[a]], a, directory) for source, a in missing}
        for (source, a), report in reports.items():
            rows += rows_of(report.result(), ptx[source, virtual[a]])
    rows = sorted(row for row in rows if str(row[0]) in architectures)
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
