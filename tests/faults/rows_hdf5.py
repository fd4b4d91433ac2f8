"Descriptor files, global descriptors, shortlists and ground truth of the re-ranking papers, and ILIAS's features."
import pickle

import h5py
import numpy as np
import torch

from campaign import Case
from patchify.data.ilias_files import load_ilias_features, save_similarities
from patchify.rerank.official import DescriptorFile, read_globals, read_ground_truth, read_listed_images, read_shortlist


def hdf5(name, make, says, code=2):
    def act(world):
        path = world.path / "gallery.hdf5"
        make(path)
        return world.call(DescriptorFile, path)
    return Case(f"hdf5: {name}", act, says, code)


def dataset(name="features", **options):
    def make(path):
        with h5py.File(path, "w") as file:
            file.create_dataset(name, **options)
    return make


def group(path):
    with h5py.File(path, "w") as file:
        file.create_group("features")


def external(path):
    "An external link to a file outside."
    with h5py.File(path, "w") as file:
        file["features"] = h5py.ExternalLink("/etc/passwd", "features")


def raw_bytes(path):
    "An array whose bytes lie in another file."
    with h5py.File(path, "w") as file:
        file.create_dataset("features", (2, 3, 8), "f4", external=[("/etc/passwd", 0, 192)])


def soft(path):
    with h5py.File(path, "w") as file:
        file["features"] = h5py.SoftLink("/features")


def virtual(path):
    layout = h5py.VirtualLayout((2, 3, 8), "f4")
    layout[:] = h5py.VirtualSource("none.hdf5", "features", (2, 3, 8))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("features", layout)


FLOATS = dict(data=np.zeros((2, 3, 8), np.float32))
CASES = [
    hdf5("correct", dataset(**FLOATS), "", 0),
    hdf5("missing", lambda path: None, "gallery.hdf5: no such file"),
    hdf5("text", lambda path: path.write_bytes(b"hello"), "gallery.hdf5: it is damaged or no HDF5 file"),
    hdf5("empty", lambda path: path.write_bytes(b""), "gallery.hdf5: it is damaged or no HDF5 file"),
    hdf5("a folder", lambda path: path.mkdir(), "gallery.hdf5"),
    hdf5("another name", dataset("other", **FLOATS), "gallery.hdf5 has no array named features, only other"),
    hdf5("a group", group, "gallery.hdf5 has a group named features"),
    hdf5("integers", dataset(data=np.zeros((2, 3, 8), np.int64)), "gallery.hdf5 holds int64"),
    hdf5("text values", dataset(data=np.full((2, 3, 8), b"a")), "gallery.hdf5 holds"),
    hdf5("two dimensions", dataset(data=np.zeros((2, 8), np.float32)), "gallery.hdf5 holds float32 of shape"),
    hdf5("too few columns", dataset(data=np.zeros((2, 3, 4), np.float32)), "gallery.hdf5 holds float32 of shape"),
    hdf5("a scalar", dataset(data=np.float32(1)), "gallery.hdf5 holds"),
    hdf5("an external link", external, "gallery.hdf5.*(link|another file|no array)"),
    hdf5("a link to itself", soft, "gallery.hdf5"),
    hdf5("bytes of another file", raw_bytes, "gallery.hdf5.*another file"),
    hdf5("a link to a missing file", virtual, "links to none.hdf5, which does not exist"),
]


def take(world):
    path = world.path / "gallery.hdf5"
    dataset(**FLOATS)(path)
    return world.call(DescriptorFile(path).take, np.array([5]))


def damaged_values(world):
    path = world.path / "gallery.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=np.random.default_rng(0).random((20, 30, 64), np.float32),
                            chunks=(1, 30, 64), compression="gzip", fletcher32=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return world.call(lambda: DescriptorFile(path).take(np.arange(20)))


def npy(name, make, says, code=2):
    def act(world):
        path = world.path / "gallery.npy"
        make(path)
        return world.call(DescriptorFile, path)
    return Case(f"npy: {name}", act, says, code)


CASES += [
    Case("hdf5: an image that is not there", take, "gallery.hdf5 describes 2 images; image 5"),
    Case("hdf5: a damaged chunk", damaged_values, "gallery.hdf5"),
    npy("objects", lambda path: np.save(path, np.array([{}, []], object)), "gallery.npy"),
    npy("missing", lambda path: None, "gallery.npy"),
    npy("cut short", lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "gallery.npy"),
    npy("text", lambda path: path.write_bytes(b"hello"), "gallery.npy"),
    npy("a header with code", lambda path: path.write_bytes(
        b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').system('touch was-here')".ljust(64)), "gallery.npy"),
]


def shortlist(name, content, says, code=2, images=10, file="nn.pkl"):
    def act(world):
        path = world.path / file
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.write_bytes(pickle.dumps(content))
        return world.call(read_shortlist, path, images)
    return Case(f"shortlist: {name}", act, says, code)


def ranked(ids=((0, 1), (2, 3)), scores=((0.9, 0.8), (0.7, 0.6))):
    return np.array([scores, ids], np.float64)


class Evil:
    def __reduce__(self):
        return eval, ("__import__('os').system('touch was-here')",)


CASES += [
    shortlist("correct", ranked(), "", 0),
    shortlist("tensor", torch.from_numpy(ranked()), "", 0),
    shortlist("missing", None, "no such shortlist: .*nn.pkl"),
    shortlist("empty", b"", "nn.pkl"),
    shortlist("code", pickle.dumps(Evil()), "nn.pkl.*builtins.eval"),
    shortlist("a list", [1, 2, 3], "nn.pkl must hold an array"),
    shortlist("two dimensions", np.ones((2, 3)), "nn.pkl must hold an array"),
    shortlist("a nan", ranked(scores=((np.nan, 1), (1, 1))), "nn.pkl: expected finite similarities"),
    shortlist("half an image", ranked(ids=((0.5, 1), (2, 3))), "nn.pkl: expected .*whole image numbers"),
    shortlist("a nan as image", ranked(ids=((np.nan, 1), (2, 3))), "nn.pkl: expected .*whole image numbers"),
    shortlist("an image beyond the gallery", ranked(ids=((0, 11), (2, 3))), "nn.pkl names images"),
    shortlist("an image listed twice", ranked(ids=((1, 1), (2, 3))), "nn.pkl, query 0: image 1 is listed twice"),
    shortlist("objects in npy", b"\x93NUMPY\x01\x00", "nn.npy", file="nn.npy"),
]


def truth(name, content, says, code=2):
    def act(world):
        path = world.path / "gnd.pkl"
        path.write_bytes(pickle.dumps(content))
        return world.call(read_ground_truth, path, 10)
    return Case(f"ground truth: {name}", act, says, code)


CASES += [
    truth("correct", {"gnd": [dict(easy=[0], hard=[1], junk=[])]}, "", 0),
    truth("a list", [1], "gnd.pkl must hold a dictionary"),
    truth("no queries", {"gnd": []}, "gnd.pkl must hold a dictionary"),
    truth("numbers as queries", {"gnd": [1, 2]}, "gnd.pkl must hold a dictionary"),
    truth("no hard", {"gnd": [dict(easy=[0])]}, "gnd.pkl, query 0: hard is missing"),
    truth("words", {"gnd": [dict(easy=["a"], hard=[])]}, "gnd.pkl, query 0: easy"),
    truth("a nan", {"gnd": [dict(easy=[float("nan")], hard=[])]}, "gnd.pkl, query 0: easy"),
    truth("beyond the gallery", {"gnd": [dict(easy=[10], hard=[])]}, "gnd.pkl, query 0: easy names images"),
    truth("easy and hard", {"gnd": [dict(easy=[0], hard=[0])]}, "gnd.pkl, query 0: image 0 is listed twice"),
]


def listed(name, content, says, code=2):
    def act(world):
        (world.path / "images.txt").write_bytes(content)
        return world.call(read_listed_images, world.path / "images.txt")
    return Case(f"image list: {name}", act, says, code)


CASES += [
    listed("correct", b"\xef\xbb\xbfa.jpg,3\r\nb.jpg,4\r\n", "", 0),
    listed("empty", b"", "images.txt is empty"),
    listed("not UTF-8", b"\xff\xfe,1\n", "images.txt, line 1: expected UTF-8"),
    listed("a word as class", b"a.jpg,x\n", "images.txt, line 1: expected"),
    listed("a field less", b"a.jpg,3\nb.jpg\n", "images.txt, line 2: expected"),
    listed("an image twice", b"a.jpg,3\na.jpg,4\n", "images.txt, line 2: 'a.jpg' is listed twice"),
]


def global_file(name, content, says):
    def act(world):
        path = world.path / "x_global.pt"
        if content is not None:
            path.write_bytes(content)
        return world.call(read_globals, path, 4)
    return Case(f"global descriptors: {name}", act, says)


CASES += [
    global_file("missing", None, "no such file of global descriptors: .*x_global.pt"),
    global_file("empty", b"", "x_global.pt has 0 bytes"),
    global_file("cut short", bytes(30), "x_global.pt has 30 bytes"),
    global_file("an archive", b"PK\x03\x04" + bytes(12), "x_global.pt is a torch archive"),
]


def features(name, says, index=("cup/pos/P0.jpg", "cup/pos/P1.jpg"), values=np.ones((2, 4), np.float32), code=2, raw=None):
    def act(world):
        with h5py.File(world.path / "features_image_queries.hdf5", "w") as file:
            file["features"] = np.ones((1, 4), np.float32)
            file["index"] = ["cup/query/Q0.jpg"]
        path = world.path / "features_positives.hdf5"
        if raw is not None:
            path.write_bytes(raw)
        else:
            with h5py.File(path, "w") as file:
                file["features"] = values
                file["index"] = list(index)
        return world.call(lambda: load_ilias_features(world.path).rank("cpu").result)
    return Case(f"ILIAS features: {name}", act, says, code)


BAD = np.array([[1, np.nan, 1, 1], [1, 1, 1, 1]], np.float32)
CASES += [
    features("correct", "", code=0),
    features("text", "features_positives.hdf5", raw=b"hello"),
    features("an id twice", "'index' lists 'cup/pos/P0.jpg' twice", index=("cup/pos/P0.jpg",) * 2),
    features("an id less", "features_positives.hdf5: 1 ids but 2 features", index=("cup/pos/P0.jpg",)),
    features("a nan", "features_positives.hdf5: the features of cup/pos/P0.jpg hold NaN", values=BAD),
    features("integers", "features_positives.hdf5: expected text in 'index' and floats", values=np.ones((2, 4), np.int32)),
    features("another dimension", "dimension|components", values=np.ones((2, 5), np.float32)),
    Case("similarities: a csv", lambda world: world.call(save_similarities, world.path / "a.csv", [], [], [], []),
         "a.csv: similarities are written as .pkl or .json"),
]
