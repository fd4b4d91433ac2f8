"""The authors' extraction, image by image; test_golden_official_extraction.py calls this for both backbones."""
import numpy as np
import torch
from official_fill import Official, filled

from patchify.rerank.backbones import load_cvnet, load_detector, load_dinov2
from patchify.rerank.extraction import Extractor


def check(name: str, prepared) -> None:
    golden = Official(name)
    settings = golden.info["settings"]
    backbone, detector = (key.removeprefix("keys/").removesuffix(".json") for key in golden.info["keys"])
    load = load_dinov2 if settings["patch_size"] else load_cvnet
    extractor = Extractor(load(prepared(backbone)), load_detector(prepared(detector)), settings["imsize"], tuple(settings["scales"]),
                          settings["topk"])
    images = golden.arrays["images"]
    boxes = {"gallery": [None] * len(images), "query": settings["query_boxes"]}
    for side in ("gallery", "query"):
        described = [extractor(image, box) for image, box in zip(images, boxes[side])]
        tables = np.stack([table for table, _ in described])
        valid = tables[..., 3] == 0
        golden.check(f"{side}_valid", valid.sum(1))
        if f"{side}_cls" in golden.arrays:
            golden.check(f"{side}_cls", np.stack([vectors["cls"] for _, vectors in described]))
        golden.check(f"{side}_global", np.stack([vectors["global"] for _, vectors in described]))
        golden.check(f"{side}_meta", tables[..., :5])
        golden.check(f"{side}_local", tables[:, :golden.arrays[f"{side}_local"].shape[1], 5:])


def check_detector(name: str) -> None:
    golden = Official(name)
    with torch.no_grad():
        descriptors, weights = load_detector(filled(name))(golden["features"])
    golden.check("descriptors", descriptors)
    golden.check("weights", weights[:, None])
