"A small report run, from the command to the pages, and what makes a page trustworthy."
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from patchify.report import LONG

ROOT = Path(__file__).parent.parent


def run(command, data, out):
    done = command("report", "--dataset", "tiny", "--level", 2, "--data", data, "--reports", out, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out / "tiny-mini"


@pytest.fixture(scope="module")
def pages(command, data, tmp_path_factory):
    return run(command, data, tmp_path_factory.mktemp("reports"))


def test_every_experiment_makes_its_page(pages):
    names = {path.stem for path in (ROOT / "nbs/experiments").glob("*.ipynb")} - set(LONG)
    assert {path.stem for path in pages.glob("*.html")} == names
    index = (pages.parent / "index.html").read_text()
    for name in names:
        facts = json.loads((pages / f"{name}.json").read_text())
        assert facts["line"] and facts["checks"] and facts["provenance"]["parameters"]
        assert f"tiny-mini/{name}.html" in index


def test_pages_need_neither_network_nor_script(pages):
    for page in [*pages.glob("*.html"), pages.parent / "index.html"]:
        text = page.read_text()
        assert "<script" not in text and not re.search(r"(src|href)=\"?https?:", text)
        for picture in re.findall(r'<img src="([^":]+)"', text):
            assert (page.parent / picture).exists()


@pytest.mark.parametrize("name", ["levels", "locscore", "groups", "regions"])
def test_the_csv_files_come_out_the_same_from_scratch(command, data, pages, tmp_path, name):
    shutil.copytree(data / "tiny", tmp_path / "data/tiny")  # new files, so new stores
    done = command("report", "--dataset", "tiny", "--level", 2, "--data", tmp_path / "data", "--reports", tmp_path, "--only", name, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    again = sorted((tmp_path / "tiny-mini").glob(f"{name}-*.csv"))
    assert again and all(file.read_bytes() == (pages / file.name).read_bytes() for file in again)


@pytest.mark.parametrize("name", ["levels", "locscore", "regions"])
def test_what_is_not_known_is_not_run(command, data, tmp_path, name):
    shutil.copytree(data / "tiny", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/image_ids")
    for boxes in (tmp_path / "bare").rglob("pos/*_bbox.txt"):
        boxes.unlink()
    shutil.rmtree(next((tmp_path / "bare/ilias_core").iterdir()) / "pos")
    done = command("report", "--dataset", f"ilias:{tmp_path / 'bare'}", "--level", 1, "--data", tmp_path, "--reports", tmp_path / "reports", "--only", name, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "not run" in (tmp_path / f"reports/bare-mini/{name}.html").read_text()


def test_two_backbones_are_compared_and_a_failure_leaves_no_page(command, data, tmp_path):
    words = ["report", "--dataset", "tiny", "--level", 1, "--random-weights", "--backbone", "test_resnet,test_vit", "--data", data, "--reports", tmp_path]
    done = command(*words, "--only", "levels", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny-test_resnet+test_vit-random"
    assert set(pd.read_csv(run / "levels-levels.csv").backbone) == {"test_resnet", "test_vit"}
    done = command(*words, "--only", "gallery", "-p", "chosen=\"two\"", cwd=ROOT)
    assert done.returncode == 1 and "gallery, cell" in done.stderr and not (run / "gallery.html").exists()


def test_random_weights_are_announced(command, data, tmp_path):
    done = command("report", "--dataset", "tiny", "--level", 1, "--random-weights", "--backbone", "test_resnet", "--data", data, "--reports", tmp_path, "--only", "locscore", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert '<p class="warning">Random weights' in (tmp_path / "tiny-test_resnet-random/locscore.html").read_text()


@pytest.mark.parametrize("name", LONG)
def test_a_long_experiment_runs_when_it_is_asked_for(command, data, tmp_path, name):
    short = ["-p", "steps=3"] if name in ("token", "asymmetric") else []
    done = command("report", "--dataset", "tiny", "--level", 1, "--data", data, "--reports", tmp_path, "--only", name, *short, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"tiny-mini/{name}.html").exists()
