"""Golden locore_sliding: every window of the official sliding evaluation, before and after, and the final lists."""
import numpy as np
import pytest
from rerank_goldens import Golden

from patchify.rerank.windows import rerank_windows, slide, window_starts
from patchify.rerank.shortlist import move_junk_last
from patchify.search import SearchResult


def toy_scorer(golden, data):
    "The golden's stand-in for the model: it depends on the query, the image, and the mean of the window's images."
    def score(query, ids):
        q, g = golden[f"{data}.toy_query"][query], golden[f"{data}.toy_gallery"][ids]
        return 3 * g @ q + 2 * g @ g.mean(0)
    return score


def first_stage(golden, data, split):
    scores, ranks = golden[f"{data}.nn_sims"], golden[f"{data}.nn_inds"].astype(np.int64)
    easy, junk = golden.ragged(f"{data}.easy"), golden.ragged(f"{data}.junk")
    bad = [np.concatenate([j, e]) if split == "hard" else j for j, e in zip(junk, easy)]
    return SearchResult(scores, ranks, np.zeros_like(ranks)), bad


def test_golden_locore_sliding():
    from golden_metrics import mean_of_medium_and_hard
    golden = Golden("locore_sliding")
    config = golden.config
    size = dict(window=config["window"], stride=config["sliding_stride"])
    fusion = dict(global_weight=config["alpha"], gain=config["temp"])
    splits = {name.split(".")[1] for name in golden.outputs}
    for data in config["datasets"]:
        score = toy_scorer(golden, data)
        truth = {name: golden.ragged(f"{data}.{name}") for name in ("easy", "hard", "junk")}
        for split in sorted(splits):
            searched, bad = first_stage(golden, data, split)
            clean = move_junk_last(searched, bad)
            golden.check(f"{data}.{split}.nn_inds_clean", clean.ranks)
            golden.check(f"{data}.{split}.nn_sims_clean", clean.scores)
            for direction in config["types"]:
                name = f"{data}.{split}.{direction}"
                starts = window_starts(config["sliding_topk"], **size, direction=direction)
                golden.check(f"{name}.windows", [[a, a + config["window"]] for a in starts])
                steps = [list(slide(clean.scores[q, :config["sliding_topk"]], lambda members: score(q, clean.ranks[q][members]), starts, config["window"], **fusion))
                         for q in range(len(clean.ranks))]
                for i, part in enumerate(("before", "raw", "after")):
                    golden.check(f"{name}.{part}", [[step[i] for step in query] for query in steps])
                final = rerank_windows(searched, score, config["sliding_topk"], **size, direction=direction, **fusion, junk=bad)
                golden.check(f"{name}.final", final.ranks)
                golden.check(f"{name}.map_mean_MH", mean_of_medium_and_hard(final.ranks, **truth))
    golden.all_checked()
