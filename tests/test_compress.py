"""Compressed indexes: the contract of the exact index, both ways of scoring, saving, growing, shrinking, bytes and bad input."""
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context

import faiss
import numpy as np
import pytest
import torch

from patchify import compress as module
from patchify import files, indexfiles, ivf
from patchify.boxes import Regions
from patchify.compress import PQIndex, decoded_parts, memory, recall, train_quantiser, training_patches, training_vectors
from patchify.data.registry import load
from patchify.encoder import load_encoder
from patchify.evaluate import describe, rank
from patchify.flat import FlatIndex
from patchify.indexfiles import merge_indexes, open_index, save_index
from patchify.ivf import IVFPQIndex, probed_lists, scan_all, scan_top
from patchify.search import ExactIndex, SearchResult, merge, rank_images

FIELDS = ("scores", "ranks", "patch_ids")
N, P, D, Q = 150, 5, 24, 12
LEVELS = np.array([0, 1, 1, 1, 1])


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def gallery():
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(20, 1, D))[rng.integers(0, 20, N)] + 0.6 * rng.normal(size=(N, P, D)))


@pytest.fixture(scope="module")
def queries(gallery):
    rng = np.random.default_rng(1)
    return unit(gallery[rng.choice(N, Q, replace=False), rng.integers(0, P, Q)] + 0.1 * rng.normal(size=(Q, D)))


def made(kind, gallery, **settings):
    settings = dict(n_subvectors=6, n_bits=5, n_iter=10) | ({"n_lists": 16} if kind is IVFPQIndex else {}) | settings
    return kind(**settings).train(gallery, LEVELS).add(gallery)


def top(result, k):
    return SearchResult(*(getattr(result, name)[:, :k] for name in FIELDS))


def assert_same(a, b):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def brute_force(index, queries, probed=None):
    """Scores of all images from the decoded vectors, one by one; -inf where no patch lies in a probed list."""
    vectors = index.decode(0, len(index)).astype(float)
    turned = index.rotated(torch.from_numpy(queries)).numpy().astype(float)
    scores = np.einsum("qd,npd->qnp", turned, vectors) if index.metric == "ip" else -np.square(turned[:, None, None] - vectors[None]).sum(3)
    if probed is not None:
        scores[~probed[:, index.lists(0, len(index))]] = -np.inf
    return scores


SETTINGS = [(kind, metric, opq, residual) for kind in (PQIndex, IVFPQIndex) for metric in ("ip", "l2") for opq in (False, True)
            for residual in ([True, False] if kind is IVFPQIndex else [True])]


@pytest.mark.parametrize("kind, metric, opq, residual", SETTINGS)
def test_ranks_all_images_by_the_best_code(kind, metric, opq, residual, gallery, queries):
    extra = {"by_residual": residual} if kind is IVFPQIndex else {}
    index = made(kind, gallery, metric=metric, opq=opq, n_iter=4, **extra)
    expected, found = brute_force(index, queries), index.search(queries)
    rows = np.arange(Q)[:, None]
    assert [getattr(found, name).dtype for name in FIELDS] == [np.float32, np.int64, np.int64]
    assert (np.sort(found.ranks, axis=1) == np.arange(N)).all() and not found.unreached.any()
    np.testing.assert_allclose(found.scores, np.sort(expected.max(2))[:, ::-1], atol=2e-5)
    np.testing.assert_allclose(found.scores, expected[rows, found.ranks, found.patch_ids], atol=2e-5)
    assert_same(index.search(queries, 7), top(found, 7))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("opq", [False, True])
@pytest.mark.parametrize("n_probe", [1, 3, 16])
def test_scanning_and_decoding_agree(metric, opq, n_probe, gallery, queries):
    index = made(IVFPQIndex, gallery, metric=metric, opq=opq, n_probe=n_probe, n_iter=4)
    turned = index.rotated(torch.from_numpy(queries))
    index.core.nprobe = n_probe
    probed = probed_lists(index.core, turned)
    expected = brute_force(index, queries, probed.numpy()).max(2)
    for parts in ([scan_all(index, turned)], decoded_parts(index, turned, probed)):
        scores, patches = (torch.cat(tables, 1).numpy() for tables in zip(*parts))
        np.testing.assert_array_equal(np.isinf(scores), np.isinf(expected))
        np.testing.assert_allclose(scores[np.isfinite(scores)], expected[np.isfinite(expected)], atol=2e-5)
        np.testing.assert_array_equal(patches == -1, np.isinf(expected))
    found = index.search(queries)
    np.testing.assert_array_equal(found.unreached, np.isinf(expected).sum(1))
    assert (np.sort(found.ranks, axis=1) == np.arange(N)).all(), "unreached images are ranked too"
    assert all((row[len(row) - n:] == -np.inf).all() for row, n in zip(found.scores, found.unreached))


def test_ties_go_to_the_lower_image_and_patch(gallery, queries):
    twins = gallery.copy()
    twins[[30, 90]] = twins[3]
    twins[:, 4] = twins[:, 1]
    for index in (made(PQIndex, twins), made(IVFPQIndex, twins), made(IVFPQIndex, twins, n_probe=2)):
        found = index.search(queries)
        places = np.array([[np.flatnonzero(row == i)[0] for i in (3, 30, 90)] for row in found.ranks])
        assert (np.diff(places, axis=1) > 0).all() and not (found.patch_ids == 4).any()
        reached = np.isfinite(found.scores[np.arange(Q), places[:, 0]])
        assert (np.diff(places[reached], axis=1) == 1).all()


def test_many_queries_in_batches_change_nothing(gallery, queries, monkeypatch):
    index = made(IVFPQIndex, gallery, n_probe=4)
    before = index.search(queries)
    import patchify.search as search
    monkeypatch.setattr(search, "QUERIES", 5)
    assert_same(index.search(queries), before)


def test_recall_grows_with_bits_and_probes(gallery, queries):
    exact = ExactIndex(gallery).search(queries)
    assert recall(exact, exact, 10).tolist() == [1.0] * Q
    by_bits = [recall(made(PQIndex, gallery, n_bits=bits).search(queries), exact, 10).mean() for bits in (1, 3, 7)]
    assert by_bits == sorted(by_bits) and by_bits[-1] > by_bits[0]
    index, by_probe = made(IVFPQIndex, gallery, n_bits=7), []
    for index.n_probe in (1, 4, 16):
        found = index.search(queries)
        by_probe.append((recall(found, exact, 10).mean(), -found.unreached.sum()))
    recalls, reached = np.transpose(by_probe)
    assert recalls[0] < recalls[-1] and (np.diff(recalls) > -0.02).all() and (np.diff(reached) > 0).all() and reached[-1] == 0


def test_full_probe_without_residuals_is_pq(gallery, queries):
    lists, flat = (kind(n_subvectors=6, n_bits=5, **extra).train(gallery) for kind, extra in ((IVFPQIndex, dict(n_lists=8, by_residual=False)), (PQIndex, {})))
    faiss.copy_array_to_vector(faiss.vector_to_array(flat.core.pq.centroids), lists.core.pq.centroids)
    a, b = lists.add(gallery).search(queries), flat.add(gallery).search(queries)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)


@pytest.mark.parametrize("kind", [PQIndex, IVFPQIndex])
@pytest.mark.parametrize("opq", [False, True])
def test_batches_equal_one_go_and_removal_equals_never_added(kind, opq, gallery, queries):
    whole = made(kind, gallery, opq=opq, n_iter=3)
    batches = kind(**{f.name: getattr(whole, f.name) for f in fields(whole)}).train(gallery, LEVELS)
    for part in np.split(gallery, [40, 41, 120]):
        batches.add(part)
        batches.search(queries[:1])
    assert_same(batches.search(queries), whole.search(queries))
    gone = np.array([0, 7, 40, 41, N - 1])
    kept = np.setdiff1d(np.arange(N), gone)
    batches.remove(gone)
    never = kind(**{f.name: getattr(whole, f.name) for f in fields(whole)}).train(gallery, LEVELS).add(gallery[kept], kept)
    for index in (batches, never):
        index.n_probe = 5
    np.testing.assert_allclose(batches.search(queries).scores, never.search(queries).scores, atol=1e-5)
    np.testing.assert_array_equal(batches.search(queries).ranks, never.search(queries).ranks)
    batches.add(gallery[:3])
    assert batches.gallery_ids[-3:].tolist() == [N - 1, N, N + 1] and len(batches) == len(kept) + 3
    assert (np.sort(batches.search(queries).ranks, axis=1) == batches.gallery_ids).all()


def test_an_emptied_index_says_so(gallery, queries):
    with pytest.raises(ValueError, match="holds no image"):
        made(IVFPQIndex, gallery).remove(np.arange(N)).search(queries)


@pytest.mark.parametrize("kind", [PQIndex, IVFPQIndex])
@pytest.mark.parametrize("opq", [False, True])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_saved_and_opened(kind, opq, metric, gallery, queries, tmp_path):
    index = made(kind, gallery, opq=opq, metric=metric, n_iter=3, seed=5)
    if kind is IVFPQIndex:
        index.n_probe = 6
    expected = index.search(queries)
    path = save_index(index, tmp_path / "an index")
    assert os.listdir(tmp_path) == ["an index"]
    assert_same(index.search(queries), expected)
    opened = open_index(path)
    assert type(opened) is kind and [getattr(opened, f.name) for f in fields(opened)] == [getattr(index, f.name) for f in fields(index)]
    assert_same(opened.search(queries), expected)
    counted = memory(index)
    assert counted == memory(opened) and 0 <= path.stat().st_size - counted.total < 2048 + 16 * 16, "bytes counted = bytes on disk"
    first = path.read_bytes()
    assert save_index(opened, tmp_path / "again").read_bytes() == first
    opened.add(gallery[:4]).remove([0]).search(queries)
    assert path.read_bytes() == first, "changing an opened index leaves the file alone"
    save_index(opened, path)
    assert len(open_index(path)) == N + 3
    assert faiss.read_index(str(path)).ntotal == (N + 3) * P, "FAISS itself can read the file"


def test_inverted_lists_stay_on_disk(gallery, tmp_path):
    opened = open_index(save_index(made(IVFPQIndex, gallery), tmp_path / "i"))
    assert isinstance(faiss.downcast_InvertedLists(opened.core.invlists), faiss.OnDiskInvertedLists)


@pytest.mark.parametrize("kind", [PQIndex, IVFPQIndex])
def test_cut_or_foreign_files_are_refused(kind, gallery, tmp_path):
    path = save_index(made(kind, gallery), tmp_path / "i")
    whole = path.read_bytes()
    bad = [b"", b"x", whole[:-1], whole[:len(whole) // 2], whole[: -len(indexfiles.MAGIC)], whole[1:], whole + b"x", whole[:100] + whole[200:], os.urandom(4000),
           b"\x89PNG\r\n\x1a\n" + bytes(500)]
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not an index of this version of patchify, or was cut short"):
            open_index(path)
    faiss.write_index(made(kind, gallery).index, str(path))
    with pytest.raises(ValueError, match="not an index"):
        open_index(path)
    with pytest.raises(ValueError, match="no such index: .*nowhere"):
        open_index(tmp_path / "nowhere")


def test_damage_inside_is_refused(gallery, tmp_path):
    path = save_index(made(PQIndex, gallery), tmp_path / "i")
    whole = bytearray(path.read_bytes())
    whole[:4] = b"root"
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="damaged"):
        open_index(path)


def test_a_failed_save_leaves_the_old_file(gallery, tmp_path, monkeypatch):
    path = save_index(made(PQIndex, gallery), tmp_path / "i")
    before = path.read_bytes()

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError):
        save_index(made(PQIndex, gallery, seed=3), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["i"]


def test_training_sets():
    levels = np.repeat([0, 1, 2, 3], [1, 4, 9, 16])
    assert [len(training_patches(levels, 30, k)) for k in (0, 1, 2, 3)] == [1, 5, 14, 30]
    assert training_patches(None, 30, "same").tolist() == training_patches(levels, 30, -1).tolist() == list(range(30))
    together = training_patches(levels, 30, "all")
    assert together.tolist() == training_patches(levels, 30, -2).tolist() and np.bincount(together).tolist() == np.repeat([4, 3, 2, 1], [1, 4, 9, 16]).tolist()


@pytest.mark.parametrize("limit", [1, 33, 10**6])
def test_training_vectors_come_from_the_right_rows(limit):
    gallery = np.arange(20 * 5).reshape(20, 5, 1).astype(np.float16)
    patches = np.array([0, 2, 2, 4])
    drawn = training_vectors([gallery[:3], gallery[3:3], gallery[3:19], gallery[19:]], patches, limit, seed=1)
    assert drawn.shape == (min(limit, 80), 1) and drawn.dtype == np.float32 and set(drawn[:, 0] % 5) <= {0, 2, 4}
    if limit > 80:
        np.testing.assert_array_equal(drawn[:, 0], gallery[:, patches, 0].ravel())
    else:
        np.testing.assert_array_equal(drawn, training_vectors([gallery], patches, limit, seed=1))


def test_same_seed_same_index_other_seed_another(gallery, tmp_path):
    a, b, c = (save_index(made(IVFPQIndex, gallery, seed=seed), tmp_path / name).read_bytes() for seed, name in ((0, "a"), (0, "b"), (1, "c")))
    assert a == b and len(a) == len(c) and a != c


def test_training_level_decides_which_patches_fit(gallery):
    errors = {level: np.square(gallery - made(PQIndex, gallery, train_level=level).decode(0, N)).sum(2).mean(0) for level in (0, "same")}
    assert errors[0][0] < errors["same"][0] and errors["same"][1:].mean() < errors[0][1:].mean()


def test_opq_helps_where_variance_is_uneven():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(3000, 16)) * np.repeat([3, 0.1], 8)).astype(np.float32).reshape(600, 5, 16)
    errors = []
    for opq in (False, True):
        index = PQIndex(4, 4, metric="l2", opq=opq).train(vectors).add(vectors)
        turned = index.rotated(torch.from_numpy(vectors.reshape(-1, 16))).numpy().reshape(vectors.shape)
        errors.append(np.square(turned - index.decode(0, 600)).sum(2).mean())
    assert errors[1] < 0.8 * errors[0]


def test_bytes_are_counted_by_hand(gallery):
    counted = memory(made(IVFPQIndex, gallery, n_bits=4))
    assert (counted.codes, counted.ids, counted.centroids, counted.codebooks) == (N * P * 3, 8 * N + 8 * N * P, 16 * D * 4, 16 * D * 4)
    assert counted.exact == N * P * D * 4 and counted.ratio == counted.exact / counted.total and counted.per_image == counted.total / N
    flat = memory(made(PQIndex, gallery, opq=True, n_bits=4, n_iter=2))
    assert (flat.codes, flat.ids, flat.centroids, flat.codebooks) == (N * P * 3, 8 * N, 0, 16 * D * 4 + 4 * D * D)


def test_float16_memory_maps_train_and_add(gallery, queries, tmp_path):
    np.save(tmp_path / "g.npy", gallery.astype(np.float16))
    mapped = np.load(tmp_path / "g.npy", mmap_mode="r")
    assert_same(made(IVFPQIndex, mapped).search(queries), made(IVFPQIndex, gallery.astype(np.float16).astype(np.float32)).search(queries))


@pytest.mark.parametrize("call, said", [
    (lambda g, q: PQIndex(metric="cosine"), "metric must be one of"),
    (lambda g, q: PQIndex(n_bits=0), "n_bits in 1..16"),
    (lambda g, q: PQIndex(n_bits=17), "n_bits in 1..16"),
    (lambda g, q: PQIndex(n_subvectors=0), "n_subvectors must be positive"),
    (lambda g, q: PQIndex(n_subvectors=7, n_bits=4).train(g), "n_subvectors must divide the dimension 24"),
    (lambda g, q: PQIndex(6, 10).train(g), "so 1024; train_level=.same. gives 750"),
    (lambda g, q: PQIndex(6, 8, train_level=0).train(g, LEVELS), "so 256; train_level=0 gives 150"),
    (lambda g, q: PQIndex(6, 2, opq=True).train(g[:4]), "with OPQ one per dimension, so 24; train_level=.same. gives 20"),
    (lambda g, q: PQIndex(6, 4, train_level=2).train(g, LEVELS), "level up to 1, got 2"),
    (lambda g, q: PQIndex(6, 4, train_level=1.5).train(g, LEVELS), "level up to 1, got 1.5"),
    (lambda g, q: PQIndex(6, 4, train_level="coarse").train(g, LEVELS), "level up to 1"),
    (lambda g, q: PQIndex(6, 4, train_level=1).train(g), "needs levels"),
    (lambda g, q: PQIndex(6, 4).train(g * np.nan), "NaN or infinity"),
    (lambda g, q: PQIndex(6, 4).train(g).add(g * np.nan), "gallery image 0 hold NaN"),
    (lambda g, q: PQIndex(6, 4).add(g), "call train first"),
    (lambda g, q: PQIndex(6, 4).search(q), "holds no image"),
    (lambda g, q: save_index(PQIndex(6, 4), "nothing"), "has not been trained"),
    (lambda g, q: PQIndex(6, 4).train(g).search(q), "holds no image"),
    (lambda g, q: PQIndex(6, 4).train(g).add(g[:, :3]), r"\(patches, dim\) = \(5, 24\)"),
    (lambda g, q: PQIndex(6, 4).train(g).add(g).add(g, np.arange(N)), "must continue after 149"),
    (lambda g, q: PQIndex(6, 4).train(g).add(g).remove([500]), r"not in the index: \[500\]"),
    (lambda g, q: PQIndex(6, 4).train(g).add(g).search(q[:, :5]), r"queries must be \(Q, 24\)"),
    (lambda g, q: PQIndex(6, 4).train(g).add(g).search(q, 0), "k must be at least 1"),
    (lambda g, q: IVFPQIndex(6, 4, n_lists=0), "n_lists must be at least 1"),
    (lambda g, q: IVFPQIndex(6, 4, n_lists=4, n_probe=0), "n_probe must lie in 1..4"),
    (lambda g, q: IVFPQIndex(6, 4, n_lists=4, n_probe=5), "n_probe must lie in 1..4"),
    (lambda g, q: IVFPQIndex(6, 4, n_lists=1000).train(g), "so 1000"),
])
def test_bad_input_gets_a_sentence(call, said, gallery, queries):
    with pytest.raises(ValueError, match=said):
        call(gallery, queries)


@pytest.mark.parametrize("kind", [PQIndex, IVFPQIndex])
@pytest.mark.parametrize("opq", [False, True])
def test_a_failed_add_leaves_the_index_as_it_was(kind, opq, gallery, queries, monkeypatch):
    monkeypatch.setattr(module, "FLOATS", 7 * P * D)
    index = made(kind, gallery, opq=opq, n_iter=2)
    before = index.search(queries)
    spoilt = gallery.copy()
    spoilt[-1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        index.add(spoilt)
    assert len(index) == N and index.core.ntotal == index.index.ntotal == N * P
    assert_same(index.search(queries), before)


def test_threads_wait_passively_and_no_polysemous_training():
    code = "import os, patchify.compress as c; print(os.environ['OMP_WAIT_POLICY'], c.PQIndex(4).new_core(16)[0].do_polysemous_training)"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.split() == ["PASSIVE", "False"]


@pytest.mark.parametrize("kind", [PQIndex, IVFPQIndex])
def test_a_gpu_takes_over_the_coarse_kmeans_alone(kind, gallery, tmp_path, monkeypatch):
    without, given = save_index(made(kind, gallery), tmp_path / "cpu").read_bytes(), []
    monkeypatch.setattr(module.faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(module.faiss, "index_cpu_to_all_gpus", lambda flat: given.append(flat) or flat)
    assert save_index(made(kind, gallery), tmp_path / "gpu").read_bytes() == without
    assert [index.ntotal for index in given] == ([16] if kind is IVFPQIndex else []), "the centroids were learnt through the index handed over"


def test_training_is_silent_and_quiet_about_few_points(gallery, capfd):
    made(IVFPQIndex, gallery, opq=True, n_iter=2)
    train_quantiser(faiss.IndexPQ(D, 6, 8), gallery.reshape(-1, D), 2, 256, seed=0)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_merged_ranking_of_exact_and_compressed_have_one_shape(gallery, queries):
    a, b = ExactIndex(gallery).search(queries, 20), made(PQIndex, gallery).search(queries, 20)
    assert all(getattr(a, name).shape == getattr(b, name).shape for name in FIELDS)
    assert isinstance(rank_images([(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int32))]), SearchResult)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("opq", [False, True])
@pytest.mark.parametrize("n_probe", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 3, 18, 60, N + 9])
def test_few_images_are_the_first_of_all_images(metric, opq, n_probe, k, gallery, queries, monkeypatch):
    "With few images and few visited lists the scan is bounded; with all images it fills a table."
    twins = gallery.copy()
    twins[[30, 90]] = twins[3]
    twins[:, 4] = twins[:, 1]
    index = made(IVFPQIndex, twins, metric=metric, opq=opq, n_probe=n_probe, n_iter=4)
    whole, calls = index.search(queries), []
    monkeypatch.setattr(ivf, "scan_top", lambda *a: calls.append(a) or scan_top(*a))
    assert_same(index.search(queries, k), top(whole, k))
    assert len(calls) == (8 * k < N)


def test_lists_of_patches_are_bounded_whatever_k(gallery, queries, monkeypatch):
    from patchify import flat

    index = made(IVFPQIndex, gallery, n_probe=3)
    whole, sizes = index.search(queries), []
    group = flat.group_patches
    monkeypatch.setattr(flat, "PATCHES_AT_ONCE", 200)
    monkeypatch.setattr(flat, "group_patches", lambda values, *a: sizes.append(values.size) or group(values, *a))
    index.core.nprobe = 3
    assert_same(scan_top(index, torch.from_numpy(queries), 40), top(whole, 40))
    assert max(sizes) <= max(200, N * P), "at most the limit, or a single query"


def test_tables_of_all_images_are_made_for_a_few_queries_at_a_time(gallery, queries, monkeypatch):
    index = made(IVFPQIndex, gallery, n_probe=4)
    before, widths = index.search(queries), []
    monkeypatch.setattr(ivf, "CODES_AT_ONCE", 2.5 * N * P / 4)
    monkeypatch.setattr(ivf, "scan_all", lambda index, part: widths.append(len(part)) or scan_all(index, part))
    assert_same(index.search(queries), before)
    assert widths == [2] * (Q // 2)


def test_a_sample_of_billions_of_rows_takes_no_memory_for_the_others():
    "Three billion patches: a list of their rows alone would need 24 GB."
    one = np.arange(30, dtype=np.float32).reshape(1, 30, 1)
    huge = np.lib.stride_tricks.as_strided(one, (10**8, 30, 1), (0, 4, 4))
    drawn = training_vectors([huge, huge[:10]], np.arange(30), 30_000)
    assert drawn.shape == (30_000, 1)
    counts = np.bincount(drawn[:, 0].astype(int), minlength=30)
    assert (np.abs(counts - 1000) < 200).all(), "all patches alike"


def test_the_sample_is_even_and_depends_on_the_seed():
    gallery = np.arange(1000, dtype=np.float32).reshape(200, 5, 1)
    a, b = (training_vectors([gallery], np.arange(5), 100, seed)[:, 0] for seed in (0, 1))
    assert (a // 10 == np.arange(100)).all() and (b // 10 == np.arange(100)).all() and (a != b).any()


@pytest.mark.parametrize("lists, points", [(16_384, 256), (16_385, 50)])
def test_many_lists_get_fewer_training_vectors_each(lists, points, gallery, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "training_vectors", lambda blocks, patches, limit, seed: asked.append(limit) or np.zeros((lists, D), np.float32))
    monkeypatch.setattr(module, "train_quantiser", lambda *a: asked.append(a) or a[0])
    IVFPQIndex(6, 4, n_lists=lists).train(gallery)
    assert asked[0] == points * lists and asked[1][3:] == (256, 0, points)
    asked.clear()
    IVFPQIndex(6, 4, n_lists=lists, points_per_centroid=7).train(gallery)
    assert asked[0] == 7 * lists and asked[1][3:] == (7, 0, 7)


def fill(trained, path, images, ids):
    "What one process does: open the trained index, add its images, save its part."
    return save_index(open_index(trained).add(images, ids), path)


@pytest.mark.parametrize("kind", [PQIndex, IVFPQIndex])
@pytest.mark.parametrize("opq", [False, True])
def test_merged_parts_equal_one_process_byte_for_byte(kind, opq, gallery, queries, tmp_path):
    extra = {"n_lists": 16, "n_probe": 3} if kind is IVFPQIndex else {}
    trained = save_index(kind(6, 5, n_iter=3, opq=opq, **extra).train(gallery[::2]), tmp_path / "trained")
    ids = np.arange(N) * 2 + 5
    single = fill(trained, tmp_path / "single", gallery, ids).read_bytes()
    cuts = [0, 40, 41, 120, N]
    parts = [fill(trained, tmp_path / f"{a}", gallery[a:b], ids[a:b]) for a, b in zip(cuts, cuts[1:])]
    before = [part.read_bytes() for part in parts]
    for order in (parts, [*parts[::-1], trained]):
        assert merge_indexes(order, tmp_path / "merged").read_bytes() == single
    assert [part.read_bytes() for part in parts] == before, "the parts stay as they are"
    assert merge_indexes([trained, trained], tmp_path / "none").read_bytes() == trained.read_bytes()
    found = merge([open_index(part).search(queries, 9) for part in parts], 9)
    if kind is IVFPQIndex:
        assert_same(found, open_index(tmp_path / "merged").search(queries, 9))


@pytest.mark.parametrize("kind", [PQIndex, IVFPQIndex])
def test_few_images_in_many_lists_merge_like_one_process(kind, gallery, tmp_path):
    extra = {"n_lists": 64} if kind is IVFPQIndex else {}
    trained = save_index(kind(6, 5, n_iter=3, **extra).train(gallery), tmp_path / "trained")
    parts = [fill(trained, tmp_path / str(i), gallery[i:i + 1, :], [i]) for i in range(3)]
    merged = merge_indexes(parts, tmp_path / "merged").read_bytes()
    assert merged == fill(trained, tmp_path / "single", gallery[:3], None).read_bytes()


def test_another_process_fills_a_part(gallery, tmp_path):
    trained = save_index(IVFPQIndex(6, 5, n_lists=16, n_iter=3).train(gallery), tmp_path / "trained")
    single = fill(trained, tmp_path / "single", gallery, None).read_bytes()
    here, there = np.split(np.arange(N), 2)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        job = pool.submit(fill, trained, tmp_path / "there", gallery[there], there)
        parts = [fill(trained, tmp_path / "here", gallery[here], here), job.result()]
    assert merge_indexes(parts, tmp_path / "merged").read_bytes() == single


@pytest.mark.parametrize("kind", [PQIndex, IVFPQIndex])
def test_parts_that_do_not_fit_are_refused(kind, gallery, tmp_path):
    a, other = (save_index(made(kind, gallery, seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    retrained = save_index(made(kind, gallery[1:]), tmp_path / "again")
    for b in (other, retrained):
        with pytest.raises(ValueError, match=f"{b} and {a} were trained separately"):
            merge_indexes([a, b], tmp_path / "merged")
    with pytest.raises(ValueError, match="overlap: each part needs its own range"):
        merge_indexes([a, a], tmp_path / "merged")
    with pytest.raises(ValueError, match="parts to merge are missing"):
        merge_indexes([], tmp_path / "merged")


def test_rank_rescores_the_first_images(data):
    described = describe(load("tiny", data), load_encoder("mini", device="cpu"), Regions("pyramid", 3), data / "stores")
    codes = PQIndex(n_subvectors=8, n_bits=3, n_iter=3).train(described.gallery.descriptors())

    def build(blocks, rows):
        return open_index(save_index(codes, data / "rescored.index")).add(blocks, rows)

    exact, coarse = rank(described).result, rank(described, index=build).result
    every = rank(described, index=build, rescore_top=len(described.gallery)).result
    np.testing.assert_allclose(every.scores, exact.scores, atol=1e-5)
    some = rank(described, index=build, rescore_top=3).result
    np.testing.assert_array_equal(np.sort(some.ranks[:, :3]), np.sort(coarse.ranks[:, :3]))
    np.testing.assert_array_equal(some.ranks[:, 3:], coarse.ranks[:, 3:])
    assert recall(some, exact, 1).mean() > recall(coarse, exact, 1).mean()


@pytest.mark.parametrize("make", [
    lambda g: ExactIndex(g, device="cpu"), FlatIndex, lambda g: made(PQIndex, g), lambda g: made(IVFPQIndex, g, n_probe=3)],
    ids=("exact", "flat", "pq", "ivfpq"))
@pytest.mark.parametrize("table", [0, 2**26])
def test_every_index_can_score_all_images_block_by_block(make, table, gallery, queries, monkeypatch):
    "Positions beyond a bounded list are counted from these blocks."
    monkeypatch.setattr(ivf, "_TABLE", table)
    index = make(gallery)
    blocks, whole = rank_images(index.parts(torch.from_numpy(queries))), index.search(queries)
    np.testing.assert_allclose(blocks.scores, whole.scores, atol=1e-5)
    np.testing.assert_array_equal(np.sort(blocks.ranks), np.sort(whole.ranks))
    np.testing.assert_array_equal(blocks.ranks[:, 0], whole.ranks[:, 0])
