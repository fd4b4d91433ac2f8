"""The store: same bytes whatever happens on the way, and one clear sentence when something is wrong."""
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from patchify import store as module_store
from patchify.boxes import REGION_KINDS, Regions
from patchify.extraction import Extraction, extract, images_per_shard
from patchify.files import atomic_write
from patchify.search import ExactIndex
from patchify.store import DamagedStore, Store, check_store, write_manifest


class Colours:
    "A stand-in for an encoder: a fixed random projection of coarse colours."
    name = "colours"
    size = 16
    dim = 24
    fingerprint = "0123"
    dtype = torch.float32
    device = torch.device("cpu")
    aspect = "stretch"
    padding = None

    def __init__(self, delay=0.0):
        self.delay = delay
        self.shapes = []
        self.weights = torch.randn(48, self.dim, generator=torch.Generator().manual_seed(0))

    def feature_map(self, images):
        self.shapes.append(tuple(images.shape))
        time.sleep(self.delay)
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255 - 0.5, 4)

    def __call__(self, images):
        return torch.nn.functional.normalize(self.feature_map(images).flatten(1) @ self.weights, dim=1)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def photos(tmp_path):
    "23 pictures, of which three cannot be read."
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(23):
        pixels = rng.integers(0, 256, (rng.integers(8, 40), rng.integers(8, 40), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (folder / "04.png").write_bytes(b"")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:60])
    (folder / "17.png").unlink()
    return [folder / f"{i:02d}.png" for i in range(23)]


PROGRAM = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import Colours
from patchify.boxes import Regions
from patchify.extraction import extract

folder = Path({folder!r})
def run(out, delay=0.02):
    extract([folder / f"{{i:02d}}.png" for i in range(23)], Colours(delay=delay), Regions(level=2), out, shard_size=4, batch=30)
"""

KILL_AT_RANDOM = """
def forked(out, seconds=None):
    start, child = time.perf_counter(), os.fork()
    if not child:
        run(out)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], *sorted(os.listdir(out) if os.path.exists(out) else []), flush=True)
    return time.perf_counter() - start

whole, dice = forked({out!r} + "-whole"), random.Random(0)
for _ in range(10):
    forked({out!r}, whole * dice.uniform(0.1, 0.5))
"""

STOP_BY_HAND = """
print("ready", flush=True)
try:
    run({out!r}, delay=0.3)
except KeyboardInterrupt as stop:
    sys.exit(str(stop))
"""


def start(python, program, photos, out):
    "A process of its own, ready to extract."
    program = (PROGRAM + program).format(tests=str(Path(__file__).parent), folder=str(photos[0].parent), out=str(out))
    return subprocess.Popen([*python, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_random_moments_and_run_again_ends_byte_identical(python, photos, tmp_path):
    said, errors = start(python, KILL_AT_RANDOM, photos, tmp_path / "killed").communicate()
    first, *runs = [line.split() for line in said.splitlines()]
    assert first[0] == "0" and len(runs) == 10, errors
    assert sum(status == str(int(signal.SIGKILL)) for status, *_ in runs) >= 2
    assert len({tuple(name for name in names if not name.endswith(".tmp")) for _, *names in runs}) >= 2
    resumed = extract(photos, Colours(), Regions(level=2), tmp_path / "killed", shard_size=4, batch=30)
    found = contents(resumed.path)
    found.pop(".lock", None)  # of a run that was killed between its last file and the end
    assert found == contents(tmp_path / "killed-whole")


@pytest.mark.parametrize("keep", [[], ["patches-00002.parquet"], [".descriptors-00002.npy.1.tmp"], ["patches-00002.parquet", ".descriptors-00002.npy.1.tmp"]])
def test_every_state_a_kill_can_leave_is_healed(photos, tmp_path, keep):
    settings = dict(encoder=Colours(), regions=Regions(level=1), shard_size=5, batch=10)
    whole = extract(photos, out=tmp_path / "whole", **settings)
    expected, broken = contents(whole.path), tmp_path / "broken"
    broken.mkdir()
    for name in ("descriptors-00000.npy", "patches-00000.parquet", "descriptors-00001.npy", "patches-00001.parquet"):
        (broken / name).write_bytes(expected[name])
    later = ("shards", "extracted", "failed", "dim", "key", "tables", "checksum")
    early = {name: value for name, value in whole.manifest.items() if name not in later} | {"complete": False}
    write_manifest(broken, early)
    for name in keep:
        (broken / name).write_bytes(b"half a fi")
    with pytest.raises(ValueError, match="unfinished"):
        Store.open(broken)
    encoder = Colours()
    extract(photos, out=broken, **settings | {"encoder": encoder})
    assert contents(broken) == expected
    assert len(encoder.shapes) == 3 + 3 + 2  # shards 2 to 4 only: groups of two images


def test_ctrl_c_says_how_to_go_on(python, photos, tmp_path):
    process = start(python, STOP_BY_HAND, photos, tmp_path / "stopped")
    process.stdout.readline()
    while not (tmp_path / "stopped" / "descriptors-00001.npy").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in said
    assert "of 6 shards in" in said and "goes on from there" in said
    settings = dict(regions=Regions(level=2), shard_size=4, batch=30)
    whole = extract(photos, Colours(), out=tmp_path / "whole", **settings)
    assert contents(extract(photos, Colours(), out=tmp_path / "stopped", **settings).path) == contents(whole.path)


def test_a_second_call_only_opens(photos, tmp_path):
    first = extract(photos, Colours(), Regions(level=1), tmp_path / "{key}")
    before, encoder = {p.name: p.stat().st_mtime_ns for p in first.path.iterdir()}, Colours()
    second = extract(photos, encoder, Regions(level=1), tmp_path / "{key}")
    assert second.path == first.path and not encoder.shapes
    assert before == {p.name: p.stat().st_mtime_ns for p in second.path.iterdir()}


def changed(**attributes):
    encoder = Colours()
    for name, value in attributes.items():
        setattr(encoder, name, value)
    return encoder


@pytest.mark.parametrize("field, change", [
    ("encoder", dict(encoder=changed(name="other"))), ("weights", dict(encoder=changed(fingerprint="9"))), ("size", dict(encoder=changed(size=32))),
    ("compute", dict(encoder=changed(dtype=torch.bfloat16))), ("regions", dict(regions=Regions(level=2))), ("regions", dict(regions=Regions("pool", level=1))),
    ("regions", dict(regions=Regions(level=1, seed=3))), ("aspect", dict(encoder=changed(aspect="pad"))), ("dtype", dict(dtype="float32")), ("shard_size", dict(shard_size=3)), ("batch", dict(batch=5)),
])
def test_another_setting_is_refused_by_name_and_has_another_key(photos, tmp_path, field, change):
    settings = dict(encoder=Colours(), regions=Regions(level=1), shard_size=8, batch=20)
    store = extract(photos, out=tmp_path / "store", **settings)
    expected = contents(store.path)
    with pytest.raises(ValueError, match=f"was extracted with {field} "):
        extract(photos, out=tmp_path / "store", **settings | change)
    assert contents(store.path) == expected
    keyed = extract(photos, out=tmp_path / "{key}", **settings).path
    assert extract(photos, out=tmp_path / "{key}", **settings | change).path != keyed


def test_another_list_of_images_is_refused(photos, tmp_path):
    extract(photos, Colours(), Regions(level=0), tmp_path / "store")
    with pytest.raises(ValueError, match=r"images have changed since .*store was made \(23 then, 22 now\).*or delete"):
        extract(photos[1:], Colours(), Regions(level=0), tmp_path / "store")
    with pytest.raises(ValueError, match="images have changed"):
        extract(photos[::-1], Colours(), Regions(level=0), tmp_path / "store")
    Image.new("RGB", (9, 9)).save(photos[0])
    with pytest.raises(ValueError, match="images have changed.* a time is another"):
        extract(photos, Colours(), Regions(level=0), tmp_path / "store")


def test_bad_images_are_left_out_counted_and_listed(photos, tmp_path, capsys):
    store = extract(photos, Colours(), Regions(level=1), tmp_path / "store", shard_size=4)
    assert len(store) == 20 and store.manifest["failed"] == 3 and store.manifest["extracted"] == 20
    assert store.failures["path"].tolist() == [str(photos[i]) for i in (4, 5, 17)]
    assert store.failures["reason"].notna().all()
    assert set(range(23)) - set(store.rows.tolist()) == {4, 5, 17}
    assert store.image_ids == [str(photos[i]) for i in store.rows]
    assert "3 of 23 images could not be read" in capsys.readouterr().err
    with pytest.raises(ValueError, match="row 4 "):
        store.boxes(4)
    assert (store.boxes(18) == Regions(level=1).boxes(*Image.open(photos[18]).size)).all()


def test_a_whole_shard_of_bad_images(photos, tmp_path):
    store = extract(photos[4:6] + photos[:2], Colours(), Regions(level=1), tmp_path / "store", shard_size=2)
    assert store.counts == (0, 2) and store.rows.tolist() == [2, 3] and len(store.descriptors()) == 1
    assert store.boxes(3).shape == (5, 4)


def test_only_bad_images(photos, tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="none of the 2 images could be read"):
            extract(photos[4:6], Colours(), Regions(level=1), tmp_path / "store")
    with pytest.raises(ValueError, match="empty"):
        extract([], Colours(), Regions(level=1), tmp_path / "store")


@pytest.mark.parametrize("regions", [Regions(kind, 1) for kind in REGION_KINDS])
def test_neighbours_and_threads_do_not_matter(photos, tmp_path, regions):
    settings = dict(encoder=Colours(), regions=regions, dtype="float32", shard_size=6, batch=13)
    first = np.concatenate(extract(photos, out=tmp_path / "a", **settings).descriptors())
    for other in photos[8:12]:
        Image.new("RGB", (30, 30), "red").save(other)
    photos[6].write_bytes(b"")
    after = extract(photos, out=tmp_path / "b", **settings, workers=5)
    rows = np.delete(np.arange(23), [4, 5, 17])
    kept = [i for i, row in enumerate(rows) if row not in (6, 8, 9, 10, 11)]
    unchanged = np.isin(after.rows, rows[kept])
    assert (np.concatenate(after.descriptors())[unchanged] == first[kept]).all()


@pytest.mark.parametrize("batch", [1, 7, 10, 64])
def test_every_forward_pass_has_the_same_shapes(photos, tmp_path, batch):
    encoder = Colours()
    extract(photos, encoder, Regions(level=1), tmp_path / "store", shard_size=8, batch=batch)
    per_group = [5] if batch == 7 else [10] if batch == 10 else [60] if batch == 64 else [1]
    assert {shape[0] for shape in encoder.shapes} == set(per_group)


def test_descriptors_are_those_of_the_crops(photos, tmp_path):
    encoder, regions = Colours(), Regions(level=2)
    store = extract(photos, encoder, regions, tmp_path / "store", dtype="float32", shard_size=6)
    found = np.concatenate(store.descriptors())
    for at in (0, 9, 19):
        image, row = Image.open(photos[store.rows[at]]), store.rows[at]
        crops = [np.asarray(image.crop(tuple(box)).resize((16, 16), Image.Resampling.BICUBIC)) for box in store.boxes(row)]
        expected = encoder(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)).numpy()
        assert ((found[at] * expected).sum(1) > 0.999).all()  # pure noise: PIL may clip in another order
    for level, patches in [(0, 1), (1, 5), (2, 14), (None, 14)]:
        nested = store.descriptors(level)
        assert all(isinstance(block, np.memmap) for block in nested)
        assert (np.concatenate(nested) == found[:, :patches]).all()


def test_queries_are_cropped_to_their_box(photos, tmp_path):
    encoder, image = Colours(), Image.open(photos[0])
    w, h = image.size
    table = pd.DataFrame({"id": list("abcd"), "path": ["00.png"] * 4, "box": [None, np.float32([1.4, 2, w - 2, h + 3]), np.float32([w + 5, 0, w + 9, 4]), None]})
    store = extract(table, encoder, Regions(level=0), tmp_path / "store", root=photos[0].parent, dtype="float32")
    assert store.boxes(1).tolist() == [[1, 2, w - 2, h]] and store.rows.tolist() == [0, 1, 3]
    assert "outside its image" in store.failures["reason"][0]
    crop = np.array(image.crop((1, 2, w - 2, h)).resize((16, 16), Image.Resampling.BICUBIC))
    expected = encoder(torch.from_numpy(crop).permute(2, 0, 1)[None])[0].numpy()
    assert store.descriptors()[0][1, 0] @ expected > 0.9999
    regions = extract(table, encoder, Regions(level=1), tmp_path / "regions", root=photos[0].parent)
    assert (regions.boxes(1)[0] == [1, 2, w - 2, h]).all() and (regions.boxes(1)[:, :2] >= [1, 2]).all()


def test_pool_averages_the_feature_map(photos, tmp_path):
    encoder = Colours()
    store = extract(photos[:3], encoder, Regions("pool", level=1), tmp_path / "store", dtype="float32")
    image = Image.open(photos[1]).resize((16, 16), Image.Resampling.BICUBIC)
    features = encoder.feature_map(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
    expected = torch.nn.functional.normalize(features.mean((2, 3)), dim=1)[0].numpy()
    assert store.descriptors()[0].shape == (3, 5, 3) and store.descriptors()[0][1, 0] @ expected > 0.9999


def test_pool_ignores_the_padding_of_an_encoder_that_keeps_the_aspect(photos, tmp_path):
    "A wide image of two colours: its halves are averaged without the border above and below."
    wide = Image.new("RGB", (64, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 64, 16))
    wide.save(photos[0])
    encoder = changed(aspect="pad", padding=(0, 255, 0))
    store = extract(photos[:1], encoder, Regions("pool", level=1), tmp_path / "store", dtype="float32")
    found = store.descriptors()[0][0]
    assert store.boxes(0)[1].tolist() == [0, 0, 32, 8]
    middle_rows = torch.tensor([[0.5, -0.5, -0.5], [-0.5, -0.5, 0.5]])
    green = torch.tensor([-0.5, 0.5, -0.5])
    for patch, colour in [(1, middle_rows[0]), (2, middle_rows[1])]:
        cell = (colour + green) / 2  # a row of 4 x 4 cells is 4 pixels: 2 of the image, 2 of the border
        assert found[patch] @ torch.nn.functional.normalize(cell, dim=0).numpy() > 0.999


def test_images_inside_tar_files(photos, tmp_path):
    with tarfile.open(tmp_path / "part.tar", "w") as tar:
        for path in photos[:3]:
            tar.add(path, path.name)
        junk = tarfile.TarInfo("junk.png")
        junk.size = 40
        tar.addfile(junk, io.BytesIO(bytes(40)))
    members = [f"part.tar::{path.name}" for path in photos[:3]] + ["part.tar::junk.png"]
    stores = [extract(members, Colours(), Regions(level=1), tmp_path / name, root=tmp_path) for name in ("a", "b")]
    assert contents(stores[0].path) == contents(stores[1].path) and len(stores[0]) == 3
    plain = extract(photos[:3], Colours(), Regions(level=1), tmp_path / "plain")
    assert (stores[0].descriptors()[0] == plain.descriptors()[0]).all()


def test_other_formats_and_damage_are_named(photos, tmp_path):
    settings = dict(encoder=Colours(), regions=Regions(level=1), shard_size=8)
    store = extract(photos, out=tmp_path / "store", **settings)
    expected = contents(store.path)
    for name, damage in [("descriptors-00001.npy", 700), ("descriptors-00001.npy", 5), ("descriptors-00000.npy", 0), ("patches-00002.parquet", 90)]:
        (store.path / name).write_bytes(expected[name][:damage])
        with pytest.raises(ValueError, match="damaged"):
            Store.open(store.path)
        assert contents(extract(photos, out=store.path, **settings).path) == expected
    (store.path / "descriptors-00002.npy").unlink()
    with pytest.raises(ValueError, match="descriptors-00002.npy is missing"):
        Store.open(store.path)
    (store.path / "manifest.json").write_text(json.dumps(store.manifest | {"format": 99}))
    for action in (lambda: Store.open(store.path), lambda: extract(photos, out=store.path, **settings)):
        with pytest.raises(ValueError, match="format 99"):
            action()
    (store.path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        Store.open(store.path)
    with pytest.raises(ValueError, match="no store in"):
        Store.open(tmp_path / "nowhere")


def test_a_file_is_no_place_for_a_store_and_a_folder_no_list(photos, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken is a file"):
        extract(photos, Colours(), Regions(level=0), tmp_path / "taken")
    for folder in (photos[0].parent, str(photos[0].parent)):
        with pytest.raises(ValueError, match="list of paths, got the one path"):
            extract(folder, Colours(), Regions(level=0), tmp_path / "store")


def test_an_interruption_costs_64_images_at_most(photos, tmp_path):
    "The default shards of a gallery of 150 copies; a stop in the third leaves two."
    class Stopped(Colours):
        def __call__(self, images):
            if len(self.shapes) == 2:
                raise KeyboardInterrupt
            return super().__call__(images)

    table = pd.DataFrame({"id": [str(i) for i in range(150)], "path": [photos[0].name] * 150})
    for encoder, done in ((Stopped(), 2), (Colours(), 3)):
        try:
            extract(table, encoder, Regions(level=0), tmp_path / "store", root=photos[0].parent)
        except KeyboardInterrupt as stop:
            assert "stopped with 2 of 3 shards" in str(stop)
        assert len(list((tmp_path / "store").glob("descriptors-*.npy"))) == done
    assert Store.open(tmp_path / "store").counts == (64, 64, 22)


def test_a_folder_with_other_things_is_left_alone(photos, tmp_path):
    with pytest.raises(ValueError, match="holds no store"):
        extract(photos, Colours(), Regions(level=0), photos[0].parent)
    assert not (photos[0].parent / "manifest.json").exists()


def test_levels_that_are_not_there(photos, tmp_path):
    pyramid = extract(photos[:2], Colours(), Regions(level=1), tmp_path / "a")
    grid = extract(photos[:2], Colours(), Regions("grid", level=1), tmp_path / "b")
    for store, level, message in [(pyramid, 2, "levels 0 to 1"), (pyramid, -1, "levels 0 to 1"), (grid, 0, "no levels")]:
        with pytest.raises(ValueError, match=message):
            store.descriptors(level)


def test_memory_is_bounded_and_threads_end(photos, tmp_path, monkeypatch):
    import patchify.extraction as module
    inside, most = [], []
    original = module._cut_image
    monkeypatch.setattr(module, "_cut_image", lambda *args: (inside.append(1), most.append(len(inside)), original(*args))[2])
    encode = Colours.__call__
    monkeypatch.setattr(Colours, "__call__", lambda self, images: (time.sleep(0.05), inside.clear(), encode(self, images))[2])
    before = threading.active_count()
    extract(photos, Colours(), Regions(level=1), tmp_path / "store", batch=5, workers=2)
    assert max(most) <= 2 * (2 + 1) + 2 and threading.active_count() == before


def test_progress_is_reported_without_a_terminal(photos, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("patchify.extraction.time.monotonic", lambda: next(clock))
    extract(photos, Colours(), Regions(level=0), tmp_path / "store")
    lines = [line for line in capsys.readouterr().err.splitlines() if "per second" in line]
    assert lines[0] == "encoding: 2 of 23 images, 0.05 per second, about 7 min left" and len(lines) == 11


def test_an_error_of_the_encoder_is_not_hidden(photos, tmp_path):
    class Broken(Colours):
        def __call__(self, images):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        extract(photos, Broken(), Regions(level=0), tmp_path / "store")


def test_the_manifest_says_what_is_inside(photos, tmp_path):
    store = extract(photos, Colours(), Regions(level=1), tmp_path / "store")
    expected = {"format": 2, "aspect": "stretch", "dim": 24, "encoder": "colours", "weights": "0123", "size": 16, "compute": "float32 on cpu", "patches": 5, "dtype": "float16",
                "images": 23, "extracted": 20, "failed": 3, "shards": 1, "complete": True}
    assert expected.items() <= store.manifest.items()
    assert store.regions == Regions(level=1)
    assert os.path.getsize(store.path / "descriptors-00000.npy") == 128 + 20 * 5 * 24 * 2


def small_store(photos, out):
    "A store of 2 shards with a failure."
    return extract(photos[:6], Colours(), Regions(level=1), out, shard_size=3, batch=10)


def read_everything(path):
    "All that a reader can get from a store, or None if damage is reported."
    try:
        store = Store.open(path)
        blocks = [np.array(block) for block in store.descriptors()]
        boxes = [store.boxes(row) for row in store.rows]
        return [store.rows.tolist(), store.image_ids, np.concatenate(blocks).tobytes(), np.stack(boxes).tobytes(), store.failures.to_csv()]
    except DamagedStore as error:
        assert str(path) in str(error) and str(error).endswith("run the extraction again, it replaces what is damaged")
        return None


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_is_detected_or_changes_nothing(photos, tmp_path, data):
    if not (tmp_path / "store").exists():
        small_store(photos, tmp_path / "store")
    intact = contents(tmp_path / "store")
    whole = read_everything(tmp_path / "store")
    name = data.draw(st.sampled_from(sorted(intact)))
    position = data.draw(st.integers(0, len(intact[name]) - 1))
    value = data.draw(st.integers(0, 255))
    changed_file = bytearray(intact[name])
    changed_file[position] = value
    (tmp_path / "store" / name).write_bytes(changed_file)
    try:
        assert read_everything(tmp_path / "store") in (None, whole)
        if bytes(changed_file) != intact[name] and name != "manifest.json":
            assert len(check_store(tmp_path / "store")) == 1
            extract(photos[:6], Colours(), Regions(level=1), tmp_path / "store", shard_size=3, batch=10)
            assert contents(tmp_path / "store") == intact
    finally:
        (tmp_path / "store" / name).write_bytes(intact[name])


def zeroed(content):
    return bytes(len(content))


def shuffled(content):
    return bytes(np.random.default_rng(0).permutation(np.frombuffer(content, np.uint8)))


def halved(content):
    return content[: len(content) // 2]


def removed(content):
    return None


@pytest.mark.parametrize("damage", [zeroed, shuffled, halved, removed])
@pytest.mark.parametrize("name", ["descriptors-00000.npy", "patches-00001.parquet", "shards.csv", "failures.csv", "manifest.json"])
def test_damage_is_named_and_repaired_by_the_same_call(photos, tmp_path, name, damage):
    store = small_store(photos, tmp_path / "store")
    intact = contents(store.path)
    spoilt = damage(intact[name])
    (store.path / name).unlink()
    if spoilt is not None:
        (store.path / name).write_bytes(spoilt)
    problems = check_store(store.path)
    assert len(problems) == 1 and (name in problems[0] or "there is no manifest.json" in problems[0])
    encoder = Colours()
    extract(photos[:6], encoder, Regions(level=1), store.path, shard_size=3, batch=10)
    assert contents(store.path) == intact
    assert len(encoder.shapes) <= 2  # at most one shard is made again


def test_exchanged_files_are_detected(photos, tmp_path):
    store = small_store(photos, tmp_path / "store")
    intact = contents(store.path)
    for pattern in ("descriptors-{}.npy", "patches-{}.parquet"):
        first, second = (store.path / pattern.format(f"{shard:05d}") for shard in (0, 1))
        first.write_bytes(intact[second.name])
        second.write_bytes(intact[first.name])
    assert check_store(store.path)
    extract(photos[:6], Colours(), Regions(level=1), store.path, shard_size=3, batch=10)
    assert contents(store.path) == intact


def test_an_unfinished_store_recognises_foreign_and_exchanged_shards(photos, tmp_path):
    job = Extraction.plan(photos[:6], Colours(), Regions(level=1), tmp_path / "a", shard_size=3, batch=10)
    job.claim()
    job.write([0, 1])
    files = contents(job.out)
    for kind in ("descriptors-0000{}.npy", "patches-0000{}.parquet"):
        (job.out / kind.format(0)).write_bytes(files[kind.format(1)])
    assert job.missing() == [0]
    other = Extraction.plan(photos[:6], changed(fingerprint="9"), Regions(level=1), tmp_path / "b", shard_size=3, batch=10)
    other.claim()
    other.write([0])
    for name, content in contents(other.out).items():
        (job.out / name).write_bytes(content)
    (job.out / "manifest.json").write_bytes(files["manifest.json"])
    assert job.missing() == [0]


def test_a_store_without_a_manifest_is_not_taken_over_by_other_settings(photos, tmp_path):
    store = small_store(photos, tmp_path / "store")
    (store.path / "manifest.json").unlink()
    before = contents(store.path)
    with pytest.raises(ValueError, match="made with other settings"):
        extract(photos[:6], changed(fingerprint="9"), Regions(level=1), store.path, shard_size=3, batch=10)
    assert contents(store.path) == before


def test_shards_in_any_order_by_several_plans_give_the_same_bytes(photos, tmp_path):
    whole = extract(photos, Colours(), Regions(level=1), tmp_path / "whole", shard_size=4, batch=10)
    plans = [Extraction.plan(photos, Colours(), Regions(level=1), tmp_path / "parts", shard_size=4, batch=10) for _ in range(3)]
    plans[0].claim()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda part: plans[part].write(range(5, -1, -1)[part::3]), range(3)))
    plans[1].finish()
    assert contents(tmp_path / "parts") == contents(whole.path)


def test_a_second_writer_is_told_who_writes(photos, tmp_path):
    class Waiting(Colours):
        def __call__(self, images):
            started.set()
            go_on.wait(30)
            return super().__call__(images)

    started = threading.Event()
    go_on = threading.Event()
    call = dict(regions=Regions(level=0), out=tmp_path / "store")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(extract, photos, Waiting(), **call)
        assert started.wait(30)
        try:
            with pytest.raises(ValueError, match=f"is being written by process {os.getpid()}: wait"):
                extract(photos, Colours(), **call)
        finally:
            go_on.set()
        assert len(first.result()) == 20
    assert not (tmp_path / "store/.lock").exists() and len(extract(photos, Colours(), **call)) == 20


def test_descriptors_that_are_not_finite_are_failures(photos, tmp_path):
    class Sometimes(Colours):
        def __call__(self, images):
            found = super().__call__(images)
            return torch.where(found[:, :1] > 0, found, torch.nan)

    store = extract(photos, Sometimes(), Regions(level=0), tmp_path / "store")
    assert 0 < len(store) < 20 and all(np.isfinite(block).all() for block in store.descriptors())
    assert "the encoder returned NaN or infinity" in set(store.failures["reason"])


def test_shards_are_bounded_in_bytes_and_opened_lazily(photos, tmp_path, monkeypatch):
    assert images_per_shard(10**8, 30 * 1024 * 2) * 30 * 1024 * 2 <= 2**26
    assert images_per_shard(10**8, 10**9) == 1 and images_per_shard(150, 60) == 64
    store = Store.open(extract(photos, Colours(), Regions(level=0), tmp_path / "store", shard_size=1).path)
    opened = []
    original = module_store.map_descriptors
    monkeypatch.setattr(module_store, "map_descriptors", lambda path, *options: opened.append(path.name) or original(path, *options))
    blocks = store.descriptors()
    assert len(blocks) == 20 and blocks.shapes == [(1, 1, 24)] * 20 and not opened
    assert blocks[3].shape == (1, 1, 24) and opened == ["descriptors-00003.npy"]
    assert [block.shape for block in blocks[-2:]] == [(1, 1, 24)] * 2 and len(opened) == 3


def test_a_shard_is_verified_once_per_store(photos, tmp_path, monkeypatch):
    path = small_store(photos, tmp_path / "store").path
    verified = []
    original = module_store.checksum
    monkeypatch.setattr(module_store, "checksum", lambda content: (isinstance(content, np.memmap) and verified.append(1)) or original(content))
    store = Store.open(path)
    for _ in range(3):
        list(store.descriptors())
    assert len(verified) == 2
    again = small_store(photos, path)
    assert len(verified) == 4  # by `extract`
    list(again.descriptors())
    assert len(verified) == 4


def test_names_that_look_like_missing_values_stay(photos, tmp_path):
    for name in ("NA", "null"):
        (tmp_path / name).write_bytes(b"")
    store = extract([tmp_path / "NA", photos[0], "null"], Colours(), Regions(level=0), tmp_path / "store")
    assert store.failures["path"].tolist() == [str(tmp_path / "NA"), "null"]


def test_a_complete_store_opens_where_nothing_can_be_written(photos, tmp_path, monkeypatch):
    path = small_store(photos, tmp_path / "store").path
    monkeypatch.setattr("patchify.extraction.atomic_write", None)
    monkeypatch.setattr("patchify.extraction._only_writer", None)
    monkeypatch.setattr("patchify.extraction.write_manifest", None)
    assert len(small_store(photos, path)) == 4


def test_a_full_disk_names_the_file_and_loses_nothing(photos, tmp_path, monkeypatch):
    full = OSError("81920 requested and 4032 written")
    writes = []

    def write_some(file):
        writes.append(1)
        raise full

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="cannot write .*table.csv: its disk .* is full"):
        atomic_write(tmp_path / "table.csv", write_some)
    assert writes and not list(tmp_path.glob("*table*"))


MILLION = """
import re, sys
import numpy as np
from pathlib import Path
from patchify.boxes import Regions
from patchify.extraction import Extraction
from patchify.files import atomic_write
from patchify.store import Store, write_shard

class Tiny:
    name, size, dim, fingerprint, dtype, device, aspect, padding = "tiny", 8, 2, "0", "float32", "cpu", "stretch", None

n, folder, regions = 33_334, Path(sys.argv[1]), Regions(level=3)
job = Extraction.plan([f"{i}.jpg" for i in range(n)], Tiny(), regions, folder, shard_size=1000)
job.claim()
for shard in job.shards:
    rows = job.rows(shard)
    values = np.full((len(rows), 30, 2), shard, np.float16)
    boxes = np.tile(regions.boxes(90, 90), (len(rows), 1, 1))
    ids = job.table["id"][rows.start:rows.stop].tolist()
    write_shard(folder, shard, job.key, rows, ids, boxes, values, regions.levels)
job.finish()
store = Store.open(folder)
total = sum(float(block.astype(np.float64).sum()) for block in store.descriptors())
assert len(store) == n and total == 60 * (1000 * sum(range(33)) + 334 * 33), total
assert store.boxes(n - 1).tolist() == regions.boxes(90, 90).tolist()
# a process inherits the peak of the one that started it in ru_maxrss; VmHWM counts from its own start
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_a_million_descriptors_stay_below_two_gigabytes(tmp_path):
    ended = subprocess.run([sys.executable, "-c", MILLION, str(tmp_path / "store")], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 2000


def test_file_handles_stay_bounded(photos, tmp_path, monkeypatch):
    "A process may open 1,024 files; a store of 100 million images has 100,000 shards."
    monkeypatch.setattr(module_store.DescriptorBlocks, "open_maps", 4)
    store = Store.open(extract(photos, Colours(), Regions(level=1), tmp_path / "store", shard_size=1).path)
    index = ExactIndex(store.descriptors(), store.rows, "cpu")

    def handles():
        return sum("descriptors-" in os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists())

    most = []
    original = module_store.map_descriptors
    monkeypatch.setattr(module_store, "map_descriptors", lambda *a: most.append(handles()) or original(*a))
    queries = np.eye(store.manifest["dim"], dtype=np.float32)[:3]
    in_memory = ExactIndex(np.concatenate(store.descriptors()), store.rows, "cpu").search(queries)
    most.clear()
    assert (index.search(queries).ranks == in_memory.ranks).all()
    assert len(most) == 20 and max(most) <= 6


def test_a_checksum_that_looks_like_a_number_is_read_as_text(tmp_path):
    from patchify.files import checksum
    from patchify.store import FAILURE_COLUMNS, SHARD_COLUMNS, _read_table

    for name, columns, row in (("shards.csv", SHARD_COLUMNS, ["3", "10", "0012345678901234", "20", "12e4567890123456"]),
                               ("failures.csv", FAILURE_COLUMNS, ["0", "007", "1"])):
        content = f"{','.join(columns)}\n{','.join(row)}\n".encode()
        (tmp_path / name).write_bytes(content)
        assert [str(value) for value in _read_table(tmp_path / name, checksum(content), columns).iloc[0]] == row
