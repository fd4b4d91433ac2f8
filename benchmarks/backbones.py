"Input size, dimension and speed of every backbone, with random weights: python -m benchmarks.backbones [NAME ...]"
import csv
import sys
import time
from pathlib import Path

import timm
import torch

from patchify.encoder import ALIASES, ILIAS_SIZES, load_encoder
from patchify.pages.page import hardware

FILE = Path(__file__).parent / "backbones.csv"
COLUMNS = ["backbone", "timm model", "licence", "input size", "dimension", "patches per second", "device", "hardware"]


def _speed(encoder, batch: int, repeats: int = 2) -> float:
    "Patches per second of a GPU, or of one core of the processor, whatever else it is doing."
    clock = time.perf_counter if encoder.device.type == "cuda" else time.process_time
    torch.set_num_threads(1)
    images = torch.zeros(batch, 3, encoder.size, encoder.size, dtype=torch.uint8)
    encoder(images)
    seconds = []
    for _ in range(repeats):
        started = clock()
        encoder(images).cpu()
        seconds.append(clock() - started)
    return batch / min(seconds)


def measure(name: str, size: int | None = None) -> dict:
    "One row of the table."
    encoder = load_encoder(name, random_weights=name != "mini", size=size)
    licence = encoder.licence
    if name in ALIASES:
        licence = timm.get_pretrained_cfg(ALIASES[name]).license
    gpu = encoder.device.type == "cuda"
    speed = _speed(encoder, 64 if gpu else 1)
    values = [name, ALIASES.get(name, name), licence, encoder.size, encoder.dim, f"{speed:.3g}"]
    device = torch.cuda.get_device_name() if gpu else "one core"
    return dict(zip(COLUMNS, [*values, f"{device}, {str(encoder.dtype)[6:]}", hardware()]))


def main(names: list[str]) -> None:
    "Measure backbones at their own size and at the one of ILIAS's protocol, and renew their rows in backbones.csv."
    rows = []
    if FILE.exists():
        with open(FILE, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["backbone"] not in names]
    for name in names:
        for size in dict.fromkeys((None, ILIAS_SIZES.get(name))):
            row = measure(name, size)
            print("  ".join(map(str, row.values())), flush=True)
            rows.append(row)
    with open(FILE, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:] or ["mini", *ALIASES])
