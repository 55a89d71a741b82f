"""The emulated CUDA kernels under the package's Python: tensors stay on the CPU, their memory goes to one runner that
stays up, and the results come back into it. So whatever is written against facenet_ext can be run over csrc/cuda."""

from __future__ import annotations

import contextlib
import ctypes
import random
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from emulation import SCHEDULES, Finding, command, environment

from facenet_ext import _backend

ELEMENT = (4, 8, 2, 2)  # bytes, by dtype's code


class Launcher:
    """Stands in for the compiled module: ``launch_triplet`` on the runner, everything else its own."""

    def __init__(self, program: Path, module):
        self.module = module
        self.errors = tempfile.TemporaryFile()
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        self.process = subprocess.Popen([*command(program), "/dev/stdin", "/dev/stdout"], **pipes, env=environment())
        self.next_case(0)

    def __getattr__(self, name):
        return getattr(self.module, name)

    def next_case(self, seed: int) -> None:
        """Draws the GPU. Schedule and grid change with every launch: they must not change a bit."""
        self.draw = random.Random(seed)
        self.capability, self.shared_kib = self.draw.choice((75, 80, 90, 90)), self.draw.choice((64, 99, 227))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def launch_triplet(self, _, *arguments):
        """The arguments of bindings.cpp, which has their names in this order."""
        anchors, candidates, anchor_labels, candidate_labels, a, c, dim, *arguments = arguments
        anchor_stride, candidate_stride, offset, dtype, distance, fallback, reduction, normalize, *arguments = arguments
        margin, negatives, positives, pairs, soft_margin, band, negatives_only, constants, seed, *arguments = arguments
        loss, grad_candidates, grad_anchors, stat_counts, stat_d2, pair_begin, *mined = arguments[:11]
        element, scalar = ELEMENT[dtype], 8 if dtype == 1 else 4

        def rows(address, count, stride):
            return ctypes.string_at(address, ((count - 1) * stride + dim) * element if count else 0)

        begin = ctypes.string_at(pair_begin, 8 * (a + 1)) if pair_begin else b""
        listed = struct.unpack("<q", begin[-8:])[0] if begin else 0
        drawn = struct.unpack("<q", ctypes.string_at(seed, 8))[0] if seed else 0
        draw = self.draw
        numbers = [a, c, dim, anchor_stride, candidate_stride, offset, dtype, distance, fallback, reduction, normalize]
        numbers += [grad_candidates != 0, grad_anchors != 0, stat_counts != 0, pair_begin != 0, listed]
        numbers += [draw.choice((1, 2, 3)), self.capability, draw.randrange(len(SCHEDULES)), draw.randrange(2**31)]
        numbers += [draw.random() < 0.5, self.shared_kib, negatives, positives, pairs, negatives_only, soft_margin]
        parts = [struct.pack("<29q2d", *map(int, [*numbers, drawn, constants]), margin, band)]
        parts += [rows(candidates, c, candidate_stride), ctypes.string_at(candidate_labels, 8 * c)]
        if not (a == c and offset == 0):
            parts += [rows(anchors, a, anchor_stride), ctypes.string_at(anchor_labels, 8 * a)]
        with contextlib.suppress(BrokenPipeError):  # what the runner said of it comes below
            self.process.stdin.write(b"".join([*parts, begin]))
            self.process.stdin.flush()
        self.take(8)  # the workspace's size
        outputs = [(loss, 1), (grad_candidates, (c - constants) * dim), (grad_anchors, a * dim)]
        outputs = [(address, scalar * count) for address, count in outputs]
        outputs += [(stat_counts, 40), (stat_d2, 3 * scalar)]
        outputs += zip(mined, (8 * listed, 8 * listed, scalar * listed, scalar * listed, listed), strict=True)
        for address, size in outputs:
            if address:
                ctypes.memmove(address, self.take(size), size)

    def take(self, size: int) -> bytes:
        data = self.process.stdout.read(size)
        if len(data) < size:
            self.errors.seek(0)
            text = self.errors.read().decode(errors="replace")
            raise Finding(f"exit status {self.process.wait()}\n{text[-6000:]}")
        return data


@contextlib.contextmanager
def emulated(program: Path) -> Iterator[Launcher]:
    """While it lasts, CPU tensors are computed by csrc/cuda."""
    module, launcher = _backend._C, Launcher(program, _backend._C)
    _backend._C = launcher
    try:
        yield launcher
    finally:
        _backend._C = module
        launcher.close()
