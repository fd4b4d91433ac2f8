"Encoders: local weights of the paper's kinds, number types, and refusals."
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from patchify.encoder import ALIASES, load_encoder


@pytest.mark.parametrize("name", ALIASES)
def test_the_aliases_name_models_with_pretrained_weights(name):
    assert timm.get_pretrained_cfg(ALIASES[name], allow_unregistered=False).hf_hub_id


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
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: (_ for _ in ()).throw(ConnectionError("no network")))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    with pytest.raises(ValueError, match="--checkpoint FILE"):
        load_encoder("siglip")


def test_the_shipped_encoder_is_small_and_says_what_it_is():
    encoder = load_encoder("mini", device="cpu")
    assert sum(p.numel() for p in encoder.model.parameters()) <= 6_000_000
    assert encoder.size <= 160 and encoder.notes == "shipped"
