"""ames_end_to_end: official checkpoint, descriptors, shortlist and truth give the authors' logits, ranks and mAP."""
import json
import shutil
from importlib.resources import files

import numpy as np
import pytest
import torch
from official_fill import FOLDER, filled
from safetensors.torch import save_file

from patchify.metrics import average_precisions
from patchify.rerank.elvis import ELViS, ElvisScorer
from patchify.rerank.evaluation import GroundTruth, _published, load_reranker, published_settings, rerank_files
from patchify.rerank.official import DescriptorFile, read_listed_images, read_shortlist
from patchify.rerank.shortlist import move_junk_last

pytest.importorskip("h5py")
DATA = FOLDER / "data"
ROXFORD = DATA / "roxford5k"
EXPECTED = json.loads((DATA / "expected.json").read_text())["ames_end_to_end"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("networks") / "dinov2_ames.pt"
    torch.save({"state": filled("dinov2_ames"), "optim": {}, "epoch": 50}, file)
    return file


def changes() -> dict:
    s = EXPECTED["settings"]
    return {"query_top": s["query_sequence_len"], "gallery_top": s["sequence_len"], "top_k": s["num_rerank"], "global_weight": s["lamb"],
            "gain": s["temp"]}


@pytest.fixture(scope="module")
def report(checkpoint):
    arguments = (ROXFORD / "dinov2_gallery_local.hdf5", ROXFORD / EXPECTED["settings"]["nn_file"], ROXFORD / "gnd_roxford5k.pkl")
    return rerank_files(checkpoint, *arguments, **changes())


def value(report, setup: str, metric: str, column: str = "re-ranked") -> float:
    table = report.table
    return float(table[(table.setup == setup) & (table.metric == metric)][column].iloc[0])


@pytest.mark.parametrize("setup", ["medium", "hard"])
def test_logits_and_ranks(report, setup):
    np.testing.assert_allclose(report.raw[setup], EXPECTED[f"raw_logits_{setup}"], rtol=0, atol=EXPECTED["atol_raw_logits"])
    assert report.ranks[setup].tolist() == EXPECTED[f"ranks_{setup}"]


def test_map(report):
    assert round(value(report, "medium", "mAP"), 3) == EXPECTED["M_map"]
    assert round(value(report, "hard", "mAP"), 3) == EXPECTED["H_map"]


def test_the_score_that_the_official_code_returns(report):
    "The mean over both passes of the mean of Medium and Hard."
    truth = GroundTruth(ROXFORD / "gnd_roxford5k.pkl")
    scores = []
    for ranks in report.ranks.values():
        found = {setup: np.nanmean(values) for setup, metric, values in truth.measure({"medium": ranks, "hard": ranks}) if metric == "mAP"}
        scores.append((found["medium"] + found["hard"]) / 2)
    assert np.mean(scores) == pytest.approx(EXPECTED["returned_score"], abs=1e-12)


def test_the_published_settings_are_recognised(checkpoint):
    settings = load_reranker(checkpoint)[1]
    assert (settings.system, settings.backbone, settings.precision) == ("AMES", "dinov2", "full precision")
    assert (settings.query_top, settings.gallery_top, settings.top_k, settings.global_weight, settings.gain) == (600, 50, 100, 0.55, 0.3)


@pytest.mark.parametrize("name, expected", [("cvnet_ames", (0.85, 0.8)), ("dinov2_ames_dist", (0.35, 0.1)), ("cvnet_ames_dist", (0.65, 0.2))])
def test_the_other_variants(name, expected, tmp_path):
    torch.save({"state": filled(name)}, tmp_path / "renamed.pt")
    settings = load_reranker(tmp_path / "renamed.pt")[1]
    assert (settings.global_weight, settings.gain) == expected


@pytest.mark.parametrize("name, what", [("dinov2_detector", "a detector"), ("ilias_lin_adapt", "a linear adaptation layer")])
def test_other_official_files_are_named(name, what, tmp_path):
    torch.save({"state": filled(name)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt holds {what}"):
        load_reranker(tmp_path / "x.pt")


def test_distractors(checkpoint, tmp_path, monkeypatch):
    "The million: a linked descriptor file in another folder, queries beside the plain one, any working directory."
    monkeypatch.chdir(tmp_path)
    folder = DATA.resolve() / "roxford5k+1m"
    paths = (folder / "dinov2_gallery_local.hdf5", folder / "nn_superglobal.pkl", folder / "gnd_roxford5k+1m.pkl")
    report = rerank_files(checkpoint, *paths, **changes())
    assert report.dataset == "roxford5k+r1m" and report.ranks["medium"].shape == read_shortlist(paths[1]).ranks.shape
    plain = rerank_files(checkpoint, folder.parent / "roxford5k/dinov2_gallery_local.hdf5", folder.parent / "roxford5k/nn_superglobal.pkl",
                         paths[2], **changes())
    assert value(report, "medium", "mAP", "first stage") != value(plain, "medium", "mAP", "first stage")


def test_elvis(tmp_path):
    torch.save({"state": filled("dinov2_elvis_gld")}, tmp_path / "elvis.pt")
    report = rerank_files(tmp_path / "elvis.pt", ROXFORD / "dinov2_gallery_local.hdf5", ROXFORD / "nn_dinov2.pkl", ROXFORD / "gnd_roxford5k.pkl")
    assert report.settings.system == "ELViS" and report.raw["hard"].shape == report.ranks["hard"].shape


def test_locore_misses_its_global_descriptors(tmp_path):
    pytest.importorskip("transformers")
    from patchify.rerank.locore import LOCORE

    model = LOCORE(768, 768, dim=64, layers=1, heads=1, hidden=32, max_positions=514)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for side in ("query", "gallery"):
        shutil.copy(ROXFORD / f"dinov2_{side}_local.hdf5", tmp_path)
    paths = (tmp_path / "dinov2_gallery_local.hdf5", ROXFORD / "nn_superglobal.pkl", ROXFORD / "gnd_roxford5k.pkl")
    with pytest.raises(ValueError, match="no dinov2_gallery_global.pt beside"):
        rerank_files(tmp_path / "model.safetensors", *paths)
    report = rerank_files(tmp_path / "model.safetensors", *paths, without_globals=True, query_top=4, gallery_top=4)
    assert len(report.table)
    shutil.copy(ROXFORD / "dinov2_query_global.pt", tmp_path)
    with pytest.raises(ValueError, match="only one side"):
        rerank_files(tmp_path / "model.safetensors", *paths)


@pytest.mark.parametrize("window", [None, 4])
def test_locore(tmp_path, window):
    "A small LOCORE in the released file format; global descriptors are found beside the local ones."
    pytest.importorskip("transformers")
    from patchify.rerank.locore import LOCORE, LocoreScorer
    from patchify.rerank.official import read_globals
    from patchify.rerank.windows import rerank_windows

    torch.manual_seed(0)
    model = LOCORE(768, 768, dim=64, layers=1, heads=1, window=512, hidden=32, max_positions=514).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    paths = (ROXFORD / "dinov2_gallery_local.hdf5", ROXFORD / "nn_superglobal.pkl", ROXFORD / "gnd_roxford5k.pkl")
    report = rerank_files(tmp_path / "model.safetensors", *paths, window=window, stride=2, query_top=6, gallery_top=6)
    assert report.settings.global_weight == 0.5 and report.settings.gain == 0.1
    if window is None:
        assert report.raw["medium"].shape == report.ranks["medium"].shape
        return
    sides = []
    for side in ("query", "gallery"):
        local = DescriptorFile(ROXFORD / f"dinov2_{side}_local.hdf5", 6)
        sides.append(DescriptorFile(local.path, 6, read_globals(ROXFORD / f"dinov2_{side}_global.pt", len(local))))
    cleaned = move_junk_last(read_shortlist(paths[1]), GroundTruth(paths[2]).moved["hard"])
    expected = rerank_windows(cleaned, LocoreScorer(model, *sides), cleaned.ranks.shape[1], window, 2, gain=0.1)
    assert np.array_equal(report.ranks["hard"], expected.ranks)


def test_products(tmp_path):
    "Queries are the gallery; the self match does not count."
    import h5py

    folder = tmp_path / "sop"
    folder.mkdir()
    shutil.copy(DATA / "sop/test_query.txt", folder)
    labels = read_listed_images(folder / "test_query.txt")["label"].tolist()
    torch.save({"state": ELViS(local_dim=8, model_dim=16).state_dict()}, tmp_path / "elvis.pt")
    table = np.zeros((len(labels), 4, 13), np.float32)
    table[..., 5:] = np.random.default_rng(0).normal(size=(len(labels), 4, 8))
    with h5py.File(folder / "dinov2_gallery_local.hdf5", "w") as file:
        file["features"] = table
    shortlist = DATA / "sop/nn_dinov2.pkl"
    report = rerank_files(tmp_path / "elvis.pt", folder / "dinov2_gallery_local.hdf5", shortlist, folder / "test_query.txt")
    assert report.dataset == "sop" and set(report.table.metric) >= {"R@1", "mAP"}
    hits = []
    for query, ids in enumerate(read_shortlist(shortlist).ranks.tolist()):
        if labels.count(labels[query]) > 1:
            hits.append(labels[next(i for i in ids if i != query)] == labels[query])
    assert value(report, "all", "R@1", "first stage") == pytest.approx(100 * np.mean(hits))


def test_renumbered_shortlists_read_their_rows(tmp_path):
    "Row 2 of the shortlist names rows of a reduced descriptor file; row 1 names the images."
    import h5py
    import pickle

    torch.manual_seed(0)
    model = ELViS(local_dim=8, model_dim=16).eval()
    torch.save({"state": model.state_dict()}, tmp_path / "elvis.pt")
    table = np.zeros((6, 4, 13), np.float32)
    table[..., 5:] = np.random.default_rng(0).normal(size=(6, 4, 8))
    for side, images in (("query", table[:2]), ("gallery", table)):
        with h5py.File(tmp_path / f"x_{side}_local.hdf5", "w") as file:
            file["features"] = images
    ids = np.array([[50, 10, 20], [20, 60, 10]])
    rows = np.array([[4, 0, 1], [1, 5, 0]])
    stored = torch.as_tensor(np.stack([np.array([[0.9, 0.8, 0.7]] * 2), ids, rows]))
    (tmp_path / "nn.pkl").write_bytes(pickle.dumps(stored))
    (tmp_path / "gnd_gldv2-test.pkl").write_bytes(pickle.dumps({"gnd": [{"ok": [10], "junk": []}, {"ok": [20], "junk": [60]}]}))
    report = rerank_files(tmp_path / "elvis.pt", tmp_path / "x_gallery_local.hdf5", tmp_path / "nn.pkl", tmp_path / "gnd_gldv2-test.pkl")
    scorer = ElvisScorer(model, DescriptorFile(tmp_path / "x_query_local.hdf5"), DescriptorFile(tmp_path / "x_gallery_local.hdf5"))
    np.testing.assert_allclose(report.raw["all"][0], scorer(0, rows[0]), atol=1e-6)
    np.testing.assert_allclose(report.raw["all"][1], scorer(1, np.array([1, 0, 5])), atol=1e-6)
    assert set(report.ranks["all"][1].tolist()) == {20, 60, 10}


@pytest.mark.parametrize("settings, setting", [
    (published_settings("AMES"), "full precision"),
    (published_settings("AMES", binary=True), "binary"),
    (published_settings("LOCORE"), ""),
    (published_settings("LOCORE", 1024), ""),  # listed without a backbone, so for all of them
])
def test_published_values_stand_beside_the_measured_ones(settings, setting):
    "The rows of published.csv hold the authors' settings, which are the defaults here."
    for name in ("global_weight", "gain"):
        assert _published(settings, "", setting, name) == getattr(settings, name)


def test_what_is_not_published_is_missing():
    assert np.isnan(_published(published_settings("AMES"), "roxford5k", "medium", "mAP"))
    assert _published(published_settings("AMES", 1024), "", "full precision", "gain") == 0.8
    assert np.isnan(_published(published_settings("AMES", 1280), "", "full precision", "gain"))  # of another backbone
    assert np.isnan(_published(published_settings("ELViS"), "", "", "gain"))


def test_landmarks_are_split_into_public_and_private(tmp_path):
    import pickle

    entries = [{"ok": [i % 7, 7 + i % 5], "junk": []} for i in range(760)]
    entries[3]["ok"] = []
    (tmp_path / "gnd_gldv2-test.pkl").write_bytes(pickle.dumps({"gnd": entries}))
    truth = GroundTruth(tmp_path / "gnd_gldv2-test.pkl", 200)
    ranks = np.stack([np.random.default_rng(i).permutation(200) for i in range(760)])
    found = {setup: values for setup, metric, values in truth.measure({"all": ranks}) if metric == "mAP@100"}
    ap = average_precisions(ranks[:, :100], [e["ok"] for e in entries], k=100)
    assert np.nanmean(found["public"]) == pytest.approx(np.nanmean(ap[:10]))
    assert np.nanmean(found["private"]) == pytest.approx(ap[10:].mean())
    assert np.nanmean(found["all"]) == pytest.approx(np.nanmean(ap)) and np.isnan(found["all"][3])


def test_files_that_do_not_belong_together_are_named(checkpoint, tmp_path):
    paths = (ROXFORD / "dinov2_gallery_local.hdf5", ROXFORD / "nn_superglobal.pkl", ROXFORD / "gnd_roxford5k.pkl")
    cases = [
        ((paths[0], paths[1], DATA / "gldv2/gnd_gldv2-test.pkl"), {"lambda_": 1}, "unknown setting 'lambda_'"),
        ((DATA / "revisitop1m/dinov2_local.hdf5", paths[1], paths[2]), {}, "no query descriptors beside .*dinov2_local.hdf5"),
        ((paths[0], DATA / "gldv2/nn_dinov2.pkl", paths[2]), {}, "nn_dinov2.pkl covers .* queries"),
        ((paths[0], DATA / "roxford5k+1m/nn_superglobal.pkl", paths[2]), {}, "nn_superglobal.pkl names image"),
        ((paths[0], paths[2], paths[2]), {}, "gnd_roxford5k.pkl must hold an array"),
        ((paths[0], paths[1], paths[1]), {}, "nn_superglobal.pkl must hold a dictionary"),
        ((DATA / "elvis/dinov2_gallery_local.hdf5", paths[1], paths[2]), {"queries": ROXFORD / "dinov2_query_local.hdf5"}, "names image"),
    ]
    cases.append(((tmp_path / "cvnet_gallery_local.npy", paths[1], paths[2]), {"queries": tmp_path / "cvnet_gallery_local.npy"}, "of 1024 channels"))
    np.save(tmp_path / "cvnet_gallery_local.npy", np.zeros((9, 2, 1029), np.float32))
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            rerank_files(checkpoint, *arguments, **options)
