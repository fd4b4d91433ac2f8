"""Everything that needs a GPU, checked and timed in one call: python -m benchmarks.gpu [OUT.json]

Each check draws its input from a seed and fails when a result is wrong; nothing else in the project needs a GPU to build or to pass its tests.
"""
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from patchify.boxes import pyramid_boxes
from patchify.ivf import IVFPQIndex
from patchify.encoder import load_encoder
from patchify.pyramid import cut_patches, cut_with_pil
from patchify.pages.page import hardware
from patchify.search import ExactIndex


def seconds(work, repeats: int = 10) -> float:
    "Median seconds of a call, after a warm-up, the device waited for."
    times = []
    for turn in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if turn > 1:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def pyramid(rng: np.random.Generator) -> dict:
    "All 30 patches by matrix products on the GPU, within 1/255 of PIL."
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((1024, 768), Image.Resampling.BICUBIC)
    boxes = pyramid_boxes(1024, 768, 3)
    worst = (cut_patches(image, boxes, 384, "cuda").cpu().int() - cut_with_pil(image, boxes, 384).int()).abs().max().item()
    assert worst <= 1, f"patches differ by {worst}/255"
    return {"largest difference, of 255": worst, "milliseconds per image": 1000 * seconds(lambda: cut_patches(image, boxes, 384, "cuda"))}


def encoders(rng: np.random.Generator) -> dict:
    "Descriptors of the GPU against float32 on the CPU, and their rate."
    found = {}
    for name, random in (("mini", False), ("siglip", True)):
        fast, exact = load_encoder(name, random_weights=random, device="cuda"), load_encoder(name, random_weights=random, device="cpu", dtype=torch.float32)
        images = torch.from_numpy(rng.integers(0, 256, (60, 3, fast.size, fast.size), dtype=np.uint8))
        cosine = (fast(images[:4]).cpu() * exact(images[:4])).sum(1).min().item()
        assert cosine > 0.99, f"{name}: cosine {cosine}"
        ready = images.cuda()
        found[name] = {"smallest cosine with float32": cosine, "patches per second": 60 / seconds(lambda: fast(ready))}
    return found


def search(rng: np.random.Generator) -> dict:
    "Exact search of 5,000 x 30 x 768 with 1,232 queries: the scores of the CPU, and every query finds its own image."
    gallery = rng.standard_normal((5000, 30, 768), dtype=np.float32)
    gallery /= np.linalg.norm(gallery, axis=-1, keepdims=True)
    chosen = rng.choice(5000, 1232, replace=False)
    queries = gallery[chosen, 0]
    gpu, cpu = ExactIndex(gallery, device="cuda"), ExactIndex(gallery, device="cpu")
    worst = abs(gpu.search(queries[:50]).scores - cpu.search(queries[:50]).scores).max()
    assert worst < 1e-3, f"scores differ by {worst}"
    assert (gpu.search(queries, 1).ranks[:, 0] == chosen).all(), "a query does not find its own image"
    return {"largest score difference": float(worst), "seconds": seconds(lambda: gpu.search(queries), 3)}


def compress(rng: np.random.Generator) -> dict:
    "IVF-PQ, its lists trained by FAISS on the GPU: the same codes score alike on both devices, and nearly every image finds itself."
    gallery = rng.standard_normal((2000, 14, 256), dtype=np.float32)
    gallery /= np.linalg.norm(gallery, axis=-1, keepdims=True)
    start = time.perf_counter()
    index = IVFPQIndex(n_subvectors=64, n_lists=256).train(gallery).add(gallery)
    trained = time.perf_counter() - start
    queries, scores = gallery[:100, 0], {}
    for index.device in (torch.device("cpu"), torch.device("cuda")):
        found = index.search(queries)
        scores[index.device.type] = found.scores
    worst = abs(scores["cuda"] - scores["cpu"]).max()
    assert worst < 1e-3, f"scores differ by {worst}"
    first = (found.ranks[:, 0] == np.arange(100)).mean()
    assert first > 0.95, f"only {first:.0%} of the images find themselves"
    return {"largest score difference": float(worst), "seconds to train and fill": trained, "images that find themselves": float(first)}


def main(out: Path) -> None:
    "Run every check and write the figures with the hardware's name."
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device; everything else in this project runs without one")
    rng = np.random.default_rng(0)
    found = {"hardware": hardware(), "torch": torch.__version__} | {check.__name__: check(rng) for check in (pyramid, encoders, search, compress)}
    out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("gpu.json")))
