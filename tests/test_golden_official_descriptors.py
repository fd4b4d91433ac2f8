"""The authors' data files, against what their own readers deliver from them."""
import json
import shutil
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from official_fill import FOLDER

from patchify.files import read_pickle
from patchify.retrieval_set import revisited_setups
from patchify.rerank.official import DescriptorFile, read_globals, read_ground_truth, read_listed_images, read_shortlist
from patchify.rerank.shortlist import move_junk_last

pytest.importorskip("h5py")
DATA = FOLDER / "data"


@cache
def expected() -> dict:
    return json.loads((DATA / "expected.json").read_text())


def files(ending: str) -> list[str]:
    return [name for name in expected()["files"] if name.endswith(ending)]


def crc(array) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}"


def same_content(array, content: dict) -> None:
    array = np.asarray(array, content["dtype"])
    assert list(array.shape) == content["shape"] and crc(array) == content["crc32"]


@pytest.mark.parametrize("name", files("_local.hdf5"))
def test_local_descriptors(name, monkeypatch, tmp_path):
    content = expected()["files"][name]["content"]
    for folder in (tmp_path, DATA):  # virtual arrays must not depend on the working directory
        monkeypatch.chdir(folder)
        file = DescriptorFile((DATA / name).resolve())
        same_content(file.features[:], content)
    taken = file.take(np.arange(len(file)))
    columns = file.features[:]
    assert torch.equal(taken.values, torch.as_tensor(columns[..., 5:]))
    assert (taken.valid.numpy() == (columns[..., 3] == 0)).all() and len(taken.values) == content["shape"][0]


def test_a_lost_part_of_a_virtual_array_is_named(tmp_path):
    name = next(n for n in files("_local.hdf5") if "virtual_sources" in expected()["files"][n])
    shutil.copy(DATA / name, tmp_path / "local.hdf5")
    lost = expected()["files"][name]["virtual_sources"][0][0]
    with pytest.raises(ValueError, match=f"local.hdf5 links to {lost}"):
        DescriptorFile(tmp_path / "local.hdf5").take([0])


@pytest.mark.parametrize("name", files("_global.pt"))
def test_global_descriptors(name):
    content = expected()["files"][name]["content"]
    same_content(read_globals(DATA / name, *content["shape"]), content)
    with pytest.raises(ValueError, match="no multiple"):
        read_globals(DATA / name, content["shape"][0] + 4)


@pytest.mark.parametrize("name", [n for n in files(".pkl") if "/nn_" in n])
def test_shortlists(name):
    entry = expected()["files"][name]
    stored = read_pickle(DATA / name)
    same_content(stored, entry["content"])
    first = read_shortlist(DATA / name)
    assert first.ranks.tolist() == entry["ids"]
    assert np.array_equal(first.scores, np.asarray(entry["similarities"], np.float32))
    third = np.asarray(stored)[-1] if len(stored) == 3 else first.ranks
    assert np.array_equal(first.rows, third)


@pytest.mark.parametrize("name", files(".txt"))
def test_lists_of_images(name):
    lines = expected()["files"][name]["content"]
    table = read_listed_images(DATA / name)
    assert table["path"].tolist() == [line.split(",")[0] for line in lines]
    fields = [line.split(",")[1:] for line in lines]
    if len(fields[0]) in (1, 3):
        assert table["label"].tolist() == [int(row[0]) for row in fields]
        labels = sorted(set(table["label"]))
        assert [labels[i] for i in table["instance"]] == table["label"].tolist()
    if len(fields[0]) in (2, 3):
        assert table[["width", "height"]].to_numpy().tolist() == [[int(x) for x in row[-2:]] for row in fields]


@pytest.mark.parametrize("name", [n for n in files(".pkl") if "/gnd_" in n])
def test_ground_truth(name):
    entries = expected()["files"][name]["content"]["gnd"]
    table = read_ground_truth(DATA / name, 1 + max(max(ids) for e in entries for k, ids in e.items() if k != "bbx" and ids))
    for row, entry in zip(table.to_dict("records"), entries, strict=True):
        assert {k: v.tolist() for k, v in row.items()} == {k: v for k, v in entry.items() if k != "bbx"}


@cache
def elvis() -> dict:
    return json.loads((DATA / "elvis/expected.json").read_text())["files"]


@pytest.mark.parametrize("name", ["dinov2_gallery_local.hdf5", "dinov2_compound_local.hdf5"])
def test_descriptors_of_elvis(name):
    entry = elvis()[name]
    official = entry["official_reader_for_images_2_and_1"]
    taken = DescriptorFile(DATA / "elvis" / name).take([2, 1])
    same_content(taken.values.numpy(), official["descriptors"])
    assert (~taken.valid).int().tolist() == official["mask"]


def test_packed_bits_of_elvis():
    "The official reader fails on them; the compound file holds the same images."
    bits = DescriptorFile(DATA / "elvis/dinov2_bits_local.hdf5").take([2, 1])
    compound = DescriptorFile(DATA / "elvis/dinov2_compound_local.hdf5").take([2, 1])
    assert torch.equal(bits.valid, compound.valid)
    assert torch.equal(bits.values[bits.valid], compound.values[bits.valid])


def test_global_descriptors_of_elvis():
    content = elvis()["dinov2_gallery_cls.hdf5"]["content"]
    same_content(read_globals(DATA / "elvis/dinov2_gallery_cls.hdf5", content["shape"][0])[:], content)


@pytest.mark.parametrize("split", ["medium", "hard"])
def test_the_lists_that_locore_reads(split):
    "Junk is moved to the end; the first images of the moved list are read with their scales, masks and globals."
    official = expected()["locore_reader"]["result"][split]
    truth = read_ground_truth(DATA / "roxford5k/gnd_roxford5k.pkl")
    junk = revisited_setups(*(truth[name].tolist() for name in ("easy", "hard", "junk")))[split][1]
    first = move_junk_last(read_shortlist(DATA / "roxford5k/nn_superglobal.pkl"), junk)
    assert first.ranks.tolist() == official["ids"]
    assert np.array_equal(first.scores, np.asarray(official["similarities"], np.float32))
    batch = official["batch"]
    queries, top, count = (batch["gallery_local_features"]["shape"][i] for i in (0, 1, 2))
    sides = []
    for side in ("query", "gallery"):
        local = DATA / f"roxford5k/dinov2_{side}_local.hdf5"
        vectors = read_globals(DATA / f"roxford5k/dinov2_{side}_global.pt", len(DescriptorFile(local)))
        sides.append(DescriptorFile(local, count, vectors))
    ids = {"query": np.arange(queries), "gallery": first.ranks[:queries, :top].ravel()}
    for side, file in zip(("query", "gallery"), sides):
        taken = file.take(ids[side])
        arrays = {"local_features": taken.values, "local_scales": taken.scales, "local_mask": (~taken.valid).long(),
                  "global_features": taken.summary}
        for name, array in arrays.items():
            entry = batch[f"{side}_{name}"]
            same_content(array.numpy().reshape(entry["shape"]), entry)
