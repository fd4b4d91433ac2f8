"""Golden dinov2_elvis_gld: the released layout of ELViS, loaded strictly, gives the scores of the official code."""
import json
import math

import numpy as np
import pytest
import torch
from official_fill import FOLDER, Official, fill, filled

from patchify.rerank.elvis import ElvisScorer, load_elvis
from patchify.rerank.evaluation import load_reranker
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


# the other released files: same structure, other backbones

RELEASED = json.loads((FOLDER / "keys" / "dinov2_elvis_gld.json").read_text())
DIMENSIONS = {"dinov2": 768, "dinov3": 1024, "siglip2": 1152}      # of the authors' configurations; the file decides


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def logsumexp(x, axis):
    top = x.max(axis, keepdims=True)
    return np.log(np.exp(x - top).sum(axis)) + np.squeeze(top, axis)


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def reference(weights: dict, query, gallery, query_padding, gallery_padding) -> float:
    "The score of one pair from the equations, in float64: no batch, no torch, loops over both sides."
    w = {name: value.numpy().astype(np.float64) for name, value in weights.items()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    units, dust = [], []
    for descriptors in (query, gallery):
        r = layer_norm(linear(np.asarray(descriptors, np.float64), "remap_local.0"), w["remap_local.1.weight"], w["remap_local.1.bias"], 1e-5)
        units.append(r / np.linalg.norm(r, axis=1, keepdims=True))
        dust.append(np.tanh(linear(gelu(linear(units[-1], "dust_bin_mlp.0")), "dust_bin_mlp.2"))[:, 0])
    n, m = len(query), len(gallery)
    S = np.full((n + 1, m + 1), float(w["dust_bin"]))
    S[:n, :m] = units[0] @ units[1].T
    S[:n, m], S[n, :m] = dust
    S[:n, :m][np.asarray(query_padding)] = -np.inf
    S[:n, :m][:, np.asarray(gallery_padding)] = -np.inf
    M, beta = 10 * S, np.zeros(m + 1)
    log_a, log_b = np.full(n + 1, -math.log(n + m)), np.full(m + 1, -math.log(n + m))
    log_a[n] += math.log(m)
    log_b[m] += math.log(n)
    for _ in range(10):
        alpha = log_a - logsumexp(M + beta, 1)
        beta = log_b - logsumexp(M + alpha[:, None], 0)
    P = np.exp(M + alpha[:, None] + beta + math.log(n + m))[:n, :m]
    votes = 0.0
    for side, padding in ((P.max(1), query_padding), (P.max(0), gallery_padding)):
        hidden = layer_norm(linear(side[:, None], "f.0"), w["f.1.weight"], w["f.1.bias"], 1e-6)
        f = linear(gelu(hidden), "f.3")[:, 0]
        votes += (1 / (1 + np.exp(-f)))[~np.asarray(padding)].sum()
    return votes


def test_the_reference_gives_the_official_scores(golden):
    sides = [golden["src"].numpy(), golden["tgt"].numpy()]
    masks = [golden["src_mask"].numpy(), golden["tgt_mask"].numpy()]
    weights = filled("dinov2_elvis_gld")
    plain = [reference(weights, *pair, [False] * len(pair[0]), [False] * len(pair[1])) for pair in zip(*sides)]
    golden.check("score", plain)
    sides = [np.where(mask[..., None], 0, side) for side, mask in zip(sides, masks)]
    golden.check("score_masked", [reference(weights, *row) for row in zip(*sides, *masks)])


@pytest.mark.parametrize("file", RELEASED["released_as"])
@torch.no_grad()
def test_every_released_file_is_read_and_scored_by_the_equations(file, tmp_path):
    "Its tensors have the names of the key list; the first layer is as wide as the backbone's features."
    dim = DIMENSIONS[file.split("_")[0]]
    weights = {}
    for key, shape, *_ in RELEASED["keys"]:
        shape = [shape[0], dim] if key == "remap_local.0.weight" else shape
        weights[key] = torch.as_tensor(fill(f"{RELEASED['fill_salt']}/{file}", key, shape))
    torch.save({"state": weights, "optim": {}, "epoch": 3}, tmp_path / file)
    model, settings = load_reranker(tmp_path / file)
    assert (settings.system, settings.backbone, settings.precision) == ("ELViS", file.split("_")[0], "full precision")
    rng = np.random.default_rng(dim)
    query, gallery = rng.normal(size=(7, dim)), rng.normal(size=(5, dim))
    gallery[:3] = query[:3] + 0.3 * rng.normal(size=(3, dim))
    query, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, gallery))
    padding = np.arange(7) >= 5, np.arange(5) >= 4
    inputs = [torch.as_tensor(x[None], dtype=torch.float32) for x in (query, gallery)]
    found = model(*inputs, *(torch.as_tensor(~mask[None]) for mask in padding))
    assert float(found) == pytest.approx(reference(weights, query, gallery, *padding), abs=2e-5)


def test_a_binary_model_loads_and_reads_signs():
    "Built by the authors' code, not published: a projection W, its signs, then a linear layer."
    weights = dict(filled("dinov2_elvis_gld"))
    dim, local_dim = weights.pop("remap_local.0.weight").shape
    weights["remap_local.0.W"] = torch.as_tensor(fill("binary", "remap_local.0.W", (local_dim, dim)))
    for name in ("weight", "bias"):
        weights[f"remap_local.2.{name}"] = weights.pop(f"remap_local.1.{name}")
    weights["remap_local.1.weight"] = torch.as_tensor(fill("binary", "remap_local.1.weight", (dim, dim)))
    weights["remap_local.1.bias"] = weights.pop("remap_local.0.bias")
    model = load_elvis(weights)
    query, gallery = torch.randn(1, 4, local_dim), torch.randn(1, 3, local_dim)
    plain = {name: weights[f"remap_local.{place}"] for name, place in (("0.weight", "1.weight"), ("0.bias", "1.bias"), ("1.weight", "2.weight"), ("1.bias", "2.bias"))}
    rest = {name: value for name, value in weights.items() if not name.startswith("remap_local")}
    on_signs = load_elvis(rest | {f"remap_local.{name}": value for name, value in plain.items()})
    signs = [(side @ weights["remap_local.0.W"]).sign() for side in (query, gallery)]
    with torch.no_grad():
        torch.testing.assert_close(model(query, gallery), on_signs(*signs))
