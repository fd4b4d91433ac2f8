"""Coupled views, distillation terms, triplets, students and the training loop around them."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from patchify.descriptors.raml import OneCyclePlan, PRESETS, Preset, absolute_loss, distillation_loss, distillation_step
from patchify.descriptors.raml import relational_loss
from patchify.descriptors.students import Student, compare_students, evaluate_asymmetric, query_cost
from patchify.descriptors.triplets import batch_positives, sample_negatives, triplet_loss, triplet_step
from patchify.descriptors.views import CoupledViews, centre_view, draw_views, mix_views, parallel_map, render_views, view_loader
from patchify.images import open_image as open_file
from patchify.data.classes import load_cub
from patchify.encoder import Encoder
from patchify.descriptors.network import DescriptorNet, FeatureMap
from patchify.descriptors.pooling import PoolHead
from patchify.learn import TrainingPlan, train
from patchify.scoring import evaluate_descriptors


def vectors(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def ramp(width, height):
    "Red is x, green is y."
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255 * x / width, 255 * y / height, 0 * x], -1).astype(np.uint8))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 1000))
def test_views_lie_inside_any_image(width, height, seed):
    boxes = draw_views(width, height, 5, np.random.default_rng(seed)).boxes
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (width, height)).all() and (boxes[:, 2:] > boxes[:, :2]).all()


def test_a_strip_without_room_for_the_area_gives_its_centre():
    box = draw_views(1000, 10, 1, np.random.default_rng(0), area=(0.9, 1.0)).boxes[0]
    assert box.tolist() == [493, 0, 506, 10]                        # no 4:3 region of that size fits


def test_only_some_views_change_their_colours():
    views = draw_views(90, 60, 400, np.random.default_rng(0), (0.4, 0.3, 0.2, 0.1), coloured=0.8)
    change = np.abs(views.colours - (1, 1, 1, 0))
    assert 0.72 < (change > 0).any(1).mean() < 0.88
    assert (change.max(0) <= (0.4, 0.3, 0.2, 0.1)).all() and (change.max(0) > (0.35, 0.25, 0.17, 0.08)).all()
    plain = draw_views(90, 60, 400, np.random.default_rng(0))
    assert np.array_equal(plain.boxes, views.boxes) and np.array_equal(plain.mirrored, views.mirrored)


@settings(max_examples=15, deadline=None)
@given(st.integers(60, 300), st.integers(60, 300), st.integers(0, 1000))
def test_both_sizes_show_the_same_region(width, height, seed):
    image, views = ramp(width, height), draw_views(width, height, 3, np.random.default_rng(seed), jitter=0, area=(0.2, 1.0))
    small, large = render_views(image, views, 16), render_views(image, views, 64)
    assert (small - F.avg_pool2d(large, 4)).abs().max() < 0.04
    for (x0, y0, x1, y1), mirrored, view in zip(views.boxes, views.mirrored, small):
        red = view[0].mean(0)
        expected = np.array([x0, x1])[:: -1 if mirrored else 1] / width
        assert abs(float(red[0]) - expected[0]) < 0.06 and abs(float(red[-1]) - expected[1]) < 0.06
        assert abs(float(view[1, 0].mean()) - y0 / height) < 0.06 and abs(float(view[1, -1].mean()) - y1 / height) < 0.06


def test_colour_changes_are_shared_by_both_sizes():
    image, views = ramp(120, 90), draw_views(120, 90, 12, np.random.default_rng(0))
    small, large = render_views(image, views, 16), render_views(image, views, 64)
    plain = render_views(image, CoupledViews(views.boxes, views.mirrored, np.tile([1, 1, 1, 0], (12, 1)), views.order), 64)
    assert (small.mean((2, 3)) - large.mean((2, 3))).abs().max() < 0.04 < (plain.mean((2, 3)) - large.mean((2, 3))).abs().max()


def test_views_are_seeded():
    image = ramp(80, 60)
    a, b = (render_views(image, draw_views(80, 60, 4, np.random.default_rng(3)), 16) for _ in range(2))
    assert torch.equal(a, b) and a.min() >= 0 and a.max() <= 1


def test_mixing_never_meets_itself_and_is_shared():
    images = torch.eye(4).view(4, 1, 4, 1, 1).expand(4, 6, 4, 2, 2)
    small, large = mix_views(images, images.repeat(1, 1, 1, 3, 3), np.random.default_rng(1))
    assert torch.equal(small[..., 0, 0], large[..., 0, 0]) and torch.allclose(small.sum(2), torch.ones(4, 6, 2, 2))
    assert ((small[..., 0, 0] > 0).sum(-1) <= 2).all()
    one = torch.rand(1, 3, 3, 2, 2)
    assert torch.equal(mix_views(one, one, np.random.default_rng(0))[0], one)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 9), st.integers(0, 50))
def test_loss_is_zero_for_the_teacher_itself(images, views, dim, seed):
    v = vectors(images, views, dim, seed=seed)
    for weights in [(0, 0), (1, 0), (0, 1), (0.7, 0.7)]:
        assert 0 <= float(distillation_loss(v, v, *weights)) < 1e-9


def test_each_weight_acts_alone():
    s, t = vectors(3, 5, 8), vectors(3, 5, 8, seed=1)
    among = lambda a, b: a @ b.transpose(1, 2)
    base = absolute_loss(s, t)
    assert torch.isclose(distillation_loss(s, t, 0.3, 0), base + 0.3 * relational_loss(among(s, t), among(t, t)))
    assert torch.isclose(distillation_loss(s, t, 0, 0.4), base + 0.4 * relational_loss(among(s, s), among(t, t)))
    assert torch.equal(distillation_loss(s, t, 0, 0), base)


def test_a_rotated_student_is_invisible_to_its_own_similarities():
    t = vectors(2, 4, 6)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    own = distillation_loss(t @ turn, t, 0, 1) - absolute_loss(t @ turn, t)
    assert abs(float(own)) < 1e-4 < float(absolute_loss(t @ turn, t))


def test_the_diagonal_is_left_out():
    same = torch.zeros(1, 3, 3)
    assert float(relational_loss(torch.eye(3)[None] * 9, same)) < 1e-9
    assert float(relational_loss(torch.ones(1, 3, 3), same)) == pytest.approx(1, abs=1e-5)


def test_no_gradient_reaches_the_teacher():
    s, t = vectors(2, 3, 4).requires_grad_(), vectors(2, 3, 4, seed=1).requires_grad_()
    distillation_loss(s, t).backward()
    assert s.grad.any() and t.grad is None


def test_triplets_against_loops():
    a, p, n = vectors(3, 5), vectors(3, 2, 5, seed=1), vectors(3, 4, 5, seed=2)
    slow = sum(np.mean([max(0, float((a[i] - p[i, j]).square().sum() - (a[i] - n[i, k]).square().sum()) + 0.5) for j in range(2) for k in range(4)])
               for i in range(3))
    assert float(triplet_loss(a, p, n, 0.5)) == pytest.approx(slow, abs=1e-5)


def test_classes_with_one_image_are_named():
    with pytest.raises(ValueError, match="gull has 1"):
        batch_positives(["crow", "crow", "gull"])
    with pytest.raises(ValueError, match="same number"):
        batch_positives([0, 0, 1, 1, 1])


def test_negatives_are_of_other_classes_even_when_all_are_far():
    corners = torch.cat([torch.eye(4), -torch.eye(4)])          # no pair nearer than sqrt 2
    labels = np.repeat([0, 1], 4)
    drawn = sample_negatives(corners, labels, 6, np.random.default_rng(0))
    assert (labels[drawn] != labels[:, None]).all()
    with pytest.raises(ValueError, match="no negatives"):
        sample_negatives(corners, np.zeros(8), 2, np.random.default_rng(0))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64))
def test_the_centre_view_is_square(width, height, size):
    assert centre_view(Image.new("RGB", (width, height)), size).shape == (3, size, size)


def test_cost_counts_and_keeps_the_mode():
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.LazyLinear(2, bias=False)).train()
    net(torch.rand(1, 3, 6, 6))
    cost = query_cost(net, 6, repeats=1)
    assert cost.flops == 2 * (36 * 3 * 4 + 36 * 4 * 2) and cost.parameters == 12 + 288 and net.training


class Head(nn.Module):
    "Mean colour through a linear layer: any input size."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4)

    def forward(self, images):
        return self.linear(images.mean((2, 3)))


def settings_of(**changes):
    return Preset(**dict(learning_rate=0.01, lam_1=0.7, lam_2=0.7, query_size=8, gallery_size=16, views=3, batch=2) | changes)


def open_image(index):
    return Image.fromarray(np.random.default_rng(index).integers(0, 255, (20, 24, 3), dtype=np.uint8))


@pytest.mark.parametrize("mix", ["dataset", "batch", None])
def test_a_student_equal_to_a_size_blind_teacher_has_no_loss(mix):
    student = teacher = Head()
    step = distillation_step(student, teacher, open_image, 5, settings_of(), mix)
    assert float(step(0, np.random.default_rng(0)).detach()) < 1e-3


def test_an_epoch_uses_every_image_once():
    opened = []

    def spy(index):
        opened.append(index)
        return open_image(index)

    step = distillation_step(Head(), Head(), spy, 6, settings_of(accumulate=3, batch=2), mix=None)
    for draw in range(6):
        step(draw, np.random.default_rng(draw))
    assert sorted(opened[:6]) == sorted(opened[6:]) == list(range(6)) and opened[:6] != opened[6:]


def test_partners_come_from_all_training_images():
    opened = []

    def spy(index):
        opened.append(index)
        return open_image(index)

    step = distillation_step(Head(), Head(), spy, 40, settings_of(batch=2, views=8))
    step(0, np.random.default_rng(0))
    assert len(opened) == 2 + 2 * 8 and len(set(opened[2:])) > 8
    with pytest.raises(ValueError, match="mix must be"):
        distillation_step(Head(), Head(), spy, 40, settings_of(), mix="all")


def test_distillation_learns_and_resumes_bit_for_bit(tmp_path):
    teacher, ends = Head(), []
    plan = TrainingPlan(steps=30, learning_rate=0.03, weight_decay=0)
    for interrupted in (False, True):
        student = Head()
        nn.init.normal_(student.linear.weight, std=2)
        step = distillation_step(student, teacher, open_image, 5, settings_of())
        file = tmp_path / f"{interrupted}.safetensors"
        if interrupted:
            stop = lambda draw, rng: step(draw, rng) if draw < 13 else (_ for _ in ()).throw(KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                train(student, stop, plan, file, save_every=5)
            student = Head()
            step = distillation_step(student, teacher, open_image, 5, settings_of())
        losses = train(student, step, plan, file, save_every=5)
        ends.append((losses, student.state_dict()))
    assert ends[0][0] == ends[1][0] and all(torch.equal(ends[0][1][k], ends[1][1][k]) for k in ends[0][1])
    assert (tmp_path / "True.safetensors").read_bytes() == (tmp_path / "False.safetensors").read_bytes()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_a_broken_loss_stops_with_a_clear_message(tmp_path):
    student = Head()
    loss_of = lambda draw, rng: student.linear.weight.sum() * (float("inf") if draw == 7 else 1.0)
    with pytest.raises(FloatingPointError, match="inf at step 7 of 20.*last good state"):
        train(student, loss_of, TrainingPlan(steps=20, learning_rate=0.1), tmp_path / "run.safetensors", save_every=5)
    assert student.linear.weight.isfinite().all()


def test_another_plan_does_not_continue_a_checkpoint(tmp_path):
    student = Head()
    loss_of = lambda draw, rng: student.linear.weight.square().sum()
    train(student, loss_of, TrainingPlan(steps=3, learning_rate=0.1), tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="seed = 0, this run asks for 1"):
        train(student, loss_of, TrainingPlan(steps=3, learning_rate=0.1, seed=1), tmp_path / "run.safetensors")


def test_presets_are_the_published_ones():
    assert {name: (p.learning_rate, p.lam_1, p.lam_2) for name, p in PRESETS.items()} == {
        "cub": (1.4025e-4, 0.7718, 0.6684), "cars": (1.1692e-4, 0.6371, 0.7731), "sop": (1.7579e-4, 0.7482, 0.6778)}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_preset_is_a_whole_run(preset):
    plan = preset.plan(seed=3)
    assert plan.steps * plan.accumulate * preset.batch == preset.epochs * preset.images_per_epoch
    assert (plan.seed, plan.weight_decay, plan.optimizer) == (3, preset.weight_decay, "adamw")
    assert plan.rate(0) == pytest.approx(preset.learning_rate / 10)
    assert max(map(plan.rate, range(plan.steps))) == pytest.approx(preset.learning_rate)


@pytest.mark.parametrize("images, steps, cycle", [(59551, 40, 40), (8054, 40, 40), (5864, 29, 30), (60, 1, 1)])
def test_an_epoch_has_at_most_8000_images(images, steps, cycle):
    plan = PRESETS["cub"].plan(images)
    assert (plan.steps, plan.cycle) == (200 * steps, 200 * cycle)


@pytest.mark.parametrize("total", [10, 57, 400])
def test_one_cycle_is_that_of_torch(total):
    plan = OneCyclePlan(total, 0.01)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, div_factor=10, total_steps=total)
    for step in range(total):
        group, options = optimizer.param_groups[0], plan.options(step)
        assert options["lr"] == pytest.approx(group["lr"]) and options["betas"] == pytest.approx(group["betas"])
        optimizer.step()
        if step < total - 1:
            scheduler.step()


def test_the_loop_cycles_the_momentum():
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append((self.param_groups[0]["lr"], self.param_groups[0]["betas"][0]))
            return super().step(closure)

    student, plan = Head(), OneCyclePlan(10, 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        train(student, lambda draw, rng: student.linear.weight.square().sum(), plan)
    assert seen == [(plan.rate(step), plan.options(step)["betas"][0]) for step in range(10)]
    assert seen[0][1] == 0.95 and min(momentum for _, momentum in seen) == pytest.approx(0.85)


def test_views_of_many_images_are_seeded_and_in_order():
    views = view_loader(open_image, 16)
    batch = views([4, 0, 4], np.random.default_rng(1))
    assert batch.shape == (3, 3, 16, 16) and torch.equal(batch, views([4, 0, 4], np.random.default_rng(1)))
    slow, rng = [], np.random.default_rng(1)
    for index in (4, 0, 4):
        image = open_image(index)
        slow.append(render_views(image, draw_views(*image.size, 1, rng), 16))
    assert torch.equal(batch, torch.cat(slow))


def test_triplets_pull_a_class_together():
    labels, net = np.repeat([0, 1, 2], 4), Head()
    colours = torch.rand(12, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(12, 3, 4, 4)
    step = triplet_step(net, lambda pick, rng: colours[pick], labels, classes=3)
    with torch.no_grad():
        before = float(step(0, np.random.default_rng(0)))
    train(net, step, TrainingPlan(steps=60, learning_rate=0.05, weight_decay=0))
    with torch.no_grad():
        assert float(step(0, np.random.default_rng(0))) < before
    with pytest.raises(ValueError, match="class 7 has 1"):
        triplet_step(net, None, [0, 0, 7])


def birds(root, classes=4, each=3):
    "A folder in the layout of CUB-200-2011."
    names = [f"{c + 1:03d}.Bird_{c}/{i}.png" for c in range(classes) for i in range(each)]
    for i, name in enumerate(names):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        open_image(i).save(root / "images" / name)
    lines = lambda what: "".join(f"{i} {what(name)}\n" for i, name in enumerate(names, 1))
    for file, what in (("images", str), ("image_class_labels", lambda n: int(n[:3])), ("bounding_boxes", lambda n: "0 0 24 20")):
        (root / f"{file}.txt").write_text(lines(what))
    return root


def test_the_published_run_of_raml_starts(tmp_path):
    """The authors' sizes and weights on a folder of theirs, with a small network and few steps: a teacher of triplets, then its student."""
    collection = load_cub(birds(tmp_path / "CUB_200_2011"))
    rows = collection.part("train")
    look = lambda index: open_file(collection.root / rows["path"][index])
    preset = replace(PRESETS["cub"], batch=2, views=2, accumulate=2, epochs=1, images_per_epoch=8)
    torch.manual_seed(0)
    backbone = FeatureMap(timm.create_model("lcnet_035", num_classes=0))
    teacher = DescriptorNet(backbone, PoolHead(backbone.channels, 16)).eval()
    views = view_loader(look, preset.gallery_size, jitter=0.0)
    train(teacher, triplet_step(teacher, views, rows["label"], classes=2, each=2), TrainingPlan(1, 1e-4))
    student = copy.deepcopy(teacher)
    teacher.requires_grad_(False)
    first = student.head.whiten.weight.detach().clone()
    step = distillation_step(student, teacher, look, len(rows), preset)
    losses = train(student, step, preset.plan(), tmp_path / "student.safetensors")
    assert (preset.query_size, preset.gallery_size) == (224, 448) and len(losses) == 2 and np.isfinite(losses).all()
    assert not torch.equal(student.head.whiten.weight, first) and torch.equal(teacher.head.whiten.weight, first)


def test_a_student_is_a_trainable_copy_and_leaves_its_teacher_alone():
    torch.manual_seed(0)
    teacher = Encoder(timm.create_model("lcnet_035", num_classes=8), "teacher", 48, (0.5,) * 3, (0.25,) * 3, dtype=torch.float32)
    images, before = torch.rand(2, 3, 48, 48), teacher.fingerprint
    student, reference = Student(teacher, 32), teacher(images)
    assert torch.allclose(student(images).detach(), reference, atol=1e-5)
    step = distillation_step(student, teacher, open_image, 5, settings_of(query_size=32, gallery_size=48))
    train(student, step, TrainingPlan(steps=2, learning_rate=0.01))
    assert torch.equal(teacher(images), reference) and not torch.allclose(student(images).detach(), reference, atol=1e-4)
    frozen = student.as_encoder(torch.float32)
    assert frozen.size == 32 and frozen.dim == teacher.dim and frozen.fingerprint != before and not frozen.model.training


def test_asymmetric_evaluation_is_that_of_the_centre_views(tmp_path):
    benchmark = load_cub(birds(tmp_path / "CUB_200_2011")).retrieval()
    student, teacher = Head(), Head()
    report = evaluate_asymmetric(student, teacher, benchmark, 8, 16, batch=4)
    images = [open_file(benchmark.file(path)) for path in benchmark.queries["path"]]
    sides = []
    for net, size in ((student, 8), (teacher, 16)):
        views = torch.stack([centre_view(image, size) for image in images])
        sides.append(F.normalize(net(views)).detach().numpy())
    assert report == evaluate_descriptors(benchmark, *sides) and report["queries"] == len(images) == 6


def test_students_of_other_architectures_are_compared_by_cost():
    torch.manual_seed(0)
    model = timm.create_model("lcnet_050", num_classes=8)
    teacher = Encoder(model, "teacher", 48, (0.5,) * 3, (0.25,) * 3, dtype=torch.float32)
    students = {"small net": Student(teacher, architecture="lcnet_035"), "same": Student(teacher), "small input": Student(teacher, 24)}
    assert all(p.requires_grad for p in students["small net"].parameters())
    table = compare_students(students, lambda encoder: encoder.size, repeats=1).set_index("name")
    assert table.index[-1] == "same" and table["flops"].is_monotonic_increasing
    assert table["score"].to_dict() == {"small net": 48, "same": 48, "small input": 24}
    assert table["parameters"]["same"] == table["parameters"]["small input"] > table["parameters"]["small net"]
    with pytest.raises(ValueError, match="shared must be 0"):
        Student(teacher, shared=1, architecture="lcnet_035")


def test_a_transformer_can_be_taught_at_another_size():
    torch.manual_seed(0)
    teacher = Encoder(timm.create_model("test_vit", num_classes=0), "teacher", 160, (0.5,) * 3, (0.25,) * 3, dtype=torch.float32)
    student = Student(teacher, 64)
    vectors = student(torch.rand(2, 3, 64, 64))
    assert vectors.shape == (2, teacher.dim) and student.as_encoder(torch.float32).size == 64
    assert teacher(torch.rand(1, 3, 160, 160)).shape == (1, teacher.dim)
