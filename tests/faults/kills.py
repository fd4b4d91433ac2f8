"""`make faults`: kill extraction, index construction, rendering and training at random moments, and compare bytes.

Each job runs in a process of its own that is killed after a random part of its time and started again. When it ends by
itself, its files must be those of an undisturbed run, to the byte, and the next run starts from nothing.

    python tests/faults/kills.py [--kills 200] [--seed 0]
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes are forks, which threads would not survive
os.environ.setdefault("TQDM_DISABLE", "1")

import faiss
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from campaign import contents
from patchify.boxes import Regions
from patchify.compress import PQIndex
from patchify.encoder import load_encoder
from patchify.extraction import extract
from patchify.folder_index import index_folder
from patchify.indexfiles import load_or_build_index
from patchify.learn import TrainingPlan, train
from patchify.synthetic.mini import make_mini

torch.set_num_threads(1)
faiss.omp_set_num_threads(1)


def extraction(out: Path, photos: Path, encoder) -> None:
    "A store of several shards."
    extract(sorted(photos.glob("*.png")), encoder, Regions(level=1), out / "store", shard_size=3, batch=10)


def construction(out: Path, photos: Path, encoder) -> None:
    "The index of a folder, and a compressed index over its descriptors."
    found = index_folder(photos, out / "index", encoder, Regions(level=1))
    blocks = found.blocks()
    load_or_build_index(PQIndex(n_subvectors=8, n_bits=4), blocks, None, None, out / "compressed", "photos")


def rendering(out: Path, photos: Path, encoder) -> None:
    "A small benchmark."
    if not (out / "made").exists():
        make_mini(out / "made", instances=1, size="tiny", workers=1)


def training(out: Path, photos: Path, encoder) -> None:
    "A small network with checkpoints."
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))

    def loss(draw, rng):
        time.sleep(0.002)
        inputs = torch.from_numpy(rng.standard_normal((32, 64), dtype=np.float32))
        return network(inputs).square().mean()

    train(network, loss, TrainingPlan(120, 1e-2, ema=0.9), out / "run.safetensors", save_every=7)


JOBS = {job.__name__: job for job in (extraction, construction, rendering, training)}


def start(job, out: Path, photos: Path, encoder) -> int:
    "Run a job in a new process; its number."
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = open(os.devnull, "w")
        job(out, photos, encoder)
        code = 0
    finally:
        os._exit(code)


def undisturbed(job, out: Path, photos: Path, encoder) -> tuple[dict, float]:
    "The files of a run without kills, and its seconds."
    out.mkdir()
    began = time.perf_counter()
    status = os.waitpid(start(job, out, photos, encoder), 0)[1]
    assert status == 0, f"{job.__name__} does not run"
    return contents(out), time.perf_counter() - began


def killed(job, kills: int, folder: Path, photos: Path, encoder, dice: random.Random) -> int:
    "Kill a job so many times; the number of runs that ended by themselves, all of them compared."
    expected, seconds = undisturbed(job, folder / f"{job.__name__}-whole", photos, encoder)
    out = folder / job.__name__
    done = 0
    ended = 0
    while done < kills or not ended:
        out.mkdir(exist_ok=True)
        child = start(job, out, photos, encoder)
        if done < kills:
            time.sleep(dice.uniform(0, 0.6) * seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == signal.SIGKILL:
            done += 1
            continue
        assert status == 0, f"{job.__name__} ended with status {status} after {done} kills"
        found = contents(out)
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not different, f"{job.__name__}: {different} differ after {done} kills"
        ended += 1
        shutil.rmtree(out)
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    encoder = load_encoder("mini", device="cpu", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        photos.mkdir()
        rng = np.random.default_rng(0)
        for number in range(12):
            pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64, 48)).save(photos / f"{number:02d}.png")
        parts = []
        for place, (name, job) in enumerate(JOBS.items()):
            kills = (options.kills + place) // len(JOBS)
            ended = killed(job, kills, Path(scratch), photos, encoder, dice)
            parts.append(f"{name} {kills}")
            print(f"{name}: {kills} kills, {ended} runs completed, all equal to the undisturbed one", flush=True)
    print(f"kills: {options.kills}, 0 failed ({', '.join(parts)})")


if __name__ == "__main__":
    main()
