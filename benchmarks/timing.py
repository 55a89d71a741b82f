"""Round-robin timing: every round calls each contender once, so that a slow moment of the machine hits all alike.

Ratios are built inside a round, between neighbours in time. A contender with fewer calls than there are rounds has
them spread evenly over the rounds.
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch


def quartiles(values: list[float]) -> dict:
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def seconds_on_cpu(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class CudaTimer:
    """Seconds between two events around the call, on the device's clock.

    `cold` first writes more than the L2 holds, so that the call finds its inputs in device memory, as after the
    backward pass of a network; the write ends before the first event.
    """

    def __init__(self, cold: bool):
        bytes_to_write = max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 1 << 26) if cold else 0
        self.flush = torch.empty(bytes_to_write, dtype=torch.uint8, device="cuda") if cold else None

    def __call__(self, call: Callable) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self.flush is not None:
            self.flush.zero_()
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def as_graph(call: Callable) -> Callable:
    """The call captured in a CUDA graph, after a warm-up on a side stream as capturing demands; returns the replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def modes(device: str) -> dict[str, tuple[Callable[[Callable], Callable], Callable[[Callable], float]]]:
    """How a call is prepared and how it is timed, by name."""
    if device == "cpu":
        return {"eager": (lambda call: call, seconds_on_cpu)}
    warm, cold = CudaTimer(cold=False), CudaTimer(cold=True)
    return {"eager": (lambda call: call, warm), "graph": (as_graph, warm), "graph, cold L2": (as_graph, cold)}


def round_robin(
    calls: dict[str, Callable],
    wanted: dict[str, int],
    timer: Callable[[Callable], float],
    progress: Callable = lambda: None,
) -> dict[str, list[tuple[int, float]]]:
    """Times calls[name] wanted[name] times; returns (round, seconds) for each name. Nothing is collected meanwhile."""
    rounds = max(wanted.values())
    samples = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name, call in calls.items():
                due = (turn + 1) * wanted[name] // rounds
                if due > len(samples[name]):
                    samples[name].append((turn, timer(call)))
            progress()
    finally:
        gc.enable()
    return samples


def summarise(samples: list[tuple[int, float]], yardstick: list[tuple[int, float]]) -> dict:
    """Median and quartiles in seconds; `ratio` of the medians, `ratio_in_round` of neighbours in the same round."""
    of_round = dict(yardstick)
    summary = quartiles([seconds for _, seconds in samples])
    median = statistics.median(of_round.values())
    return {
        "calls": len(samples),
        "seconds": summary,
        "ratio": summary["median"] / median,
        "ratio_in_round": quartiles([seconds / of_round[turn] for turn, seconds in samples]),
    }
