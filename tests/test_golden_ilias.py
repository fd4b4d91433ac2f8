"ILIAS's official evaluator: every number of the golden, and the files that it reads."
import json
import os
from pathlib import Path

import numpy as np
import pytest
import restricted_pickle

from patchify.data.ilias_files import save_similarities
from patchify.groups import CLUTTER_EDGES, SCALE_EDGES, by_category, by_group, split_positives
from patchify.metrics import average_precisions, oracle_ilias

GOLDEN = Path(os.environ.get("PATCHIFY_GOLDEN", Path(__file__).parent / "golden"))
INFO = json.loads((GOLDEN / "ilias.json").read_text())
DATA = dict(np.load(GOLDEN / "ilias.npz", allow_pickle=False))
CASES = [(name, k) for name in ("full", "short") for k in INFO["config"]["ks"]]
CLOSE = dict(rtol=0, atol=1e-9)


def instance(image_id: str) -> str:
    return image_id.split("/")[0]


class Case:
    "One list length and one k of the golden, with the ground truth as gallery indices."

    def __init__(self, name: str, k: int):
        length = INFO["config"]["short"] if name == "short" else DATA["sims"].shape[1]
        order = np.argsort(-DATA["sims"][:, :length], axis=1, kind="stable")
        self.scores = np.take_along_axis(DATA["sims"], order, 1)
        self.ranks = np.take_along_axis(DATA["ranks"], order, 1)
        db, positive_ids = DATA["db_ids"].tolist(), DATA["positive_ids"].tolist()
        gallery = db + sorted(set(positive_ids) - set(db))          # a positive outside the database still counts
        place = {image: i for i, image in enumerate(gallery)}
        self.scale, self.clutter = np.full(len(gallery), np.nan), np.full(len(gallery), np.nan)
        self.scale[[place[i] for i in positive_ids]] = DATA["positive_scale"]
        self.clutter[[place[i] for i in positive_ids]] = DATA["positive_clutter"]
        self.instances = [instance(q) for q in DATA["query_ids"].tolist()]
        self.positives = [np.array([place[p] for p in positive_ids if instance(p) == i], int) for i in self.instances]
        self.k, self.gallery = k, gallery

    def aps(self, positives=None, junk=None):
        values = average_precisions(self.ranks, positives or self.positives, junk, self.k, "ilias", self.scores)
        return 100 * values


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}.k{c[1]}")
def case(request):
    name, k = request.param
    return Case(name, k), {key.split(".", 2)[2]: DATA[key] for key in DATA if key.startswith(f"{name}.k{k}.")}


def test_golden_ilias_average_precision_and_oracle(case):
    case, expected = case
    aps = np.nan_to_num(case.aps())         # the official evaluator counts a query without positives as 0
    np.testing.assert_allclose(aps, expected["aps"], **CLOSE)
    np.testing.assert_allclose(aps.mean(), expected["map"], **CLOSE)
    oracles = np.nan_to_num(100 * oracle_ilias(case.ranks, case.positives, case.k))
    np.testing.assert_allclose(oracles, expected["oracles"], **CLOSE)
    np.testing.assert_allclose(oracles.mean(), expected["oracle"], **CLOSE)


@pytest.mark.parametrize("group", ["scale", "clutter"])
def test_golden_ilias_groups(case, group):
    case, expected = case
    edges = SCALE_EDGES if group == "scale" else CLUTTER_EDGES
    np.testing.assert_allclose(np.stack([edges[:-1], edges[1:]], 1), DATA[f"{group}_groups"], **CLOSE)
    table = by_group(case.aps, split_positives(case.positives, getattr(case, group), edges))
    np.testing.assert_allclose(table["mean"], expected[group], **CLOSE)


@pytest.mark.parametrize("kind", ["categories", "subcategories"])
def test_golden_ilias_taxonomy(case, kind):
    case, expected = case
    names = DATA["category"] if kind == "categories" else [f"{c}-{s}" for c, s in zip(DATA["category"], DATA["subcategory"])]
    of = dict(zip(DATA["instances"].tolist(), names))
    table = by_category(np.nan_to_num(case.aps()), case.instances, [of[i] for i in case.instances]).set_index("category")
    assert sorted(table.index) == sorted(expected[f"{kind}_names"])
    np.testing.assert_allclose(table["mean"][expected[f"{kind}_names"]], expected[kind], **CLOSE)


def test_golden_ilias_is_covered():
    tested = {"map", "aps", "oracle", "oracles", "scale", "clutter", "categories", "categories_names", "subcategories", "subcategories_names"}
    outputs = {a["name"] for a in INFO["arrays"] if a["role"] == "output"}
    assert outputs == {f"{name}.k{k}.{what}" for name, k in CASES for what in tested} | {"scale_groups", "clutter_groups"}


def evaluate(query_ids, db_ids, sims, ranks, positive_ids, k):
    "The official entry point's argument names and way of reading: mean AP over the queries of the file, in percent."
    aps = []
    for query, scores, row in zip(query_ids, sims, ranks):
        ids = np.asarray(db_ids)[row]
        right = {p for p in positive_ids if instance(p) == instance(query)}
        order = np.arange(len(ids))[None]
        where = [i for i, image in enumerate(ids) if image in right]
        missing = range(len(ids), len(ids) + len(right) - len(where))
        aps.append(average_precisions(order, [where + list(missing)], k=k, variant="ilias", scores=scores[None]))
    return 100 * np.nan_to_num(np.array(aps)).mean()


@pytest.mark.parametrize("suffix", [".pkl", ".json"])
def test_golden_ilias_export(tmp_path, case, suffix):
    case, expected = case
    path = save_similarities(tmp_path / f"similarities{suffix}", DATA["query_ids"], case.gallery, case.scores, case.ranks)
    positive_ids = DATA["positive_ids"].tolist()
    if suffix == ".pkl":
        file = restricted_pickle.load(path)
        assert list(file) == ["query_ids", "db_ids", "sims", "ranks"]
        assert np.array_equal(file["db_ids"], np.array(case.gallery)[np.unique(case.ranks)])
        np.testing.assert_allclose(evaluate(**file, positive_ids=positive_ids, k=case.k), expected["map"], **CLOSE)
        return
    file = json.loads(path.read_text())
    assert list(file) == DATA["query_ids"].tolist()
    rows = [(list(entries), np.array(list(entries.values()))) for entries in file.values()]
    maps = [evaluate([q], ids, [s], [np.arange(len(s))], positive_ids, case.k) for q, (ids, s) in zip(file, rows)]
    np.testing.assert_allclose(np.mean(maps), expected["map"], **CLOSE)
