"Any byte of any file of a small store or index, changed: detected, or the result is unchanged."
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from campaign import World, contents
from patchify.compress import PQIndex
from patchify.encoder import load_encoder
from patchify.folder_index import FolderIndex
from patchify.images import open_image
from patchify.indexfiles import open_index, save_index
from patchify.store import Store

EVERY = os.environ.get("PATCHIFY_FAULTS") == "all"  # each byte, as `make faults` does; otherwise a sample


@pytest.fixture(scope="module")
def made(tmp_path_factory, shared) -> Path:
    "An index of eight photographs and a compressed index."
    folder = tmp_path_factory.mktemp("bytes")
    world = World(folder, shared)
    assert world.run("index", world.photos(), "--out", folder / "index", "--level", 1).code == 0
    values = np.random.default_rng(0).standard_normal((40, 4, 8), dtype=np.float32)
    save_index(PQIndex(n_subvectors=4, n_bits=3).train([values]).add([values]), folder / "small.index")
    return folder


@pytest.fixture(scope="module")
def query(made) -> np.ndarray:
    "A descriptor to search with."
    opened = FolderIndex.open(made / "index")
    return opened.describe(load_encoder("mini"), open_image(made / "photos" / "1.png"))


def read_index(made: Path, query: np.ndarray) -> object:
    "What a search of all images finds, and the table."
    opened = FolderIndex.open(made / "index")
    assert not opened.check()
    return opened.search(query, 8), opened.images.to_dict(), str(opened.folder)


def read_store(made: Path, query: np.ndarray) -> object:
    "Everything in a store."
    store = Store.open(next((made / "index").glob("part-*")))
    values = [block.tobytes() for block in store.descriptors()]
    return store.image_ids, store.rows.tolist(), values, [store.boxes(row).tolist() for row in store.rows]


def read_compressed(made: Path, query: np.ndarray) -> object:
    "What a compressed index finds."
    found = open_index(made / "small.index").search(np.eye(8, dtype=np.float32)[:3], 5)
    return found.ranks.tolist(), found.scores.tolist()


READERS = {"index": read_index, "store": read_store, "compressed": read_compressed}


def outcome(reader, made: Path, query: np.ndarray) -> object:
    "A result, or `detected`."
    try:
        return reader(made, query)
    except AssertionError:
        return "detected"
    except ValueError as error:
        assert str(made) in str(error) and "\n" not in str(error), error
        return "detected"


def files_of(kind: str, made: Path) -> list[Path]:
    if kind == "compressed":
        return [made / "small.index"]
    folder = made / "index" if kind == "index" else next((made / "index").glob("part-*"))
    return [folder / name for name in contents(folder)]


def try_byte(kind: str, path: Path, position: int, value: int, made: Path, query: np.ndarray, expected: object) -> None:
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position] = value
    path.write_bytes(changed)
    try:
        found = outcome(READERS[kind], made, query)
        assert found == "detected" or found == expected, f"{path.name}: byte {position} set to {value} changes the result"
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("kind", READERS)
def test_bytes_of_every_file(kind, made, query):
    "A bit of many bytes, spread over every file; with PATCHIFY_FAULTS=all of every byte."
    expected = READERS[kind](made, query)
    for path in files_of(kind, made):
        content = path.read_bytes()
        step = 1 if EVERY else max(1, len(content) // 25)
        for position in range(0, len(content), step):
            try_byte(kind, path, position, content[position] ^ (1 << position % 8), made, query, expected)


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_of_any_file(kind, made, query, data):
    expected = READERS[kind](made, query)
    path = data.draw(st.sampled_from(files_of(kind, made)))
    position = data.draw(st.integers(0, path.stat().st_size - 1))
    try_byte(kind, path, position, data.draw(st.integers(0, 255)), made, query, expected)
