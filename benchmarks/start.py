"How long a command takes to start, against importing torch: whole processes, wall time and peak memory."
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-c", "import sys; from patchify.cli import main; sys.exit(main())"]
TORCH = [sys.executable, "-c", "import torch"]
IMAGES = 1000


def _run(words: list) -> tuple[float, float]:
    "Wall seconds and peak megabytes of one process."
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(map(str, words))} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def _median(words: list, repeats: int = 5) -> tuple[float, float]:
    "Median seconds and megabytes after one run that warms the disk cache."
    _run(words)
    runs = [_run(words) for _ in range(repeats)]
    return tuple(sorted(values)[repeats // 2] for values in zip(*runs))


def _index(folder: Path) -> Path:
    "An index of a thousand small images."
    from patchify.synthetic.mini import make_mini

    photos = folder / "photos"
    photos.mkdir()
    sources = sorted((make_mini(folder / "tiny", size="tiny") / "distractors").glob("*.jpg"))
    for number in range(IMAGES):
        shutil.copy(sources[number % len(sources)], photos / f"{number:04d}.jpg")
    _run([*COMMAND, "index", photos, "--out", folder / "index", "--level", 0])
    return folder / "index"


def rows() -> list[dict]:
    "One row for each command, with its time and with its memory."
    found = []
    torch_seconds, torch_memory = _median(TORCH)
    with tempfile.TemporaryDirectory() as scratch:
        index = _index(Path(scratch))
        image = next((Path(scratch) / "photos").glob("*.jpg"))
        commands = {"patchify --help": ["--help"], f"a search over {IMAGES:,} images": ["search", index, image]}
        for name, words in commands.items():
            seconds, memory = _median([*COMMAND, *words])
            for unit, ours, baseline in (("s", seconds, torch_seconds), ("MB", memory, torch_memory)):
                found.append({
                    "benchmark": f"{name}, against importing torch [{unit}]",
                    "ours": ours,
                    "baseline": baseline,
                    "ratio": ours / baseline,
                    "target": {"s": "<= 0.5", "MB": "<= 0.5"}[unit] if "help" in name else "",
                })
    return found
