"""Revisited Oxford and Paris: a folder in the true layout, pickles of both Pythons, and pickles that must not run."""
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchify.data.registry import load
from patchify.data.landmarks import load_revisited
from patchify.files import read_pickle


def make(root, arrays=True, protocol=2, **changed):
    (root / "jpg").mkdir(parents=True)
    for name in ("a_000001", "b_000002", "c_000003", "d_000004", "q_000001"):
        Image.new("RGB", (30, 20), "red").save(root / "jpg" / f"{name}.jpg")
    form = np.array if arrays else list
    truth = {"gnd": [{"bbx": [1.5, 2.0, 20.0, 18.0], "easy": form([2]), "hard": form([0]), "junk": form([3]), "ok": form([0, 2])}],
             "imlist": ["a_000001", "b_000002", "c_000003", "d_000004"], "qimlist": ["q_000001"]} | changed
    (root / "gnd_rparis6k.pkl").write_bytes(pickle.dumps(truth, protocol))
    return root


@pytest.mark.parametrize("arrays", [True, False])
@pytest.mark.parametrize("protocol", [2, 5])
def test_the_three_protocols(tmp_path, arrays, protocol):
    task = load_revisited(make(tmp_path / "rparis6k", arrays, protocol))
    read = {name: (task.under(name).positives[0].tolist(), task.under(name).junk[0].tolist()) for name in ("easy", "medium", "hard")}
    assert read == {"easy": ([2], [0, 3]), "medium": ([0, 2], [3]), "hard": ([0], [2, 3])}
    assert task.name == "rparis6k" and task.protocol.name == "medium" and task.queries["box"][0].tolist() == [1.5, 2.0, 20.0, 18.0]
    assert all(Path(task.file(path)).exists() for path in [*task.queries["path"], *task.gallery["path"]])
    with pytest.raises(ValueError, match="unknown protocol"):
        task.under("harder")


def test_distractors_stand_behind_and_are_found(tmp_path):
    root, extra = make(tmp_path / "rparis6k"), tmp_path / "revisitop1m"
    (extra / "jpg/1a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(extra / "jpg/1a/x.jpg")
    (extra / "revisitop1m.txt").write_text("1a/x.jpg\n")
    task = load_revisited(root, "hard", extra)
    assert len(task.gallery) == 5 and task.positives[0].tolist() == [0] and os.path.exists(task.file(task.gallery["path"][4]))


def test_it_is_loaded_by_what_a_user_types(tmp_path):
    make(tmp_path / "rparis6k")
    assert load(f"rparis6k:{tmp_path / 'rparis6k'}").name == "rparis6k"


GOOD = {"bbx": [1, 2, 20, 18], "easy": [2], "hard": [0], "junk": [3]}


@pytest.mark.parametrize("changed, message", [
    ({"imlist": ["a_000001"]}, "query 0: 'easy' names images 2..2, but the gallery holds 1"),
    ({"imlist": ["a", "b", "a", "c"]}, "'imlist' lists 'a' twice"),
    ({"qimlist": []}, "0 query images but ground truth for 1"),
    ({"gnd": [{"easy": [0]}]}, "query 0: no 'hard'"),
    ({"gnd": [GOOD | {"bbx": [1, 2, 3]}]}, "query 0: expected 'bbx' to be x0, y0, x1, y1"),
    ({"gnd": [GOOD | {"bbx": [1, 2, 3, float("nan")]}]}, "query 0: expected 'bbx'"),
    ({"gnd": [GOOD | {"hard": [2]}]}, "query 0: image 2 is listed twice in easy, hard, junk"),
    ({"gnd": [GOOD | {"hard": [0.5]}]}, "query 0: expected 'hard' to be a list of integers"),
    ({"gnd": [GOOD | {"hard": "all"}]}, "query 0: expected 'hard' to be a list of integers"),
    ({"gnd": 3}, "expected a dictionary with the list 'gnd'"),
])
def test_truth_that_does_not_fit_is_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        load_revisited(make(tmp_path / "rparis6k", **changed))


@pytest.mark.parametrize("name", ["revisitop1m.txt", "test_gallery.txt", "imlist.txt"])
def test_the_million_distractors_under_each_of_their_names(tmp_path, name):
    make(tmp_path / "rparis6k")
    (tmp_path / "revisitop1m").mkdir()
    (tmp_path / "revisitop1m" / name).write_bytes(b"\xef\xbb\xbf1a/x.jpg\r\n1b/y.jpg\r\n")
    task = load(f"rparis6k+1m:{tmp_path / 'rparis6k'}")
    assert task.gallery["id"].tolist()[4:] == ["1a/x.jpg", "1b/y.jpg"]
    (tmp_path / "revisitop1m" / name).write_text("1a/x.jpg\n1a/x.jpg\n")
    with pytest.raises(ValueError, match=f"{name}, line 2: '1a/x.jpg' is listed twice"):
        load(f"rparis6k+1m:{tmp_path / 'rparis6k'}")


def test_a_folder_without_truth_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected one gnd_"):
        load_revisited(tmp_path)


class Runs:
    def __reduce__(self):
        return (os.system, ("exit 1",))


class RunsThroughNumpy:
    def __reduce__(self):
        return (np.load, ("/etc/hostname",))


@pytest.mark.parametrize("content", [Runs(), RunsThroughNumpy(), {"gnd": [Runs()]}, Path("x")])
def test_nothing_that_runs_is_read(tmp_path, content):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="bad.pkl as plain data"):
        read_pickle(tmp_path / "bad.pkl")


@pytest.mark.parametrize("bytes_", [b"", b"not a pickle", b"\x80\x05\x95"])
def test_a_damaged_file_is_named(tmp_path, bytes_):
    (tmp_path / "bad.pkl").write_bytes(bytes_)
    with pytest.raises(ValueError, match="bad.pkl"):
        read_pickle(tmp_path / "bad.pkl")
