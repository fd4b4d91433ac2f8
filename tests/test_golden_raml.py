"""Losses with gradients, layers, triplets, batch mining and evaluation against RAML's code (golden `raml`)."""
import fnmatch
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from patchify.descriptors.pooling import GeM, PoolHead, gem, mac, power_law, spoc, unit
from patchify.descriptors.raml import absolute_loss, distillation_loss, relational_loss
from patchify.descriptors.triplets import batch_positives, triplet_loss
from patchify.metrics import average_precisions, precision_at, recall_at
from patchify.retrieval_set import class_retrieval
from patchify.scoring import evaluate_descriptors

FOLDER = Path(os.environ.get("PATCHIFY_GOLDEN", Path(__file__).parent / "golden"))
META = json.loads((FOLDER / "raml.json").read_text())
ARRAYS = np.load(FOLDER / "raml.npz", allow_pickle=False)
CONFIG = META["config"]
OUTPUTS = {a["name"] for a in META["arrays"] if a["role"] == "output"}
TRIPLETS = sorted(name for name in OUTPUTS if name.startswith("triplet.") and name.endswith(".loss"))


def tensor(name):
    return torch.from_numpy(ARRAYS[name].copy())


def agree(name, value):
    patterns = META["tolerance"]["patterns"]
    atol, rtol = patterns[max((p for p in patterns if fnmatch.fnmatchcase(name, p)), key=len)]
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    np.testing.assert_allclose(value.reshape(ARRAYS[name].shape), ARRAYS[name], atol=atol, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("setting", CONFIG["lambdas"])
def test_distillation_loss_and_gradient(setting):
    student = tensor("s_vecs").requires_grad_()
    loss = distillation_loss(student, tensor("t_vecs"), *CONFIG["lambdas"][setting])
    loss.backward()
    agree(f"second_order.{setting}.loss", loss)
    agree(f"second_order.{setting}.grad", student.grad)


def test_terms():
    student, teacher = tensor("s_vecs").requires_grad_(), tensor("t_vecs")
    loss = absolute_loss(student, teacher)
    loss.backward()
    agree("regression.loss", loss)
    agree("regression.grad", student.grad)
    among = lambda a, b: a @ b.transpose(1, 2)
    agree("mse.st", relational_loss(among(student, teacher), among(teacher, teacher)))
    agree("mse.ss", relational_loss(among(student, student), among(teacher, teacher)))


def test_columns_of_a_batch_fold_image_by_image():
    images, views, _ = ARRAYS["s_vecs"].shape
    columns = [tensor(name).flatten(0, 1).T for name in ("s_vecs", "t_vecs")]
    agree("asym_train.loss", distillation_loss(*(c.T.unflatten(0, (images, views)) for c in columns), *CONFIG["lambdas"]["both"]))


def test_layers():
    feature_map = tensor("fmap")
    agree("gem", gem(feature_map, 3.0))
    learned, per_channel = GeM(), GeM(channels=len(ARRAYS["gemmp_p"]))
    learned.load_state_dict({"p": tensor("gem_p")})
    per_channel.load_state_dict({"p": tensor("gemmp_p")})
    agree("gem_learned", learned(feature_map))
    agree("gemmp", per_channel(feature_map))
    agree("spoc", spoc(feature_map))
    agree("mac", mac(feature_map))
    agree("l2n", unit(feature_map))
    agree("powerlaw", power_law(feature_map))


def test_network_head():
    feature_map, weight = tensor("fmap"), tensor("whiten_weight")
    head = PoolHead(weight.shape[1], CONFIG["whiten_dim"])
    head.load_state_dict({"pool.p": head.pool.p.detach(), "whiten.weight": weight, "whiten.bias": tensor("whiten_bias")})
    agree("net_whiten", head(feature_map).T)
    agree("net_nowhiten", PoolHead(weight.shape[1], None)(feature_map).T)


@pytest.mark.parametrize("name", TRIPLETS)
def test_triplets(name):
    anchors = tensor("trip_x").requires_grad_()
    loss = triplet_loss(anchors, tensor("trip_pos"), tensor("trip_neg"), float(name.removeprefix("triplet.").removesuffix(".loss")))
    loss.backward()
    agree(name, loss)
    agree(name.removesuffix("loss") + "grad_x", anchors.grad)


def test_positives_of_the_batch():
    positives = batch_positives(ARRAYS["trip_labels"])
    agree("sym.positives", positives)
    assert positives.shape[1] == CONFIG["spc"] - 1
    vectors = tensor("trip_x").requires_grad_()
    loss = triplet_loss(vectors, vectors[positives], tensor("trip_neg"), CONFIG["margin"])
    loss.backward()
    agree("sym.loss", loss)
    agree("sym.grad", vectors.grad)


@pytest.mark.parametrize("mode, gallery", [("asym", "eval_db"), ("sym", "eval_q")])
def test_evaluation(mode, gallery):
    kappas = CONFIG["kappas"]
    queries, gallery = ARRAYS["eval_q"].T, ARRAYS[gallery].T
    labels = ARRAYS["eval_labels"]
    rows = np.arange(len(labels))
    positives = [np.flatnonzero((labels == label) & (rows != row)) for row, label in enumerate(labels)]
    junk = rows[:, None]                                            # the image itself is no result
    ranks = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")
    aps = average_precisions(ranks, positives, junk, variant="trapezoid")
    precisions = np.stack([precision_at(ranks, positives, k, junk) for k in kappas], axis=1)
    agree(f"eval.{mode}.ranks", ranks.T)
    agree(f"eval.{mode}.map", np.nanmean(aps))
    agree(f"eval.{mode}.aps", aps)
    agree(f"eval.{mode}.prs", precisions)
    agree(f"eval.{mode}.pr", np.nanmean(precisions, axis=0))
    agree(f"eval.{mode}.apk", [np.nanmean(average_precisions(ranks, positives, junk, k, "trapezoid")) for k in kappas])
    agree(f"eval.{mode}.rec", [np.nanmean(recall_at(ranks, positives, k, junk)) for k in kappas])
    report = evaluate_descriptors(class_retrieval(labels), queries, gallery)
    assert report["map"] == pytest.approx(100 * float(ARRAYS[f"eval.{mode}.map"]), abs=1e-3)
    for k, recall in zip(kappas, ARRAYS[f"eval.{mode}.rec"]):
        assert str(k) not in report["r@k"] or report["r@k"][str(k)] == pytest.approx(100 * recall, abs=1e-3)


def test_every_output_is_covered():
    one_each = {"regression.loss", "regression.grad", "mse.st", "mse.ss", "asym_train.loss", "gem", "gem_learned", "gemmp", "spoc", "mac",
                "l2n", "powerlaw", "net_whiten", "net_nowhiten", "sym.positives", "sym.loss", "sym.grad"}
    losses = {f"second_order.{setting}.{kind}" for setting in CONFIG["lambdas"] for kind in ("loss", "grad")}
    triplets = set(TRIPLETS) | {name.removesuffix("loss") + "grad_x" for name in TRIPLETS}
    measures = {f"eval.{mode}.{kind}" for mode in ("asym", "sym") for kind in ("ranks", "map", "aps", "prs", "pr", "apk", "rec")}
    assert OUTPUTS == one_each | losses | triplets | measures
