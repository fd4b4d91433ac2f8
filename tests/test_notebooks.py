"Notebooks and package are in step, notebooks are clean, and every library notebook runs from top to bottom."
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "nbs").glob("*.ipynb"))
EXPERIMENTS = sorted((ROOT / "nbs/experiments").glob("*.ipynb"))
NAMES = {"ids": lambda path: path.stem}


def code(path: Path) -> list:
    "The code cells of a notebook."
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "A copy of notebooks and package in which nbdev has exported and cleaned."
    copy = tmp_path_factory.mktemp("project")
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (copy / "patchify").mkdir()
    shutil.copy(ROOT / "patchify/__init__.py", copy / "patchify")
    for tool in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([Path(sys.executable).with_name(tool)], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


def test_the_package_is_what_the_notebooks_export(copy):
    exported, committed = ({p.name: p.read_text() for p in (folder / "patchify").glob("*.py")} for folder in (copy, ROOT))
    assert exported.keys() == committed.keys()
    assert [name for name in exported if exported[name] != committed[name]] == []


def test_the_notebooks_are_clean(copy):
    assert [p.name for p in LIBRARY + EXPERIMENTS if p.read_bytes() != (copy / p.relative_to(ROOT)).read_bytes()] == []


@pytest.mark.parametrize("path", LIBRARY, **NAMES)
def test_a_library_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "#| eval: false" not in cell.source]
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize("path", LIBRARY, **NAMES)
def test_a_library_notebook_can_be_read(path):
    cells = code(path)
    text = path.read_text()
    assert path.stat().st_size < 200_000
    assert not re.search(r"/(home|root|Users|tmp)/\w|site-packages", text), "a path of one machine"
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    if path.stem != "index":
        assert cells[0].source.startswith("#| default_exp ")
        assert any(f'"image/{kind}"' in text for kind in ("png", "jpeg", "svg+xml")), "no picture"


@pytest.mark.parametrize("path", EXPERIMENTS, **NAMES)
def test_an_experiment_is_parameterised_and_bare(path):
    cells = code(path)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    assert not any(cell.outputs for cell in cells)
    assert not any(cell.source.startswith("#|") for cell in cells), "papermill runs cells that nbdev would skip"


def test_modules_import_only_what_comes_before_them():
    numbers = {}
    for path in LIBRARY:
        if match := re.match(r"#\| default_exp (\w+)", code(path)[0].source):
            numbers[match[1]] = path.stem[:2]
    for module, number in numbers.items():
        text = (ROOT / f"patchify/{module}.py").read_text()
        imported = re.findall(r"^\s*from (?:patchify)?\.(\w+) import", text, re.M)
        imported += [name for line in re.findall(r"^\s*from (?:\.|patchify) import ([\w, ]+)", text, re.M) for name in re.findall(r"\w+", line)]
        late = [name for name in imported if numbers[name] >= number]
        assert not late, f"{module} ({number}) imports {late}"


def test_the_package_does_not_need_the_tools_that_made_it():
    check = "import sys; sys.modules.update(nbdev=None, fastcore=None, ray=None); import importlib, pathlib; " \
            f"[importlib.import_module('patchify.' + p.stem) for p in pathlib.Path({str(ROOT / 'patchify')!r}).glob('*.py') if p.stem != '_modidx']"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
