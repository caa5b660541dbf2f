"""Packing on a real Ray cluster of two nodes: one is removed while it packs, the driver is killed, a node lacks something."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.ranks import PYTHONPATH, ROOT
from tests.unit.packed_pictures import files

pytestmark = pytest.mark.slow  # a cluster takes a quarter of a minute to start, and its workers as long
IMAGES = 100
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Of one node, with one core to give."""
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        # Its nodes have this environment.
        for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        started = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False})
        yield started
        started.shutdown()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large, to be packed slowly; one cannot be used."""
    root = tmp_path_factory.mktemp("pictures")
    Image.radial_gradient("L").resize((3000, 2000)).save(root / "000.jpg")
    for i in range(1, IMAGES):
        (root / f"{i:03d}.jpg").hardlink_to(root / "000.jpg")
    (root / "100.jpg").write_bytes(b"no image")
    return root


def pack(pictures: Path, out: Path, *more: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "data_prep.folder", "--images", pictures, "--out", out, "--vae", "none", "--resolution", 16,
               "--rows-per-shard", 5, "--device", "cpu", "--workers", 1, *more]
    return subprocess.Popen([*map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def on_ray(pictures: Path, out: Path, cluster: Any) -> "subprocess.Popen[str]":
    return pack(pictures, out, "--engine", "ray", "--address", cluster.address)


@pytest.fixture(scope="module")
def truth(cluster: Any, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("truth") / "out"
    assert pack(pictures, out).wait(300) == 0
    return files(out)


def wait_until(done: Callable[[], Any], driver: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 300
    while not done():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def parts_of_both(out: Path) -> bool:
    """Both workers have begun, and there is work left."""
    return len(list(out.glob("packing/rank_*.json"))) == 2 and len(list(out.glob("packing/part_*.json"))) > 3


def test_a_node_is_removed(cluster: Any, pictures: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    """With all of its processes, at once: what it was packing goes to the other one. The same to the byte."""
    other = cluster.add_node(**SMALL)
    driver = on_ray(pictures, tmp_path / "out", cluster)
    try:
        wait_until(lambda: parts_of_both(tmp_path / "out"), driver)
    finally:
        cluster.remove_node(other, allow_graceful=False)
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert files(tmp_path / "out") == truth
    assert f"{IMAGES} packed now in" in out and "2 workers on 2 nodes, each with 1 core; 1 left out" in out and out.count("\n") == 1
    assert "goes to another" in err


def test_the_driver_is_killed(cluster: Any, pictures: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    """Its worker ends with it: ranks are refused until then, and go on."""
    driver = on_ray(pictures, tmp_path / "out", cluster)
    wait_until(lambda: len(list((tmp_path / "out").glob("packing/part_*.json"))) > 3, driver)
    ranks = pack(pictures, tmp_path / "out")
    said = ranks.communicate(timeout=300)[1]
    assert ranks.returncode == 2 and "as ray, and this one as 1 ranks" in said, said
    driver.kill()
    driver.wait()
    end = time.monotonic() + 200
    while (ranks := pack(pictures, tmp_path / "out")).wait() and time.monotonic() < end:
        assert "as ray, and this one as 1 ranks" in ranks.communicate()[1]
    assert ranks.returncode == 0 and files(tmp_path / "out") == truth


def test_a_node_of_another_version(cluster: Any, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import importlib.metadata as m\nv = m.version\nm.version = lambda n: '1.0' if n == 'torch' else v(n)\n")
    other = cluster.add_node(**SMALL, env_vars={"PYTHONPATH": f"{tmp_path}:{PYTHONPATH}"})
    try:
        driver = on_ray(pictures, tmp_path / "out", cluster)
        said = driver.communicate(timeout=300)[1]
    finally:
        cluster.remove_node(other)
    assert driver.returncode == 2 and "has other versions than this machine: torch 1.0 there, " in said.splitlines()[-1], said
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a node with mounts of its own")
def test_a_node_that_does_not_see_the_folder(cluster: Any, pictures: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", cluster.address, "--num-cpus", 1, "--object-store-memory", 80 * 2**20, "--block"]
    node = subprocess.Popen(["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', tmp_path, *map(str, start)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        said, end = "", time.monotonic() + 200
        while "does not see" not in said and time.monotonic() < end:  # until the node has joined
            (tmp_path / "out/packing").mkdir(parents=True, exist_ok=True)
            driver = on_ray(pictures, tmp_path / "out", cluster)
            said = driver.communicate(timeout=300)[1]
    finally:
        node.terminate()
        node.wait(60)
    assert driver.returncode == 2 and f"does not see {tmp_path}/out; give an --out on storage that all nodes share" in said.splitlines()[-1], said
