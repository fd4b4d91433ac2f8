"The revisited Oxford and Paris protocol, and the variants of it that AMES and LOCORE use."
import json
import os
from pathlib import Path

import numpy as np
import pytest

from patchify.metrics import ap_staircase, ap_trapezoid, average_precisions, precision_at
from patchify.retrieval_set import revisited_setups

GOLDEN = Path(os.environ.get("PATCHIFY_GOLDEN", Path(__file__).parent / "golden"))
INFO = json.loads((GOLDEN / "revisitop.json").read_text())
DATA = dict(np.load(GOLDEN / "revisitop.npz", allow_pickle=False))
KAPPAS, TRUNCATE = INFO["config"]["kappas"], INFO["config"]["truncate"]
PRIVATE, GLD_TOP = 750, 100                     # GLDv2: queries of the private split, ranks that are read
VARIANTS = {"trapezoidal": "trapezoid", "rectangular": "staircase"}
CLOSE = dict(rtol=0, atol=1e-9)


def lists(name: str) -> list[np.ndarray]:
    values, ends = DATA[f"{name}_val"], DATA[f"{name}_ptr"]
    return [values[a:b] for a, b in zip(ends[:-1], ends[1:])]


RANKS = DATA["ranks"].T
GROUPS = dict(zip("EMH", revisited_setups(lists("easy"), lists("hard"), lists("junk")).values()))


def precisions(ranks, group) -> np.ndarray:
    "(Q, len(KAPPAS))"
    positives, junk = group
    return np.stack([precision_at(ranks, positives, k, junk) for k in KAPPAS], 1)


def test_golden_revisitop_ranks():
    order = np.argsort(-(DATA["X"].T @ DATA["Q"]), axis=0, kind="stable")
    assert np.array_equal(order, DATA["ranks"])


@pytest.mark.parametrize("setup", "EMH")
def test_golden_revisitop_protocol(setup):
    positives, junk = GROUPS[setup]
    aps, prs = average_precisions(RANKS, positives, junk, variant="trapezoid"), precisions(RANKS, GROUPS[setup])
    np.testing.assert_allclose(aps, DATA[f"aps{setup}"], **CLOSE)
    np.testing.assert_allclose(np.nanmean(aps), DATA[f"map{setup}"], **CLOSE)
    np.testing.assert_allclose(prs, DATA[f"prs{setup}"], **CLOSE)
    np.testing.assert_allclose(np.nanmean(prs, 0), DATA[f"mpr{setup}"], **CLOSE)
    # AMES prints percentages with three decimals
    np.testing.assert_allclose(np.around(100 * np.nanmean(aps), 3), DATA[f"ames.{setup}_map"], **CLOSE)
    np.testing.assert_allclose(np.around(100 * np.nanmean(prs, 0), 3), DATA[f"ames.{setup}_mp"], **CLOSE)


def test_golden_revisitop_ames_headline():
    medium, hard = (np.nanmean(average_precisions(RANKS, *GROUPS[s], variant="trapezoid")) for s in "MH")
    np.testing.assert_allclose((medium + hard) / 2, DATA["ames.map_mean_MH"], **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("top", TRUNCATE)
def test_golden_revisitop_truncated_lists(top, variant):
    positives, junk = GROUPS["M"]
    name, ranks = f"ames.top{top}.{variant}", RANKS[:, :top]
    aps, prs = average_precisions(ranks, positives, junk, k=ranks.shape[1], variant=VARIANTS[variant]), precisions(ranks, GROUPS["M"])
    np.testing.assert_allclose(aps, DATA[f"{name}.aps"], **CLOSE)
    np.testing.assert_allclose(np.nanmean(aps), DATA[f"{name}.map"], **CLOSE)
    np.testing.assert_allclose(prs, DATA[f"{name}.prs"], **CLOSE)
    np.testing.assert_allclose(np.nanmean(prs, 0), DATA[f"{name}.pr"], **CLOSE)


def test_golden_revisitop_single_lists():
    counts = DATA["ap_nres"]
    for name, ap in [("rectangular", ap_staircase), ("trapezoidal", ap_trapezoid), ("revisitop", ap_trapezoid)]:
        np.testing.assert_allclose([ap(p, n) for p, n in zip(lists("ap_pos"), counts)], DATA[f"ap_{name}"], **CLOSE)


def test_golden_revisitop_gldv2():
    ranks = DATA["gld_ranks"].T[:, :GLD_TOP].astype(np.int64)
    aps = average_precisions(ranks, lists("gld_ok"), k=ranks.shape[1])
    public, private = aps[:-PRIVATE], aps[-PRIVATE:]
    for name, values in [("gldv2-test", aps), ("gldv2-val", public)]:
        np.testing.assert_allclose(values, DATA[f"{name}.aps"], **CLOSE)
        np.testing.assert_allclose(np.nanmean(values), DATA[f"{name}.map_raw"], **CLOSE)
        np.testing.assert_allclose(np.around(100 * np.nanmean(values), 3), DATA[f"{name}.map"], **CLOSE)
    for name, values in [("pub", public), ("priv", private)]:
        np.testing.assert_allclose(np.around(100 * np.nanmean(values), 3), DATA[f"gldv2-test.{name}_map"], **CLOSE)


def test_golden_revisitop_is_covered():
    per_setup = {f"{what}{s}" for s in "EMH" for what in ("map", "aps", "mpr", "prs")}
    ames = {f"ames.{s}_{what}" for s in "EMH" for what in ("map", "mp")} | {"ames.map_mean_MH"}
    truncated = {f"ames.top{t}.{v}.{what}" for t in TRUNCATE for v in VARIANTS for what in ("map", "aps", "pr", "prs")}
    gld = {f"gldv2-{s}.{what}" for s in ("test", "val") for what in ("map", "map_raw", "aps")} | {"gldv2-test.pub_map", "gldv2-test.priv_map"}
    lists_of_positions = {"ap_rectangular", "ap_trapezoidal", "ap_revisitop"}
    outputs = {a["name"] for a in INFO["arrays"] if a["role"] == "output"}
    assert outputs == {"ranks"} | per_setup | ames | truncated | gld | lists_of_positions
