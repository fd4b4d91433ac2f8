"A wheel built from the checkout: complete, self-contained, and damaged weights in it are detected."
import os
import shutil
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path

from campaign import Case, Outcome

ROOT = Path(__file__).parent.parent.parent


@lru_cache
def wheel(folder: Path) -> Path:
    "The wheel, built once."
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        if name and not name.startswith(("tests/", "reports/", "benchmarks/")) and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps",
               "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@lru_cache
def installed(folder: Path) -> Path:
    "What the wheel holds, unpacked once."
    with zipfile.ZipFile(wheel(folder)) as file:
        file.extractall(folder / "site")
    return folder / "site"


def folder_of(world) -> Path:
    return world.shared.parent


def python(world, site, code, *words):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site), "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=world.path, env=environment,
                          capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


MAIN = "import sys; from patchify.cli import main; sys.exit(main(sys.argv[1:]))"


def names(world):
    with zipfile.ZipFile(wheel(folder_of(world))) as file:
        return Outcome(0, "\n".join(file.namelist()))


def no_foreign_files(world):
    listed = names(world).out.split("\n")
    assert all(name.startswith(("patchify/", "patchify_retrieval.py")) or ".dist-info/" in name for name in listed)
    assert not any("/tests/" in name or name.endswith((".pyc", "conftest.py")) for name in listed)


def copied_with_flipped_bit(world):
    site = world.path / "site"
    shutil.copytree(installed(folder_of(world)), site)
    path = site / "patchify" / "weights" / "mini.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    return python(world, site, MAIN, "index", world.photos(), "--out", world.path / "index", "--level", 0)


CASES = [
    Case("it holds weights, hashes, experiments and types", names,
         r"(?s)(?=.*weights/mini.safetensors)(?=.*weights/SHA256SUMS)(?=.*experiments/levels.ipynb)(?=.*py.typed)", 0,
         no_foreign_files),
    Case("it knows its version", lambda w: python(w, installed(folder_of(w)), MAIN, "--version"), r"patchify \d", 0),
    Case("it is imported from where it was unpacked",
         lambda w: python(w, installed(folder_of(w)), "import patchify; print(patchify.__file__)"), "site/patchify", 0),
    Case("its weights are verified", copied_with_flipped_bit, "mini.safetensors.*(damaged|hash).*install"),
    Case("a mistake is one sentence", lambda w: python(w, installed(folder_of(w)), MAIN, "check", "nowhere"),
         "nowhere"),
    Case("an index is made and searched", lambda w: python(
        w, installed(folder_of(w)), MAIN, "index", w.photos(), "--out", w.path / "index", "--level", 0), "8 images", 0),
]
