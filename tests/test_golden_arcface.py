"""ArcFace logits, loss and gradients against the official head (golden `arcface`)."""
import fnmatch
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from patchify.descriptors.token import ArcFace
from patchify.files import load_strict

FOLDER = Path(os.environ.get("PATCHIFY_GOLDEN", Path(__file__).parent / "golden"))
META = json.loads((FOLDER / "arcface.json").read_text())
ARRAYS = np.load(FOLDER / "arcface.npz", allow_pickle=False)
CONFIG = META["config"]


def agree(name, value):
    patterns = META["tolerance"]["patterns"]
    atol, rtol = patterns[max((p for p in patterns if fnmatch.fnmatchcase(name, p)), key=len)]
    np.testing.assert_allclose(value.detach().numpy(), ARRAYS[name].reshape(value.shape), atol=atol, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("setting", CONFIG["settings"])
def test_logits_loss_and_gradients(setting):
    scale, margin = CONFIG["settings"][setting]
    head = load_strict(ArcFace(CONFIG["in_features"], CONFIG["out_features"], scale, margin), load_file(FOLDER / META["state_dict"]["file"]))
    x, labels = torch.from_numpy(ARRAYS["x"]).requires_grad_(), torch.from_numpy(ARRAYS["label"])
    logits = head(x, labels)
    loss = cross_entropy(logits, labels)
    loss.backward()
    agree(f"logits_{setting}", logits)
    agree(f"loss_{setting}", loss)
    agree(f"grad_x_{setting}", x.grad)
    agree(f"grad_weight_{setting}", head.weight.grad)
    own = torch.arange(len(labels)), labels
    changed = (logits != head(x))[own]
    assert changed.tolist() == ARRAYS[f"margin_applied_{setting}"].tolist()


def test_every_output_is_covered():
    outputs = {a["name"] for a in META["arrays"] if a["role"] == "output"}
    assert outputs == {f"{kind}_{s}" for s in CONFIG["settings"] for kind in ("logits", "loss", "grad_x", "grad_weight", "margin_applied")}
