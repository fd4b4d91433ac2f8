"""Extraction on a Ray cluster of four local nodes: overhead over a single process, and the gain of sixteen workers.

The encoder only sleeps, so that sixteen workers do not need sixteen cores. Seconds are counted from the first forward pass to the last, so
loading a worker is not part of them. Overhead: ratio = cluster / single process. Gain: ratio = images per second of sixteen workers / of one.
"""
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from patchify.boxes import Regions
from patchify.extraction import extract


def loader(log, seconds, workers=1):
    "What loads an encoder that sleeps; all workers wait for each other before they start."
    def load():
        class Sleeping:
            name = "sleeping"
            fingerprint = "0"
            size = 8
            dim = 16
            dtype = torch.float32
            device = "cpu"
            aspect = "stretch"
            padding = None

            def __call__(self, images):
                start = time.time()
                time.sleep(seconds)
                with open(log, "a") as file:
                    file.write(f"{start} {time.time()}\n")
                return torch.full((len(images), 16), 0.25)

        Path(f"{log}.{os.getpid()}").touch()
        while len(list(Path(log).parent.glob(f"{Path(log).name}.*"))) < workers:
            time.sleep(0.02)
        return Sleeping()
    return load


def duration(log):
    "Seconds from the first forward pass to the last."
    times = np.loadtxt(log, ndmin=2)
    return times[:, 1].max() - times[:, 0].min()


def photographs(folder, count):
    "Small pictures."
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:04d}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return paths


def rows(seconds=1.0, shards=64):
    "Two rows; none where Ray is not installed."
    try:
        import ray
    except ImportError:
        return []
    from patchify.cluster import Workers, extract_on_cluster, local_cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    settings = {"regions": Regions(level=0), "shard_size": 4, "batch": 4}  # one forward pass per shard
    cluster = local_cluster(4, cpus=4)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paths = photographs(folder, 4 * shards)
            few = paths[:4 * 12]
            extract(few, loader(folder / "single", seconds)(), out=folder / "a", **settings)
            extract_on_cluster(few, loader(folder / "one", seconds), out=folder / "b", workers=Workers(1), **settings)
            many = loader(folder / "many", seconds, 16)
            extract_on_cluster(paths, many, out=folder / "c", workers=Workers(16), **settings)
            times = {log: duration(folder / log) for log in ("single", "one", "many")}
    finally:
        ray.shutdown()
        cluster.shutdown()
    one = len(few) / times["one"]
    sixteen = len(paths) / times["many"]
    load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    return [
        dict(benchmark=f"12 shards by one Ray worker, against a single process, {load} [s]", ours=times["one"],
             baseline=times["single"], ratio=times["one"] / times["single"], target="<= 1.1"),
        dict(benchmark=f"16 Ray workers against one, an encoder that sleeps, {load} [images per second]", ours=sixteen,
             baseline=one, ratio=sixteen / one, target=">= 14"),
    ]


if __name__ == "__main__":
    for row in rows():
        print(row)
