"""Compressed search: training against FAISS's factory, image rankings against FAISS's own search, bytes against float32.

Times are seconds, the median of alternating repeats in one run. ratio = baseline / ours, so larger is better.
"""
import json
import os
import subprocess
import sys

import faiss
import numpy as np
import torch

from benchmarks.search import THREADS, faiss_all_images, timed, unit
from patchify.compress import PQIndex, memory, train_quantiser
from patchify.ivf import IVFPQIndex
from patchify.search import ExactIndex

IMAGES, PATCHES, DIM, QUERIES = 1000, 30, 512, 300
TRAINING = """
import os, sys, time, json
if sys.argv[1] == "ours":
    from patchify.compress import PQIndex
import faiss, numpy as np
vectors = np.random.default_rng(0).normal(size=(10_000, 1, 256)).astype(np.float32)
start = time.perf_counter()
if sys.argv[1] == "ours":
    PQIndex(32, n_iter=25).train(vectors)
else:
    faiss.index_factory(256, "PQ32x8", faiss.METRIC_INNER_PRODUCT).train(vectors[:, 0])
print(json.dumps(time.perf_counter() - start))
"""


def training(who: str) -> float:
    "Seconds to train a PQ of 32 pieces on 10,000 vectors with 25 k-means rounds, in a process of its own because waiting policies are per process."
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run([sys.executable, "-c", TRAINING, who], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def rows() -> list[dict]:
    "One dict per comparison."
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(50, DIM))[rng.integers(0, 50, IMAGES)] + rng.normal(size=(IMAGES, DIM))
    gallery = unit(image[:, None] + rng.normal(size=(IMAGES, PATCHES, DIM)))
    queries = unit(gallery[rng.choice(IMAGES, QUERIES), rng.integers(0, PATCHES, QUERIES)] + 0.5 * rng.normal(size=(QUERIES, DIM)) / DIM**0.5)
    exact = ExactIndex(gallery, device="cpu")
    pq = PQIndex(32, n_iter=3, points_per_centroid=40).train(gallery).add(gallery)
    ivf = IVFPQIndex(32, n_lists=256, n_iter=3, points_per_centroid=40).train(gallery).add(gallery)
    few = IVFPQIndex(32, n_lists=256, n_probe=8, n_iter=3, points_per_centroid=40).train(gallery).add(gallery)

    def with_faiss(index, n_probe=None):
        if n_probe:
            index.core.nprobe = n_probe
        return faiss_all_images(index.core, queries, PATCHES)

    def patches_then_group():
        few.core.nprobe = 8
        return few.core.search(queries, 100 * PATCHES)[1] // PATCHES

    short = np.ascontiguousarray(gallery[:, :5, :256].reshape(-1, 256))

    def pieces_of_four():
        train_quantiser(faiss.IndexPQ(256, 64, 8), short, 5, 256, seed=0)

    def pieces_of_four_by_faiss():
        index = faiss.IndexPQ(256, 64, 8)
        index.pq.cp.niter, index.pq.cp.min_points_per_centroid = 5, 1
        index.train(short)

    for index in (pq, ivf):
        ours, theirs = index.search(queries), with_faiss(index, 256 if index is ivf else None)
        assert (ours.ranks[:, 0] == theirs[:, 0]).mean() > 0.99
    t = timed({"exact": lambda: exact.search(queries), "pq": lambda: pq.search(queries), "pq faiss": lambda: with_faiss(pq),
               "ivf": lambda: ivf.search(queries), "ivf faiss": lambda: with_faiss(ivf, 256),
               "few": lambda: few.search(queries), "few faiss": patches_then_group,
               "short": pieces_of_four, "short faiss": pieces_of_four_by_faiss}, repeats=3)
    train = {who: training(who) for who in ("ours", "factory")}

    def row(benchmark, ours, baseline, target=None):
        return dict(benchmark=benchmark, ours=ours, baseline=baseline, ratio=baseline / ours, target=target)

    size = memory(ivf)
    return [
        row("training PQ, against FAISS's factory [s]", train["ours"], train["factory"], ">= 2"),
        row("training pieces of 4 dimensions, against FAISS's own [s]", t["short"], t["short faiss"], ">= 3"),
        row("PQ, all images ranked, against FAISS with k = all [s]", t["pq"], t["pq faiss"], ">= 5"),
        row("IVF-PQ, all lists, all images ranked, against FAISS with k = all [s]", t["ivf"], t["ivf faiss"], ">= 5"),
        row("IVF-PQ, 8 of 256 lists, all images, against FAISS's 3,000 best patches ungrouped [s]", t["few"], t["few faiss"]),
        row("PQ against exact search, all images ranked [s]", t["pq"], t["exact"], ">= 0.5"),
        row("IVF-PQ index against float32 descriptors [bytes]", size.total, size.exact, ">= 10"),
    ]


if __name__ == "__main__":
    for found in rows():
        print(found)
