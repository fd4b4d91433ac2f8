"""The command line with released networks: describe, rerank, evaluate, index and search, on folders in the true layouts."""
import json
import pickle
import shlex

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import patchify.cli  # noqa: F401, adds all commands to the app
import patchify.commands.official as official
from patchify.commands.app import app
from patchify.data.registry import load
from patchify.descriptors.heads import evaluate_photos
from patchify.descriptors.official import load_raml_model, load_token_model
from patchify.descriptors.pooling import PoolHead
from patchify.descriptors.students import evaluate_asymmetric
from patchify.rerank.ames import AMES
from patchify.rerank.backbones import DINOv2, SpatialDetector
from patchify.rerank.evaluation import rerank_files
from patchify.rerank.extraction import Extractor
from patchify.rerank.locore import LOCORE

pytest.importorskip("h5py")


def run(*words, code: int = 0) -> str:
    done = CliRunner().invoke(app, shlex.split(" ".join(map(str, words))))
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def texture(kind: int, number: int) -> Image.Image:
    "One of several images of the same kind."
    base = np.random.default_rng(kind).integers(0, 256, (5, 7, 3)).repeat(20, 0).repeat(20, 1)
    noise = np.random.default_rng([kind, number]).normal(0, 60, base.shape)
    return Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Landmarks, birds and released files with random weights."
    root = tmp_path_factory.mktemp("official")
    oxford = root / "roxford5k"
    (oxford / "jpg").mkdir(parents=True)
    names = [f"b{b}_{i}" for b in range(3) for i in range(4)]
    for name in names:
        texture(int(name[1]), int(name[3])).save(oxford / "jpg" / f"{name}.jpg")
    truth = [{"bbx": [2.0, 2.0, 120.0, 90.0], "easy": [3 * b], "hard": [3 * b + 1, 3 * b + 2], "junk": []} for b in range(3)]
    content = {"gnd": truth, "imlist": [name for name in names if name[3] != "0"], "qimlist": names[::4]}
    (oxford / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    birds = root / "CUB_200_2011"
    names = [f"{c + 1:03d}.Bird_{c}/{i}.png" for c in range(4) for i in range(3)]
    for i, name in enumerate(names):
        (birds / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        texture(i // 3, i).save(birds / "images" / name)
    for file, what in (("images", str), ("image_class_labels", lambda n: int(n[:3])), ("bounding_boxes", lambda n: "0 0 140 100")):
        (birds / f"{file}.txt").write_text("".join(f"{i} {what(name)}\n" for i, name in enumerate(names, 1)))
    torch.manual_seed(0)
    tensors = DINOv2(dim=24, depth=1, heads=1, grid=3).vit.state_dict()
    tensors["register_tokens"] = tensors.pop("reg_token")
    tensors["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), tensors["pos_embed"]], 1)
    torch.save(tensors, root / "dinov2.pth")
    torch.save({"state": SpatialDetector(24).state_dict()}, root / "detector.pt")
    torch.save({"state": AMES(24, 16, heads=2, layers=1, hidden=32).state_dict()}, root / "ames.pt")
    return root


@pytest.fixture(scope="module")
def described(files):
    "Both sides of the landmarks."
    out = files / "described"
    text = run("describe --dataset", f"roxford5k:{files / 'roxford5k'}", "--checkpoint", files / "dinov2.pth", "--detector", files / "detector.pt",
               "--out", out, "--top 60 --device cpu")
    assert text.count("wrote") == 7
    return out


def test_described_images_are_reranked(files, described):
    inputs = [described / "dinov2_gallery_local.hdf5", described / "nn_dinov2.pkl", files / "roxford5k/gnd_roxford5k.pkl"]
    options = [f"--{name} {path}" for name, path in zip(("descriptors", "shortlist", "gnd"), inputs)]
    settings = "--top-k 4 --global-weight 0.2 --gain 2 --query-top 30 --gallery-top 20"
    text = run("rerank --checkpoint", files / "ames.pt", *options, settings, "--device cpu --json", files / "found.json")
    changes = dict(top_k=4, global_weight=0.2, gain=2.0, query_top=30, gallery_top=20)
    expected = rerank_files(files / "ames.pt", *inputs, **changes).to_dict()
    assert json.loads((files / "found.json").read_text()) == expected
    assert "top 4, weight 0.2, gain 2, 30 and 20 descriptors" in text
    assert {name: expected["settings"][name] for name in changes} == changes


def test_windows_and_global_descriptors_of_locore(files, described):
    pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    sizes = dict(dim=64, layers=1, heads=1, hidden=64, window=512, max_positions=5122)
    for name, dims in (("globals", dict(local_dim=24, global_dim=24)), ("locals", dict(local_dim=24))):
        safetensors.save_file(LOCORE(**dims, **sizes).state_dict(), files / f"{name}.safetensors")
    options = [f"--descriptors {described / 'dinov2_gallery_local.hdf5'}", f"--shortlist {described / 'nn_dinov2.pkl'}",
               f"--gnd {files / 'roxford5k/gnd_roxford5k.pkl'} --device cpu --query-top 4 --gallery-top 4"]
    named = " ".join(f"--{side}-globals {described / f'dinov2_{side}_global.pt'}" for side in ("query", "gallery"))
    with_names, found, cls = (files / f"{name}.json" for name in ("named", "found", "cls"))
    run("rerank --checkpoint", files / "globals.safetensors", *options, "--window 4 --stride 2", named, "--json", with_names)
    run("rerank --checkpoint", files / "globals.safetensors", *options, "--window 4 --stride 2 --json", found)
    assert found.read_text() == with_names.read_text() and json.loads(found.read_text())["settings"]["window"] == 4
    run("rerank --checkpoint", files / "globals.safetensors", *options, "--window 0", named.replace("dinov2_", "dinov2_cls_"), "--json", cls)
    assert json.loads(cls.read_text())["settings"]["window"] is None
    text = run("rerank --checkpoint", files / "locals.safetensors", *options, "--without-globals")
    assert "LOCORE" in text
    run("rerank --checkpoint", files / "locals.safetensors", *options, "--without-globals", named, code=2)


def test_class_data_sets_are_described_once(files):
    "Queries and gallery are the same images; the list of their classes is the ground truth."
    out = files / "birds"
    common = f"--checkpoint {files / 'dinov2.pth'} --detector {files / 'detector.pt'} --out {out} --top 20 --device cpu"
    run("describe --dataset", f"cub:{files / 'CUB_200_2011'}", common)
    assert sorted(path.name for path in out.glob("dinov2*hdf5")) == ["dinov2_gallery_local.hdf5"]
    inputs = f"--descriptors {out / 'dinov2_gallery_local.hdf5'} --shortlist {out / 'nn_dinov2.pkl'} --gnd {out / 'test_gallery.txt'}"
    run("rerank --checkpoint", files / "ames.pt", inputs, "--global-weight 1 --device cpu --json", out / "found.json")
    results = {row["metric"]: row["re-ranked"] for row in json.loads((out / "found.json").read_text())["results"]}
    assert {"mAP", "R@1"} <= set(results) and 0 < results["mAP"] <= 100


def test_an_interrupted_describe_goes_on(files, described, tmp_path):
    words = ["describe --dataset", f"roxford5k:{files / 'roxford5k'}", "--checkpoint", files / "dinov2.pth", "--detector", files / "detector.pt",
             "--out", tmp_path, "--top 60 --device cpu"]
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        real = Extractor.__call__
        patch.setattr(Extractor, "__call__", lambda self, *rest: real(self, *rest) if calls.append(1) or len(calls) < 6 else (_ for _ in ()).throw(KeyboardInterrupt))
        assert "goes on where it stopped" in run(*words, code=130)
    run(*words)
    names = sorted(path.name for path in described.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (described / name).read_bytes(), name


@pytest.mark.parametrize("words, message", [
    ("--checkpoint dinov2.pth", "--out is needed"),
    ("--out x", "--checkpoint is needed"),
    ("--checkpoint dinov2.pth --out x", "name images or a data set"),
    ("roxford5k/jpg --checkpoint dinov2.pth --out x --split all", "unknown --split 'all'"),
    ("none.jpg --checkpoint dinov2.pth --out x", "no such image: none.jpg"),
    ("roxford5k/jpg --checkpoint ames.pt --out x", "neither DINOv2 with registers nor CVNet"),
])
def test_mistakes_of_describe_are_one_sentence(files, monkeypatch, words, message):
    monkeypatch.chdir(files)
    text = run("describe", words, code=2)
    assert message in text and len(text.strip().splitlines()) == 1 and not (files / "x").exists()


# RAML and Token

STAGES = {"raml": ("0", "1", "4", "5", "6", "7"), "token": ("block1.0", "block1.1", "block2", "block3", "block4", "block5")}


def backbone_tensors(kind: str) -> dict:
    tensors = {}
    names = dict(zip(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), STAGES[kind]))
    for name, value in timm.create_model("resnet50", num_classes=0).state_dict().items():
        stage, _, rest = name.partition(".")
        tensors[f"backbone.{names[stage]}.{rest}"] = value
    return tensors


@pytest.fixture(scope="module")
def networks(files):
    "Files in the layout of RAML's release, and R-MAC in that of Token's."
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        torch.save({"meta": {}, "state_dict": backbone_tensors("raml") | PoolHead(2048, 512).state_dict()}, files / f"{name}.pth")
    torch.manual_seed(2)
    whiten = torch.nn.Conv2d(2048, 16, 1).state_dict()
    torch.save(backbone_tensors("token") | {f"whiten.{name}": value for name, value in whiten.items()} | {"classifier.weight": torch.zeros(3, 16)}, files / "rmac.pth")
    return files


def test_a_student_against_its_teacher(networks):
    "The asymmetric row of RAML's table, equal to the function; without a student the symmetric one."
    words = f"evaluate --dataset cub:{networks / 'CUB_200_2011'} --backbone raml --checkpoint {networks / 'teacher.pth'} --device cpu --gallery-size 64"
    run(words, "--student", networks / "student.pth", "--query-size 32 --json", networks / "asymmetric.json")
    found = json.loads((networks / "asymmetric.json").read_text())
    benchmark = load(f"cub:{networks / 'CUB_200_2011'}")
    nets = [load_raml_model(networks / f"{name}.pth") for name in ("student", "teacher")]
    expected = json.loads(json.dumps(evaluate_asymmetric(*nets, benchmark, 32, 64)))
    assert {name: found[name] for name in expected} == expected and found["published"] == {}
    assert (found["query_size"], found["gallery_size"]) == (32, 64) and len(found["provenance"]["weights"]) == 2
    run(words, "--top-k 1,2 --json", networks / "symmetric.json")
    symmetric = json.loads((networks / "symmetric.json").read_text())
    assert symmetric["query_size"] == symmetric["gallery_size"] == 64 and set(symmetric["r@k"]) == {"1", "2"}
    assert symmetric["map"] == evaluate_asymmetric(nets[1], nets[1], benchmark.under(benchmark.protocol), 64, 64)["map"]


def test_published_rows_stand_below_the_measured_ones_on_real_data_only(networks, monkeypatch):
    words = f"evaluate --dataset roxford5k:{networks / 'roxford5k'} --backbone token --checkpoint {networks / 'rmac.pth'} --device cpu"
    monkeypatch.setattr(official, "_token_row", lambda net: "R101-RMAC")
    text = run(words, "--json", networks / "token.json")
    assert "published" not in text
    found = json.loads((networks / "token.json").read_text())
    expected = evaluate_photos(load_token_model(networks / "rmac.pth"), load(f"roxford5k:{networks / 'roxford5k'}"))
    assert found["medium"] == expected["medium"] and found["hard"] == expected["hard"]
    monkeypatch.setitem(official.REAL_SIZES, "roxford5k", 9)
    assert "published   medium map 75.14, hard map 53.77" in run(words)


@pytest.mark.parametrize("row, expected", [("R50-Token", 2), ("R101-Token", 2), ("R101-RMAC", 2), ("R101-SOLAR", 0)])
def test_every_published_row_of_token_is_found(row, expected):
    class Real:
        name, gallery = "rparis6k", range(6322)

    assert len(official._published(Real, "Token", row, ("medium", "hard"))) == expected
    Real.gallery = range(6322 + 1_001_001)
    assert len(official._published(Real, "Token", row, ("medium", "hard"))) == expected


def test_the_network_names_its_row(networks):
    assert official._token_row(load_token_model(networks / "rmac.pth")) == "R50-RMAC"


@pytest.mark.parametrize("words, message", [
    ("--backbone mini --student s.pth", "belong to --backbone raml"),
    ("--backbone raml --student student.pth", "needs --checkpoint"),
    ("--backbone raml --checkpoint teacher.pth --student student.pth --index pq", "does not take"),
    ("--backbone raml --checkpoint teacher.pth --student student.pth --size 64", "does not take"),
])
def test_mistakes_with_released_networks_are_one_sentence(networks, monkeypatch, words, message):
    monkeypatch.chdir(networks)
    text = run("evaluate --dataset cub:CUB_200_2011", words, code=2)
    assert message in text and len(text.strip().splitlines()) == 1


@pytest.mark.parametrize("backbone, file", [("raml", "teacher.pth"), ("token", "rmac.pth")])
def test_a_folder_is_indexed_and_searched_with_a_released_network(networks, backbone, file, tmp_path):
    photos = networks / "roxford5k/jpg"
    words = f"--backbone {backbone} --checkpoint {networks / file} --size 64 --device cpu"
    assert "12 images x 1 patches" in run("index", photos, "--out", tmp_path / "index --level 0", words)
    text = run("search", tmp_path / "index", photos / "b1_2.jpg", "-k 1 --device cpu --checkpoint", networks / file)
    assert "b1_2.jpg" in text
    assert "needs --checkpoint" in run("search", tmp_path / "index", photos / "b1_2.jpg", code=2)
    if backbone == "raml":
        other = run("search", tmp_path / "index", photos / "b1_2.jpg", "--device cpu --checkpoint", networks / "student.pth", code=2)
        assert "made with other weights of raml" in other


# ILIAS's features (official data files)

@pytest.mark.parametrize("queries, distractors, adapted", [("image", "all", False), ("image", "mini", False), ("text", "all", False), ("image", "all", True)])
def test_published_features_are_scored_and_exported(queries, distractors, adapted, tmp_path):
    "The printed mAP is that of ILIAS's evaluator on the exported file."
    from test_ilias_export import DATA, Evaluator, positives_of

    import restricted_pickle
    from official_fill import filled
    from patchify.data.ilias_files import load_ilias_features

    words = f"evaluate --dataset ilias-features:{DATA} --queries {queries} --distractors {distractors} --device cpu"
    if adapted:
        torch.save(filled("ilias_lin_adapt"), tmp_path / "vit_large_patch16_siglip_384.webli.pth")
        words += f" --adapt {tmp_path / 'vit_large_patch16_siglip_384.webli.pth'}"
    text = run(words, "--json", tmp_path / "found.json", "--export", tmp_path / "found.pkl")
    found = json.loads((tmp_path / "found.json").read_text())
    official_reading = Evaluator(positives_of(load_ilias_features(DATA).benchmark)).evaluate(**restricted_pickle.load(tmp_path / "found.pkl"))
    assert found["map"] == pytest.approx(official_reading["map"], abs=1e-3)
    assert {"oracle", "scale", "clutter", "categories", "subcategories"} <= set(found)
    assert f"{found['map']:.2f}" in text and "oracle" in text and "clutter" in text


@pytest.mark.parametrize("words, message", [
    ("--queries images", "queries must be image or text"),
    ("--index pq", "holds descriptors"),
    ("--distractors some", "must be all, mini or none"),
])
def test_mistakes_with_features_are_one_sentence(words, message):
    from test_ilias_export import DATA

    text = run(f"evaluate --dataset ilias-features:{DATA}", words, code=2)
    assert message in text and len(text.strip().splitlines()) == 1
