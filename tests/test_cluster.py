"""Several machines: the same bytes whatever dies on the way. One real Ray cluster of three nodes serves all tests."""
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'patchify-retrieval[cluster]'")

from patchify.boxes import Regions  # noqa: E402
from patchify.cluster import SharedFolder, WorkerPool, Workers, build_on_cluster, extract_on_cluster  # noqa: E402
from patchify.cluster import ClusterIndex, local_cluster  # noqa: E402
from patchify.extraction import extract  # noqa: E402
from patchify.indexfiles import save_index  # noqa: E402
from patchify.ivf import IVFPQIndex  # noqa: E402
from patchify.search import ExactIndex  # noqa: E402
from patchify.store import Store  # noqa: E402

IMAGES = 36
PASSES = 35  # one image is damaged
SETTINGS = {"regions": Regions(level=1), "shard_size": 4, "batch": 5}  # nine shards of four forward passes
LOADER = textwrap.dedent(r"""
    import os, signal, time
    import ray, torch

    def loader(log, delay=0.0, die=None):
        "What loads an encoder that records every forward pass, and that may kill its process once, in the middle of a shard."
        def load():
            class Colours:
                name = "colours"
                fingerprint = "0"
                size = 8
                dim = 48
                dtype = torch.float32
                device = "cpu"
                aspect = "stretch"
                padding = None
                passes = 0

                def __call__(self, images):
                    Colours.passes += 1
                    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "no cluster"
                    with open(log, "a") as file:
                        file.write(f"{os.getpid()} {node}\n")
                    time.sleep(delay)
                    if die and Colours.passes == 6 and not os.path.exists(die):
                        open(die, "w").close()
                        os.kill(os.getpid(), signal.SIGKILL)
                    tiny = torch.nn.functional.avg_pool2d(images.float() / 255, 2).flatten(1)
                    return torch.nn.functional.normalize(tiny - 0.5, dim=1)

            return Colours()
        return load
""")
exec(LOADER)  # defined as text, so that Ray sends the functions by value and a script can use them too


def passes(log):
    return len(Path(log).read_text().splitlines())


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def cluster():
    "Three nodes with one worker each."
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        cluster = local_cluster(3)
    except Exception as error:
        pytest.skip(f"Ray cannot start a cluster here: {error}")
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        tiles = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(tiles).resize((60, 40)).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes(b"no picture")
    return [folder / f"{i:02d}.png" for i in range(IMAGES)]


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    "The store of a single process."
    folder = tmp_path_factory.mktemp("alone")
    return extract(photos, loader(folder / "log")(), out=folder / "store", **SETTINGS)


def test_one_worker_makes_the_bytes_of_a_single_process(cluster, photos, alone, tmp_path):
    extract_on_cluster(photos, loader(tmp_path / "log"), out=tmp_path / "store", workers=Workers(1), **SETTINGS)
    assert contents(tmp_path / "store") == contents(alone.path)


def test_a_killed_worker_costs_its_shard_and_nothing_else(cluster, photos, alone, tmp_path):
    load = loader(tmp_path / "log", 0.02, str(tmp_path / "died"))
    extract_on_cluster(photos, load, out=tmp_path / "store", workers=Workers(3), **SETTINGS)
    assert (tmp_path / "died").exists()
    assert contents(tmp_path / "store") == contents(alone.path)
    assert PASSES < passes(tmp_path / "log") <= PASSES + 4, "at most the four passes of one shard are repeated"


def test_a_killed_driver_and_a_removed_node_lose_nothing(cluster, photos, alone, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(LOADER + textwrap.dedent(f"""
        import ray
        from pathlib import Path
        from patchify.boxes import Regions
        from patchify.cluster import Workers, extract_on_cluster
        paths = {[str(path) for path in photos]!r}
        ray.init(address={cluster.address!r}, log_to_driver=False, logging_level="ERROR")
        extract_on_cluster([Path(path) for path in paths], loader({str(tmp_path / 'log')!r}, 0.3), out={str(tmp_path / 'store')!r},
                           workers=Workers(2), regions=Regions(level=1), shard_size=4, batch=5)
    """))
    driver = subprocess.Popen([sys.executable, script])
    wait_for(lambda: len(list((tmp_path / "store").glob("descriptors-*.npy"))) >= 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(2)  # Ray ends the workers of a driver that died
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("descriptors-*.npy")}
    assert 2 <= len(done) < 9
    node = next(iter(cluster.worker_nodes))

    removed = []

    def remove():
        wait_for(lambda: (tmp_path / "again").exists() and node.node_id in (tmp_path / "again").read_text())
        cluster.remove_node(node)
        removed.append(True)

    thread = threading.Thread(target=remove)
    thread.start()
    extract_on_cluster(photos, loader(tmp_path / "again", 0.3), out=tmp_path / "store", workers=Workers(3), **SETTINGS)
    thread.join()
    assert removed == [True]
    assert contents(tmp_path / "store") == contents(alone.path)
    assert done == {name: (tmp_path / "store" / name).stat().st_mtime_ns for name in done}
    assert passes(tmp_path / "again") <= 4 * (9 - len(done)) + 4, "at most one shard is repeated"


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_an_index_filled_on_the_cluster_equals_that_of_a_single_process(cluster, alone, tmp_path):
    settings = {"n_subvectors": 8, "n_bits": 4, "n_lists": 8, "n_iter": 3}
    built = build_on_cluster(alone.path, IVFPQIndex(**settings), tmp_path / "cluster.index", Workers(2), parts=3)
    single = IVFPQIndex(**settings).train(alone.descriptors(), alone.regions.levels).add(alone.descriptors(), alone.rows)
    assert Path(built).read_bytes() == save_index(single, tmp_path / "single.index").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.index", "single.index"], "the parts are removed"
    queries = np.concatenate([block[:, 1] for block in alone.descriptors()]).astype(np.float32)
    for source, expected in ((alone.path, ExactIndex(alone.descriptors(), alone.rows)), ([built], single)):
        index = ClusterIndex(source, Workers(1))
        found = index.search(queries, 7)
        index.close()
        assert np.array_equal(found.ranks, expected.search(queries, 7).ranks)


def test_an_item_that_always_ends_its_worker_is_reported(cluster):
    class Fragile:
        def ready(self):
            return True

        def work(self, item):
            if item == 1:
                os._exit(1)

    with WorkerPool(Fragile, Workers(1)) as pool, pytest.raises(ValueError, match="item 1 ended 3 workers"):
        list(pool.map("work", [0, 1, 2]))


def test_mistakes_of_a_worker_are_told_in_its_own_words(cluster, photos, tmp_path):
    def load():
        raise ValueError("no such checkpoint: model.pt")

    with pytest.raises(ValueError, match="^no such checkpoint: model.pt"):
        extract_on_cluster(photos, load, out=tmp_path / "store", workers=Workers(1), **SETTINGS)
    with pytest.raises(ValueError, match="no room for a worker with 1 CPUs and 8 GPUs"):
        extract_on_cluster(photos, load, out=tmp_path / "store", workers=Workers(gpus=8), **SETTINGS)


def test_a_remote_folder_behaves_like_a_local_one(tmp_path):
    (tmp_path / "a.txt").write_text("content")
    folder = SharedFolder("memory://bucket/folder")
    assert folder.sizes() == {}
    folder.push("a.txt", tmp_path)
    assert folder.sizes() == {"a.txt": 7}
    with folder.opened(["a.txt"], {"b.txt": 5}) as local:
        assert (local / "a.txt").read_text() == "content" and (local / "b.txt").stat().st_size == 5
    assert not local.exists()
    assert SharedFolder(f"file://{tmp_path}").sizes() == {"a.txt": 7}
    with pytest.raises(ValueError, match="Protocol not known"):
        SharedFolder("nonsense://bucket")


@pytest.fixture
def bucket(monkeypatch):
    "A bucket on a server that speaks the protocol of S3."
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}", "FSSPEC_S3_KEY": "test", "FSSPEC_S3_SECRET": "test"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    import fsspec.config

    fsspec.config.set_conf_env(fsspec.config.conf)
    fsspec.filesystem("s3").mkdir("photos")
    yield "s3://photos"
    server.stop()


def test_images_store_and_index_in_a_bucket(bucket, photos, alone, tmp_path):
    root = SharedFolder(f"{bucket}/images")
    for path in photos:
        root.push(path.name, path.parent)
    ray.shutdown()
    names = [path.name for path in photos]
    workers = Workers(2, cpus=0.5)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")  # inherits the settings
    load = loader(tmp_path / "log")
    out = extract_on_cluster(names, load, out=f"{bucket}/store", root=root.address, workers=workers, **SETTINGS)
    folder = SharedFolder(out)
    again = extract_on_cluster(names, load, out=out, root=root.address, workers=workers, **SETTINGS)
    assert again == out and passes(tmp_path / "log") == PASSES
    for name in folder.sizes():
        folder.pull(name, tmp_path)
    (tmp_path / "log").unlink()
    store = Store.open(tmp_path)
    assert store.rows.tolist() == alone.rows.tolist()
    for ours, theirs in zip(store.descriptors(), alone.descriptors()):
        assert np.array_equal(ours, theirs)
    index = build_on_cluster(out, IVFPQIndex(8, 4, n_lists=8, n_iter=3), f"{bucket}/photos.index", workers, parts=2)
    queries = np.array(store.descriptors()[0][:, 0], np.float32)
    search = ClusterIndex([index], workers)
    assert search.search(queries, 1).ranks.shape == (4, 1)
    search.close()
    exact = ClusterIndex(out, workers)
    assert exact.search(queries, 1).ranks[:, 0].tolist() == [0, 1, 2, 3]
    exact.close()
    ray.shutdown()
