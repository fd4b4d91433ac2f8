"""Patches equal PIL's crop and resize, on any size, box and kind of file."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchify.images import open_image
from patchify.boxes import REGION_KINDS, Regions, pyramid_boxes
from patchify.encoder import load_encoder
from patchify.pyramid import cut_patches, cut_with_matrices, cut_with_pil, cut_with_torch, pool_regions

sides = st.tuples(st.integers(1, 4000), st.integers(1, 3000)) | st.tuples(st.integers(1, 80), st.integers(1, 80))


def noise(width, height, seed=0, smooth=False):
    "Random pixels, or a smooth picture with sharp edges."
    rng = np.random.default_rng(seed)
    if smooth:
        small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        return small.resize((width, height), Image.Resampling.BILINEAR)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def difference(cut, image, boxes, size):
    "Largest difference from PIL in grey values."
    return (cut(image, boxes, size).int() - cut_with_pil(image, boxes, size).int()).abs().max().item()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(side=sides, size=st.sampled_from([1, 7, 32, 64]), level=st.integers(0, 3), seed=st.integers(0, 9))
def test_matrices_and_torch_are_pil_on_any_size(side, size, level, seed):
    image, boxes = noise(*side, seed), pyramid_boxes(*side, level)
    assert difference(cut_with_matrices, image, boxes, size) <= 1
    assert difference(cut_with_torch, image, boxes, size) <= 2


@pytest.mark.parametrize("side", [(1, 1), (4000, 3000), (1, 3000), (4000, 1), (2, 3), (3, 5)])
def test_matrices_are_pil_at_the_ends_of_the_range(side):
    assert difference(cut_with_matrices, noise(*side), pyramid_boxes(*side, 3), 48) <= 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_arbitrary_boxes(data):
    width, height = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    boxes = [[x0, y0, data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))], [0, 0, width, height]]
    image = noise(width, height)
    assert difference(cut_with_matrices, image, boxes, 20) <= 1
    assert difference(cut_with_torch, image, boxes, 20) <= 2


@pytest.mark.parametrize("kind", REGION_KINDS)
@pytest.mark.parametrize("level", [0, 2])
def test_every_region_scheme_and_the_order_of_its_boxes(kind, level):
    image = noise(211, 97, smooth=True)
    boxes = Regions(kind, level).boxes(*image.size)
    together = cut_with_matrices(image, boxes, 24)
    assert difference(cut_with_matrices, image, boxes, 24) <= 1
    for i in (0, len(boxes) // 2, len(boxes) - 1):
        assert torch.equal(together[i:i + 1], cut_with_matrices(image, boxes[i:i + 1], 24))


@pytest.mark.parametrize("side", [(90, 41), (41, 90), (64, 64), (300, 2), (2, 300), (7, 5)])
def test_padding_keeps_the_aspect_ratio(side):
    image = noise(*side)
    size = 32
    scale = size / max(side)
    width, height = (max(1, int(length * scale + 1e-9)) for length in side)
    expected = Image.new("RGB", (size, size), (9, 8, 7))
    expected.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    for cut, allowed in [(cut_with_pil, 0), (cut_with_torch, 2), (cut_patches, 2)]:
        patch = cut(image, [[0, 0, *side]], size, padding=(9, 8, 7))[0].permute(1, 2, 0).int().numpy()
        assert abs(patch - np.asarray(expected, int)).max() <= allowed


def test_a_constant_image_stays_constant():
    image = Image.new("RGB", (97, 61), (255, 7, 0))
    for cut in (cut_with_matrices, cut_with_torch, cut_with_pil):
        patches = cut(image, pyramid_boxes(97, 61, 3), 33)
        assert (patches == torch.tensor([255, 7, 0])[:, None, None]).all()


@pytest.mark.parametrize("box", [[-1, 0, 4, 4], [0, 0, 11, 4], [3, 3, 3, 5], [5, 5, 4, 6], [0, 0, np.nan, 4], [0, 0, np.inf, 4]])
@pytest.mark.parametrize("cut", [cut_patches, cut_with_matrices, cut_with_torch, cut_with_pil])
def test_a_box_outside_its_image_is_refused(cut, box):
    with pytest.raises(ValueError, match="image of 10 x 8 pixels"):
        cut(noise(10, 8), [[0, 0, 2, 2], box], 16)


def test_the_image_is_not_changed_and_not_shared():
    image = noise(40, 30)
    before = image.tobytes()
    cut_patches(image, [[0, 0, 40, 30]], 40).zero_()
    assert image.tobytes() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    for side in [(640, 480), (1, 7), (1999, 1501)]:
        image, boxes = noise(*side), pyramid_boxes(*side, 3)
        patches = cut_patches(image, boxes, 64, "cuda")
        assert patches.device.type == "cuda"
        assert (patches.cpu().int() - cut_with_pil(image, boxes, 64).int()).abs().max() <= 1


def saved(kind, folder):
    "The same picture in another kind of file, and what it should come back as."
    rgb = noise(121, 67, smooth=True)
    grey, path = rgb.convert("L"), folder / f"{kind}.png"
    if kind.startswith("exif"):
        turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 2: Image.Transpose.FLIP_LEFT_RIGHT}
        exif = Image.Exif()
        exif[274] = int(kind[4:])
        rgb.transpose(turn[exif[274]]).save(path, exif=exif)
    elif kind == "16-bit":
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(path)
    elif kind == "CMYK":
        path = folder / "cmyk.jpg"
        rgb.convert("CMYK").save(path, quality=100, subsampling=0)
    elif kind == "P":
        rgb.quantize(256).save(path)
    else:
        rgb.convert(kind).save(path)
    return path, grey.convert("RGB") if kind in ("L", "LA", "16-bit", "1") else rgb


@pytest.mark.parametrize("kind, allowed", [("RGB", 0), ("L", 0), ("LA", 0), ("RGBA", 0), ("16-bit", 0.01), ("P", 9), ("CMYK", 3),
                                           ("exif2", 0), ("exif3", 0), ("exif6", 0), ("exif8", 0)])
def test_kinds_of_files_end_to_end(kind, allowed, tmp_path):
    path, expected = saved(kind, tmp_path)
    boxes = pyramid_boxes(*expected.size, 3)
    image = open_image(path)
    assert image.size == expected.size
    for cut in (cut_patches, cut_with_matrices):
        gap = (cut(image, boxes, 32).float() - cut(expected, boxes, 32).float()).abs().mean()
        assert gap <= allowed


def test_a_black_and_white_file(tmp_path):
    path, _ = saved("1", tmp_path)
    assert set(np.unique(np.asarray(open_image(path)))) == {0, 255}


@pytest.mark.parametrize("side", [(640, 480), (480, 640), (97, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, None])
@pytest.mark.parametrize("cut", [cut_patches, cut_with_matrices, cut_with_torch])
def test_fast_paths_give_the_reference_descriptors(cut, dtype, side):
    encoder = load_encoder("resnet18", random_weights=True, device="cpu", dtype=dtype)
    image, boxes = noise(*side, smooth=True), pyramid_boxes(*side, 3)
    expected = encoder(cut_with_pil(image, boxes, 96))
    assert (encoder(cut(image, boxes, 96)) * expected).sum(1).min() >= 0.9999


@pytest.mark.parametrize("side", [(640, 480), (480, 640)])
def test_fast_paths_move_the_shipped_encoder_less_than_its_own_rounding(side):
    exact, fast = load_encoder("mini", device="cpu", dtype=torch.float32), load_encoder("mini", device="cpu", dtype=torch.bfloat16)
    image, boxes = noise(*side, smooth=True), pyramid_boxes(*side, 3)
    reference = cut_with_pil(image, boxes, exact.size)
    rounding = (exact(reference) * fast(reference)).sum(1)
    for cut in (cut_patches, cut_with_matrices, cut_with_torch):
        cosines = (exact(cut(image, boxes, exact.size)) * exact(reference)).sum(1)
        assert cosines.mean() >= 0.9999 and cosines.min() > rounding.min()


def test_pooling_regions_by_area():
    features = torch.randn(2, 7, 5, 9, generator=torch.Generator().manual_seed(0))
    boxes = np.array([[0.13, 0.2, 0.71, 0.45], [0, 0, 1, 1], [0.5, 0.99, 0.51, 1.0]])
    x, y = (torch.arange(n * 200) / (n * 200) for n in (9, 5))
    fine = features.repeat_interleave(200, 2).repeat_interleave(200, 3)
    for got, (x0, y0, x1, y1) in zip(pool_regions(features, boxes).unbind(1), boxes):
        inside = fine[:, :, (y >= y0) & (y < y1)][..., (x >= x0) & (x < x1)]
        assert torch.allclose(got, torch.nn.functional.normalize(inside.mean((2, 3)), dim=1), atol=5e-3)
    each = torch.stack([torch.from_numpy(boxes), torch.from_numpy(boxes).flip(0)])
    assert torch.allclose(pool_regions(features, each)[1], pool_regions(features, boxes)[1].flip(0))
    with pytest.raises(ValueError, match="fractions"):
        pool_regions(features, [[0, 0, 1.2, 1]])


def test_an_image_pooled_alone_or_in_a_batch():
    features = torch.randn(6, 16, 7, 7, generator=torch.Generator().manual_seed(1))
    boxes = pyramid_boxes(70, 70, 3) / 70
    assert torch.allclose(pool_regions(features, boxes)[3], pool_regions(features[3:4], boxes)[0], atol=1e-6)
