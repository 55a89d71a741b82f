"""Does reading starve the step? Images per second of each stage on the way to the network, and of the step itself.

    python benchmarks/loader_bench.py --data FOLDER [--device cuda --network nn4 --size 96 --batch 1800] [--json FILE]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from report import environment, write_json

from facenet_ext import SemiHardTripletLoss, data, models


def rate(function, images, seconds=3.0, device="cpu"):
    """Median images per second of calls over at least ``seconds``."""
    times = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        function(len(times))
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return images / float(np.median(times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument("--network", default="mini")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--batch", type=int, default=180)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    size = (options.size, options.size)
    try:
        images = data.Images(*data.scan(options.data), size)
    except data.DataError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    draw = np.random.default_rng(0)

    start = time.perf_counter()
    some = draw.permutation(len(images))[:4000]
    good = images.preload(some)
    first = len(some) / (time.perf_counter() - start)
    batches = [draw.choice(good, options.batch) for _ in range(16)]
    cached = rate(lambda i: images.batch(batches[i % 16]), options.batch)
    pixels, labels = images.batch(batches[0])
    changed = rate(lambda i: data.augment(pixels, size, i, options.device), options.batch, device=options.device)
    model = models.create(options.network, input_size=size).to(options.device, memory_format=torch.channels_last)
    x, criterion = data.augment(pixels, size, 0, options.device), SemiHardTripletLoss()
    optimizer = torch.optim.AdamW(model.parameters())

    def step(_):
        optimizer.zero_grad()
        criterion(model(x), labels.to(options.device)).backward()
        optimizer.step()

    stepped = rate(step, options.batch, device=options.device)
    print(f"{options.batch} images of {size[0]} x {size[1]}, {torch.get_num_threads()} threads, {options.device}")
    found = {"first touch: read, decode, resize": first, "cached: a batch of uint8": cached,
             "augment, on the device": changed, f"step of {options.network}": stepped}
    for name, value in found.items():
        print(f"{name:>36} {value:10.0f} images/s")
    if options.json:
        settings = {"network": options.network, "size": size, "batch": options.batch}
        write_json(options.json, {"benchmark": "loader_bench", "settings": settings, "images_per_second": found,
                                  "environment": environment(options.device, torch.get_num_threads())})


if __name__ == "__main__":
    main()
