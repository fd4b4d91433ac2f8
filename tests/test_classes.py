"""Loaders of class data sets: splits, boxes, MATLAB files, and what is said when a file is wrong."""
import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from patchify.data.classes import LabelledSet, class_numbers, load_cars, load_cub, load_gldv2_train, load_inshop, load_sop
from patchify.data.landmarks import load_gldv2
from patchify.data.lists import read_mat
from patchify.data.registry import LOADERS, load


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def cub(root, classes=4, each=2):
    rows = [(c * each + i + 1, c + 1, f"{c + 1:03d}.Bird{c}/{i}.jpg") for c in range(classes) for i in range(each)]
    write(root / "images.txt", "".join(f"{i} {path}\n" for i, _, path in rows))
    write(root / "image_class_labels.txt", "".join(f"{i} {c}\n" for i, c, _ in rows))
    write(root / "bounding_boxes.txt", "".join(f"{i} 1.0 2.0 10.0 20.0\n" for i, _, _ in rows))
    return root


def test_the_halves_share_no_class(tmp_path):
    birds = load_cub(cub(tmp_path / "CUB_200_2011", classes=6, each=3))
    train, test = (set(birds.part(name)["label"]) for name in ("train", "test"))
    assert len(train) == len(test) == 3 and not train & test and max(train) < min(test)
    assert birds.images["box"][0].tolist() == [1, 2, 11, 22]


def test_a_class_with_one_image_stays_a_query_without_positives(tmp_path):
    task = load_cub(cub(tmp_path, classes=4, each=1)).retrieval()
    assert [len(positives) for positives in task.positives] == [0, 0]
    assert [rows.tolist() for rows in task.junk] == [[0], [1]]


def test_the_folder_above_is_found_too(tmp_path):
    cub(tmp_path / "CUB_200_2011")
    assert len(load(f"cub:{tmp_path}").queries) == len(load_cub(tmp_path / "CUB_200_2011").part("test"))


def test_every_task_is_registered():
    assert {"cub", "cars", "sop", "inshop", "gldv2"} <= LOADERS.keys()


@pytest.mark.parametrize("file, text, message", [
    ("image_class_labels.txt", "1 1\n", "images.txt: image '2' has no class in image_class_labels.txt"),
    ("image_class_labels.txt", "1 one\n", "image_class_labels.txt, line 1: expected a number, got 'one'"),
    ("image_class_labels.txt", "1 1\n1 2\n", "line 2: '1' is listed twice, first in line 1"),
    ("bounding_boxes.txt", "1 2 3\n", "bounding_boxes.txt, line 1: expected 5 fields"),
    ("bounding_boxes.txt", "1 2 3 4 nan\n", "bounding_boxes.txt, line 1: expected a number, got 'nan'"),
    ("images.txt", "1 a b\n", "images.txt, line 1: expected 2 fields"),
])
def test_damaged_lists_are_named(tmp_path, file, text, message):
    root = cub(tmp_path)
    write(root / file, text)
    with pytest.raises(ValueError, match=message):
        load_cub(root)


def test_byte_order_marks_and_windows_line_ends_are_read(tmp_path):
    plain = load_cub(cub(tmp_path / "plain"))
    root = cub(tmp_path / "windows")
    for path in root.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_cub(root).images["path"].equals(plain.images["path"])


@pytest.mark.parametrize("loader, file", [
    (load_cub, "images.txt"), (load_cars, "cars_annos.mat"), (load_sop, "Ebay_train.txt"), (load_inshop, "list_eval_partition.txt"),
    (load_gldv2, "retrieval_solution"), (load_gldv2_train, "train_clean.csv")])
def test_an_empty_folder_is_refused(tmp_path, loader, file):
    with pytest.raises(ValueError, match=file):
        loader(tmp_path)


def test_sop_products_of_the_test_list_only(tmp_path):
    for part, rows in (("train", "1 7 1 a/1.JPG\n"), ("test", "2 8 1 a/2.JPG\n3 8 1 a/3.JPG\n")):
        write(tmp_path / f"Ebay_{part}.txt", "image_id class_id super_class_id path\n" + rows)
    task = load_sop(tmp_path).retrieval()
    assert task.gallery["id"].tolist() == ["a/2.JPG", "a/3.JPG"]
    assert [p.tolist() for p in task.positives] == [[1], [0]] and task.protocol.name == "sop"


def test_gldv2_needs_its_columns(tmp_path):
    write(tmp_path / "retrieval_solution_v2.1.csv", "id,images\na,b\n")
    write(tmp_path / "index.csv", "id\nb\n")
    with pytest.raises(ValueError, match="no column 'Usage'"):
        load_gldv2(tmp_path)


def test_a_subset_of_gldv2_queries_keeps_its_positives(tmp_path):
    from dataclasses import replace
    write(tmp_path / "retrieval_solution_v2.1.csv", "id,images,Usage\nqqq1,aaa1,Public\nqqq2,aaa2 aaa1,Public\n")
    write(tmp_path / "index.csv", "id\naaa1\naaa2\n")
    task = load_gldv2(tmp_path)
    rest = replace(task, queries=task.queries.iloc[[1]].reset_index(drop=True))
    assert [p.tolist() for p in rest.positives] == [[0, 1]] and task.queries["path"][0] == "test/q/q/q/qqq1.jpg"


def test_positives_outside_the_index_are_counted(tmp_path, capsys):
    write(tmp_path / "retrieval_solution_v2.1.csv", "id,images,Usage\nqqq1,aaa1 gone,Public\n")
    write(tmp_path / "index.csv", "id\naaa1\n")
    assert load_gldv2(tmp_path).positives[0].tolist() == [0]
    assert "1 positives are not in index.csv" in capsys.readouterr().err


def annotations(rows, fields=("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")):
    table = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for column, row in enumerate(rows):
        table[0, column] = row
    return table


@pytest.mark.parametrize("compressed", [False, True])
def test_cars_of_one_class_or_many(tmp_path, compressed):
    rows = [(f"car_ims/{i}.jpg", 3, 4, 30, 40, c) for i, c in enumerate([1, 2, 2])]
    scipy.io.savemat(tmp_path / "cars_annos.mat", {"annotations": annotations(rows)}, do_compression=compressed)
    cars = load_cars(tmp_path)
    assert cars.images["label"].tolist() == ["1", "2", "2"] and cars.images["part"].tolist() == ["train", "test", "test"]
    assert cars.images["box"][0].tolist() == [2, 3, 30, 40]


@pytest.mark.parametrize("content, message", [
    ({"annotations": annotations([("a",)], ("relative_im_path",))}, "annotation 1: no 'bbox_x1'"),
    ({"annotations": annotations([("a", 1, 2, 3, 4, 0)])}, "classes to count from 1, got 0"),
    ({"annotations": annotations([("a", 1, 2, 3, "x", 1)])}, "classes and boxes to be numbers"),
    ({"annotations": np.ones(3)}, "annotation 1: no 'relative_im_path'"),
    ({"other": 1}, "no variable 'annotations'"),
])
def test_a_cars_file_of_another_form_is_named(tmp_path, content, message):
    scipy.io.savemat(tmp_path / "cars_annos.mat", content)
    with pytest.raises(ValueError, match=message):
        load_cars(tmp_path)


def test_a_mat_file_that_expands_is_refused_before_it_does(tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", {"x": np.zeros(2**21)}, do_compression=True)
    assert (tmp_path / "x.mat").stat().st_size < 2**16
    with pytest.raises(ValueError, match="x.mat.*more than 1 MiB once decompressed"):
        read_mat(tmp_path / "x.mat", ["x"], limit=2**20)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_a_damaged_mat_file_is_read_or_named(tmp_path_factory, seed, flips):
    path = tmp_path_factory.mktemp("mat") / "cars_annos.mat"
    scipy.io.savemat(path, {"annotations": annotations([("a.jpg", 1, 2, 3, 4, 1), ("b.jpg", 1, 2, 3, 4, 2)])})
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(128, len(content), flips):
        content[at] = rng.integers(256)
    path.write_bytes(bytes(content))
    try:
        load_cars(path.parent)
    except ValueError as error:
        assert "cars_annos.mat" in str(error) and "\n" not in str(error)


def test_parts_are_listed_when_one_is_missing(tmp_path):
    birds = load_cub(cub(tmp_path))
    assert isinstance(birds, LabelledSet)
    with pytest.raises(ValueError, match="no part 'query': it has test, train"):
        birds.part("query")


def test_classes_are_numbered_in_the_order_of_text():
    numbers, names = class_numbers(["33", "4", "10", "2", "4"])
    assert names == ["10", "2", "33", "4"] and numbers.tolist() == [2, 3, 0, 1, 3]
