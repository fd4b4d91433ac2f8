"How long a command takes to start, against importing torch: whole processes, wall time and peak memory."
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = [sys.executable, "-m", "patchify"]
TORCH = [sys.executable, "-c", "import torch"]
IMAGES = 1000
SECONDS = 0.5  # for commands that only print
MEGABYTES = 100  # likewise
SEARCH_SECONDS = 3

# A process starts with the peak memory of the one that it was forked from, so a small one starts the commands.
_LAUNCHER = """
import os, subprocess, sys, time
started = time.perf_counter()
quiet = subprocess.DEVNULL
process = subprocess.Popen(sys.argv[2:], stdin=quiet, stdout=quiet, stderr=quiet)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
if os.waitstatus_to_exitcode(status) != int(sys.argv[1]):
    raise SystemExit(f"{sys.argv[2:]} ended with {os.waitstatus_to_exitcode(status)}")
print(seconds, usage.ru_maxrss / 1024)
"""


def _run(words: list, exit_code: int = 0) -> tuple[float, float]:
    "Wall seconds and peak megabytes of one process."
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, exit_code, *words]
    done = subprocess.run(list(map(str, launcher)), stdout=subprocess.PIPE, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


def _median(words: list, exit_code: int = 0, repeats: int = 5) -> tuple[float, float]:
    "Median seconds and megabytes after one run that warms the disk cache."
    _run(words, exit_code)
    runs = [_run(words, exit_code) for _ in range(repeats)]
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
    baseline = dict(zip(("s", "MB"), _median(TORCH)))

    def add(name: str, words: list, limits: dict, exit_code: int = 0) -> None:
        measured = dict(zip(("s", "MB"), _median([*COMMAND, *words], exit_code)))
        for unit, value in measured.items():
            limit = f", at most {limits[unit]} {unit}" if unit in limits else ""
            found.append({
                "benchmark": f"{name}{limit}, against importing torch [{unit}]",
                "ours": value,
                "baseline": baseline[unit],
                "ratio": value / baseline[unit],
                "target": f"<= {limits[unit] / baseline[unit]:.3g}" if unit in limits else "",
            })

    quick = {"s": SECONDS, "MB": MEGABYTES}
    add("patchify --help", ["--help"], quick)
    add("patchify --version", ["--version"], quick)
    add("an argument error", ["evaluate", "--levle", 3], quick, exit_code=2)
    with tempfile.TemporaryDirectory() as scratch:
        index = _index(Path(scratch))
        image = next((Path(scratch) / "photos").glob("*.jpg"))
        add(f"a search over {IMAGES:,} images", ["search", index, image], {"s": SEARCH_SECONDS})
    return found
