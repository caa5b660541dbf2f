"""Packing on a Ray cluster, of any kind: `--engine ray`.

The program that was started is the driver. It holds the locks of the folder, and deals parts out to
workers: Ray's actors, which hold the encoders, one for each GPU or for --workers cores. Where one
dies, its part goes to another, and Ray starts it again as soon as there is room. The shards are
those of any number of ranks, and ranks can go on with what Ray has begun, as Ray with theirs.
"""

import dataclasses
import importlib
import os
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm

from data_prep.dealing import Dealer, Lost, Work
from data_prep.finish import ALREADY_PACKED
from data_prep.packing import PackerOptions
from data_prep.progress import counted
from data_prep.ray_worker import Begun, Packed, Wanted, Worker, given_files, marked, versions
from largescale.errors import ConfigError, LargescaleError
from largescale.host.launch import env_world_size
from largescale.host.machine import cores
from largescale.host.signals import serve_stop_signals

# How often Ray starts a worker again.
MOST_RESTARTS = 50
# Seconds for an answer from an address.
ANSWER_S = 5.0
# Bytes of the object store of a cluster of this machine alone: nothing large goes through it.
OBJECT_STORE = 80 * 2**20

Node = Mapping[str, Any]  # as Ray describes it


def room(nodes: Collection[Node], device: str, workers: int | None) -> tuple[int, int]:
    """The cores of each worker, and how many workers these nodes have room for. Raises ConfigError
    where there is none."""
    sizes = []
    for node in nodes:
        resources = node["Resources"]
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if cpus and (gpus or device == "cpu"):
            sizes.append((cpus, gpus if device == "cuda" else 1))
    if not sizes:
        what = "a GPU, which --device cuda needs" if device == "cuda" else "cores to give"
        raise ConfigError(f"no node of the Ray cluster has {what}; start nodes that have")
    # A node's share of each of its GPUs; without GPUs, the whole of the smallest node.
    own = workers or max(1, min(cpus // gpus for cpus, gpus in sizes))
    count = 0
    for cpus, gpus in sizes:
        count += min(cpus // own, gpus) if device == "cuda" else cpus // own
    if not count:
        most = max(cpus for cpus, _ in sizes)
        raise ConfigError(
            f"--workers {workers}: no node of the Ray cluster has so many cores; give at most {most}"
        )
    return own, count


class _RayCalls:
    """Calls of Ray's actors."""

    def __init__(self, ray: Any, actors: list[Any]) -> None:
        self._ray, self._actors = ray, actors
        self._worker_of: dict[Any, int] = {}

    def start(self, worker: int, method: str, *arguments: Any) -> None:
        call = getattr(self._actors[worker], method)
        # A part is not to wait until its worker is back.
        options = {"max_task_retries": -1 if method == "begin" else 0}
        self._worker_of[call.options(**options).remote(*arguments)] = worker

    def wait(self) -> list[tuple[int, Any]]:
        done = []
        if self._worker_of:
            refs, _ = self._ray.wait(list(self._worker_of), timeout=1.0)
            for ref in refs:
                done.append((self._worker_of.pop(ref), self._result(ref)))
        return done

    def _result(self, ref: Any) -> Any:
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LargescaleError):
                raise error.cause from None
            raise
        # Of an actor, its node, or the connection to either.
        except self._ray.exceptions.RayError as error:
            return Lost(" ".join(str(error).split())[-300:])


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster; or started here, for "local". Raises ConfigError where there
    is none."""
    if find_spec("ray") is None:
        raise ConfigError(
            "--engine ray: Ray is not installed; pip install 'largescale[ray]', in the clone: "
            "pip install -e '.[ray]'"
        )
    host, _, port = address.rpartition(":")
    if address not in ("auto", "local"):
        if not host or "/" in host or not port.isdecimal():
            raise ConfigError(f"--address {address}: give auto, local, or HOST:PORT")
        # Ray itself would try for minutes.
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--address {address}: nothing answers there ({error}); ray start --head says the "
                "address of a cluster"
            ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
    import ray

    own = {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
    try:
        ray.init(
            address=address,
            logging_level="warning",
            log_to_driver=False,
            **(own | {"num_cpus": cores()} if address == "local" else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--address {address}: no Ray cluster can be used there ({reason}); start one with ray "
            "start --head, or give --address HOST:PORT or local"
        ) from error
    # What Ray says of its nodes goes to standard output, where our result is.
    with redirect_stdout(sys.stderr):
        try:
            serve_stop_signals()  # Ray has taken TERM
            yield ray
        finally:
            # Ends the actors too.
            ray.shutdown()


def importable(options: PackerOptions) -> PackerOptions:
    """The same options, of a class that another process finds by its module's name: that of a
    program is in __main__."""
    program = type(options)
    spec = getattr(sys.modules.get(program.__module__), "__spec__", None)
    if program.__module__ != "__main__" or spec is None:
        return options
    found = getattr(importlib.import_module(spec.name), program.__qualname__)
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    made: PackerOptions = found(**values)
    return made


def check_nodes(ray: Any, nodes: Collection[Node], wanted: Wanted) -> None:
    """Raises ConfigError for the first node that lacks something, before any work."""
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    look = ray.remote(num_cpus=0, max_retries=2)(Wanted.missing_here)
    found = {}
    for node in nodes:
        there = strategy(node_id=node["NodeID"], soft=False)
        found[look.options(scheduling_strategy=there).remote(wanted)] = node
    for ref, node in found.items():
        try:
            missing = ray.get(ref)
        except ray.exceptions.RayError as error:
            # Code that this node lacks.
            missing = f"cannot run this program ({str(error).strip().splitlines()[-1]})"
        if missing:
            raise ConfigError(f"Ray's node {node['NodeManagerAddress']} {missing}")


def pack_on_ray(options: PackerOptions) -> str:
    """Packs on a Ray cluster; returns a line to print."""
    options.check()
    if env_world_size() > 1:
        raise ConfigError(
            f"--engine ray is started once, and not as {env_world_size()} ranks by torchrun or "
            "srun; Ray starts its workers itself"
        )
    with connected(options.address) as ray:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        own_cores, count = room(nodes, options.device, options.workers)
        able = [node for node in nodes if node["Resources"].get("CPU", 0) >= own_cores]
        options = importable(options)
        out = options.out.absolute()
        # A worker may start again after days, on a new node: the marker stays as long. What a kill
        # leaves in this folder goes with it once the set is packed.
        with marked(out / "packing") as marker:
            wanted = Wanted(os.getcwd(), str(out), marker, given_files(options), versions())
            check_nodes(ray, able, wanted)
            gpus = 1 if options.device == "cuda" else 0
            actor = ray.remote(
                num_cpus=own_cores,
                num_gpus=gpus,
                max_restarts=MOST_RESTARTS,
                scheduling_strategy="SPREAD",
            )(Worker)
            actors = []
            for number in range(count):
                actors.append(actor.remote(options, wanted, number, count, own_cores))
            dealer = Dealer(_RayCalls(ray, actors), count, _tell)
            each = f"{own_cores} core{'s' * (own_cores > 1)}{gpus * ' and a GPU'}"
            where = f"{count} workers on {len(able)} nodes, each with {each}"
            return pack_with(dealer, where)


def _tell(line: str) -> None:
    tqdm.write(line, sys.stderr)


def pack_with(dealer: Dealer, where: str) -> str:
    """Has workers pack, and does what rank 0 does beside that; returns a line to print."""
    start = time.perf_counter()
    begun = dealer.begin()
    parts = begun.parts
    parts.rank, parts.world_size = 0, 1
    lines: list[str] = []
    done = ALREADY_PACKED
    try:
        if parts.claim():
            _tell(f"{begun.announcement}; {where}")
            new = _deal_parts(dealer, begun)
            seconds = time.perf_counter() - start
            done = f"{new:,} packed now in {seconds:.1f} s, {new / seconds:.1f} images/s, {where}"
        dealer.deal([("finish", done)], lambda _, line: lines.append(line))
        # A worker that began meanwhile may have listed the source.
        if done != ALREADY_PACKED:
            parts.remove()
    finally:
        parts.close()
    return lines[0]


class _Bar:
    """The bar of the whole set: what the parts have, and what workers report of those under way."""

    def __init__(self, begun: Begun, dealer: Dealer) -> None:
        self.new = 0
        self.todo: list[Work] = []
        self._dealer, self._folder = dealer, begun.parts.folder
        self._images: dict[int, int] = {}  # of each part
        for part in range(begun.parts.parts):
            record = begun.parts.record(part)
            self._images[part] = record["items"]
            if not record["done"]:
                self.todo.append(("pack", part))
        # What workers of this start will report is counted from 0.
        for path in self._folder.glob("rank_*.json"):
            path.unlink()
        self._counted: dict[int, int] = {}  # by each worker, until its last part was done
        self._known = sum(self._images.values())
        self.bar = tqdm(
            total=begun.images,
            initial=self._known,
            unit="image",
            desc="pack",
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=0.5 if sys.stderr.isatty() else 20,
        )

    def done(self, work: Work, packed: Packed) -> None:
        """Counts a part."""
        self.new += packed.new
        self._counted[packed.worker] = packed.counted
        self._known += packed.images - self._images[work[1]]
        self._images[work[1]] = packed.images

    def tick(self) -> None:
        """Shows how far the set is."""
        images = self._known
        for worker in self._dealer.under_way:
            # What it has reported may be older than its last part, or of a process that died.
            images += max(0, counted(self._folder, worker) - self._counted.get(worker, 0))
        self.bar.update(max(0, images - self.bar.n))


def _deal_parts(dealer: Dealer, begun: Begun) -> int:
    """Has all parts packed, with a bar; returns how many images were packed now."""
    bar = _Bar(begun, dealer)
    with bar.bar:
        dealer.deal(bar.todo, bar.done, bar.tick)
        bar.tick()
    return bar.new
