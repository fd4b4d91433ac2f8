"""Verification of a store when it is first read, against exact search over it.

Both times are seconds of processor time on one thread, the smallest of some repeats, for a synthetic store of unit descriptors and
as many queries as ILIAS has. ratio = verification / search, so smaller is better.
"""
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from patchify.boxes import Regions
from patchify.extraction import Extraction
from patchify.search import ExactIndex
from patchify.store import Store, write_shard

QUERIES = 1232


class Synthetic:
    "An encoder in name only: its descriptors are written directly."
    name = "synthetic"
    size = 8
    fingerprint = "0"
    dtype = torch.float32
    device = "cpu"
    aspect = "stretch"
    padding = None

    def __init__(self, dim):
        self.dim = dim


def make_store(folder, images, dim, regions):
    "A store of random unit descriptors."
    job = Extraction.plan([f"{i}.jpg" for i in range(images)], Synthetic(dim), regions, folder)
    job.claim()
    rng = np.random.default_rng(0)
    for shard in job.shards:
        rows = job.rows(shard)
        values = rng.standard_normal((len(rows), regions.count, dim), dtype=np.float32)
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
        boxes = np.tile(regions.boxes(640, 480), (len(rows), 1, 1))
        ids = [f"{row}.jpg" for row in rows]
        write_shard(folder, shard, job.key, rows, ids, boxes, values.astype(np.float16), regions.levels)
    job.finish()
    return rng.standard_normal((QUERIES, dim), dtype=np.float32)


def measure(images, dim, repeats):
    "Time one size of store."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    verification, search = [], []
    with tempfile.TemporaryDirectory() as folder:
        queries = make_store(Path(folder) / "store", images, dim, Regions(level=3))
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        for _ in range(repeats):
            store = Store.open(Path(folder) / "store")
            start = time.process_time()
            for _ in store.descriptors():
                pass
            middle = time.process_time()
            ExactIndex(store.descriptors(), store.rows, "cpu").search(queries, 100)
            search.append(time.process_time() - middle)
            verification.append(middle - start)
    torch.set_num_threads(threads)
    name = f"verifying {images} images x 30 x {dim} at first read, against searching them with {QUERIES} queries [s]"
    return dict(benchmark=name, ours=min(verification), baseline=min(search), ratio=min(verification) / min(search),
                target="<= 0.03")


def rows(images=1000, dim=1024, repeats=3):
    "One row."
    return [measure(images, dim, repeats)]


if __name__ == "__main__":
    for row in rows():
        print(row)
