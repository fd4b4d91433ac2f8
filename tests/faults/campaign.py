"""What a row of the campaign is, and the world it acts in.

A row states an action, the exit code and the message that are expected, and the invariant that holds afterwards. Every
message must moreover be free of tracebacks and of the bare errors of Python.
"""
import contextlib
import io
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from patchify.cli import main

BARE_ERRORS = re.compile(
    r"Traceback|KeyError|IndexError|AttributeError|TypeError|UnicodeDecodeError|invalid literal|not subscriptable"
    r"|list index|out of range|to unpack|has no attribute|Errno|snappy|<_io|0x[0-9a-f]{6}|NoneType")
READ_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


@dataclass(frozen=True)
class Outcome:
    "How an action ended."
    code: int  # exit code; of a function: 0, or 2 for one of READ_ERRORS
    out: str = ""  # standard output
    err: str = ""  # standard error, or the message of the error
    value: object = None  # what a function returned


@dataclass
class World:
    "The folder that a row acts in, empty at its start, and what all rows share."
    path: Path  # the same for all rows, so that an index of the photographs in it can be copied
    shared: Path  # read only: photos/, index/ of these photos at level 1, tiny/
    found: str = ""  # what a search of this index prints
    memory: dict = field(default_factory=dict)  # from the action to the invariant

    def photos(self) -> Path:
        "A copy of the photographs, with the same times."
        return self._copy("photos")

    def index(self) -> Path:
        "An index of these photographs."
        self.photos()
        return self._copy("index")

    def _copy(self, name: str) -> Path:
        if not (self.path / name).exists():
            shutil.copytree(self.shared / name, self.path / name)
        return self.path / name

    def run(self, *words: object) -> Outcome:
        "One command line, in this process."
        out = io.StringIO()
        err = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(word) for word in words])
        return Outcome(code, out.getvalue(), err.getvalue())

    def call(self, function: Callable, *arguments: object, **options: object) -> Outcome:
        "One function of the package; only errors that name a mistake are caught."
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err):
                value = function(*arguments, **options)
            return Outcome(0, err=err.getvalue(), value=value)
        except READ_ERRORS as error:
            return Outcome(2, err=f"{err.getvalue()}{error}")
        except KeyboardInterrupt as error:
            return Outcome(130, err=f"{err.getvalue()}{error}")


@dataclass(frozen=True)
class Case:
    "One row of the campaign."
    name: str
    act: Callable[[World], Outcome]  # does something wrong
    says: str  # regular expression that the message contains
    code: int = 2  # exit code
    after: Callable[[World], None] = lambda world: None  # the invariant: asserts


def contents(folder: Path) -> dict[str, bytes]:
    "Every file below a folder, lock files apart."
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check_case(case: Case, world: World) -> None:
    "Act, and compare with what the row expects."
    outcome = case.act(world)
    text = outcome.err + (outcome.out if outcome.code == 0 else "")
    assert outcome.code == case.code, f"exit code {outcome.code} instead of {case.code}: {text}"
    assert re.search(case.says, text), f"expected {case.says!r} in {text!r}"
    assert not BARE_ERRORS.search(outcome.err), f"a bare error: {outcome.err}"
    last = outcome.err.strip().splitlines()
    if outcome.code == 2:
        assert last and len(last[-1]) < 700, f"not one sentence: {outcome.err}"
        assert len(last) == len(set(last)), f"the same line twice: {outcome.err}"
    case.after(world)


# DAMAGE

def flipped(content: bytes, position: float) -> bytes:
    "One bit changed."
    changed = bytearray(content)
    changed[min(int(position * len(content)), len(content) - 1)] ^= 1
    return bytes(changed)


DAMAGES = {
    "removed": lambda content: None,
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "halved": lambda content: content[: len(content) // 2],
    "one byte longer": lambda content: content + b"\0",
    "first bit flipped": lambda content: flipped(content, 0),
    "middle bit flipped": lambda content: flipped(content, 0.5),
    "last bit flipped": lambda content: flipped(content, 1),
    "reversed": lambda content: content[::-1],
    "replaced by text": lambda content: b"hello world\n",
}


def spoil(path: Path, damage: str) -> None:
    "Damage a file."
    content = DAMAGES[damage](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
