"The command as a user types it: figures, files, and one sentence for each mistake."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import restricted_pickle
from patchify.data.folders import load_ilias
from patchify.cli import main
from patchify.encoder import Encoder
from patchify.metrics import ap_ilias


@pytest.fixture(scope="module")
def evaluated(command, data, tmp_path_factory):
    "One evaluation of the tiny benchmark with both outputs."
    out = tmp_path_factory.mktemp("out")
    done = command("evaluate", "--dataset", "tiny", "--level", 2, "--data", data, "--json", out / "found.json", "--export", out / "found.pkl")
    assert done.returncode == 0, done.stderr
    return done, json.loads((out / "found.json").read_text()), out / "found.pkl"


def test_evaluate_writes_the_figures_it_prints(evaluated):
    done, found, _ = evaluated
    assert {"map", "map_ci", "locscore_iou", "locscore_hit", "queries", "gallery", "patches", "bytes_per_image", "seconds", "provenance"} <= found.keys()
    low, high = found["map_ci"]
    assert 0 <= low <= found["map"] <= high <= 100 and 0 <= found["locscore_iou"] <= found["locscore_hit"] <= 100
    assert (found["queries"], found["gallery"], found["patches"]) == (6, 36, 14)
    assert f"{found['map']:.2f}" in done.stdout


def test_the_exported_similarities_give_the_same_map(evaluated, data):
    _, found, file = evaluated
    lists, benchmark = restricted_pickle.load(file), load_ilias(data / "tiny")
    truth = {row.id: row.instance for row in benchmark.gallery.itertuples()}
    aps = []
    for query, similarities, ranks in zip(lists["query_ids"], lists["sims"], lists["ranks"]):
        instance = query.split("/")[0]
        relevant = np.array([truth[lists["db_ids"][i]] == instance for i in ranks])
        aps.append(ap_ilias(similarities, relevant, list(truth.values()).count(instance)))
    assert 100 * np.mean(aps) == pytest.approx(found["map"], abs=1e-3)


def test_evaluating_again_reads_the_store(command, data, evaluated, tmp_path):
    command("evaluate", "--dataset", "tiny", "--level", 2, "--data", data, "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["seconds"]["extract"] is None and again["map"] == evaluated[1]["map"]


def test_a_photograph_finds_itself_in_its_folder(command, data, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(data / "tiny/distractors", folder)
    (folder / "broken.jpg").write_bytes(b"")
    done = command("index", folder, "--out", tmp_path / "index", "--level", 1)
    assert done.returncode == 0 and "1 could not be read" in done.stdout
    picture = sorted(folder.glob("D*.jpg"))[3]
    width, height = Image.open(picture).size
    box = f"{width // 2},0,{width},{height // 2}"
    done = command("search", tmp_path / "index", picture, "--box", box, "-k", 3, "--json", tmp_path / "hits.json", "--html", tmp_path / "hits.html")
    assert done.returncode == 0, done.stderr
    hits = json.loads((tmp_path / "hits.json").read_text())
    assert len(hits) == 3 and hits[0]["path"] == picture.name and hits[0]["score"] > 0.99
    assert hits[0]["box"] == pytest.approx([float(v) for v in box.split(",")], abs=1)
    assert picture.name in (tmp_path / "hits.html").read_text()
    done = command("search", tmp_path / "index", picture, "--random-weights")
    assert done.returncode == 2 and "other weights" in done.stderr


MISTAKES = {
    "missing folder": (["evaluate", "--dataset", "ilias:nowhere"], "nowhere"),
    "unknown data set": (["evaluate", "--dataset", "mnii"], "mini"),
    "unknown backbone": (["evaluate", "--backbone", "siglp"], "siglip"),
    "unknown regions": (["evaluate", "--dataset", "tiny", "--regions", "pyramids"], "did you mean pyramid?"),
    "regions nearly right": (["evaluate", "--dataset", "tiny", "--regions", "slidding"], "did you mean sliding?"),
    "backbones nearly right": (["evaluate", "--backbone", "siglipp"], "did you mean siglip"),
    "figures into a folder": (["evaluate", "--dataset", "ilias:nowhere", "--json", "empty"], "--json empty is a folder"),
    "figures below a file": (["evaluate", "--dataset", "ilias:nowhere", "--json", "image.jpg/found.json"], "image.jpg is a file"),
    "results below a file": (["search", "empty", "image.jpg", "--html", "image.jpg/found.html"], "image.jpg is a file"),
    "a page that is none": (["search", "empty", "image.jpg", "--html", "found.png"], "must end in .html or .htm"),
    "an index that is a file": (["index", "photos", "--out", "image.jpg", "--level", "0"], "image.jpg is a file"),
    "pieces that do not divide": (["evaluate", "--dataset", "tiny", "--level", "0", "--index", "pq", "--m", "7"], "--m must divide"),
    "level that is not there": (["evaluate", "--dataset", "tiny", "--level", "0", "--index", "pq", "--nbits", "2", "--train-level", "4"], "--train-level must be -1, -2 or a level up to 0"),
    "probes beyond the lists": (["evaluate", "--dataset", "tiny", "--index", "ivfpq", "--nlist", "4", "--nprobe", "5"], "--nprobe must lie in 1..4 (--nlist)"),
    "negative level": (["evaluate", "--dataset", "tiny", "--level", "-1"], "0 or more"),
    "no such checkpoint": (["evaluate", "--dataset", "tiny", "--backbone", "resnet10t", "--checkpoint", "none.safetensors"], "no such checkpoint"),
    "export to an unknown format": (["evaluate", "--dataset", "tiny", "--export", "found.csv"], "found.csv"),
    "no images": (["index", "empty", "--out", "index"], "no images in empty"),
    "no index": (["search", "empty", "image.jpg"], "empty holds no index"),
    "unknown device": (["evaluate", "--dataset", "tiny", "--device", "gpu"], "cannot be used"),
    "unknown index": (["evaluate", "--dataset", "tiny", "--index", "pqq"], "did you mean pq"),
    "unknown parameter": (["report", "--dataset", "tiny", "--only", "gallery", "-p", "chosn=2"], "did you mean chosen"),
    "unknown experiment": (["report", "--dataset", "tiny", "--only", "levles"], "levels"),
    "unknown option": (["evaluate", "--levle", "3"], "--level"),
}


@pytest.mark.parametrize("words, said", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_sentence_and_exit_code_2(data, tmp_path, monkeypatch, capsys, words, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").symlink_to(data / "tiny/distractors")
    (tmp_path / "image.jpg").write_bytes(b"")
    (tmp_path / "nbs").symlink_to(Path(__file__).parent.parent / "nbs")
    monkeypatch.chdir(tmp_path)
    assert main([*words, *(["--data", str(data)] if words[0] in ("evaluate", "report") else [])]) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


@pytest.fixture(scope="module")
def indexed(command, data, tmp_path_factory):
    "An index of the distractors, and one of its pictures."
    out = tmp_path_factory.mktemp("indexed") / "index"
    assert command("index", data / "tiny/distractors", "--out", out, "--level", 0).returncode == 0
    return str(out), str(data / "tiny/distractors/D0000.jpg")


@pytest.mark.parametrize("words, said", [(["-k", "0"], "-k must be at least 1"), (["--box", "1,2,3"], "x0,y0,x1,y1"), (["--box", "0,0,9999,5"], "inside the image")])
def test_a_search_is_asked_properly(indexed, capsys, words, said):
    assert main(["search", *indexed, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_place_without_permission_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    for words in (["evaluate", "--dataset", "ilias:nowhere"], ["search", "nowhere", "image.jpg"]):
        assert main([*words, "--json", str(tmp_path / "found.json")]) == 2
        assert f"found.json cannot be written: no permission to write in {tmp_path}" in capsys.readouterr().err


def test_figures_are_on_the_screen_before_a_disk_is_full(indexed, data, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchify.cli._write_text", full)
    evaluation = ["evaluate", "--dataset", "tiny", "--level", "2", "--data", str(data)]
    for words, said in ((evaluation, "mAP@1000"), (["search", *indexed], "D0000.jpg")):
        assert main([*words, "--json", str(tmp_path / "found.json")]) == 2
        told = capsys.readouterr()
        assert said in told.out and "No space left" in told.err


@pytest.fixture
def photos(data, tmp_path) -> Path:
    "A folder of photographs that a test may change."
    return Path(shutil.copytree(data / "tiny/distractors", tmp_path / "photos"))


def index(photos: Path, *words) -> int:
    return main(["index", str(photos), "--out", str(photos.with_name("index")), "--level", "0", *map(str, words)])


def test_a_hit_whose_file_is_gone_is_marked_as_missing(photos, data, capsys):
    assert index(photos) == 0
    (photos / "D0000.jpg").rename(photos / "moved.jpg")
    page = photos.with_name("found.html")
    picture = str(data / "tiny/distractors/D0000.jpg")
    assert main(["search", str(photos.with_name("index")), picture, "-k", "2", "--html", str(page)]) == 0
    assert "D0000.jpg" in capsys.readouterr().out
    assert page.read_text().count("(missing)") == 1


def test_only_new_and_changed_images_are_encoded(photos, monkeypatch, capsys):
    encoded = []
    original = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, images: (encoded.append(len(images)), original(self, images))[1])
    assert index(photos) == 0
    encoded.clear()
    assert index(photos) == 0 and sum(encoded) <= 1  # loading an encoder describes one blank image
    encoded.clear()
    Image.open(photos / "D0000.jpg").rotate(90).save(photos / "new.jpg")
    (photos / "D0001.jpg").unlink()
    Image.open(photos / "D0002.jpg").rotate(180).save(photos / "D0002.jpg")
    assert index(photos) == 0
    assert 0 < sum(encoded) <= 1 + 64  # one padded batch
    capsys.readouterr()
    assert main(["search", str(photos.with_name("index")), str(photos / "new.jpg"), "-k", "20"]) == 0
    found = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert found[0] == "new.jpg" and sorted(found) == sorted(path.name for path in photos.iterdir())


def test_a_folder_that_moved_costs_nothing(photos, capsys):
    assert index(photos) == 0
    before = {path.name for path in photos.with_name("index").glob("part-*")}
    moved = photos.rename(photos.with_name("elsewhere"))
    assert index(moved) == 0
    assert {path.name for path in photos.with_name("index").glob("part-*")} == before


@pytest.mark.parametrize("name", ["images.parquet", "part-00000"])
def test_a_damaged_index_is_named(photos, name, capsys):
    assert index(photos) == 0
    damaged = photos.with_name("index") / name
    files = [damaged] if damaged.is_file() else sorted(path for path in damaged.rglob("*") if path.is_file())
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert main(["check", str(photos.with_name("index"))]) == 2
        message = capsys.readouterr().err
        assert file.name in message and message.count("\n") == 1
        file.write_bytes(content)
    assert main(["check", str(photos.with_name("index"))]) == 0


def test_several_queries_are_json_lines(indexed, data, capsys, monkeypatch):
    directory, picture = indexed
    assert main(["search", directory, picture, picture, "-k", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["query"] for line in lines] == [picture] * 2 and [len(line["hits"]) for line in lines] == [3, 3]
    monkeypatch.setattr("sys.stdin", StringIO(f"{picture}\n{picture}\n"))
    assert main(["search", directory, "-", "-k", "3"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    assert main(["search", directory, str(data / "tiny/distractors"), "-k", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12


def test_help_is_quick_to_import():
    code = "import sys; from patchify.cli import main; main(['--help']); print({'torch', 'faiss', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip().endswith("set()")


def test_a_closed_pipe_ends_quietly(indexed, data):
    folder = data / "tiny/distractors"
    script = f"{Path(sys.executable).with_name('patchify')} search {indexed[0]} {folder} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True)
    assert done.returncode in (0, 1, 141) and "Traceback" not in done.stderr and "Error" not in done.stderr


def test_queries_without_positives_are_left_out_and_counted(data, tmp_path, capsys):
    shutil.copytree(data / "tiny", tmp_path / "tiny")
    shutil.rmtree(next((tmp_path / "tiny/ilias_core").iterdir()) / "pos")
    shutil.rmtree(tmp_path / "tiny/image_ids")
    assert main(["evaluate", "--dataset", f"ilias:{tmp_path / 'tiny'}", "--level", "0", "--data", str(tmp_path), "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["queries"] == 5 and found["left_out"]["without positives"] == 1
    assert "left out: 1 without positives" in capsys.readouterr().out


def test_a_malformed_box_is_named_with_file_and_line(data, tmp_path, capsys):
    shutil.copytree(data / "tiny", tmp_path / "tiny")
    next((tmp_path / "tiny").rglob("pos/*_bbox.txt")).write_text("1 2 3\n")
    assert main(["evaluate", "--dataset", f"ilias:{tmp_path / 'tiny'}", "--level", "0", "--data", str(tmp_path)]) == 2
    assert "_bbox.txt, line 1" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_loses_nothing(command, data, tmp_path, stop):
    words = ["index", data / "tiny", "--level", "3", "--out"]
    process = subprocess.Popen([Path(sys.executable).with_name("patchify"), *words, tmp_path / "index"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "index/part-00000/manifest.json").exists():
        time.sleep(0.05)
    process.send_signal(stop)
    message = process.communicate(timeout=120)[1]
    if process.returncode:  # it had not finished already
        assert process.returncode == 130 and "Traceback" not in message
    for out in ("index", "undisturbed"):
        assert command(*words, tmp_path / out).returncode == 0
    assert contents(tmp_path / "index") == contents(tmp_path / "undisturbed")
