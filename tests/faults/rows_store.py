"Damaged indexes, stores, compressed indexes and caches: detected, named with a remedy, repaired by the same command."
import json
from pathlib import Path

import numpy as np
import torch

from campaign import DAMAGES, Case, contents, spoil
from patchify.boxes import Regions
from patchify.compress import PQIndex
from patchify.extraction import extract
from patchify.files import atomic_write
from patchify.indexfiles import load_or_build_index, merge_indexes, open_index
from patchify.learn import TrainingPlan, train
from patchify.store import Store, check_store, read_manifest, write_manifest
from patchify.synthetic.batches import make_assets

PART = "part-00000"
INDEX_FILES = ["images.parquet", "failures.csv"]
INDEX_FILES += [f"{PART}/{name}" for name in ("descriptors-00000.npy", "patches-00000.parquet", "shards.csv",
                                              "failures.csv", "manifest.json")]


def search(world):
    return world.run("search", world.index(), world.photos() / "1.png", "-k", 8)


def damage_index(change, check=True):
    "Spoil an index; `check` tells it, `search` tells it or is unaffected."
    def act(world):
        out = world.index()
        world.memory["intact"] = contents(out)
        change(out)
        found = search(world)
        if found.code:
            assert found.code == 2 and "patchify index" in found.err and str(out) in found.err, found.err
        else:
            assert found.out == world.found, "a wrong result with exit code 0"
        return world.run("check", out)
    return act


def index_is_repaired(world):
    "The same command repairs the index to the byte."
    assert world.run("index", world.photos(), "--out", world.index(), "--level", 1).code == 0
    assert world.run("check", world.index()).code == 0
    assert search(world).out == world.found
    assert contents(world.index()) == world.memory["intact"]


CASES = [
    Case(f"{file} {damage}", damage_index(lambda out, file=file, damage=damage: spoil(out / file, damage)),
         rf"{Path(file).name}|no manifest.json|holds no index", after=index_is_repaired)
    for file in INDEX_FILES for damage in DAMAGES
]


def exchange(first, second):
    def change(out):
        a = (out / first).read_bytes()
        b = (out / second).read_bytes()
        (out / first).write_bytes(b)
        (out / second).write_bytes(a)
    return change


CASES += [
    Case("two files exchanged", damage_index(exchange(f"{PART}/shards.csv", f"{PART}/failures.csv")),
         "is damaged", after=index_is_repaired),
    Case("the whole part removed", damage_index(lambda out: __import__("shutil").rmtree(out / PART)),
         "part-00000", after=index_is_repaired),
]


# STORES: several shards, made from the same photographs

def small_store(world, **options):
    from patchify.encoder import load_encoder

    photos = sorted(world.photos().rglob("*.png"))
    settings = dict(shard_size=3, batch=15) | options
    return extract(photos, load_encoder("mini"), Regions(level=1), world.path / "store", **settings)


def damage_store(change):
    def act(world):
        folder = small_store(world).path
        world.memory["intact"] = contents(folder)
        change(folder)
        return world.run("check", folder)
    return act


def store_is_repaired(world):
    small_store(world)
    assert contents(world.path / "store") == world.memory["intact"]
    assert check_store(world.path / "store") == []


def change_manifest(**values):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | values, indent=1) + "\n")
    return change


def reverse_names(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "patches-00000.parquet"
    table = pq.read_table(path)
    names = pa.array(table["image"].to_pylist()[::-1], pa.string()).dictionary_encode()
    changed = table.set_column(table.column_names.index("image"), "image", names)
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


def claim_more_images(folder):
    "A manifest whose checksum is right, but which counts what is not there."
    manifest = read_manifest(folder)
    write_manifest(folder, {name: value for name, value in manifest.items() if name != "checksum"} | {"images": 80})


def path_outside(folder):
    "A manifest that names a store's part outside of it."
    change_manifest(tables={"../../outside.csv": "0"})(folder)


D0, D1 = "descriptors-00000.npy", "descriptors-00001.npy"
P0, P1 = "patches-00000.parquet", "patches-00001.parquet"
REMEDY = "run the extraction again|extract it again|choose another folder"
CASES += [
    Case("descriptors of two shards exchanged", damage_store(exchange(D0, D1)), REMEDY, after=store_is_repaired),
    Case("patches of two shards exchanged", damage_store(exchange(P0, P1)), REMEDY, after=store_is_repaired),
    Case("both files of two shards exchanged", damage_store(lambda f: (exchange(D0, D1)(f), exchange(P0, P1)(f))),
         REMEDY, after=store_is_repaired),
    Case("a count in the manifest changed", damage_store(change_manifest(extracted=7)), REMEDY, after=store_is_repaired),
    Case("the number of images changed", damage_store(change_manifest(images=9)), REMEDY, after=store_is_repaired),
    Case("the dimension changed", damage_store(change_manifest(dim=128)), REMEDY, after=store_is_repaired),
    Case("the number of patches changed", damage_store(change_manifest(patches=1)), REMEDY, after=store_is_repaired),
    Case("a manifest without tables", damage_store(change_manifest(tables={})), REMEDY, after=store_is_repaired),
    Case("a manifest that points outside", damage_store(path_outside), REMEDY, after=store_is_repaired),
    Case("a manifest of another format", damage_store(change_manifest(format=1)), "store of format 1"),
    Case("a manifest that is a list", damage_store(lambda f: (f / "manifest.json").write_text("[]")), REMEDY,
         after=store_is_repaired),
    Case("a deeply nested manifest", damage_store(lambda f: (f / "manifest.json").write_text("[" * 100_000)), REMEDY,
         after=store_is_repaired),
    Case("names reversed", damage_store(reverse_names), REMEDY, after=store_is_repaired),
    Case("a consistent manifest of more images", damage_store(claim_more_images), "do not fit|damaged"),
]
for number, damage in enumerate(("zeroed", "middle bit flipped", "halved", "removed")):
    CASES.append(Case(f"the last shard {damage}", damage_store(
        lambda folder, damage=damage: spoil(folder / "descriptors-00002.npy", damage)), "descriptors-00002.npy.*again",
        after=store_is_repaired))


def read_after_damage(world):
    "A store that was opened before its file was damaged."
    store = Store.open(small_store(world).path)
    spoil(store.path / D1, "middle bit flipped")
    return world.call(lambda: list(store.descriptors()))


def boxes_after_damage(world):
    store = Store.open(small_store(world).path)
    spoil(store.path / P0, "middle bit flipped")
    return world.call(store.boxes, 0)


CASES += [Case("descriptors damaged after opening", read_after_damage, f"{D1}.*run the extraction again"),
          Case("boxes damaged after opening", boxes_after_damage, f"{P0}.*run the extraction again")]


# COMPRESSED INDEXES

def vectors(count=64):
    values = np.random.default_rng(0).standard_normal((count, 4, 16), dtype=np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def build_index(world):
    settings = PQIndex(n_subvectors=4, n_bits=3)
    return load_or_build_index(settings, vectors(), None, None, world.path / "indexes", "vectors")


def damage_compressed(damage):
    def act(world):
        expected = build_index(world).search(vectors(3)[:, 0], 5)
        path = next((world.path / "indexes").glob("*.index"))
        world.memory["intact"] = contents(path.parent)
        spoil(path, damage)
        outcome = world.call(open_index, path)
        again = build_index(world).search(vectors(3)[:, 0], 5)
        assert np.array_equal(again.ranks, expected.ranks) and np.array_equal(again.scores, expected.scores)
        return outcome
    return act


def index_is_rebuilt(world):
    assert contents(world.path / "indexes") == world.memory["intact"]


CASES += [Case(f"compressed index {damage}", damage_compressed(damage), r"\.index", after=index_is_rebuilt)
          for damage in DAMAGES]
CASES += [
    Case("merging a missing index", lambda world: world.call(merge_indexes, [world.path / "none.index"], world.path / "merged.index"), "none.index"),
    Case("merging a folder", lambda world: world.call(merge_indexes, [world.path], world.path / "merged.index"), "is not an index|no such|folder"),
]


# CACHES

def damage_assets(damage):
    def act(world):
        make = dict(families=2, backgrounds=2, side=32, cache=world.path / "cache")
        expected = make_assets(**make).atlases
        path = next((world.path / "cache").glob("*.npz"))
        spoil(path, damage)
        outcome = world.call(make_assets, **make)
        assert outcome.code == 2 or torch.equal(outcome.value.atlases, expected), "wrong pixels without an error"
        return outcome
    return act


CASES += [Case(f"drawn assets {damage}", damage_assets(damage), "", code=0) for damage in DAMAGES]


# CHECKPOINTS OF A TRAINING

def train_small(world, stop=None):
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 2)

    def loss(draw, rng):
        inputs = torch.from_numpy(rng.standard_normal((8, 4), dtype=np.float32))
        return network(inputs).square().mean()

    losses = train(network, loss, TrainingPlan(6, 1e-2), world.path / "run.safetensors", save_every=2, stop=stop)
    return losses, network.weight.detach().clone()


def damage_checkpoint(damage):
    def act(world):
        train_small(world, stop=4)
        spoil(world.path / "run.safetensors", damage)
        return world.call(train_small, world)
    return act


def fresh_run_works(world):
    (world.path / "run.safetensors").unlink(missing_ok=True)
    assert len(train_small(world)[0]) == 6


CASES += [
    Case(f"training checkpoint {damage}", damage_checkpoint(damage), r"run\.safetensors.*(delete|choose)",
         after=fresh_run_works)
    for damage in DAMAGES if damage != "removed"
]
CASES.append(Case("training checkpoint removed", damage_checkpoint("removed"), "", code=0, after=fresh_run_works))
