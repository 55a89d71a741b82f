"""Threads: the result does not depend on their number, torch's setting is obeyed, one OpenMP pool, Ctrl-C ends a
call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from facenet_ext import _backend, mine_triplets, triplet_loss


def run_python(code: str, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def everything(x, y, **options):
    x = x.detach().requires_grad_()
    loss, stats = triplet_loss(x, y, return_stats=True, **options)
    plain = triplet_loss(x, y, **options)
    grads = torch.autograd.grad(loss, x) + torch.autograd.grad(plain, x)
    return [loss.detach(), plain.detach(), *grads, *stats.values(), *mine_triplets(x, y)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "dim", "per_class", "options"),
    [
        (700, 32, 7, {}),
        (600, 100, 150, {"distance": "euclidean", "reduction": "sum"}),
        (1300, 16, 2, {"normalize": True, "fallback": "skip"}),
    ],
)
def test_bitwise_equal_for_any_number_of_threads(n, dim, per_class, options, dtype):
    x = torch.randn(n, dim).to(dtype)
    y = (torch.arange(n) // per_class)[torch.randperm(n)]
    torch.set_num_threads(1)
    want = everything(x, y, **options)
    for threads in (2, 3, 5, 2):
        torch.set_num_threads(threads)
        for got, expected in zip(everything(x, y, **options), want, strict=True):
            assert torch.equal(got, expected), threads


def test_many_threads_on_few_rows():
    torch.set_num_threads(16)
    x = torch.randn(5, 3)
    y = torch.tensor([0, 0, 1, 1, 2])
    many = everything(x, y)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(many, everything(x, y), strict=True))


def test_calls_from_several_threads_at_once():
    """The GIL is released inside: calls run side by side, each with a workspace of its own."""
    import concurrent.futures

    batches = [(torch.randn(300, 24), torch.arange(300) % (3 + i)) for i in range(6)]
    alone = [everything(*batch) for batch in batches]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(lambda batch: everything(*batch), batches), alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc: threads cannot be counted")
def test_num_threads_is_obeyed_and_the_pool_is_shared():
    """With 1 no thread starts; with 3 at most two more than torch's own pool, which torch then goes on to use."""
    done = run_python("""
        import os, torch, facenet_ext
        count = lambda: len(os.listdir("/proc/self/task"))
        x, y = torch.randn(1500, 64), torch.arange(1500) % 50
        torch.set_num_threads(1)
        before = count()
        facenet_ext.triplet_loss(x, y)
        assert count() == before, "a thread started although torch.set_num_threads(1)"
        torch.set_num_threads(3)
        facenet_ext.triplet_loss(x, y)
        assert count() == before + 2, (before, count())
        torch.sort(torch.randn(64, 100_000))  # torch's own parallel region finds the same pool
        assert count() == before + 2, ("a second OpenMP pool", before, count())
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc: mapped libraries cannot be listed")
def test_one_openmp_runtime():
    done = run_python("""
        import facenet_ext, torch
        facenet_ext.triplet_loss(torch.randn(9, 2), torch.arange(9) // 3)
        libraries = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        print(*sorted(path for path in libraries if any(name in path for name in ("libgomp", "libomp", "libiomp"))))
        print(torch.__file__)
    """)
    assert done.returncode == 0, done.stderr
    runtimes, torch_file = done.stdout.splitlines()
    assert len(runtimes.split()) == 1, f"more than one OpenMP runtime: {runtimes}"
    beside_torch = os.path.dirname(torch_file)
    if any("gomp" in name for name in os.listdir(os.path.join(beside_torch, "lib"))):  # torch's wheels bring it
        assert os.path.realpath(runtimes).startswith(os.path.realpath(beside_torch)), runtimes


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_ends_a_long_call():
    """The call would take many seconds; the interrupt comes as KeyboardInterrupt soon after the signal."""
    code = """
        import signal, sys, time, torch, facenet_ext
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
        torch.set_num_threads(1)
        x, y = torch.randn(60_000, 256), torch.arange(60_000) // 4
        print("ready", flush=True)
        begin = time.perf_counter()
        try:
            facenet_ext.triplet_loss(x, y)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            x, y = x[:200].requires_grad_(), y[:200]  # and the process is fit for more
            facenet_ext.triplet_loss(x, y).backward()
            print("alive", bool(x.grad.isfinite().all()), flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        assert process.stdout.readline() == "interrupted\n"
        waited = time.monotonic() - sent
        assert process.stdout.readline() == "alive True\n"
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    assert waited < 5.0, f"took {waited:.1f} s to notice"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
def test_a_signal_handler_may_call_the_loss_inside_a_call():
    """Handlers run where a long call asks about Ctrl-C: evaluate and checkpoint, for one, when a cluster says so."""
    few, of_few = torch.randn(200, 128), torch.arange(200) // 4
    want_few, inside = triplet_loss(few, of_few), []

    def handler(*_):
        inside.append(not hasattr(_backend._kept, "workspace"))  # a call has it
        assert torch.equal(triplet_loss(few, of_few), want_few)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for rows in (6000, 12000, 24000):  # a call asks every 20 ms
            x, y = torch.randn(rows, 64, requires_grad=True), torch.arange(rows) // 4
            want = triplet_loss(x, y)
            (want_grad,) = torch.autograd.grad(want, x)
            signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
            loss = triplet_loss(x, y)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.equal(loss, want) and torch.equal(torch.autograd.grad(loss, x)[0], want_grad)
            if any(inside):
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert any(inside)
