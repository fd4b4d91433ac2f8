"""Golden ames_preprocess: OpenCV's resizing, the sides' own factors and the normalisation."""
import numpy as np
import pytest
from official_fill import Official, image

from patchify.rerank.extraction import prepare, resize_opencv, scale_factors

GOLDEN = Official("ames_preprocess")
CASES = {case["case"]: case for case in GOLDEN.info["cases"]}


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    info = GOLDEN.info["source"]
    return image(info["image_salt"], 0, *info["h_w"])


@pytest.mark.parametrize("name", CASES)
def test_prepared_images(name, source):
    case = CASES[name]
    part = source
    if case["bbox"]:
        x0, y0, x1, y1 = (int(side) for side in case["bbox"])
        part = source[y0:y1, x0:x1]
    factors = tuple(case["scale_x_y"])
    if name.startswith("dinov2"):
        computed = scale_factors(*part.shape[:2], 770 / max(source.shape), 14)
        assert computed == pytest.approx(factors, rel=1e-12)
        factors = computed
    pixels = prepare(part, factors)
    assert list(pixels.shape) == case["result_shape"]
    assert abs(float(pixels.mean()) - case["mean"]) < 2e-6 * max(1, abs(case["mean"]))
    bgr = pixels.flip(0).numpy()
    rows, columns = (np.linspace(0, side - 1, 10).astype(int) for side in bgr.shape[1:])
    GOLDEN.check(name, bgr[:, rows][:, :, columns], atol=1e-6)


@pytest.mark.parametrize("factors", [(0.7071, 0.7071), (0.5, 0.5), (1 / 3, 0.5), (0.8555, 0.8633), (1.4142, 1.4142), (2.0, 2.0),
                                     (1.02, 0.99), (1.0, 0.9), (1.0, 1.2), (3.1, 0.4)])
def test_every_pixel_equals_opencv(factors):
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for shape in ((61, 87, 3), (37, 211, 3), (60, 90, 3)):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        mode = cv2.INTER_AREA if min(factors) < 1 else cv2.INTER_LINEAR
        expected = cv2.resize(pixels, dsize=(0, 0), fx=factors[0], fy=factors[1], interpolation=mode)
        np.testing.assert_array_equal(resize_opencv(pixels, factors), expected)
