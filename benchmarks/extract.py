"""Whole extraction, from JPEG files to a store on disk, against the encoder's forward passes alone on patches that are ready.

Times are milliseconds per image with two threads for the encoder, the median of alternating repeats in one run. Where the system can do
so, the process keeps to two cores, so that decoding and cutting compete with the encoder. ratio = ours / baseline, so smaller is better.
"""
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.pyramid import photograph
from patchify.images import open_image
from patchify.boxes import Regions
from patchify.encoder import load_encoder
from patchify.pyramid import cut_patches
from patchify.extraction import extract


def rows(backbones=(("mini", {}), ("resnet50", {"random_weights": True})), images=16, repeats=3):
    "One row per backbone."
    torch.set_num_threads(2)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    try:
        if cores:
            os.sched_setaffinity(0, sorted(cores)[:2])
        with tempfile.TemporaryDirectory() as folder:
            return [measure(name, options, Path(folder) / name, images, repeats) for name, options in backbones]
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def measure(name, options, folder, images, repeats):
    "Time one backbone."
    encoder, regions = load_encoder(name, device="cpu", **options), Regions(level=3)
    folder.mkdir()
    paths = [folder / f"{i}.jpg" for i in range(images)]
    for i, path in enumerate(paths):
        photograph(640, 480, i).save(path, quality=90)
    cut = [cut_patches(open_image(path), regions.boxes(640, 480), encoder.size) for path in paths]
    batches = [torch.cat(cut[i:i + 2]) for i in range(0, images, 2)]
    took = {"ours": [], "baseline": []}
    for turn in range(repeats + 1):
        start = time.perf_counter()
        for batch in batches:
            encoder(batch).numpy()
        middle = time.perf_counter()
        extract(paths, encoder, regions, folder / f"store-{turn}")
        end = time.perf_counter()
        if turn:  # the first turn warms up
            took["baseline"].append((middle - start) * 1000 / images)
            took["ours"].append((end - middle) * 1000 / images)
    ours, baseline = statistics.median(took["ours"]), statistics.median(took["baseline"])
    return dict(benchmark=f"extraction of 30 patches of {encoder.size} px by {name}, against its forward pass alone [ms]", ours=ours, baseline=baseline,
                ratio=ours / baseline, target="<= 1.15")


if __name__ == "__main__":
    for row in rows():
        print(row)
