"""Descriptor files: interrupted at any byte they continue to the same bytes; images without descriptors are read by all."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from patchify.rerank.ames import AMES, AmesScorer
from patchify.rerank.backbones import CVNet, DINOv2, SpatialDetector
from patchify.rerank.elvis import ELViS, ElvisScorer
from patchify.rerank.extraction import Extractor, official_extractor
from patchify.rerank.locore import LOCORE, LocoreScorer
from patchify.rerank.official import DescriptorFile, read_globals, read_shortlist
from patchify.rerank.setsim import SetScorer, mutual_nearest
from patchify.rerank.shortlist import Descriptors
from patchify.rerank.writing import write_descriptors, write_shortlist

h5py = pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    return Extractor(DINOv2(dim=24, depth=1, heads=3, grid=3).eval(), SpatialDetector(24).eval(), size=56, top=20)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 7 * i, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"damaged")
    return [folder / f"{i}.png" for i in range(4)]


@pytest.fixture(scope="module")
def whole(extractor, photos, tmp_path_factory):
    return write_descriptors(photos, extractor, tmp_path_factory.mktemp("whole"))


def test_the_layout_is_the_authors(whole):
    with h5py.File(whole[0]) as file:
        features = file["features"]
        assert list(file) == ["features"] and not features.attrs
        assert (features.shape, features.dtype, features.chunks, features.compression) == ((4, 20, 29), np.float32, None, None)
    assert [path.name for path in whole] == ["dinov2_gallery_local.hdf5", "dinov2_gallery_global.pt", "dinov2_cls_gallery_global.pt"]
    assert read_globals(whole[1], 4).shape == read_globals(whole[2], 4).shape == (4, 24)


class Stops(Extractor):
    "Stops at an image, as if killed there."

    def __call__(self, image, box=None):
        if image.shape[0] == self.stop:
            raise KeyboardInterrupt
        return super().__call__(image, box)


@pytest.mark.parametrize("cut", [0, 1, 95, 97])
def test_an_interrupted_run_ends_with_the_same_bytes(extractor, photos, whole, tmp_path, cut):
    "The run stops at the last image; some bytes of the last global descriptor are lost, too."
    stops = Stops(**vars(extractor))
    object.__setattr__(stops, "stop", 61)
    with pytest.raises(KeyboardInterrupt):
        write_descriptors(photos, stops, tmp_path)
    assert not (tmp_path / whole[0].name).exists()
    part = tmp_path / "dinov2_gallery_global.pt.part"
    part.write_bytes(part.read_bytes()[:-cut] if cut else part.read_bytes())
    resumed = write_descriptors(photos, extractor, tmp_path)
    assert [path.read_bytes() for path in resumed] == [path.read_bytes() for path in whole]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in whole[0].parent.iterdir()} and not any(".part" in name for name in names)
    table = (tmp_path / "dinov2_gallery_failures.csv").read_text()
    assert table.splitlines()[0] == "row,path,reason" and table.splitlines()[1].startswith("2,") and len(table.splitlines()) == 2


@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_a_run_that_stopped_while_files_got_their_names(extractor, photos, whole, tmp_path, renamed):
    "The files in the order in which they are renamed; the last ones still have their temporary names."
    names = [whole[1].name, whole[2].name, whole[0].name, "dinov2_gallery_local.json"]
    for i, name in enumerate(names):
        shutil.copy(whole[0].with_name(name), tmp_path / (name if i < renamed else name + ".part"))
    assert [path.read_bytes() for path in write_descriptors(photos, extractor, tmp_path)] == [path.read_bytes() for path in whole]
    assert not list(tmp_path.glob("*.part"))


def test_finished_files_are_not_touched_again(extractor, photos, whole):
    times = [path.stat().st_mtime_ns for path in whole]
    assert write_descriptors(photos, extractor, whole[0].parent) == whole
    assert [path.stat().st_mtime_ns for path in whole] == times


@pytest.mark.parametrize("change, field", [({"top": 10}, "top"), ({"size": 70}, "size"), ({"values": "backbone"}, "values"),
                                           ({"detector": SpatialDetector(24).eval()}, "detector")])
def test_other_settings_are_refused_by_name(extractor, photos, whole, change, field):
    with pytest.raises(ValueError, match=f"made with other {field} .*choose another folder"):
        write_descriptors(photos, Extractor(**(vars(extractor) | change)), whole[0].parent)


def test_files_of_others_are_not_overwritten(extractor, photos, whole, tmp_path):
    shutil.copy(whole[0], tmp_path)
    with pytest.raises(ValueError, match="was not written by this function"):
        write_descriptors(photos, extractor, tmp_path)


def test_no_readable_image_is_an_error(extractor, photos, tmp_path):
    with pytest.raises(ValueError, match="none of the images could be read, the first is .*2.png"):
        write_descriptors([photos[2]], extractor, tmp_path)
    with pytest.raises(ValueError, match="files is empty"):
        write_descriptors([], extractor, tmp_path)


def test_half_precision_for_elvis(extractor, photos, tmp_path):
    local = write_descriptors(photos[:2], extractor, tmp_path, split="", dtype=np.float16)[0]
    assert local.name == "dinov2_local.hdf5"
    with h5py.File(local) as file:
        assert file["features"].dtype == np.float16


def test_the_backbone_is_recognised(tmp_path):
    torch.manual_seed(0)
    torch.save({"model_state": CVNet((1, 1, 1, 1), width=8, global_dim=32).state_dict()}, tmp_path / "cvnet.pyth")
    torch.save({"state": SpatialDetector(128).state_dict()}, tmp_path / "cvnet_detector.pt")
    torch.save({"state": SpatialDetector(48).state_dict()}, tmp_path / "other_detector.pt")
    assert isinstance(official_extractor(tmp_path / "cvnet.pyth", tmp_path / "cvnet_detector.pt").backbone, CVNet)
    with pytest.raises(ValueError, match="reads maps of 48 channels, .* gives 128"):
        official_extractor(tmp_path / "cvnet.pyth", tmp_path / "other_detector.pt")
    with pytest.raises(ValueError, match="neither DINOv2 with registers nor CVNet"):
        official_extractor(tmp_path / "cvnet_detector.pt", None)


def test_a_shortlist_is_the_ranking_of_the_global_descriptors(tmp_path):
    rng = np.random.default_rng(0)
    sides = {name: rng.normal(size=(n, 6)).astype(np.float32) for name, n in (("q", 3), ("g", 8))}
    for name, values in sides.items():
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        values.tofile(tmp_path / f"{name}_global.pt")
    scores = sides["q"] @ sides["g"].T
    for top_k in (None, 5):
        found = read_shortlist(write_shortlist(tmp_path / "q_global.pt", tmp_path / "g_global.pt", tmp_path / "nn.pkl", 3, 8, top_k))
        expected = np.argsort(-scores, axis=1)[:, :top_k]
        assert np.array_equal(found.ranks, expected)
        np.testing.assert_allclose(found.scores, np.take_along_axis(scores, expected, 1), atol=1e-6)


def sets(n: int, empty: int, dim: int = 24) -> Descriptors:
    "Random sets, one of them all padding, like an image that could not be read."
    rng = np.random.default_rng(n)
    values = rng.normal(size=(n, 5, dim)).astype(np.float32)
    valid = np.ones((n, 5), bool)
    valid[empty] = False
    values[empty] = 0
    return Descriptors(values, valid)


SCORERS = {
    "ames": lambda q, g: AmesScorer(AMES(24, 16, heads=2, layers=2, hidden=32).eval(), q, g),
    "elvis": lambda q, g: ElvisScorer(ELViS(24, 16).eval(), q, g),
    "locore": lambda q, g: LocoreScorer(
        LOCORE(local_dim=24, dim=16, layers=1, heads=2, hidden=32, window=32, max_positions=162).eval(), q, g),
    "chamfer": SetScorer,
    "mutual": lambda q, g: SetScorer(q, g, mutual_nearest),
}


@pytest.mark.parametrize("name", SCORERS)
def test_an_image_without_descriptors_gets_a_finite_score(name):
    "On either side; the scores of other images in a pair-wise model do not depend on it."
    if name == "locore":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    queries = sets(2, 1)
    gallery = sets(4, 2)
    scorer = SCORERS[name](queries, gallery)
    with_padding = scorer(0, np.arange(4))
    assert np.isfinite(with_padding).all() and np.isfinite(scorer(1, np.arange(4))).all()
    if name != "locore":
        np.testing.assert_allclose(scorer(0, np.array([0, 1, 3])), with_padding[[0, 1, 3]], atol=1e-6)


def test_padding_rows_are_read_back(whole):
    taken = DescriptorFile(whole[0]).take([0, 2])
    assert taken.valid.any(1).tolist() == [True, False] and not taken.values[1].any()
