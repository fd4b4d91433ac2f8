"The shipped re-rankers: made in a few steps, kept with their encoder, used behind a search and from the command line."
import builtins
import json
import os
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from patchify.data.registry import load
from patchify.retrieval_set import RetrievalSet
from patchify.cli import main
from patchify.compress import PQIndex
from patchify.encoder import MINI_WEIGHTS, load_encoder
from patchify.evaluate import describe, rank
from patchify.rerank.shortlist import rerank
from patchify.rerank.windows import rerank_windows
from patchify.zoo import reranker_training
from patchify.zoo.reranker_training import make_reranker, make_reranking_task, train_ames, train_locore, train_rerankers
from patchify.zoo.rerankers import (
    DESCRIPTORS_PER_IMAGE, GALLERY_REGIONS, QUERY_REGIONS, Reranker, descriptors_of, local_descriptors, reranker_file,
    reranker_scorer)

HERE = [kind for kind in DESCRIPTORS_PER_IMAGE if not kind.startswith("locore") or find_spec("transformers")]
PATCHES = [kind for kind in HERE if kind.endswith("patches")]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("mini", device="cpu")


@pytest.fixture(scope="module")
def run(encoder, data):
    return rank(describe(load("tiny", data), encoder, GALLERY_REGIONS, data / "stores"))


@pytest.fixture(scope="module")
def task(encoder, data):
    return make_reranking_task("ames", encoder, 6, data)


@pytest.mark.parametrize("kind", HERE)
def test_only_the_shortlist_moves_and_every_winning_patch_stays_with_its_image(kind, encoder, run, data):
    reranker = replace(Reranker.load(kind, encoder, data), top_k=12)
    moved = reranker(run, encoder, data).result
    assert (moved.ranks[:, 12:] == run.result.ranks[:, 12:]).all() and (np.sort(moved.ranks[:, :12]) == np.sort(run.result.ranks[:, :12])).all()
    assert (moved.ranks != run.result.ranks).any()
    for before, after, patch, kept in zip(run.result.ranks, moved.ranks, run.result.patch_ids, moved.patch_ids):
        assert dict(zip(before, patch)) == dict(zip(after, kept))


@pytest.mark.parametrize("kind", HERE)
def test_shipped_weights_are_small_and_name_their_encoder(kind, encoder, data):
    path = reranker_file(kind, encoder)
    assert os.path.getsize(str(path)) < 5e6
    reranker = Reranker.load(kind, encoder, data)
    assert 0 <= reranker.global_weight < 1 and reranker.top_k > 1 and not reranker.model.training


@pytest.mark.parametrize("kind", PATCHES)
def test_patches_are_read_where_the_search_keeps_them(kind, encoder, run, data):
    reranker = replace(Reranker.load(kind, encoder, data), top_k=5)
    queries, gallery = descriptors_of(kind, run, encoder, data)
    store = [file.read_bytes() for file in sorted(run.described.gallery.path.iterdir())]
    assert queries.count == QUERY_REGIONS.count and gallery.count == 30 and all(isinstance(block, np.memmap) for block in gallery.values)
    assert reranker(run, encoder, data).bytes_per_image == run.bytes_per_image == reranker.stored_bytes(gallery)
    assert [file.read_bytes() for file in sorted(run.described.gallery.path.iterdir())] == store


def test_behind_a_compressed_index_the_patches_are_counted(encoder, run, data):
    squeezed = rank(run.described, index=lambda blocks, rows: PQIndex(n_subvectors=16, n_bits=4).train(blocks).add(blocks, rows))
    found = replace(Reranker.load("ames_patches", encoder, data), top_k=5)(squeezed, encoder, data)
    assert found.bytes_per_image == squeezed.bytes_per_image + run.bytes_per_image


@pytest.mark.parametrize("level, patches", [(0, 1), (1, 5), (2, 14)])
def test_ames_reads_the_patches_that_a_shallower_search_has(level, patches, encoder, run, data):
    shallow = rank(run.described, level)
    assert descriptors_of("ames_patches", shallow, encoder, data)[1].count == patches
    found = replace(Reranker.load("ames_patches", encoder, data), top_k=5)(shallow, encoder, data)
    assert found.bytes_per_image == shallow.bytes_per_image and np.isfinite(found.logits).all()


@pytest.mark.parametrize("other", [dict(level=2), dict(only=3)])
def test_locore_refuses_patches_that_are_not_the_thirty_it_knows(other, encoder, run, data):
    with pytest.raises(ValueError, match="cannot read the .* pyramid patches of this search: LOCORE needs a pyramid of level 3"):
        descriptors_of("locore_patches", rank(run.described, **other), encoder, data)


def test_the_logits_are_those_of_the_shortlist(encoder, run, data):
    found = replace(Reranker.load("ames_patches", encoder, data), top_k=6)(run, encoder, data)
    read = reranker_scorer(Reranker.load("ames_patches", encoder, data).model, *descriptors_of("ames_patches", run, encoder, data))
    assert np.array_equal(found.logits[2], read(2, np.searchsorted(run.described.gallery.rows, run.result.ranks[2, :6])))


def test_a_depth_without_a_re_ranker_is_an_error(command):
    done = command("evaluate", "--rerank-top-k", 5)
    assert done.returncode == 2 and "--rerank-top-k needs --rerank" in done.stderr


def test_a_list_longer_than_the_model_reads_is_re_ranked_in_windows(encoder, run, data):
    depth = len(run.result.ranks[0])
    r = replace(Reranker.load("locore", encoder, data, top_k=depth), window=depth // 2)
    read, rows = reranker_scorer(r.model, *descriptors_of(r.kind, run, encoder, data)), run.described.gallery.rows
    sizes = dict(top_k=depth, window=depth // 2, stride=depth // 4)
    wanted = rerank_windows(run.result, lambda query, ids: read(query, np.searchsorted(rows, ids)), **sizes, global_weight=r.global_weight, gain=r.gain)
    found = r(run, encoder, data)
    assert np.array_equal(found.result.ranks, wanted.ranks) and found.logits.shape == (len(run.result.ranks), 0)
    assert (found.result.ranks != run.result.ranks).any()


def test_junk_takes_no_place_in_the_shortlist(encoder, run, data, monkeypatch):
    junk = [ranks[:3] for ranks in run.result.ranks]
    monkeypatch.setattr(RetrievalSet, "junk", property(lambda self: junk))
    r = replace(Reranker.load("ames_patches", encoder, data), top_k=6)
    read, rows = reranker_scorer(r.model, *descriptors_of(r.kind, run, encoder, data)), run.described.gallery.rows
    wanted = rerank(run.result, lambda query, ids: read(query, np.searchsorted(rows, ids)), r.top_k, r.global_weight, r.gain, junk)
    found = r(run, encoder, data).result
    assert np.array_equal(found.ranks, wanted.ranks) and np.array_equal(found.ranks[:, -3:], np.array(junk))


def test_a_shortlist_longer_than_the_gallery_is_cut_to_it(encoder, run, data):
    reranker = replace(Reranker.load("ames", encoder, data), top_k=10**6)
    assert (np.sort(reranker(run, encoder, data).result.ranks) == np.sort(run.result.ranks)).all()


def test_training_and_benchmark_share_no_object(task, data):
    pictures = []
    for root in (task.run.described.benchmark.root, data / "tiny"):
        pictures.append({path.read_bytes() for path in (root / "ilias_core").rglob("Q*.jpg")})
    assert pictures[0] and not pictures[0] & pictures[1]
    rows = task.negatives()
    products = task.instance[rows[rows >= 0]]
    assert not ((products >= task.trained) & (products < len(task.queries))).any()


def test_training_continues_where_it_stopped(task, tmp_path, monkeypatch):
    checkpoint = tmp_path / "ames.safetensors"
    model, whole = train_ames(task, 2)
    with monkeypatch.context() as patch:
        patch.setattr(reranker_training, "train", partial(reranker_training.train, stop=1))
        _, first = train_ames(task, 2, checkpoint=checkpoint)
    again, resumed = train_ames(task, 2, checkpoint=checkpoint)
    assert len(first) == 1 and whole == resumed and np.isfinite(whole).all()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_construction_matches_before_any_training(task):
    "Zero steps: scenes of the product score higher than other scenes, and the settings are tuned for that model."
    reranker, tuned, losses = make_reranker("ames", task, steps=0)
    score = reranker_scorer(reranker.model, task.queries, task.gallery)
    rows = np.arange(len(task.gallery))
    logits = np.stack([score(query, rows) for query in range(len(task.queries))])
    right = task.instance[len(task.queries):] == np.arange(len(task.queries))[:, None]
    assert losses == [] and logits[right].mean() > logits[~right].mean() + .5
    first_stage = task.run.measure().ap[task.trained:].mean()
    assert tuned.value >= first_stage - 1e-9  # a weight of 1 is on the grid
    with pytest.raises(ValueError, match="as teacher"):
        make_reranker("ames_binary", task, steps=0)


@pytest.mark.skipif("locore" not in HERE, reason="needs transformers")
@pytest.mark.parametrize("kind", ["locore", "locore_patches"])
def test_a_step_of_locore_reaches_every_matrix(kind, encoder, data):
    task = make_reranking_task(kind, encoder, 6, data)
    before, _ = train_locore(task, 0)
    after, losses = train_locore(task, 1)
    assert np.isfinite(losses).all() and before.local_to_lm.weight.shape[0] == 128
    trained = dict(after.named_parameters())
    same = [name for name, value in before.named_parameters() if value.ndim > 1 and torch.equal(value, trained[name])]
    assert not [name for name in same if "embeddings" not in name]
    n_scales = 4 if kind.endswith("patches") else 1
    assert task.gallery.count == DESCRIPTORS_PER_IMAGE[kind] and after.scale_encoder.num_embeddings == n_scales
    assert reranker_scorer(after, task.queries, task.gallery)(0, np.arange(8)).shape == (8,)


def test_another_encoder_is_refused_until_its_own_are_trained(tmp_path):
    other = load_encoder("resnet10t", random_weights=True, device="cpu")
    with pytest.raises(ValueError, match="no re-ranker is trained for resnet10t .*run `patchify train rerankers`"):
        Reranker.load("ames", other, tmp_path)
    with pytest.raises(ValueError, match="did you mean"):
        Reranker.load("amess", other, tmp_path)


@pytest.mark.skipif("locore" not in HERE, reason="needs transformers")
def test_an_encoder_without_re_rankers_gets_all_of_them(task, data):
    other = load_encoder("mini", MINI_WEIGHTS, device="cpu")  # a file of its own, so not the shipped encoder
    paths = train_rerankers(other, 6, 1, data)
    assert [path.stem for path in paths] == list(DESCRIPTORS_PER_IMAGE)
    assert all(path.is_relative_to(data) for path in paths)
    assert all(Reranker.load(kind, other, data).kind == kind for kind in DESCRIPTORS_PER_IMAGE)


def test_local_descriptors_are_read_from_disk_the_second_time(encoder, run, data, monkeypatch):
    first = local_descriptors(run.described, encoder, data)
    monkeypatch.setattr("patchify.zoo.rerankers.local_sets", None)
    assert all(np.array_equal(a.values, b.values) for a, b in zip(first, local_descriptors(run.described, encoder, data)))


@pytest.mark.parametrize("kind", HERE)
def test_evaluate_with_a_re_ranker(kind, data, tmp_path, capsys):
    assert main(["evaluate", "--dataset", "tiny", "--level", "3", "--data", str(data), "--rerank", kind, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["provenance"]["rerank"] == kind and 0 <= found["map"] <= 100 and f"{found['map']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [(["--rerank", "ames2"], "unknown --rerank"),
                                         (["--rerank", "locore_patches"], "cannot read the 1 pyramid patches of this search"),
                                         (["--rerank", "ames_patches", "--regions", "pool"], "cannot read the 1 pool patches of this search"),
                                         (["--rerank", "ames", "--backbone", "resnet10t", "--random-weights"], "no re-ranker is trained")])
def test_a_re_ranker_that_is_not_there_is_refused_in_one_sentence(words, said, data, capsys):
    assert main(["evaluate", "--dataset", "tiny", "--level", "0", "--data", str(data), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_locore_without_its_library_is_refused_in_one_sentence(data, capsys, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("transformers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["evaluate", "--dataset", "tiny", "--level", "0", "--data", str(data), "--rerank", "locore"]) == 2
    told = capsys.readouterr().err
    assert "patchify[locore]" in told and "Traceback" not in told
