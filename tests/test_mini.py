"""The offline benchmark: same seed, same bytes; exact boxes; ILIAS's layout; nothing shared with training."""
import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchify.synthetic import batches, mini
from patchify.data.folders import load_ilias
from patchify.synthetic.design import PRODUCT_KINDS, atlas, family
from patchify.zoo.encoder import EncoderRecipe


def files(root: Path) -> dict:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tiny(data):
    return data / "tiny"


def test_same_seed_same_bytes_in_other_processes(tiny, tmp_path):
    tasks = mini._list_tasks(tmp_path, 6, 0, "tiny")[::6]
    list(mini._run(tasks, workers=2))
    assert len(tasks) == 7 and {task[0] for task in tasks} == {"query", "pos", "distractor"}
    for name, content in files(tmp_path).items():
        assert content == (tiny / name).read_bytes()


def test_layout_is_read_by_the_loader(tiny):
    benchmark = load_ilias(tiny)
    assert len(benchmark.queries) == 6 and len(benchmark.gallery) == 6 * 4 + 12
    assert [len(p) for p in benchmark.positives] == [4] * 6
    positives = benchmark.gallery[benchmark.gallery.instance.notna()]
    assert positives.scale.between(0, 1).all() and (positives.clutter >= 2).all()


def test_boxes_lie_inside_and_measure_the_scale(tiny):
    for line in (tiny / "image_ids" / "positive_ids.txt").read_text().split():
        name, scale, count = line.split(",")
        path = tiny / "ilias_core" / name
        x, y, w, h = map(int, path.with_name(path.stem + "_bbox.txt").read_text().split())
        width, height = Image.open(path).size
        assert 0 <= x < x + w <= width and 0 <= y < y + h <= height
        assert abs(w * h / (width * height) - float(scale)) < 1e-5 and int(count) >= 2


def test_the_mask_is_what_a_pixel_comparison_finds():
    objects = mini.instance_group(0, 3, 10)
    clutter = list(objects.clutter[:6])

    def make(focal):
        return mini.compose(np.random.default_rng(4), focal, clutter, .15, (256, 192))

    canvas, mask = make(objects.instances[0])
    other, _ = make(objects.instances[1])  # the same scene around a sibling: only the object differs
    changed = np.abs(canvas - other).max(-1) > 40
    assert (changed & ~mask).sum() < .05 * mask.sum() and changed.sum() > .05 * mask.sum()


def test_training_never_sees_a_benchmark_object():
    recipe = EncoderRecipe()
    first = inspect.signature(batches.make_assets).parameters["first"].default
    assert first + max(recipe.objects, recipe.backgrounds) <= mini.BENCHMARK_SEEDS
    with pytest.raises(ValueError, match="training seeds"):
        batches.make_assets(families=2, first=mini.BENCHMARK_SEEDS)
    objects = mini.instance_group(0, 100, 150)
    trained = {design.parts for i in range(recipe.objects) for design in family(i)}
    assert not trained & {design.parts for design in objects.instances + objects.siblings + objects.clutter}


def test_a_seed_keeps_drawing_the_same_scenes(tiny):
    "Published numbers rest on it. Processors may differ in the last bit, so a pixel of a box is allowed."
    lines = (tiny / "image_ids" / "positive_ids.txt").read_text().split()[:4]
    scales = [float(line.split(",")[1]) for line in lines]
    assert np.allclose(scales, [.0558, .0964, .1420, .3871], atol=.005)
    assert [int(line.split(",")[2]) for line in lines] == [8, 5, 8, 16]


def test_every_kind_of_object_is_drawn_and_families_differ():
    kinds = {}
    for seed in range(60):
        kinds.setdefault((first := family(seed)[0]).kind, first)
    assert set(kinds) == set(PRODUCT_KINDS)
    for seed in range(8):
        sheets = [atlas(member, 64) for member in family(seed, 4)]
        assert all((a != b).any() for i, a in enumerate(sheets) for b in sheets[:i])


@pytest.mark.parametrize("wrong", [dict(size="big"), dict(instances=0), dict(seed=-1)])
def test_wrong_arguments_leave_nothing_behind(tmp_path, wrong):
    with pytest.raises(ValueError):
        mini.make_mini(tmp_path / "x", **wrong)
    assert not list(tmp_path.iterdir())


def test_the_lists_name_every_instance_as_the_official_evaluator_wants(tiny):
    "It takes the set of instances from the text queries, of which the offline benchmark has names only."
    named = (tiny / "image_ids" / "text_query_ids.txt").read_text().split()
    assert sorted(named) == sorted(folder.name for folder in (tiny / "ilias_core").iterdir())


def test_as_many_processes_as_cores_are_allowed(tmp_path, monkeypatch):
    class Enough(Exception):
        "No need to draw anything."

    def start(tasks, workers, done):
        assert workers == 2
        raise Enough

    monkeypatch.setattr("patchify.synthetic.mini._run", start)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {1, 5}, raising=False)
    with pytest.raises(Enough):
        mini.make_mini(tmp_path / "mini", instances=1)


def test_a_file_is_no_place_for_it(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken is not an empty folder"):
        mini.make_mini(tmp_path / "taken", size="tiny")
