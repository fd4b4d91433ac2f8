"""Released AMES re-rankers: filled checkpoints, wrapped as released and loaded from a file, give the official outputs."""
import copy
import json

import pytest
import torch
from official_fill import FOLDER, Official, filled

from patchify.rerank.ames import load_ames

NAMES = ["dinov2_ames", "dinov2_ames_dist", "cvnet_ames", "cvnet_ames_dist"]


@pytest.fixture(scope="module", params=NAMES)
def released(request, tmp_path_factory):
    "The golden, and the model that its file becomes."
    file = tmp_path_factory.mktemp("networks") / f"{request.param}.pt"
    torch.save({"state": filled(request.param), "optim": {"param_groups": []}, "epoch": 50}, file)
    return Official(request.param), load_ames(file)


def test_sizes_are_those_of_the_released_model(released):
    golden, model = released
    listed = json.loads((FOLDER / golden.info["keys"]).read_text())
    expected, found = listed["hyper_parameters"], model.settings
    assert sum(p.numel() for p in model.parameters()) == listed["parameters"]
    assert (found["heads"], found["layers"]) == (expected["nhead"], expected["num_encoder_layers"])
    assert (found["hidden"], found["activation"]) == (expected["dim_feedforward"], expected["activation"])
    assert (model.local_dim, model.binary) == (expected["local_dim"], expected["binarized"])


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def precise(request, released):
    """The golden and the model in a number type. float32 runs on one thread: a full-precision model rounds projected
    tokens to float16, and another order of sums can flip a rounding, which exceeds the tolerance of the golden."""
    golden, model = released
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield golden, copy.deepcopy(model).to(request.param), request.param
    torch.set_num_threads(threads)


@torch.no_grad()
def test_logits_and_token(precise):
    golden, model, dtype = precise
    query, gallery = golden["src"].to(dtype), golden["tgt"].to(dtype)
    query_valid, gallery_valid = ~golden["src_mask"], ~golden["tgt_mask"]
    tokens = model.match(model.remap(query), model.remap(gallery), query_valid, gallery_valid)
    golden.check("token_row", tokens[:, 0])
    golden.check("score", model(query, gallery, query_valid, gallery_valid))


@torch.no_grad()
def test_the_tolerance_tells_mistakes_apart(released):
    "Ignoring the masks, or swapping the sides of a full-precision model, is noticed."
    golden, model = released
    query, gallery = golden["src"], golden["tgt"]
    query_valid, gallery_valid = ~golden["src_mask"], ~golden["tgt_mask"]
    with pytest.raises(AssertionError):
        golden.check("score", model(query, gallery))
    if not model.binary:
        swapped = model.match(model.remap(gallery), model.remap(query), gallery_valid, query_valid)
        with pytest.raises(AssertionError):
            golden.check("token_row", swapped[:, 0], atol=golden.listed["token_row"]["atol"] / 10)
