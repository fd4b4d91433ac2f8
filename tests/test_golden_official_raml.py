"""Networks released by RAML, rebuilt in their layout: test transform, descriptors, asymmetric scores (golden `raml_official`)."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from official_fill import FOLDER, Official, filled
from patchify.descriptors.official import load_raml_model, load_official_encoder
from patchify.descriptors.views import centre_view
from patchify.files import read_weights

GOLDEN = Official("raml_official")
META = {"architecture": "resnet50", "pooling": "gem", "whitening": 512, "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225], "outputdim": 512}
SIZES = (224, 448)
ROLES = ("teacher", "student")


def views(size):
    return torch.stack([centre_view(Image.fromarray(pixels), size) for pixels in GOLDEN.arrays["images"]])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raml")
    for role in ROLES:
        torch.save({"meta": META, "state_dict": filled.__wrapped__(f"raml_{role}")}, folder / f"{role}.pth")
    return folder


@pytest.fixture(scope="module")
def descriptors(files):
    found = {}
    for role in ROLES:
        net = load_raml_model(files / f"{role}.pth")
        with torch.no_grad():
            found |= {f"{role}_{size}": net(views(size)).T for size in SIZES}
    return found


@pytest.mark.parametrize("name", [f"{role}_{size}" for role in ROLES for size in SIZES])
def test_descriptors(descriptors, name):
    GOLDEN.check(name, descriptors[name])


def test_scores(descriptors):
    query = descriptors["student_224"]
    GOLDEN.check("asymmetric_scores", descriptors["teacher_448"].T @ query, atol=2e-6)
    GOLDEN.check("symmetric_scores", query.T @ query, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_transform(size):
    at = np.linspace(0, size - 1, 10).astype(int)
    mean, std = (torch.tensor(META[name]).view(3, 1, 1) for name in ("mean", "std"))
    samples = ((views(size) - mean) / std)[:, :, at][:, :, :, at]
    GOLDEN.check(f"transform_{size}_samples", samples, atol=1.01 / 255 / 0.224)
    assert (samples - GOLDEN[f"transform_{size}_samples"]).abs().mean() < 2e-3


def test_as_an_encoder(files):
    encoder = load_official_encoder("raml", files / "student.pth", 224, dtype=torch.float32)
    assert encoder.size == 224 and encoder.dim == 512
    assert (encoder(views(224)).T - GOLDEN["student_224"]).abs().max() < 1e-5


@pytest.mark.parametrize("file", ["raml_released.pth", "raml_training.pth.tar"])
def test_wrappers(file):
    "Released files carry `meta`; training checkpoints carry a numpy scalar that torch refuses by default."
    expected = json.loads((FOLDER / "wrappers" / "expected.json").read_text())["files"][file]
    assert list(read_weights(FOLDER / "wrappers" / file)) == expected["keys_after_unwrapping"]
