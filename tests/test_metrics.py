"Metrics: lists worked by hand, invariants, and the sentences for bad input."
import json
from dataclasses import astuple

import numpy as np
import pytest
import restricted_pickle
from hypothesis import given, settings
from hypothesis import strategies as st

from patchify import groups, localization, statistics
from patchify import metrics as m
from patchify.boxes import iou, pyramid_boxes
from patchify.data.ilias_files import save_similarities
from patchify.retrieval_set import revisited_setups

SETTINGS = settings(max_examples=60, deadline=None)


def worlds(n_gallery=st.integers(1, 30), n_query=st.integers(1, 5)):
    "Rankings of a whole gallery with random positives and disjoint junk: ranks, positives, junk, seeded generator."

    def build(n_gallery, n_query, seed, share):
        rng = np.random.default_rng(seed)
        ranks = np.stack([rng.permutation(n_gallery) for _ in range(n_query)])
        kind = rng.choice(3, p=[1 - share, share * 0.7, share * 0.3], size=ranks.shape)      # by gallery index: wrong, positive, junk
        return ranks, [np.flatnonzero(k == 1) for k in kind], [np.flatnonzero(k == 2) for k in kind], rng

    return st.builds(build, n_gallery, n_query, st.integers(0, 2**32 - 1), st.floats(0, 1))


def slow_ap(ranks, positives, junk, weights=None, k=None):
    "Precision(k) rel(k) w(k), one rank after the other."
    seen, found, total = 0, 0, 0.0
    for image in ranks:
        if image < 0 or image in junk or (k is not None and seen >= k):
            continue
        seen += 1
        if image in positives:
            found += 1
            total += found / seen * (1 if weights is None else weights[image])
    n = len(set(positives)) if k is None else min(k, len(set(positives)))
    return total / n if n else np.nan


# average precision

@SETTINGS
@given(worlds(), st.one_of(st.none(), st.integers(1, 40)))
def test_staircase_equals_the_definition(world, k):
    ranks, positives, junk, _ = world
    expected = [slow_ap(*query, k=k) for query in zip(ranks, positives, junk)]
    np.testing.assert_allclose(m.average_precisions(ranks, positives, junk, k), expected, atol=1e-12)


@SETTINGS
@given(worlds(), st.one_of(st.none(), st.integers(1, 40)), st.sampled_from(list(m.AP_VARIANTS)))
def test_perfect_ranking_is_one_and_all_values_are_fractions(world, k, variant):
    ranks, positives, junk, rng = world
    scores = -np.sort(-rng.random(ranks.shape), 1)
    values = m.average_precisions(ranks, positives, junk, k, variant, scores)
    known = np.array([len(p) > 0 for p in positives])
    assert np.array_equal(~np.isnan(values), known) and (values[known] >= 0).all() and (values[known] <= 1 + 1e-12).all()
    best = np.stack([np.concatenate([p, np.setdiff1d(row, p)]) for row, p in zip(ranks, positives)])
    np.testing.assert_allclose(m.average_precisions(best, positives, junk, k, variant, scores)[known], 1)


@SETTINGS
@given(worlds())
def test_junk_may_stand_anywhere(world):
    ranks, positives, junk, rng = world
    rest = [row[~np.isin(row, bad)] for row, bad in zip(ranks, junk)]
    mixed = np.stack([np.insert(r, rng.integers(0, len(r) + 1, len(bad)), bad) for r, bad in zip(rest, junk)])
    for variant in ("staircase", "trapezoid"):
        np.testing.assert_array_equal(m.average_precisions(ranks, positives, junk, variant=variant),
                                      m.average_precisions(mixed, positives, junk, variant=variant))
    np.testing.assert_array_equal(m.precision_at(ranks, positives, 3, junk), m.precision_at(mixed, positives, 3, junk))


@SETTINGS
@given(worlds())
def test_gallery_numbers_do_not_matter(world):
    ranks, positives, junk, rng = world
    name = rng.permutation(10 * ranks.shape[1])
    renamed = name[ranks], [name[p] for p in positives], [name[j] for j in junk]
    for measure in (m.average_precisions, lambda r, p, j: m.recall_at(r, p, 2, j), lambda r, p, j: m.precision_at(r, p, 2, j)):
        np.testing.assert_array_equal(measure(ranks, positives, junk), measure(*renamed))


@SETTINGS
@given(worlds(), st.integers(0, 10))
def test_minus_one_is_no_image(world, padding):
    ranks, positives, junk, _ = world
    padded = np.pad(ranks, ((0, 0), (0, padding)), constant_values=-1)
    np.testing.assert_array_equal(m.average_precisions(ranks, positives, junk), m.average_precisions(padded, positives, junk))
    np.testing.assert_array_equal(m.oracle_ilias(ranks, positives, 3), m.oracle_ilias(padded, positives, 3))


@SETTINGS
@given(worlds(), st.integers(1, 40))
def test_ilias_ignores_the_order_of_entries(world, k):
    ranks, positives, _, rng = world
    scores = rng.random(ranks.shape)                                     # without ties
    order = np.argsort(-scores, 1)
    expected = m.average_precisions(np.take_along_axis(ranks, order, 1), positives, k=k)
    np.testing.assert_allclose(m.average_precisions(ranks, positives, None, k, "ilias", scores), expected, atol=1e-12)


@SETTINGS
@given(worlds())
def test_ilias_ignores_the_order_inside_ties(world):
    ranks, positives, _, rng = world
    scores = rng.integers(0, 3, ranks.shape).astype(np.float32)
    order = rng.permutation(ranks.shape[1])
    np.testing.assert_allclose(m.average_precisions(ranks, positives, variant="ilias", scores=scores),
                               m.average_precisions(ranks[:, order], positives, variant="ilias", scores=scores[:, order]), atol=1e-12)


def test_trapezoid_by_hand():
    assert m.ap_trapezoid([0], 1) == 1
    assert np.isclose(m.ap_trapezoid([1, 3], 4), ((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 4)
    assert m.ap_trapezoid([], 3) == m.ap_staircase([], 3) == 0


def test_oracle_is_inflated_by_short_lists():
    ranks = np.array([[3, 1, 0, 2], [3, -1, -1, -1]])
    np.testing.assert_allclose(m.oracle_ilias(ranks, [[0, 1, 9], [3, 4]], k=3), [2 / 3 * 3 / 3, 1 / 1 * 3 / 2])
    np.testing.assert_allclose(m.oracle_ilias(np.array([[-1, -1]]), [[0]], k=3), [0])


def test_recall_and_precision_by_hand():
    ranks = np.array([[5, 2, 8, 1], [5, 2, 8, 1], [5, 2, 8, 1]])
    positives = [[1, 2], [7], []]
    assert m.recall_at(ranks, positives, 1)[:2].tolist() == [0, 0] and m.recall_at(ranks, positives, 2)[:2].tolist() == [1, 0]
    assert m.recall_at(ranks, positives, 1, junk=[[5], [], []])[0] == 1
    assert m.precision_at(ranks, positives, 10)[:2].tolist() == [2 / 4, 0] and np.isnan(m.precision_at(ranks, positives, 10)[2])


# LocScore

def located(world, patches=5):
    "Winning patches of a world, its overlaps, and the IoU of every gallery image's patches."
    ranks, positives, junk, rng = world
    truth = [np.sort(rng.integers(0, 100, (rng.integers(1, 4), 2, 2)), 1).reshape(-1, 4) + [0, 0, 1, 1] for _ in range(ranks.shape[1])]
    boxes, patch_ids = pyramid_boxes(101, 101, 1), rng.integers(0, patches, ranks.shape)
    overlaps = localization.location_overlaps(ranks, patch_ids, positives, lambda image: boxes, truth, junk)
    return patch_ids, overlaps, [iou(boxes, t).max(1) for t in truth]


@SETTINGS
@given(worlds(), st.sampled_from(["iou", "hit"]), st.sampled_from(["default", "average", 0.1, 0.5]), st.one_of(st.none(), st.integers(1, 9)))
def test_locscore_equals_the_definition_and_never_exceeds_ap(world, weight, tau, k):
    ranks, positives, junk, _ = world
    patch_ids, overlaps, table = located(world)
    taus = np.float32(localization.IOU_THRESHOLDS.get(tau, [tau]))
    expected = []
    for row, patch, right, bad in zip(ranks, patch_ids, positives, junk):
        shared = {image: table[image][p] for image, p in zip(row, patch)}
        weights = [{i: (s if weight == "iou" else 1.0) * float(s >= t) for i, s in shared.items()} for t in taus]
        expected.append(np.mean([slow_ap(row, right, bad, w, k) for w in weights]))
    values = localization.locscores(ranks, positives, overlaps, tau, weight, junk, k)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    aps = m.average_precisions(ranks, positives, junk, k)
    assert np.array_equal(np.isnan(aps), np.isnan(values)) and (np.nan_to_num(values) <= np.nan_to_num(aps) + 1e-12).all()


@SETTINGS
@given(worlds(), st.sampled_from(["iou", "hit"]), st.sampled_from(["default", "average"]))
def test_locscore_of_exact_boxes_is_ap_and_of_wrong_boxes_zero(world, weight, tau):
    ranks, positives, junk, _ = world
    boxes = pyramid_boxes(120, 90, 2)
    patch_ids = np.full(ranks.shape, 7)
    aps = m.average_precisions(ranks, positives, junk)
    for truth, expected in [(boxes[[7]], aps), (boxes[[13]], 0 * aps)]:
        overlaps = localization.location_overlaps(ranks, patch_ids, positives, [boxes] * ranks.shape[1], lambda image: truth, junk)
        np.testing.assert_allclose(localization.locscores(ranks, positives, overlaps, tau, weight, junk), expected, atol=1e-12)


def test_the_best_of_several_boxes_counts():
    boxes = pyramid_boxes(100, 100, 1)
    truth = np.array([[0, 0, 5, 5], [50, 50, 100, 100]])
    overlap, = localization.location_overlaps(np.array([[0]]), np.array([[4]]), [[0]], {0: boxes}, {0: truth})
    assert overlap.tolist() == [1]


def test_thresholds_are_inclusive_in_single_precision():
    for tau in np.arange(0.05, 1, 0.05):
        assert localization.location_weights([np.float32(tau)], float(tau), "hit") == 1


def test_unknown_locations_are_missing_and_others_stay():
    ranks, positives = np.array([[0], [1], [0], [1]]), [[0], [1], [0], [0]]
    truth = {0: np.empty((0, 4)), 1: np.array([[0, 0, 10, 10]])}
    overlaps = localization.location_overlaps(ranks, np.array([[0], [0], [-1], [0]]), positives, lambda i: np.array([[0, 0, 10, 10]]), truth)
    values = localization.locscores(ranks, positives, overlaps)
    assert np.isnan(values[[0, 2]]).all() and values[1] == 1 and values[3] == 0


# uncertainty

@SETTINGS
@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), min_size=1, max_size=40), st.integers(0, 99))
def test_bootstrap_is_deterministic_and_ignores_missing(values, seed):
    values = np.array(values)
    summary, known = statistics.summarize(values, 200, seed), values[~np.isnan(values)]
    np.testing.assert_equal(astuple(summary), astuple(statistics.summarize(values, 200, seed)))
    np.testing.assert_equal((summary.lo, summary.hi), statistics.bootstrap_ci(known, 200, seed))
    assert (summary.queries, summary.left_out) == (len(known), len(values) - len(known))
    if len(known):
        assert known.min() - 1e-12 <= summary.lo <= summary.hi <= known.max() + 1e-12


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [lo <= 0.5 <= hi for lo, hi in (statistics.bootstrap_ci(rng.random(60), 300, s) for s in range(200))]
    assert 0.9 <= np.mean(covered) <= 0.99


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    a, b = hard + rng.normal(0.02, 0.02, 200), hard.copy()
    a[3] = b[7] = np.nan
    result = statistics.paired_bootstrap(a, b)
    assert result == statistics.paired_bootstrap(a, b) and result.queries == 198
    assert np.isclose(result.difference, np.nanmean(a - b)) and 0 < result.lo < result.difference < result.hi and result.p < 0.01
    mirrored = statistics.paired_bootstrap(b, a)
    np.testing.assert_allclose([mirrored.difference, mirrored.lo, mirrored.hi], [-result.difference, -result.hi, -result.lo])
    assert statistics.paired_bootstrap(hard, hard[::-1]).p > 0.05


# groups

def test_groups_leave_the_list_and_the_truth():
    ranks, positives = np.array([[0, 5, 1, 2], [3, 5, 4, 2]]), [[0, 1, 2], [3]]
    scale = np.array([0.01, 0.2, np.nan, 0.01, np.nan, np.nan])
    table = groups.by_group(lambda p, j: m.average_precisions(ranks, p, j), groups.split_positives(positives, scale, (0, 0.1, 0.5)))
    assert table["group"].tolist() == ["0-0.1", "0.1-0.5"] and table["queries"].tolist() == [2, 1] and table["left_out"].tolist() == [0, 1]
    np.testing.assert_allclose(table["mean"], [1, 1 / 2])           # image 1 is second once 0 and 2 are gone


def test_bounds_are_inclusive_below_and_exclusive_above():
    split = groups.split_positives([[0, 1]], [18, 17.999], groups.CLUTTER_EDGES)
    inside = [p[0].tolist() for p, _ in split.values()]
    assert inside == [[1], [0], [], []]


def test_an_empty_group_has_no_mean():
    table = groups.by_group(lambda p, j: m.average_precisions(np.array([[0]]), p, j), {"none": ([[]], [[0]])})
    assert np.isnan(table["mean"][0]) and table["queries"][0] == 0 and table["left_out"][0] == 1


def test_setups_take_lists_and_arrays():
    easy, hard, junk = [[1]], [np.array([2])], [[]]
    for name, (positives, bad) in revisited_setups(easy, hard, junk).items():
        assert sorted(positives[0]) == {"easy": [1], "medium": [1, 2], "hard": [2]}[name]
        assert sorted(bad[0]) == {"easy": [2], "medium": [], "hard": [1]}[name]


def test_categories_average_instances_not_queries():
    table = groups.by_category([1, 0, 0, np.nan], ["a", "a", "b", "c"], ["x"] * 4)
    assert table["mean"].tolist() == [0.25] and table["instances"].tolist() == [2] and table["queries"].tolist() == [3]


# the similarity file

def test_lists_that_were_not_filled_are_written_without_the_gaps(tmp_path):
    scores, ranks = np.float32([[0.9, 0.8, 0.1], [0.5, -np.inf, -np.inf]]), np.array([[4, 0, 2], [2, -1, -1]])
    ids = [f"i{n}" for n in range(6)]
    file = restricted_pickle.load(save_similarities(tmp_path / "s.pkl", ["p", "q"], ids, scores, ranks))
    assert [file["db_ids"][r].tolist() for r in file["ranks"]] == [["i4", "i0", "i2"], ["i2"]]
    assert [len(s) for s in file["sims"]] == [3, 1]
    entries = json.loads(save_similarities(tmp_path / "s.json", ["p", "q"], ids, scores, ranks).read_text())
    assert {q: list(e) for q, e in entries.items()} == {"p": ["i4", "i0", "i2"], "q": ["i2"]}
    assert np.float32(entries["p"]["i4"]) == scores[0, 0] and sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "s.pkl"]


@pytest.mark.parametrize("call, words", [
    (lambda t: m.average_precisions(np.array([0, 1]), [[0]]), "ranks must be integers of shape"),
    (lambda t: m.average_precisions(np.array([[0.0]]), [[0]]), "integers"),
    (lambda t: m.average_precisions(np.array([[0]]), [[0], [1]]), "1 rankings, 2 lists of positives"),
    (lambda t: m.average_precisions(np.array([[0]]), [[0]], k=0), "k must be 1 or more, got 0"),
    (lambda t: m.average_precisions(np.array([[0]]), [[0]], variant="ilias"), "needs scores"),
    (lambda t: m.average_precisions(np.array([[0, 0]]), [[0]]), "gallery image 0 more than once"),
    (lambda t: m.precision_at(np.array([[0]]), [[0]], 0), "k must be 1 or more, got 0"),
    (lambda t: localization.location_overlaps(np.array([[0]]), np.array([0]), [[0]], [], []), "patch_ids"),
    (lambda t: localization.locscores(np.array([[0]]), [[0]], [[]]), "0 overlaps for 1 retrieved positives"),
    (lambda t: localization.location_weights([0.5], weight="soft"), "unknown weight 'soft'"),
    (lambda t: statistics.paired_bootstrap([np.nan], [1.0]), "no query has a value in both"),
    (lambda t: save_similarities(t / "s.npz", ["q"], ["a"], np.ones((1, 1)), np.zeros((1, 1), int)), "s.npz"),
    (lambda t: save_similarities(t / "s.pkl", ["q"], ["a", "a"], np.ones((1, 1)), np.zeros((1, 1), int)), "unique"),
    (lambda t: save_similarities(t / "s.pkl", ["q", "p"], ["a"], np.ones((1, 1)), np.zeros((1, 1), int)), "do not belong together"),
    (lambda t: save_similarities(t / "s.json", ["q"], ["a"], np.full((1, 1), np.nan), np.zeros((1, 1), int)), "not finite"),
])
def test_bad_input_is_one_sentence(tmp_path, call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
