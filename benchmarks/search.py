"""Exact search: all images ranked, against FAISS with k = all and against the bare matrix product of the same size.

Times are seconds, the median of alternating repeats in one run. ratio = baseline / ours, so larger is better.
"""
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch

from patchify.flat import FlatIndex
from patchify.search import ExactIndex, block_images, patch_scores

THREADS = 2
IMAGES, PATCHES, DIM, QUERIES = 4000, 30, 768, 400


def unit(x: np.ndarray) -> np.ndarray:
    "Unit rows, float32."
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def timed(calls: dict[str, Callable], repeats: int = 3) -> dict[str, float]:
    "Median seconds of each call after a warm-up; the calls take turns, so that a busy moment hits all alike."
    seconds = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def faiss_all_images(index: faiss.Index, queries: np.ndarray, patches: int) -> np.ndarray:
    "Rank every image with FAISS: all patches, best first, then images in the order of their first patch."
    _, rows = index.search(queries, index.ntotal)
    by_image = np.argsort(rows // patches, axis=1, kind="stable")  # the places of each image's patches, rising
    return np.argsort(by_image[:, ::patches], axis=1)


def rows() -> list[dict]:
    "One dict per comparison."
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    rng = np.random.default_rng(0)
    gallery = unit(rng.normal(size=(IMAGES, PATCHES, DIM)))
    chosen = gallery[rng.choice(IMAGES, QUERIES, replace=False), 0]
    queries = unit(chosen + 0.3 * rng.normal(size=(QUERIES, DIM)) / DIM**0.5)
    ours = ExactIndex(gallery, device="cpu")
    half = ExactIndex(gallery.astype(np.float16), device="cpu")
    folder = tempfile.TemporaryDirectory()
    np.save(Path(folder.name) / "gallery.npy", gallery)
    mapped = ExactIndex(np.load(Path(folder.name) / "gallery.npy", mmap_mode="r"), device="cpu")
    images = FlatIndex(gallery)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(gallery.reshape(-1, DIM))
    stack = torch.from_numpy(gallery)
    wanted = torch.from_numpy(queries)
    step = block_images(QUERIES, PATCHES, DIM, torch.device("cpu"))
    assert np.array_equal(ours.search(queries).ranks[:, :20], faiss_all_images(flat, queries, PATCHES)[:, :20])

    assert np.array_equal(ours.search(queries, 20).ranks, images.search(queries, 20).ranks)

    def product():
        for start in range(0, IMAGES, step):
            patch_scores(stack[start:start + step], wanted)

    t = timed({"all": lambda: ours.search(queries), "top": lambda: ours.search(queries, 100),
               "half": lambda: half.search(queries),
               "mapped": lambda: mapped.search(queries), "flat": lambda: images.search(queries, 100),
               "faiss": lambda: faiss_all_images(flat, queries, PATCHES), "blocked": product,
               "torch": lambda: stack.view(-1, DIM) @ wanted.T,
               "one": lambda: ours.search(queries[:1], 100), "one product": lambda: wanted[:1] @ stack.view(-1, DIM).T})

    folder.cleanup()

    def row(benchmark, ours, baseline, target=None):
        return dict(benchmark=benchmark, ours=ours, baseline=baseline, ratio=baseline / ours, target=target)

    return [
        row("all images ranked, against FAISS flat with k = all [s]", t["all"], t["faiss"], ">= 10"),
        row("all images ranked, against the bare products of its blocks [s]", t["all"], t["blocked"], ">= 0.77"),
        row("all images ranked, against torch's matrix product in one piece [s]", t["all"], t["torch"], ">= 0.77"),
        row("100 best images, against the bare products of its blocks [s]", t["top"], t["blocked"], ">= 0.77"),
        row("100 best images, against FlatIndex (FAISS's exact search until 100 images appeared) [s]",
            t["top"], t["flat"]),
        row("all images ranked from a memory map, against the bare products of its blocks [s]",
            t["mapped"], t["blocked"], ">= 0.77"),
        row("one query, against its bare product [s]", t["one"], t["one product"]),
        row("all images ranked from float16, against from float32 [s]", t["half"], t["all"]),
    ]


if __name__ == "__main__":
    for found in rows():
        print(found)
