"""One call of one contender, alone in a process: its peak memory, its time and whether it computes the right thing.

Memory on a CPU is the growth of the *resident* set. Hooks of torch's allocator (torch.profiler) see what torch.empty
reserves, also the workspace that a C++ kernel is given, but not what a kernel, the BLAS or Python allocates itself;
the resident set sees all of these. It misses pages that were reserved and never touched, which cost nobody anything.
It is good to about a megabyte. Three traps are avoided:

  * getrusage's ru_maxrss never falls and a child started by fork and exec inherits the peak of its *parent*, so a
    large parent hides every smaller peak. Linux lets a process reset the peak (clear_refs); that is used, in a child
    of its own.
  * Library code that is paged in at the first call is resident too: a small call goes first, and what grew in file-
    backed pages is taken off.
  * malloc keeps freed memory, which the next call takes without growing: it is given back (malloc_trim) before.

The children are forked from a server that has imported everything and run nothing (no thread exists yet, no page is
dirty): a probe costs milliseconds instead of the seconds of importing torch, and one that runs out of memory ends
alone.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from batches import Size, make_batch
from contenders import CONTENDERS, DRAWN, RULES

BY_NAME = {contender.name: contender for contender in (*CONTENDERS, *RULES, DRAWN)}


def available_bytes() -> int:
    """What can be allocated without swapping: the machine's figure, or the container's limit where that is less."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no control group, or one without a limit on memory
        return available
    return available if limit == "max" else min(available, int(limit) - used)


def resident() -> tuple[int, int, int]:
    """Bytes: peak of the resident set, the set now, its file-backed part."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the peak is all there is, in bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak, 0
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return tuple(int(fields[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS", "RssFile"))


def forget_peak() -> None:
    """Freed memory goes back to the system and the recorded peak falls to what is resident now."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):  # another libc, or no such file: the warm-up's peak stays, which was small
        return


def probe(name: str, size: Size, regime: str, seed: int, threads: int, device: str = "cpu") -> dict:
    """{"seconds": of one call, "peak_bytes": above input and gradient, "wrong": what differs from the package}."""
    torch.set_num_threads(threads)
    contender, cuda = BY_NAME[name], device != "cpu"
    x, y = make_batch(size, regime, seed, device)
    if contender.compile:
        contender.bind(x, y)()  # compiling is no part of the call, and is done for this very size
    else:
        contender.bind(*make_batch(Size(min(size.n, 4 * size.k, 256), size.k, size.d), regime, seed, device))()
    call = contender.bind(x, y)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget_peak()
        _, before, files_before = resident()
    start = time.perf_counter()
    value = call()
    if cuda:
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        grown = torch.cuda.max_memory_allocated() - before
    else:
        seconds = time.perf_counter() - start
        peak, _, files = resident()
        grown = peak - before - (files - files_before)
    gradient = 0 if contender.loss is None else x.numel() * x.element_size()
    wrong = contender.check(value.detach(), call.leaf.grad, x, y) if contender.check else ""
    return {"seconds": seconds, "peak_bytes": max(0, grown - gradient), "wrong": wrong}


class ProbeServer:
    """Runs `probe` in a fresh child for each request. On a GPU it runs here: CUDA does not survive a fork."""

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.process = None
        if device == "cpu" and hasattr(os, "fork"):
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process:
            self.process.stdin.close()
            self.process.wait()

    def __call__(self, name: str, size: Size, regime: str, seed: int, threads: int, limit: float = 600) -> dict:
        """What `probe` returns, or {"error": why it did not}; `limit` in seconds."""
        request = {"name": name, "size": list(size), "regime": regime, "seed": seed, "threads": threads}
        if self.process is None:
            return answer(request | {"device": self.device})
        self.process.stdin.write(json.dumps(request | {"limit": int(limit) + 1}) + "\n")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the probe process ended with status {self.process.wait()} while measuring {name} at {size}"
            )
        return json.loads(line)


def answer(request: dict) -> dict:
    request = dict(request)
    request["size"] = Size(*request["size"])
    try:
        return probe(**request)
    except (RuntimeError, MemoryError) as error:  # torch reports a refused allocation as RuntimeError
        return {"error": str(error).strip().splitlines()[-1][:200] or type(error).__name__}


def serve() -> None:
    for contender in CONTENDERS:
        if contender.needs and not contender.missing():
            importlib.import_module(contender.needs)
    for line in sys.stdin:
        request = json.loads(line)
        limit = request.pop("limit")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            signal.alarm(limit)
            with os.fdopen(write, "w") as out:
                out.write(json.dumps(answer(request)))
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as result:
            text = result.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            ended_by = os.WTERMSIG(status)
            reasons = {signal.SIGALRM: f"took more than {limit} s", signal.SIGKILL: "killed, probably out of memory"}
            text = json.dumps({"error": reasons.get(ended_by, f"ended by signal {ended_by}")})
        elif os.WEXITSTATUS(status) != 0 or not text:
            text = json.dumps({"error": f"ended with status {os.WEXITSTATUS(status)}; its message is above"})
        print(text, flush=True)


if __name__ == "__main__":
    serve()
