"""Reads a golden of the re-rankers: arrays, settings and tolerances, from the folder PATCHIFY_GOLDEN."""
import json
import os
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("PATCHIFY_GOLDEN", Path(__file__).parent / "golden"))


class Golden:
    def __init__(self, name):
        self.info = json.loads((FOLDER / f"{name}.json").read_text())
        self.config = self.info["config"]
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.outputs = {a["name"] for a in self.info["arrays"] if a["role"] == "output"}
        self.checked = set()
        weights = FOLDER / f"{name}.safetensors"
        self.weights = load_file(str(weights)) if weights.exists() else None

    def __getitem__(self, key):
        return self.arrays[key]

    def ragged(self, key):
        values, pointer = self[f"{key}_val"], self[f"{key}_ptr"]
        return [values[a:b] for a, b in zip(pointer[:-1], pointer[1:])]

    def check(self, name, value):
        "Compare one output within the tolerance of the longest pattern that matches its name."
        patterns = self.info["tolerance"]["patterns"]
        atol, rtol = patterns[max((p for p in patterns if fnmatchcase(name, p)), key=len)]
        value = np.asarray(value)
        assert value.shape == self[name].shape, f"{name}: shape {value.shape}, golden {self[name].shape}"
        np.testing.assert_allclose(value.astype(np.float64), self[name].astype(np.float64), atol=atol, rtol=rtol, err_msg=name)
        self.checked.add(name)
        return float(np.abs(value.astype(np.float64) - self[name]).max(initial=0))

    def all_checked(self):
        "No output of the golden was left out."
        assert self.checked == self.outputs, f"not checked: {sorted(self.outputs - self.checked)}"
