"""Shortlist discipline: what may move, what may not, and what the tuner returns."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchify.rerank.shortlist import Descriptors, from_columns, fuse, move_junk_last, rerank, score_shortlist, tune
from patchify.search import SearchResult


def random_result(draw, n_query=3, n_gallery=20, missing=0):
    scores = -np.sort(-draw.normal(size=(n_query, n_gallery)).astype(np.float32), axis=1)
    ranks = np.stack([draw.permutation(n_gallery) for _ in range(n_query)])
    if missing:
        scores[:, -missing:], ranks[:, -missing:] = -np.inf, -1
    return SearchResult(scores, ranks, np.where(ranks < 0, -1, ranks * 7 % 30))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 20), weight=st.floats(0, 1), gain=st.floats(0, 50), missing=st.integers(0, 5))
def test_only_the_shortlist_moves_and_patches_travel(seed, k, weight, gain, missing):
    draw = np.random.default_rng(seed)
    before, table = random_result(draw, missing=missing), draw.normal(0, 5, (3, 20))
    after = rerank(before, lambda q, ids: table[q, ids], k, weight, gain)
    for name in ("ranks", "patch_ids", "scores"):
        assert np.array_equal(getattr(after, name)[:, k:], getattr(before, name)[:, k:])
    assert np.array_equal(np.sort(after.ranks[:, :k]), np.sort(before.ranks[:, :k]))
    assert np.array_equal(after.patch_ids, np.where(after.ranks < 0, -1, after.ranks * 7 % 30))
    finite = np.where(np.isfinite(after.scores), after.scores, -1e9)
    assert (np.diff(finite, axis=1) <= 0).all() and after.scores.dtype == np.float32


def test_weight_one_keeps_the_order_and_zero_gain_too(rng=np.random.default_rng(0)):
    before, table = random_result(rng), rng.normal(size=(3, 20))
    scorer = lambda q, ids: table[q, ids]
    assert np.array_equal(rerank(before, scorer, 20, global_weight=1).ranks, before.ranks)
    assert np.array_equal(rerank(before, scorer, 20, global_weight=0, gain=0).ranks, before.ranks)      # all tied: first stage decides


def test_images_without_similarity_stay_at_the_end():
    before = SearchResult(np.array([[0.9, 0.5, -np.inf]], np.float32), np.array([[2, 0, 1]]), np.zeros((1, 3), int))
    after = rerank(before, lambda q, ids: np.array([-5.0, 5.0])[: len(ids)], 3, global_weight=0.0)
    assert after.ranks.tolist() == [[0, 2, 1]] and after.scores[0, 2] == -np.inf


def test_huge_logits_do_not_overflow():
    before = random_result(np.random.default_rng(0))
    with np.errstate(all="raise"):
        after = fuse(before, np.tile(np.array([-1e30, 1e30], np.float32), (3, 1)), 0.0, 3.0)
    assert np.array_equal(after.ranks[:, 0], before.ranks[:, 1])


def test_junk_keeps_its_order_behind_the_rest():
    before = SearchResult(np.array([[0.9, 0.8, 0.7, 0.6, -np.inf]], np.float32), np.array([[4, 1, 3, 0, -1]]), np.array([[1, 2, 3, 4, -1]]))
    after = move_junk_last(before, [np.array([4, 3, 99])])
    assert after.ranks.tolist() == [[1, 0, 4, 3, -1]] and after.patch_ids.tolist() == [[2, 4, 1, 3, -1]]
    with pytest.raises(ValueError, match="one list per query"):
        move_junk_last(before, [])


@pytest.mark.parametrize("scorer", [lambda q, ids: np.zeros(len(ids) + 1), lambda q, ids: np.full(len(ids), np.nan)])
def test_a_scorer_that_answers_wrongly_is_named(scorer):
    with pytest.raises(ValueError, match="finite logits for query 0"):
        score_shortlist(random_result(np.random.default_rng(0)), scorer, 5)


def test_impossible_settings_are_refused():
    before, scorer = random_result(np.random.default_rng(0)), lambda q, ids: np.zeros(len(ids))
    for k in (0, -1, 21):
        with pytest.raises(ValueError, match="top_k"):
            rerank(before, scorer, k)
    with pytest.raises(ValueError, match="global_weight"):
        rerank(before, scorer, 5, global_weight=1.5)


def test_tuner_returns_the_arg_max_and_not_the_last_point():
    before = random_result(np.random.default_rng(0), n_query=1)
    seen = []

    def metric(result):
        seen.append(result)
        return [0.1, 0.9, 0.3, 0.9, 0.5, 0.2][len(seen) - 1]

    best = tune(before, lambda q, ids: np.arange(len(ids)), metric, top_k=(5, 10), global_weight=(0.0, 0.2, 0.4), gain=(1.0,))
    assert (best.top_k, best.global_weight, best.gain, best.value) == (5, 0.2, 1.0, 0.9) and len(best.table) == 6


def test_blocks_and_memory_maps_read_alike(tmp_path):
    values = np.random.default_rng(0).normal(size=(9, 3, 4)).astype(np.float16)
    np.save(tmp_path / "a.npy", values[:4])
    np.save(tmp_path / "b.npy", values[4:])
    blocks = [np.load(tmp_path / name, mmap_mode="r") for name in ("a.npy", "b.npy")]
    ids = np.array([8, 0, 3, 4, 4])
    taken = Descriptors(blocks).take(ids)
    assert np.array_equal(taken.values, values[ids].astype(np.float32))
    assert np.array_equal(Descriptors(blocks).top(2).take(ids).values, taken.values[:, :2])
    assert taken.values.dtype == torch.float32 and taken.valid.all() and len(Descriptors(blocks)) == 9


def test_descriptors_refuse_what_does_not_belong_together():
    values = np.zeros((4, 3, 2))
    with pytest.raises(ValueError, match="valid has shape"):
        Descriptors(values, np.ones((4, 2), bool))
    with pytest.raises(ValueError, match="summary"):
        Descriptors(values, summary=np.zeros((3, 8)))
    with pytest.raises(ValueError, match="5 \\+ C"):
        from_columns(np.zeros((2, 3, 5)))
