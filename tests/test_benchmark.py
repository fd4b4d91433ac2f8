"Reading data sets: the layouts, the odd images, and the faults."
import io
import os
import tarfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from patchify.data.folders import load_folder, load_ilias, read_boxes, read_text_queries
from patchify.data.registry import load
from patchify.files import suggest
from patchify.images import find_images, open_image


def picture(width=40, height=30, color=(200, 30, 60)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def core(tmp_path):
    "Two instances with a query and a positive each, in ILIAS layout."
    for name, number in (("cup", 0), ("box", 1)):
        for side, letter in (("query", "Q"), ("pos", "P")):
            folder = tmp_path / f"ilias_core/{name}_{number:03d}/{side}"
            folder.mkdir(parents=True)
            (folder / f"{letter}{number:03d}_00.jpg").write_bytes(picture())
            (folder / f"{letter}{number:03d}_00_bbox.txt").write_text("5 5 20 10\n")
    (tmp_path / "ilias_core/cup_000/query/T000.txt").write_text("a cup\n")
    return tmp_path


def test_text_queries_and_box_files_are_not_images(core):
    found = load_ilias(core)
    assert found.queries.id.tolist() == ["box_001/query/Q001_00.jpg", "cup_000/query/Q000_00.jpg"]
    assert [p.tolist() for p in found.positives] == [[0], [1]]
    assert found.gallery.boxes[0].tolist() == [[5, 5, 25, 15]]


def test_distractors_come_from_folders_and_from_tar_shards(core):
    (core / "yfcc100m/part").mkdir(parents=True)
    (core / "yfcc100m/part/a.jpg").write_bytes(picture(color=(1, 200, 3)))
    with tarfile.open(core / "yfcc100m/0007.tar", "w") as tar:
        for name, color in (("x.jpg", (250, 0, 0)), ("x.json", None)):
            content = picture(color=color) if color else b"{}"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = load_ilias(core)
    assert found.gallery.id.tolist()[2:] == ["0007.tar/x", "part/a.jpg"] and found.gallery.instance.isna().tolist() == [False, False, True, True]
    assert np.asarray(open_image(found.file(found.gallery.path[2])))[0, 0, 0] > 240
    with pytest.raises(ValueError, match="nothere"):
        open_image(core / "yfcc100m/0007.tar::nothere.jpg")


@pytest.mark.parametrize("name", ["0007.tar.gz", "part/0007.TGZ", "0007.tar.zst"])
def test_compressed_shards_of_distractors_are_refused_but_a_folder_may_hold_them(core, name, capsys):
    (core / "yfcc100m/part").mkdir(parents=True)
    (core / "yfcc100m" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"yfcc100m/{name} is compressed.*plain .tar"):
        load_ilias(core)
    assert len(load_folder(core).gallery) == 4 and "1 ." in capsys.readouterr().err


def test_links_are_followed_but_not_in_circles(core, tmp_path_factory, capsys):
    "An instance, its pictures and the distractors may all be links; links up, to each other and to themselves end."
    away = tmp_path_factory.mktemp("away")
    (core / "ilias_core/box_001").rename(away / "box")
    (core / "ilias_core/box_001").symlink_to(away / "box")
    for number, folder in enumerate(("one", "two")):
        (away / folder).mkdir()
        (away / folder / "a.jpg").write_bytes(picture(color=(number, 9, 9)))
    (core / "distractors").mkdir()
    (core / "distractors/linked").symlink_to(away / "one")
    (core / "yfcc100m").symlink_to(away / "two")
    for place, target in [("one/up", away), ("one/other", away / "two"), ("two/other", away / "one"), ("two/self", away / "two/self"), ("two/gone", away / "gone")]:
        (away / place).symlink_to(target)
    found = load_ilias(core)
    assert found.queries.instance.tolist() == ["box_001", "cup_000"]
    assert {"distractors/linked/a.jpg", "yfcc100m/a.jpg"} <= set(found.gallery.path)
    assert sorted(path for _, path in find_images(away / "two")) == ["a.jpg", "other/a.jpg"]
    assert f"left out of {away / 'two'}: 2 broken link" in capsys.readouterr().err


def test_files_of_other_endings_are_counted_once(tmp_path, capsys):
    for name in ("a.jpg", "b.heic", "c.heic", "d.MOV", "e", "f.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(picture())
    assert len(load_folder(tmp_path).gallery) == 1
    assert capsys.readouterr().err.splitlines() == [f"left out of {tmp_path}: 2 .heic, 1 .mov, 1 without an ending (no image files that are read here)"]


def test_broken_and_hostile_tars_are_left_out_or_fail_alone(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name, size in (("good.jpg", None), ("large.jpg", 3000)):
            content = picture() if size is None else bytes(size)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        sparse = tarfile.TarInfo("sparse.jpg")
        sparse.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(sparse)
    monkeypatch.setattr("patchify.images.MAX_MEMBER_BYTES", 2000)
    assert [path for _, path in find_images(tmp_path)] == ["b.tar::good.jpg", "b.tar::large.jpg"]
    assert "left out" in (said := capsys.readouterr().err) and "a.tar" in said
    assert open_image(tmp_path / "b.tar::good.jpg").size == (40, 30)
    with pytest.raises(ValueError, match="large.jpg: it has 3000 bytes, more than the limit"):
        open_image(tmp_path / "b.tar::large.jpg")


def test_the_pixel_limit_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(picture(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # restored at the end
    monkeypatch.setenv("PATCHIFY_MAX_PIXELS", "9999")
    with pytest.raises(ValueError, match=r"a\.jpg: it has more than 9999 pixels, set PATCHIFY_MAX_PIXELS"):
        open_image(tmp_path / "a.jpg")


def test_a_plain_file_may_have_two_colons_in_its_name(tmp_path):
    (tmp_path / "a::b.jpg").write_bytes(picture())
    (found,) = find_images(tmp_path)
    assert open_image(tmp_path / found[1]).size == (40, 30)
    with pytest.raises(ValueError, match="is a file"):
        list(find_images(tmp_path / "a::b.jpg"))


def test_a_query_without_positives_stays_and_has_none(core):
    (core / "ilias_core/cup_000/pos/P000_00.jpg").unlink()
    assert [p.tolist() for p in load_ilias(core).positives] == [[0], []]


def test_several_boxes_make_one_query_but_stay_apart_in_the_gallery(core):
    for path in core.rglob("*_bbox.txt"):
        path.write_text("5 5 10 10\n20 10 10 15\n")
    found = load_ilias(core)
    assert found.queries.box[0].tolist() == [5, 5, 30, 25]
    assert found.gallery.boxes[0].shape == (2, 4)


def test_the_taxonomy_is_read(core):
    (core / "misc").mkdir()
    (core / "misc/taxonomy.json").write_text('{"product": {"kitchen": {"mug": ["cup_000"]}}}')
    box, cup = load_ilias(core).queries[["category", "subcategory"]].itertuples(index=False)
    assert tuple(cup) == ("product", "product-kitchen") and pd.isna(box.category)


@pytest.mark.parametrize("text", ["[]", '{"a": []}', '{"a": {"b": 3}}', '{"a', '{"a": {"b": {"c": 4}}}'])
def test_a_taxonomy_of_another_form_is_named(core, text):
    (core / "taxonomy.json").write_text(text)
    with pytest.raises(ValueError, match=r"taxonomy\.json is not a taxonomy"):
        load_ilias(core)


@pytest.mark.parametrize("line", ["box_001/pos/P001_00.jpg,abc,3", "box_001/pos/P001_00.jpg,0.3,", "box_001/pos/P001_00.jpg,0.3"])
def test_a_bad_line_of_an_id_list_is_named(core, line):
    (core / "image_ids").mkdir()
    (core / "image_ids/positive_ids.txt").write_text(f"cup_000/pos/P000_00.jpg,0.1,2\n{line}\n")
    with pytest.raises(ValueError, match=r"positive_ids\.txt, line 2: expected an id and 2 numbers"):
        load_ilias(core)


@pytest.mark.parametrize("text", ["1 2 3", "1 2 3 x", "5 5 0 4", "5 5 -3 4", "nan 1 2 3", "1 2 3 inf"])
def test_a_bad_box_is_named_with_file_and_line(core, text):
    path = core / "ilias_core/cup_000/pos/P000_00_bbox.txt"
    path.write_text(f"5 5 10 10\n{text}\n")
    with pytest.raises(ValueError, match=r"P000_00_bbox\.txt, line 2"):
        load_ilias(core)


@pytest.mark.parametrize("text", ["60 60 10 10", "5 5 500 500"])
def test_a_box_mostly_outside_its_image_is_dropped_and_counted(core, text, capsys):
    (core / "ilias_core/cup_000/pos/P000_00_bbox.txt").write_text(f"5 5 10 10\n{text}\n")
    (core / "ilias_core/box_001/pos/P001_00_bbox.txt").write_text(text)
    assert [len(boxes) for boxes in load_ilias(core).gallery.boxes] == [0, 1]
    assert "2 boxes mostly outside the image dropped, the first in" in capsys.readouterr().err


def test_lists_of_windows_are_read_and_duplicates_are_named(core):
    (core / "image_ids").mkdir()
    ids = "\r\n".join(["cup_000/pos/P000_00.jpg,0.1,2", "box_001/pos/P001_00.jpg,0.2,3", ""])
    (core / "image_ids/positive_ids.txt").write_bytes(b"\xef\xbb\xbf" + ids.encode())
    (core / "ilias_core/cup_000/pos/P000_00_bbox.txt").write_bytes(b"\xef\xbb\xbf5 5 10 10\r\n")
    found = load_ilias(core)
    assert found.gallery.scale.tolist() == [0.1, 0.2] and found.gallery.boxes[0].tolist() == [[5, 5, 15, 15]]
    (core / "image_ids/positive_ids.txt").write_text("cup_000/pos/P000_00.jpg,0.1,2\n" * 2)
    with pytest.raises(ValueError, match=r"positive_ids\.txt, line 2: 'cup_000/pos/P000_00.jpg' is listed twice"):
        load_ilias(core)


def test_the_mini_list_names_distractors_by_their_key(core):
    (core / "image_ids").mkdir()
    (core / "image_ids/mini_ilias_yfcc100m_ids.txt").write_text("x\nb\n")
    (core / "yfcc100m/part").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        (core / "yfcc100m/part" / name).write_bytes(picture())
    with tarfile.open(core / "yfcc100m/0007.tar", "w") as tar:
        for name in ("x.jpg", "y.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(picture())
            tar.addfile(member, io.BytesIO(picture()))
    assert load(f"ilias-mini:{core}").gallery.id.tolist()[2:] == ["0007.tar/x", "part/b.jpg"]
    assert len(load(f"ilias-core:{core}").gallery) == 2 and len(load(f"ilias:{core}").gallery) == 6


def test_text_queries_keep_their_line_end(core):
    assert read_text_queries(core) == {"cup_000/query/T000.txt": "a cup\n"}
    (core / "ilias_core/cup_000/query/T000.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="T000.txt: expected UTF-8"):
        read_text_queries(core)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_boxes_inside_the_image_are_read_as_they_stand(tmp_path_factory, x, y, w, h):
    path = tmp_path_factory.mktemp("boxes") / "a_bbox.txt"
    path.write_text(f"{x} {y} {w} {h}")
    assert read_boxes(path, (120, 120)).tolist() == [[x, y, x + w, y + h]]


@pytest.mark.parametrize("spoil", [lambda b: b"", lambda b: b[:100], lambda b: b"not an image", lambda b: b[: len(b) // 2]])
def test_an_unreadable_image_is_named(tmp_path, spoil):
    (tmp_path / "bad.jpg").write_bytes(spoil(picture(400, 300)))
    with pytest.raises(ValueError, match="bad.jpg"):
        open_image(tmp_path / "bad.jpg")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_every_mode_opens_as_upright_rgb(tmp_path, mode):
    grey = Image.linear_gradient("L").resize((40, 30))
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert("L").convert(mode)
    image.save(tmp_path / "image.tif")
    try:
        Image.open(tmp_path / "image.tif").load()
    except OSError:
        pytest.skip(f"this Pillow cannot read the {mode} TIFF that it writes")
    opened = np.asarray(open_image(tmp_path / "image.tif")).astype(int)
    assert opened.shape == (30, 40, 3)
    if mode not in ("1", "P", "PA"):
        assert abs(opened[..., 0] - np.asarray(grey).astype(int)).max() <= 3


@pytest.mark.parametrize("white, dtype", [(1, np.float32), (255, np.float32), (4095, np.int32), (65535, np.int32), (65535, np.uint16), (65535, np.float32)])
def test_deep_pictures_keep_their_brightness(tmp_path, white, dtype):
    ramp = np.linspace(0, white, 256).astype(dtype)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.tif")
    assert abs(np.asarray(open_image(tmp_path / "deep.tif"))[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_a_float_picture_may_overshoot_and_hold_nothing(tmp_path):
    Image.fromarray(np.float32([[np.nan, -0.1, 0.5, 1.04]])).save(tmp_path / "float.tif")
    assert np.asarray(open_image(tmp_path / "float.tif"))[0, :, 0].tolist() == [0, 0, 127, 255]


def test_only_near_names_are_suggested():
    assert suggest("nope", ["ilias", "inshop"]) == "choose one of ilias, inshop"
    assert suggest("illias", ["ilias", "inshop"]) == "did you mean ilias?"


def test_folders_and_names_are_checked(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="no query images"):
        load(f"ilias:{tmp_path}")
    with pytest.raises(ValueError, match="ilias:DIR"):
        load("ilias")


def test_a_file_name_that_is_no_unicode_is_left_out_and_named(tmp_path, capsys):
    for name in (b"a.jpg", b"b\xff.jpg"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(picture())
    found = load_folder(tmp_path)
    assert found.gallery["path"].tolist() == ["a.jpg"]
    assert "b\\udcff.jpg" in capsys.readouterr().err
