"""Every stage of TokenHead against the official Token_Refine (golden `token_refine`)."""
import fnmatch
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from patchify.descriptors.token import TokenHead, load_token_head
from patchify.files import load_strict

FOLDER = Path(os.environ.get("PATCHIFY_GOLDEN", Path(__file__).parent / "golden"))
META = json.loads((FOLDER / "token_refine.json").read_text())
ARRAYS = np.load(FOLDER / "token_refine.npz", allow_pickle=False)
WEIGHTS = load_file(FOLDER / META["state_dict"]["file"])
MODEL = META["config"]["model"]
FEATURE_MAP = torch.from_numpy(ARRAYS["x"]).float()


def agree(name, value):
    patterns = META["tolerance"]["patterns"]
    atol, rtol = patterns[max((p for p in patterns if fnmatch.fnmatchcase(name, p)), key=len)]
    np.testing.assert_allclose(value.detach().numpy(), ARRAYS[name], atol=atol, rtol=rtol, err_msg=name)


@pytest.fixture(scope="module")
def stages():
    with torch.no_grad():
        return load_token_head(WEIGHTS, MODEL["num_heads"]).stages(FEATURE_MAP)


def test_configuration_is_read_from_the_weights():
    head = load_token_head(WEIGHTS, MODEL["num_heads"])
    assert head.query.shape == (1, MODEL["num_object"], MODEL["mid_dim"])
    assert (len(head.encoder), len(head.decoder)) == (MODEL["encoder_layer"], MODEL["decoder_layer"])


@pytest.mark.parametrize("name, stage", [
    ("encoder_out", "local"), ("tokens_pooled", "pooled"), ("tokens_normed", "normed"), ("decoder_out", "refined"), ("out", "output")])
def test_stage(stages, name, stage):
    agree(name, getattr(stages, stage))


def test_descriptor(stages):
    agree("out_l2", normalize(stages.output))
    np.testing.assert_allclose(normalize(stages.output).numpy(), ARRAYS["out_l2"], atol=1e-5)


def test_training_mode_and_the_statistics_after_it():
    head = TokenHead(
        FEATURE_MAP.shape[1], ARRAYS["out"].shape[1], MODEL["mid_dim"], MODEL["num_object"], MODEL["num_heads"],
        MODEL["encoder_layer"], MODEL["decoder_layer"], drop=0.0)
    load_strict(head, WEIGHTS).train()
    agree("out_train_nodrop", head(FEATURE_MAP))
    for name in ARRAYS.files:
        if name.startswith("after_train."):
            agree(name, head.state_dict()[name.removeprefix("after_train.")])


def test_every_output_is_covered():
    outputs = {a["name"] for a in META["arrays"] if a["role"] == "output"}
    seen = {"out", "out_l2", "encoder_out", "tokens_pooled", "tokens_normed", "decoder_out", "out_train_nodrop"}
    assert {name for name in outputs if not name.startswith("after_train.")} == seen
