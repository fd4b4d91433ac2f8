"A small report run, from the command to the pages, and what makes a page trustworthy."
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(command, data, out):
    done = command("report", "--dataset", "tiny", "--level", 2, "--data", data, "--reports", out, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out / "tiny-mini"


@pytest.fixture(scope="module")
def pages(command, data, tmp_path_factory):
    return run(command, data, tmp_path_factory.mktemp("reports"))


def test_every_experiment_makes_its_page(pages):
    names = {path.stem for path in (ROOT / "nbs/experiments").glob("*.ipynb")}
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


def test_the_csv_files_come_out_the_same_again(command, data, pages, tmp_path):
    done = command("report", "--dataset", "tiny", "--level", 2, "--data", data, "--reports", tmp_path, "--only", "levels", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    again = sorted((tmp_path / "tiny-mini").glob("levels-*.csv"))
    assert again and all(file.read_bytes() == (pages / file.name).read_bytes() for file in again)


def test_random_weights_are_announced(command, data, tmp_path):
    done = command("report", "--dataset", "tiny", "--level", 1, "--random-weights", "--backbone", "test_resnet", "--data", data, "--reports", tmp_path, "--only", "locscore", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "class=warning" in (tmp_path / "tiny-test_resnet-random/locscore.html").read_text()
