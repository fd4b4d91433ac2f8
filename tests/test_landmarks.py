"The official training files: read piece by piece, checked against each other, refused with a reason."
import pickle

import numpy as np
import pytest
import torch

from patchify.rerank.ames_training import draw_pairs
from patchify.rerank.official import DescriptorFile, load_landmarks, read_listed_images, read_shortlist
from patchify.rerank.locore_training import draw_lists
from patchify.rerank.shortlist import from_columns

N, T, C = 9, 6, 8


@pytest.fixture
def table() -> np.ndarray:
    "Nine images of three landmarks; the last has two real descriptors."
    draw = np.random.default_rng(0)
    table = draw.normal(size=(N, T, 5 + C)).astype(np.float32)
    table[..., 2], table[..., 3] = draw.integers(0, 3, (N, T)), 0
    table[8, 2:] = 0
    table[8, 2:, 3] = 1
    return table


@pytest.fixture
def folder(tmp_path, table):
    np.save(tmp_path / "local.npy", table)
    (tmp_path / "train.txt").write_text("".join(f"{i}.jpg,{(5, 300, 2)[i // 3]},480,640\n" for i in range(N)))
    ranks = np.array([[i, *np.roll(np.arange(N), -i - 1)[:-1]] for i in range(N)])
    (tmp_path / "nn.pkl").write_bytes(pickle.dumps(np.stack([np.linspace(1, 0, N) + 0 * ranks, ranks]).astype(np.float32)))
    return tmp_path


class OnlyIncreasing:
    "An array on disk that takes index lists only as HDF5 does."
    def __init__(self, array):
        self.array, self.shape, self.read = array, array.shape, 0

    def __getitem__(self, where):
        ids, columns = where
        assert (np.diff(ids) > 0).all(), "HDF5 wants each row once, in increasing order"
        self.read += len(ids)
        return self.array[ids, columns]


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("values", "valid", "scales"))


@pytest.mark.parametrize("top", [None, 1, 4, 50])
@pytest.mark.parametrize("ids", [[3], [8, 0, 8, 8, 2], list(range(N))])
def test_rows_are_read_in_the_order_of_the_disk_and_returned_in_that_of_the_ids(folder, table, top, ids):
    file = DescriptorFile(folder / "local.npy", top)
    watched = file.__dict__["features"] = OnlyIncreasing(table)
    assert same(file.take(ids), from_columns(table, top).take(ids))
    assert watched.read == len(set(ids))
    assert (len(file), file.count) == (N, min(top or T, T))


def test_hdf5_equals_the_array(folder, table):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "local.hdf5", "w") as file:
        file["features"] = table
    assert same(DescriptorFile(folder / "local.hdf5", 4).take([7, 1, 7]), from_columns(table, 4).take([7, 1, 7]))
    with h5py.File(folder / "other.hdf5", "w") as file:
        file["descriptors"] = table
    with pytest.raises(ValueError, match="no array named features, only descriptors"):
        DescriptorFile(folder / "other.hdf5")
    data = load_landmarks(folder / "local.hdf5", folder / "train.txt", folder / "nn.pkl")
    assert draw_lists(data.gallery, data.instance, data.first.ranks, np.random.default_rng(0), 2, 5)[1].shape == (2, 5)


def test_the_three_files_make_batches(folder, table):
    table[..., 5:].mean(1).astype(np.float32).tofile(folder / "global.bin")
    data = load_landmarks(folder / "local.npy", folder / "train.txt", folder / "nn.pkl", 3, folder / "global.bin")
    assert data.instance.tolist() == [1, 1, 1, 2, 2, 2, 0, 0, 0]
    lists, positive = draw_lists(data.gallery, data.instance, data.first.ranks, np.random.default_rng(0), 2, 5)
    assert lists[0].values.shape == (6, 3, C) and lists[0].summary.shape == (6, C) and positive.shape == (2, 5)
    left, right, label = draw_pairs(data.gallery, data.instance, np.random.default_rng(0), 8, negatives=data.first.ranks)
    assert len(left.values) == len(right.values) == len(label) == 8


def test_numpy_shortlists_equal_pickled_ones(folder):
    pickled = read_shortlist(folder / "nn.pkl", N)
    np.save(folder / "nn.npy", np.stack([pickled.scores, pickled.ranks.astype(np.float32)]))
    assert np.array_equal(read_shortlist(folder / "nn.npy", N).ranks, pickled.ranks)


@pytest.mark.parametrize("text, message", [("", "is empty"), ("0.jpg,5,1,1\n1.jpg\n", "line 2"), ("0.jpg,tower,1,1\n", "line 1")])
def test_a_wrong_image_list_is_named(tmp_path, text, message):
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_listed_images(tmp_path / "train.txt")


def test_files_that_do_not_belong_together_are_refused(folder, table):
    np.save(folder / "few.npy", table[:4])
    np.save(folder / "flat.npy", table[0])
    (folder / "odd.bin").write_bytes(b"1234" * (N + 1))
    np.arange(2 * C, dtype=np.float32).tofile(folder / "global.bin")
    args = [folder / "local.npy", folder / "train.txt", folder / "nn.pkl"]
    for change, message in ({0: folder / "few.npy"}, "covers 4 images"), ({0: folder / "flat.npy"}, "images x descriptors"):
        with pytest.raises(ValueError, match=message):
            load_landmarks(*(change.get(i, arg) for i, arg in enumerate(args)))
    with pytest.raises(ValueError, match="no multiple of 9 images"):
        load_landmarks(*args, summary=folder / "odd.bin")
    with pytest.raises(ValueError, match="names images 0..8, but there are 4"):
        read_shortlist(folder / "nn.pkl", 4)
    with pytest.raises(ValueError, match="9 images, but there are 2 global"):
        DescriptorFile(folder / "local.npy", summary=np.zeros((2, 3)))


def test_a_pickle_that_names_code_is_not_run(folder):
    (folder / "nn.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="plain data"):
        read_shortlist(folder / "nn.pkl", N)
