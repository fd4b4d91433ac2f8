"""Golden dinov2_elvis_gld: the released layout of ELViS, loaded strictly, gives the scores of the official code."""
import pytest
import torch
from official_fill import Official, filled

from patchify.rerank.elvis import ElvisScorer, load_elvis
from patchify.rerank.shortlist import Descriptors


@pytest.fixture(scope="module")
def golden():
    return Official("dinov2_elvis_gld")


@pytest.fixture
def model(tmp_path):
    "Read from a file in the released wrapper."
    weights = filled("dinov2_elvis_gld")
    torch.save({"state": weights, "optim": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 7}, tmp_path / "dinov2_elvis_gld.pt")
    return load_elvis(tmp_path / "dinov2_elvis_gld.pt")


@torch.no_grad()
def test_scores(golden, model):
    src, tgt = golden["src"], golden["tgt"]
    golden.check("score", model(src, tgt))
    query_valid, gallery_valid = ~golden["src_mask"], ~golden["tgt_mask"]
    zeroed = src * query_valid[..., None], tgt * gallery_valid[..., None]
    golden.check("score_masked", model(*zeroed, query_valid, gallery_valid))


@torch.no_grad()
def test_the_settings_that_no_tensor_shows_matter(golden, model):
    for change in ({"iterations": 9}, {"temperature": 0.11}):
        other = load_elvis(model.state_dict(), **change)
        with pytest.raises(AssertionError):
            golden.check("score", other(golden["src"], golden["tgt"]))


def test_the_scorer_equals_the_model(golden, model):
    count = len(golden["src"])
    queries = Descriptors(golden["src"].numpy(), ~golden["src_mask"].numpy())
    gallery = Descriptors(golden["tgt"].numpy(), ~golden["tgt_mask"].numpy())
    scores = [ElvisScorer(model, queries, gallery, batch=2)(i, list(range(count)))[i] for i in range(count)]
    golden.check("score_masked", scores)


@pytest.mark.parametrize("name", ["dust_bin", "g.2.bias", "f.1.weight", "dust_bin_mlp.2.weight"])
def test_every_tensor_is_needed(name):
    weights = {key: value for key, value in filled("dinov2_elvis_gld").items() if key != name}
    with pytest.raises(ValueError, match=name):
        load_elvis(weights)


def test_a_tensor_too_many_is_named():
    with pytest.raises(ValueError, match="extra"):
        load_elvis(filled("dinov2_elvis_gld") | {"extra": torch.zeros(1)})


def test_sizes_come_from_the_tensors():
    weights = dict(filled("dinov2_elvis_gld"))
    weights["remap_local.0.weight"] = torch.zeros(weights["remap_local.0.weight"].shape[0], 1152)
    assert load_elvis(weights).local_dim == 1152
