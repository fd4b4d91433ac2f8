"""Compressed search: training against FAISS's factory, rankings against FAISS's own search, bytes against float32.

Times are seconds, the median of alternating repeats in one run. ratio = baseline / ours, so larger is better.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks.search import THREADS, faiss_all_images, timed, unit
from patchify.compress import PQIndex, memory
from patchify.indexfiles import save_index
from patchify.ivf import IVFPQIndex
from patchify.refine import rescore
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


BEST, BOUNDED_QUERIES = 100, 512  # images per query of the bounded search
PEAK = """
import ctypes, json, re, sys
from pathlib import Path
import faiss, numpy as np, torch
from benchmarks.compress import BEST, grouped
from patchify.indexfiles import open_index
who, index, queries = sys.argv[1], open_index(sys.argv[2]), np.load(sys.argv[3])
torch.set_num_threads(2)
faiss.omp_set_num_threads(2)
index.make_writable()  # all lists in memory
index.search(queries[:2], 1)
def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again
before = status("VmRSS")
index.search(queries, BEST) if who == "ours" else grouped(index, queries)
print(json.dumps(status("VmHWM") - before))
"""


def in_process(script: str, *arguments: str) -> float:
    "The number that a script prints, run in a process of its own: waiting policies and peak memory are per process."
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"OMP_NUM_THREADS": str(THREADS)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def grouped(index: IVFPQIndex, queries: np.ndarray) -> list[list[int]]:
    "The best images of each query by FAISS alone: as many patches as BEST images have, then the first of each image."
    index.core.nprobe = index.n_probe
    _, found = index.core.search(queries, BEST * index.n_patches)
    return [list(dict.fromkeys(row))[:BEST] for row in (found // index.n_patches).tolist()]


def bounded_index(images: int = 60_000, patches: int = 30, dim: int = 64) -> tuple[IVFPQIndex, np.ndarray]:
    "16 of 1,024 lists over 60,000 images x 30 x 64-d, and 512 queries."
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((500, dim), dtype=np.float32)
    blocks = []
    for _ in range(0, images, 5000):
        of_image = centres[rng.integers(0, 500, 5000)] + rng.standard_normal((5000, dim), dtype=np.float32)
        blocks.append(unit(of_image[:, None] + rng.standard_normal((5000, patches, dim), dtype=np.float32)))
    chosen = np.concatenate([block[:50, 7] for block in blocks])[:BOUNDED_QUERIES]
    queries = unit(chosen + 0.3 * rng.normal(size=chosen.shape) / dim**0.5)
    index = IVFPQIndex(16, n_lists=1024, n_probe=16, n_iter=3, points_per_centroid=40)
    return index.train(blocks).add(blocks), queries


def bounded() -> tuple[dict, dict]:
    "Seconds, and peak bytes beyond the index, of the 100 best images by our search and by FAISS with grouping."
    index, queries = bounded_index()
    ours, theirs = index.search(queries, BEST).ranks, grouped(index, queries)
    same = np.mean([ours[i, :10].tolist() == theirs[i][:10] for i in range(len(queries))])
    assert same > 0.99, f"only {same:.1%} of the queries have the same ten best images"
    seconds = timed({"ours": lambda: index.search(queries, BEST), "faiss": lambda: grouped(index, queries),
                     "scan": lambda: index.core.search(queries, 1)}, repeats=5)
    with tempfile.TemporaryDirectory() as folder:
        save_index(index, Path(folder) / "bounded.index")
        np.save(Path(folder) / "queries.npy", queries)
        files = (Path(folder) / "bounded.index", Path(folder) / "queries.npy")
        peak = {who: in_process(PEAK, who, *files) for who in ("ours", "faiss")}
    return seconds, peak


def rows() -> list[dict]:
    "One dict per comparison."
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(50, DIM))[rng.integers(0, 50, IMAGES)] + rng.normal(size=(IMAGES, DIM))
    gallery = unit(image[:, None] + rng.normal(size=(IMAGES, PATCHES, DIM)))
    chosen = gallery[rng.choice(IMAGES, QUERIES), rng.integers(0, PATCHES, QUERIES)]
    queries = unit(chosen + 0.5 * rng.normal(size=(QUERIES, DIM)) / DIM**0.5)
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

    for index in (pq, ivf):
        ours, theirs = index.search(queries), with_faiss(index, 256 if index is ivf else None)
        assert (ours.ranks[:, 0] == theirs[:, 0]).mean() > 0.99
    t = timed({"exact": lambda: exact.search(queries),
               "pq": lambda: pq.search(queries), "pq faiss": lambda: with_faiss(pq),
               "ivf": lambda: ivf.search(queries), "ivf faiss": lambda: with_faiss(ivf, 256),
               "few": lambda: few.search(queries), "few faiss": patches_then_group,
               "rescore": lambda: rescore(few.search(queries, 100), queries, gallery)}, repeats=3)
    train = {who: in_process(TRAINING, who) for who in ("ours", "factory")}
    seconds, peak = bounded()

    def row(benchmark, ours, baseline, target=None):
        return dict(benchmark=benchmark, ours=ours, baseline=baseline, ratio=baseline / ours, target=target)

    size = memory(ivf)
    return [
        row("training PQ, against FAISS's factory [s]", train["ours"], train["factory"], ">= 2"),
        row("PQ, all images ranked, against FAISS with k = all [s]", t["pq"], t["pq faiss"], ">= 5"),
        row("IVF-PQ, all lists, all images ranked, against FAISS with k = all [s]", t["ivf"], t["ivf faiss"], ">= 5"),
        row("IVF-PQ, 8 of 256 lists, all images, against FAISS's 3,000 best patches ungrouped [s]",
            t["few"], t["few faiss"]),
        row("IVF-PQ, 16 of 1,024 lists, 100 best of 60,000 images, against FAISS with grouping [s]",
            seconds["ours"], seconds["faiss"], ">= 2"),
        row("IVF-PQ, 16 of 1,024 lists, 100 best of 60,000 images, against FAISS's bare scan [s]",
            seconds["ours"], seconds["scan"]),
        row("IVF-PQ, the same, peak memory beyond the index, against FAISS with grouping [bytes]",
            peak["ours"], peak["faiss"]),
        row("IVF-PQ, 8 of 256 lists, 100 best images rescored, against exact search [s]", t["rescore"], t["exact"]),
        row("PQ against exact search, all images ranked [s]", t["pq"], t["exact"], ">= 0.5"),
        row("IVF-PQ index against float32 descriptors [bytes]", size.total, size.exact, ">= 10"),
    ]


if __name__ == "__main__":
    for found in rows():
        print(found)
