"""LanceDB's multi-vector column and FAISS with grouping, as a user without this package would search by the best patch of an image.

Needs lancedb (pip install lancedb); without it the rows of LanceDB say so. Times are seconds, the median of alternating repeats in
one run, the 100 best images of one query at a time. ratio = baseline / ours, so larger is better; of a recall it is ours / baseline.
"""
import importlib.util
import tempfile
import time

import faiss
import numpy as np
import torch

from benchmarks.scale import DIM, PATCHES, SHARD, faiss_search, make_queries, make_shard
from benchmarks.search import THREADS, timed
from patchify.compress import recall
from patchify.flat import FlatIndex
from patchify.ivf import IVFPQIndex
from patchify.refine import rescore
from patchify.search import ExactIndex, SearchResult

IMAGES, BEST, QUERIES = 5_000, 100, 32
LISTS, PROBES, SUBVECTORS = 512, 32, 32  # 32 bytes per patch


def lance_table(folder: str, gallery: np.ndarray):
    "A table of images with a column of many vectors each."
    import lancedb
    import pyarrow as pa

    n, n_patches, dim = gallery.shape
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(gallery.ravel()), dim)
    column = pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * n_patches), vectors)
    return lancedb.connect(folder).create_table("gallery", pa.table({"image": np.arange(n), "vector": column}))


def lance_search(table, queries: np.ndarray, probes: int = 0) -> SearchResult:
    "The best images of each query, with the index or (no probes) without it."
    images = np.full((len(queries), BEST), -1)
    for query, row in zip(queries, images):
        request = table.search(query, vector_column_name="vector").distance_type("cosine").limit(BEST).select(["image", "_distance"])
        request = request.nprobes(probes) if probes else request.bypass_vector_index()
        found = request.to_arrow()["image"].to_numpy()
        row[:len(found)] = found
    return SearchResult(np.zeros(images.shape, np.float32), images, np.zeros_like(images))


def one_by_one(search, queries: np.ndarray) -> None:
    "Search with every query of its own."
    for query in queries:
        search(query[None])


def row(benchmark: str, ours: float, baseline: float, target: str | None = None, higher: bool = False) -> dict:
    "One comparison."
    ratio = ours / baseline if higher else baseline / ours
    return dict(benchmark=benchmark, ours=ours, baseline=baseline, ratio=ratio, target=target)


def lance_rows(gallery: np.ndarray, queries: np.ndarray, exact: ExactIndex, index: IVFPQIndex, built: float) -> list[dict]:
    "Rows against LanceDB."
    truth = exact.search(queries, BEST)
    with tempfile.TemporaryDirectory() as folder:
        table = lance_table(folder, gallery)
        flat = lance_search(table, queries)
        assert recall(flat, truth, 10).mean() > 0.99, "LanceDB's exact search ranks images by their best patch too"
        start = time.perf_counter()
        table.create_index(metric="cosine", vector_column_name="vector", index_type="IVF_PQ", num_partitions=LISTS,
                           num_sub_vectors=SUBVECTORS)
        lance_built = time.perf_counter() - start
        t = timed({"exact": lambda: one_by_one(lambda q: exact.search(q, BEST), queries),
                   "flat": lambda: lance_search(table, queries),
                   "ours": lambda: one_by_one(lambda q: index.search(q, BEST), queries),
                   "lance": lambda: lance_search(table, queries, PROBES)})
        theirs = recall(lance_search(table, queries, PROBES), truth, 10).mean()
    found = index.search(queries, BEST)
    again = rescore(found, queries, gallery, n=BEST)
    n = len(queries)
    return [
        row("exact search, one query, against LanceDB's multi-vector column without index [s]", t["exact"] / n, t["flat"] / n),
        row("IVF-PQ, 32 of 512 lists, one query, against LanceDB's IVF-PQ [s]", t["ours"] / n, t["lance"] / n),
        row("IVF-PQ trained and filled, against LanceDB's [s]", built, lance_built),
        row("IVF-PQ, recall@10, against LanceDB's [share]", recall(found, truth, 10).mean(), theirs, higher=True),
        row("IVF-PQ, 100 images rescored, recall@10, against LanceDB's [share]", recall(again, truth, 10).mean(), theirs,
            ">= 1", higher=True),
    ]


def rows() -> list[dict]:
    "One dict per comparison."
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    gallery = np.concatenate([make_shard(i) for i in range(IMAGES // SHARD)])
    queries = make_queries()[:QUERIES]
    exact = ExactIndex(gallery, device="cpu")
    flat = FlatIndex(gallery)
    start = time.perf_counter()
    index = IVFPQIndex(SUBVECTORS, n_lists=LISTS, n_probe=PROBES).train(gallery).add(gallery)
    built = time.perf_counter() - start
    t = timed({"exact": lambda: one_by_one(lambda q: exact.search(q, BEST), queries),
               "flat": lambda: one_by_one(lambda q: flat.search(q, BEST), queries),
               "faiss": lambda: one_by_one(lambda q: faiss_search(flat.index, q), queries)})
    n = len(queries)
    found = [
        row("exact search, one query, against FAISS flat with grouping [s]", t["exact"] / n, t["faiss"] / n),
        row("FlatIndex, one query, against FAISS flat with grouping [s]", t["flat"] / n, t["faiss"] / n),
    ]
    if importlib.util.find_spec("lancedb") is None:
        return [*found, dict(benchmark="LanceDB's multi-vector column: not measured, pip install lancedb", ours=None, baseline=None,
                             ratio=None, target=None)]
    return found + lance_rows(gallery, queries, exact, index, built)


if __name__ == "__main__":
    for found in rows():
        print(found)
