"""An exported file, read as ILIAS's evaluator of revision e81029e reads it, gives our mAP, oracle and groups.

`Evaluator` is an independent transcription of that reading: it takes the pickle's entries as keyword arguments, ranks by the
similarities (not by the order of the lists), and computes average precision from the distinct similarities, as scikit-learn does.
"""
import json
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import restricted_pickle

from patchify.boxes import Regions
from patchify.data.ilias_files import load_ilias_features, save_similarities
from patchify.data.registry import load
from patchify.encoder import load_encoder
from patchify.evaluate import describe, metrics_dict, rank
from patchify.ivf import IVFPQIndex
from patchify.retrieval_set import PROTOCOLS
from patchify.scoring import Ranking, protocol_report
from patchify.search import ExactIndex

DATA = Path(os.environ.get("PATCHIFY_GOLDEN", Path(__file__).parent / "golden")) / "official/data/ilias"
FILES = {name: about for name, about in json.loads((DATA / "expected.json").read_text())["files"].items() if "evaluation" in about}
BOUNDS = {
    "scale": (0, 0.06880213760855043, 0.13526567164179104, 0.2729876723163842, np.inf),
    "clutter": (0, 18, 33, 53, np.inf),
}


def average_precision(right, similarities) -> float:
    "Precision times the gain in recall, summed over the distinct similarities, from the highest downwards."
    total, previous = 0.0, 0
    for value in sorted(set(similarities), reverse=True):
        chosen = similarities >= value
        hits = int(right[chosen].sum())
        total += hits / chosen.sum() * (hits - previous) / right.sum()
        previous = hits
    return total


class Evaluator:
    "ILIAS's evaluation of one file of similarities."

    def __init__(self, positives: dict[str, dict[str, tuple[float, float]]]):
        self.positives = positives                                 # instance -> id -> (scale, clutter)

    def score(self, instance, ids, similarities, k, left_out=frozenset()):
        "AP and oracle of one query, without some of its positives."
        kept = np.array([i not in left_out for i in ids], bool)
        ids, similarities = ids[kept], similarities[kept]
        order = np.argsort(-similarities)[:k]
        wanted = set(self.positives[instance]) - set(left_out)
        right = np.array([i in wanted for i in ids[order]], bool)
        if not right.any():
            return 0.0, 0.0
        ap = average_precision(right, similarities[order]) * right.sum() / min(k, len(wanted))
        return ap, right.mean() * k / len(wanted)

    def evaluate(self, all_similarities=None, query_ids=None, db_ids=None, sims=None, ranks=None, k=1000, report=False):
        "The arguments have the evaluator's names; a pickle is passed as **content, a json file as all_similarities."
        if all_similarities is not None:
            queries = list(all_similarities)
            lists = [(np.array(list(row)), np.array(list(row.values()))) for row in all_similarities.values()]
        else:
            queries = list(query_ids)
            lists = [(np.asarray(db_ids)[row], np.asarray(values)) for row, values in zip(ranks, sims)]
        aps, oracles, groups = [], [], {kind: defaultdict(list) for kind in BOUNDS}
        for query, (ids, values) in zip(queries, lists):
            instance = query.split("/")[0]
            for result, value in zip((aps, oracles), self.score(instance, ids, values, k)):
                result.append(100 * value)
            for column, kind in enumerate(BOUNDS):
                for low, high in zip(BOUNDS[kind][:-1], BOUNDS[kind][1:]):
                    outside = {i for i, about in self.positives[instance].items() if not low <= about[column] < high}
                    if outside != set(self.positives[instance]):
                        groups[kind][low].append(100 * self.score(instance, ids, values, k, outside)[0])
        means = {kind: {low: np.mean(values) for low, values in each.items()} for kind, each in groups.items()}
        return {"map": np.mean(aps), "aps": dict(zip(queries, aps)), "oracle": np.mean(oracles)} | means


def positives_of(benchmark) -> dict:
    "What positive_ids.txt says, from the gallery table."
    positives = defaultdict(dict)
    for row in benchmark.gallery.itertuples():
        if isinstance(row.instance, str):
            positives[row.instance][row.id] = (row.scale, row.clutter)
    return positives


def check_groups(found, report):
    for kind in BOUNDS:
        for low, ours in zip(sorted(BOUNDS[kind])[:-1], report[kind].values(), strict=True):
            theirs = found[kind].get(low)
            assert (ours is None and theirs is None) or ours == pytest.approx(theirs, abs=1e-3), (kind, low)


@pytest.mark.parametrize("name", FILES)
def test_the_transcription_gives_the_official_numbers(name):
    "On files that the official search wrote and the official evaluator scored."
    expected = FILES[name]["evaluation"]
    evaluator = Evaluator(positives_of(load_ilias_features(DATA).benchmark))
    found = evaluator.evaluate(**restricted_pickle.load(DATA / name), k=expected["k"])
    assert found["map"] == pytest.approx(expected["map"], abs=1e-9) and found["oracle"] == pytest.approx(expected["oracle"], abs=1e-9)
    np.testing.assert_allclose([found["aps"][query] for query in expected["queries"]], expected["aps"], atol=1e-9)
    for kind in BOUNDS:
        theirs = {float(key.split("-")[0]): value for key, value in expected[kind].items()}
        assert found[kind] == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("queries", ["image", "text"])
@pytest.mark.parametrize("ending", [".pkl", ".json"])
def test_our_file_of_official_features_gives_our_report(queries, ending, tmp_path):
    features = load_ilias_features(DATA, queries)
    benchmark = features.benchmark.under(replace(PROTOCOLS["ilias"], depth=5))
    ranking = Ranking(benchmark, ExactIndex(features.blocks, device="cpu").search(features.queries, 8))
    file = save_similarities(tmp_path / f"ours{ending}", benchmark.queries["id"], benchmark.gallery["id"], ranking.result.scores, ranking.result.ranks)
    content = restricted_pickle.load(file) if ending == ".pkl" else {"all_similarities": json.loads(file.read_text())}
    found = Evaluator(positives_of(benchmark)).evaluate(**content, k=5)
    report = protocol_report(ranking)
    assert report["map"] == pytest.approx(found["map"], abs=1e-3) and report["oracle"] == pytest.approx(found["oracle"], abs=1e-3)
    check_groups(found, report)


@pytest.mark.parametrize("index", ["exact", "ivfpq"])
def test_an_evaluation_and_its_export_agree(index, data, tmp_path):
    "Also when a compressed index gives equal similarities and leaves images out."
    benchmark = load("tiny", data)
    described = describe(benchmark, load_encoder("mini", device="cpu"), Regions("pyramid", 2), data / "stores")
    build = {"exact": ExactIndex, "ivfpq": lambda blocks, rows: IVFPQIndex(
        n_subvectors=8, n_bits=4, n_lists=16, n_probe=2).train(blocks, described.regions.levels).add(blocks, rows)}[index]
    run = rank(described, index=build)
    report = metrics_dict(run)
    evaluator = Evaluator(positives_of(benchmark))
    for ending in (".pkl", ".json"):
        file = save_similarities(tmp_path / f"found{ending}", benchmark.queries["id"], benchmark.gallery["id"], run.result.scores, run.result.ranks)
        content = restricted_pickle.load(file) if ending == ".pkl" else {"all_similarities": json.loads(file.read_text())}
        found = evaluator.evaluate(**content)
        assert report["map"] == pytest.approx(found["map"], abs=1e-3)
        check_groups(found, report)


def test_the_key_of_former_revisions_is_refused(tmp_path):
    "Before September 2025 the entry `sims` was called `similarities`; the evaluator takes no such argument any more."
    file = save_similarities(tmp_path / "found.pkl", ["a/query/Q0.jpg"], ["a/pos/P0.jpg"], [[0.5]], [[0]])
    content = restricted_pickle.load(file)
    assert list(content) == ["query_ids", "db_ids", "sims", "ranks"]
    evaluator = Evaluator({"a": {"a/pos/P0.jpg": (0.1, 3)}})
    assert evaluator.evaluate(**content)["map"] == 100
    with pytest.raises(TypeError, match="similarities"):
        evaluator.evaluate(**{("similarities" if key == "sims" else key): value for key, value in content.items()})
