"Malformed data sets: the message names the file, the line or key, and what was expected."
import json
import pickle
import shutil

import numpy as np
import scipy.io
from PIL import Image

from campaign import Case
from patchify.data.classes import load_cars, load_cub, load_gldv2_train, load_inshop, load_sop
from patchify.data.folders import load_ilias, load_ilias_mini, read_boxes, read_ids, read_text_queries
from patchify.data.instre import load_instre
from patchify.data.landmarks import load_gldv2, load_revisited, load_revisited_1m
from patchify.data.lists import read_mat
from patchify.data.registry import load

BOM = b"\xef\xbb\xbf"


# FOLDERS WITH CORRECT FILES

def ilias(world):
    if not (world.path / "ilias").exists():
        shutil.copytree(world.shared / "tiny", world.path / "ilias")
    return world.path / "ilias"


LISTS = {
    "cub": (load_cub, {
        "images.txt": "1 001.A/a.jpg\n2 002.B/b.jpg\n3 001.A/c.jpg\n4 002.B/d.jpg\n",
        "image_class_labels.txt": "1 1\n2 2\n3 1\n4 2\n",
        "bounding_boxes.txt": "1 1 1 9 9\n2 1 1 9 9\n3 1 1 9 9\n4 1 1 9 9\n"}),
    "sop": (load_sop, {
        "Ebay_train.txt": "image_id class_id super_class_id path\n1 1 1 a\n2 1 1 b\n",
        "Ebay_test.txt": "image_id class_id super_class_id path\n3 2 1 c\n4 2 1 d\n"}),
    "inshop": (load_inshop, {
        "list_eval_partition.txt": "3\nimage item status\na.jpg id_1 train\nb.jpg id_2 query\nc.jpg id_2 gallery\n",
        "list_bbox_inshop.txt": "3\nh\na.jpg 1 1 0 0 9 9\nb.jpg 1 1 0 0 9 9\nc.jpg 1 1 0 0 9 9\n"}),
    "gldv2": (load_gldv2, {
        "index.csv": "id\nabc\nabd\n",
        "retrieval_solution_v2.1.csv": "id,images,Usage\nq1,abc,Public\nq2,abd,Private\n"}),
    "gldv2 train": (load_gldv2_train, {"train_clean.csv": "landmark_id,images\n7,abc abd\n8,abe\n"}),
}


def lists(world, name):
    folder = world.path / name
    folder.mkdir(exist_ok=True)
    for file, text in LISTS[name][1].items():
        (folder / file).write_text(text)
    return folder


def with_list(name, file, content, says, code=2):
    "One list of a data set replaced."
    def act(world):
        folder = lists(world, name)
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        return world.call(LISTS[name][0], folder)
    return Case(f"{name}, {file}: {content if content is None else content[:40]!r}", act, says, code)


def as_windows(name, file):
    "The same list with a byte-order mark and Windows line ends."
    def act(world):
        folder = lists(world, name)
        expected = LISTS[name][0](folder)
        text = LISTS[name][1][file]
        (folder / file).write_bytes(BOM + text.replace("\n", "\r\n").encode())
        outcome = world.call(LISTS[name][0], folder)
        assert repr(outcome.value) == repr(expected)
        return outcome
    return Case(f"{name}, {file}: byte-order mark and CRLF", act, "", 0)


CASES = [as_windows(name, file) for name, (_, files) in LISTS.items() for file in files]
CASES += [
    with_list("cub", "images.txt", None, "no images.txt in .*cub"),
    with_list("cub", "images.txt", "", "images.txt.*(empty|no images)"),
    with_list("cub", "images.txt", "1\n", r"images.txt, line 1: expected 2 fields \(image number, path\)"),
    with_list("cub", "images.txt", "1 a.jpg\n1 b.jpg\n", "images.txt, line 2: '1' is listed twice, first in line 1"),
    with_list("cub", "images.txt", b"1 \xff.jpg\n", "images.txt, line 1: expected UTF-8"),
    with_list("cub", "images.txt", b"\x00\x01\x02", "images.txt, line 1"),
    with_list("cub", "image_class_labels.txt", "1 one\n", "image_class_labels.txt, line 1: expected a number"),
    with_list("cub", "image_class_labels.txt", "1 1\n", "image '2' has no class in image_class_labels.txt"),
    with_list("cub", "image_class_labels.txt", "1 1\n1 2\n", "line 2: '1' is listed twice"),
    with_list("cub", "image_class_labels.txt", "1 nan\n", "line 1: expected a number, got 'nan'"),
    with_list("cub", "image_class_labels.txt", "1 1.5\n2 2\n3 1\n4 2\n", "line 1: expected a whole number"),
    with_list("cub", "bounding_boxes.txt", "1 1 1 nine 9\n", "bounding_boxes.txt, line 1: expected a number"),
    with_list("cub", "bounding_boxes.txt", "1 1 1 9\n", "bounding_boxes.txt, line 1: expected 5 fields"),
    with_list("cub", "bounding_boxes.txt", "1 1 1 9 9\n1 2 2 9 9\n", "bounding_boxes.txt, line 2: '1' is listed twice"),
    with_list("cub", "bounding_boxes.txt", "1 1 1 -9 9\n", "bounding_boxes.txt, line 1: expected .*positive"),
    with_list("cub", "bounding_boxes.txt", "1 inf 1 9 9\n", "bounding_boxes.txt, line 1: expected a number, got 'inf'"),
    with_list("sop", "Ebay_train.txt", "h\n1 1 a\n", "Ebay_train.txt, line 2: expected 4 fields"),
    with_list("sop", "Ebay_test.txt", None, "Ebay_test.txt"),
    with_list("sop", "Ebay_test.txt", "h\n3 2 1 c\n4 2 1 c\n", "Ebay_test.txt, line 3: 'c' is listed twice"),
    with_list("sop", "Ebay_test.txt", "h\n3 2 1 a\n", "'a' is in both|listed twice"),
    with_list("inshop", "list_eval_partition.txt", "1\nh\na.jpg id_1 trian\n", "line 3: expected train, query or gallery"),
    with_list("inshop", "list_eval_partition.txt", "1\nh\na.jpg id_1\n", "line 3: expected 3 fields"),
    with_list("inshop", "list_eval_partition.txt", "1\nh\na.jpg i train\na.jpg i query\n", "line 4: 'a.jpg' is listed twice"),
    with_list("inshop", "list_bbox_inshop.txt", "1\nh\na.jpg 1 1 0 0 9\n", "list_bbox_inshop.txt, line 3: expected 7 fields"),
    with_list("inshop", "list_bbox_inshop.txt", "1\nh\na.jpg 1 1 9 9 0 0\n", "list_bbox_inshop.txt, line 3: expected .*x1 < x2"),
    with_list("gldv2", "index.csv", "name\nabc\n", "index.csv: no column 'id'"),
    with_list("gldv2", "index.csv", "", "index.csv: no column 'id'"),
    with_list("gldv2", "index.csv", "id\nabc\nabc\n", "index.csv: 'id' lists 'abc' twice"),
    with_list("gldv2", "index.csv", None, "index.csv"),
    with_list("gldv2", "retrieval_solution_v2.1.csv", "id,images\nq,abc\n", "no column 'Usage'"),
    with_list("gldv2", "retrieval_solution_v2.1.csv", "id,images,Usage\nq,abc\n", "line 2: expected 3 columns"),
    with_list("gldv2", "retrieval_solution_v2.1.csv", "id,images,Usage\nq,xyz,Public\n",
              "1 positives are not in index.csv", 0),
    with_list("gldv2", "retrieval_solution_v2.1.csv", "id,images,Usage\nq,abc,Public\nq,abd,Public\n", "lists 'q' twice"),
    with_list("gldv2", "retrieval_solution_v2.1.csv", "id,images,Usage\nq,abc,Pubic\n", "line 2: expected .*Public"),
    with_list("gldv2 train", "train_clean.csv", "landmark,images\n", "no column 'landmark_id'"),
    with_list("gldv2 train", "train_clean.csv", "landmark_id,images\n7\n", "line 2: expected 2 columns"),
    with_list("gldv2 train", "train_clean.csv", "landmark_id,images\n7,abc abc\n", "'abc' is listed twice"),
    with_list("gldv2 train", "train_clean.csv", 'landmark_id,images\n7,"abc\n', "train_clean.csv"),
]


# ILIAS

def with_ilias(name, change, says, code=2, read=load_ilias):
    def act(world):
        folder = ilias(world)
        change(folder)
        return world.call(read, folder)
    return Case(f"ilias: {name}", act, says, code)


def first(folder, pattern):
    return sorted(folder.rglob(pattern))[0]


def write(pattern, content):
    def change(folder):
        first(folder, pattern).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def append(pattern, text):
    def change(folder):
        path = first(folder, pattern)
        path.write_text(path.read_text() + text)
    return change


def repeat_line(pattern):
    def change(folder):
        path = first(folder, pattern)
        path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    return change


def as_crlf(pattern):
    def change(folder):
        path = first(folder, pattern)
        path.write_bytes(BOM + path.read_bytes().replace(b"\n", b"\r\n"))
    return change


def taxonomy(text):
    def change(folder):
        (folder / "taxonomy.json").write_text(text)
    return change


BOX = "P*_bbox.txt"
CASES += [
    with_ilias("no such folder", lambda folder: shutil.rmtree(folder), "no such folder: .*ilias"),
    with_ilias("an empty folder", lambda folder: shutil.rmtree(folder / "ilias_core"), "image_query_ids.txt lists"),
    with_ilias("no positives", lambda folder: [p.unlink() for p in folder.rglob("pos/*.jpg")], "positive_ids.txt lists"),
    with_ilias("box of three numbers", write(BOX, "1 2 3\n"), r"_bbox.txt, line 1: expected `x y width height`"),
    with_ilias("box of words", write(BOX, "a b c d\n"), r"_bbox.txt, line 1: expected"),
    with_ilias("box with a nan", write(BOX, "1 2 nan 4\n"), r"_bbox.txt, line 1: expected"),
    with_ilias("box without area", write(BOX, "1 2 0 4\n"), r"_bbox.txt, line 1: expected"),
    with_ilias("box outside", write(BOX, "9000 2 9 4\n"), "1 box mostly outside the image dropped", 0),
    with_ilias("box of bytes", write(BOX, b"\xff\xfe"), r"_bbox.txt, line 1: expected UTF-8"),
    with_ilias("box in scientific notation", write(BOX, "1e1 2 3e1 4\n"), "", 0),
    with_ilias("boxes with CRLF", as_crlf(BOX), "", 0),
    with_ilias("query list with CRLF", as_crlf("image_query_ids.txt"), "", 0),
    with_ilias("positive list with CRLF", as_crlf("positive_ids.txt"), "", 0),
    with_ilias("a query listed twice", repeat_line("image_query_ids.txt"), "image_query_ids.txt, line .*listed twice"),
    with_ilias("a positive listed twice", repeat_line("positive_ids.txt"), "positive_ids.txt, line .*listed twice"),
    with_ilias("a positive that is not there", append("positive_ids.txt", "x/pos/P.jpg,0.1,3\n"), "P.jpg.*no such file"),
    with_ilias("a query that is not there", append("image_query_ids.txt", "x/query/Q.jpg\n"), "Q.jpg.*no such file"),
    with_ilias("a scale that is no number", append("positive_ids.txt", "x/pos/P.jpg,big,3\n"), "positive_ids.txt, line .*numbers"),
    with_ilias("a scale that is nan", append("positive_ids.txt", "x/pos/P.jpg,nan,3\n"), "positive_ids.txt, line .*numbers"),
    with_ilias("a line without an id", append("positive_ids.txt", ",0.1,3\n"), "positive_ids.txt, line .*an id"),
    with_ilias("an id that leads outside", append("image_query_ids.txt", "../../etc/query/passwd.jpg\n"), "no such file"),
    with_ilias("a taxonomy that is a list", taxonomy("[1, 2]"), "taxonomy.json is not a taxonomy"),
    with_ilias("a taxonomy cut short", taxonomy('{"a": {'), "taxonomy.json is not a taxonomy"),
    with_ilias("a taxonomy of numbers", taxonomy('{"a": {"b": {"c": [1]}}}'), "taxonomy.json is not a taxonomy"),
    with_ilias("an instance in two categories",
               taxonomy('{"a": {"b": {"c": ["cup"]}}, "d": {"e": {"f": ["cup"]}}}'), "taxonomy.json.*'cup'.*twice"),
    with_ilias("a deeply nested taxonomy", taxonomy("[" * 100_000), "taxonomy.json is not a taxonomy"),
    with_ilias("no mini list", lambda folder: None, "mini_ilias_yfcc100m_ids.txt", read=load_ilias_mini),
    with_ilias("text queries that are not there", lambda folder: None, "text_query_ids.txt lists .*no such file",
               read=read_text_queries),
]


# ROXFORD, RPARIS

def truth(**changes):
    entries = [dict(bbx=[1, 2, 30, 40], easy=[0], hard=[1], junk=[2]), dict(bbx=[1, 2, 30, 40], easy=[3], hard=[], junk=[])]
    entries[0] |= changes.pop("entry", {})
    for name in changes.pop("without", ()):
        del entries[0][name]
    return dict(gnd=entries, imlist=list("abcd"), qimlist=["q", "r"]) | changes


def revisited(name, content, says, code=2):
    def act(world):
        path = world.path / "gnd_roxford5k.pkl"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        return world.call(load_revisited, world.path)
    return Case(f"revisited: {name}", act, says, code)


class Evil:
    def __reduce__(self):
        import os
        return os.system, ("touch /tmp/patchify-was-here",)


FILE = r"gnd_roxford5k\.pkl"
CASES += [
    revisited("correct", truth(), "", 0),
    revisited("an image easy and hard", truth(entry=dict(hard=[0])), f"{FILE}, query 0: image 0 is listed twice"),
    revisited("an image listed twice", truth(entry=dict(easy=[0, 0])), f"{FILE}, query 0: image 0 is listed twice"),
    revisited("an image easy and junk", truth(entry=dict(junk=[0])), f"{FILE}, query 0: image 0 is listed twice"),
    revisited("an image beyond the gallery", truth(entry=dict(easy=[99])), f"{FILE}, query 0: 'easy' names images"),
    revisited("a negative image", truth(entry=dict(easy=[-1])), f"{FILE}, query 0: 'easy' names images"),
    revisited("a nan", truth(entry=dict(easy=[float("nan")])), f"{FILE}, query 0: expected 'easy' to be a list of integers"),
    revisited("words", truth(entry=dict(easy=["a"])), f"{FILE}, query 0: expected 'easy' to be a list of integers"),
    revisited("no easy", truth(without=["easy"]), f"{FILE}, query 0: no 'easy'"),
    revisited("no box", truth(without=["bbx"]), f"{FILE}, query 0: expected 'bbx'"),
    revisited("an inverted box", truth(entry=dict(bbx=[30, 2, 1, 40])), f"{FILE}, query 0: expected 'bbx'"),
    revisited("a box of three", truth(entry=dict(bbx=[30, 2, 1])), f"{FILE}, query 0: expected 'bbx'"),
    revisited("a box with nan", truth(entry=dict(bbx=[1, 2, float("nan"), 40])), f"{FILE}, query 0: expected 'bbx'"),
    revisited("one query too many", truth(qimlist=["q", "r", "s"]), f"{FILE}: 3 query images but ground truth for 2"),
    revisited("a gallery name twice", truth(imlist=list("aacd")), f"{FILE}: 'imlist' lists 'a' twice"),
    revisited("a query name twice", truth(qimlist=["q", "q"]), f"{FILE}: 'qimlist' lists 'q' twice"),
    revisited("no imlist", {"gnd": []}, f"{FILE}: expected a dictionary with the list 'imlist'"),
    revisited("a list", [1, 2], f"{FILE}: expected a dictionary"),
    revisited("a number", 7, f"{FILE}: expected a dictionary"),
    revisited("empty", b"", f"{FILE} as plain data"),
    revisited("text", b"hello", f"{FILE} as plain data"),
    revisited("cut short", pickle.dumps(truth())[:50], f"{FILE} as plain data"),
    revisited("code", pickle.dumps(Evil()), f"{FILE} as plain data: it contains posix.system"),
    revisited("a pickle bomb", b"\x80\x04" + b"X\xff\xff\xff\x7f" + b"a", f"{FILE} as plain data"),
    revisited("numpy arrays", truth(entry=dict(easy=np.array([0]), hard=np.array([1]))), "", 0),
    Case("revisited: no ground truth", lambda world: world.call(load_revisited, world.path), "expected one gnd_.*pkl"),
    Case("revisited: no distractors", lambda world: world.call(load_revisited_1m, world.path), "no folder revisitop1m"),
]


# MATLAB FILES

def mat(name, content, says, read=load_instre, file="gnd_instre.mat", code=2):
    def act(world):
        path = world.path / file
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            scipy.io.savemat(path, content)
        return world.call(read, world.path)
    return Case(f"{file}: {name}", act, says, code)


def bomb(world):
    "A small file that holds more than the limit once decompressed."
    path = world.path / "cars_annos.mat"
    scipy.io.savemat(path, {"annotations": np.zeros(2**25 + 1)}, do_compression=True)
    return world.call(read_mat, path, ["annotations"])


CARS = [("relative_im_path", object)] + [(f"bbox_{side}", object) for side in ("x1", "y1", "x2", "y2")] + [("class", object)]
CASES += [
    mat("missing", None, "cannot read .*gnd_instre.mat"),
    mat("empty", b"", "cannot read .*gnd_instre.mat"),
    mat("text", b"hello", "cannot read .*gnd_instre.mat"),
    mat("a folder of zeros", bytes(300), "cannot read .*gnd_instre.mat|no variable"),
    mat("another variable", {"other": 1}, "gnd_instre.mat: no variable 'gnd'"),
    mat("missing", None, "no cars_annos.mat", load_cars, "cars_annos.mat"),
    mat("another variable", {"other": 1}, "cars_annos.mat: no variable 'annotations'", load_cars, "cars_annos.mat"),
    mat("numbers", {"annotations": np.ones(3)}, "cars_annos.mat, annotation 1: no 'relative_im_path'", load_cars,
        "cars_annos.mat"),
    mat("class 0", {"annotations": np.array([("a.jpg", 1, 1, 9, 9, 0)], CARS)}, "expected classes to count from 1",
        load_cars, "cars_annos.mat"),
    Case("cars_annos.mat: more than 256 MiB decompressed", bomb, "more than 256 MiB once decompressed"),
]


# NAMES OF DATA SETS

CASES += [
    Case("registry: unknown name", lambda world: world.call(load, "roxfrd5k:x"), "unknown data set.*did you mean roxford5k"),
    Case("registry: no folder", lambda world: world.call(load, "ilias:"), "needs a folder: write ilias:DIR"),
    Case("registry: no colon", lambda world: world.call(load, "cub"), "needs a folder: write cub:DIR"),
    Case("registry: a missing folder", lambda world: world.call(load, f"cub:{world.path}/none"), "no images.txt in"),
    Case("registry: a URL", lambda world: world.call(load, "ilias:https://example.org/ilias"), "is a URL.*download"),
    Case("registry: a file", lambda world: world.call(load, f"ilias:{world.photos() / '1.png'}"), "1.png is a file|no such folder"),
    Case("registry: unknown protocol", lambda world: world.call(load, f"ilias:{ilias(world)}", "data", "esay"),
         "did you mean easy"),
    Case("registry: a protocol that does not fit", lambda world: world.call(load, f"ilias:{ilias(world)}", "data", "easy"),
         "protocol 'easy' does not fit"),
    Case("read_boxes: a missing file", lambda world: world.call(read_boxes, world.path / "a_bbox.txt"), "a_bbox.txt"),
    Case("read_ids: a folder", lambda world: world.call(read_ids, world.path), "cannot read"),
]
