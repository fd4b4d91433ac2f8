"""The offline encoder: its loss, its loop, its file."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import patchify
from patchify.encoder import load_encoder
from patchify.synthetic.render import draw_pose, geometry, render
from patchify.synthetic.design import family
from patchify.zoo.encoder import EncoderRecipe, build_network, contrastive, train_encoder, training_step
from patchify.synthetic.batches import make_assets, make_batch, place_object, relevance

TINY = EncoderRecipe(architecture="mobilenetv4_conv_small_035", dim=16, size=64, steps=6, families=4, empty=4, warmup=2, grow=0., objects=10, grounds=8)


@pytest.fixture(scope="module")
def props(tmp_path_factory):
    return make_assets(10, 8, side=64, cache=tmp_path_factory.mktemp("props"))


def slow_contrastive(scores, relevance, temperature):
    "The equation, sum by sum."
    total = 0.
    for s, r in ((scores, relevance), (scores.T, relevance.T)):
        losses = []
        for i in range(len(s)):
            sure = [j for j in range(s.shape[1]) if not .05 < r[i, j] < .5]
            good = [j for j in range(s.shape[1]) if r[i, j] >= .5]
            if good:
                norm = np.log(sum(np.exp(s[i, j] / temperature) for j in sure))
                losses.append(-sum(r[i, j] * (s[i, j] / temperature - norm) for j in good) / sum(r[i, j] for j in good))
        total += np.mean(losses)
    return total


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (6, 2)])
def test_loss_equals_the_equation(shape):
    rng = np.random.default_rng(0)
    scores, rel = rng.uniform(-1, 1, shape), rng.uniform(0, 1, shape) * (rng.random(shape) < .6)
    rel[0, 0] = .9
    loss = contrastive(torch.tensor(scores), torch.tensor(rel), .3)
    assert abs(float(loss) - slow_contrastive(scores, rel, .3)) < 1e-6


def test_relevance_counts_pixels_that_are_seen():
    opaque = torch.ones(1, 20, 20)
    assert relevance([(opaque, torch.tensor([0]), torch.ones(1)), (opaque, torch.tensor([-1]), torch.ones(1))], 1)[0, 0] == 0
    quarter = place_object(torch.ones(1, 1, 8, 8), *(torch.tensor([v]) for v in (0., 0., .5, .5)), 20)[:, 0]
    assert relevance([(quarter, torch.tensor([0]), torch.tensor([.25]))], 1)[0, 0] == 1


def test_views_are_finite_over_many_batches(props):
    for step in range(6):
        queries, patches, rel = make_batch(props, 1, step, 32, 4, 2, 8, ease=step / 5)
        assert queries.float().std() > 5 and patches.float().std() > 5 and 0 <= rel.min() and rel.max() <= 1


def test_extreme_perspective_is_finite():
    designs = [family(seed, 1)[0] for seed in range(20)]
    pose = draw_pose(np.random.default_rng(0), 20) | {"distance": torch.linspace(.01, .6, 20), "yaw": torch.linspace(-3, 3, 20), "pitch": torch.linspace(-1.6, 1.6, 20)}
    sprites, aspects = render(geometry(designs), torch.zeros(20, 3, 32, 64, dtype=torch.uint8), pose, 24)
    assert torch.isfinite(sprites).all() and torch.isfinite(aspects).all() and (aspects > 0).all()


def test_resumed_run_is_the_uninterrupted_run(props, tmp_path):
    whole = train_encoder(TINY, tmp_path / "whole", props, "cpu", workers=0)
    for stop in (2, 5, None):
        parts = train_encoder(TINY, tmp_path / "parts", props, "cpu", workers=0, stop=stop)
    a, b = (torch.load(p.with_name("checkpoint.pt"), weights_only=True) for p in (whole, parts))
    assert a["history"] == b["history"] and all(torch.equal(v, b["average"][k]) for k, v in a["average"].items())
    encoder = load_encoder("mini", checkpoint=whole)
    assert (encoder.size, encoder.dim) == (TINY.size, TINY.dim)


def test_a_worker_renders_the_same_batches(props, tmp_path):
    steps = [train_encoder(replace(TINY, steps=2), tmp_path / str(n), props, "cpu", workers=n).with_name("checkpoint.pt") for n in (0, 1)]
    a, b = (torch.load(p, weights_only=True)["history"] for p in steps)
    assert np.allclose(a, b, rtol=1e-3)


def test_other_recipe_is_refused_by_field(props, tmp_path):
    train_encoder(TINY, tmp_path, props, "cpu", workers=0, stop=1)
    with pytest.raises(ValueError, match="temperature=0.06, not 0.1"):
        train_encoder(replace(TINY, temperature=.1), tmp_path, props, "cpu", workers=0)


def test_loss_that_is_not_finite_stops_before_the_weights(props):
    model = build_network(TINY).train()
    batch = make_batch(props, 0, 0, 32, 4, 2, 4)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("inf"))
    with pytest.raises(ValueError, match="loss of step 3"):
        training_step(model, torch.optim.AdamW(model.parameters()), batch, TINY, 3)


def test_shipped_weights_are_small_and_tell_their_story():
    path = Path(patchify.__file__).parent / "weights" / "mini.safetensors"
    assert path.stat().st_size <= 12 * 2**20
    with safe_open(path, "pt") as file:
        about = file.metadata()
    record, encoder = json.loads(about["record"]), load_encoder("mini")
    assert record["recipe"] == {**record["recipe"], "architecture": about["architecture"], "size": encoder.size, "dim": encoder.dim}
    assert sum(p.numel() for p in encoder.model.parameters()) <= 6e6 and encoder.size <= 160
    assert record["steps"] == record["recipe"]["steps"] and np.isfinite(record["curve"]).all()
