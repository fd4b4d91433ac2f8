"Interruptions, full and read-only disks, other processes and changed settings: nothing is lost, and it is said."
import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from campaign import Case, Outcome, contents
from patchify.cli import main
from patchify.files import atomic_write
from patchify.folder_index import FolderIndex
from patchify.synthetic import mini

PATCHIFY = Path(sys.executable).with_name("patchify")


# AT THE N-TH WRITE OF A COMMAND

def failing(target, number, error):
    "Replace a function of the standard library by one that fails at its n-th call."
    original = getattr(os, target)
    calls = []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise error()
        return original(*arguments, **options)
    return call


def index_fails_at(target, number, error):
    def act(world):
        world.photos()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"os.{target}", failing(target, number, error))
            return world.run("index", world.photos(), "--out", world.path / "index", "--level", 1)
    return act


def index_again_is_the_same(world):
    "The same command ends with the bytes of an undisturbed run, and leaves nothing else."
    assert world.run("index", world.photos(), "--out", world.path / "index", "--level", 1).code == 0
    assert contents(world.path / "index") == contents(world.shared / "index")


def no_space():
    return OSError(errno.ENOSPC, "No space left on device")


def read_only():
    return OSError(errno.EROFS, "Read-only file system")


WRITES = range(1, 10)
CASES = [Case(f"Ctrl-C at write {n} of index", index_fails_at("replace", n, KeyboardInterrupt),
              "the same command goes on", 130, index_again_is_the_same) for n in WRITES]
CASES += [Case(f"full disk at write {n} of index", index_fails_at("fsync", 2 * n - 1, no_space),
               r"cannot write .*/index/.*: its disk .* is full, free some space", 2, index_again_is_the_same) for n in WRITES]
CASES += [Case(f"read-only disk at write {n} of index", index_fails_at("replace", n, read_only),
               r"cannot write .*/index/.*: .*read-only", 2, index_again_is_the_same) for n in WRITES]


# INSIDE THE WORK

def index_stops_inside(target, number):
    def act(world):
        import patchify.extraction as module

        original = getattr(module, target)
        calls = []

        def call(*arguments, **options):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, target, call)
            return world.run("index", world.photos(), "--out", world.path / "index", "--level", 1)
    return act


CASES += [Case(f"Ctrl-C at image {n}", index_stops_inside("open_image", n), "stopped with 0 of 1 shards", 130, index_again_is_the_same)
          for n in (1, 4, 8)]
CASES += [Case("Ctrl-C in the encoder", index_stops_inside("_describe", 1), "stopped with 0 of 1 shards", 130, index_again_is_the_same),
          Case("Ctrl-C when a shard is written", index_stops_inside("write_shard", 1), "stopped with 0 of 1 shards", 130,
               index_again_is_the_same)]


# RENDERING

SMALL = dict(instances=2, positives=2, distractors=3, clutter=6, side=128)  # 9 pictures


def render(world, out="made", **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mini.BENCHMARK_SIZES, "tiny", SMALL)
        return mini.make_mini(world.path / out, size="tiny", workers=1, **options)


def rendering_stops_at(number, error):
    def act(world):
        original = mini._write_picture
        calls = []

        def write(*arguments):
            calls.append(1)
            if len(calls) == number:
                raise error()
            return original(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mini, "_write_picture", write)
            outcome = world.call(render, world)
        world.memory["drawn"] = len(calls) - 1
        return outcome
    return act


def rendering_on_a_full_disk(world):
    "The settings, four files of two queries, and the picture of a positive."
    world.memory["drawn"] = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", failing("fsync", 2 * 6 - 1, no_space))
        return world.call(render, world)


def rendering_goes_on(world):
    "What was drawn is not drawn again, and the bytes are those of an undisturbed run."
    calls = []
    original = mini._write_picture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini, "_write_picture", lambda *task: calls.append(1) or original(*task))
        render(world)
    assert len(calls) == 9 - world.memory["drawn"]
    assert sorted(path.name for path in world.path.iterdir()) == ["made"]
    render(world, "whole")
    assert contents(world.path / "made") == contents(world.path / "whole")


CASES += [Case(f"Ctrl-C at picture {n} of a benchmark", rendering_stops_at(n, KeyboardInterrupt),
               "the same command goes on", 130, rendering_goes_on) for n in (1, 2, 5, 9)]
CASES.append(Case("a full disk at picture 3", rendering_on_a_full_disk, r"cannot write .*\.jpg: its disk .* is full", 2,
                  rendering_goes_on))


def other_rendering(world):
    rendering_stops_at(5, KeyboardInterrupt)(world)
    return world.call(lambda: render(world, seed=3))


def dead_worker(world):
    script = world.path / "draw.py"
    script.write_text("""
import os, sys
from patchify.synthetic import mini

def die(task):
    os._exit(9)

if __name__ == "__main__":
    mini._write_picture = die
    die.__module__ = "draw"
    sys.modules["draw"] = sys.modules["__main__"]
    try:
        mini.make_mini("made", size="tiny", instances=2, workers=2)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
""")
    return process(world, sys.executable, script)


def without_guard(world):
    "The last line is that of the script; those before are of the processes that it started."
    script = world.path / "draw.py"
    call = "make_assets(2, 2, 32, cache='cache', workers=2)"
    script.write_text(f"from patchify.synthetic.batches import make_assets\n{call}\n")
    outcome = process(world, sys.executable, script)
    return Outcome(2 if outcome.code else 0, "", outcome.err.strip().splitlines()[-1])


def wait_for_handler(process):
    "Wait until a process handles SIGTERM: the interpreter has started, and the command has begun."
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def process(world, *words, signals=(), **environment):
    "A process of its own; `signals` are (seconds since its begin, signal)."
    variables = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"} | environment
    started = subprocess.Popen([str(word) for word in words], cwd=world.path, env=variables, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for seconds, number in signals:
        wait_for_handler(started)
        time.sleep(seconds)
        started.send_signal(number)
    out, err = started.communicate(timeout=100)
    return Outcome(started.returncode, out, err)


CASES += [
    Case("rendering with another seed over an interrupted one", other_rendering, "made.*seed"),
    Case("a rendering process that dies", dead_worker, "a rendering process ended.*(memory|killed)"),
    Case("drawing from a script without a main guard", without_guard, '__name__ == "__main__"'),
]


# SIGNALS IN THE FIRST SECONDS, AND LATER

def signalled(seconds, number):
    def act(world):
        words = ("index", world.photos(), "--out", world.path / "index", "--level", 3)
        outcome = process(world, PATCHIFY, *words, signals=[(seconds, number)])
        assert "Traceback" not in outcome.err and len(outcome.err.strip().splitlines()) == 1, outcome.err
        return outcome
    return act


CASES += [Case(f"{name} after {seconds} s", signalled(seconds, number), "patchify: (interrupted|terminated|stopped)", 130,
               lambda world: None)
          for seconds in (0, 0.3, 1.5) for name, number in (("SIGINT", signal.SIGINT), ("SIGTERM", signal.SIGTERM))]


# OUTPUT

def closed_pipe(world):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([PATCHIFY, "--version"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == "", done.stderr
    return Outcome(done.returncode)


def ascii_locale(world):
    "What is printed where the locale is C."
    (world.photos() / "größe-日本.png").write_bytes((world.photos() / "1.png").read_bytes())
    assert world.run("index", world.photos(), "--out", world.index(), "--level", 1).code == 0
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        code = main(["search", str(world.index()), str(world.photos() / "1.png"), "-k", "9"])
    stream.flush()
    return Outcome(code, stream.buffer.getvalue().decode("ascii"))


def full_output(world):
    with open("/dev/full", "w") as full:
        done = subprocess.run([PATCHIFY, "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    return Outcome(done.returncode, "", done.stderr)


CASES += [
    Case("a closed pipe", closed_pipe, "", 0),
    Case("an ASCII locale", ascii_locale, r"gr\\xf6\\xdfe-\\u65e5\\u672c\.png", 0),
    Case("a full standard output", full_output, "standard output|cannot write"),
]


# FILES

def failing_file(error):
    def act(world):
        def write(file):
            file.write(b"half")
            raise error()
        return world.call(atomic_write, world.path / "folder" / "table.csv", write)
    return act


def folder_is_empty(world):
    assert not list((world.path / "folder").iterdir())


def short_write(world):
    "What numpy says on a full disk; the disk has room again when one looks."
    def write(file):
        raise OSError("81920 requested and 4032 written")
    return world.call(atomic_write, world.path / "folder" / "table.npy", write)


def into_a_file(world):
    (world.path / "taken").write_text("")
    return world.call(atomic_write, world.path / "taken" / "a.csv", lambda file: None)


CASES += [
    Case("a full disk", failing_file(no_space), r"cannot write .*folder/table.csv: its disk .* is full",
         after=folder_is_empty),
    Case("a full quota", failing_file(lambda: OSError(errno.EDQUOT, "Disk quota exceeded")), "table.csv: .*(full|quota)",
         after=folder_is_empty),
    Case("a read-only disk", failing_file(read_only), "cannot write .*folder/table.csv: .*read-only",
         after=folder_is_empty),
    Case("an input error", failing_file(lambda: OSError(errno.EIO, "Input/output error")), "cannot write .*table.csv",
         after=folder_is_empty),
    Case("a short write of numpy", short_write, "cannot write .*table.npy: its disk .*is full", after=folder_is_empty),
    Case("a file in the place of a folder", into_a_file, "cannot write .*taken/a.csv: .*taken is a file"),
    Case("Ctrl-C in a write", failing_file(KeyboardInterrupt), "", 130, folder_is_empty),
]


# SEARCHING

def search_cannot_write(world):
    world.index()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", failing("fsync", 1, no_space))
        outcome = world.run("search", world.index(), world.photos() / "1.png", "--json", world.path / "a.json")
    assert "1.png" in outcome.out, "the hits must be on the screen"
    return outcome


def unwritable(world):
    "Every write fails, as on a read-only disk."
    world.index()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "replace", "unlink", "fsync"):
            patch.setattr(f"os.{name}", failing(name, 1, read_only))
        patch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(read_only()))
        return world.run("search", world.index(), world.photos() / "1.png")


def checked_read_only(world):
    world.index()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(read_only()))
        return world.run("check", world.index())


CASES += [
    Case("results on a full disk", search_cannot_write, "cannot write .*a.json: its disk .*is full"),
    Case("searching on a read-only disk", unwritable, "1.png", 0),
    Case("checking on a read-only disk", checked_read_only, "is intact", 0),
]


# OTHER PROCESSES

def two_writers(world):
    "Two threads stand for two processes: the lock is a file's."
    from patchify.boxes import Regions
    from patchify.encoder import load_encoder
    from patchify.folder_index import index_folder

    go = threading.Barrier(2)

    def write(_):
        go.wait()
        return world.call(index_folder, world.photos(), world.path / "index", load_encoder("mini"), Regions(level=1))

    world.photos()
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(write, range(2)))
    assert min(outcome.code for outcome in outcomes) == 0
    refused = [outcome for outcome in outcomes if outcome.code]
    return refused[0] if refused else Outcome(2, err="another process is updating (both succeeded)")


def held(world):
    "The lock is held by another process."
    world.index()
    code = ("import filelock, sys, time; lock = filelock.FileLock(sys.argv[1] + '/.lock'); lock.acquire(); "
            "print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(world.index())], stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    try:
        return world.run("index", world.photos(), "--out", world.index(), "--level", 1)
    finally:
        holder.kill()
        holder.wait()


def reader_next_to_writer(world):
    "An index that is opened before an update and read after it."
    from patchify.encoder import load_encoder
    from patchify.images import open_image

    opened = FolderIndex.open(world.index())
    query = opened.describe(load_encoder("mini"), open_image(world.photos() / "1.png"))
    (world.photos() / "2.png").unlink()
    for path in world.photos().rglob("*.png"):
        content = path.read_bytes()
        path.write_bytes(content + b"\0")
    assert world.run("index", world.photos(), "--out", world.index(), "--level", 1).code == 0
    outcome = world.call(opened.search, query, 8)
    if outcome.code:
        return outcome
    assert len(outcome.value[0]) in (7, 8)
    return Outcome(2, err="was updated while it was read")


CASES += [
    Case("two writers at once", two_writers, "another process is updating|being written by process"),
    Case("a lock that another process holds", held, "another process.*is updating .*index: wait"),
    Case("a reader next to a writer", reader_next_to_writer, "was updated while it was read|updated.*run .* again"),
]


# OTHER SETTINGS

def reindex(*options):
    def act(world):
        world.memory["before"] = contents(world.index())
        return world.run("index", world.photos(), "--out", world.index(), *options)

    def unchanged(world):
        assert contents(world.index()) == world.memory["before"]
    return act, unchanged


for options, says in ((("--level", 2), "level"), (("--level", 1, "--size", 96), "made with size 112, now it is 96"),
                      (("--level", 1, "--aspect", "pad"), "made with aspect stretch, now it is pad"),
                      (("--level", 1, "--random-weights"), "made with (other )?weights"),
                      (("--level", 1, "--backbone", "resnet10t", "--random-weights"), "made with encoder mini")):
    act, unchanged = reindex(*options)
    CASES.append(Case(f"index again with {' '.join(map(str, options))}", act, says, 2, unchanged))


def moved(world):
    world.index().rename(world.path / "moved")
    return world.run("search", world.path / "moved", world.photos() / "1.png")


def touched(world):
    world.index()
    for path in world.photos().rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    return world.run("index", world.photos(), "--out", world.index(), "--level", 1)


def all_removed(world):
    world.index()
    for path in world.photos().rglob("*.png"):
        path.unlink()
    return world.run("index", world.photos(), "--out", world.index(), "--level", 1)


CASES += [
    Case("an index that moved", moved, "1.png", 0),
    Case("images with new times", touched, "8 images", 0),
    Case("a folder that became empty", all_removed, "no images in"),
]
