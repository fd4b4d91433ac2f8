"Unusual images, names, links and tar files: read, or left out and counted, and never beyond a bound."
import io
import os
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from campaign import Case
from patchify import images
from patchify.data.folders import load_folder
from patchify.folder_index import FolderIndex
from patchify.images import find_images, open_image


def photo(path, size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 80).convert(mode).save(path, **options)
    return path


def png_bytes():
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 80).save(buffer, "PNG")
    return buffer.getvalue()


def huge_png(side):
    "A picture of side x side pixels that takes a few bytes on disk."
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def index(world, *options):
    return world.run("index", world.photos(), "--out", world.path / "index", "--level", 0, *options)


def rows(world):
    return FolderIndex.open(world.path / "index").images.set_index("path")


def add(name, content, says=r"8 images x 1 patches.*1 could not be read", count=8):
    "One more file in the folder, which is counted as unreadable."
    def act(world):
        (world.photos() / name).write_bytes(content)
        return index(world)

    def after(world):
        table = rows(world)
        assert (table["row"] >= 0).sum() == count
        if "could not" in says:
            assert table.loc[name, "row"] < 0 and table.loc[name, "reason"]
            reason = table.loc[name, "reason"]
            assert "0x" not in reason and "Error" not in reason, reason
    return Case(f"file {name[:30]!r}", act, says, 0, after)


NINE = r"9 images x 1 patches"
CASES = [
    add("empty.png", b""),
    add("text.jpg", b"hello world"),
    add("cut.png", png_bytes()[:200]),
    add("header.png", png_bytes()[:30]),
    add("flipped.png", png_bytes()[:100] + b"\xff" + png_bytes()[101:]),
    add("zip.jpg", b"PK\x03\x04" + bytes(100)),
    add("huge.png", huge_png(60_000)),
    add("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n/x 1 def\nshowpage\n"),
    add("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'></svg>"),
    add("with space.png", png_bytes(), NINE, 9),
    add("ünïcode-日本.png", png_bytes(), NINE, 9),
    add("new\nline.png", png_bytes(), NINE, 9),
    add("escape\x1b[31mred.png", png_bytes(), NINE, 9),
    add("a::b.png", png_bytes(), NINE, 9),
    add("x.tar::y.png", png_bytes(), NINE, 9),
    add("quote\"'<b>.png", png_bytes(), NINE, 9),
    add("-k.png", png_bytes(), NINE, 9),
    add("n" * 240 + ".png", png_bytes(), NINE, 9),
    add("NA.png", png_bytes(), NINE, 9),
    add("UPPER.PNG", png_bytes(), NINE, 9),
    add(".hidden.png", b"", r"8 images x 1 patches"),
    add("movie.mp4", b"", r"8 images x 1 patches"),
    add("deep/notes.txt", b"", r"8 images x 1 patches"),
]

for mode, suffix in (("L", ".png"), ("1", ".png"), ("P", ".gif"), ("LA", ".png"), ("RGBA", ".webp"), ("CMYK", ".jpg"),
                     ("I;16", ".png"), ("F", ".tiff")):
    def opened(world, mode=mode, suffix=suffix):
        path = photo(world.path / f"mode{suffix}", mode="L" if mode == "I;16" else mode)
        if mode == "I;16":
            Image.fromarray(np.full((30, 40), 40_000, np.uint16)).save(path)
        image = open_image(path)
        assert image.mode == "RGB" and image.size == (40, 30)
        return world.call(open_image, path)

    CASES.append(Case(f"mode {mode}", opened, "", 0))


# NAMES ON THE SCREEN AND ON PAGES

def control_characters_are_escaped(world):
    name = "escape\x1b[31mred\x07.png"
    (world.photos() / name).write_bytes(png_bytes())
    index(world)
    outcome = world.run("search", world.path / "index", world.photos() / name, "-k", 9, "--html", world.path / "a.html")
    assert "\x1b" not in outcome.out and "\x07" not in outcome.out
    assert "\x1b" not in (world.path / "a.html").read_text()
    return outcome


def a_bad_name_in_an_error(world):
    return world.run("search", world.index(), world.path / "no\x1b[31m\nsuch.png")


def markup_is_escaped(world):
    name = "<img src=x onerror=alert(1)>.png"
    (world.photos() / name).write_bytes(png_bytes())
    index(world)
    outcome = world.run("search", world.path / "index", world.photos() / name, "--html", world.path / "a.html")
    assert "<img src=x onerror" not in (world.path / "a.html").read_text()
    return outcome


def no_control_characters(world):
    pass


CASES += [
    Case("control characters on the screen", control_characters_are_escaped, r"escape\\x1b\[31mred\\x07.png", 0),
    Case("control characters in a message", a_bad_name_in_an_error, r"no\\x1b\[31m\\nsuch.png"),
    Case("markup in a name", markup_is_escaped, "onerror", 0),
]


# LINKS

def link(target, name):
    def act(world):
        (world.photos() / name).symlink_to(target(world))
        return index(world)
    return act


def twice(world):
    (world.photos() / "deep" / "more").mkdir()
    photo(world.photos() / "deep" / "more" / "a.png")
    (world.photos() / "other").symlink_to(world.photos() / "deep")
    return index(world)


def outside(world):
    photo(world.path / "elsewhere" / "a.png")
    return world.path / "elsewhere"


def file_itself(world):
    return world.photos() / "1.png"


def each_image_once(world):
    real = [os.path.realpath(world.photos() / path) for path in rows(world).index]
    assert len(real) == len(set(real))


CASES += [
    Case("a link to the folder itself", link(lambda world: world.photos(), "loop"), "8 images", 0, each_image_once),
    Case("a link to the parent", link(lambda world: world.photos().parent, "up"), "8 images", 0, each_image_once),
    Case("a folder reached twice", twice, "9 images", 0, each_image_once),
    Case("a linked folder", link(outside, "linked"), "9 images", 0),
    Case("a broken link", link(lambda world: world.path / "none.png", "broken.png"), "8 images.*1 could not be read", 0),
    Case("a link to a file", link(file_itself, "same.png"), "9 images", 0),
    Case("a folder named like an image", lambda world: ((world.photos() / "folder.png").mkdir(), index(world))[1],
         "8 images", 0),
]


# PIXEL LIMIT

def above_the_limit(world):
    (world.photos() / "large.png").write_bytes(huge_png(60_000))
    return index(world)


def limit_is_named(world):
    reason = rows(world).loc["large.png", "reason"]
    assert "pixels" in reason and "PATCHIFY_MAX_PIXELS" in reason, reason


def query_above_the_limit(world):
    world.index()
    (world.path / "large.png").write_bytes(huge_png(60_000))
    return world.run("search", world.index(), world.path / "large.png")


CASES += [
    Case("an image above the pixel limit", above_the_limit, "1 could not be read", 0, limit_is_named),
    Case("a query above the pixel limit", query_above_the_limit, "more than .* pixels.*PATCHIFY_MAX_PIXELS"),
]


# TAR FILES

def tar(world, *members, name="shard.tar", mode="w"):
    path = world.photos() / name
    with tarfile.open(path, mode) as file:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def sparse_tar(path, real_size):
    "A GNU sparse member of `real_size` bytes that takes no space."
    info = tarfile.TarInfo("big.png")
    info.type = tarfile.GNUTYPE_SPARSE
    info.size = 0
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:386 + 24] = b"%011o\0%011o\0" % (real_size, 0)
    block[483:483 + 12] = b"%011o\0" % min(real_size, 8**11 - 1)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    path.write_bytes(bytes(block) + bytes(1024))


def large_member(path, size):
    "A member whose header promises more than the file holds."
    info = tarfile.TarInfo("big.png")
    info.size = size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def with_tar(make, says, code=0, after=lambda world: None, name="tar"):
    def act(world):
        make(world)
        return index(world)
    return Case(name, act, says, code, after)


def nothing_escaped(world):
    assert not (world.path / "escaped.png").exists()
    assert not (world.photos() / "escaped.png").exists()


def member_added(world):
    assert "shard.tar::a.png" in rows(world).index


def link_members(world):
    path = tar(world, ("a.png", png_bytes()))
    with tarfile.open(path, "a") as file:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "a.png"), (tarfile.FIFOTYPE, "")):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type = kind
            info.linkname = target
            file.addfile(info)


PNG = png_bytes()
CASES += [
    with_tar(lambda w: tar(w, ("a.png", PNG), ("d/b.png", PNG)), "10 images", name="tar: two members",
             after=member_added),
    with_tar(lambda w: tar(w, ("../escaped.png", PNG)), "9 images", name="tar: a member above", after=nothing_escaped),
    with_tar(lambda w: tar(w, ("/escaped.png", PNG)), "9 images", name="tar: an absolute member", after=nothing_escaped),
    with_tar(lambda w: tar(w, ("a.png", b"no image")), "8 images.*1 could not be read", name="tar: a broken member"),
    with_tar(lambda w: tar(w, ("a.png", PNG), ("a.png", PNG)), "9 images", name="tar: a member listed twice"),
    with_tar(lambda w: tar(w, ("a\x1b.png", PNG)), "9 images", name="tar: control characters"),
    with_tar(lambda w: tar(w, ("readme.txt", b"x")), "8 images", name="tar: no images"),
    with_tar(lambda w: tar(w, ("a.png", PNG)).write_bytes(b"no tar"), "left out .*shard.tar.*8 images|8 images",
             name="tar: no tar at all"),
    with_tar(lambda w: tar(w).write_bytes(b""), "8 images", name="tar: an empty file"),
    with_tar(lambda w: tar(w, ("a.png", PNG), ("b.png", PNG)).write_bytes(
        tar(w, ("a.png", PNG), ("b.png", PNG)).read_bytes()[:1800]), "images", name="tar: cut short"),
    with_tar(lambda w: tar(w, ("a.png", PNG), name="shard.tar", mode="w:gz"), "8 images", name="tar: compressed"),
    with_tar(lambda w: sparse_tar(w.photos() / "shard.tar", 10 * 2**30), "8 images", name="tar: a sparse member of 10 GB"),
    with_tar(lambda w: large_member(w.photos() / "shard.tar", 7 * 2**30), "8 images", name="tar: a promise of 7 GB"),
    with_tar(lambda w: large_member(w.photos() / "shard.tar", 200 * 2**30), "8 images", name="tar: a promise of 200 GB"),
    with_tar(link_members, "9 images", name="tar: links and pipes"),
]


def a_member_that_is_gone(world):
    tar(world, ("a.png", PNG))
    return world.call(open_image, world.photos() / "shard.tar::other.png")


def bounded_member(world):
    path = tar(world, ("a.png", PNG))
    before = images.MAX_MEMBER_BYTES
    images.MAX_MEMBER_BYTES = 50
    try:
        return world.call(open_image, f"{path}::a.png")
    finally:
        images.MAX_MEMBER_BYTES = before


def replaced_tar(world):
    path = tar(world, ("a.png", PNG))
    index(world)
    tar(world, ("a.png", PNG), ("b.png", PNG))
    os.utime(path, (1e9, 1e9))
    return index(world)


def compressed_shard(world):
    (world.path / "d" / "ilias_core" / "cup" / "query").mkdir(parents=True)
    tar(world, ("a.png", PNG), name="a.tar.gz", mode="w:gz")
    return world.call(lambda: list(find_images(world.photos(), shards=True)))


CASES += [
    Case("tar: a member that is not there", a_member_that_is_gone, "cannot read image .*other.png: .*(no member|no such)"),
    Case("tar: a member above the bound", bounded_member, "more than the limit of 50"),
    Case("tar: replaced after indexing", replaced_tar, "10 images", 0),
    Case("tar: a compressed shard", compressed_shard, "a.tar.gz is compressed.*unpack"),
]


# WHAT CHANGES AFTER INDEXING

def replaced(world):
    index(world)
    photo(world.photos() / "1.png", size=(50, 50))
    return world.run("search", world.path / "index", world.photos() / "2.png", "--refine", 8)


def removed(world):
    index(world)
    (world.photos() / "1.png").unlink()
    return world.run("search", world.path / "index", world.photos() / "2.png", "--html", world.path / "a.html")


def empty_folder(world):
    (world.path / "empty").mkdir()
    return world.call(load_folder, world.path / "empty")


CASES += [
    Case("an image replaced after indexing", replaced, "1.png.*(changed|replaced)", 0),
    Case("an image removed after indexing", removed, "1.png", 0),
    Case("a folder without images", empty_folder, "no images in .*empty"),
    Case("a missing image", lambda world: world.call(open_image, world.path / "none.jpg"), "cannot read image .*none.jpg"),
    Case("a folder as an image", lambda world: world.call(open_image, world.path), "cannot read image"),
    Case("a URL as an image", lambda world: world.call(open_image, "https://example.org/a.jpg"),
         "is a URL.*download"),
    Case("a URL as a folder", lambda world: world.run("index", "https://example.org/a", "--out", world.path / "i"),
         "is a URL.*download"),
    Case("a file as a folder", lambda world: world.run("index", world.photos() / "1.png", "--out", world.path / "i"),
         "1.png is a file"),
]
