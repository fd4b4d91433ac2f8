"""ILIAS's linear adaptation layers from their files (golden `ilias_lin_adapt`)."""
import torch

from official_fill import FOLDER, Official, filled
from patchify.descriptors.official import load_adapter
from patchify.files import read_weights

GOLDEN = Official("ilias_lin_adapt")


def test_adapted_descriptors(tmp_path):
    torch.save(filled.__wrapped__("ilias_lin_adapt"), tmp_path / GOLDEN.info["example_name"])
    adapter = load_adapter(tmp_path / GOLDEN.info["example_name"])
    GOLDEN.check("y", adapter(GOLDEN.arrays["x"]))


def test_wrapper():
    assert set(read_weights(FOLDER / "wrappers" / "ilias_lin_adapt.pth")) == {"layer.weight", "layer.bias"}
    assert load_adapter(FOLDER / "wrappers" / "ilias_lin_adapt.pth").weight.shape == (3, 4)
