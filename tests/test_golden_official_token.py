"""The networks released by Token, rebuilt in their layout: descriptors at every scale as by the official code."""
import functools
import json

import pytest
import torch

from official_fill import FOLDER, Official, filled
from patchify.descriptors.network import IMAGE_SCALES
from patchify.descriptors.official import as_encoder, load_token_model
from patchify.files import read_weights

NAMES = ("token_r101", "token_r50", "token_solar_r101", "token_netvlad_r101", "token_delg_r101", "token_rmac_r101")
WRAPPED = {name: json.loads((FOLDER / "wrappers" / "expected.json").read_text())["files"][name] for name in
           ("token_bare.pth", "token_training.pth", "token_ddp_prefix.pth")}


def released(name):
    "The filled tensors and the heads of the classifiers, which are listed but not filled."
    listed = json.loads((FOLDER / "keys" / f"{name}.json").read_text())["keys"]
    tensors = filled.__wrapped__(name)
    empty = {key: torch.zeros(1).expand(shape) for key, shape, _, crc in listed if crc is None}
    return {key: tensors[key] if key in tensors else empty[key] for key, *_ in listed}


@functools.lru_cache(maxsize=1)
def network(name, folder):
    torch.save(released(name), folder / f"{name}.pth")
    loaded = load_token_model(folder / f"{name}.pth")
    (folder / f"{name}.pth").unlink()
    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_descriptors(name, tmp_path_factory):
    golden, net = Official(name), network(name, tmp_path_factory.getbasetemp())
    images = golden["images"].permute(0, 3, 1, 2).float() / 255
    for number, scale in enumerate(IMAGE_SCALES):
        golden.check(f"scale{number}", net.describe(images, (scale,)))
    golden.check("multiscale", net.describe(images, IMAGE_SCALES))


def test_as_an_encoder(tmp_path_factory):
    golden, net = Official("token_r50"), network("token_r50", tmp_path_factory.getbasetemp())
    encoder = as_encoder(net, "token", 64, dtype=torch.float32)
    images = golden["images"].permute(0, 3, 1, 2)
    assert (encoder(images) - golden["scale0"]).abs().max() < 1e-5          # batch norms are folded: a little less exact


def test_depth_is_read_from_the_weights():
    counts = {"token_r50": 6, "token_r101": 23}
    for name, blocks in counts.items():
        keys = {row[0] for row in json.loads((FOLDER / "keys" / f"{name}.json").read_text())["keys"]}
        assert len({key.split(".")[2] for key in keys if key.startswith("backbone.block4.")}) == blocks


@pytest.mark.parametrize("file", WRAPPED)
def test_wrappers(file):
    tensors, expected = read_weights(FOLDER / "wrappers" / file), WRAPPED[file]
    assert list(tensors) == expected["keys_after_unwrapping"]
