"""Data files in the official formats: every list, ground truth, class split and ILIAS file gives what its official reader gave."""
import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import restricted_pickle

from patchify.data.classes import LabelledSet, class_numbers, load_cars, load_cub, load_gldv2_train, load_sop
from patchify.data.folders import read_ids, read_taxonomy, read_text_queries
from patchify.data.ilias_files import load_ilias_features, save_similarities
from patchify.data.landmarks import DISTRACTOR_LISTS, load_revisited, read_distractors, read_gldv2_truth, read_revisited
from patchify.data.lists import read_image_list
from patchify.files import read_pickle
from patchify.retrieval_set import PROTOCOLS, class_retrieval
from patchify.scoring import Ranking, protocol_report
from patchify.refine import adapt
from patchify.search import ExactIndex

OFFICIAL = Path(os.environ.get("PATCHIFY_GOLDEN", Path(__file__).parent / "golden")) / "official"
DATA = OFFICIAL / "data"
FILES = json.loads((DATA / "expected.json").read_text())["files"]
ILIAS = json.loads((DATA / "ilias/expected.json").read_text())
RAML = json.loads((DATA / "raml/expected.json").read_text())["splits"]
TOKEN = json.loads((DATA / "token/expected.json").read_text())
LISTS = [name for name, about in FILES.items() if name.endswith(".txt")]
SEARCHES = [name.removeprefix("similarities_").removesuffix(".pkl") for name in ILIAS["files"] if name.endswith(".pkl")]


# lists and ground truth

@pytest.mark.parametrize("name", LISTS)
def test_golden_official_data_lists(name):
    table = read_image_list(DATA / name)
    expected = [line.split(",") for line in FILES[name]["content"]]
    assert table["path"].tolist() == [fields[0] for fields in expected]
    if len(expected[0]) in (2, 4):
        assert table["label"].tolist() == [fields[1] for fields in expected]
    if len(expected[0]) > 2:
        assert table[["width", "height"]].to_numpy().tolist() == [list(map(int, fields[-2:])) for fields in expected]


def test_golden_official_data_distractors():
    names = [name for name in FILES if name.startswith("revisitop1m/") and name.endswith(".txt")]
    assert sorted(Path(name).name for name in names) == sorted(DISTRACTOR_LISTS)
    assert read_distractors(DATA / "revisitop1m") == FILES["revisitop1m/revisitop1m.txt"]["content"]


@pytest.mark.parametrize("path", sorted(DATA.glob("r*/gnd_*.pkl")), ids=lambda path: path.name)
def test_golden_official_data_revisited(path):
    expected = FILES["roxford5k/gnd_roxford5k.pkl"]["content"]
    queries, gallery = read_revisited(path)
    assert gallery == expected["imlist"] and queries["id"].tolist() == expected["qimlist"]
    for row, truth in zip(queries.itertuples(), expected["gnd"], strict=True):
        assert row.box.tolist() == truth["bbx"]
        assert [row.easy.tolist(), row.hard.tolist(), row.junk.tolist()] == [truth["easy"], truth["hard"], truth["junk"]]


def test_golden_official_data_revisited_set():
    task = load_revisited(DATA / "roxford5k", distractors=DATA / "revisitop1m")
    truth = FILES["roxford5k/gnd_roxford5k.pkl"]["content"]["gnd"]
    for query, entry in enumerate(truth):
        lists = {name: set(entry[name]) for name in ("easy", "hard", "junk")}
        expected = {"easy": (lists["easy"], lists["hard"] | lists["junk"]), "medium": (lists["easy"] | lists["hard"], lists["junk"]),
                    "hard": (lists["hard"], lists["easy"] | lists["junk"])}
        for setup, (positives, junk) in task.truths.items():
            assert (set(positives[query]), set(junk[query])) == expected[setup]
    listed = read_image_list(DATA / "roxford5k/test_gallery.txt")["path"].tolist()
    assert task.gallery["path"].tolist()[: len(listed)] == listed
    assert task.gallery["path"].tolist()[len(listed):] == [f"../revisitop1m/jpg/{name}" for name in FILES["revisitop1m/imlist.txt"]["content"]]
    assert task.queries["path"].tolist() == read_image_list(DATA / "roxford5k/test_query.txt")["path"].tolist()


def test_golden_official_data_gldv2():
    truth = read_gldv2_truth(DATA / "gldv2/gnd_gldv2-test.pkl")
    expected = FILES["gldv2/gnd_gldv2-test.pkl"]["content"]["gnd"]
    assert [rows.tolist() for rows in truth["positives"]] == [entry["ok"] for entry in expected]
    assert [rows.tolist() for rows in truth["junk"]] == [entry["junk"] for entry in expected]


def test_golden_official_data_sop():
    "The same images on both sides, the second field as class."
    queries, gallery = (read_image_list(DATA / f"sop/test_{side}.txt") for side in ("query", "gallery"))
    assert queries.equals(gallery)
    task = class_retrieval(queries["label"], "sop")
    for row, (positives, junk) in enumerate(zip(task.positives, task.junk)):
        same = set(np.flatnonzero(queries["label"] == queries["label"][row]))
        assert (set(positives), junk.tolist()) == (same - {row}, [row])


# class splits

def grouped(data: LabelledSet, part: str) -> list[list[str]]:
    "Paths of a part as lists of classes, in the order in which the classes appear."
    rows = data.part(part)
    return [list(group["path"]) for _, group in rows.groupby("label", sort=False)]


@pytest.mark.parametrize("name, load", [("cub", load_cub), ("cars", load_cars), ("sop", load_sop)])
def test_golden_official_data_class_splits(name, load):
    data = load(DATA / "raml" / name)
    for part, pieces in (("train", ("train", "val")), ("test", ("test",))):
        expected = [[path.removeprefix(f"{name}/") for path in images] for piece in pieces for images in RAML[name][piece]]
        assert grouped(data, part) == expected


def test_golden_official_data_token_classes():
    data = load_gldv2_train(DATA / "token")
    numbers, names = class_numbers(data.images["label"])
    assert {name: number for number, name in enumerate(names)} == TOKEN["relabeling"] == read_pickle(DATA / "token/relabeling.pkl")
    split = read_pickle(DATA / "token/GLDv2-clean-train-split.pkl")
    assert split == TOKEN["split"] and len(names) == split["total_class"]
    ours = {Path(path).stem: number for path, number in zip(data.images["path"], numbers.tolist())}
    assert [ours[image] for image in split["file_ids"]] == split["labels"]


# ILIAS

def test_golden_official_data_ilias_ids():
    ids = DATA / "ilias/image_ids"
    assert list(read_ids(ids / "image_query_ids.txt")) == ILIAS["files"]["features_image_queries.hdf5"]["index"]
    assert list(read_ids(ids / "text_query_ids.txt")) == ILIAS["files"]["features_text_queries.hdf5"]["index"]
    assert sorted(read_ids(ids / "positive_ids.txt", 2)) == sorted(ILIAS["files"]["features_positives.hdf5"]["index"])
    assert read_ids(ids / "mini_ilias_yfcc100m_ids.txt")
    assert set(read_text_queries(DATA / "ilias")) == set(read_ids(ids / "text_query_ids.txt"))
    raw = {path.relative_to(DATA / "ilias/ilias_core").as_posix(): path.read_bytes() for path in DATA.glob("ilias/ilias_core/*/query/T*.txt")}
    assert {name: text.encode() for name, text in read_text_queries(DATA / "ilias").items()} == raw
    assert set(read_taxonomy(DATA / "ilias")) == {name.split("/")[0] for name in ILIAS["files"]["features_image_queries.hdf5"]["index"]}


def test_golden_official_data_ilias_features():
    features = load_ilias_features(DATA / "ilias")
    for name, values in [("image_queries", features.queries), ("positives", features.blocks[0][:][:, 0])]:
        content = ILIAS["files"][f"features_{name}.hdf5"]["content"]
        assert list(values.shape) == content["shape"] and str(values.dtype) == content["dtype"]
        np.testing.assert_array_equal(values.ravel()[:4], np.array(content["first"], content["dtype"]))
    for block in features.blocks[1:]:
        about = ILIAS["files"][block.path.name]
        assert block.ids == about["index"] and list(block.shape) == [about["content"]["shape"][0], 1, about["content"]["shape"][1]]


def filled(key: str, shape: tuple) -> np.ndarray:
    "A tensor of the adaptation layer by the goldens' rule."
    seed = int.from_bytes(hashlib.sha256(f"{ILIAS['lin_adapt_fill_salt']}:{key}".encode()).digest()[:8], "big")
    values = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    scale = 0.1 if key.endswith("bias") else 1 / math.sqrt(math.prod(shape[1:]))
    return np.asarray(values * scale, np.float32)


def searched(name: str) -> Ranking:
    "The search of a similarity file, done again by us."
    length = int(ILIAS["searches"][name].split()[1].rstrip(","))
    transform = None
    if "adapted" in name:
        shapes = {key: tuple(shape) for key, shape, *_ in json.loads((OFFICIAL / "keys/ilias_lin_adapt.json").read_text())["keys"]}
        layer = [filled(key, shapes[key]) for key in ("layer.weight", "layer.bias")]
        transform = lambda values: adapt(values, *layer).astype(np.float32)
    features = load_ilias_features(DATA / "ilias", name.split("_")[0], "mini" if "mini" in name else "all", transform)
    return Ranking(features.benchmark, ExactIndex(features.blocks, device="cpu").search(features.queries, length))


@pytest.mark.parametrize("name", SEARCHES)
def test_golden_official_data_ilias_search(name):
    official = restricted_pickle.load(DATA / f"ilias/similarities_{name}.pkl")
    ranking = searched(name)
    assert ranking.benchmark.queries["id"].tolist() == list(official["query_ids"])
    ids = ranking.benchmark.gallery["id"].to_numpy()
    np.testing.assert_array_equal(ids[ranking.ranks], official["db_ids"][official["ranks"]])
    np.testing.assert_allclose(ranking.result.scores, official["sims"], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SEARCHES if "evaluation" in ILIAS["files"][f"similarities_{name}.pkl"]])
def test_golden_official_data_ilias_evaluation(name):
    expected = ILIAS["files"][f"similarities_{name}.pkl"]["evaluation"]
    ranking = searched(name)
    protocol = replace(PROTOCOLS["ilias"], depth=expected["k"])
    ranking = replace(ranking, benchmark=ranking.benchmark.under(protocol))
    report = protocol_report(ranking)
    aps = dict(zip(ranking.benchmark.queries["id"], 100 * ranking.average_precisions()))
    np.testing.assert_allclose([aps[query] for query in expected["queries"]], expected["aps"], atol=1e-9)
    np.testing.assert_allclose([report["map"], report["oracle"]], [expected["map"], expected["oracle"]], atol=1e-4)
    for kind in ("scale", "clutter"):
        bounds = {float(key.split("-")[0]): value for key, value in expected[kind].items()}
        ours = dict(zip(sorted(bounds), report[kind].values(), strict=True))
        for low, value in ours.items():
            assert value is None and bounds[low] in (0, None) or math.isclose(value, bounds[low], abs_tol=1e-4)
    for kind in ("categories", "subcategories"):
        assert report[kind] == pytest.approx(expected[kind], abs=1e-4)


@pytest.mark.parametrize("name", SEARCHES)
def test_golden_official_data_ilias_export(name, tmp_path):
    "Our file of the same search has the official keys, types, ids and ranks."
    official = restricted_pickle.load(DATA / f"ilias/similarities_{name}.pkl")
    ranking = searched(name)
    tables = ranking.benchmark.queries["id"], ranking.benchmark.gallery["id"]
    ours = restricted_pickle.load(save_similarities(tmp_path / "ours.pkl", *tables, official["sims"], ranking.result.ranks))
    assert list(ours) == list(official) == list(ILIAS["files"][f"similarities_{name}.pkl"]["types"])
    for key, value in official.items():
        assert type(ours[key]) is type(value) and ours[key].dtype == value.dtype and np.array_equal(ours[key], value), key
    entries = json.loads(save_similarities(tmp_path / "ours.json", *tables, official["sims"], ranking.result.ranks).read_text())
    written = json.loads((DATA / f"ilias/similarities_{name}.json").read_text())
    assert {query: list(row) for query, row in entries.items()} == {query: list(row) for query, row in written.items()}
    for query, row in written.items():
        np.testing.assert_allclose(list(entries[query].values()), list(row.values()), atol=1e-7)
