"""Local descriptors: places, scales, crops and what is kept."""
import numpy as np
import pytest
import torch
from PIL import Image

from patchify.encoder import load_encoder
from patchify.rerank.local import local_sets, norm_strength, strongest, train_detector
from patchify.learn import TrainingPlan


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("mini", random_weights=True, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [str(folder / f"{i}.png") for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(draw.integers(0, 255, (90 + 10 * i, 120, 3), np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("height, width, top", [(1, 1, 1), (3, 5, 4), (4, 2, 8), (2, 2, 9)])
def test_the_strongest_places_by_a_slow_search(height, width, top):
    feature_map = torch.randn(3, 6, height, width, generator=torch.Generator().manual_seed(top))
    values, positions, strengths = strongest(feature_map, top)
    for b in range(3):
        slow = sorted(((-norm_strength(feature_map)[b, y, x].item(), y, x) for y in range(height) for x in range(width)))[:top]
        assert len(slow) == values.shape[1] == min(top, height * width)
        for i, (negative, y, x) in enumerate(slow):
            torch.testing.assert_close(values[b, i], torch.nn.functional.normalize(feature_map[b, :, y, x], dim=0))
            assert positions[b, i].tolist() == pytest.approx([(x + 0.5) / width, (y + 0.5) / height]) and strengths[b, i].item() == pytest.approx(-negative)


def test_any_detector_decides(files, encoder):
    left = lambda feature_map: torch.linspace(1, 0, feature_map.shape[3]).expand(len(feature_map), feature_map.shape[2], -1)
    sets = local_sets(files, encoder, top=3, sides=(96,), detector=left)
    assert np.allclose(sets.positions[..., 0], sets.positions[0, 0, 0])                     # the leftmost column, in every image


def test_scales_share_one_budget_and_batches_do_not_matter(files, encoder):
    sets = local_sets(files, encoder, top=20, sides=(96, 160))
    assert sets.count == 20 and set(np.unique(sets.scales)) <= {0, 1} and (np.diff(sets.strengths) <= 0).all()
    again = local_sets(files, encoder, top=20, sides=(96, 160), batch=2)
    assert np.allclose(sets.values.astype(float), again.values.astype(float), atol=2e-3) and np.allclose(sets.strengths, again.strengths, rtol=1e-4)
    alone = local_sets(files, encoder, top=1000, sides=(96,))
    assert alone.count == encoder.feature_map(torch.zeros(1, 3, 96, 96)).shape[2:].numel() and (alone.scales == 0).all()


def test_positions_are_pixels_of_the_original_image(files, encoder):
    whole = local_sets(files[4:], encoder, top=9, sides=(96,))
    assert (whole.positions <= [120, 130]).all() and whole.positions[..., 1].max() > 96
    box = np.array([30.4, 20.6, 90, 81])
    inside = local_sets(files[4:], encoder, [box], top=9, sides=(96,)).positions
    assert (inside >= [30, 21]).all() and (inside <= [90, 81]).all()


def test_it_is_an_ordinary_set(files, encoder):
    taken = local_sets(files, encoder, top=6, sides=(96,)).take([4, 0])
    assert taken.values.dtype == torch.float32 and taken.values.shape[:2] == (2, 6) and taken.valid.all()


def test_an_unreadable_file_is_named(tmp_path, encoder):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.jpg"):
        local_sets([str(tmp_path / "broken.jpg")], encoder)


def test_a_learned_detector_prefers_what_names_the_object():
    "Every map has one place that tells its label and one, the same everywhere, that is louder and says nothing."
    draw = torch.Generator().manual_seed(0)
    maps = 0.1 * torch.randn(60, 12, 4, 4, generator=draw)
    labels, tells, says_nothing = torch.arange(60) % 6, torch.randint(0, 8, (60,), generator=draw), torch.randint(8, 16, (60,), generator=draw)
    for i in range(60):
        maps[i, labels[i], tells[i] // 4, tells[i] % 4] += 3
        maps[i, 11, says_nothing[i] // 4, says_nothing[i] % 4] += 4
    attention, losses = train_detector(maps[:40], labels[:40], TrainingPlan(200, 1e-2))
    strength = attention(maps[40:]).flatten(1)
    assert np.mean(losses[-10:]) < losses[0]
    assert (strength.argmax(1) == tells[40:]).float().mean() > 0.6
    assert (norm_strength(maps[40:]).flatten(1).argmax(1) == says_nothing[40:]).all()
