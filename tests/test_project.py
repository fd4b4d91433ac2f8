"The few lists that must agree: dependencies, and the README with the notebook it is made from."
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from nbconvert import MarkdownExporter
from packaging.requirements import Requirement
from traitlets.config import Config

import patchify

ROOT = Path(__file__).parent.parent


def settings() -> dict:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def test_the_installed_package_requires_what_settings_ini_lists():
    listed = {str(Requirement(line)) for line in settings()["requirements"].split("\n") if line}
    assert listed == {str(Requirement(line)) for line in requires("patchify-retrieval") if "extra ==" not in line}


def test_the_conda_environment_adds_no_dependency_of_its_own():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [item for item in environment["dependencies"] if isinstance(item, str)]
    nested = [item for item in environment["dependencies"] if isinstance(item, dict)]
    assert {item.split("=")[0].split(">")[0] for item in plain} == {"python", "jupyterlab", "pip"}
    assert nested == [{"pip": ["-e .[all]"]}]
    minimum = tuple(map(int, settings()["min_python"].split(".")))
    assert tuple(map(int, plain[0].split("=")[1].split("."))) >= minimum


def test_the_readme_is_made_from_its_notebook():
    config = Config()
    config.TagRemovePreprocessor.update(enabled=True, remove_input_tags={"hide-input"}, remove_cell_tags={"hide-cell"})
    text, _ = MarkdownExporter(config=config).from_filename(str(ROOT / "nbs/index.ipynb"))
    assert (ROOT / "README.md").read_text().strip() == text.strip(), "run `make notebooks`"


def test_the_package_knows_its_version():
    assert patchify.__version__ == settings()["version"]


@pytest.mark.parametrize("foreign, said", [
    ("import numpy as np\n\ndef patchify(image, size, step=1):\n    pass\n", "belongs to an unrelated package"),
    (None, "has lost its __init__.py"),
], ids=["installed over ours", "installed and removed again"])
@pytest.mark.parametrize("call", ["-m", "-c"])
def test_a_package_that_took_our_place_is_reported(tmp_path, foreign, said, call):
    "The state that `pip install patchify`, or removing it again, leaves behind."
    shutil.copytree(ROOT / "patchify", tmp_path / "patchify", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copy(ROOT / "patchify_retrieval.py", tmp_path)
    (tmp_path / "patchify/__init__.py").unlink()
    if foreign:
        (tmp_path / "patchify/__init__.py").write_text(foreign)
    words = ["-m", "patchify"] if call == "-m" else ["-c", "import sys, patchify_retrieval as p; sys.exit(p.main())"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *words, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "pip uninstall" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_the_console_script_runs_our_package():
    import patchify_retrieval

    assert patchify_retrieval.problem() is None
    assert settings()["console_scripts"].strip() == "patchify=patchify_retrieval:main"
