"""Kept networks: what ships is what the pages ask for, keys follow the settings, a student's own stages."""
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
from patchify.zoo.heads import CropSource, HEADS, TERMS, TrainingContext, cache_key, query_sizes, train_or_load, train_or_load_head, train_or_load_student

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "patchify/weights"
SHIPPED = sorted([*WEIGHTS.glob("head-*.safetensors"), *WEIGHTS.glob("student-*.safetensors")])


def defaults(page):
    "The default parameters of an experiment."
    known = papermill.inspect_notebook(str(ROOT / f"nbs/experiments/{page}.ipynb"))
    return {name: eval(facts["default"]) for name, facts in known.items()}


def test_the_pages_find_every_network_in_the_package(tmp_path):
    encoder, token, small = load_encoder("mini"), defaults("token"), defaults("asymmetric")
    school = TrainingContext(encoder, CropSource(token["products"], data=tmp_path), token["seed"])
    for name in [*(f"token {count}" for count in token["tokens"].split(",")), *POOLINGS]:
        head, losses = train_or_load_head(school, name, token["size"], token["steps"])
        assert len(losses) == token["steps"] and name in HEADS and not head.training
    assert small["products"] == token["products"] and small["seed"] == token["seed"]
    sizes = query_sizes(encoder, [int(part) for part in small["shrink"].split(",")])
    for size, terms in {(size, TERMS["all three"]) for size in sizes} | {(sizes[-1], terms) for terms in TERMS.values()}:
        student, losses = train_or_load_student(school, size, terms, small["steps"], small["learning_rate"])
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


def test_keys_follow_weights_and_settings_but_not_the_number_type():
    a, b = load_encoder("mini", dtype=torch.float32), load_encoder("mini", dtype=torch.bfloat16)
    assert cache_key(a, 1) == cache_key(b, 1) != cache_key(a, 2) and cache_key(load_encoder("mini", random_weights=True), 1) != cache_key(a, 1)


def test_an_interrupted_training_leaves_nothing_that_looks_finished(tmp_path):
    module = nn.Linear(2, 2)
    def stopped(checkpoint): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train_or_load(module, "none", "k", stopped, tmp_path)
    assert not (tmp_path / "trained/k.safetensors").exists()


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
