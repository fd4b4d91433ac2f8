"ILIAS's official search: plain, with linear adaptation, with query expansion, and with both."
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import restricted_pickle

from patchify.data.ilias_files import save_similarities
from patchify.refine import adapt, expand_queries
from patchify.search import ExactIndex

GOLDEN = Path(os.environ.get("PATCHIFY_GOLDEN", Path(__file__).parent / "golden"))
INFO = json.loads((GOLDEN / "ilias_knn.json").read_text())
DATA = dict(np.load(GOLDEN / "ilias_knn.npz", allow_pickle=False))
K, COUNT = INFO["config"]["k"], INFO["config"]["query_expansion"]
SHARDS = ["positive", *sorted((name for name in DATA if name.startswith("distractor") and not name.endswith("_ids")), key=lambda name: (len(name), name))]
ATOL, RTOL = INFO["tolerance"]["patterns"]["*.sims"]


@pytest.mark.parametrize("expanded", (False, True), ids=("once", "expanded"))
@pytest.mark.parametrize("adapted", (False, True), ids=("raw", "adapted"))
def test_golden_ilias_knn(adapted, expanded):
    through = partial(adapt, weight=DATA["adapt_weight"], bias=DATA["adapt_bias"]) if adapted else np.asarray
    shards = [DATA[name] for name in SHARDS]
    raw = ExactIndex([shard[:, None] for shard in shards], device="cpu")
    index, queries = ExactIndex([through(shard)[:, None] for shard in shards], device="cpu"), through(DATA["query"])
    found = index.search(queries, K)
    if expanded:
        found = index.search(expand_queries(queries, found, raw, COUNT, through), K)
    case = "_".join(name for name, on in (("adapt", adapted), ("qe", expanded)) if on) or "plain"
    np.testing.assert_allclose(found.scores, DATA[f"{case}.sims"], atol=ATOL, rtol=RTOL)
    np.testing.assert_array_equal(found.ranks, DATA[f"{case}.ranks"])


def test_golden_ilias_knn_file_names_the_same_images(tmp_path):
    ids = [image for name in SHARDS for image in DATA[f"{name}_ids"].tolist()]
    file = save_similarities(tmp_path / "found.pkl", DATA["query_ids"], ids, DATA["plain.sims"], DATA["plain.ranks"])
    written = restricted_pickle.load(file)
    named = np.asarray(written["db_ids"])[np.asarray(written["ranks"])]
    np.testing.assert_array_equal(named, DATA["reindexed_ids"][DATA["reindexed_ranks"]])
    np.testing.assert_array_equal(written["sims"], DATA["plain.sims"])
