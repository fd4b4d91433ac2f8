"Run all benchmarks, print one table and keep it: python -m benchmarks [NAME ...]"
import csv
import importlib
import sys
from pathlib import Path

from patchify.pages.page import hardware

HERE = Path(__file__).parent
NAMES = [path.stem for path in sorted(HERE.glob("*.py")) if path.stem not in ("__init__", "__main__", "backbones", "gpu", "rates", "scale")]


def _short(value: object) -> object:
    "Three digits of a measured number."
    return float(f"{value:.3g}") if isinstance(value, float) else "" if value is None else value


def main(names: list[str]) -> None:
    "Run the named benchmarks and renew their rows in results.csv."
    kept = []
    if (HERE / "results.csv").exists():
        with open(HERE / "results.csv", newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["group"] in NAMES and row["group"] not in names]
    rows = kept + [{"group": name, **{key: _short(value) for key, value in row.items()}, "hardware": hardware()}
                   for name in names for row in importlib.import_module(f"benchmarks.{name}").rows()]
    rows.sort(key=lambda row: row["group"])
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["group", "benchmark", "ours", "baseline", "ratio", "target", "hardware"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['group']:10}  {row['benchmark']:60}  ours {row['ours']}  baseline {row['baseline']}  ratio {row['ratio']}  ({row['target']})")


if __name__ == "__main__":
    main(sys.argv[1:] or NAMES)
