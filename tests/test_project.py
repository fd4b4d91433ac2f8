"The few lists that must agree: dependencies, and the README with the notebook it is made from."
from configparser import ConfigParser
from importlib.metadata import requires
from pathlib import Path

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
    assert nested == [{"pip": ["-e .[report,locore,hdf5,text,cluster,dev]"]}]
    minimum = tuple(map(int, settings()["min_python"].split(".")))
    assert tuple(map(int, plain[0].split("=")[1].split("."))) >= minimum


def test_the_readme_is_made_from_its_notebook():
    config = Config()
    config.TagRemovePreprocessor.update(enabled=True, remove_input_tags={"hide-input"}, remove_cell_tags={"hide-cell"})
    text, _ = MarkdownExporter(config=config).from_filename(str(ROOT / "nbs/index.ipynb"))
    assert (ROOT / "README.md").read_text().strip() == text.strip(), "run `make notebooks`"


def test_the_package_knows_its_version():
    assert patchify.__version__ == settings()["version"]
