"""Describing, ranking and measuring a benchmark, where an index or the ground truth leaves gaps."""
from dataclasses import replace

import numpy as np
import pytest
import restricted_pickle

from patchify.data.registry import load
from patchify.boxes import Regions
from patchify.ivf import IVFPQIndex
from patchify.encoder import load_encoder
from patchify.evaluate import describe, metrics_dict, rank
from patchify.data.ilias_files import save_similarities
from patchify.metrics import average_precisions


@pytest.fixture(scope="module")
def described(data):
    return describe(load("tiny", data), load_encoder("mini", device="cpu"), Regions("pyramid", 3), data / "stores")


def test_an_image_never_looked_at_counts_for_nothing(described, tmp_path):
    "The measures and the official file agree: both know only what the index reached, and no query drops out of LocScore."
    build = lambda blocks, rows: IVFPQIndex(n_subvectors=8, n_bits=4, n_lists=16, n_probe=1).train(blocks, described.regions.levels).add(blocks, rows)
    run, benchmark = rank(described, index=build), described.benchmark
    assert 0 < run.result.unreached.sum() < run.result.ranks.size
    lists = [[row[np.isfinite(s)] for row, s in zip(table, run.result.scores)] for table in (run.result.ranks, run.result.scores)]
    aps = [average_precisions(r[None], [right], None, 1000, "ilias", s[None])[0] for r, s, right in zip(*lists, benchmark.positives)]
    np.testing.assert_allclose(run.measure()["ap"], aps)
    assert not run.measure().isna().any(axis=None)
    file = save_similarities(tmp_path / "found.pkl", benchmark.queries["id"], benchmark.gallery["id"], run.result.scores, run.result.ranks)
    written = restricted_pickle.load(file)
    ids = benchmark.gallery["id"].to_numpy()
    assert [written["db_ids"][r].tolist() for r in written["ranks"]] == [ids[r].tolist() for r in lists[0]]


def test_queries_without_a_true_box_are_missed_in_locscore_and_said(described):
    gallery = described.benchmark.gallery.copy()
    first = described.benchmark.positives[0][0]
    gallery["boxes"] = [np.empty((0, 4), np.float32) if i == first else boxes for i, boxes in enumerate(gallery["boxes"])]
    run = rank(replace(described, benchmark=replace(described.benchmark, gallery=gallery)))
    assert metrics_dict(run)["left_out"]["of LocScore, because no ground-truth box is known"] == 1
    assert metrics_dict(rank(described))["left_out"]["of LocScore, because no ground-truth box is known"] == 0


@pytest.mark.parametrize("level", (7, -2, 1.5))
def test_a_level_that_is_not_there_is_refused(described, level):
    with pytest.raises(ValueError, match=f"level {level} is not in a store"):
        rank(described, level)


def test_what_is_returned_fits_on_a_line(described):
    assert len(repr(rank(described))) < 300 and "\n" not in repr(rank(described))


def test_a_landmark_set_is_reported_by_its_own_protocol(tmp_path):
    "Images in, Easy, Medium and Hard out; no LocScore, because there are no ground-truth boxes."
    from test_revisited import make
    task = load(f"rparis6k:{make(tmp_path / 'rparis6k')}")
    run = rank(describe(task, load_encoder("mini", device="cpu"), Regions("pyramid", 1), tmp_path / "stores"))
    report = metrics_dict(run)
    assert report["score"] == "mAP Medium" and report["map"] == report["medium"] and {"easy", "hard", "mp@1", "mp@k"} <= report.keys()
    assert report["locscore_iou"] is None and metrics_dict(run, "hard")["map"] == report["hard"]
    with pytest.raises(ValueError, match="protocol 'gldv2' does not fit rparis6k"):
        metrics_dict(run, "gldv2")


def test_another_protocol_needs_lists_that_are_long_enough(described):
    run = rank(described)
    assert metrics_dict(run, "classes")["r@k"].keys() == {"1", "2", "4", "8"}
    short = replace(run, result=replace(run.result, **{name: getattr(run.result, name)[:, :5] for name in ("scores", "ranks", "patch_ids")}))
    assert metrics_dict(short)["map"] is not None
    with pytest.raises(ValueError, match="protocol 'classes' reads whole rankings"):
        metrics_dict(short, "classes")
