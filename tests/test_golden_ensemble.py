"""Golden ensemble: the official junk rule, fusion and evaluation over the whole grid of settings."""
import numpy as np
import pytest
from rerank_goldens import Golden

from patchify.rerank.shortlist import fuse, move_junk_last, rerank, score_shortlist, tune
from patchify.search import SearchResult


@pytest.fixture(scope="module")
def golden():
    return Golden("ensemble")


def first_stage(golden, split):
    ranks = golden["nn_inds"].astype(np.int64)
    junk = [np.concatenate([j, e]) if split == "hard" else j for j, e in zip(golden.ragged("junk"), golden.ragged("easy"))]
    return SearchResult(golden["nn_sims"], ranks, ranks % 30), junk


def test_golden_ensemble(golden):
    from golden_metrics import easy_medium_hard
    config, scorer = golden.config, lambda query, ids: golden["raw"][query, ids]
    for split in ("medium", "hard"):
        searched, junk = first_stage(golden, split)
        clean = move_junk_last(searched, junk)
        golden.check(f"shortlist.{split}.ids", clean.ranks)
        golden.check(f"shortlist.{split}.sims", clean.scores)
        golden.check(f"ames.{split}.raw", score_shortlist(clean, scorer, max(config["top_k"])))
        ranked = [[[rerank(searched, scorer, k, weight, gain, junk) for gain in config["temp"]] for weight in config["lamb"]] for k in config["top_k"]]
        golden.check(f"ames.{split}.ranks", [[[r.ranks for r in row] for row in plane] for plane in ranked])
        for plane in ranked:
            for row in plane:
                assert all(np.array_equal(r.patch_ids, r.ranks % 30) for r in row)          # the winning patch travels with its image
        maps = np.array([[[easy_medium_hard(r.ranks, *(golden.ragged(n) for n in ("easy", "hard", "junk"))) for r in row] for row in plane] for plane in ranked])
        for i, name in enumerate("EMH"):
            golden.check(f"ames.{split}.{name}_map", np.round(100 * maps[..., i], 3))
        golden.check(f"ames.{split}.map_mean_MH", maps[..., 1:].mean(-1))
    golden.all_checked()


def test_golden_ensemble_tuner_returns_the_best_point(golden):
    from golden_metrics import easy_medium_hard
    config, (searched, junk) = golden.config, first_stage(golden, "medium")
    truth = [golden.ragged(n) for n in ("easy", "hard", "junk")]
    metric = lambda result: np.mean(easy_medium_hard(result.ranks, *truth)[1:])
    best = tune(searched, lambda query, ids: golden["raw"][query, ids], metric, config["top_k"], config["lamb"], config["temp"], junk)
    np.testing.assert_allclose(best.table.value, golden["ames.medium.map_mean_MH"].ravel(), atol=1e-9)
    assert best.value == best.table.value.max()
