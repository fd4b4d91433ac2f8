"Invalid and malicious weights are refused when they are loaded, and never run code."
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import patchify
from campaign import Case
from patchify.encoder import MINI_WEIGHTS, load_encoder
from patchify.files import read_checkpoint, read_metadata, read_weights

SHIPPED = Path(str(MINI_WEIGHTS))
WITNESS = Path("was-here")


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {WITNESS.absolute()}",)


def nothing_ran(world):
    assert not (world.path / WITNESS).exists()


def weights(name, make, says, suffix=".safetensors", code=2, backbone="mini"):
    "A checkpoint that `make` writes, given to the command line."
    def act(world):
        path = world.path / f"weights{suffix}"
        make(path)
        return world.run("index", world.photos(), "--out", world.path / "index", "--level", 0, "--checkpoint", path,
                         "--backbone", backbone)

    def after(world):
        nothing_ran(world)
        if code:
            assert not list((world.path / "index").glob("part-*"))
    return Case(name, act, says, code, after)


def changed(**tensors):
    "The shipped encoder with tensors replaced by functions of them."
    def make(path):
        values = load_file(SHIPPED)
        for name, change in tensors.items():
            key = next(key for key, value in values.items() if value.is_floating_point() and value.dim() > 1)
            values[key] = change(values[key])
        save_file(values, path, read_metadata(SHIPPED))
    return make


def poison(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor
    return change


def without_one(path):
    values = load_file(SHIPPED)
    values.pop(next(iter(values)))
    save_file(values, path, read_metadata(SHIPPED))


def one_more(path):
    save_file(load_file(SHIPPED) | {"surplus": torch.ones(1)}, path, read_metadata(SHIPPED))


def other_metadata(**values):
    return lambda path: save_file(load_file(SHIPPED), path, read_metadata(SHIPPED) | values)


def as_bytes(content):
    return lambda path: path.write_bytes(content)


def cut(share):
    return lambda path: path.write_bytes(SHIPPED.read_bytes()[: int(share * SHIPPED.stat().st_size)])


def torch_file(content):
    return lambda path: torch.save(content, path)


FILE = r"weights\.(safetensors|pt)"
CASES = [
    weights("a nan", changed(first=poison(float("nan"))), f"holds NaN or infinity in .*{FILE}"),
    weights("infinity", changed(first=poison(float("inf"))), f"holds NaN or infinity in .*{FILE}"),
    weights("negative infinity", changed(first=poison(float("-inf"))), f"holds NaN or infinity in .*{FILE}"),
    weights("another shape", changed(first=lambda t: t.flatten()), f"has shape .*{FILE}"),
    weights("a tensor less", without_one, f"is missing in .*{FILE}"),
    weights("a tensor more", one_more, f"tensor surplus is in .*{FILE}"),
    weights("no metadata", lambda path: save_file(load_file(SHIPPED), path), f"{FILE} is not a checkpoint of the mini"),
    weights("an unknown architecture", other_metadata(architecture="resnet10x"), f"{FILE} is not a checkpoint of the mini"),
    weights("a dimension of zero", other_metadata(dim="0"), FILE),
    weights("a dimension of words", other_metadata(dim="many"), f"{FILE} is not a checkpoint"),
    weights("a size of words", other_metadata(size='"many"'), f"{FILE}"),
    weights("a negative size", other_metadata(size="-112"), f"{FILE}"),
    weights("a standard deviation of zero", other_metadata(std="[0, 0, 0]"), f"{FILE}"),
    weights("empty", as_bytes(b""), FILE),
    weights("text", as_bytes(b"hello"), FILE),
    weights("a header of 2**60 bytes", as_bytes(b"\xff" * 7 + b"\x10" + b"{}"), FILE),
    weights("cut short", cut(0.5), FILE),
    weights("cut in the header", cut(0.0005), FILE),
    weights("a folder", lambda path: path.mkdir(), f"{FILE}"),
    weights("missing", lambda path: None, f"{FILE}"),
    weights("a pickle that runs code", lambda path: path.write_bytes(pickle.dumps(Evil())), FILE, ".pt", backbone="resnet10t"),
    weights("a checkpoint that runs code", torch_file({"state_dict": Evil()}), "could run code", ".pt", backbone="resnet10t"),
    weights("a module", torch_file(torch.nn.Linear(2, 2)), "could run code.*save its tensors", ".pt", backbone="resnet10t"),
    weights("a list", torch_file([torch.ones(2)]), "holds no weights", ".pt", backbone="resnet10t"),
    weights("no tensors", torch_file({"epoch": 3}), "holds no weights", ".pt", backbone="resnet10t"),
    weights("nested wrappers", torch_file({"model": {"state_dict": {"a": torch.ones(1)}}}), f"{FILE}", ".pt",
            backbone="resnet10t"),
    weights("text for torch", as_bytes(b"hello"), "damaged or no checkpoint", ".pt", backbone="resnet10t"),
]


def other_network(world):
    path = world.path / "other.safetensors"
    save_file({"a": torch.ones(2)}, path)
    return world.call(load_encoder, "resnet10t", path)


def shipped(file, damage):
    "The package's own weights, damaged in a copy of the package."
    def act(world):
        folder = world.path / "patchify" / "weights"
        folder.mkdir(parents=True)
        for path in (Path(patchify.__file__).parent / "weights").iterdir():
            shutil.copy(path, folder)
        content = bytearray((folder / file).read_bytes())
        content[damage(len(content))] ^= 1
        (folder / file).write_bytes(content)
        return world.call(read_weights, folder / file)
    return act


def every_shipped_file_is_sound(world):
    def read():
        for path in sorted((Path(patchify.__file__).parent / "weights").glob("*.safetensors")):
            read_weights(path)
    return world.call(read)


def a_reader(world):
    path = world.path / "a.pt"
    torch.save({"scores": np.ones(3), "names": ["a"], "tensor": torch.ones(2)}, path)
    return world.call(lambda: json.dumps(sorted(read_checkpoint(path))))


CASES += [
    Case("the weights of another network", other_network, "other.safetensors"),
    Case("shipped weights with a flipped bit", shipped("mini.safetensors", lambda n: n - 9),
         "mini.safetensors.*(damaged|hash).*install"),
    Case("a shipped re-ranker with a flipped bit", shipped("ames.safetensors", lambda n: n // 2),
         "ames.safetensors.*(damaged|hash).*install"),
    Case("all shipped weights", every_shipped_file_is_sound, "", 0),
    Case("plain data in a checkpoint", a_reader, "", 0),
]
