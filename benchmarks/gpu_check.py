"""The steps of gpu_check.sh. Each is a function that returns what it saw, or raises; none stops those after it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = (  # N, K, D
    (1800, 40, 128),
    (4096, 16, 128),
    (8192, 16, 128),
    (8192, 16, 256),
    (32768, 16, 512),
    (262144, 16, 128),
)
DEVICE = "cuda"  # a rehearsal of accuracy() on a machine without a GPU says "cpu"
BANDS = (0, 1e-3, 1e-1, 1, 3, 5)  # of the squared distance of unit rows


def run(command: list[str], timeout: int, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-20000:]
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{output}")
    return done.stdout


# ---- steps -----------------------------------------------------------------------------------------------------------


def build() -> dict:
    """For this GPU's architecture alone: seconds instead of minutes."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    begin = time.perf_counter()
    switches = {"FACENET_EXT_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": f"{major}{minor}"}
    run([sys.executable, "setup.py", "build_ext", "--inplace"], 300, **switches)
    info = run(
        [sys.executable, "-c", "import torch, json, facenet_ext; print(json.dumps(facenet_ext.build_info()))"], 60
    )
    return {"seconds": round(time.perf_counter() - begin, 1), "build_info": json.loads(info.splitlines()[-1])}


def tests() -> dict:
    """The package's tests on device="cuda"; one that is skipped for want of a GPU is a failure here."""
    workers = ["-n", str(min(6, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    command = ["pytest", "-q", "-rs", *workers, "tests", "--ignore=tests/emulated", "-k", "cuda or gpu"]
    out = run([sys.executable, "-m", *command], 240)
    summary = out.strip().splitlines()[-1]
    if "passed" not in summary:
        raise RuntimeError(f"no test ran: {summary}")
    if "no GPU" in out or "no CUDA" in out:
        raise RuntimeError(f"tests were skipped although there is a GPU: {summary}")
    return {"summary": summary}


def sanitizers() -> dict:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise RuntimeError("compute-sanitizer is not on PATH")
    checks = ("memcheck", "racecheck", "initcheck", "synccheck")

    def summary(check: str) -> str:
        out = run([tool, "--tool", check, "--error-exitcode", "1", sys.executable, __file__, "--small-set"], 200,
                  PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # fmt: skip
        return next((line.strip(" =") for line in reversed(out.splitlines()) if "SUMMARY" in line), "no summary")

    with ThreadPoolExecutor(len(checks)) as pool:  # they spend their time on the host
        return dict(zip(checks, pool.map(summary, checks), strict=True))


def accuracy(n: int = 2048) -> dict:
    """Selection distances are not an output, so their error is seen in what they decide: pairs that choose another
    negative than float64 does, and by how much; beside it the same for the expansion by sgemm. Bias and largest error
    of the direct-form values per band. Mirrored and unmirrored tiles must agree bit for bit."""
    import torch

    import facenet_ext

    rows = {}
    for d in (64, 128, 512):
        generator = torch.Generator(device=DEVICE).manual_seed(d)
        classes = n // 16
        labels = torch.arange(n, device=DEVICE) % classes
        base = torch.nn.functional.normalize(torch.randn(n, d, device=DEVICE, generator=generator))
        inputs = {
            "init": base,
            "duplicates": base[torch.randint(0, n // 2, (n,), device=DEVICE, generator=generator)],
            "near duplicates": torch.nn.functional.normalize(base[labels] + 1e-2 * base),
            "antipodes": base[:1] * (1 - 2 * (torch.arange(n, device=DEVICE) // classes % 2))[:, None],
            "collapse": base[:1].expand(n, d),
        }
        for name, x in inputs.items():
            x = x.contiguous()
            mined = facenet_ext.mine_triplets(x, labels)
            d64 = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
            expanded = (x.square().sum(1)[:, None] + x.square().sum(1) - 2 * x @ x.T).clamp_min(0).double()
            same = labels[:, None] == labels

            def selection(distances, beyond=0.0, a=mined.anchor, p=mined.positive, same=same):
                """The least distance farther than d_ap + beyond among other labels (inf: none), and whose it is."""
                best = torch.empty(len(a), dtype=torch.float64, device=DEVICE)
                index = torch.empty_like(a)
                for part in torch.arange(len(a), device=DEVICE).split(8192):
                    row = distances[a[part]]
                    ok = ~same[a[part]] & (row > distances[a[part], p[part]][:, None] + beyond)
                    best[part], index[part] = torch.where(ok, row, torch.inf).min(dim=1)
                return best, index

            best, _ = selection(d64)
            surely, _ = selection(d64, beyond=4e-6)  # a negative within rounding of d_ap may count or not
            found = best.isfinite() & ~mined.fallback
            ours = d64[mined.anchor, mined.negative]
            theirs_best, theirs = selection(expanded)
            both = found & theirs_best.isfinite()
            error = mined.d2_an.double() - ours
            bands = []
            for low, high in zip(BANDS, BANDS[1:], strict=False):
                inside = (ours >= low) & (ours < high)
                if inside.any():
                    bands.append(
                        {
                            "from": low,
                            "to": high,
                            "bias": error[inside].mean().item(),
                            "max": error[inside].abs().max().item(),
                        }
                    )
            rows[f"{d} {name}"] = {
                "pairs": len(mined.anchor),
                "other_negative_than_float64": ((ours != best) & found).sum().item() / max(1, found.sum().item()),
                "sgemm_other_negative": ((d64[mined.anchor, theirs] != best) & both).sum().item()
                / max(1, both.sum().item()),
                "largest_excess": (ours - surely)[found].max().item() if found.any() else 0.0,
                "bands": bands,
            }
            if rows[f"{d} {name}"]["largest_excess"] > 4e-6:
                excess = rows[f"{d} {name}"]["largest_excess"]
                raise RuntimeError(f"{d} {name}: a negative is {excess} farther than the closest legal one")
        # The kernels sort rows by label. Classes in reverse order put every pair on the other side of the diagonal, and
        # leave the indices, which decide between equal distances, as they are.
        straight, mirrored = facenet_ext.mine_triplets(base, labels), facenet_ext.mine_triplets(base, -labels)
        differ = (straight.negative != mirrored.negative).sum().item()
        rows[f"{d} init"]["mirrored_selection_differs"] = differ
        if differ:
            raise RuntimeError(f"{d}: {differ} selections depend on which side of the diagonal a pair stands")
    for name, row in rows.items():
        ours, theirs = (row["pairs"] * row[key] for key in ("other_negative_than_float64", "sgemm_other_negative"))
        if "init" in name and ours > 2 * theirs + 10:  # 10: rates of one in ten thousand are counted in few pairs
            raise RuntimeError(f"{name}: {ours:.0f} selections differ from float64's, sgemm's {theirs:.0f}")
    return rows


def graphs() -> dict:
    """Captures forward and backward, replays on new data, and compares bit for bit with eager."""
    import torch

    import facenet_ext

    labels = torch.arange(1800, device="cuda") // 40
    x = torch.nn.functional.normalize(torch.randn(1800, 128, device="cuda")).requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            facenet_ext.triplet_loss(x, labels).backward()
            x.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = facenet_ext.triplet_loss(x, labels)
        loss.backward()
    replays = 0
    for _ in range(5):
        fresh = torch.nn.functional.normalize(torch.randn(1800, 128, device="cuda"))
        with torch.no_grad():
            x.copy_(fresh)
        graph.replay()
        y = fresh.clone().requires_grad_()
        expected = facenet_ext.triplet_loss(y, labels)
        expected.backward()
        if not (torch.equal(loss, expected) and torch.equal(x.grad, y.grad)):
            raise RuntimeError("a replay differs from eager")
        replays += 1
    return {"replays_equal_to_eager": replays}


def repeats() -> dict:
    """Loss and gradient of 100 calls, every other one on a second stream at the same time, bit for bit."""
    import torch
    from batches import Size, make_batch

    import facenet_ext

    seen = {}
    for size in SHAPES[:3]:
        x, labels = make_batch(Size(*size), "init", device="cuda")

        def call(x=x, labels=labels):
            y = x.clone().requires_grad_()
            loss = facenet_ext.triplet_loss(y, labels)
            loss.backward()
            return loss.detach(), y.grad

        expected, other = call(), torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        for _ in range(50):
            here = call()
            with torch.cuda.stream(other):
                there = call()
            torch.cuda.synchronize()
            for got in (here, there):
                if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                    raise RuntimeError(f"{size}: calls with the same input differ")
        seen[str(size)] = 100
    return seen


def median_us(action, samples: int, calls: int = 1, flush=None) -> float:
    """Of one of `calls` calls in a row, on the device's clock."""
    import torch

    seen = []
    for _ in range(samples):
        if flush is not None:
            flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            action()
        end.record()
        end.synchronize()
        seen.append(begin.elapsed_time(end) * 1e3 / calls)
    return round(sorted(seen)[samples // 2], 2)


def times() -> dict:
    """Forward and backward, medians: eager, as a graph's replays, with a cold L2; peak memory above the input; beside
    them a bare X @ X.T in TF32 and in float32, in slices of 8,192 rows where it is larger."""
    import torch
    from batches import REGIMES, Size, make_batch
    from timing import as_graph

    import facenet_ext

    flush = torch.empty(256 * 1024 * 1024, dtype=torch.uint8, device="cuda")
    rows = {}
    for n, k, d in SHAPES:
        samples, calls = (31, 20) if n <= 8192 else (3, 1)
        name = f"{n} x {d}, K {k}"
        for regime in REGIMES:
            x, labels = make_batch(Size(n, k, d), regime, device="cuda")
            x.requires_grad_()

            def step(x=x, labels=labels):
                x.grad = None
                facenet_ext.triplet_loss(x, labels).backward()

            step()
            x.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            row = {
                "peak_bytes": torch.cuda.max_memory_allocated() - before,
                "promised_bytes": n * (24 * d + 1024) + 8 * n * d,  # workspace, gradient before and after backward
            }
            replay = as_graph(step)
            median_us(replay, samples)
            row["graph_us"] = median_us(replay, samples, calls)
            row["graph_cold_us"] = median_us(replay, samples, flush=flush)
            row["eager_us"] = median_us(step, samples, calls)
            rows[f"{name}, {regime}"] = row
            if row["peak_bytes"] > row["promised_bytes"]:
                raise RuntimeError(f"{name}, {regime}: {row['peak_bytes']} bytes, promised: {row['promised_bytes']}")
        for tf32 in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            x, _ = make_batch(Size(n, k, d), "init", device="cuda")

            def product(x=x):
                for part in x.split(8192):
                    part @ x.T

            median_us(product, samples)
            product_us = median_us(product, samples, calls)
            rows[f"{name}, X @ X.T in {'TF32' if tf32 else 'float32'}"] = {"eager_us": product_us}
        torch.backends.cuda.matmul.allow_tf32 = False
    return rows


def small_set() -> None:
    """What compute-sanitizer watches: every input type, several passes, fallback, separate anchors of no label."""
    import torch

    import facenet_ext

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for n, d, classes in ((300, 40, 40), (257, 3, 2)):
            x = torch.randn(n, d, device="cuda").to(dtype).requires_grad_()
            labels = torch.arange(n, device="cuda") % classes
            for normalize in (False, True):
                loss = facenet_ext.triplet_loss(x, labels, normalize=normalize, margin=1.0)
                loss.backward()
                x.grad = None
            facenet_ext.mine_triplets(x.detach(), labels)
    torch.cuda.synchronize()


# ---- report ----------------------------------------------------------------------------------------------------------


def machine() -> dict:
    facts = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "platform": platform.platform()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    # Where the sources are a copy without their history, whoever copied them says of what.
    facts["commit"] = os.environ.get("FACENET_EXT_COMMIT") or commit.stdout.strip() or "unknown"
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    if "FACENET_EXT_COMMIT" not in os.environ:
        facts["uncommitted_changes"] = bool(changed.stdout.strip())
    try:
        import torch

        facts["torch"], facts["cuda"] = torch.__version__, torch.version.cuda
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]
    except (ImportError, FileNotFoundError, IndexError) as error:
        facts["incomplete"] = repr(error)
    return facts


def write_atomically(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


def print_table(steps: dict) -> None:
    print(f"\n{'step':12} {'result':8} {'seconds':>8}  note")
    for name, step in steps.items():
        note = step.get("error") or str(step.get("seen", ""))
        print(f"{name:12} {step['result']:8} {step['seconds']:>8.1f}  {' '.join(note.split())[:100]}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks facenet_ext on this machine's GPU.")
    parser.add_argument("--quick", action="store_true", help="build, tests and sanitizers only")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the JSON (default: benchmarks/results)"
    )
    parser.add_argument("--small-set", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small_set:
        small_set()
        return 0
    sys.path.insert(0, str(ROOT))
    # Steps of one group run at the same time; what is timed runs alone.
    todo = [[build], [tests, sanitizers]]
    if not options.quick:
        todo += [[accuracy], [graphs], [repeats], [times]]
    report = {"machine": machine(), "quick": options.quick, "steps": {}}
    if "gpu" not in report["machine"]:
        print("gpu_check needs a machine with a GPU and a torch that sees it; this one has none.", file=sys.stderr)
        return 2

    def perform(step) -> dict:
        begin = time.perf_counter()
        try:
            entry = {"result": "passed", "seen": step()}
        except Exception as error:  # noqa: BLE001 - whatever a step dies of belongs into the report
            entry = {"result": "FAILED", "error": f"{type(error).__name__}: {error}"}
        entry["seconds"] = round(time.perf_counter() - begin, 1)
        print(f"{step.__name__}: {entry['result']} after {entry['seconds']} s", flush=True)
        return entry

    for group in todo:
        with ThreadPoolExecutor(len(group)) as pool:
            for step, entry in zip(group, pool.map(perform, group), strict=True):
                report["steps"][step.__name__] = entry
    stamp = report["machine"]["date"].replace(":", "").replace("+0000", "Z")
    path = options.results / f"gpu_check_{report['machine']['gpu'].replace(' ', '_')}_{stamp}.json"
    write_atomically(path, report)
    print_table(report["steps"])
    print(f"written: {path}")
    return 0 if all(step["result"] == "passed" for step in report["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
