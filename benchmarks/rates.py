"""The rates behind `patchify plan`, written to patchify/rates.csv: python -m benchmarks.rates

All rates are per core: work divided by the processor time of one thread, which other processes on the machine disturb little. Run it on
a machine of your own to add its rows; rows of other hardware are kept.
"""
import csv
import re
import time
from pathlib import Path

import faiss
import numpy as np
import torch

import patchify
from patchify.encoder import load_encoder
from patchify.ivf import IVFPQIndex
from patchify.pages.page import hardware
from patchify.search import ExactIndex

FILE = Path(patchify.__file__).with_name("rates.csv")
COLUMNS = ["hardware", "step", "setting", "rate", "unit"]
ENCODERS = ("mini", "clip", "dinov2", "siglip")


def unit(rng, *shape):
    "Random unit rows."
    x = rng.standard_normal(shape, dtype=np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def processor_seconds(call, repeats=3):
    "The smallest processor time of some calls."
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def encoding():
    "Patches per second of some encoders, with random weights where none are shipped."
    for name in ENCODERS:
        encoder = load_encoder(name, device="cpu", random_weights=name != "mini")
        patches = 16 if name == "mini" else 1
        images = torch.randint(0, 256, (patches, 3, encoder.size, encoder.size), dtype=torch.uint8)
        yield "encode", name, patches / processor_seconds(lambda: encoder(images), 2), "patches per second"


def indexing(dim=256, lists=1024, images=1000):
    "Training and adding, in multiplications of a descriptor's component with a centroid's."
    rng = np.random.default_rng(0)
    gallery = unit(rng, images, 30, dim)
    index = IVFPQIndex(dim // 8, n_lists=lists, n_iter=5)
    trained = processor_seconds(lambda: index.train(gallery), 1)
    points = gallery.shape[0] * 30
    yield "train", "", 5 * points * dim * (lists + 256) / trained, "products per second"
    added = processor_seconds(lambda: index.add(gallery), 1)
    yield "add", "", points * dim * (lists + 256) / added, "products per second"
    queries = unit(rng, 64, dim)
    index.n_probe = 128
    codes = len(queries) * points * index.n_probe / lists
    found = processor_seconds(lambda: index.search(queries, 10))
    yield "search", "ivfpq", codes * index.n_subvectors / found, "bytes of codes per second"
    exact = ExactIndex(gallery.astype(np.float16), device="cpu")
    found = processor_seconds(lambda: exact.search(queries[:1], 10))
    yield "search", "exact", points * dim / found, "products per second"


def main():
    "Measure, and replace the rows of this hardware."
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    name = re.sub(r", 1 thread$", "", hardware()) + ", per core"
    kept = []
    if FILE.exists():
        with open(FILE, newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["hardware"] != name]
    rows = [dict(zip(COLUMNS, (name, step, setting, float(f"{rate:.3g}"), measure)))
            for step, setting, rate, measure in [*indexing(), *encoding()]]
    with open(FILE, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(kept + rows)
    for row in rows:
        print(*row.values(), sep="  ")


if __name__ == "__main__":
    main()
