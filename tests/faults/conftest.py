"The world of the campaign, made once, and the summary line at its end."
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import patchify.encoder
from campaign import World

OUTCOMES = Counter()


@pytest.fixture(scope="session")
def shared(tmp_path_factory, data) -> Path:
    "Eight small photographs, and the tiny benchmark."
    folder = tmp_path_factory.mktemp("shared")
    (folder / "photos" / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        name = f"deep/{number}.png" if number > 5 else f"{number}.png"
        Image.fromarray(pixels).resize((64, 48)).save(folder / "photos" / name)
    (folder / "tiny").symlink_to(data / "tiny")
    return folder


@pytest.fixture(scope="session")
def indexed(shared, one_encoder) -> str:
    "An index of these photographs, made where the rows act; what a search of it prints."
    world = World(shared / "world", shared)
    index = world.path / "index"
    assert world.run("index", world.photos(), "--out", index, "--level", 1).code == 0
    index.rename(shared / "index")
    return world.run("search", world.index(), world.photos() / "1.png", "-k", 8).out


@pytest.fixture(scope="session", autouse=True)
def one_encoder():
    "The shipped encoder is built once for all rows that take it as it is."
    original = patchify.encoder.load_encoder
    kept = {}

    def load(name="mini", checkpoint=None, random_weights=False, device=None, dtype=None, size=None, aspect="stretch"):
        arguments = (name, checkpoint, random_weights, device, dtype, size, aspect)
        if checkpoint or device:
            return original(*arguments)
        if arguments not in kept:
            kept[arguments] = original(*arguments)
        return kept[arguments]

    patch = pytest.MonkeyPatch()
    patch.setattr("patchify.encoder.load_encoder", load)
    patch.setattr("patchify.folder_index.load_encoder", load)
    yield
    patch.undo()


@pytest.fixture
def world(shared, indexed, monkeypatch) -> World:
    "An empty folder; names without a path lie in it."
    def too_long(*_):
        raise AssertionError("a row took longer than two minutes")

    path = shared / "world"
    shutil.rmtree(path)
    path.mkdir()
    monkeypatch.chdir(path)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(120)
    yield World(path, shared, indexed)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pytest_runtest_logreport(report):
    if "test_campaign" in report.nodeid and report.when == "call":
        group = report.nodeid.partition("[")[2].partition(":")[0]
        OUTCOMES[group, report.outcome] += 1


def pytest_terminal_summary(terminalreporter):
    if OUTCOMES:
        groups = {group: 0 for group, _ in OUTCOMES}
        for (group, _), count in OUTCOMES.items():
            groups[group] += count
        failed = sum(count for (_, outcome), count in OUTCOMES.items() if outcome == "failed")
        parts = ", ".join(f"{group} {count}" for group, count in groups.items())
        terminalreporter.write_line(f"faults: {sum(groups.values())} cases, {failed} failed ({parts})")
