"""Training heads: crops from both kinds of source, seeded maps, equal batches for every head, resumable training."""
import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from patchify.retrieval_set import RetrievalSet
from patchify.data.classes import LabelledSet, load_gldv2_train
from patchify.descriptors.heads import Classifier, evaluate_photos, head_descriptors, labelled_crops, open_crop
from patchify.descriptors.heads import photo_descriptors
from patchify.descriptors.heads import scale_descriptors, train_head, view_maps
from patchify.descriptors.network import DescriptorNet, FeatureMap, IMAGE_SCALES
from patchify.descriptors.pooling import PoolHead
from patchify.descriptors.token import TokenHead
from patchify.descriptors.training import image_batches, init_published, published_token_plan, train_network
from patchify.learn import TrainingPlan, train
from patchify.scoring import evaluate_descriptors


@pytest.fixture
def labelled(tmp_path):
    rows = []
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append((f"{i}.png", f"{i}.png", f"class {i // 2}", "train", np.array([2, 3, 22, 23], np.float32) if i % 2 else None))
    return LabelledSet("six", tmp_path, pd.DataFrame(rows, columns=["id", "path", "label", "part", "box"]))


def pooled(images):
    return nn.functional.avg_pool2d(images, 4)


def test_crops_of_a_labelled_set(labelled):
    crops = labelled_crops(labelled)
    assert crops["label"].tolist() == [0, 0, 1, 1, 2, 2] and crops["box"][0] is None and crops["box"][1].tolist() == [2, 3, 22, 23]
    assert all(box is None for box in labelled_crops(labelled, boxed=False)["box"])


def test_distractors_of_a_retrieval_set_are_no_class(labelled):
    one = np.array([[0, 0, 5, 5]], np.float32)
    queries = pd.DataFrame({"id": ["q"], "path": ["0.png"], "box": [one[0]], "instance": ["cup"], "category": None, "subcategory": None})
    gallery = pd.DataFrame({"id": list("abc"), "path": ["1.png", "2.png", "3.png"], "boxes": [one, one[:0], one.repeat(2, 0)],
                            "instance": ["cup", None, "jar"], "scale": np.nan, "clutter": np.nan})
    crops = labelled_crops(RetrievalSet("x", labelled.root, queries, gallery))
    assert crops["label"].tolist() == [0, 0, 1, 1]


def test_crops_never_leave_the_image_and_never_vanish(labelled):
    file = labelled.root / "0.png"
    assert open_crop(file, [39.6, 29.6, 40, 30]).size == (1, 1) or min(open_crop(file, [39.6, 29.6, 40, 30]).size) >= 1
    assert open_crop(file, [10, 10, 20, 20], 0.5).size == (20, 20) and open_crop(file, [0, 0, 40, 30], 2).size == (40, 30)


def test_views_do_not_depend_on_the_other_crops(labelled):
    crops = labelled_crops(labelled)
    maps = view_maps(crops, pooled, 16, views=3)
    assert maps.shape == (6, 3, 3, 4, 4) and maps.dtype == torch.float16
    assert torch.equal(view_maps(crops[:4], pooled, 16, views=3), maps[:4])
    assert not torch.equal(view_maps(crops, pooled, 16, views=3, seed=1), maps)
    assert view_maps(crops, pooled, 16).shape == (6, 1, 3, 4, 4)


def test_every_head_sees_the_same_batches(labelled):
    maps, seen = view_maps(labelled_crops(labelled), pooled, 16, views=3), []

    class Spy(PoolHead):
        def forward(self, feature_map):
            seen.append(feature_map.clone())
            return super().forward(feature_map)

    for pool in ("gem", "mac"):
        train_head(Spy(3, 4, pool), maps, [0, 0, 1, 1, 2, 2], 4, TrainingPlan(steps=3, learning_rate=0.01), batch=5)
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:]))


def test_a_finished_head_is_loaded(labelled, tmp_path):
    maps, plan, found = view_maps(labelled_crops(labelled), pooled, 16, views=2), TrainingPlan(steps=4, learning_rate=0.05), []
    for _ in range(2):
        head = PoolHead(3, 4)
        train_head(head, maps, [0, 0, 1, 1, 2, 2], 4, plan, checkpoint=tmp_path / "head.safetensors")
        found.append(head_descriptors(head, maps[:, :1]))
        assert not head.training
    assert np.array_equal(*found) and np.allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)


def test_batches_of_images_are_seeded(labelled):
    load_batch = image_batches(labelled_crops(labelled), 16, batch=4)
    (a, la), (b, lb) = (load_batch(0, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(la, lb) and a.shape == (4, 3, 16, 16)


def test_an_epoch_of_batches_uses_every_crop_once(labelled):
    load_batch = image_batches(labelled_crops(labelled), 16, batch=4)
    labels = torch.cat([load_batch(number, np.random.default_rng(0))[1] for number in range(3)]).tolist()
    assert sorted(labels[:6]) == sorted(labels[6:]) == [0, 0, 1, 1, 2, 2]


def test_the_classifier_prefers_the_right_class():
    classifier = Classifier(nn.Identity(), 3, 3)
    classifier.face.weight.data = torch.eye(3)
    x = torch.eye(3)
    assert classifier(x, torch.arange(3)) < classifier(x, torch.tensor([1, 2, 0]))


def test_the_published_plan_warms_up_for_five_epochs():
    plan = published_token_plan(1280)
    assert (plan.steps, plan.warmup) == (300, 50) and plan.optimizer == "sgd"
    assert plan.rate(49) == plan.rate(50) == plan.learning_rate == 0.00125
    schedule = np.linspace(0.0001 * 32 / 256, 0.01 * 32 / 256, 50)  # as the authors write it
    assert np.allclose([plan.rate(step) for step in range(50)], schedule, rtol=1e-12)
    assert plan.accumulate == 1                                    # 128 images a step share their batch norms
    assert published_token_plan(1280, at_once=32).accumulate == 4        # 32 at a time


def test_published_initial_weights():
    torch.manual_seed(0)
    head = init_published(TokenHead(8, 8, 64, heads=4))
    attentions = [module for name, module in head.named_modules() if name.endswith("attn")]
    assert len(attentions) == 5 and 0.8 < head.query.std() < 1.2
    for attention in attentions:
        assert not attention.proj.weight.any() and not attention.q.bias.any() and not attention.v.bias.any()
        assert attention.q.weight.abs().max() < 0.1 and 0.018 < attention.k.weight.std() < 0.022


def test_the_batches_of_a_step_are_averaged(labelled):
    crops, plan = labelled_crops(labelled), TrainingPlan(1, 0.1, optimizer="sgd", accumulate=3, seed=5)
    torch.manual_seed(0)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    slow, batches = copy.deepcopy(net), image_batches(crops, 8, batch=2, seed=plan.seed)

    def drawn(number):
        rng = np.random.default_rng([plan.seed, number])
        rng.integers(2**62)                                        # the loop seeds dropout with it
        return batches(number, rng)

    torch.manual_seed(plan.seed)
    classifier = Classifier(slow, 4, 3)
    expected = train(classifier, lambda draw, rng: sum(classifier(*drawn(number)) for number in range(3)) / 3, replace(plan, accumulate=1))
    assert train_network(net, crops, 4, plan, size=8, batch=2) == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(net[2].weight, slow[2].weight, atol=1e-6)


def landmarks(root, labels=3, each=3):
    "A folder in the layout of GLDv2's clean training images."
    rows = []
    for label in range(labels):
        names = [f"{label:x}{i:x}0{label}{i}" for i in range(each)]
        rows.append(f"{label + 100},{' '.join(names)}")
        for i, name in enumerate(names):
            path = root / "train" / name[0] / name[1] / name[2] / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng([label, i]).integers(0, 80 * (label + 1), (50, 60, 3), dtype=np.uint8)).save(path)
    (root / "train_clean.csv").write_text("\n".join(["landmark_id,images", *rows]))
    return root


def test_the_published_run_of_token_starts_and_goes_on(tmp_path):
    crops = labelled_crops(load_gldv2_train(landmarks(tmp_path / "gldv2")))
    plan, size = published_token_plan(len(crops), batch=4, epochs=3, warmup=1, per_gpu=4, at_once=2), 64

    def fresh():
        torch.manual_seed(0)
        backbone = FeatureMap(timm.create_model("lcnet_035", num_classes=0))
        return DescriptorNet(backbone, init_published(TokenHead(backbone.channels, 16, 16, heads=2)))

    whole, parts = fresh(), fresh()
    losses = train_network(whole, crops, 16, plan, size, batch=2, checkpoint=tmp_path / "whole.safetensors")
    assert len(losses) == plan.steps == 9 and np.isfinite(losses).all() and not whole.training
    with pytest.MonkeyPatch.context() as patch:                     # killed at the fifth step, with checkpoints at every second
        patch.setattr("patchify.descriptors.training.train", lambda module, loss_of, plan, path: train(
            module, lambda draw, rng: loss_of(draw, rng) if draw < 10 else (_ for _ in ()).throw(KeyboardInterrupt), plan, path, save_every=2))
        with pytest.raises(KeyboardInterrupt):
            train_network(parts, crops, 16, plan, size, batch=2, checkpoint=tmp_path / "parts.safetensors")
    again = fresh()
    assert train_network(again, crops, 16, plan, size, batch=2, checkpoint=tmp_path / "parts.safetensors") == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_photographs_keep_their_shape_and_a_query_its_scale(tmp_path):
    Image.new("RGB", (400, 200), "red").save(tmp_path / "wide.png")
    seen = []

    def backbone(images):
        seen.append(tuple(images.shape[2:]))
        return nn.functional.avg_pool2d(images, 4)

    crops = pd.DataFrame({"file": [str(tmp_path / "wide.png")] * 2, "box": pd.Series([None, np.array([0, 0, 200, 100], np.float32)], dtype=object)})
    vectors = photo_descriptors(DescriptorNet(backbone, PoolHead(3, 4)), crops, longest=200)
    assert seen == [(100, 200), (141, 282), (70, 141), (50, 100), (70, 141), (35, 70)]     # half of the picture, half of the limit
    assert vectors.shape == (2, 4) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_landmarks_are_evaluated_with_cropped_queries_and_their_protocol(labelled):
    "Three queries with boxes, six images; easy, hard and junk as ROxford lists them."
    box = np.array([2, 3, 22, 23], np.float32)
    paths = [f"{i}.png" for i in range(6)]
    lists = dict(easy=[[0], [2], [4]], hard=[[1], [3], []], junk=[[5], [], [0]])
    queries = pd.DataFrame({"id": ["a", "b", "c"], "path": paths[::2], "box": [box] * 3, "instance": list("abc"),
                            "category": None, "subcategory": None, **lists})
    gallery = pd.DataFrame({"id": paths, "path": paths, "boxes": [np.empty((0, 4), np.float32)] * 6,
                            "instance": None, "scale": np.nan, "clutter": np.nan})
    benchmark = RetrievalSet("tiny landmarks", labelled.root, queries, gallery).under("medium")
    torch.manual_seed(0)
    net = DescriptorNet(lambda images: nn.functional.avg_pool2d(images, 4), PoolHead(3, 4))
    report = evaluate_photos(net, benchmark, longest=32)
    crops = pd.DataFrame({"file": [str(labelled.root / path) for path in paths[::2]], "box": [box] * 3})
    whole = pd.DataFrame({"file": [str(labelled.root / path) for path in paths], "box": None})
    q, g = photo_descriptors(net, crops, 32), photo_descriptors(net, whole, 32)
    assert report == evaluate_descriptors(benchmark, q, g) and {"easy", "medium", "hard", "mp@k"} <= set(report)


def test_scales_are_finished_batch_by_batch(labelled):
    largest = []

    def backbone(images):
        largest.append(len(images))
        return nn.functional.avg_pool2d(images, 4)

    net, crops = DescriptorNet(backbone, PoolHead(3, 4)), labelled_crops(labelled)
    slow = torch.cat([net.describe(torch.from_numpy(np.array(open_crop(row.file, row.box).resize((16, 16)))).permute(2, 0, 1)[None].float() / 255, IMAGE_SCALES) for row in crops.itertuples()])
    largest.clear()
    assert np.allclose(F.normalize(torch.from_numpy(scale_descriptors(net, crops, 16, batch=4).sum(0))), slow, atol=1e-5)
    assert max(largest) == 4 and len(largest) == 2 * len(IMAGE_SCALES)
