"""Made-up people for the tests of the driver: no real face is in this repository."""

import numpy as np
from PIL import Image


def faces(root, people=8, images=5, singletons=4):
    """People who differ by a pattern; every image of it has a tint of its own, which a random network falls for."""
    rng = np.random.default_rng(0)
    for person in range(people + singletons):
        (root / f"p{person:02d}").mkdir(parents=True)
        pattern = np.kron(rng.choice([-40, 40], (4, 4, 1)), np.ones((4, 4, 1)))
        for i in range(images if person < people else 1):
            pixels = np.clip(128 + pattern + rng.uniform(-80, 80, 3), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"p{person:02d}" / f"p{person:02d}_{i + 1:04d}.png")
    return root
