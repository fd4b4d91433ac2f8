"""Goldens dinov2_detector and cvnet_detector: descriptor and weight of every place."""
import pytest
import torch
from official_extraction import check_detector
from official_fill import filled

from patchify.rerank.backbones import load_detector


@pytest.mark.parametrize("name", ["dinov2_detector", "cvnet_detector"])
def test_detector(name):
    check_detector(name)


def test_every_tensor_is_needed():
    weights = {key: value for key, value in filled("dinov2_detector").items() if key != "bn.running_var"}
    with pytest.raises(ValueError, match="bn.running_var"):
        load_detector(weights)
    with pytest.raises(ValueError, match="conv2.bias"):
        load_detector(filled("dinov2_detector") | {"conv2.bias": torch.zeros(2)})
