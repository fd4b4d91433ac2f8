"""Set similarities against loops over single descriptors, with padding on both sides."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchify.rerank.setsim import SetScorer, chamfer, mutual_nearest
from patchify.rerank.shortlist import Descriptors, rerank
from patchify.search import SearchResult


def one_pair(query, gallery, mutual):
    "Unit descriptors of two images, without padding."
    total = 0.0
    for i, descriptor in enumerate(query):
        similar = [float(descriptor @ other) for other in gallery]
        match = int(np.argmax(similar))
        back = int(np.argmax([float(other @ gallery[match]) for other in query]))
        total += similar[match] if back == i or not mutual else 0.0
    return total / len(query)


@pytest.mark.parametrize("mutual, similarity", [(False, chamfer), (True, mutual_nearest)])
@pytest.mark.parametrize("n_query, n_gallery", [(1, 1), (1, 7), (6, 1), (5, 9)])
def test_equals_loops_over_real_descriptors(similarity, mutual, n_query, n_gallery):
    draw = np.random.default_rng(n_query + n_gallery)
    query_valid = np.arange(n_query) < draw.integers(1, n_query + 1, (2, 1))
    gallery_valid = np.arange(n_gallery) < draw.integers(1, n_gallery + 1, (4, 1))
    queries = Descriptors(draw.normal(size=(2, n_query, 6)).astype(np.float32), query_valid)
    gallery = Descriptors(draw.normal(size=(4, n_gallery, 6)).astype(np.float32), gallery_valid)
    unit = [F.normalize(torch.as_tensor(side.values), dim=-1) for side in (queries, gallery)]
    for query in range(2):
        wanted = [one_pair(unit[0][query][query_valid[query]], unit[1][i][gallery_valid[i]], mutual) for i in (3, 0, 2)]
        for batch in (1, 2, 9):
            found = SetScorer(queries, gallery, similarity, batch)(query, np.array([3, 0, 2]))
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_one_query_descriptor_repeats_the_search_over_patches():
    draw = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    queries, patches = unit(draw.normal(size=(3, 1, 8))), unit(draw.normal(size=(20, 30, 8)))
    scores = np.einsum("qic,ntc->qnt", queries, patches).max(2)
    order = np.argsort(-scores, axis=1, kind="stable")
    searched = SearchResult(np.take_along_axis(scores, order, 1), order, np.zeros_like(order))
    again = rerank(searched, SetScorer(Descriptors(queries), Descriptors(patches)), top_k=20, global_weight=0.0, gain=10)
    assert np.array_equal(again.ranks, order)


def test_an_empty_shortlist_gives_no_scores():
    side = Descriptors(np.ones((2, 3, 4), np.float32))
    assert SetScorer(side, side)(0, np.array([], int)).shape == (0,)
