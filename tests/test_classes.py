"""Loaders of labelled collections: splits, boxes, MATLAB files, and what is said when a file is wrong."""
import struct
import zlib

import numpy as np
import pytest

from patchify.data.registry import LOADERS, load
from patchify.data.classes import LabelledSet, load_cars, load_cub, load_gldv2, load_gldv2_train, load_inshop, load_sop, read_mat


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
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
    birds = load_cub(cub(tmp_path, classes=4, each=1))
    task = birds.retrieval()
    assert [len(np.setdiff1d(p, j)) for p, j in zip(task.positives, task.junk)] == [0, 0]


def test_the_folder_above_is_found_too(tmp_path):
    cub(tmp_path / "CUB_200_2011")
    assert len(load(f"cub:{tmp_path}").queries) == len(load_cub(tmp_path / "CUB_200_2011").part("test"))


def test_every_task_is_registered():
    assert {"cub", "cars", "sop", "inshop", "gldv2"} <= LOADERS.keys()


@pytest.mark.parametrize("damage, message", [
    (lambda root: write(root / "image_class_labels.txt", "1 1\n"), "image 2 has no class"),
    (lambda root: write(root / "bounding_boxes.txt", "1 2 3\n"), "bounding_boxes.txt, line 1: expected 5 fields")])
def test_damaged_lists_are_named(tmp_path, damage, message):
    root = cub(tmp_path)
    damage(root)
    with pytest.raises(ValueError, match=message):
        load_cub(root)


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
    assert task.gallery["id"].tolist() == ["a/2.JPG", "a/3.JPG"] and [p.tolist() for p in task.positives] == [[0, 1], [0, 1]]


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


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def matrix(kind, name, *rest):
    return element(14, element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<ii", 1, 1)) + element(1, name.encode()) + b"".join(rest))


HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x100) + b"IM"


@pytest.mark.parametrize("kind, dtype", [(1, "i1"), (2, "u1"), (3, "i2"), (4, "u2"), (5, "i4"), (6, "u4"), (7, "f4"), (9, "f8"), (12, "i8"), (13, "u8")])
@pytest.mark.parametrize("compressed", [False, True])
def test_numbers_of_every_type(tmp_path, kind, dtype, compressed):
    values = np.array([1, 2, 100], dtype)
    body = matrix(6, "variable", element(kind, values.tobytes())) + matrix(4, "word", element(4, "naïve".encode("utf-16-le")))
    if compressed:
        packed = zlib.compress(body)
        body = struct.pack("<II", 15, len(packed)) + packed
    (tmp_path / "x.mat").write_bytes(HEADER + body)
    content = read_mat(tmp_path / "x.mat")
    assert content["variable"].tolist() == [1, 2, 100] and content["word"] == "naïve"


def test_parts_are_listed_when_one_is_missing(tmp_path):
    birds = load_cub(cub(tmp_path))
    assert isinstance(birds, LabelledSet)
    with pytest.raises(ValueError, match="no part 'query': it has test, train"):
        birds.part("query")
