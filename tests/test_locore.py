"""LOCORE beyond its goldens: dense attention, lists, windows, faults."""
import builtins

import numpy as np
import pytest
import torch

from patchify.rerank.locore import (
    AGGREGATIONS, LOCORE, LocoreScorer, Role, aggregate, allowed_pairs, join, load_locore, split_lists, token_positions, token_roles)
from patchify.rerank.locore_training import ConstantPlan, draw_lists, locore_loss, published_locore_plan, start_from_longformer
from patchify.rerank.matching import start_from_matching
from patchify.rerank.windows import rerank_windows, window_starts
from patchify.rerank.shortlist import Descriptors, rerank
from patchify.search import SearchResult
from patchify.learn import TrainingPlan, train

TINY = dict(local_dim=6, n_scales=4, dim=8, layers=2, heads=2, window=8, hidden=16, max_positions=130)


@pytest.fixture(autouse=True)
def needs_transformers(request):
    if "windows" not in request.node.name:
        pytest.importorskip("transformers")
    torch.manual_seed(0)


def sets(n, count, dim=6, seed=0, summary=0):
    draw = np.random.default_rng(seed)
    return Descriptors(draw.normal(size=(n, count, dim)).astype(np.float32), np.arange(count) < draw.integers(1, count + 1, (n, 1)), draw.integers(0, 4, (n, count)),
                       draw.normal(size=(n, summary)).astype(np.float32) if summary else None)


def by_definition(layer, x, roles, window):
    "Longformer attention, row by row and head by head."
    out = torch.zeros_like(x)
    allowed, size = allowed_pairs(roles, window), layer.head_dim
    for row in range(len(x)):
        names = ("query_global", "key_global", "value_global") if roles[row] == Role.GLOBAL else ("query", "key", "value")
        q, k, v = (getattr(layer, name)(x) for name in names)
        columns = allowed[row].nonzero().flatten()
        for head in range(layer.num_heads):
            part = slice(head * size, (head + 1) * size)
            if len(columns):
                weights = (k[columns][:, part] @ q[row, part] / size**0.5).softmax(0)
                out[row, part] = weights @ v[columns][:, part]
    return out


@pytest.mark.parametrize("length, window, seed", [(8, 8, 0), (24, 8, 1), (24, 4, 2), (32, 16, 3), (48, 6, 4)])
def test_attention_equals_the_slow_dense_version(length, window, seed):
    draw = torch.Generator().manual_seed(seed)
    layer = LOCORE(**TINY | {"window": window}).eval().language_model.longformer.encoder.layer[0].attention.self
    for linear in (layer.query, layer.key, layer.value, layer.query_global, layer.key_global, layer.value_global):
        torch.nn.init.normal_(linear.bias, generator=draw)
    x, roles = torch.randn(length, 8, generator=draw), torch.multinomial(torch.tensor([0.3, 0.5, 0.2]), length, True, generator=draw)
    roles[0] = Role.GLOBAL
    mask = (roles[None] - 1.0) * 1e4
    with torch.no_grad():
        fast = layer(x[None], attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=True)[0][0]
        torch.testing.assert_close(fast, by_definition(layer, x, roles, window), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", ["absolute", "segment", "no"])
def test_window_padding_never_reaches_an_image(positions):
    model = LOCORE(**TINY, positions=positions).eval()
    part = sets(5, 3).take(np.arange(5))
    with torch.no_grad():
        before = model([part])
        model.language_model.longformer.pad_embedding.fill_(50)
        torch.testing.assert_close(model([part]), before)


def test_a_window_over_everything_without_positions_reads_a_set():
    model = LOCORE(**TINY | {"window": 128}, positions="no").eval()                # one window over everything: a set, not a list
    scorer, ids = LocoreScorer(model, sets(2, 4, seed=1), sets(9, 4, seed=2), "max-sum"), np.arange(9)
    np.testing.assert_allclose(scorer(0, ids)[::-1], scorer(0, ids[::-1]), atol=1e-5)


def test_roles_and_positions():
    valid = torch.tensor([[[1, 0, 1], [1, 1, 1]]], dtype=torch.bool)
    assert token_roles(valid).tolist() == [[[2, 0, 2], [1, 1, 2]]] and token_roles(valid, False).tolist() == [[[1, 0, 2], [1, 1, 2]]]
    assert token_positions(2, 3, 2).tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="positions"):
        token_positions(2, 3, 2, "random")


def test_a_shorter_query_is_padded():
    query, gallery = sets(1, 1).take([0]), sets(4, 5).take(np.arange(4))
    both = join(query, gallery)
    assert both.values.shape == (5, 5, 6) and both.valid[0].tolist() == [True] + [False] * 4 and torch.equal(both.values[1:], gallery.values)
    with pytest.raises(ValueError, match="summary"):
        join(query, sets(4, 5, summary=3).take(np.arange(4)))


def test_the_model_reads_global_descriptors():
    model = LOCORE(**TINY, global_dim=5).eval()
    queries, gallery = sets(2, 3, seed=1, summary=5), sets(8, 3, seed=2, summary=5)
    scores = LocoreScorer(model, queries, gallery)(1, np.arange(8))
    other = Descriptors(gallery.values, gallery.valid, gallery.scales, -gallery.summary)
    assert np.abs(scores - LocoreScorer(model, queries, other)(1, np.arange(8))).max() > 1e-4


def test_faults_are_named():
    model = LOCORE(**TINY).eval()
    with pytest.raises(ValueError, match="dimension 6, got 7"):
        model([sets(3, 2, dim=7).take(np.arange(3))])
    with pytest.raises(ValueError, match="positions"):
        model([sets(60, 4).take(np.arange(60))])
    with pytest.raises(ValueError, match="mode"):
        aggregate(torch.zeros(1, 2, 3, 2), "mean")
    with pytest.raises(ValueError, match="not a LOCORE checkpoint"):
        load_locore({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="a list needs 9"):
        draw_lists(sets(5, 2), np.zeros(5), np.tile(np.arange(5), (5, 1)), np.random.default_rng(0), length=9)


def test_without_the_extra_the_message_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("transformers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"patchify\[locore\]"):
        LOCORE(**TINY)


def test_lists_leave_the_query_out_and_are_shuffled():
    values = np.arange(12, dtype=np.float32)[:, None, None] * np.ones((1, 2, 6), np.float32)     # the value is the image's number
    ranks, instance = np.tile(np.arange(12), (12, 1)), np.repeat(np.arange(4), 3)
    lists, positive = draw_lists(Descriptors(values), instance, ranks, np.random.default_rng(0), batch=5, length=8)
    again, _ = draw_lists(Descriptors(values), instance, ranks, np.random.default_rng(0), batch=5, length=8)
    for images, same, label in zip(lists, again, positive):
        numbers = images.values[:, 0, 0].numpy().astype(int)
        assert torch.equal(images.values, same.values) and numbers[0] not in numbers[1:] and len(set(numbers)) == 9
        assert (label.numpy() == (instance[numbers[1:]] == instance[numbers[0]])).all()
    assert any((np.diff(images.values[1:, 0, 0]) < 0).any() for images in lists)


def test_training_lowers_the_loss_and_reaches_every_parameter_that_counts():
    model = LOCORE(**TINY, dropout=0.0).train()
    lists, positive = draw_lists(sets(20, 3), np.repeat(np.arange(5), 4), np.tile(np.arange(20), (20, 1)), np.random.default_rng(0), batch=2, length=6)
    locore_loss(model(lists), positive).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("pad_embedding" in name or "key.bias" in name or "key_global.bias" in name for name in silent), silent
    losses = train(model, lambda *_: locore_loss(model(lists), positive), TrainingPlan(steps=30, learning_rate=1e-2))
    assert losses[-1] < 0.7 * losses[0]


def visits(starts, window, length):
    seen = np.zeros(length, int)
    for start in starts:
        seen[start:start + window] += 1
    return seen


@pytest.mark.parametrize("length, window, stride", [(400, 100, 50), (24, 8, 4), (23, 8, 4), (9, 8, 4), (100, 100, 50), (7, 8, 4), (30, 12, 5)])
@pytest.mark.parametrize("direction", ["start-to-end", "end-to-start", "start-to-end-to-start", "end-to-start-to-end"])
def test_windows_visit_everything_when_they_overlap_by_half(length, window, stride, direction):
    starts = window_starts(length, window, stride, direction)
    assert min(starts) == 0 and max(starts) <= max(0, length - window)
    if window <= 2 * stride or "end-to-start" in direction or "start-to-end-to" in direction:
        assert visits(starts, window, length).min() >= 1


def test_windows_with_a_gap_or_an_unknown_direction_are_refused():
    for stride in (0, 9):
        with pytest.raises(ValueError, match="stride"):
            window_starts(24, 8, stride)
    with pytest.raises(ValueError, match="direction"):
        window_starts(24, 8, 4, "sideways")


def test_windows_carry_a_good_image_from_the_end_to_the_start():
    n, truth = 40, 33
    before = SearchResult(np.linspace(1, 0, n, dtype=np.float32)[None], np.arange(n)[None], np.arange(n)[None] % 30)
    scorer = lambda query, ids: np.where(ids == truth, 9.0, 0.0)
    up = rerank_windows(before, scorer, n, 10, 5, "end-to-start", global_weight=0.1, gain=1.0)
    down = rerank_windows(before, scorer, n, 10, 5, "start-to-end", global_weight=0.1, gain=1.0)
    assert up.ranks[0, 0] == truth and list(down.ranks[0]).index(truth) == 25
    assert np.array_equal(up.patch_ids, up.ranks % 30) and (np.diff(up.scores) <= 0).all()


def test_windows_as_long_as_the_list_are_plain_reranking():
    draw = np.random.default_rng(0)
    before = SearchResult(-np.sort(-draw.random((3, 12), np.float32)), np.stack([draw.permutation(12) for _ in range(3)]), np.zeros((3, 12), int))
    table = draw.normal(size=(3, 12))
    scorer = lambda q, ids: table[q, ids]
    assert np.array_equal(rerank_windows(before, scorer, 8, 8, 4, gain=1.0).ranks, rerank(before, scorer, 8).ranks)
    with pytest.raises(ValueError, match="top_k"):
        rerank_windows(before, scorer, 13)


def test_a_pretrained_language_model_of_another_size_is_refused():
    from transformers import LongformerConfig, LongformerModel

    language = LongformerModel(LongformerConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, attention_window=[8], intermediate_size=16, vocab_size=5,
                                                max_position_embeddings=34, type_vocab_size=1), add_pooling_layer=False)
    weights = {f"longformer.{name}": tensor for name, tensor in language.state_dict().items()}
    model = start_from_longformer(LOCORE(**TINY | {"layers": 1}), weights)
    assert torch.equal(model.language_model.longformer.encoder.layer[0].output.dense.weight, language.encoder.layer[0].output.dense.weight)
    with pytest.raises(ValueError, match="encoder.layer.1"):
        start_from_longformer(LOCORE(**TINY), weights)


def matching_world(objects=30, views=4, count=5, dim=12):
    "Images that share three descriptors with others of their object; the first stage knows nothing."
    draw = np.random.default_rng(3)
    parts = np.repeat(draw.normal(size=(objects, 3, dim)), views, 0)
    values = np.concatenate([parts, draw.normal(size=(objects * views, count - 3, dim))], 1).astype(np.float32)
    ranks = np.array([draw.permutation(np.r_[0:i, i + 1:objects * views]) for i in range(objects * views)])
    return Descriptors(values), np.repeat(np.arange(objects), views), ranks


def test_a_matching_start_ranks_unseen_objects_before_any_training():
    images, instance, ranks = matching_world()
    torch.manual_seed(0)
    model = LOCORE(local_dim=12, dim=64, layers=3, heads=2, window=12, hidden=64, max_positions=2 + 61 * 6 + 12, dropout=0.0).eval()
    lists, positive = draw_lists(images, instance, ranks, np.random.default_rng(0), batch=12, length=60)
    with torch.no_grad():
        blind = aggregate(model(lists))
        scores = aggregate(start_from_matching(model, images.values.reshape(-1, 12), count=5)(lists))
    wins = lambda s: float(np.mean([(a[p > 0][:, None] > a[p == 0]).float().mean() for a, p in zip(s, positive) if 0 < p.sum()]))
    assert wins(scores) > 0.85 and abs(wins(blind) - 0.5) < 0.2


@pytest.mark.parametrize("options", [{"layers": 1}, {"positions": "segment"}, {"heads": 8}, {"local_dim": 64}])
def test_a_model_that_cannot_match_is_refused(options):
    model = LOCORE(**({"local_dim": 12, "dim": 64, "layers": 2, "heads": 2, "window": 8, "hidden": 64, "max_positions": 130} | options))
    with pytest.raises(ValueError, match="a matcher needs absolute positions"):
        start_from_matching(model, np.ones((9, options.get("local_dim", 12)), np.float32), 4)


def test_lists_come_from_the_anchors_and_from_the_depth():
    images, instance, ranks = matching_world()
    drawn = {tuple(np.flatnonzero((images.values == part.values[0].numpy()).all((1, 2)))) for seed in range(8)
             for part in draw_lists(images, instance, ranks, np.random.default_rng(seed), 2, 6, depth=9, anchors=np.array([4, 11]))[0]}
    assert drawn == {(4,), (11,)}
    seen = set()
    for seed in range(8):
        part, = draw_lists(images, instance, ranks, np.random.default_rng(seed), 1, 6, depth=9, anchors=np.array([4]))[0]
        seen |= {int(np.flatnonzero((images.values == v.numpy()).all((1, 2)))[0]) for v in part.values[1:]}
    assert 6 < len(seen) and seen <= set(ranks[4][:9])


def test_short_lists_are_scored_by_themselves():
    model = LOCORE(**TINY).eval()
    scorer, ids = LocoreScorer(model, sets(2, 4, seed=1), sets(9, 4, seed=2)), np.array([8, 1, 4, 0, 7])
    one_by_one = [scorer(0, ids[i:i + 1])[0] for i in range(5)]
    np.testing.assert_allclose(split_lists(scorer, 1)(0, ids), one_by_one, atol=1e-6)
    np.testing.assert_allclose(split_lists(scorer, 3)(0, ids), [*scorer(0, ids[:3]), *scorer(0, ids[3:])], atol=1e-6)
    assert np.array_equal(split_lists(scorer, 5)(0, ids), scorer(0, ids)) and split_lists(scorer, 2)(0, ids[:0]).shape == (0,)
    with pytest.raises(ValueError, match="length"):
        split_lists(scorer, 0)


def test_every_aggregation_by_hand():
    inside = torch.tensor([[2.0, -1.0, 3.0]])
    logits = torch.zeros(1, 2, 4, 2)
    logits[0, 1, :3, 1] = inside
    logits[0, 1, 3, 1] = 50                                                        # the separator does not count
    wanted = {"max-end": 3, "max-start": 2, "max-sum": 4, "max-prod": -6}
    assert {mode: aggregate(logits, mode).item() for mode in AGGREGATIONS} == wanted
    odds = torch.sigmoid(inside)
    torch.testing.assert_close(aggregate(logits, "max-prod", softmax=True), odds.prod(1, keepdim=True))


def test_the_published_recipe_has_a_constant_rate(tmp_path):
    plan = published_locore_plan(1024, batch=64)
    assert (plan.steps, plan.accumulate, plan.weight_decay) == (12, 4, 0.0)
    assert {plan.rate(step) for step in range(plan.steps)} == {5e-5}
    warm = ConstantPlan(steps=10, learning_rate=1.0, warmup=4)
    assert [warm.rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    with pytest.raises(ValueError, match="divide 256"):
        published_locore_plan(1024, batch=24)
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    train(module, lambda *_: -module.weight.sum(), ConstantPlan(steps=5, learning_rate=1e-2, weight_decay=0.0), tmp_path / "plan.safetensors")
    assert module.weight.item() == pytest.approx(5e-2, rel=1e-3)                    # AdamW moves by the rate, five times


def test_global_descriptors_of_another_dimension_are_named():
    model = LOCORE(**TINY, global_dim=5).eval()
    with pytest.raises(ValueError, match="global descriptors of dimension 5, got 4"):
        model([sets(3, 2, summary=4).take(np.arange(3))])
