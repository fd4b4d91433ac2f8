"Encoders: names, local weights, input sizes, number types, and one-sentence errors."
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from patchify.encoder import ALIASES, ILIAS_SIZES, MINI_WEIGHTS, Encoder, load_encoder, weights_of
from patchify.pyramid import cut_patches

DRY_RUN = dict(random_weights=True, device="cpu", dtype=torch.float32)


@pytest.fixture
def shallow(monkeypatch):
    "timm transformers with a single block, so that large models are built quickly."
    create = timm.create_model

    def create_shallow(name, **options):
        return create(name, depth=1, **options)

    monkeypatch.setattr(timm, "create_model", create_shallow)


@pytest.mark.parametrize("name", ALIASES)
def test_the_aliases_name_models_with_pretrained_weights(name):
    assert timm.get_pretrained_cfg(ALIASES[name], allow_unregistered=False).hf_hub_id


@pytest.mark.parametrize("name, size, dim", [
    ("siglip", 64, 1024), ("dinov2", 56, 1024), ("clip", 56, 768), ("dinov3", 64, 1024), ("siglip2", 64, 1024), ("pe", 56, 1024),
    ("tips", 56, 1024), ("radio", 64, 1024)])
def test_an_alias_runs_at_another_size(shallow, name, size, dim):
    encoder = load_encoder(name, size=size, **DRY_RUN)
    images = torch.rand(2, 3, size, size)
    cfg = timm.get_pretrained_cfg(ALIASES[name])
    assert encoder(images).shape == (2, dim) and encoder.feature_map(images).shape == (2, 1024, 4, 4)
    assert encoder.mean == tuple(cfg.mean) and encoder.std == tuple(cfg.std)
    assert encoder.licence is None


@pytest.mark.parametrize("name, dim", [
    ("vit_base_patch16_clip_224.openai", 512), ("vit_base_patch16_clip_224.openai_ft_in1k", 768),
    ("vit_base_patch16_clip_224.laion2b_ft_in12k_in1k", 768), ("vit_base_patch16_siglip_224.webli", 768), ("eva02_base_patch16_clip_224.merged2b", 512)])
def test_only_models_trained_with_text_keep_their_projection(shallow, name, dim):
    assert load_encoder(name, size=64, **DRY_RUN).dim == dim


def test_a_projection_is_read_from_a_file_and_changes_the_fingerprint(shallow, tmp_path):
    name = "vit_base_patch16_clip_224.openai"
    encoder = load_encoder(name, size=64, **DRY_RUN)
    state = timm.create_model(name).state_dict()
    prints = []
    for scale in (1, 2):
        state["head.weight"] *= scale
        save_file(state, tmp_path / "clip.safetensors")
        loaded = load_encoder(name, tmp_path / "clip.safetensors", size=64, device="cpu", dtype=torch.float32)
        prints.append(loaded.fingerprint)
    assert len({*prints, encoder.fingerprint}) == 3 and loaded.licence == "apache-2.0"
    del state["head.weight"]
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="head.weight .*is missing in .*clip.safetensors"):
        load_encoder(name, tmp_path / "clip.safetensors", device="cpu")


def test_another_size_interpolates_the_position_embeddings_of_a_file(tmp_path):
    "The same as timm's own resizing when it loads weights for another size."
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    create = timm.create_model
    reference = create("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=96, pretrained_cfg_overlay=dict(file=str(tmp_path / "vit.safetensors")), pretrained=True)
    try:
        timm.create_model = lambda name, **options: create(name, depth=1, **options)
        encoder = load_encoder("vit_tiny_patch16_224", tmp_path / "vit.safetensors", size=96, device="cpu", dtype=torch.float32)
    finally:
        timm.create_model = create
    assert torch.allclose(encoder.model.pos_embed, reference.pos_embed, atol=1e-6)
    native = Encoder(model, "vit", 224, encoder.mean, encoder.std, dtype=torch.float32)
    assert encoder.fingerprint != native.fingerprint


@pytest.mark.parametrize("name, size, message", [
    ("test_vit", 100, "patches have 16 pixels: choose 96 or 112"), ("test_vit", 5, "choose 16 or 32"), ("test_vit", 0, "size 0 is no input size: choose one from 1 to 4096 pixels"),
    ("resnet10t", -3, "size -3")])
def test_a_size_that_does_not_suit_is_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(name, size=size, **DRY_RUN)


def test_padding_is_the_mean_colour_and_part_of_the_fingerprint():
    stretched = load_encoder("test_resnet", **DRY_RUN)
    padded = load_encoder("test_resnet", aspect="pad", **DRY_RUN)
    assert stretched.padding is None and stretched.fingerprint != padded.fingerprint
    patch = cut_patches(Image.new("RGB", (40, 10), "red"), [[0, 0, 40, 10]], 32, padding=padded.padding)
    mean = torch.tensor(padded.mean).view(3, 1, 1)
    assert (patch[0, :, 0] / 255 - mean[:, 0]).abs().max() <= 0.51 / 255
    assert (patch[0, 0, 12:20] == 255).all()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "test_vit"])
def test_a_saved_model_describes_as_the_model_does(tmp_path, name):
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = load_encoder(name, tmp_path / "model.safetensors", device="cpu", dtype=torch.float32)
    images = torch.rand(2, 3, encoder.size, encoder.size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.forward_head(model.forward_features((images - mean) / std), pre_logits=True))
    assert torch.allclose(encoder(images), expected, atol=1e-4)


@pytest.mark.parametrize("spoil, message", [
    (lambda state: state.pop("conv1.0.weight"), "conv1.0.weight .*missing"), (lambda state: state.update(extra=torch.ones(1)), "extra is in"),
    (lambda state: state.update({"conv1.0.weight": torch.ones(3)}), "has shape"),
    (lambda state: state["conv1.0.weight"].view(-1)[5:6].fill_(np.inf), "NaN or infinity")])
def test_a_file_that_nearly_fits_is_refused_with_its_name(tmp_path, spoil, message):
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    spoil(state)
    save_file(state, tmp_path / "near.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder("resnet10t", tmp_path / "near.safetensors", device="cpu")
    assert "near.safetensors" in str(caught.value)


def test_a_mini_checkpoint_is_checked_too(tmp_path):
    damaged = tmp_path / "mini.safetensors"
    damaged.write_bytes(MINI_WEIGHTS.read_bytes()[:-4])
    with pytest.raises(ValueError, match="mini.safetensors: it is missing, damaged"):
        load_encoder("mini", damaged)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(MINI_WEIGHTS.read_bytes())
    shipped = load_encoder("mini", device="cpu")
    loaded = load_encoder("mini", copy, device="cpu")
    assert loaded.fingerprint == shipped.fingerprint and loaded.notes == "file copy.safetensors" and loaded.licence is None
    assert weights_of(loaded) == loaded.fingerprint != weights_of(shipped)


def test_names_are_checked_before_anything_is_built():
    for name, message in [("siglib", "did you mean siglip"), ("resnet10x", "did you mean"), ("resnet10t.c3", "unknown weights"), ("zzzz", "choose mini, siglip")]:
        with pytest.raises(ValueError, match=message):
            load_encoder(name)


def test_an_alias_that_an_old_timm_lacks_says_so(monkeypatch):
    monkeypatch.setattr(timm, "is_model", lambda name: False)
    with pytest.raises(ValueError, match="pip install -U timm"):
        load_encoder("tips")


def test_a_folded_network_computes_the_same():
    torch.manual_seed(1)
    net = timm.create_model("resnet10t", num_classes=0).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(net((images - 0.5) / 0.2))
    encoder = Encoder(net, "net", 64, (0.5,) * 3, (0.2,) * 3, dtype=torch.float32)
    assert not any(type(module) is torch.nn.BatchNorm2d for module in encoder._folded.modules())
    assert torch.allclose(encoder(images), expected, atol=1e-4)


def test_code_inside_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    with pytest.raises(ValueError, match="evil.pth"):
        load_encoder("resnet10t", tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_that_cannot_be_fetched_say_how_to_go_on(monkeypatch):
    def no_network(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    with pytest.raises(ValueError, match="--checkpoint FILE"):
        load_encoder("siglip")
    with pytest.raises(ValueError, match="no weights are published"):
        load_encoder("coatnet_nano_cc_224")


def test_the_shipped_encoder_is_small_and_says_what_it_is():
    encoder = load_encoder("mini", device="cpu")
    assert sum(p.numel() for p in encoder.model.parameters()) <= 6_000_000
    assert encoder.size <= 160 and encoder.notes == "shipped" and encoder.licence == "apache-2.0"


@pytest.mark.parametrize("name", ILIAS_SIZES)
def test_an_alias_runs_at_the_size_of_the_ilias_protocol(shallow, name):
    size = ILIAS_SIZES[name]
    encoder = load_encoder(name, size=size, **DRY_RUN)
    assert encoder(torch.rand(1, 3, size, size)).shape == (1, 1024) and encoder.size == size


def test_an_image_tower_of_open_clip_describes_as_open_clip_does(shallow, tmp_path):
    "QuickGELU, the projection and the names of the tensors, for CLIP as OpenAI released it."
    open_clip = pytest.importorskip("open_clip", reason="needs the extra [text]")
    torch.manual_seed(2)
    image = {"image_size": 224, "layers": 1, "width": 768, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(512, image, text, quick_gelu=True).eval()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "towers.safetensors")
    name = "vit_base_patch16_clip_quickgelu_224.openai"
    encoder = load_encoder(name, tmp_path / "towers.safetensors", device="cpu", dtype=torch.float32)
    images = torch.rand(2, 3, 224, 224)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (encoder.mean, encoder.std))
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.encode_image((images - mean) / std), dim=1)
    assert torch.allclose(encoder(images), expected, atol=1e-4)
