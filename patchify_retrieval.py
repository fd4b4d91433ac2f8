"""The console script. It lies outside the package, so that it can report when another package took its place.

The package index has an unrelated distribution called `patchify`. Installing it overwrites `patchify/__init__.py`, and
uninstalling it deletes that file.
"""
import sys
from importlib.util import find_spec
from pathlib import Path

MARKER = '__distribution__ = "patchify-retrieval"'  # a line of our patchify/__init__.py


def problem() -> str | None:
    "What is wrong with the installed package, with the remedy; None if nothing is."
    remedy = "pip uninstall -y patchify && pip install --force-reinstall --no-deps patchify-retrieval"
    spec = find_spec("patchify")
    if spec is None:
        return f"the package patchify is missing; repair it with: {remedy}"
    if spec.origin is None:
        place = next(iter(spec.submodule_search_locations), "patchify")
        return f"{place} has lost its __init__.py, as after uninstalling an unrelated patchify; repair it with: {remedy}"
    if MARKER not in Path(spec.origin).read_text(encoding="utf-8", errors="replace"):
        return f"{spec.origin} belongs to an unrelated package that is also called patchify; repair it with: {remedy}"
    return None


def main() -> int:
    "Run the command line, or say why it cannot run."
    found = problem()
    if found:
        print(f"patchify: {found}", file=sys.stderr)
        return 2
    from patchify.cli import main as run

    return run()
