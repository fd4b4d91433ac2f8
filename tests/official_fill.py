"""Rebuilds the official checkpoints of tests/golden/official from their key lists, and reads their stored outputs."""
import hashlib
import json
import math
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(os.environ.get("PATCHIFY_GOLDEN", Path(__file__).parent / "golden")) / "official"
TOKENS = {"query", "mtc_token", "sep_embedding", "pad_embedding", "cls_token", "register_tokens", "mask_token", "pos_embed"}
TABLES = {"word_embeddings", "position_embeddings", "token_type_embeddings", "scale_encoder"}


def normal(salt: str, key: str, shape) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(f"{salt}:{key}".encode()).digest()[:8], "big")
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape))


def fill(salt: str, key: str, shape) -> np.ndarray:
    "One tensor of a filled checkpoint, by the rule of the goldens."
    leaf, parent = ["", *key.split(".")][-1], ["", "", *key.split(".")][-2]
    if leaf == "num_batches_tracked":
        return np.ones(shape, np.int64)
    n = normal(salt, key, shape)
    if leaf == "running_var":
        filled = 1 + 0.1 * np.abs(n)
    elif leaf == "running_mean" or leaf.endswith("bias"):
        filled = 0.1 * n
    elif leaf in ("gamma", "dust_bin") or (leaf == "weight" and len(shape) == 1):
        filled = 1 + 0.1 * n
    elif leaf == "p":
        filled = 3 + 0.1 * n
    elif leaf in TOKENS or parent in TABLES:
        filled = 0.02 * n
    else:
        filled = n / math.sqrt(math.prod(shape[1:]))
    return np.asarray(filled, np.float32)


@cache
def filled(name: str) -> dict[str, torch.Tensor]:
    "The state dict of keys/NAME.json, checked against its check sums; tensors without one are left out."
    listed = json.loads((FOLDER / "keys" / f"{name}.json").read_text())
    tensors = {}
    for key, shape, _, crc in listed["keys"]:
        if crc is None:
            continue
        array = fill(listed["fill_salt"], key, shape)
        assert f"{zlib.crc32(array.tobytes()):08x}" == crc, f"{name}: {key} is not filled as the golden was"
        tensors[key] = torch.as_tensor(array)
    return tensors


def image(salt: str, number: int, height: int, width: int) -> np.ndarray:
    "One generated RGB image (h, w, 3) uint8, by the image formula of the goldens."
    d = hashlib.sha256(f"{salt}:image".encode()).digest()
    a, b, k, s = 3 + d[0] % 5, 2 + d[1] % 7, 7 + d[2] % 9, d[3]
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    v = (x * (a + c) + y * (b + number) + (x * y) // k + 41 * c + 83 * number + s) % 512
    return np.where(v < 256, v, 511 - v).astype(np.uint8)


class Official:
    "Inputs, outputs and tolerances of one official golden."

    def __init__(self, name: str):
        self.info = json.loads((FOLDER / f"{name}.json").read_text())
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.listed = {entry["name"]: entry for entry in self.info["arrays"]}

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.as_tensor(self.arrays[name])

    def check(self, name: str, value, atol: float | None = None) -> None:
        value, expected = np.asarray(value), self.arrays[name]
        assert value.shape == expected.shape, f"{name}: shape {value.shape}, golden {expected.shape}"
        atol = self.listed[name].get("atol", 0) if atol is None else atol
        np.testing.assert_allclose(value.astype(np.float64), expected.astype(np.float64), rtol=0, atol=atol, err_msg=name)
