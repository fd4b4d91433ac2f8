"A store opened with other tools: the same query finds the same image and the same patch."
import importlib.util

import numpy as np
import pandas as pd
import pytest

from patchify.boxes import Regions
from patchify.data.folders import load_ilias
from patchify.encoder import load_encoder
from patchify.evaluate import describe, rank

SIDES = ["x0", "y0", "x1", "y1"]


@pytest.fixture(scope="module")
def opened(data, tmp_path_factory):
    "Tables and vectors of a store as other tools read them, a query, and our answer: image, box, score."
    benchmark = load_ilias(data / "tiny")
    described = describe(benchmark, load_encoder("mini", device="cpu"), Regions(level=1), tmp_path_factory.mktemp("stores"))
    run = rank(described)
    best = run.result.ranks[0, 0]
    answer = benchmark.gallery.id[best], run.patch_boxes(best)[run.result.patch_ids[0, 0]], run.result.scores[0, 0]
    folder = described.gallery.path
    tables = sorted(folder.glob("patches-*.parquet"))
    patches = pd.concat([pd.read_parquet(file) for file in tables], ignore_index=True)
    vectors = np.concatenate([np.load(file) for file in sorted(folder.glob("descriptors-*.npy"))]).astype(np.float32)
    return tables, patches, vectors, described.queries[0], answer


def same(answer, image, box, score) -> bool:
    return image == answer[0] and np.allclose(box, answer[1]) and abs(score - answer[2]) < 1e-3


def test_pandas(opened):
    _, patches, vectors, query, answer = opened
    best = patches.assign(score=vectors @ query).nlargest(1, "score").iloc[0]
    assert same(answer, best.image, best[SIDES].tolist(), best.score)


def test_faiss(opened):
    import faiss

    _, patches, vectors, query, answer = opened
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    scores, rows = index.search(query[None], 1)
    best = patches.iloc[rows[0, 0]]
    assert same(answer, best.image, best[SIDES].tolist(), scores[0, 0])


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="needs the extra [interop]: datasets")
def test_hugging_face_datasets(opened, tmp_path):
    import datasets
    import faiss

    tables, _, vectors, query, answer = opened
    table = datasets.Dataset.from_parquet(list(map(str, tables)), cache_dir=str(tmp_path))
    table.add_faiss_index_from_external_arrays(vectors, "vector", metric_type=faiss.METRIC_INNER_PRODUCT)
    scores, found = table.get_nearest_examples("vector", query, k=1)
    assert same(answer, found["image"][0], [found[side][0] for side in SIDES], scores[0])


@pytest.mark.skipif(not importlib.util.find_spec("qdrant_client"), reason="needs the extra [interop]: qdrant-client")
def test_a_collection_of_multi_vectors(opened):
    from qdrant_client import QdrantClient, models

    _, patches, vectors, query, answer = opened
    client = QdrantClient(":memory:")
    several = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    params = models.VectorParams(size=vectors.shape[1], distance=models.Distance.DOT, multivector_config=several)
    client.create_collection("images", vectors_config=params)
    groups = patches.groupby("image", observed=True, sort=False).indices
    client.upload_points("images", [
        models.PointStruct(id=number, vector=vectors[rows].tolist(), payload={"image": image})
        for number, (image, rows) in enumerate(groups.items())])
    found = client.query_points("images", query=[query.tolist()], limit=1, with_vectors=True).points[0]
    rows = groups[found.payload["image"]]
    patch = int((np.array(found.vector) @ query).argmax())
    assert same(answer, found.payload["image"], patches.iloc[rows[patch]][SIDES].tolist(), found.score)
