"""The official AMES implementation, output by output; the test files ames_fp, ames_prenorm and ames_binary call this."""
import pytest
import torch

from patchify.rerank.ames import AMES, Binarize, load_ames
from patchify.files import load_strict


def build(golden):
    m = golden.config["model"]
    model = AMES(m["local_dim"], m["model_dim"], m["nhead"], m["num_encoder_layers"], m["dim_feedforward"], m["activation"],
                 m["normalize_before"], m["binarized"])
    return load_strict(model, golden.weights)


def inputs(golden):
    get = lambda name: torch.as_tensor(golden[name])
    return get("src_local"), get("tgt_local"), ~get("src_mask"), ~get("tgt_mask")


def check_outputs(golden):
    model, (query, gallery, query_valid, gallery_valid) = build(golden).eval(), inputs(golden)
    with torch.no_grad():
        left, right = model.remap(query), model.remap(gallery)
        tokens = model.match(left, right, query_valid, gallery_valid)
        scores = model(query, gallery, query_valid, gallery_valid)
        measured = {"scores": scores, "scores_no_fastpath": scores, "logits": tokens, "logits_no_fastpath": tokens,
                    "src_remapped": left, "tgt_remapped": right, "tgt_remapped_half": right.half().float()}
        if model.binary:
            measured["bin_eval"] = model.remap_local[0].eval()(query)
            measured["bin_train"] = model.remap_local[0].train()(query)
    model.train()
    first = model.remap_local[0]
    trained = model(query, gallery, query_valid, gallery_valid)
    token, remap = torch.autograd.grad(trained.sum(), [model.mtc_token, first.W if isinstance(first, Binarize) else first.weight])
    measured |= {"scores_train": trained.detach(), "grad_mtc_token": token, "grad_remap": remap}
    for name in golden.outputs:
        golden.check(name, measured[name])
    golden.all_checked()


def check_sizes_are_read_off_the_tensors(golden):
    m = golden.config["model"]
    model, arguments = load_ames(golden.weights, m["nhead"], m["activation"]), inputs(golden)
    with torch.no_grad():
        golden.check("scores", model(*arguments))


def check_names_the_tensor_of_another_shape(golden):
    broken = dict(golden.weights) | {"decoder.layers.0.linear2.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="decoder.layers.0.linear2.bias"):
        load_strict(build(golden), broken)
