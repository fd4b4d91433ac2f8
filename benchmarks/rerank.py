"""Re-rankers: memory of a list-wise pass against its length and against dense attention, and of an AMES gallery against float32.

Memory is what one training pass of one layer keeps for its backward pass, in MB, counted tensor by tensor; it does not depend on the machine.
ratio = baseline / ours. For the growth rows, ours is the short list and baseline the long one, so the ratio is the growth.
"""
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from patchify.rerank.ames import AMES, pack
from patchify.rerank.locore import LOCORE
from patchify.rerank.shortlist import Descriptors

DESCRIPTORS, DIM, HEADS, WINDOW = 49, 256, 8, 512      # tokens of an image, and the small published LOCORE


def kept_megabytes(forward, *inputs) -> float:
    "What autograd keeps of a forward pass: each storage once, parameters not counted."
    own = {p.untyped_storage().data_ptr() for p in forward.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(*inputs)
    return sum(storage.nbytes() for storage in kept.values()) / 1e6


class Dense(nn.Module):
    "One layer of the same size that lets every token see every other and keeps the table of weights."
    def __init__(self):
        super().__init__()
        self.packed, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.feed, self.norms = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)), nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])

    def forward(self, x):
        q, k, v = self.packed(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = self.norms[0](x + self.out(((q @ k.transpose(2, 3) / (DIM / HEADS) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.feed(x))


def rows() -> list[dict]:
    "One dict per comparison."
    torch.set_num_threads(2)
    torch.manual_seed(0)
    ours, dense = {}, {}
    model = LOCORE(local_dim=DIM, dim=DIM, layers=1, heads=HEADS, window=WINDOW, hidden=4 * DIM, dropout=0.0)
    for images in (25, 50, 100):
        descriptors = Descriptors(np.random.default_rng(0).normal(size=(1 + images, DESCRIPTORS, DIM)).astype(np.float32)).take(np.arange(1 + images))
        ours[images] = kept_megabytes(model, [descriptors])
        dense[images] = kept_megabytes(Dense(), torch.zeros(1, (1 + images) * (DESCRIPTORS + 1), DIM))
    rng = np.random.default_rng(0)
    gallery = Descriptors(rng.normal(size=(200, 50, 768)).astype(np.float32))
    packed = pack(AMES(binary=True).eval(), gallery)
    with tempfile.TemporaryDirectory() as folder:
        packed.save(Path(folder) / "codes.npy")
        np.save(Path(folder) / "values.npy", gallery.values)
        bits, values = ((Path(folder) / name).stat().st_size / len(packed) for name in ("codes.npy", "values.npy"))

    def row(benchmark, ours, baseline, target=None):
        return dict(benchmark=benchmark, ours=ours, baseline=baseline, ratio=baseline / ours, target=target)

    return [
        row("LOCORE, list of 100 images, against dense attention [MB]", ours[100], dense[100], ">= 2"),
        row("LOCORE, from 25 to 50 images [MB]", ours[25], ours[50], "<= 2.3"),
        row("LOCORE, from 50 to 100 images [MB]", ours[50], ours[100], "<= 2.3"),
        row("dense attention, from 50 to 100 images [MB]", dense[50], dense[100], ">= 3.5"),
        row("AMES gallery of 50 x 128 bits, against float32 [bytes per image on disk]", bits, values, ">= 190"),
    ]


if __name__ == "__main__":
    for found in rows():
        print(found)
