"""Time, memory and recall from 1,000 to 1,000,000 images, written to benchmarks/scale.csv: python -m benchmarks.scale --images 1e6

Every method is measured in a process of its own. What the csv holds already is not measured again, so an interrupted
run continues. The gallery is synthetic: images share themes, patches scatter around their image, and the spectrum of the
descriptors decays. A million images take 18 GB of disk below --folder, removed at the end. The scale page draws the csv.
"""
import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import torch

from patchify.compress import PQIndex, recall
from patchify.indexfiles import open_index, save_index
from patchify.ivf import IVFPQIndex
from patchify.pages.page import hardware
from patchify.refine import rescore
from patchify.search import ExactIndex, GalleryBlocks, SearchResult

FILE = Path(__file__).with_name("scale.csv")
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
SHARD, PATCHES, DIM = 1_000, 30, 256  # images per file, descriptors per image, dimensions
THREADS, QUERIES, K = 2, 64, 100
SUBVECTORS, MOST_LISTS = 32, 4_096
TRAINING = dict(n_iter=10, points_per_centroid=64)
PROBES = (8, 32, 128)
FLAT_IMAGES = 100_000  # FAISS's flat index holds float32 in memory, so larger galleries are left out
COLUMNS = ["images", "step", "method", "lists", "probes", "rescored", "seconds", "seconds_one", "peak_mb", "private_mb",
           "bytes", "recall_at_10", "queries", "hardware"]


def lists_of(images: int) -> int:
    "Inverted lists of a gallery: a power of two that grows with the root of the number of descriptors."
    return min(MOST_LISTS, 2 ** int(np.log2(2 * (images * PATCHES) ** 0.5)))


def make_shard(number: int) -> np.ndarray:  # (SHARD, P, D) float32, unit rows
    "Images SHARD * number to SHARD * (number + 1) - 1, the same whatever the gallery around them."
    shared = np.random.default_rng([0, DIM])
    spectrum = shared.permutation((1 + np.arange(DIM, dtype=np.float32) / 8) ** -0.5)
    themes = shared.standard_normal((2000, DIM), np.float32)
    rng = np.random.default_rng([0, DIM, number])
    of_image = themes[rng.integers(0, len(themes), SHARD)] + 0.8 * rng.standard_normal((SHARD, DIM), np.float32)
    x = rng.standard_normal((SHARD, PATCHES, DIM), np.float32)
    x += of_image[:, None]
    x *= spectrum
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    return x


def write_gallery(folder: Path, images: int) -> None:
    "Write the shards that are missing, float16, several at a time."
    folder.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> None:
        path = folder / f"{number:05d}.npy"
        if not path.exists():
            partial = path.with_suffix(".part")
            with open(partial, "wb") as file:
                np.save(file, make_shard(number).astype(np.float16))
            partial.rename(path)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, range(images // SHARD)))


def read_gallery(folder: Path, images: int) -> GalleryBlocks:
    "The shards, opened when they are read."
    shapes = [(SHARD, PATCHES, DIM)] * (images // SHARD)
    return GalleryBlocks(shapes, lambda i: np.load(folder / f"{i:05d}.npy", mmap_mode="r"))


def make_queries() -> np.ndarray:  # (QUERIES, D) unit rows
    "Patches of the first thousand images, with noise."
    gallery = make_shard(0)
    rng = np.random.default_rng(1)
    chosen = gallery[rng.choice(SHARD, QUERIES, replace=False), rng.integers(0, PATCHES, QUERIES)]
    x = chosen + 0.5 * rng.standard_normal(chosen.shape, np.float32) / DIM**0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def status(name: str) -> float:  # MB
    "An entry of this process's status (Linux)."
    return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


class PeakMemory:
    """The largest resident memory within a block, in MB: `peak` by the kernel, with libraries and with mapped files
    that the system may drop at any time; `private` without both, sampled."""

    libraries = 0.0  # private memory after the imports

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts again
        self.private = 0.0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while True:
            self.private = max(self.private, status("RssAnon") - self.libraries)
            if self._ends.wait(0.01):
                break

    def __exit__(self, *_):
        self._ends.set()
        self._thread.join()
        self.peak = status("VmHWM")


def timed(call, budget: float = 2.0) -> tuple[float, object]:
    "Median seconds of up to five calls, fewer when they take long, and the last result."
    seconds = []
    while len(seconds) < 5 and sum(seconds) < budget:
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), result


def group(found: np.ndarray) -> np.ndarray:  # (Q, K)
    "The first K images of lists of patches (Q, m), -1 where there are fewer."
    images = np.full((len(found), K), -1)
    for query, row in enumerate((found // PATCHES).tolist()):
        distinct = [image for image in dict.fromkeys(row) if image >= 0][:K]
        images[query, :len(distinct)] = distinct
    return images


def faiss_search(core: faiss.Index, queries: np.ndarray) -> SearchResult:
    "FAISS alone: as many patches as K images have, grouped by image."
    scores, found = core.search(queries, K * PATCHES)
    images = group(found)
    return SearchResult(np.zeros(images.shape, np.float32), images, np.zeros_like(images))


def build(folder: Path, images: int, method: str) -> list[dict]:
    "Train and fill an index."
    gallery = read_gallery(folder / "gallery", images)
    n_lists = lists_of(images) if method == "ivfpq" else 0
    index = IVFPQIndex(SUBVECTORS, n_lists=n_lists, **TRAINING) if n_lists else PQIndex(SUBVECTORS, **TRAINING)
    rows = []
    for step, call in (("train", lambda: index.train(gallery)), ("add", lambda: index.add(gallery))):
        with PeakMemory() as memory:
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        rows.append(dict(step=step, method=method, lists=n_lists, seconds=seconds, peak_mb=memory.peak,
                         private_mb=memory.private))
    path = folder / f"{method}-{images}.index"
    save_index(index, path)
    rows[-1]["bytes"] = path.stat().st_size
    return rows


def searches(folder: Path, images: int, method: str) -> dict:
    "Settings of a method and the function that searches: name -> (columns, call)."
    gallery = read_gallery(folder / "gallery", images)
    if method == "exact":
        index = ExactIndex(gallery, device="cpu")
        return {"exact": (dict(bytes=2 * images * PATCHES * DIM), lambda q: index.search(q, K))}
    if method == "faiss flat":
        index = faiss.IndexFlatIP(DIM)
        for block in gallery:
            index.add(block.reshape(-1, DIM).astype(np.float32))
        return {"flat": (dict(bytes=4 * images * PATCHES * DIM), lambda q: faiss_search(index, q))}
    name = "pq" if method == "pq" else "ivfpq"
    path = folder / f"{name}-{images}.index"
    index = open_index(path)
    size = dict(bytes=path.stat().st_size, lists=getattr(index, "n_lists", 0))
    if method == "pq":
        return {"pq": (size, lambda q: index.search(q, K))}

    def search(queries: np.ndarray, probes: int, rescored: int) -> SearchResult:
        index.n_probe = probes
        if method == "faiss ivfpq":
            index.core.nprobe = probes
            return faiss_search(index.core, queries)
        found = index.search(queries, K)
        return rescore(found, queries, gallery, n=rescored) if rescored else found

    probes = [n for n in PROBES if n <= index.n_lists]
    settings = [(n, 0) for n in probes] + ([(n, K) for n in probes] if method == "ivfpq" else [])
    return {f"{n} {again}": (dict(size, probes=n, rescored=again), lambda q, n=n, again=again: search(q, n, again))
            for n, again in settings}


def search(folder: Path, images: int, method: str) -> list[dict]:
    "Search with every setting of a method."
    queries = make_queries()
    rows = []
    for columns, call in searches(folder, images, method).values():
        call(queries[:2])  # opens files
        with PeakMemory() as memory:
            some = range(1 if method in ("exact", "pq") else 8)
            one = [timed(lambda i=i: call(queries[i:i + 1]), 1.0)[0] for i in some]
            seconds, found = timed(lambda: call(queries))
        if method == "exact":
            np.save(folder / f"exact-{images}.npy", found.ranks)
        exact = np.load(folder / f"exact-{images}.npy")
        truth = SearchResult(np.zeros(exact.shape, np.float32), exact, exact)
        rows.append(dict(step="search", method=method, **columns, seconds=seconds, seconds_one=float(np.median(one)),
                         peak_mb=memory.peak, private_mb=memory.private, queries=len(queries),
                         recall_at_10=100 * recall(found, truth, 10).mean()))
    return rows


def work(folder: Path, images: int, step: str, method: str) -> list[dict]:
    "One measurement, in this process."
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    PeakMemory.libraries = status("RssAnon")
    if step == "write":
        start = time.perf_counter()
        write_gallery(folder / "gallery", images)
        seconds = time.perf_counter() - start
        return [dict(step="write", method="gallery", seconds=seconds, bytes=2 * images * PATCHES * DIM)]
    return (build if step == "add" else search)(folder, images, method)


def in_process(folder: Path, images: int, step: str, method: str) -> list[dict]:
    "One measurement in a process of its own: peak memory and warm caches of one do not reach the next."
    command = [sys.executable, "-m", "benchmarks.scale", "--folder", str(folder), "--work", str(images), step, method]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True,
                          cwd=Path(__file__).parent.parent)
    found = json.loads(done.stdout.splitlines()[-1])
    return [{"images": images, "hardware": hardware(), **row} for row in found]


def read_rows(path: Path) -> list[dict]:
    "The rows of a csv, as text; none where there is no file."
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    "Write all rows, three digits of what was measured."
    partial = path.with_suffix(".part")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})
    partial.replace(path)


def steps_of(images: int) -> list[tuple[str, str]]:
    "Step and method of every process that measures one size."
    steps = [("write", "gallery"), ("search", "exact"), ("add", "pq"), ("search", "pq"), ("add", "ivfpq"),
             ("search", "ivfpq"), ("search", "faiss ivfpq")]
    return steps + ([("search", "faiss flat")] if images <= FLAT_IMAGES else [])


def measure(images: int, folder: Path, out: Path) -> None:
    "Measure one size, as far as the csv does not hold it yet."
    rows = read_rows(out)
    done = {(row["step"], row["method"]) for row in rows if int(row["images"]) == images}
    if done >= set(steps_of(images)):
        return
    for step, method in steps_of(images):
        output = {"exact": f"exact-{images}.npy"}.get(method) if step == "search" else f"{method}-{images}.index"
        made = step == "write" or output is None or (folder / output).exists()
        if (step, method) in done and made and step != "write":
            continue
        found = in_process(folder, images, step, method)
        if (step, method) not in done:
            rows += found
            write_rows(out, rows)
        for row in found:
            names = ("probes", "rescored", "seconds", "seconds_one", "private_mb", "recall_at_10")
            facts = [f"{name} {row[name]:,.4g}" for name in names if name in row]
            print(f"{images:>9,}  {row['step']:6} {row['method']:12} " + "  ".join(facts), flush=True)
    for path in folder.glob(f"*-{images}.*"):
        path.unlink()


def main() -> None:
    "Measure all sizes up to one."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=float, default=10_000, help="largest gallery (default 10,000)")
    parser.add_argument("--folder", type=Path, default=Path("data/scale"), help="where descriptors are kept meanwhile")
    parser.add_argument("--out", type=Path, default=FILE, help="the csv")
    parser.add_argument("--keep", action="store_true", help="do not remove the folder at the end")
    parser.add_argument("--work", nargs=3, metavar=("IMAGES", "STEP", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.folder, int(options.work[0]), *options.work[1:])))
        return
    start = time.time()
    folder = options.folder.resolve()
    for images in SIZES:
        if images <= options.images:
            measure(images, folder, options.out)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{time.time() - start:,.0f} seconds")


if __name__ == "__main__":
    main()
