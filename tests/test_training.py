"""The offline encoder: its loss, its training, its file; and the rendering of its batches."""
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import patchify
from patchify.encoder import load_encoder
from patchify.files import read_metadata
from patchify.learn import TrainingPlan, train
from patchify.synthetic.batches import make_assets, make_batch, place_object, relevance
from patchify.synthetic.design import family
from patchify.synthetic.render import draw_pose, geometry, render
from patchify.zoo.encoder import BatchStream, EncoderRecipe, build_network, contrastive, encoder_loss, train_encoder

TINY = EncoderRecipe(architecture="mobilenetv4_conv_small_035", dim=16, size=32, steps=4, families=4, empty=4,
                     warmup=2, grow=.5, objects=10, backgrounds=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bit for bit needs a fixed order of sums: one thread, and no oneDNN. With oneDNN a process that only trains repeats
    its weights, but after other work in the process the first gradients can round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.backends.mkldnn.flags(enabled=False):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(10, 8, side=64, cache=tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def whole(assets, tmp_path_factory):
    "The weights of an uninterrupted run."
    return train_encoder(TINY, tmp_path_factory.mktemp("whole"), assets, "cpu", workers=0)


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
                terms = [r[i, j] * (s[i, j] / temperature - norm) for j in good]
                losses.append(-sum(terms) / sum(r[i, j] for j in good))
        total += np.mean(losses)
    return total


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (6, 2)])
def test_loss_equals_the_equation(shape):
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 1, shape)
    rel = rng.uniform(0, 1, shape) * (rng.random(shape) < .6)
    rel[0, 0] = .9
    loss = contrastive(torch.tensor(scores), torch.tensor(rel), .3)
    assert abs(float(loss) - slow_contrastive(scores, rel, .3)) < 1e-6


def test_relevance_counts_pixels_that_are_seen():
    opaque = torch.ones(1, 20, 20)
    front = (opaque, torch.tensor([-1]), torch.ones(1))
    assert relevance([(opaque, torch.tensor([0]), torch.ones(1)), front], 1)[0, 0] == 0
    middle = [torch.tensor([v]) for v in (0., 0., .5, .5)]
    quarter = place_object(torch.ones(1, 1, 8, 8), *middle, 20)[:, 0]
    assert relevance([(quarter, torch.tensor([0]), torch.tensor([.25]))], 1)[0, 0] == 1


def test_views_are_finite_over_many_batches(assets):
    for step in range(6):
        queries, patches, rel = make_batch(assets, 1, step, 32, 4, 2, 8, difficulty=1 - step / 5)
        assert queries.float().std() > 5 and patches.float().std() > 5 and 0 <= rel.min() and rel.max() <= 1


def test_extreme_perspective_is_finite():
    designs = [family(seed, 1)[0] for seed in range(20)]
    extreme = {"distance": torch.linspace(.01, .6, 20), "yaw": torch.linspace(-3, 3, 20), "pitch": torch.linspace(-1.6, 1.6, 20)}
    pose = draw_pose(np.random.default_rng(0), 20) | extreme
    sprites, aspects = render(geometry(designs), torch.zeros(20, 3, 32, 64, dtype=torch.uint8), pose, 24)
    assert torch.isfinite(sprites).all() and torch.isfinite(aspects).all() and (aspects > 0).all()


def test_resumed_run_is_the_uninterrupted_run(assets, whole, tmp_path):
    for stop in (1, 3, None):
        parts = train_encoder(TINY, tmp_path / "parts", assets, "cpu", workers=0, stop=stop)
    a, b = (load_file(path.with_name("checkpoint.safetensors")) for path in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
    assert any(name.startswith("average.") for name in a) and len(a["losses"]) == TINY.steps
    a, b = (load_file(path) for path in (whole, parts))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    encoder = load_encoder("mini", checkpoint=whole)
    assert (encoder.size, encoder.dim) == (TINY.size, TINY.dim)


def test_the_shared_loop_takes_the_steps_that_the_encoder_was_trained_with(assets, whole):
    "The loop written out: warm-up and cosine, clipping, averaging, no decay of one-dimensional parameters."
    model = build_network(TINY).train()
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": TINY.weight_decay}, {"params": others, "weight_decay": 0.}]
    optimizer = torch.optim.AdamW(groups, lr=TINY.learning_rate, betas=(.9, .98))
    average = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for step in range(TINY.steps):
        batch = BatchStream(assets, TINY)(step)
        falling = .5 * (1 + np.cos(np.pi * step / TINY.steps)) + .005
        for group in optimizer.param_groups:
            group["lr"] = TINY.learning_rate * min((step + 1) / TINY.warmup, falling)
        loss = encoder_loss(model, batch, TINY)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.)
        optimizer.step()
        losses.append(loss.item())
        decay = min(TINY.ema, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name] = average[name].lerp(value, 1 - decay) if value.is_floating_point() else value.clone()
    found = load_file(whole.with_name("checkpoint.safetensors"))
    assert found["losses"].tolist() == losses
    assert all(torch.equal(found[f"average.{name}"], value) for name, value in average.items())


def test_a_worker_renders_the_same_batches(assets):
    alone = BatchStream(assets, TINY)
    with_worker = BatchStream(assets, TINY, workers=1)
    for step in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(alone(step), with_worker(step)))


def test_other_recipe_is_refused_by_field(assets, tmp_path):
    train_encoder(TINY, tmp_path, assets, "cpu", workers=0, stop=1)
    with pytest.raises(ValueError, match="temperature = 0.06, this run asks for 0.1"):
        train_encoder(replace(TINY, temperature=.1), tmp_path, assets, "cpu", workers=0)


def test_loss_that_is_not_finite_stops_before_the_weights(assets):
    model = build_network(TINY).train()
    batch = make_batch(assets, 0, 0, 32, 4, 2, 4)
    poisoned = (*batch[:2], batch[2] * float("nan"))
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="nan at step 1 of 4"):
        train(model, lambda step, rng: encoder_loss(model, poisoned if step else batch, TINY), replace(TINY, learning_rate=0., weight_decay=0.).plan())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_checkpoint_from_before_the_newest_options_is_continued(tmp_path):
    "Fields that a checkpoint does not name have their defaults."
    path = tmp_path / "old.safetensors"
    plan = TrainingPlan(steps=4, learning_rate=.1)
    layer = torch.nn.Linear(2, 1)
    loss_of = lambda draw, rng: layer(torch.tensor(rng.normal(size=(4, 2)), dtype=torch.float32)).square().mean()
    train(layer, loss_of, plan, path, stop=2)
    tensors = load_file(path)
    saved = json.loads(read_metadata(path)["plan"])
    early_fields = ("steps", "learning_rate", "warmup", "weight_decay", "optimizer", "accumulate", "seed")
    from safetensors.torch import save_file
    save_file(tensors, path, {"plan": json.dumps({name: saved[name] for name in early_fields})})
    assert saved.keys() == {*asdict(plan), "checksum"} and len(train(layer, loss_of, plan, path)) == 4
    with pytest.raises(ValueError, match="clip = 0.0, this run asks for 1.0"):
        train(layer, loss_of, replace(plan, clip=1.), path)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="schedule must be cosine or floor, got 'step'"):
        TrainingPlan(steps=4, learning_rate=.1, schedule="step").rate(0)


def test_shipped_weights_are_small_and_carry_their_record():
    path = Path(patchify.__file__).parent / "weights" / "mini.safetensors"
    assert path.stat().st_size <= 12 * 2**20
    about = read_metadata(path)
    record = json.loads(about["record"])
    encoder = load_encoder("mini")
    expected = {"architecture": about["architecture"], "size": encoder.size, "dim": encoder.dim}
    assert record["recipe"] == {**record["recipe"], **expected}
    assert sum(p.numel() for p in encoder.model.parameters()) <= 6e6 and encoder.size <= 160
    assert record["steps"] == record["recipe"]["steps"] and np.isfinite(record["curve"]).all()
