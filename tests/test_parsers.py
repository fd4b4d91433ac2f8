"""Every reader of a data-set file: any content gives a data set or one ValueError that names the file."""
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from patchify.data.classes import load_cub, load_gldv2_train, load_inshop, load_sop
from patchify.data.folders import read_boxes, read_ids, read_taxonomy
from patchify.data.ilias_files import load_ilias_features
from patchify.data.instre import load_instre
from patchify.data.landmarks import load_gldv2, load_revisited, read_distractors, read_gldv2_truth, read_revisited
from patchify.data.lists import read_image_list, read_lines

READERS = {
    "image list": ("test_gallery.txt", lambda root: read_image_list(root / "test_gallery.txt")),
    "distractors": ("imlist.txt", read_distractors),
    "boxes": ("a_bbox.txt", lambda root: read_boxes(root / "a_bbox.txt", (100, 100))),
    "ids": ("positive_ids.txt", lambda root: read_ids(root / "positive_ids.txt", 2)),
    "taxonomy": ("taxonomy.json", read_taxonomy),
    "revisited": ("gnd_rparis6k.pkl", load_revisited),
    "gldv2 truth": ("gnd_gldv2-test.pkl", lambda root: read_gldv2_truth(root / "gnd_gldv2-test.pkl")),
    "gldv2 index": ("index.csv", load_gldv2),
    "gldv2 training": ("train_clean.csv", load_gldv2_train),
    "cub images": ("images.txt", load_cub),
    "cub classes": ("image_class_labels.txt", load_cub),
    "cub boxes": ("bounding_boxes.txt", load_cub),
    "sop": ("Ebay_test.txt", load_sop),
    "inshop": ("list_eval_partition.txt", load_inshop),
    "features": ("features_positives.hdf5", load_ilias_features),
}
GOOD = {
    "a_bbox.txt": "1 2 30 40\n", "positive_ids.txt": "cup/pos/P0.jpg,0.1,3\n", "taxonomy.json": '{"a": {"b": {"c": ["cup"]}}}',
    "imlist.txt": "0/a.jpg\n", "test_gallery.txt": "a.jpg,30,20\n", "index.csv": "id\nabc\n", "train_clean.csv": "landmark_id,images\n7,abc abd\n",
    "retrieval_solution_v2.1.csv": "id,images,Usage\nq,abc,Public\n", "images.txt": "1 001.A/a.jpg\n2 002.B/b.jpg\n",
    "image_class_labels.txt": "1 1\n2 2\n", "bounding_boxes.txt": "1 1 1 9 9\n2 1 1 9 9\n", "Ebay_train.txt": "h\n1 1 1 a\n", "Ebay_test.txt": "h\n2 2 1 b\n3 2 1 c\n",
    "list_eval_partition.txt": "1\nh\na.jpg id_1 train\nb.jpg id_2 query\nc.jpg id_2 gallery\n",
}


def fill(root: Path, file: str, content: bytes) -> Path:
    "A folder of correct lists in which one file has the given content; files of other data sets stay away."
    for name, text in GOOD.items():
        (root / name).write_text(text)
    (root / file).write_bytes(content)
    return root


def reads_or_names(root: Path, file: str, read) -> None:
    try:
        read(root)
    except ValueError as error:
        assert file in str(error) and "\n" not in str(error), error


TEXTS = st.lists(st.text(st.sampled_from("0123 ,.-+aex/\"{}[]:_\t\ufeff\r\x00é"), max_size=20), max_size=5).map(lambda lines: "\n".join(lines).encode())


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=15, deadline=None)
@given(st.one_of(st.binary(max_size=60), TEXTS))
def test_any_content_is_read_or_named(tmp_path_factory, kind, content):
    file, read = READERS[kind]
    if kind == "revisited":
        root = tmp_path_factory.mktemp("parse")
        (root / file).write_bytes(content)
    else:
        root = fill(tmp_path_factory.mktemp("parse"), file, content)
    if kind == "features":
        import h5py
        with h5py.File(root / "features_image_queries.hdf5", "w") as out:
            out["features"], out["index"] = np.ones((1, 4), np.float32), ["cup/query/Q0.jpg"]
    reads_or_names(root, file, read)


PLAIN = st.recursive(st.none() | st.integers(-3, 9) | st.floats() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=4), max_leaves=6)
ENTRY = st.dictionaries(st.sampled_from(["bbx", "easy", "hard", "junk", "ok"]), PLAIN | st.lists(st.integers(0, 4), max_size=4), max_size=5)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(["gnd", "imlist", "qimlist"]), st.lists(ENTRY | PLAIN, max_size=3) | PLAIN, max_size=3))
def test_any_plain_pickle_is_read_or_named(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("truth")
    for name, read in (("gnd_rparis6k.pkl", read_revisited), ("gnd_gldv2-test.pkl", read_gldv2_truth)):
        (root / name).write_bytes(pickle.dumps(content))
        reads_or_names(root, name, lambda folder: read(folder / name))


@pytest.mark.parametrize("file, text, message", [
    ("test_gallery.txt", "a.jpg,30\nb.jpg,30,20\n", "line 2: expected 2 fields"),
    ("test_gallery.txt", "a,1,2\na,1,2\n", "line 2: 'a' is listed twice, first in line 1"),
    ("test_gallery.txt", "a,b,c,d,e\n", r"line 1: expected path\[,class\]"),
    ("test_gallery.txt", "a,3,nan\n", "line 1: expected a number, got 'nan'"),
    ("test_gallery.txt", "", "is empty"),
])
def test_a_wrong_image_list_is_named(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        read_image_list(tmp_path / file)


def test_lines_end_at_line_feeds_only(tmp_path):
    (tmp_path / "list.txt").write_text("one\x0btwo\u2028three\nfour", encoding="utf-8")
    assert read_lines(tmp_path / "list.txt") == [(1, "one\x0btwo\u2028three"), (2, "four")]


# INSTRE

def instre(root, boxes=((1, 2, 9, 8),), positives=((1, 3),), queries=("q/1.jpg",), gallery=("a/1.jpg", "a/2.jpg", "b/1.jpg")):
    truth = np.zeros((1, len(positives)), dtype=[("ok", object), ("bbx", object)])
    for column, (rows, box) in enumerate(zip(positives, boxes)):
        truth[0, column] = (np.array([rows]), np.array([box], float))
    scipy.io.savemat(root / "gnd_instre.mat", {"gnd": truth, "imlist": np.array(gallery, object)[None], "qimlist": np.array(queries, object)[None]})
    return root


def test_instre_counts_from_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.txt").write_text("1 2 10 20\n5 5 10 10\n")
    task = load_instre(instre(tmp_path))
    assert [rows.tolist() for rows in task.positives] == [[0, 2]] and task.protocol.name == "instre"
    assert task.queries["box"][0].tolist() == [1, 2, 9, 8] and [len(boxes) for boxes in task.gallery["boxes"]] == [2, 0, 0]


def test_instre_boxes_that_are_no_corners_are_sizes(tmp_path):
    task = load_instre(instre(tmp_path, boxes=((1, 2, 9, 8), (30, 40, 9, 8)), positives=((1,), (2,)), queries=("q/1.jpg", "q/2.jpg")))
    assert [box.tolist() for box in task.queries["box"]] == [[1, 2, 10, 10], [30, 40, 39, 48]]


@pytest.mark.parametrize("changed, message", [
    (dict(positives=((0, 1),)), "query 0: expected distinct positives between 1 and 3"),
    (dict(positives=((2, 2),)), "query 0: expected distinct positives"),
    (dict(boxes=((1, 2, 3),)), "query 0: expected a box of four numbers"),
    (dict(queries=("q/1.jpg", "q/2.jpg")), "2 query images but ground truth for 1"),
    (dict(gallery=("a/1.jpg", "a/1.jpg", "b/1.jpg")), "'imlist' lists an image twice"),
])
def test_a_wrong_instre_file_is_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=f"gnd_instre.mat.*{message}"):
        load_instre(instre(tmp_path, **changed))
