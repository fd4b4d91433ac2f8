"""Descriptors from feature maps: invariances, checkpoints, gradients and the errors a user meets."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from patchify.descriptors.network import DescriptorNet, FeatureMap, IMAGE_SCALES, limit_size, multiscale
from patchify.descriptors.pooling import POOLINGS, PoolHead, gem, mac, power_law, rmac, rmac_regions, spoc, unit
from patchify.descriptors.token import ArcFace, TokenAttention, TokenHead, load_token_head, token_maps, tokenize
from patchify.files import load_strict, read_weights

SMALL = dict(in_channels=6, dim=5, mid_dim=8, n_tokens=3, heads=2)


def trained(seed=0, **changes):
    "A small head whose attentions are not silent."
    torch.manual_seed(seed)
    head = TokenHead(**SMALL | changes)
    for module in head.modules():
        if isinstance(module, TokenAttention):
            nn.init.normal_(module.proj.weight, std=0.3)
    return head.eval()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 4))
def test_regions_stay_inside_and_cover_the_ends(height, width, levels):
    for top, left, side in rmac_regions(height, width, levels):
        assert 0 <= top and 0 <= left and 1 <= side and top + side <= height and left + side <= width
    full = rmac_regions(height, width, 1)
    assert (0, 0) in {(top, left) for top, left, _ in full}
    assert max(left + side for _, left, side in full) == width
    assert max(top + side for top, _, side in full) == height


@pytest.mark.parametrize("height, width", [(7, 10), (10, 7), (5, 20), (12, 12), (2, 9)])
def test_regions_agree_with_the_authors_formula(height, width):
    "Positions by the formula of the official code: centres, rounded down."
    expected = []
    short = min(height, width)
    overlaps = [abs(1 - (max(height, width) - short) / (n * short) - 0.4) for n in range(1, 7)]
    extra = overlaps.index(min(overlaps)) + 1 if height != width else 0
    for level in (1, 2, 3):
        side = math.floor(2 * short / (level + 1))
        half = math.floor(side / 2 - 1)
        starts = []
        for length, more in ((height, extra * (height > width)), (width, extra * (width > height))):
            count = level + more
            step = (length - side) / (count - 1) if count > 1 else 0
            starts.append([math.floor(half + i * step) - half for i in range(count)])
        expected += [(top, left, side) for top in starts[0] for left in starts[1] if side]
    assert rmac_regions(height, width) == expected


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 8), st.floats(1, 8), st.integers(0, 100))
def test_gem_grows_with_its_exponent_between_mean_and_maximum(p, q, seed):
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = gem(x, min(p, q)), gem(x, max(p, q))
    assert (low <= high + 1e-9).all() and (spoc(x) <= low + 1e-9).all() and (high <= mac(x) + 1e-9).all()


def test_pools_have_finite_gradients_on_an_empty_map():
    for name in POOLINGS:
        x = torch.zeros(2, 4, 5, 5, requires_grad=True)
        head = PoolHead(4, 3, name)
        head(x).sum().backward()
        assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None), name
    y = torch.zeros(2, 4, requires_grad=True)
    power_law(y).sum().backward()
    assert y.grad.isfinite().all() and unit(torch.zeros(1, 3)).isfinite().all()


def test_whitening_can_be_left_out_and_unknown_pools_are_named():
    assert PoolHead(4, None)(torch.rand(2, 4, 3, 3)).shape == (2, 4)
    with pytest.raises(ValueError, match="median"):
        PoolHead(4, pool="median")


def test_attention_shares_sum_over_tokens_not_positions():
    tokens, shares = tokenize(torch.randn(2, 7, 8), torch.randn(1, 3, 8))
    assert tokens.shape == (2, 3, 8) and torch.allclose(shares.sum(1), torch.ones(2, 7))
    assert not torch.allclose(shares.sum(2), torch.ones(2, 3))


@pytest.mark.parametrize("n_tokens", range(1, 9))
def test_any_number_of_tokens(n_tokens):
    head = trained(n_tokens=n_tokens)
    x = torch.rand(2, 6, 4, 3)
    order = torch.randperm(12)
    moved = x.flatten(2)[:, :, order].view_as(x)
    assert torch.allclose(head(x), head(moved), atol=1e-5)
    assert head.stages(x).attention.shape == (2, n_tokens, 12)


def test_order_of_tokens_matters_only_through_the_projection():
    head, x = trained(), torch.rand(2, 6, 4, 3)
    before = head.stages(x)
    head.query.data = head.query.data.flip(1)
    after = head.stages(x)
    assert torch.allclose(after.refined, before.refined.flip(1), atol=1e-5)
    assert not torch.allclose(after.output, before.output, atol=1e-3)


def test_images_do_not_see_each_other_in_eval_mode():
    head, x = trained(), torch.rand(3, 6, 4, 3)
    assert torch.allclose(head(x)[1:2], head(x[1:2]), atol=1e-5)


def test_every_parameter_gets_a_gradient():
    head = trained().train()
    face = ArcFace(5, 4)
    F.cross_entropy(face(head(torch.rand(8, 6, 4, 3)), torch.arange(8) % 4), torch.arange(8) % 4).backward()
    assert not [name for name, p in head.named_parameters() if p.grad is None]


def test_training_is_seeded():
    head, x = trained().train(), torch.rand(4, 6, 4, 3)
    torch.manual_seed(3)
    first = head(x)
    torch.manual_seed(3)
    assert torch.equal(head(x), first)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t}, lambda t: {"state": {f"module.{k}": v for k, v in t.items()}}])
def test_checkpoints_of_torch_load(tmp_path, wrap):
    head = trained()
    torch.save(wrap({f"tr.{k}": v for k, v in head.state_dict().items()}), tmp_path / "model.pth")
    loaded = load_token_head(tmp_path / "model.pth", heads=2)
    x = torch.rand(2, 6, 4, 3)
    assert torch.equal(loaded(x), head(x)) and not loaded.training


def test_pickles_with_code_are_refused(tmp_path):
    torch.save({"state_dict": nn.Linear(2, 2)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="could run code"):
        read_weights(tmp_path / "model.pth")


@pytest.mark.parametrize("damage, message", [
    (lambda t: t.pop("decoder.1.cross_attn.v.bias"), "decoder.1.cross_attn.v.bias .* missing"),
    (lambda t: t.update(stray=torch.zeros(2)), "stray is in the weights"),
    (lambda t: t.update({"token_norm.1.weight": torch.zeros(9)}), r"token_norm.1.weight has shape \(9,\)"),
    (lambda t: t.pop("query"), "query is missing")])
def test_a_mismatch_names_the_tensor(damage, message):
    tensors = trained().state_dict()
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        load_token_head(tensors, heads=2)


def test_load_strict_does_not_touch_the_module_on_a_mismatch():
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match="bias"):
        load_strict(module, {"weight": torch.ones(2, 2)})
    assert torch.equal(module.weight, before)


def test_arcface_ignores_length_and_has_no_gradient_where_it_clamps():
    face = ArcFace(3, 2)
    face.weight.data = torch.eye(3)[:2]
    x = torch.tensor([[5.0, 0, 0]], requires_grad=True)
    face(x, torch.tensor([0]))[0, 0].backward()
    assert not x.grad.any()
    y = torch.randn(4, 3)
    assert torch.allclose(face(y, torch.tensor([0, 1, 0, 1])), face(9 * y, torch.tensor([0, 1, 0, 1])), atol=1e-4)


class Strided(nn.Module):
    "Stands in for a convolutional timm model of stride 8."
    num_features, feature_info = 3, [{"reduction": 8}]

    def forward_features(self, x):
        return F.avg_pool2d(x, 8)


def test_backbone_normalises_and_refuses_images_below_its_stride():
    backbone = FeatureMap(Strided(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert torch.allclose(backbone(torch.full((1, 3, 16, 24), 0.75)), torch.ones(1, 3, 2, 3))
    with pytest.raises(ValueError, match="30 x 7 pixels .* stride of 8"):
        backbone(torch.rand(1, 3, 7, 30))


FAMILIES = ["lcnet_035", "efficientnet_b0", "test_vit", "swin_tiny_patch4_window7_224"]
FAMILIES += ["pvt_v2_b0", "xcit_nano_12_p16_224", "hiera_tiny_224", "volo_d1_224"]


def reference_shape(model, size):
    "Rows and columns of the map by timm's own forward_intermediates."
    return model.forward_intermediates(torch.zeros(1, 3, size, size), indices=1, intermediates_only=True)[-1].shape[2:]


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_of_every_family_of_backbones(name):
    "Channels first or last, a grid or a row of tokens, with class tokens or without: a map with one cell for each stride."
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    backbone = FeatureMap(model).eval()
    size = model.default_cfg["input_size"][-1]
    side = size // backbone.stride
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, size, size))
        if hasattr(model, "forward_intermediates"):
            assert reference_shape(model, size) == (side, side)
    assert maps.shape == (1, backbone.channels, side, side)


def test_describe_restores_the_mode_and_gives_unit_rows():
    net = DescriptorNet(FeatureMap(Strided()), TokenHead(3, 5, 8, 2, 2)).train()
    images = torch.rand(2, 3, 32, 40)
    one, several = net.describe(images), net.describe(images, IMAGE_SCALES)
    assert net.training and torch.allclose(several.norm(dim=1), torch.ones(2), atol=1e-5) and not torch.allclose(one, several)
    assert torch.equal(net.describe(images), one)   # eval mode inside: no dropout, no change of statistics
    maps = token_maps(net, images)
    assert maps.shape == (2, 2, 4, 5) and net.training


def test_multiscale_of_a_scale_invariant_network_is_that_network():
    net = lambda x: x.mean((2, 3))
    images = torch.rand(2, 3, 1, 1).expand(2, 3, 20, 20)
    assert torch.allclose(multiscale(net, images), F.normalize(net(images)), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(10, 200))
def test_limit_size_never_enlarges(width, height, longest):
    limited = limit_size(Image.new("RGB", (width, height)), longest=longest)
    assert max(limited.size) <= longest or limited.size == (width, height)
    assert limited.width <= width and limited.height <= height


def test_rmac_of_one_position_is_its_unit_vector():
    x = torch.rand(2, 4, 1, 1)
    assert torch.allclose(F.normalize(rmac(x)), F.normalize(mac(x)), atol=1e-6)


def test_rmac_counts_the_whole_map_once_more():
    x = torch.rand(2, 4, 3, 5)
    regions = [x[:, :, top : top + side, left : left + side] for top, left, side in rmac_regions(3, 5)]
    expected = unit(mac(x)) + sum(unit(mac(region)) for region in regions)
    assert torch.allclose(rmac(x), expected, atol=1e-6)
