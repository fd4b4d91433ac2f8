"""The measurement behind the scale page: its gallery, its grouping, and that it continues where it stopped."""
import numpy as np
import pytest

from benchmarks import scale


def test_a_larger_gallery_begins_with_the_smaller_one(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "SHARD", 20)
    scale.write_gallery(tmp_path, 40)
    first = np.concatenate(scale.read_gallery(tmp_path, 40))
    scale.write_gallery(tmp_path, 60)
    gallery = scale.read_gallery(tmp_path, 60)
    assert gallery.n_images == 60 and np.array_equal(np.concatenate(gallery)[:40], first)
    assert np.allclose(np.linalg.norm(first.astype(np.float32), axis=2), 1, atol=1e-2)
    assert not np.array_equal(first[:20], first[20:])


def test_patches_are_grouped_by_image(monkeypatch):
    monkeypatch.setattr(scale, "PATCHES", 10)
    monkeypatch.setattr(scale, "K", 3)
    found = np.array([[25, 21, 3, 40, 41, 77], [9, 8, 7, 6, 55, -1]])
    assert scale.group(found).tolist() == [[2, 0, 4], [0, 5, -1]]


def test_an_interrupted_measurement_continues(tmp_path, monkeypatch):
    out = tmp_path / "scale.csv"
    calls = []

    def in_process(folder, images, step, method):
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        calls.append((step, method))
        output = f"exact-{images}.npy" if method == "exact" else f"{method}-{images}.index"
        if (step, method) == ("search", "exact") or step == "add":
            (folder / output).write_text("")
        steps = ("train", "add") if step == "add" else (step,)
        return [dict(images=images, step=step, method=method, seconds=1.23456, hardware="this") for step in steps]

    monkeypatch.setattr(scale, "in_process", in_process)
    fails_at = 4
    with pytest.raises(KeyboardInterrupt):
        scale.measure(1000, tmp_path, out)
    assert [row["step"] for row in scale.read_rows(out)] == ["write", "search", "train", "add", "search"]
    fails_at = None
    scale.measure(1000, tmp_path, out)
    rows = scale.read_rows(out)
    done = [(row["step"], row["method"]) for row in rows if row["step"] != "train"]
    assert done == scale.steps_of(1000) and rows[0]["seconds"] == "1.235"
    assert calls.count(("search", "exact")) == 1 and calls.count(("write", "gallery")) == 2
    assert not list(tmp_path.glob("*-1000.*"))
    before = len(calls)
    scale.measure(1000, tmp_path, out)
    assert len(calls) == before


def test_lists_grow_with_the_root_of_the_descriptors():
    lists = [scale.lists_of(images) for images in scale.SIZES]
    assert lists == sorted(lists) and lists[0] == 256 and lists[-1] == 4096
    assert all(images % scale.SHARD == 0 for images in scale.SIZES)
