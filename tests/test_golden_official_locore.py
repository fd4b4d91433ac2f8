"""Released LOCORE models: filled checkpoints, saved as one flat file, load strictly and give the official scores."""
import json
import zlib

import numpy as np
import pytest
import torch
from official_fill import FOLDER, Official, fill, filled, normal
from safetensors.torch import save_file

from patchify.rerank.locore import AGGREGATIONS, LOCORE, aggregate, load_locore
from patchify.rerank.shortlist import Descriptors

pytest.importorskip("transformers")
NAME = "locore_dinov2_base"


@pytest.fixture(scope="module")
def golden():
    return Official(NAME)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp(NAME) / "model.safetensors"
    save_file(filled(NAME), file)
    filled.cache_clear()
    loaded = load_locore(file)
    file.unlink()
    return loaded


def stack(arrays, name):
    "The query in front of the gallery, without the batch axis."
    return torch.cat([torch.as_tensor(arrays[f"query_{name}"]), torch.as_tensor(arrays[f"gallery_{name}"])[0]])


def as_list(arrays) -> Descriptors:
    "One list of the official inputs; their masks mark padding by 1."
    summary = stack(arrays, "global_features")[:, 0].float()
    return Descriptors(stack(arrays, "local_features").float(), stack(arrays, "local_mask") == 0, stack(arrays, "local_scales"), summary)


def full_list(info) -> dict[str, np.ndarray]:
    "The inputs of the full list by the recipe of the goldens, checked against their check sums."
    salt, shapes = f"{info['salt']}/locore_input", info["full_inputs"]["checks"]
    arrays = {}
    for kind in ("local", "global"):
        query, gallery = (normal(salt, f"full.{side}_{kind}", shapes[f"{side}_{kind}_features"]["shape"]) for side in ("query", "gallery"))
        for g in range(0, gallery.shape[1], 3):
            if kind == "local":
                gallery[0, g, :8] = 0.8 * query[0, :8] + 0.6 * gallery[0, g, :8]
            else:
                gallery[0, g] = 0.7 * query[0] + 0.7 * gallery[0, g]
        for side, values in (("query", query), ("gallery", gallery)):
            arrays[f"{side}_{kind}_features"] = (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float16)
    for side in ("query", "gallery"):
        for part in ("scales", "mask"):
            arrays[f"{side}_local_{part}"] = np.zeros(shapes[f"{side}_local_{part}"]["shape"], np.int64)
    arrays["query_local_mask"][0, -2:] = 1
    gallery_mask = arrays["gallery_local_mask"][0]
    gallery_mask[7, -10:] = gallery_mask[50] = gallery_mask[99, -1:] = 1
    for name, expected in shapes.items():
        first = arrays[name].ravel()[:3].astype(np.float64)
        np.testing.assert_allclose(first, expected["first"], rtol=2e-3, err_msg=name)
        if "features" not in name:                                  # one rounding to float16 may differ on another machine
            assert f"{zlib.crc32(arrays[name].tobytes()):08x}" == expected["crc32"], name
    return arrays


def test_the_architecture_is_read_off_the_tensors(model, golden):
    config = golden.info["config"]
    listed = json.loads((FOLDER / golden.info["keys"]).read_text())
    encoder = model.language_model.longformer.encoder
    assert sum(p.numel() for p in model.parameters()) == listed["parameters"]
    assert encoder.layer[0].attention.self.num_heads == config["num_attention_heads"]
    assert (len(encoder.layer), model.window) == (config["num_hidden_layers"], int(config["attention_window"].split()[2].strip(",")))
    assert (model.positions, model.query_global) == (config["pos_type"], config["query_global_attention"])


@torch.no_grad()
def test_a_short_list_with_mixed_scales_and_padding(model, golden):
    logits = model([as_list(golden.arrays)])
    for mode in AGGREGATIONS:
        golden.check(mode, aggregate(logits, mode))


@torch.no_grad()
def test_the_full_list_of_a_hundred_images(model, golden):
    logits = model([as_list(full_list(golden.info))])
    for mode in AGGREGATIONS:
        if f"full.{mode}" in golden.listed:
            golden.check(f"full.{mode}", aggregate(logits, mode))


@pytest.mark.parametrize("name", ["locore_cvnet_base", "locore_dinov2_small"])
def test_the_other_released_structures_load_strictly(name, tmp_path):
    "Key lists with their true shapes; one layer is filled and checked, the others repeat its tensors."
    listed = json.loads((FOLDER / "keys" / f"{name}.json").read_text())
    weights = {}
    for key, shape, _, crc in listed["keys"]:
        repeated = "encoder.layer." in key and ".layer.0." not in key
        if repeated:
            weights[key] = weights[".layer.0.".join([key.split(".layer.")[0], key.split(".", 5)[5]])].clone()
            continue
        array = fill(listed["fill_salt"], key, shape)
        assert f"{zlib.crc32(array.tobytes()):08x}" == crc
        weights[key] = torch.as_tensor(array)
    save_file(weights, tmp_path / "model.safetensors")
    model = load_locore(tmp_path / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) == listed["parameters"]
    sides = {key.split("_")[0]: shape[1] for key, shape, *_ in listed["keys"] if key.endswith("_to_lm.weight")}
    width = weights["scale_encoder.weight"].shape[1]
    assert (model.local_dim, model.global_dim) == (sides.get("local", width), sides.get("global", width))
    images = Descriptors(torch.randn(3, 2, model.local_dim), torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.int64),
                         torch.randn(3, model.global_dim))
    with torch.no_grad():
        logits = model([images])
        assert logits.shape == (1, 3, 4, 2)
        torch.testing.assert_close(logits, as_the_verified_structure(weights, images))


def as_the_verified_structure(weights, images):
    """Logits by way of the structure whose outputs the golden confirms, twelve layers without projections.

    Descriptors are projected before, and the layers that a small model lacks are cut off again."""
    prefix = "language_model.longformer.encoder.layer."
    layers = 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix))
    base = {key: value for key, value in weights.items() if "_to_lm" not in key}
    for number in range(layers, 12):
        base |= {key.replace(f"{prefix}0.", f"{prefix}{number}."): value for key, value in weights.items() if key.startswith(f"{prefix}0.")}
    model = load_locore(base)
    encoder = model.language_model.longformer.encoder
    encoder.layer = encoder.layer[:layers]

    def project(side, values):
        matrix = weights.get(f"{side}_to_lm.weight")
        return values if matrix is None else values @ matrix.T + weights[f"{side}_to_lm.bias"]

    return model([Descriptors(project("local", images.values), images.valid, images.scales, project("global", images.summary))])


def test_the_scratch_variant_loads():
    "6 layers of width 256 with 8 heads, and projections on both sides."
    sizes = dict(local_dim=768, global_dim=768, dim=256, layers=6, hidden=1024, max_positions=66, window=32)
    original = LOCORE(**sizes, heads=8).eval()
    copy = load_locore(original.state_dict(), window=32)
    images = Descriptors(torch.randn(3, 2, 768), torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.int64), torch.randn(3, 768))
    with torch.no_grad():
        assert torch.equal(copy([images]), original([images]))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "tanh"])
def test_the_bottleneck_variants_load(activation):
    "Two linear layers in a row, or with an activation between them; each kind has its own tensor names."
    sizes = dict(local_dim=12, global_dim=12, dim=16, layers=1, heads=2, hidden=16, max_positions=66, window=32)
    original = LOCORE(**sizes, bottleneck=5, activation=activation).eval()
    last = "1" if activation is None else "2"
    assert {name for name in original.state_dict() if name.startswith("local_to_lm")} == {
        f"local_to_lm.{i}.{part}" for i in ("0", last) for part in ("weight", "bias")}
    copy = load_locore(original.state_dict(), heads=2, window=32, **({"activation": activation} if activation else {}))
    images = Descriptors(torch.randn(3, 2, 12), torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.int64), torch.randn(3, 12))
    with torch.no_grad():
        assert torch.equal(copy([images]), original([images]))


def test_a_projection_between_equal_dimensions_loads():
    sizes = dict(local_dim=16, global_dim=16, dim=16, layers=1, heads=2, hidden=16, max_positions=66, window=32)
    copy = load_locore(LOCORE(**sizes, always_project=True).state_dict(), heads=2, window=32)
    assert copy.local_to_lm.weight.shape == copy.global_to_lm.weight.shape == (16, 16)


def test_a_missing_tensor_is_named(tmp_path):
    weights = LOCORE(local_dim=12, dim=16, layers=2, heads=2, hidden=16, max_positions=66, window=32).state_dict()
    save_file({name: tensor for name, tensor in weights.items() if not name.endswith("layer.1.output.dense.bias")}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.bias.*missing in .*model\.safetensors"):
        load_locore(tmp_path / "model.safetensors", heads=2, window=32)
