import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # None: the only process of the tests
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch and FAISS load: spinning threads would fight over few cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores, and sums keep their order
os.environ.setdefault("TQDM_DISABLE", "1")

ROOT = Path(__file__).parent.parent
WARM = Path(__file__).with_name("warm.py")


@pytest.fixture(scope="session")
def rendered(tmp_path_factory) -> Path:
    "The tiny benchmark, rendered once for all workers; not to be written into."
    from patchify.synthetic.mini import load_mini

    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if WORKER else shared) / "rendered"
    with FileLock(shared.with_suffix(".lock")):
        load_mini(shared, "tiny")
    return shared / "tiny"


@pytest.fixture(scope="session")
def data(rendered, tmp_path_factory) -> Path:
    "A data folder with the tiny benchmark in it, and what the tests of this process extract from it."
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(rendered, folder / "tiny")
    return folder


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> list:
    "How to start a Python process that has the large libraries at hand; Jupyter's kernels start like this, too."
    if not hasattr(os, "pidfd_open"):
        yield [sys.executable]
        return
    folder = tmp_path_factory.mktemp("warm")
    words = [sys.executable, str(WARM), "serve", str(folder / "socket")]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert server.stdout.readline() == "ready\n"
    start = [sys.executable, "-IS", str(WARM), str(folder / "socket")]
    kernel = {"argv": [*start, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    (folder / "kernels/python3").mkdir(parents=True)
    file = folder / "kernels/python3/kernel.json"
    file.write_text(json.dumps(kernel | {"display_name": "Python 3", "language": "python"}))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JUPYTER_PATH", str(folder), prepend=os.pathsep)
        yield start
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def patchify(python) -> list:
    "The start of a command line: `patchify` as a process of its own."
    return [*python, Path(sys.executable).with_name("patchify")]


@pytest.fixture(scope="session")
def command(patchify):
    "Run `patchify ...` in a process of its own, as a user would."
    def run(*words, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run([*patchify, *map(str, words)], cwd=cwd, capture_output=True, text=True)
    return run
