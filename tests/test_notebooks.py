"Notebooks and package are in step, notebooks are clean, and every library notebook runs from top to bottom."
import ast
import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "nbs/experiments").glob("*.ipynb"))
LIBRARY = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if path not in EXPERIMENTS and "." not in path.parent.name)
NAMES = {"ids": lambda path: path.stem}


def modules(folder: Path) -> dict[str, str]:
    "The source of every module of the package below a folder."
    package = folder / "patchify"
    return {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}


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
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / "patchify" / name, copy / "patchify")
    for tool in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([Path(sys.executable).with_name(tool)], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


def test_the_package_is_what_the_notebooks_export(copy):
    exported = modules(copy)
    committed = modules(ROOT)
    assert exported.keys() == committed.keys()
    assert [name for name in exported if exported[name] != committed[name]] == []


def test_the_notebooks_are_clean(copy):
    assert [p.name for p in LIBRARY + EXPERIMENTS if p.read_bytes() != (copy / p.relative_to(ROOT)).read_bytes()] == []


def test_no_notebook_rewrites_the_package():
    assert [path.name for path in LIBRARY + EXPERIMENTS if any("nbdev_export" in cell.source for cell in code(path))] == []


@pytest.mark.parametrize("path", [LIBRARY[0], EXPERIMENTS[0]], **NAMES)
def test_opening_and_saving_a_notebook_in_jupyterlab_changes_nothing(path, tmp_path, monkeypatch):
    from traitlets.config import Config

    monkeypatch.chdir(ROOT)
    words = {"c": Config()}
    exec((ROOT / "jupyter_config.py").read_text(), words)
    shutil.copy(path, tmp_path)
    manager = words["CleanNotebooks"](root_dir=str(tmp_path), pre_save_hook=words["clean_before_saving"])
    model = asyncio.run(manager.get(path.name))
    assert model["content"]["metadata"].items() >= words["kernel_metadata"]().items()  # as JupyterLab would write it
    asyncio.run(manager.save(model, path.name))
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", LIBRARY, **NAMES)
def test_a_library_notebook_runs(path, python):
    if path.parent.name == "cluster":
        pytest.importorskip("ray", reason="ray is not installed: pip install 'patchify-retrieval[cluster]'")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "#| eval: false" not in cell.source]
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize("path", LIBRARY, **NAMES)
def test_a_library_notebook_can_be_read(path):
    cells = code(path)
    text = re.sub(r'"image/(png|jpeg)": "[^"]*"', r'"image/\1": ""', path.read_text())  # pictures hold any letters
    assert path.stat().st_size < 200_000
    assert not re.search(r"/(home|root|Users|tmp)/\w|site-packages", text), "a path of one machine"
    assert f"{ROOT}/" not in text, "a path of this clone"
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    if path.stem != "index":
        assert cells[0].source.startswith("#| default_exp ")
        marks = ['"image/png"', '"image/jpeg"', '"image/svg+xml"', '"output_type": "display_data"']  # or a rendered page
        assert any(mark in text for mark in marks), "no picture"


@pytest.mark.parametrize("path", EXPERIMENTS, **NAMES)
def test_an_experiment_is_parameterised_and_bare(path):
    cells = code(path)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    assert not any(cell.outputs for cell in cells)
    assert not any(cell.source.startswith("#|") for cell in cells), "papermill runs cells that nbdev would skip"


LAYERS = ({""}, {"data"}, {"rerank", "descriptors", "synthetic"}, {"zoo"}, {"cluster", "pages", "commands", "cli"})


def imports(module: str, source: str) -> set[str]:
    "The modules of the package that a module imports anywhere in its source, such as `rerank.ames`."
    package = ["patchify", *module.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("patchify.") for name in found if name.startswith("patchify.")}


def package_imports() -> dict[str, set[str]]:
    "module -> the modules of the package that it imports."
    names = {path.removesuffix(".py").replace("/", "."): source for path, source in modules(ROOT).items()}
    names = {name: source for name, source in names.items() if name != "_modidx" and not name.endswith("__")}
    return {name: imports(name, source) & names.keys() for name, source in names.items()}


def layer(module: str) -> int:
    "The layer of a module: core is 0."
    package = module.split(".")[0] if "." in module or module == "cli" or module == "cluster" else ""
    return next(i for i, packages in enumerate(LAYERS) if package in packages)


def test_modules_import_only_from_lower_layers():
    for module, imported in package_imports().items():
        for other in imported:
            same = module.split(".")[0] == other.split(".")[0] or layer(module) == 0
            top = layer(module) == layer(other) == len(LAYERS) - 1  # the command line opens pages
            assert layer(other) < layer(module) or layer(other) == layer(module) and (same or top), f"{module} imports {other}"


def test_no_module_imports_itself_through_others():
    waiting = package_imports()
    while waiting:
        ready = {module for module, imported in waiting.items() if not imported & waiting.keys()}
        assert ready, f"a cycle among {sorted(waiting)}"
        waiting = {module: imported for module, imported in waiting.items() if module not in ready}


def test_an_import_inside_a_package_is_seen():
    assert imports("rerank.ames", "from ..search import rank\nfrom .shortlist import fuse") >= {"search", "rerank.shortlist"}
    assert "zoo.heads" in imports("boxes", "from .zoo import heads")


def test_the_package_does_not_need_the_tools_that_made_it():
    names = [f"patchify.{module}" for module in package_imports()]
    check = "import sys; sys.modules.update(nbdev=None, fastcore=None, ray=None); import importlib; "
    check += f"[importlib.import_module(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
