"The planner: its settings can be trained, its bytes are those of the files, and it says what does not fit."
import numpy as np
import pytest

from patchify.compress import memory
from patchify.indexfiles import planned_index
from patchify.plan import format_bytes, parse_bytes, plan_index, plan_problems, plan_steps, read_rates


@pytest.mark.parametrize("kind", ["pq", "ivfpq"])
@pytest.mark.parametrize("n_images, patches, dim", [(1, 1, 5), (3, 1, 64), (20, 5, 24), (200, 5, 17), (90, 30, 8)])
def test_the_recommended_index_can_be_trained_and_has_the_predicted_size(n_images, patches, dim, kind):
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((n_images, patches, dim), dtype=np.float32)
    plan = plan_index(n_images, dim, patches=patches, kind=kind)
    if plan.vectors < 2:
        return
    index = planned_index(plan).train(gallery).add(gallery)
    assert memory(index).total == plan.index_bytes
    assert index.search(gallery[:1, 0], 1).ranks.shape == (1, 1)


def test_more_memory_never_gives_a_coarser_index():
    plans = [plan_index(10**8, 1024, memory, kind="ivfpq") for memory in (10**10, 10**11, 10**12, 10**13)]
    for less, more in zip(plans, plans[1:]):
        assert less.n_subvectors <= more.n_subvectors and less.n_lists <= more.n_lists
    assert [plan.fits for plan in plans] == [False, False, True, True]


def test_small_collections_are_searched_exactly():
    assert plan_index(1000, 64, 10**9).kind == "exact"
    assert plan_index(1000, 1024, 10**8).kind == "ivfpq", "61 MB are more than half of the memory"
    assert plan_index(10**7, 1024, 10**13).kind == "ivfpq", "a query would read 600 GB"
    assert planned_index(plan_index(1000, 64, 10**9)) is None


@pytest.mark.parametrize("size", [1, 999, 1000, 64 * 10**9, 999_600, 25 * 10**11])
def test_sizes_survive_being_written(size):
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.005)


@pytest.mark.parametrize("text", ["", "64XB", "GB", "-5GB", "0", "1.2.3GB"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_impossible_collections_are_refused():
    with pytest.raises(ValueError, match="n_images must be at least 1"):
        plan_index(0, 64)
    with pytest.raises(ValueError, match="kind must be"):
        plan_index(10, 64, kind="flat")


def test_what_does_not_fit_comes_with_what_would():
    large = plan_index(10**8, 1024, 64 * 10**9)
    [problem] = plan_problems(large)
    assert "3 machines" in problem and "pyramid level 1" in problem and "161 GB" in problem
    assert plan_problems(large, machines=3) == []
    assert plan_index(10**8, 1024, 64 * 10**9, patches=5).fits
    assert not plan_index(10**8, 1024, 64 * 10**9, patches=14).fits


def test_hours_follow_from_the_rates():
    rates = {("encode", "slow"): 2.0, ("train", ""): 1e9, ("add", ""): 1e9, ("search", "ivfpq"): 1e6}
    plan = plan_index(1000, 64, 10**9, kind="ivfpq")
    encode, train, add, search = plan_steps(plan, 4, "slow", rates=rates)
    assert encode.hours == pytest.approx(30_000 / 2 / 4 / 3600)
    centroids = plan.n_lists + 256
    assert add.hours == pytest.approx(30_000 * 64 * centroids / 1e9 / 4 / 3600)
    assert train.hours == pytest.approx(25 * plan.training_points * 64 * centroids / 1e9 / 4 / 3600)
    shared = plan_steps(plan, 4, "slow", machines=2, rates=rates)
    assert [step.hours for step in shared] == pytest.approx([encode.hours / 2, train.hours, add.hours / 2, search.hours / 2])
    assert plan_steps(plan, 4, "unknown", rates=rates)[0].hours is None


def test_the_packaged_rates_cover_every_step():
    rates = read_rates()
    assert {"encode", "train", "add", "search"} == {step for step, _ in rates} and min(rates.values()) > 0
    assert {("encode", "mini"), ("search", "exact"), ("search", "ivfpq")} <= rates.keys()
