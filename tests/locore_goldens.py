"""The official LOCORE model, output by output; the test files locore_noglobal and locore_global call this."""
import numpy as np
import pytest
import torch

from patchify.rerank.locore import LOCORE, aggregate, load_locore
from patchify.rerank.locore_training import list_recall, locore_loss
from patchify.files import load_strict
from patchify.rerank.shortlist import Descriptors

MODES = ("max-prod", "max-sum", "max-start", "max-end")


def build(golden, **changed):
    pytest.importorskip("transformers")
    lm, m = golden.config["longformer"], golden.config["model"] | changed
    model = LOCORE(m["local_dim"], m["global_dim"], m["num_scales"], lm["hidden_size"], lm["num_hidden_layers"], lm["num_attention_heads"],
                   lm["attention_window"][0], lm["intermediate_size"], lm["max_position_embeddings"], m["pos_type"],
                   m["query_global_attention"], m["do_norm"], dropout=0.0)
    return load_strict(model, golden.weights).eval()


def images(golden, case):
    "The lists of a case: the query's row in front of the gallery's."
    both = lambda name: torch.cat([torch.as_tensor(golden[f"{case}.query_{name}"])[:, None], torch.as_tensor(golden[f"{case}.gallery_{name}"])], 1)
    values, scales, valid = both("local_features"), both("local_scales"), both("local_mask") == 0
    summary = both("global_features").squeeze(2) if golden.config["with_global"] else [None] * len(values)
    return [Descriptors(*parts) for parts in zip(values, valid, scales, summary)]


@torch.no_grad()
def check_outputs(golden):
    model = build(golden)
    for case in golden.config["cases"]:
        lists, positive = images(golden, case), torch.as_tensor(golden[f"{case}.positive_mask"])
        hidden, logits = model.encode(lists), model(lists)
        golden.check(f"{case}.last_hidden", hidden.flatten(1, 2))
        golden.check(f"{case}.token_logits", logits.flatten(1, 2))
        golden.check(f"{case}.train_loss", locore_loss(logits, positive))
        for mode in MODES:
            for name, softmax in (("logits", False), ("softmax", True)):
                scores = aggregate(logits, mode, softmax)
                golden.check(f"{case}.{name}.{mode}", scores)
                golden.check(f"{case}.{name}.{mode}.order", scores.argsort(descending=True))
            for k in (1, 5, 10):
                golden.check(f"{case}.train.{mode}_recall_{k}", np.float32(list_recall(aggregate(logits, mode, True), positive, k)))
    for name, changed in golden.config["variants"].items():
        logits = build(golden, **changed)(images(golden, next(iter(golden.config["cases"]))))
        for mode in ("max-sum", "max-end"):
            golden.check(f"variant.{name}.{mode}", aggregate(logits, mode))
    golden.all_checked()


@torch.no_grad()
def check_sizes_are_read_off_the_tensors(golden):
    lm, m = golden.config["longformer"], golden.config["model"]
    build(golden)
    model = load_locore(golden.weights, lm["num_attention_heads"], lm["attention_window"][0], positions=m["pos_type"], query_global=m["query_global_attention"],
                        unit=m["do_norm"], global_dim=m["global_dim"])
    case = next(iter(golden.config["cases"]))
    golden.check(f"{case}.logits.max-end", aggregate(model(images(golden, case))))


def check_names_the_tensor_of_another_shape(golden):
    name = "language_model.longformer.encoder.layer.0.attention.self.key_global.weight"
    with pytest.raises(ValueError, match=name):
        load_strict(build(golden), dict(golden.weights) | {name: torch.zeros(3, 3)})
