"Parts of one folder index: the same bytes as one process, whatever order they run in and whoever dies."
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchify.boxes import Regions
from patchify.folder_index import FolderIndex, index_folder
from patchify.parts import index_part, merge_parts, parse_part

LEVEL = Regions(level=1)


class Colours:
    "An encoder that may fail after some forward passes."
    name = "colours"
    fingerprint = "0"
    size = 8
    dim = 48
    dtype = torch.float32
    device = "cpu"
    aspect = "stretch"
    padding = None

    def __init__(self, passes=10**6):
        self.passes = passes

    def __call__(self, images):
        self.passes -= 1
        if self.passes < 0:
            raise RuntimeError("the machine was switched off")
        tiny = torch.nn.functional.avg_pool2d(images.float() / 255, 2).flatten(1)
        return torch.nn.functional.normalize(tiny - 0.5, dim=1)


def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(80):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes(b"no picture")
    return folder


def test_parts_make_the_bytes_of_one_process(photos, tmp_path):
    index_folder(photos, tmp_path / "single", Colours(), LEVEL)
    made = [index_part(photos, tmp_path / "parts", Colours(), LEVEL, part, 2) for part in (2, 1)]
    assert made == [[1], [0]]
    assert len(merge_parts(tmp_path / "parts")) == 79
    assert contents(tmp_path / "parts") == contents(tmp_path / "single")
    assert index_part(photos, tmp_path / "parts", Colours(0), LEVEL, 1, 2) == [], "nothing is left to encode"


def test_a_part_that_died_is_started_again(photos, tmp_path):
    with pytest.raises(RuntimeError):
        index_part(photos, tmp_path / "parts", Colours(2), LEVEL, 1, 1, shard_size=16)
    with pytest.raises(ValueError, match=r"4 of 5 shards of .*parts are missing \(1, 2, 3, 4\): run the parts that failed"):
        merge_parts(tmp_path / "parts")
    with pytest.raises(ValueError, match="holds no index, or its first update is unfinished"):
        FolderIndex.open(tmp_path / "parts")
    damaged = next((tmp_path / "parts").rglob("descriptors-00000.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert index_part(photos, tmp_path / "parts", Colours(), LEVEL, 1, 1, shard_size=16) == [0, 1, 2, 3, 4]
    index_part(photos, tmp_path / "whole", Colours(), LEVEL, 1, 1, shard_size=16)
    merge_parts(tmp_path / "whole")
    merge_parts(tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_parts_of_other_settings_or_of_a_changed_folder_are_refused(photos, tmp_path):
    index_part(photos, tmp_path / "parts", Colours(), LEVEL, 1, 2)
    with pytest.raises(ValueError, match="was extracted with regions"):
        index_part(photos, tmp_path / "parts", Colours(), Regions(level=2), 2, 2)
    with pytest.raises(ValueError, match=r"part must lie in 1\.\.2, got 3"):
        index_part(photos, tmp_path / "parts", Colours(), LEVEL, 3, 2)
    (photos / "00.png").write_bytes(b"changed")
    with pytest.raises(ValueError, match="the images have changed since the parts"):
        merge_parts(tmp_path / "parts")


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "a/b", "1/2/3"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ValueError, match="not a part"):
        parse_part(text)
