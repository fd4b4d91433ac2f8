import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch and FAISS load: spinning threads would fight over few cores
os.environ.setdefault("TQDM_DISABLE", "1")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    "A data folder with the tiny benchmark in it."
    from patchify.synthetic.mini import load_mini

    folder = tmp_path_factory.mktemp("data")
    load_mini(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def command():
    "Run `patchify ...` in a process of its own, as a user would."
    def run(*words, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run([Path(sys.executable).with_name("patchify"), *map(str, words)], cwd=cwd, capture_output=True, text=True)
    return run
