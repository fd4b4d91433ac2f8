"A wheel built from the checkout works alone: weights, experiments, commands and imports, outside the repository."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    "A folder that holds the wheel's content and nothing else of the project."
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        if name and not name.startswith(("tests/", "reports/")) and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = tmp_path_factory.mktemp("wheels")
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    site = tmp_path_factory.mktemp("site")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *wheels.glob("*.whl")], check=True)
    return site


def run(python: list, site: Path, cwd: Path, *words: object) -> subprocess.CompletedProcess:
    "Run Python with the wheel's content in front of everything else."
    environment = os.environ | {"PYTHONPATH": str(site), "TQDM_DISABLE": "1"}
    return subprocess.run([*python, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_weights_experiments_and_types(installed):
    package = installed / "patchify"
    assert (package / "weights/mini.safetensors").stat().st_size > 1_000_000
    assert {path.stem for path in (ROOT / "nbs/experiments").glob("*.ipynb")} == {p.stem for p in (package / "experiments").glob("*.ipynb")}
    assert all((package / name).exists() for name in ("py.typed", "published.csv", "rates.csv"))


def test_the_readme_example_runs_from_the_wheel(installed, tmp_path):
    code = "import patchify; from patchify import Regions, describe, load, load_encoder, rank; print(patchify.__file__); " \
           "found = rank(describe(load('tiny'), load_encoder('mini', device='cpu'), Regions(level=1))); print(found.result.ranks.shape)"
    done = run([sys.executable], installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout and "(6, 36)" in done.stdout


def test_commands_run_from_the_wheel(python, installed, data, tmp_path):
    command = ("-c", "import sys; from patchify.cli import main; sys.exit(main())")
    for words in (["index", data / "tiny/distractors", "--out", "index", "--level", 1],
                  ["search", "index", data / "tiny/distractors/D0000.jpg", "-k", 2],
                  ["report", "--only", "levels", "--dataset", "tiny", "--level", 1, "--data", data]):
        done = run(python, installed, tmp_path, *command, *words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "reports/tiny-mini/levels.html").exists()
