"""AMES beyond its goldens: slow definition, padding, bits on disk, training from seeds."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchify.rerank.ames import AMES, AmesScorer, Binarize, PackedDescriptors, attention_masks, load_ames, pack
from patchify.rerank.ames_training import ames_loss, binary_student, draw_pairs, itq
from patchify.rerank.shortlist import Descriptors, rerank
from patchify.search import SearchResult
from patchify.learn import TrainingPlan, train


def sets(n, count, dim, seed=0, ragged=True):
    draw = np.random.default_rng(seed)
    valid = np.arange(count) < draw.integers(1, count + 1, (n, 1)) if ragged else None
    return Descriptors(draw.normal(size=(n, count, dim)).astype(np.float32), valid)


def slow_attention(attention, x, allowed):
    "One row, one head, one softmax at a time."
    dim, out = x.shape[1], torch.zeros_like(x)
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).split(dim, 1)
    size = dim // attention.heads
    for head in range(attention.heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(x)):
            columns = [c for c in range(len(x)) if allowed[row, c]]
            weights = torch.stack([q[row, part] @ k[c, part] / math.sqrt(size) for c in columns]).softmax(0)
            out[row, part] = sum(w * v[c, part] for w, c in zip(weights, columns))
    return attention.out_proj(out)


@pytest.mark.parametrize("heads, n_query, n_gallery", [(1, 1, 1), (2, 5, 3), (4, 2, 6)])
def test_attention_equals_its_definition(heads, n_query, n_gallery):
    torch.manual_seed(heads)
    model = AMES(8, 16, heads=heads, layers=1, hidden=8)
    x, masks = torch.randn(1, 1 + n_query + n_gallery, 16), attention_masks(torch.rand(1, n_query) < 0.8, torch.rand(1, n_gallery) < 0.8)
    for attention, allowed in zip((model.decoder.layers[0].self_attn, model.decoder.layers[0].cross_attn), masks):
        with torch.no_grad():
            torch.testing.assert_close(attention(x, allowed)[0], slow_attention(attention, x[0], allowed[0, 0]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("binary", [False, True])
def test_content_of_padding_never_matters(binary):
    model = AMES(8, 16, layers=2, hidden=8, binary=binary).eval()
    left, right = sets(5, 7, 8, 1).take(np.arange(5)), sets(5, 4, 8, 2).take(np.arange(5))
    noise = lambda part: torch.where(part.valid[..., None], part.values, 100 * torch.randn_like(part.values))
    with torch.no_grad():
        torch.testing.assert_close(model(left.values, right.values, left.valid, right.valid), model(noise(left), noise(right), left.valid, right.valid), atol=1e-6, rtol=1e-5)


def test_fully_padded_sides_give_a_number():
    model = AMES(8, 16, layers=2, hidden=8).eval()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert torch.isfinite(model(torch.zeros(2, 3, 8), torch.randn(2, 3, 8), nothing, nothing)).all()


def test_gallery_is_rounded_to_half_in_use_only():
    model = AMES(8, 16, layers=1, hidden=8)
    query, gallery = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    with torch.no_grad():
        assert not torch.equal(model.eval()(query, gallery), model.train()(query, gallery))


def test_sign_of_zero_is_zero_and_erf_is_its_smooth_form():
    layer = Binarize(6, 4)
    x = torch.randn(5, 6); x[0] = 0
    hard, soft = layer.eval()(x), layer.train()(x)
    assert (hard[0] == 0).all() and set(hard[1:].unique().tolist()) <= {-1.0, 1.0} and (soft.sign() == hard).all() and (soft.abs() <= 1).all()


@pytest.mark.parametrize("count, bits", [(50, 128), (30, 128), (100, 64)])
def test_packed_bytes_on_disk(tmp_path, count, bits):
    model = AMES(32, bits, layers=1, hidden=8, binary=True).eval()
    model.remap_local[0].W.data.normal_()
    packed = pack(model, sets(40, count, 32))
    packed.save(tmp_path / "codes.npy")
    per_image = (np.load(tmp_path / "codes.npy", mmap_mode="r").nbytes) / 40
    assert per_image == packed.bytes_per_image == count * bits / 8
    assert (tmp_path / "codes.npy").stat().st_size - per_image * 40 <= 128                     # nothing but the header besides


def test_packed_gallery_scores_like_the_values(tmp_path):
    model = AMES(32, 16, layers=2, hidden=8, binary=True).eval()
    queries, gallery = sets(3, 9, 32, 1), sets(12, 5, 32, 2)
    packed = pack(model, gallery, batch=5)
    packed.save(tmp_path / "codes.npy")
    ids = np.array([11, 0, 7])
    for other in (packed, PackedDescriptors.load(tmp_path / "codes.npy")):
        np.testing.assert_allclose(AmesScorer(model, queries, gallery)(2, ids), AmesScorer(model, queries, other)(2, ids), atol=1e-5)
    assert pack(model, gallery, top=3).codes.shape == (12, 3, 2)
    with pytest.raises(ValueError, match="after the real"):
        pack(model, Descriptors(gallery.values, np.arange(5)[None].repeat(12, 0) > 2))


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_scorer_does_not_depend_on_batches_or_order(batch):
    model = AMES(8, 16, layers=2, hidden=8).eval()
    scorer, ids = AmesScorer(model, sets(3, 6, 8, 1), sets(20, 5, 8, 2), batch), np.arange(20)
    with torch.no_grad():
        each = [model(scorer.queries.take([1]).values, p.values, scorer.queries.take([1]).valid, p.valid).item() for p in (scorer.gallery.take([i]) for i in ids)]
    np.testing.assert_allclose(scorer(1, ids), each, atol=1e-5)
    np.testing.assert_allclose(scorer(1, ids[::-1])[::-1], each, atol=1e-5)


def test_patches_of_a_store_are_a_gallery():
    draw = np.random.default_rng(0)
    patches = [draw.normal(size=(n, 30, 16)).astype(np.float16) for n in (7, 5)]                # blocks, as a store has them
    queries = draw.normal(size=(2, 16)).astype(np.float32)
    best = np.einsum("qd,npd->qnp", queries, np.concatenate(patches).astype(np.float32))
    order = np.argsort(-best.max(2), axis=1)
    searched = SearchResult(np.take_along_axis(best.max(2), order, 1), order, np.take_along_axis(best.argmax(2), order, 1))
    after = rerank(searched, AmesScorer(AMES(16, 16, layers=1, hidden=8).eval(), Descriptors(queries[:, None]), Descriptors(patches)), top_k=8)
    for q in range(2):
        assert all(patch == best[q, image].argmax() for image, patch in zip(after.ranks[q], after.patch_ids[q]))


def test_wrong_dimensions_are_named():
    model = AMES(8, 16, layers=1, hidden=8)
    with pytest.raises(ValueError, match="dimension 8, got 9"):
        model(torch.zeros(1, 2, 9), torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="not an AMES checkpoint"):
        load_ames({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="heads"):
        AMES(8, 15, heads=2)


def test_itq_error_never_rises_and_beats_its_start():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(500, 12)) * np.linspace(3, 0.3, 12)
    projection, errors = itq(x, 6, steps=30)
    assert projection.shape == (12, 6) and np.all(np.diff(errors) <= 1e-12) and errors[-1] < 0.98 * errors[0]
    assert np.array_equal(projection, itq(x, 6, steps=30)[0])
    with pytest.raises(ValueError, match="bits"):
        itq(x, 13)


def test_batches_come_from_their_seed_and_vary_in_size():
    gallery, instance = sets(40, 12, 8), np.repeat(np.arange(10), 4)
    twice = [draw_pairs(gallery, instance, np.random.default_rng(3), batch=6) for _ in range(2)]
    assert torch.equal(twice[0][0].values, twice[1][0].values) and torch.equal(twice[0][1].values, twice[1][1].values)
    counts = {(a.count, b.count) for a, b, _ in (draw_pairs(gallery, instance, np.random.default_rng(i), 4, counts=(3, 12)) for i in range(40))}
    assert len(counts) > 20 and all(3 <= min(pair) and max(pair) <= 12 for pair in counts)


def test_hard_negatives_are_other_objects():
    values = np.arange(40, dtype=np.float32)[:, None, None] * np.ones((1, 2, 1), np.float32)     # the value is the image's number
    instance = np.repeat(np.arange(10), 4)
    candidates = (np.arange(40)[:, None] + np.array([1, 4, -41])) % 40
    candidates[:, 2] = -1
    for seed in range(10):
        left, right, label = draw_pairs(Descriptors(values), instance, np.random.default_rng(seed), 8, counts=(2, 2), negatives=candidates)
        left, right = (part.values[:, 0, 0].numpy().astype(int) for part in (left, right))
        assert ((instance[left] == instance[right]) == (label.numpy() == 1)).all() and (left != right).all()
        assert all(b in candidates[a] for a, b, same in zip(left, right, label) if not same)


def test_distillation_pulls_the_student_to_its_teacher():
    torch.manual_seed(0)
    teacher = AMES(8, 16, layers=1, hidden=16).eval()
    teacher.classifier.weight.data.mul_(20)
    student = binary_student(teacher, np.random.default_rng(0).normal(size=(8, 16)), np.random.default_rng(1).normal(size=(200, 8)))
    gallery, instance = sets(40, 4, 8, ragged=False), np.repeat(np.arange(10), 4)
    loss = lambda _, draw: ames_loss(student, *draw_pairs(gallery, instance, draw, 32), teacher=teacher, teacher_weight=10)
    before = teacher.state_dict()["mtc_token"].clone()
    losses = train(student, loss, TrainingPlan(steps=40, learning_rate=3e-3))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10]) and torch.equal(before, teacher.mtc_token)
    with pytest.raises(ValueError, match="as many bits"):
        binary_student(teacher, np.zeros((8, 12)), np.zeros((4, 8)))


def test_training_resumes_to_the_same_weights(tmp_path):
    gallery, instance = sets(40, 4, 8, ragged=False), np.repeat(np.arange(10), 4)

    def fit(file, stop=None):
        torch.manual_seed(0)
        model = AMES(8, 16, layers=1, hidden=16)

        def loss(step, draw):
            if step == stop:
                raise KeyboardInterrupt
            return ames_loss(model, *draw_pairs(gallery, instance, draw, 8))
        try:
            train(model, loss, TrainingPlan(steps=12, learning_rate=1e-3), checkpoint=file, save_every=4)
        except KeyboardInterrupt:
            pass
        return model.state_dict()
    straight = fit(tmp_path / "a.safetensors")
    fit(tmp_path / "b.safetensors", stop=9)
    resumed = fit(tmp_path / "b.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
