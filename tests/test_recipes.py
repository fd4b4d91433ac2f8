"""Training recipes as published, sentence by sentence, and brief runs on folders in the true layout."""
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from patchify.descriptors import views
from patchify.descriptors.heads import labelled_crops
from patchify.descriptors.raml import PRESETS, distillation_step
from patchify.descriptors.training import image_batches, published_token_plan, train_network
from patchify.learn import train
from patchify.rerank.locore import LOCORE
from patchify.rerank.locore_training import locore_step, published_locore_plan, start_from_longformer
from patchify.rerank.official import load_landmarks
from patchify.data.classes import load_gldv2_train

NOTEBOOKS = Path(__file__).parent.parent / "nbs"


def landmarks(root: Path, labels: int = 4, each: int = 4) -> Path:
    "A folder in the layout of GLDv2's clean training images."
    lines = ["landmark_id,images"]
    for label in range(labels):
        names = [f"{label:x}{i:x}0{label}{i}" for i in range(each)]
        lines.append(f"{label + 100},{' '.join(names)}")
        for i, name in enumerate(names):
            path = root / "train" / name[0] / name[1] / name[2] / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([label, i]).integers(0, 60 * (label + 1), (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    (root / "train_clean.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return labelled_crops(load_gldv2_train(landmarks(tmp_path_factory.mktemp("gldv2"))))


# Token (MCC-WH/Token, revision 450090b)

def test_colours_of_token(crops, monkeypatch):
    "Brightness and contrast change by up to 40 %, saturation by up to 20 %, hue by up to 10 %, in four views of five."
    drawn = []

    def spy(*arguments, **options):
        drawn.append(draw(*arguments, **options))
        return drawn[-1]

    draw = views.draw_views
    monkeypatch.setattr(views, "draw_views", spy)
    load_batch = image_batches(crops, 8, batch=16)
    for number in range(30):
        load_batch(number, np.random.default_rng(number))
    colours = np.concatenate([each.colours for each in drawn])
    changed = colours[(colours != [1, 1, 1, 0]).any(1)]
    assert 0.72 < len(changed) / len(colours) < 0.88
    spread = np.abs(changed - [1, 1, 1, 0]).max(0)
    limits = np.array([0.4, 0.4, 0.2, 0.1])
    assert (spread <= limits).all() and (spread > 0.95 * limits).all()


class Recorder(nn.Module):
    "A batch norm over colours, so that its running mean tells which images it saw together."

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=None)               # the plain average over batches
        self.linear = nn.Linear(3, 4)
        self.counts = []

    def forward(self, images):
        self.counts.append(len(images))
        return self.linear(self.norm(images.mean((2, 3))))


def test_all_images_of_a_step_share_their_batch_norm(crops):
    "128 images by default, read at once: the statistics of synchronised batch norms over four GPUs of 32."
    torch.manual_seed(0)
    plan = replace(published_token_plan(len(crops)), steps=1)
    net = Recorder()
    train_network(net, crops, 4, plan, size=8)
    assert net.counts == [128]
    rng = np.random.default_rng([plan.seed, 0])
    rng.integers(2**62)                                            # the loop seeds dropout with it
    images, _ = image_batches(crops, 8, 128, seed=plan.seed)(0, rng)
    colours = images.mean((2, 3))
    torch.testing.assert_close(net.norm.running_mean, colours.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(net.norm.running_var, colours.var(0), atol=1e-6, rtol=0)


def test_momentum_and_decay_of_token(monkeypatch):
    "SGD with Nesterov's momentum 0.9; parameters of one dimension do not decay."
    made = []
    plain = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **options: made.append((args, options)) or plain(*args, **options))
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    plan = replace(published_token_plan(256), steps=1, accumulate=1)
    train(net, lambda draw, rng: net(torch.rand(8, 3)).square().sum(), plan)
    (groups,), options = made[0]
    assert options["momentum"] == 0.9 and options["nesterov"]
    assert {len(group["params"]): group["weight_decay"] for group in groups} == {1: 1e-4, 3: 0.0}


@pytest.mark.parametrize("notebook, model, file", [
    ("descriptors/48_training.ipynb", "resnet101.tv_in1k", "resnet101-63fe2227.pth"),
    ("descriptors/45_raml.ipynb", "resnet50.tv_in1k", "resnet50-0676ba61.pth"),
])
def test_published_runs_start_from_torchvision_weights(notebook, model, file):
    "The weights that torchvision calls IMAGENET1K_V1."
    cells = json.loads((NOTEBOOKS / notebook).read_text())["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"]]
    assert any(f'timm.create_model("{model}", pretrained=True' in line for line in lines)
    assert timm.get_pretrained_cfg(model).url == f"https://download.pytorch.org/models/{file}"
    from torchvision.models import ResNet50_Weights, ResNet101_Weights
    weights = {"resnet101.tv_in1k": ResNet101_Weights, "resnet50.tv_in1k": ResNet50_Weights}[model]
    assert weights.IMAGENET1K_V1.url.endswith(file)


# RAML (pavelsuma/raml, revision ea0f00f)

@pytest.mark.parametrize("images, used", [(60, 60), (210, 200)])
def test_an_epoch_of_raml_uses_each_image_once_up_to_its_limit(images, used):
    "The limit is 8000 images; here it is 200."
    assert {preset.images_per_epoch for preset in PRESETS.values()} == {8000}
    preset = replace(PRESETS["cub"], query_size=4, gallery_size=4, views=2, batch=4, accumulate=5, images_per_epoch=200)
    opened = []

    def look(index):
        opened.append(index)
        return Image.new("RGB", (6, 6))

    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    step = distillation_step(net, net, look, images, preset, mix=None)
    plan = preset.plan(images)
    assert plan.steps == 200 * used // 20 and plan.accumulate == 5
    for draw in range(used // 4):
        step(draw, np.random.default_rng(draw))
    assert len(opened) == len(set(opened)) == used


# LOCORE (MrZilinXiao/LongContextReranker, revision 00b2e8b)

def official_training_files(folder: Path, classes: int = 8, each: int = 4, dim: int = 16, count: int = 3) -> Path:
    "train_750k.txt, dinov2_local.hdf5, dinov2_global.pt and nn_dinov2.pkl, as the extraction writes them."
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    n = len(labels)
    shared = rng.normal(size=(classes, dim))
    lines = [f"train/{i:04d}.jpg,{label + 7},640,480" for i, label in enumerate(labels)]
    (folder / "train_750k.txt").write_text("\n".join(lines) + "\n")
    table = np.zeros((n, count, 5 + dim), np.float32)
    table[..., 5:] = shared[labels][:, None] + 0.2 * rng.normal(size=(n, count, dim))
    with h5py.File(folder / "dinov2_local.hdf5", "w") as file:
        file.create_dataset("features", data=table)
    vectors = (shared[labels] + rng.normal(size=(n, dim))).astype(np.float32)
    vectors.tofile(folder / "dinov2_global.pt")
    scores = vectors @ vectors.T
    order = np.argsort(-scores + 1e6 * np.eye(n), axis=1, kind="stable")[:, :-1]
    (folder / "nn_dinov2.pkl").write_bytes(pickle.dumps(np.stack([np.take_along_axis(scores, order, 1), order]).astype(np.float64)))
    return folder


def longformer(dim: int) -> dict:
    "Tensors of a small Longformer of `transformers`."
    from transformers import LongformerConfig, LongformerModel

    config = LongformerConfig(hidden_size=dim, num_hidden_layers=1, num_attention_heads=2, attention_window=[16], intermediate_size=32,
                              vocab_size=5, max_position_embeddings=34, type_vocab_size=1)
    return LongformerModel(config, add_pooling_layer=False).state_dict()


def test_the_published_run_of_locore_on_its_files(tmp_path):
    "From a pretrained Longformer, 256 lists per step at a constant rate; every image is a query once per epoch."
    pytest.importorskip("transformers")
    files = official_training_files(tmp_path)
    world = load_landmarks(files / "dinov2_local.hdf5", files / "train_750k.txt", files / "nn_dinov2.pkl", top=2, summary=files / "dinov2_global.pt")
    torch.manual_seed(0)
    model = LOCORE(local_dim=16, global_dim=16, dim=16, layers=1, heads=2, hidden=32, window=16, max_positions=66).train()
    start_from_longformer(model, longformer(16))
    plan = published_locore_plan(len(world.instance), batch=64, epochs=24)
    assert (plan.steps, plan.accumulate, plan.learning_rate, plan.clip, plan.weight_decay) == (3, 4, 5e-5, 1.0, 0.0)
    asked = []

    class Spy:
        "The gallery, with the queries of all lists on record."
        take = lambda self, ids: asked.append(int(ids[0])) or world.gallery.take(ids)
        __len__ = lambda self: len(world.gallery)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = locore_step(model, Spy(), world.instance, world.first.ranks, plan, batch=64, length=5)
    losses = train(model, step, plan, tmp_path / "locore.safetensors")
    assert len(losses) == 3 and np.isfinite(losses).all() and len(asked) == 3 * 256
    for epoch in np.array(asked).reshape(-1, 32):
        assert sorted(epoch) == list(range(32))
    moved = max(float((value - before[name]).abs().max()) for name, value in model.state_dict().items())
    assert 0 < moved <= 3.01 * 5e-5, "AdamW moves a weight by the rate at most, at every step"


def test_gradients_of_locore_are_averaged_and_limited():
    "Four batches count as one of four times the size."
    plan = published_locore_plan(1024, batch=64)
    weight = nn.Parameter(torch.zeros(3))
    module = nn.Module()
    module.weight = weight
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = torch.optim.AdamW.step
        patch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: seen.append(weight.grad.clone()) or real(self, closure))
        train(module, lambda *_: (10 * weight).sum() / plan.accumulate, replace(plan, steps=1))
        train(module, lambda *_: (0.1 * weight).sum() / plan.accumulate, replace(plan, steps=1))
    assert float(seen[0].norm()) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(seen[1], torch.full((3,), 0.1))
