"Packaging: everything comes from settings.ini, the one list of dependencies."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def lines(key: str) -> list[str]:
    "The non-empty lines of a setting."
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


def extras() -> dict[str, list[str]]:
    "Every `NAME_requirements` of the settings as the extra NAME, and all of them as `all`."
    found = {key.removesuffix("_requirements"): lines(key) for key in cfg if key.endswith("_requirements")}
    return found | {"all": sorted({line for listed in found.values() for line in listed})}


def readme() -> str:
    "README.md without its pictures, whose paths only work in the repository."
    path = here / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n?", "", text)


setup(
    name=cfg["dist_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=[*find_packages(include=[f"{cfg['lib_name']}*"]), "patchify.experiments"],
    package_dir={"patchify.experiments": "nbs/experiments"},
    package_data={
        cfg["lib_name"]: ["weights/*", "published.csv", "rates.csv", "py.typed"],
        "patchify.experiments": ["*.ipynb"],
    },
    install_requires=lines("requirements"),
    py_modules=["patchify_retrieval"],
    extras_require=extras(),
    entry_points={"console_scripts": lines("console_scripts")},
)
