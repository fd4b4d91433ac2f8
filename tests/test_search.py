"""Exact search against the slow, obvious version, over awkward sizes and awkward inputs."""
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from patchify import flat
from patchify import search as module
from patchify.flat import FlatIndex, best_images
from patchify.refine import rescore
from patchify.search import ExactIndex, SearchResult, best_patches, merge, patch_scores, rank_images, read_blocks

FIELDS = ("scores", "ranks", "patch_ids")
SIZES = dict(n=st.integers(1, 70), n_patches=st.sampled_from([1, 2, 5, 14, 30]), dim=st.sampled_from([1, 2, 3, 7, 16, 33, 130]),
             n_query=st.integers(1, 40), seed=st.integers(0, 10**6))


def made(n, n_patches, dim, n_query, seed):
    """Whole numbers: every sum is exact in float32, so brute force must be met to the bit and ties abound."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-3, 4, (n, n_patches, dim)).astype(np.float32), rng.integers(-3, 4, (n_query, dim)).astype(np.float32))


def brute_force(gallery, queries, k=None):
    """One query and one image at a time, in double precision."""
    scores, ranks, patches = [], [], []
    for query in queries.astype(float):
        per_patch = [[float(query @ d) for d in image.astype(float)] for image in gallery]
        best = [max(row) for row in per_patch]
        order = sorted(range(len(best)), key=lambda i: (-best[i], i))[:k]
        scores.append([best[i] for i in order])
        ranks.append(order)
        patches.append([per_patch[i].index(best[i]) for i in order])
    return SearchResult(np.array(scores, np.float32), np.array(ranks), np.array(patches))


def assert_same(a, b):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@settings(max_examples=60, deadline=None)
@given(**SIZES, k=st.one_of(st.none(), st.integers(1, 90)))
def test_equals_brute_force_ties_included(n, n_patches, dim, n_query, seed, k):
    gallery, queries = made(n, n_patches, dim, n_query, seed)
    found = ExactIndex(gallery).search(queries, k)
    assert_same(found, brute_force(gallery, queries, k))
    assert [getattr(found, name).dtype for name in FIELDS] == [np.float32, np.int64, np.int64]


@settings(max_examples=30, deadline=None)
@given(**SIZES, cuts=st.lists(st.integers(0, 70), max_size=4), queries_at_once=st.integers(1, 9), images=st.integers(1, 20), pending=st.integers(1, 8))
def test_shards_change_no_bit_and_batches_only_rounding(n, n_patches, dim, n_query, seed, cuts, queries_at_once, images, pending):
    rng = np.random.default_rng(seed)
    gallery, queries = rng.normal(size=(n, n_patches, dim)).astype(np.float32), rng.normal(size=(n_query, dim)).astype(np.float32)
    shards = np.split(gallery, sorted(min(c, n) for c in cuts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PENDING", pending)
        patch.setattr(module, "SORTED_AT_ONCE", pending)
        patch.setattr(module, "block_images", lambda *_: images)
        whole, pieces = (ExactIndex(blocks, device="cpu").search(queries, 10) for blocks in (gallery, shards))
        if torch.backends.mkldnn.is_available():
            assert_same(whole, pieces)
        patch.setattr(module, "QUERIES", queries_at_once)
        batched = ExactIndex(shards, device="cpu").search(queries, 10)
    for other in (pieces, batched, ExactIndex(gallery, device="cpu").search(queries, 10)):
        np.testing.assert_allclose(whole.scores, other.scores, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(**SIZES)
def test_random_descriptors_against_double_precision(n, n_patches, dim, n_query, seed):
    rng = np.random.default_rng(seed)
    gallery, queries = rng.normal(size=(n, n_patches, dim)), rng.normal(size=(n_query, dim))
    gallery, queries = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (gallery, queries))
    found = ExactIndex(gallery.astype(np.float32)).search(queries.astype(np.float32))
    every = np.einsum("qd,npd->qnp", queries, gallery)
    rows = np.arange(n_query)[:, None]
    np.testing.assert_allclose(found.scores, every.max(2)[rows, found.ranks], atol=2e-6)
    np.testing.assert_allclose(found.scores, every[rows, found.ranks, found.patch_ids], atol=2e-6)
    assert (np.sort(found.ranks, axis=1) == np.arange(n)).all() and (np.diff(found.scores, axis=1) <= 0).all()


def test_permuting_the_gallery_permutes_the_ranks():
    rng = np.random.default_rng(1)
    gallery, queries = rng.normal(size=(50, 5, 24)).astype(np.float32), rng.normal(size=(7, 24)).astype(np.float32)
    order = rng.permutation(50)
    before, after = ExactIndex(gallery).search(queries), ExactIndex(gallery[order]).search(queries)
    np.testing.assert_array_equal(order[after.ranks], before.ranks)
    np.testing.assert_array_equal(after.patch_ids, before.patch_ids)


def test_permuting_patches_permutes_patch_ids():
    rng = np.random.default_rng(2)
    gallery, queries = rng.normal(size=(40, 14, 24)).astype(np.float32), rng.normal(size=(5, 24)).astype(np.float32)
    order = rng.permutation(14)
    before, after = ExactIndex(gallery).search(queries), ExactIndex(gallery[:, order]).search(queries)
    np.testing.assert_array_equal(after.ranks, before.ranks)
    np.testing.assert_array_equal(order[after.patch_ids], before.patch_ids)


@pytest.mark.parametrize("dim", [3, 100, 384, 768, 1024])
@pytest.mark.parametrize("n_query", [1, 11, 150])
def test_copies_tie_and_come_in_order_across_blocks(dim, n_query, monkeypatch):
    monkeypatch.setattr(module, "block_images", lambda *_: 97)
    rng = np.random.default_rng(3)
    gallery, queries = rng.normal(size=(300, 5, dim)).astype(np.float32), rng.normal(size=(n_query, dim)).astype(np.float32)
    gallery[[17, 160, 299]] = gallery[4]
    found = ExactIndex([gallery[:9], gallery[9:161], gallery[161:]]).search(queries)
    for row, patches in zip(found.ranks, found.patch_ids):
        places = np.array([np.flatnonzero(row == i)[0] for i in (4, 17, 160, 299)])
        assert (np.diff(places) == 1).all() and len(set(patches[places])) == 1


def test_float16_memory_maps_equal_their_values(tmp_path):
    rng = np.random.default_rng(4)
    gallery, queries = rng.normal(size=(90, 5, 20)).astype(np.float16), rng.normal(size=(6, 20)).astype(np.float32)
    for i, block in enumerate(np.split(gallery, [13, 60])):
        np.save(tmp_path / f"{i}.npy", block)
    maps = [np.load(tmp_path / f"{i}.npy", mmap_mode="r") for i in range(3)]
    assert_same(ExactIndex(maps).search(queries), ExactIndex(gallery.astype(np.float32)).search(queries))
    np.save(tmp_path / "wide.npy", gallery.astype(np.float32))
    assert_same(ExactIndex(np.load(tmp_path / "wide.npy", mmap_mode="r")).search(queries), ExactIndex(maps).search(queries))


def test_search_leaves_its_inputs_alone():
    gallery, queries = made(20, 5, 8, 4, 0)
    copies = gallery.copy(), queries.copy()
    gallery.flags.writeable = queries.flags.writeable = False
    ExactIndex(gallery).search(queries)
    np.testing.assert_array_equal(gallery, copies[0])
    np.testing.assert_array_equal(queries, copies[1])


def test_minus_infinity_is_ranked_last_and_counted():
    scores = torch.tensor([[-torch.inf, 0.5, -torch.inf, 0.7]])
    found = rank_images([(scores, torch.zeros(1, 4, dtype=torch.int32))])
    assert found.ranks.tolist() == [[3, 1, 0, 2]] and found.unreached.tolist() == [2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_that_are_not_finite_are_refused_and_named(bad, dtype):
    gallery, queries = made(30, 5, 8, 4, 0)
    spoilt = gallery.astype(dtype)
    spoilt[21, 3, 2] = bad
    with pytest.raises(ValueError, match="gallery image 21"):
        ExactIndex([spoilt[:20], spoilt[20:]]).search(queries)
    queries[2, 1] = bad
    with pytest.raises(ValueError, match="queries hold NaN or infinity, first in row 2"):
        ExactIndex(gallery).search(queries)


@pytest.mark.parametrize("call, said", [
    (lambda g, q: ExactIndex(g).search(q[:, :3]), r"queries must be \(Q, 8\).*\(4, 3\)"),
    (lambda g, q: ExactIndex(g).search(q[0]), r"queries must be \(Q, 8\)"),
    (lambda g, q: ExactIndex(g).search(q[:0]), r"queries must be \(Q, 8\)"),
    (lambda g, q: ExactIndex(g).search(q, 0), "k must be at least 1"),
    (lambda g, q: ExactIndex(g).search(q, -3), "k must be at least 1"),
    (lambda g, q: ExactIndex(g[0]), r"descriptors must be \(images, patches, dim\)"),
    (lambda g, q: ExactIndex(g[:0]), "descriptors hold no image"),
    (lambda g, q: ExactIndex([]), "descriptors hold no image"),
    (lambda g, q: ExactIndex([g, g[:, :2]]), "block 1 has"),
    (lambda g, q: ExactIndex([g, g[:, :, :2]]), "block 1 has"),
    (lambda g, q: ExactIndex(g, gallery_ids=range(5)), "gallery_ids must be 20 integers"),
    (lambda g, q: ExactIndex(g, gallery_ids=np.arange(20)[::-1]), "gallery_ids must rise"),
])
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call(*made(20, 5, 8, 4, 0))


@settings(max_examples=25, deadline=None)
@given(**SIZES, k=st.one_of(st.none(), st.integers(1, 90)), n_parts=st.integers(1, 4))
def test_merged_parts_equal_the_whole(n, n_patches, dim, n_query, seed, k, n_parts):
    gallery, queries = made(n, n_patches, dim, n_query, seed)
    owner = np.random.default_rng(seed).integers(0, n_parts, n)
    parts = [ExactIndex(gallery[owner == i], np.flatnonzero(owner == i)).search(queries, k) for i in range(n_parts) if (owner == i).any()]
    assert_same(merge(parts, k), ExactIndex(gallery).search(queries, k))


def test_best_patch_of_a_block_equals_numpy():
    rng = np.random.default_rng(5)
    block, queries = rng.integers(-2, 3, (33, 7, 6)).astype(np.float32), rng.integers(-2, 3, (10, 6)).astype(np.float32)
    every = np.einsum("qd,npd->qnp", queries, block)
    scores, patches = best_patches(patch_scores(torch.from_numpy(block), torch.from_numpy(queries)))
    np.testing.assert_array_equal(scores, every.max(2))
    np.testing.assert_array_equal(patches, every.argmax(2))


def test_pieces_are_of_one_size_however_the_gallery_is_cut():
    "Small shards of a store must not make small pieces: a short piece costs as much as a full one."
    rng = np.random.default_rng(3)
    for _ in range(100):
        sizes, images = rng.integers(0, 9, 5), int(rng.integers(1, 12))
        gallery = rng.standard_normal((sizes.sum() + 1, 2, 3)).astype(np.float32)
        *full, last = (piece.numpy() for piece in read_blocks(np.split(gallery, np.cumsum(sizes)), images))
        assert all(len(piece) == images for piece in full) and 1 <= len(last) <= images
        assert (np.concatenate([*full, last]) == gallery).all()


@settings(max_examples=40, deadline=None)
@given(**SIZES, k=st.one_of(st.none(), st.integers(1, 90)), at_once=st.integers(1, 300), pilot=st.integers(1, 9))
def test_flat_index_equals_brute_force_ties_included(n, n_patches, dim, n_query, seed, k, at_once, pilot):
    gallery, queries = made(n, n_patches, dim, n_query, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "PATCHES_AT_ONCE", at_once)
        patch.setattr(flat, "PILOT", pilot)
        assert_same(FlatIndex(gallery).search(queries, k), brute_force(gallery, queries, k))


@pytest.mark.parametrize("dim", [3, 100, 768])
@pytest.mark.parametrize("n_query", [1, 40])
@pytest.mark.parametrize("k", [1, 5, 50, None])
def test_flat_index_ranks_copies_like_the_exact_index(dim, n_query, k):
    rng = np.random.default_rng(6)
    gallery, queries = rng.normal(size=(150, 5, dim)), rng.normal(size=(n_query, dim))
    gallery, queries = ((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32) for x in (gallery, queries))
    gallery[[17, 60, 149]] = gallery[4]
    gallery[:, 3] = gallery[:, 1]
    queries[0] = gallery[4, 2]
    found, exact = FlatIndex(gallery, np.arange(150) + 7).search(queries, k), ExactIndex(gallery, np.arange(150) + 7).search(queries, k)
    np.testing.assert_array_equal(found.ranks, exact.ranks)
    np.testing.assert_array_equal(found.patch_ids, exact.patch_ids)
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-6)


def test_a_gpu_serves_short_lists_only(monkeypatch):
    "FAISS's GPU indexes return at most 2,048 entries; longer lists come from the CPU."
    given = []

    class OnGpu:
        def __init__(self, index):
            self.index = index

        def search(self, queries, m):
            given.append(m)
            return self.index.search(queries, m)

    monkeypatch.setattr(flat.faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(flat.faiss, "index_cpu_to_all_gpus", OnGpu)
    monkeypatch.setattr(flat, "GPU_LIST", 30)
    gallery, queries = made(50, 5, 8, 4, 0)
    for k in (10, None):
        assert_same(FlatIndex(gallery).search(queries, k), brute_force(gallery, queries, k))
    assert given and max(given) <= 30


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), n_patches=st.integers(1, 6), n_query=st.integers(1, 30), seed=st.integers(0, 10**6), share=st.floats(0, 1),
       values=st.integers(1, 6), k=st.integers(1, 40))
def test_images_of_a_patch_search_that_reaches_only_some(n, n_patches, n_query, seed, share, values, k):
    "Few different scores, so that lists end within ties, and patches that the search never returns."
    k = min(k, n)
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, values, (n_query, n, n_patches)).astype(np.float32)
    scores[rng.random(scores.shape) > share] = -np.inf

    def find(some, m):
        every = scores[some].reshape(len(some), -1)
        shuffled = rng.permutation(every.shape[1])  # ties in any order, as from a heap
        order = shuffled[np.argsort(-every[:, shuffled], axis=1, kind="stable")][:, :m]
        found = np.take_along_axis(every, order, axis=1)
        return np.where(np.isfinite(found), found, -1e38).astype(np.float32), np.where(np.isfinite(found), order, -1)

    patches = torch.from_numpy(np.where(np.isfinite(scores.max(2)), scores.argmax(2), -1))
    expected = rank_images([(torch.from_numpy(scores.max(2)), patches)], k)
    assert_same(best_images(find, n_query, k, n, n_patches), expected)


def test_lists_stay_short_where_patches_come_from_different_images():
    asked = []
    scores = np.random.default_rng(0).normal(size=(300, 2000 * 10)).astype(np.float32)

    def find(some, m):
        asked.append(len(some) * m)
        order = np.argsort(-scores[some], axis=1)[:, :m]
        return np.take_along_axis(scores[some], order, axis=1), order

    best_images(find, 300, 20, 2000, 10)
    assert sum(asked) < 300 * 30, "about 20 patches per query, not 20 x 10"


def test_the_public_route_to_onednn_gives_the_same_bits(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs oneDNN")
    rng = np.random.default_rng(7)
    for n, n_patches, dim, n_query in ((61, 14, 384, 9), (1, 1, 3, 1), (40, 30, 130, 33)):
        block, queries = (torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((n, n_patches, dim), (n_query, dim)))
        block[n // 2] = block[0]
        direct = patch_scores(block, queries)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_ONEDNN_LINEAR", None)
            public = patch_scores(block, queries)
        assert torch.equal(public[:, 0], public[:, n // 2]), "copies tie"
        np.testing.assert_allclose(direct, public, atol=1e-5)


def test_a_missing_operator_is_noticed(monkeypatch):
    def renamed(*_):
        raise TypeError("unexpected arguments")

    assert module._onednn_linear() is module._ONEDNN_LINEAR
    monkeypatch.setattr(module.torch.ops.mkldnn, "_linear_pointwise", renamed, raising=False)
    assert module._onednn_linear() is None


def test_memory_maps_are_read_in_place(tmp_path):
    rng = np.random.default_rng(8)
    np.save(tmp_path / "g.npy", rng.normal(size=(40, 5, 16)).astype(np.float32))
    mapped = np.load(tmp_path / "g.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pieces = list(read_blocks([mapped], 15))
    assert [piece.data_ptr() for piece in pieces] == [mapped[first:].ctypes.data for first in (0, 15, 30)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("n_query", [1, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_value_that_is_not_finite_escapes_the_check(dtype, n_query, value, monkeypatch):
    "The check looks at scores of one query; here that query is zero where the descriptor is spoilt, or has the sign that hides it."
    monkeypatch.setattr(module, "block_images", lambda *_: 7)
    for image, sign in itertools.product((0, 13, 29), (-1, 0, 1)):
        gallery, queries = made(30, 5, 8, n_query, 0)
        gallery[image, 4, 3] = value
        queries[:, 3] = sign
        with pytest.raises(ValueError, match=f"gallery image {image} "):
            ExactIndex(gallery.astype(dtype)).search(queries)


def test_scores_may_overflow():
    gallery = np.full((3, 2, 4), 1e30, np.float32)
    assert ExactIndex(gallery).search(np.full((1, 4), 1e30, np.float32)).ranks.tolist() == [[0, 1, 2]]


class LazyBlocks(list):
    "Blocks that count how often each is opened."

    def __init__(self, blocks):
        super().__init__(blocks)
        self.shapes = [block.shape for block in blocks]
        self.opened = []

    def __getitem__(self, i):
        self.opened.append(i)
        return super().__getitem__(i)

    def __iter__(self):
        raise AssertionError("all blocks were opened at once")


def test_blocks_are_opened_when_they_are_read():
    gallery, queries = made(60, 5, 8, 4, 0)
    blocks = LazyBlocks(np.split(gallery, [3, 3, 20, 41]))
    index = ExactIndex(blocks)
    assert not blocks.opened and len(index) == 60
    assert_same(index.search(queries), brute_force(gallery, queries))
    assert blocks.opened == [0, 2, 3, 4], "each once, in order, and none that is empty"
    blocks.opened.clear()
    coarse = SearchResult(*(np.asarray(x)[None] for x in (np.float32([2, 1]), np.int64([45, 7]), np.int64([0, 0]))))
    rescore(coarse, queries[:1], blocks, n=2)
    assert blocks.opened == [2, 4], "only those of the listed images"


def test_a_failed_check_is_repeated():
    gallery, queries = made(30, 5, 8, 4, 0)
    gallery[21, 3, 2] = np.nan
    index = ExactIndex(gallery)
    for _ in range(2):
        with pytest.raises(ValueError, match="gallery image 21"):
            index.search(queries)


@settings(max_examples=30, deadline=None)
@given(**SIZES, count=st.integers(1, 80), cut=st.integers(0, 70))
def test_rescored_images_have_their_exact_order(n, n_patches, dim, n_query, seed, count, cut):
    gallery, queries = made(n, n_patches, dim, n_query, seed)
    ids = np.cumsum(np.random.default_rng(seed).integers(1, 4, n))
    coarse = ExactIndex(gallery + np.random.default_rng(seed).normal(size=gallery.shape), ids).search(queries)
    again = rescore(coarse, queries, np.split(gallery, [min(cut, n)]), ids, count)
    head = coarse.ranks[:, :count]
    for query in range(n_query):
        rows = np.sort(np.searchsorted(ids, head[query]))
        expected = brute_force(gallery[rows], queries[query:query + 1])
        np.testing.assert_array_equal(again.ranks[query, :count], ids[rows[expected.ranks[0]]])
        np.testing.assert_array_equal(again.scores[query, :count], expected.scores[0])
        np.testing.assert_array_equal(again.patch_ids[query, :count], expected.patch_ids[0])
    np.testing.assert_array_equal(again.ranks[:, count:], coarse.ranks[:, count:])
    assert (again.scores[:, 1:] <= again.scores[:, :-1]).all()
    if count < n:
        assert (again.scores[:, count] < again.scores[:, count - 1]).all(), "no tie between the rescored and the rest"


def test_images_never_looked_at_are_not_rescored():
    gallery, queries = made(6, 5, 8, 2, 1)
    scores = np.array([[0.9, 0.5, -np.inf, -np.inf], [0.3, -np.inf, -np.inf, -np.inf]], np.float32)
    result = SearchResult(scores, np.array([[2, 4, 0, 1], [5, 0, -1, -1]]), np.array([[0, 0, -1, -1], [3, -1, -1, -1]]))
    again = rescore(result, queries, gallery, n=4)
    assert np.isneginf(again.scores).tolist() == np.isneginf(scores).tolist()
    assert np.array_equal(np.sort(again.ranks[0, :2]), [2, 4]) and again.ranks[0, 2:].tolist() == [0, 1]
    assert again.ranks[1].tolist() == [5, 0, -1, -1]
    with pytest.raises(ValueError, match="descriptors hold no gallery image 5"):
        rescore(result, queries, gallery[:5])
    with pytest.raises(ValueError, match="n, the number of images to rescore, must be at least 1, got 0"):
        rescore(result, queries, gallery, n=0)
