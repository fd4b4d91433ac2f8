"""Goldens dinov2_extraction and cvnet_extraction: released weights and an image give the authors' descriptor rows."""
import pytest
import torch
from official_extraction import check
from official_fill import filled


@pytest.fixture
def prepared(tmp_path):
    "Path of a filled checkpoint in its released wrapper."
    def write(name: str):
        weights = filled(name)
        if "cvnet_r101" in name:
            weights = {"model_state": {f"encoder_q.{k}": v for k, v in weights.items()} | {"encoder_k.stem.conv.weight": torch.zeros(2)}, "epoch": 1}
        elif "detector" in name:
            weights = {"state": weights, "optim": {}, "epoch": 1}
        torch.save(weights, tmp_path / f"{name}.pth")
        return tmp_path / f"{name}.pth"
    return write


@pytest.mark.parametrize("name", ["dinov2_extraction", "cvnet_extraction"])
def test_extraction(name, prepared):
    check(name, prepared)
