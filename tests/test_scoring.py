"""Protocols: counted positions equal sorted ones, in bounded memory, and each protocol reports what it should."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchify.metrics import average_precisions, precision_at
from patchify.retrieval_set import PROTOCOLS, RetrievalSet, class_retrieval
from patchify.scoring import Ranking, count_places, evaluate_descriptors, measure_descriptors, protocol_report, rank_gallery
from patchify.search import ExactIndex, ImageIndex


def landmarks(n_query, n_gallery, rng, labelled=12):
    "A revisited set with random easy, hard and junk images."
    draws = [rng.permutation(n_gallery)[:labelled] for _ in range(n_query)]
    lists = {name: [np.sort(draw[part::3]) for draw in draws] for part, name in enumerate(("easy", "hard", "junk"))}
    queries = pd.DataFrame({"id": [f"q{i}" for i in range(n_query)], "path": [f"q{i}" for i in range(n_query)], **lists})
    gallery = pd.DataFrame({"id": np.arange(n_gallery).astype(str), "path": np.arange(n_gallery).astype(str), "instance": None})
    return RetrievalSet("landmarks", None, queries.assign(instance=None, category=None), gallery).under("medium")


class Blocks(ImageIndex):
    "An index of given scores, in blocks of a given size; -inf marks an image that was never scored."

    def __init__(self, scores, size, gallery_ids=None):
        self.scores = torch.from_numpy(np.asarray(scores, np.float32))
        self.size = size
        self.gallery_ids = np.arange(scores.shape[1]) if gallery_ids is None else gallery_ids
        self.dim = 1
        self.device = torch.device("cpu")

    def parts(self, queries):
        rows = queries[:, 0].long()
        for start in range(0, self.scores.shape[1], self.size):
            block = self.scores[rows, start:start + self.size]
            yield block, torch.zeros_like(block, dtype=torch.int32)


def numbered(n_query):
    "Queries that select their row of the score table."
    return np.arange(n_query, dtype=np.float32)[:, None]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 40), st.integers(1, 12), st.integers(1, 8), st.booleans())
def test_counted_positions_equal_sorted_ones(seed, n_query, n_gallery, size, levels, unreached):
    "Also with many ties, images that were never scored, and images that are not indexed."
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (n_query, n_gallery)).astype(np.float32)
    if unreached:
        scores[rng.random(scores.shape) < 0.3] = -np.inf
    ids = np.sort(rng.choice(3 * n_gallery, n_gallery, replace=False))
    index = Blocks(scores, size, ids)
    wanted = [rng.choice(3 * n_gallery, rng.integers(0, n_gallery + 1), replace=False) for _ in range(n_query)]
    full = index.search(numbered(n_query))
    for query, places in enumerate(count_places(index, numbered(n_query), wanted)):
        kept = np.isfinite(full.scores[query])
        expected = {image: place for place, image in enumerate(full.ranks[query]) if image in set(wanted[query]) and kept[place]}
        assert dict(zip(places.images.tolist(), places.places.tolist())) == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_bounded_rankings_score_like_full_ones(seed, length):
    rng = np.random.default_rng(seed)
    task = landmarks(3, 60, rng)
    index = Blocks(rng.integers(0, 9, (3, 60)), 7)
    full = Ranking(task, index.search(numbered(3)))
    labelled = [np.unique(np.concatenate(lists)) for lists in zip(*task.truths["medium"], *task.truths["easy"])]
    short = Ranking(task, index.search(numbered(3), length), count_places(index, numbered(3), labelled))
    for setup in ("easy", "medium", "hard"):
        pd.testing.assert_frame_equal(short.measure(setup), full.measure(setup))
        aps = average_precisions(full.result.ranks, *task.truths[setup], variant="trapezoid")
        np.testing.assert_array_equal(full.measure(setup)["ap"], aps)
        np.testing.assert_array_equal(full.measure(setup)["mp@5"], precision_at(full.result.ranks, task.truths[setup][0], 5, task.truths[setup][1]))


def test_a_large_gallery_is_never_sorted_in_full(monkeypatch):
    rng = np.random.default_rng(0)
    task = landmarks(4, 100_000, rng)
    index = Blocks(rng.normal(size=(4, 100_000)), 4096)
    widths = []
    search = Blocks.search
    monkeypatch.setattr(Blocks, "search", lambda self, queries, k=None: widths.append(k) or search(self, queries, k))
    bounded = rank_gallery(task, numbered(4), index, entries=50_000)
    assert widths == [2000] and bounded.result.ranks.shape == (4, 2000)
    full = Ranking(task, search(index, numbered(4)))
    assert protocol_report(bounded) == protocol_report(full)


def test_a_reranked_shortlist_keeps_the_positions_beyond_it():
    rng = np.random.default_rng(1)
    task = landmarks(2, 300, rng, labelled=60)
    index = Blocks(rng.normal(size=(2, 300)), 50)
    bounded = rank_gallery(task, numbered(2), index, entries=300)
    width = bounded.result.ranks.shape[1]
    assert width < 300
    order = np.stack([rng.permutation(width) for _ in range(2)])
    shuffled = replace(bounded.result, ranks=np.take_along_axis(bounded.result.ranks, order, 1))
    full = index.search(numbered(2))
    ranks = np.concatenate([shuffled.ranks, full.ranks[:, width:]], axis=1)
    aps = average_precisions(ranks, *task.truths["hard"], variant="trapezoid")
    np.testing.assert_allclose(replace(bounded, result=shuffled).measure("hard")["ap"], aps)


def test_the_protocol_decides_the_keys():
    rng = np.random.default_rng(0)
    task = landmarks(3, 40, rng)
    vectors = rng.normal(size=(43, 8)).astype(np.float32)
    report = evaluate_descriptors(task, vectors[:3], vectors[3:])
    assert {"map", "map_ci", "easy", "medium", "hard", "mp@k", "mp@1", "mp@5", "mp@10"} <= report.keys() and report["map"] == report["medium"]
    assert evaluate_descriptors(task, vectors[:3], vectors[3:], "hard")["map"] == report["hard"]
    assert json.loads(json.dumps(report)) == report
    classes = class_retrieval(np.arange(40) // 4)
    report = evaluate_descriptors(classes, vectors[:40], vectors[:40])
    assert list(report["r@k"]) == ["1", "2", "4", "8"] and report["r@1"] == report["r@k"]["1"] and "easy" not in report
    ilias = evaluate_descriptors(classes, vectors[:40], vectors[:40], "ilias")
    assert {"oracle"} <= ilias.keys() and "r@k" not in ilias


def test_public_and_private_queries_are_averaged_apart():
    rng = np.random.default_rng(0)
    queries = pd.DataFrame({"id": list("abcd"), "path": list("abcd"), "instance": list("abcd"), "usage": ["Public", "Private", "Private", "Private"],
                            "positives": [[1], [2, 3], [4], []]})
    gallery = pd.DataFrame({"id": np.arange(150).astype(str), "path": np.arange(150).astype(str), "instance": None})
    task = RetrievalSet("gldv2", None, queries, gallery, PROTOCOLS["gldv2"])
    vectors = rng.normal(size=(154, 8)).astype(np.float32)
    report = evaluate_descriptors(task, vectors[:4], vectors[4:])
    aps = average_precisions(measure_descriptors(task, vectors[:4], vectors[4:]).ranks, task.positives, k=100)
    np.testing.assert_allclose([report["public"], report["private"], report["map"]],
                               [100 * aps[0], 100 * np.mean(aps[1:3]), 100 * np.nanmean(aps)], atol=1e-4)


def test_missing_values_are_null():
    task = class_retrieval(["a", "b"])
    report = evaluate_descriptors(task, np.eye(2), np.eye(2))
    assert report["map"] is None and report["r@1"] is None and report["map_ci"] == [None, None] and report["queries"] == 0


def test_equal_labels_other_protocol_other_fingerprint():
    task = class_retrieval(["a", "a"])
    assert task.fingerprint == class_retrieval(["a", "a"]).fingerprint
    assert task.fingerprint != task.under("sop").fingerprint != class_retrieval(["a", "b"]).under("sop").fingerprint
    rng = np.random.default_rng(0)
    revisited = landmarks(2, 20, rng)
    changed = replace(revisited, queries=revisited.queries.assign(junk=[[], []]))
    assert revisited.fingerprint != changed.fingerprint


@pytest.mark.parametrize("call, message", [
    (lambda: class_retrieval("ab").under("hard"), "protocol 'hard' does not fit classes: its queries have no easy, hard, junk"),
    (lambda: class_retrieval("ab").under("gldv2"), "its queries have no usage"),
    (lambda: class_retrieval("ab").under("clases"), "unknown protocol 'clases': did you mean classes"),
    (lambda: evaluate_descriptors(class_retrieval("ab"), np.eye(3), np.eye(2)), r"queries must be \(2, D\)"),
])
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
