"""Test images of Token: size limit, crop of the query, samples of the tensor (golden `token_preprocess`)."""
import numpy as np
import pytest
import torch
from PIL import Image

from official_fill import Official, image
from patchify.descriptors.network import limit_size

GOLDEN = Official("token_preprocess")
MEAN = np.array([0.485, 0.456, 0.406])[:, None, None]
STD = np.array([0.229, 0.224, 0.225])[:, None, None]
GREY_LEVEL = 1 / 255 / 0.225                       # Pillow versions may differ by one


@pytest.mark.parametrize("case", GOLDEN.info["cases"], ids=lambda case: case["case"])
def test_input(case):
    source = Image.fromarray(image(case["image_salt"], 0, *case["source_h_w"]))
    limited = limit_size(source, case["bbox"] and tuple(case["bbox"]))
    tensor = (np.asarray(limited).transpose(2, 0, 1) / 255 - MEAN) / STD
    assert list(tensor.shape) == case["result_shape"]
    rows, columns = GOLDEN.arrays[f"{case['case']}_ys"], GOLDEN.arrays[f"{case['case']}_xs"]
    samples = tensor[:, rows][:, :, columns]
    np.testing.assert_allclose(samples, GOLDEN[f"{case['case']}_samples"], rtol=0, atol=1.01 * GREY_LEVEL)
    assert abs(samples - GOLDEN[f"{case['case']}_samples"].numpy()).mean() < 0.1 * GREY_LEVEL
    assert tensor.mean() == pytest.approx(case["mean"], abs=1e-3) and tensor.std() == pytest.approx(case["std"], abs=1e-3)
