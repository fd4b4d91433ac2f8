"""Trained heads and students: what ships is what the pages load, keys follow the settings, shared stages."""
from pathlib import Path

import papermill
import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from patchify.descriptors.students import Student
from patchify.encoder import Encoder, load_encoder
from patchify.descriptors.pooling import POOLINGS
from patchify.learn import TrainingPlan, train
from patchify.zoo import heads
from patchify.zoo.heads import (
    HEADS, TERMS, CropSource, TrainingContext, query_sizes, train_or_load, train_or_load_head, train_or_load_student)

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "patchify/weights"
SHIPPED = sorted([*WEIGHTS.glob("head-*.safetensors"), *WEIGHTS.glob("student-*.safetensors")])


def defaults(page):
    "The default parameters of an experiment."
    known = papermill.inspect_notebook(str(ROOT / f"nbs/experiments/{page}.ipynb"))
    return {name: eval(facts["default"]) for name, facts in known.items()}


def test_the_pages_find_every_network_in_the_package(tmp_path):
    encoder, token, small = load_encoder("mini"), defaults("token"), defaults("asymmetric")
    context = TrainingContext(encoder, CropSource(token["products"], data=tmp_path), token["seed"])
    for name in [*(f"token {count}" for count in token["tokens"].split(",")), *POOLINGS]:
        head, losses = train_or_load_head(context, name, token["size"], token["steps"])
        assert len(losses) == token["steps"] and name in HEADS and not head.training
    assert small["products"] == token["products"] and small["seed"] == token["seed"]
    sizes = query_sizes(encoder, [int(part) for part in small["shrink"].split(",")])
    for size, terms in {(size, TERMS["all three"]) for size in sizes} | {(sizes[-1], terms) for terms in TERMS.values()}:
        student, losses = train_or_load_student(context, size, terms, small["steps"], small["learning_rate"])
        assert len(losses) == small["steps"] and student.size == size
    assert not any(tmp_path.iterdir())                        # nothing was drawn, described or trained


def test_shipped_networks_are_small_and_of_one_encoder():
    assert len(SHIPPED) == len(HEADS) + 1 + len(TERMS) and all(path.stat().st_size < 5e6 for path in SHIPPED)
    keys = []
    for path in SHIPPED:
        with safe_open(path, "pt") as file:
            keys.append(file.metadata()["key"])
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())
    assert len(set(keys)) == len(keys)


def test_keys_follow_weights_and_settings_but_not_the_number_type(tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(heads, "train_or_load", lambda module, name, key, *rest: keys.append(key) or [1.])

    def key_of_head(encoder, name="gem", size=96, steps=10, products=8):
        train_or_load_head(TrainingContext(encoder, CropSource(products, data=tmp_path)), name, size, steps)
        return keys.pop()

    def key_of_student(terms, rate=1e-3, architecture=None):
        train_or_load_student(TrainingContext(full, CropSource(8, data=tmp_path)), 32, terms, 10, rate, architecture)
        return keys.pop()

    full = load_encoder("mini", dtype=torch.float32)
    assert key_of_head(full) == key_of_head(load_encoder("mini", dtype=torch.bfloat16))
    others = [key_of_head(load_encoder("mini", random_weights=True)), key_of_head(full, "spoc"), key_of_head(full, size=64),
              key_of_head(full, steps=11), key_of_head(full, products=9)]
    students = [key_of_student(terms) for terms in TERMS.values()] + [key_of_student((.7, .7), 2e-3)]
    students += [key_of_student((.7, .7), architecture=name) for name in ("lcnet_035", "lcnet_050")]
    assert len({key_of_head(full), *others, *students}) == 1 + len(others) + len(students)


def test_an_interrupted_training_leaves_nothing_that_looks_finished(tmp_path):
    def stopped(checkpoint):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_or_load(nn.Linear(2, 2), "none", "k", stopped, tmp_path)
    assert not (tmp_path / "trained/k.safetensors").exists()


def test_an_interrupted_training_continues_from_its_checkpoint(tmp_path):
    learned = nn.Linear(2, 2)
    plan = TrainingPlan(steps=6, learning_rate=.1)
    starts = []

    def learn(checkpoint, stop=None):
        def loss_of(draw, rng):
            starts.append(draw)
            return learned(torch.tensor(rng.normal(size=(4, 2)), dtype=torch.float32)).square().mean()

        losses = train(learned, loss_of, plan, checkpoint, save_every=2, stop=stop)
        if stop:
            raise KeyboardInterrupt
        return losses

    with pytest.raises(KeyboardInterrupt):
        train_or_load(learned, "none", "k", lambda checkpoint: learn(checkpoint, stop=4), tmp_path)
    losses = train_or_load(learned, "none", "k", learn, tmp_path)
    assert starts == list(range(6)) and len(losses) == 6
    assert [path.name for path in (tmp_path / "trained").iterdir()] == ["k.safetensors"]


@pytest.mark.parametrize("name", ["resnet10t", "lcnet_035", "test_vit"])
def test_shared_stages_keep_the_teachers_weights_on_any_backbone(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=8)
    teacher = Encoder(model, name, model.default_cfg["input_size"][-1] if "vit" in name else 32, (0.5,) * 3, (0.25,) * 3, dtype=torch.float32)
    student = Student(teacher, shared=2)
    trained = [p.requires_grad for p in student.parameters()]
    assert trained[0] and not trained[-1] and trained == sorted(trained, reverse=True)    # the beginning learns, the end stays
    assert all(p.requires_grad for p in Student(teacher).parameters())
    student(torch.rand(2, 3, teacher.size, teacher.size)).sum().backward()
    assert next(student.parameters()).grad is not None
