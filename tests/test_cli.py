"The command as a user types it: figures, files, and one sentence for each mistake."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import restricted_pickle
from patchify.cli import main
from patchify.data.folders import load_ilias
from patchify.boxes import Regions
from patchify.data.registry import load
from patchify.encoder import Encoder, load_encoder
from patchify.evaluate import describe, metrics_dict, rank
from patchify.refine import expand_queries
from patchify.search import ExactIndex
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


def test_figures_are_on_the_screen_before_a_disk_is_full(indexed, evaluated, data, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchify.files.os.fsync", full)
    evaluation = ["evaluate", "--dataset", "tiny", "--level", "2", "--data", str(data)]
    for words, said in ((evaluation, "mAP@1000"), (["search", *indexed], "D0000.jpg")):
        assert main([*words, "--json", str(tmp_path / "found.json")]) == 2
        told = capsys.readouterr()
        assert said in told.out and re.search("cannot write .*found.json: its disk .* is full", told.err)


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


@pytest.fixture(scope="module")
def undisturbed(command, data, tmp_path_factory):
    "The files of an index that was made in one go."
    out = tmp_path_factory.mktemp("undisturbed") / "index"
    assert command("index", data / "tiny", "--level", 2, "--out", out).returncode == 0
    return contents(out)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_loses_nothing(patchify, command, data, tmp_path, undisturbed, stop):
    words = ["index", data / "tiny", "--level", "2", "--out", tmp_path / "index"]
    process = subprocess.Popen([*patchify, *words], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "index/part-00000/manifest.json").exists():
        time.sleep(0.05)
    process.send_signal(stop)
    message = process.communicate(timeout=120)[1]
    if process.returncode:  # it had not finished already
        assert process.returncode == 130 and "Traceback" not in message
    assert command(*words).returncode == 0
    assert contents(tmp_path / "index") == undisturbed


def test_a_damaged_part_is_encoded_again(photos, capsys):
    assert index(photos) == 0
    out = photos.with_name("index")
    picture = str(photos / "D0001.jpg")
    assert main(["search", str(out), picture, "-k", "20"]) == 0
    expected = capsys.readouterr().out.splitlines()[-12:]
    for name in ("descriptors-00000.npy", "patches-00000.parquet", "manifest.json", "shards.csv"):
        for content in (b"", None):
            file = next(out.glob("part-*")) / name
            if content is None:
                file.unlink()
            else:
                file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
            assert main(["search", str(out), picture]) == 2
            assert f"run `patchify index {photos} --out {out}` again" in capsys.readouterr().err
            assert main(["check", str(out)]) == 2
            assert index(photos) == 0
            assert main(["check", str(out)]) == 0
            capsys.readouterr()
            assert main(["search", str(out), picture, "-k", "20"]) == 0
            assert capsys.readouterr().out.splitlines() == expected
    assert len(list(out.glob("part-*"))) == 1


@pytest.mark.parametrize("spoil", ["damaged list", "changed image", "deleted image"])
def test_an_interrupted_update_goes_on_after_changes(photos, monkeypatch, capsys, spoil):
    assert index(photos) == 0
    out = photos.with_name("index")
    (photos / "D0003.jpg").rename(photos / "D0003.old")
    for name in ("D0001.jpg", "D0002.jpg"):
        Image.open(photos / name).rotate(90).save(photos / f"new{name}")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("patchify.extraction.Extraction.write", stop)
        assert index(photos) == 130
    if spoil == "damaged list":
        (out / "pending.parquet").write_bytes(b"PAR1")
    elif spoil == "changed image":
        Image.open(photos / "D0005.jpg").save(photos / "newD0001.jpg")
    else:
        (photos / "newD0001.jpg").unlink()
    assert index(photos) == 0
    assert main(["check", str(out)]) == 0
    capsys.readouterr()
    assert main(["search", str(out), str(photos / "newD0002.jpg"), "-k", "20"]) == 0
    found = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert found[0] == "newD0002.jpg" and sorted(found) == sorted(path.name for path in photos.glob("*.jpg"))


def measured(data: Path, tmp_path: Path, *words) -> dict:
    "The figures of an evaluation of the tiny benchmark."
    line = ["evaluate", "--dataset", "tiny", "--level", "2", "--data", data, "--json", tmp_path / "found.json", *words]
    assert main([str(word) for word in line]) == 0
    return json.loads((tmp_path / "found.json").read_text())


@pytest.fixture
def adaptation(tmp_path):
    "A file like those of ILIAS: a rotation, or with `keep` the first components only."
    def write(keep: int | None = None) -> Path:
        rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(256, 256)))[0].astype(np.float32)
        weight = torch.from_numpy(rotation[:keep])
        torch.save({"layer.weight": weight, "layer.bias": torch.zeros(len(weight))}, tmp_path / "layer.pth")
        return tmp_path / "layer.pth"

    return write


def test_descriptors_are_adapted_on_both_sides(data, tmp_path, adaptation, evaluated):
    plain = evaluated[1]
    for name in ("exact", "flat"):
        rotated = measured(data, tmp_path, "--adapt", adaptation(), "--index", name)
        assert rotated["map"] == pytest.approx(plain["map"], abs=0.5)  # a rotation keeps all scores
    shorter = measured(data, tmp_path, "--adapt", adaptation(8))
    assert shorter["map"] < plain["map"] and shorter["bytes_per_image"] == 14 * 8 * 4


def test_queries_are_expanded_by_what_they_found(data, tmp_path, adaptation):
    described = describe(load("tiny", data), load_encoder("mini"), Regions(level=2), data / "stores")
    first = rank(described)
    raw = ExactIndex(described.gallery.descriptors())
    queries = expand_queries(described.queries, first.result, raw, 3)
    expected = metrics_dict(rank(replace(described, queries=queries)))
    found = measured(data, tmp_path, "--expand", 3)
    assert found["map"] == pytest.approx(expected["map"]) and found["map"] != metrics_dict(first)["map"]
    adapted = measured(data, tmp_path, "--expand", 3, "--adapt", adaptation())
    assert adapted["map"] == pytest.approx(found["map"], abs=0.5)


@pytest.mark.parametrize("words, said", [
    (["--adapt", "layer.pth", "--index", "pq"], "--adapt works with --index exact or flat"),
    (["--adapt", "layer.pth", "--rerank", "ames"], "--adapt cannot be combined with --rerank"),
    (["--adapt", "none.pth"], "none.pth"),
    (["--expand", "3", "--index", "flat"], "--expand works with --index exact"),
    (["--expand", "3", "--rescore", "9"], "--rescore works with --index pq or ivfpq"),
    (["--expand", "99"], "--expand 99: each query ranks only 36 images"),
    (["--backbone", "token", "--expand", "1"], "--backbone token is evaluated as its authors do"),
])
def test_first_stage_options_that_do_not_fit(data, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--dataset", "tiny", "--level", "2", "--data", str(data), *words]) == 2
    assert said in capsys.readouterr().err


def test_an_adaptation_of_another_encoder_is_refused(data, tmp_path, capsys):
    torch.save({"layer.weight": torch.eye(3), "layer.bias": torch.zeros(3)}, tmp_path / "layer.pth")
    words = ["--adapt", str(tmp_path / "layer.pth")]
    assert main(["evaluate", "--dataset", "tiny", "--level", "2", "--data", str(data), *words]) == 2
    assert "takes descriptors of 3 components, mini gives" in capsys.readouterr().err


def test_a_folder_without_a_readable_image_is_said_to_be_one(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/broken.jpg").write_bytes(b"no image")
    assert index(tmp_path / "photos") == 0
    assert "1 could not be read" in capsys.readouterr().out
    assert main(["search", str(tmp_path / "index"), str(tmp_path / "photos/broken.jpg")]) == 2
    assert "no image in" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "index")]) == 0
    assert index(tmp_path / "photos") == 0


def test_a_broken_link_is_a_failed_image_and_read_when_it_is_repaired(photos, capsys):
    (photos / "link.jpg").symlink_to(photos.with_name("later.jpg"))
    for _ in range(2):
        assert index(photos) == 0
        assert "1 could not be read" in capsys.readouterr().out
    assert "link.jpg" in (photos.with_name("index") / "failures.csv").read_text()
    Image.open(photos / "D0001.jpg").rotate(90).save(photos.with_name("later.jpg"))
    assert index(photos) == 0
    assert "could not be read" not in capsys.readouterr().out


def codes_of(photos: Path, kind: str):
    "The compressed index of a folder, and the ids of its images."
    from patchify.folder_index import FolderIndex
    from patchify.indexfiles import open_index

    folder = photos.with_name("index")
    return open_index(folder / f"{kind}.index").gallery_ids.tolist(), FolderIndex.open(folder).readable["id"].tolist()


@pytest.mark.parametrize("kind", ["pq", "ivfpq"])
def test_a_compressed_index_follows_its_folder(photos, kind, capsys):
    assert index(photos, "--index", kind) == 0
    assert f"index: {kind} m=" in capsys.readouterr().out
    first, ids = codes_of(photos, kind)
    assert first == ids == list(range(12))
    Image.open(photos / "D0000.jpg").rotate(90).save(photos / "new.jpg")
    (photos / "D0001.jpg").unlink()
    Image.open(photos / "D0002.jpg").rotate(180).save(photos / "D0002.jpg")
    assert index(photos) == 0  # the kind is remembered
    after, ids = codes_of(photos, kind)
    assert after == ids and set(first) - set(after) == {1, 2} and len(after) == 12
    capsys.readouterr()
    assert main(["search", str(photos.with_name("index")), str(photos / "new.jpg"), "-k", "20"]) == 0
    told = capsys.readouterr()
    found = [line.split()[-1] for line in told.out.splitlines()]
    assert found[0] == "new.jpg" and sorted(found) == sorted(path.name for path in photos.iterdir())
    assert told.err.count("\n") == 1 and told.err.startswith(f"index: {kind} ")


def test_codes_are_made_by_the_first_search_that_needs_them_and_repaired(photos, monkeypatch, capsys):
    assert index(photos) == 0 and "index: exact" in capsys.readouterr().out
    folder = photos.with_name("index")
    search = ["search", str(folder), str(photos / "D0000.jpg"), "-k", "1", "--index", "pq"]
    with monkeypatch.context() as patch:
        patch.setattr("patchify.indexfiles.save_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert main(search) == 130
    assert main(["check", str(folder)]) == 0 and main(search) == 0
    capsys.readouterr()
    content = bytearray((folder / "pq.index").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "pq.index").write_bytes(content)
    assert main(["check", str(folder)]) == 2 and "pq.index is damaged" in capsys.readouterr().err
    assert index(photos, "--index", "pq") == 0 and main(["check", str(folder)]) == 0
    assert index(photos, "--index", "auto") == 0 and "index: exact" in capsys.readouterr().out.splitlines()[-1]


@pytest.fixture(scope="module")
def text_models(tmp_path_factory):
    "Small models of open_clip with both towers."
    open_clip = pytest.importorskip("open_clip", reason="needs the extra [text]")
    folder = tmp_path_factory.mktemp("models")
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    image = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    (folder / "small-towers.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": image, "text_cfg": text}))
    open_clip.add_model_config(folder)


def test_ilias_text_queries_are_evaluated_by_its_protocol(text_models, data, tmp_path, capsys):
    shutil.copytree(data / "tiny", tmp_path / "texts")
    ids = []
    for instance in sorted((tmp_path / "texts/ilias_core").iterdir()):
        (instance / "query/T000.txt").write_text(f"a photo of a {instance.name}\n")
        ids.append(f"{instance.name}/query/T000.txt")
    (tmp_path / "texts/image_ids/text_query_ids.txt").write_text("\n".join(ids))
    words = ["evaluate", "--dataset", f"ilias-text:{tmp_path / 'texts'}", "--level", "1", "--data", str(tmp_path)]
    model = ["--backbone", "small-towers", "--random-weights"]
    assert main([*words, *model, "--json", str(tmp_path / "found.json"), "--export", str(tmp_path / "found.pkl")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["queries"] == len(ids) and 0 <= found["map"] <= 100 and found["score"] == "mAP@1000"
    assert list(restricted_pickle.load(tmp_path / "found.pkl")["query_ids"]) == ids
    capsys.readouterr()
    for extra, said in ((["--backbone", "mini"], "--backbone siglip"), ([*model, "--size", "64"], "--size does not go")):
        assert main([*words, *extra]) == 2 and said in capsys.readouterr().err
