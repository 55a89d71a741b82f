"""The correctness campaign: many random batches, larger than the test suite's, and the figures that come out.

    python tests/campaign.py                          2,000 cases from seed 0, N and D up to 600
    python tests/campaign.py --cases 20000 --seed 7
    python tests/campaign.py --device cuda
    python tests/campaign.py --rules                  every legal combination of options, a small batch each
    python tests/campaign.py --rules --cases 30000    three batches each
    python tests/campaign.py --rules --emulated       the same over the CUDA kernels, emulated on the CPU

Both parts of tests/oracle.py: the selection by float64 distances, and loss and gradient in float64 with the op's own
selection; with --rules the same by the loops of tests/triplet_loop.py. Ends with status 1 if any case is beyond the
bounds of the tests, and names it; its seed repeats it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch
import tqdm
import triplet_loop
from cases import DTYPES, random_case
from oracle import DIRECT_TOLERANCE, GRADIENT_TOLERANCE, LOSS_TOLERANCE, run_case

import facenet_ext


def progress(first: int, count: int) -> tqdm.tqdm:
    return tqdm.tqdm(range(first, first + count), unit="case", mininterval=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", action="store_true", help="every legal combination of options, small batches")
    parser.add_argument("--cases", type=int, help="default: 2000; with --rules one a combination")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-rows", type=int, default=600)
    parser.add_argument("--max-dim", type=int, default=600)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--emulated", nargs="?", const="plain", choices=("plain", "asan", "tsan"), help="with --rules: "
                        "csrc/cuda on the CPU, its tests' build or one with a sanitizer")  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="name every case before it runs")
    arguments = parser.parse_args()
    if arguments.emulated and not arguments.rules:
        parser.error("--emulated comes with --rules")
    if arguments.rules:
        with emulated_cuda(arguments.emulated) as launcher:
            return rules(arguments, launcher)
    arguments.cases = 2000 if arguments.cases is None else arguments.cases

    totals: dict[torch.dtype, collections.Counter] = {dtype: collections.Counter() for dtype in DTYPES}
    worst: dict[torch.dtype, collections.defaultdict] = {dtype: collections.defaultdict(float) for dtype in DTYPES}
    failures = []
    begin = time.perf_counter()
    for seed in progress(arguments.seed, arguments.cases):
        case = random_case(seed, arguments.max_rows, arguments.max_dim)
        if arguments.verbose:
            print(case.name, flush=True)
        dtype = case.embeddings.dtype
        total, bound = totals[dtype], worst[dtype]
        total["cases"] += 1
        try:
            report = run_case(
                case.embeddings.to(arguments.device), case.labels.to(arguments.device), **case.options
            )
        except (AssertionError, RuntimeError) as error:
            failures.append(f"{case.name}: {error}")
            continue
        selection = report.selection
        total["pairs"] += selection.pairs
        total["illegal"] += selection.illegal
        total["suboptimal"] += selection.suboptimal
        total["uncertain"] += report.uncertain
        for name, value in (
            ("excess", selection.worst_excess),
            ("gradient", report.grad_error),
            ("loss", report.loss_error),
            ("d2", report.d2_error),
        ):
            bound[name] = max(bound[name], value)
        if (
            not selection.ok
            or report.grad_error > GRADIENT_TOLERANCE[dtype]
            or report.loss_error > LOSS_TOLERANCE[dtype]
            or report.d2_error > DIRECT_TOLERANCE[dtype]
        ):
            failures.append(f"{case.name}: {report}")

    seconds = time.perf_counter() - begin
    print(f"{arguments.cases} cases from seed {arguments.seed} on {where(arguments)}, {seconds:.0f} s")
    print(
        f"{'dtype':>9} {'cases':>6} {'pairs':>9} {'illegal':>8} {'not best':>9} {'excess':>9} {'gradient':>9} "
        f"{'loss':>9} {'d2':>9} {'uncertain':>9}"
    )
    for dtype in DTYPES:
        total, bound = totals[dtype], worst[dtype]
        print(
            f"{str(dtype)[6:]:>9} {total['cases']:>6} {total['pairs']:>9} {total['illegal']:>8} "
            f"{total['suboptimal']:>9} {bound['excess']:>9.1e} {bound['gradient']:>9.1e} {bound['loss']:>9.1e} "
            f"{bound['d2']:>9.1e} {total['uncertain']:>9}"
        )
    print(
        "illegal, not best: negatives beyond rounding (1e-6 of |a|² + |n|² in float32, 4e-15 in float64) of legal, of\n"
        "  the best. excess: worst distance beyond the best legal negative, in |a|² + |n|².\n"
        "gradient: worst max|g - g64| / max|g64| with the op's own selection, beyond the rounding to half precision;\n"
        "  with normalize, in units of what cancels between unit rows. loss: of the largest term of a hinge.\n"
        "  d2: relative, of the mined distances and the stats.\n"
        "uncertain: pairs whose hinge is within rounding of 0; either gradient is accepted."
    )
    return ended(failures)


@contextlib.contextmanager
def emulated_cuda(sanitizer: str | None):
    """None, or what runs csrc/cuda under the package while it lasts."""
    if sanitizer is None:
        yield None
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent / "emulated"))
    from as_backend import emulated
    from building import build

    with tempfile.TemporaryDirectory() as directory, emulated(build(Path(directory), sanitizer)) as launcher:
        yield launcher


def rules(arguments: argparse.Namespace, launcher) -> int:
    combinations = triplet_loop.combinations()
    totals: dict[torch.dtype, collections.Counter] = {dtype: collections.Counter() for dtype in DTYPES}
    worst: dict[torch.dtype, collections.defaultdict] = {dtype: collections.defaultdict(float) for dtype in DTYPES}
    failures, seen = [], set()
    cases = len(combinations) if arguments.cases is None else arguments.cases
    begin = time.perf_counter()
    for seed in progress(arguments.seed, cases):
        case = triplet_loop.random_case(seed, combinations[seed % len(combinations)])
        seen.add(seed % len(combinations))
        if arguments.verbose:
            print(case.name, flush=True)
        if launcher:
            launcher.next_case(seed)
        report = triplet_loop.check(case, arguments.device)
        total, bound = totals[case.x.dtype], worst[case.x.dtype]
        total.update(
            cases=1,
            terms=report.terms,
            illegal=len(report.illegal),
            uncertain=report.uncertain,
            bounds=report.only_bounds,
        )
        for name in ("gradient", "loss", "mean"):
            bound[name] = max(bound[name], getattr(report, name))
        if triplet_loop.failed(case, report):
            failures.append(f"{case.name}: {report}")
    print(
        f"{cases} cases from seed {arguments.seed} on {where(arguments)}, {len(seen)} of {len(combinations)} legal "
        f"combinations of options, {time.perf_counter() - begin:.0f} s"
    )
    print(
        f"{'dtype':>9} {'cases':>6} {'terms':>9} {'illegal':>8} {'gradient':>9} {'loss':>9} {'means':>9} "
        f"{'uncertain':>9} {'bounded':>8}"
    )
    for dtype in DTYPES:
        total, bound = totals[dtype], worst[dtype]
        print(
            f"{str(dtype)[6:]:>9} {total['cases']:>6} {total['terms']:>9} {total['illegal']:>8} "
            f"{bound['gradient']:>9.1e} {bound['loss']:>9.1e} {bound['mean']:>9.1e} {total['uncertain']:>9} "
            f"{total['bounds']:>8}"
        )
    print(
        "illegal: positives or negatives that the rule does not take, not the best or not the one drawn, beyond\n"
        "  rounding (1e-6 of |a|² + |n|² in float32, 4e-15 in float64).\n"
        "gradient: worst row's error, of the sum of |weight| |difference| in it, beyond the rounding to half\n"
        "  precision. loss, means: of what cancels in them.\n"
        "uncertain: terms that rounding decides; of up to six every outcome is tried, and one has to fit counts,\n"
        "  loss and gradient together. bounded: cases with more, whose counts are only bounded."
    )
    return ended(failures)


def where(arguments: argparse.Namespace) -> str:
    """The CPU path, or the GPU."""
    if arguments.emulated:
        return f"emulated CUDA ({arguments.emulated})"
    on_cpu = arguments.device == "cpu"
    return facenet_ext.cpu_isa_active() if on_cpu else torch.cuda.get_device_name(arguments.device)


def ended(failures: list[str]) -> int:
    for failure in failures[:100]:
        print("FAILED", failure[:1000])
    print(f"{len(failures)} cases beyond the bounds")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
