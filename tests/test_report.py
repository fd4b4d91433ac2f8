"A small report run, from the command to the pages, and what makes a page trustworthy."
import json
import os
import re
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest

from patchify.pages.page import project_folder, project_root
from patchify.pages.report import LONG
from patchify.pages.site import build_index
from patchify.pages.tables import compact, format_number, format_p, published, published_table, with_interval

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
        page = (pages / f"{name}.html").read_text()
        assert page.index("<h1") < page.index("<section class=finding>") < page.index("<details class=code>")
        assert f"tiny-mini/{name}.html" in index


def test_pages_need_neither_network_nor_script(pages):
    for page in [*pages.glob("*.html"), pages.parent / "index.html"]:
        text = page.read_text()
        assert ("<script" in text) == (page.stem == "explorer") and not re.search(r"(src|href)=\"?https?:", text)
        outside = re.sub("<script.*?</script>", "", text, flags=re.S)
        local = [link for link in re.findall(r'(?:src|href)="([^":#]+)"', outside) if not link.startswith("data:")]
        assert local and all((page.parent / link).exists() for link in local)


class Links(HTMLParser):
    "Addresses that a page refers to, and the ids that it has."

    def __init__(self, page: Path):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("href", "src") if found.get(name) and not found[name].startswith("data:")]
        self.ids.add(found.get("id"))


def test_pages_and_book_are_one_site_that_can_be_published_as_it_is(command, pages):
    site = pages.parent
    done = command("report", "--book", "--reports", site, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = {page: Links(page) for page in site.rglob("*.html")}
    for page, each in found.items():
        for link in each.links:
            file, _, anchor = link.partition("#")
            assert ":" not in file, f"{page.name}: {link}"
            target = (page.parent / unquote(file)).resolve() if file else page
            assert target.is_relative_to(site.resolve()) and target.exists(), f"{page.name}: {link}"
            assert not anchor or unquote(anchor) in found[target].ids, f"{page.name}: {link}"
    notebooks = {path.stem.lstrip("0123456789_") for path in (ROOT / "nbs").glob("*/*.ipynb")}
    assert notebooks <= {page.stem for page in (site / "book").rglob("*.html")}
    assert {"../book/core/pyramid.html", "../papers.html#patchify"} <= set(found[pages / "levels.html"].links)
    assert "../../tiny-mini/levels.html" in found[site / "book/core/pyramid.html"].links
    book = "".join(page.read_text() for page in found if page.is_relative_to(site / "book"))
    assert book.count("<math") > 150 and "merror" not in book
    assert sum(file.stat().st_size for file in (site / "book").rglob("*.*")) < 8e6


@pytest.fixture(scope="module")
def from_scratch(rendered, tmp_path_factory):
    "A data folder without stores."
    folder = tmp_path_factory.mktemp("scratch")
    shutil.copytree(rendered, folder / "tiny")
    return folder


@pytest.mark.parametrize("name", ["levels", "locscore", "groups", "regions"])
def test_the_csv_files_come_out_the_same_from_scratch(command, from_scratch, pages, tmp_path, name):
    words = ["report", "--dataset", "tiny", "--level", 2, "--data", from_scratch, "--reports", tmp_path]
    done = command(*words, "--only", name, cwd=ROOT)
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


def test_two_backbones_are_compared(command, data, tmp_path):
    words = ["report", "--dataset", "tiny", "--level", 1, "--random-weights", "--backbone", "test_resnet,test_vit", "--data", data, "--reports", tmp_path]
    done = command(*words, "--only", "levels", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny-test_resnet+test_vit-random"
    assert set(pd.read_csv(run / "levels-levels.csv").backbone) == {"test_resnet", "test_vit"}
    assert "<h2>All runs</h2>" in (tmp_path / "index.html").read_text()


GALLERY = ["report", "--dataset", "tiny", "--level", 1, "--only", "gallery"]


@pytest.fixture(scope="module")
def gallery(command, data, tmp_path_factory):
    "The reports of one page."
    reports = tmp_path_factory.mktemp("gallery") / "reports"
    assert command(*GALLERY, "--data", data, "--reports", reports, cwd=ROOT).returncode == 0
    return reports


@pytest.fixture
def made(gallery, data, tmp_path):
    "The command that makes a page again, and the page's files."
    shutil.copytree(gallery, tmp_path / "reports")
    return [*GALLERY, "--data", data, "--reports", tmp_path / "reports"], files_of(tmp_path / "reports")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_page_that_fails_leaves_the_last_one_alone(command, tmp_path, made):
    words, before = made
    for value, why in [("chosen=\"two\"", "gallery has chosen = 3: 'two' is no whole number"), ("level=-1", "ValueError: level must be 0 or more, got -1")]:
        done = command(*words, "-p", value, cwd=ROOT)
        assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr
        assert files_of(tmp_path / "reports") == before
    broken = nbformat.read(ROOT / "nbs/experiments/gallery.ipynb", as_version=4)
    broken.cells[-1].source = "1 / 0"
    (tmp_path / "nbs/experiments").mkdir(parents=True)
    nbformat.write(broken, tmp_path / "nbs/experiments/gallery.ipynb")
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 1 and re.search(r"gallery, cell \d+: ZeroDivisionError: division by zero\n", done.stderr) and "Traceback" not in done.stderr
    assert files_of(tmp_path / "reports") == before


@pytest.mark.parametrize("when", ["running", "begun"])
def test_ctrl_c_leaves_the_last_page_alone(patchify, tmp_path, made, when):
    words, before = made
    words = [*patchify, *map(str, words)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    begun = tmp_path / "reports/tiny-mini/.gallery"
    while not (any(begun.glob("*.jpg")) if when == "running" else begun.exists()) and process.poll() is None:
        time.sleep(.02)
    os.killpg(process.pid, signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 130
    assert files_of(tmp_path / "reports") == before


def test_published_figures_stand_beside_their_own_setting_only():
    core, distracted = (SimpleNamespace(queries=range(1232), gallery=range(n)) for n in (4885, 5_004_885))
    setting = "L3 ivfpq m=64 nlist={} nbits=8 train=1"
    assert published(core, "siglip", setting.format(8192), "map") == 59.30
    assert all(np.isnan(published(*asked, "map")) for asked in [(core, "siglip", setting.format(256)), (distracted, "siglip", "L3 exact"), (core, "mini", "L3 exact")])


def test_a_stranger_in_the_folder_of_a_run_is_no_page(tmp_path):
    (tmp_path / "run").mkdir()
    for text in ("[]", "{}", "not json", '{"name": "other", "line": "x", "provenance": {}}'):
        (tmp_path / "run/notes.json").write_text(text)
        (tmp_path / "run/notes.html").write_text("")
        assert "notes" not in build_index(tmp_path).read_text()


def test_an_experiment_opened_by_hand_finds_the_project(tmp_path, data, python):
    project = tmp_path / "clone"
    here = project / "nbs/experiments"
    here.mkdir(parents=True)
    (project / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    shutil.copytree(data / "tiny", project / "data/tiny")
    notebook = nbformat.read(ROOT / "nbs/experiments/groups.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = cell.source.replace('"mini"  # mini,', '"tiny"  # mini,').replace("level = 3", "level = 1")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(here)}}).execute()
    assert list(here.iterdir()) == []
    assert (project / "reports/scratch/groups.json").exists() and (project / "data/stores").exists()


def test_the_root_is_that_of_this_project_only(tmp_path):
    inside = tmp_path / "outer/inner/nbs"
    inside.mkdir(parents=True)
    assert project_root(inside) == inside.resolve()
    (tmp_path / "outer/settings.ini").write_text("[DEFAULT]\nlib_name = patchify\n")
    (tmp_path / "outer/inner/settings.ini").write_text("[DEFAULT]\nlib_name = another\n")
    assert project_root(inside) == (tmp_path / "outer").resolve()
    (tmp_path / "outer/inner/settings.ini").write_bytes(b"\xff not a settings file")
    assert project_root(inside) == (tmp_path / "outer").resolve()
    assert project_folder("given", "data") == Path("given")


def test_numbers_read_the_same_everywhere():
    assert [format_number(x, 2) for x in (-0.0, -0.004, 1234.567)] == ["0.00", "0.00", "1,234.57"]
    assert format_number(-0.04, 1, signed=True) == "+0.0" and format_p(2 / 1001) == "< 0.002" and format_p(0.5) == "0.500"
    row = {"difference": -1.26, "difference lo": -2.0, "difference hi": -0.04, "p": 2 / 1001}
    assert with_interval(row, "difference", signed=True) == "-1.3 [-2.0, 0.0]"
    table = compact(pd.DataFrame([row, dict.fromkeys(row)]))
    assert table.to_dict("list") == {"difference": ["-1.3 [-2.0, 0.0]", "–"], "p": ["< 0.002", "–"]}


def test_no_experiment_holds_a_published_number():
    values = {f"{value:.2f}" for value in published_table()["value"] if value > 1}
    for path in (ROOT / "nbs/experiments").glob("*.ipynb"):
        code = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        assert not [value for value in values if re.search(rf"(?<![\d.]){re.escape(value)}(?!\d)", code)], path.name


def test_random_weights_are_announced(command, data, tmp_path):
    done = command("report", "--dataset", "tiny", "--level", 1, "--random-weights", "--backbone", "test_resnet", "--data", data, "--reports", tmp_path, "--only", "locscore", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert '<p class=warning>Random weights' in (tmp_path / "tiny-test_resnet-random/locscore.html").read_text()


@pytest.mark.parametrize("name, shorter", [("token", 'tokens="1,4"'), ("asymmetric", 'architecture=""')])
def test_shipped_networks_need_no_training_products(command, rendered, tmp_path, name, shorter):
    "The pages' own settings, for which heads and students ship. A look at the pictures draws eight products."
    words = ["report", "--dataset", f"ilias:{rendered}", "--level", 0, "--data", tmp_path, "--reports", tmp_path]
    done = command(*words, "--only", name, "-p", shorter, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("training-*")] == ["training-products-8"]


@pytest.mark.parametrize("name", LONG)
def test_a_long_experiment_runs_when_it_is_asked_for(command, data, tmp_path, name):
    short = ["-p", "steps=3"] if name in ("token", "asymmetric") else []
    done = command("report", "--dataset", "tiny", "--level", 1, "--data", data, "--reports", tmp_path, "--only", name, *short, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"tiny-mini/{name}.html").exists()
