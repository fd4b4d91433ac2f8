"""Preparing the 30 patches of an image: ours against crop-by-crop PIL, torchvision and the alternatives that were not taken.

Times are milliseconds per image with two worker threads over eight decoded photographs, the median of alternating repeats in one run.
ratio = baseline / ours, so larger is better.
"""
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from patchify.boxes import pyramid_boxes
from patchify.pyramid import cut_patches, cut_with_matrices, cut_with_pil


def photograph(width, height, seed):
    "A blurred random picture with some noise: about as hard to resample as any."
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.BoxBlur(2)), np.int16)
    return Image.fromarray((smooth + rng.integers(-9, 10, smooth.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8))


def with_torchvision(image, boxes, size):
    "The usual way with torchvision: one resized_crop per patch on the decoded tensor."
    pixels = pil_to_tensor(image)
    return torch.stack([resized_crop(pixels, int(y0), int(x0), int(y1 - y0), int(x1 - x0), [size, size], InterpolationMode.BICUBIC, antialias=True)
                        for x0, y0, x1, y1 in boxes])


def with_pil_box(image, boxes, size, gap=None):
    "PIL's resize of a box without a crop, optionally halving the image first: not the same patches."
    patches = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=tuple(box), reducing_gap=gap)) for box in boxes]
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2)


def medians(functions, images, boxes, size, repeats=5):
    "Median milliseconds per image of each function, run in turn so that a busy moment hits all alike."
    times = {name: [] for name in functions}
    with ThreadPoolExecutor(2) as pool:
        for turn in range(repeats + 1):
            for name, function in functions.items():
                start = time.perf_counter()
                list(pool.map(lambda image: function(image, boxes, size), images))
                if turn:  # the first turn warms up
                    times[name].append((time.perf_counter() - start) * 1000 / len(images))
    return {name: statistics.median(values) for name, values in times.items()}


def rows(sides=((640, 480), (1024, 768)), sizes=(128, 384), alternatives=False):
    "One row per image side, patch size and baseline."
    torch.set_num_threads(2)
    functions = {"ours": cut_patches, "PIL, crop by crop": cut_with_pil, "torchvision, crop by crop": with_torchvision}
    if alternatives:
        functions |= {"PIL resize(box=)": with_pil_box, "PIL reducing_gap=2": lambda *args: with_pil_box(*args, gap=2.0),
                      "matrices on the CPU": cut_with_matrices}
    found = []
    for side in sides:
        images = [photograph(*side, seed) for seed in range(8)]
        for size in sizes:
            took = medians(functions, images, pyramid_boxes(*side, 3), size)
            ours = took.pop("ours")
            found += [dict(benchmark=f"30 patches of {size} px from {side[0]} x {side[1]}, against {name} [ms]", ours=ours, baseline=value,
                           ratio=value / ours, target=">= 4" if name.startswith("PIL, crop") else None) for name, value in took.items()]
    return found


if __name__ == "__main__":
    for row in rows(alternatives=True):
        print(row)
