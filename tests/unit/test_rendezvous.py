"""Ranks that cannot find each other say so; on one machine they need no name for it."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, MutableMapping
from types import SimpleNamespace

import pytest
import torch

from largescale.distributed import ranks
from largescale.errors import DeviceError, LostRankError
from tests.ranks import free_port


@pytest.mark.parametrize(("env", "expected"), [
    ({"MASTER_ADDR": "127.0.0.1"}, "lo"),
    ({"MASTER_ADDR": "localhost"}, "lo"),
    ({"MASTER_ADDR": "node7"}, None),
    ({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
])
def test_one_machine(env: MutableMapping[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    ranks.stay_on_this_machine(env)
    assert env.get("GLOO_SOCKET_IFNAME") == expected
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo0")])  # another system
    other = {"MASTER_ADDR": "127.0.0.1"}
    ranks.stay_on_this_machine(other)
    assert "GLOO_SOCKET_IFNAME" not in other


NCCL_SAYS = "NCCL error in: ProcessGroupNCCL2.cpp:511, {}\nLast error:\n{}"  # as torch formats them


@pytest.mark.parametrize(("error", "lost"), [
    (RuntimeError(NCCL_SAYS.format("remote process exited or there was a network error, ncclRemoteError", "")), True),
    (RuntimeError(NCCL_SAYS.format("unhandled system error (run with NCCL_DEBUG=INFO for details), ncclSystemError",
                                   "socketStartConnect: Connect to 10.0.0.2<40123> failed : Connection refused")), True),
    (RuntimeError(NCCL_SAYS.format("ncclInternalError: Internal check failed.", "Bootstrap : no socket interface found")), True),
    (RuntimeError(NCCL_SAYS.format("ncclInvalidUsage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000")), True),
    (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
    (RuntimeError(NCCL_SAYS.format("unhandled cuda error, ncclUnhandledCudaError", "Cuda failure 2 'out of memory'")), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ValueError("ncclRemoteError"), False),
])
def test_errors_of_the_network_are_told_from_others(error: Exception, lost: bool) -> None:
    assert ranks.is_lost_contact(error) == lost


def test_two_ranks_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun --nproc-per-node 2 starts them on a machine with one GPU: NCCL's words become ours."""
    def init(self: object, backend: str, timeout: object) -> None:
        raise RuntimeError(NCCL_SAYS.format("ncclInvalidUsage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"))

    monkeypatch.setattr(ranks.Ranks, "_init_groups", init)
    monkeypatch.setattr(ranks, "local_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match=r"two ranks share a GPU: 2 ranks run on \S+, where rank 1 sees 1 of its GPUs; start one rank a GPU"):
        ranks.Ranks("cuda")


def test_before_nccl_ends_the_process_it_is_said_which_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's new NCCL backend has hooks for that, gloo and the old one have none."""
    hooks: dict[int, Callable[[], None]] = {}
    with_hooks = SimpleNamespace(supports_abort_hooks=True, register_abort_hook=hooks.__setitem__)
    groups = [SimpleNamespace(_get_backend=lambda device, backend=backend: backend) for backend in (with_hooks, SimpleNamespace())]
    monkeypatch.setattr(ranks.dist, "group", SimpleNamespace(WORLD=groups[0]))
    some = ranks.Ranks.__new__(ranks.Ranks)
    some.device, some._vectors = torch.device("cuda", 0), groups[1]
    called: list[str] = []
    some.on_abort(lambda: called.append("x"))
    assert list(hooks) == [0]
    hooks[0]()
    assert called == ["x"]


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([False, True])

    def resolve(name: str, port: None) -> None:
        if not next(found, False):
            raise socket.gaierror("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr(time, "sleep", lambda s: None)
    ranks.require_resolvable("node7")  # it comes late
    with pytest.raises(LostRankError, match="MASTER_ADDR=node7 has no address that this machine knows .*; set it to rank 0's IP"):
        ranks.require_resolvable("node7", patience_s=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_asked_to_stop_while_it_waits_for_others(rank: int) -> None:
    """A requeued job whose other nodes do not come must answer the signal that comes before the kill."""
    program = ("from largescale.distributed import ranks as distributed\nfrom largescale.errors import Stopped\n"
               "from largescale.host.signals import serve_stop_signals\nserve_stop_signals()\ndistributed.SAID_AFTER_S = 0.1\n"
               "try: distributed.Ranks('cpu', 900)\nexcept Stopped as error: print(error)")
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr and "has waited" in process.stderr.readline()
        process.terminate()
        said, _ = process.communicate(timeout=300)
    assert said.startswith("asked to stop") and process.returncode == 0


@pytest.mark.parametrize(("rank", "says"), [(0, "rank 0 of 2 has waited 0.1 s for the other ranks, to meet at 127.0.0.1:"),
                                            (1, "rank 1 of 2 has waited 0.1 s for rank 0, to meet at 127.0.0.1:")])
def test_who_is_waited_for(rank: int, says: str) -> None:
    program = ("from largescale.distributed import ranks as distributed\nfrom largescale.errors import LostRankError\n"
               "distributed.SAID_AFTER_S = 0.1\n"
               "try: distributed.Ranks('cpu', 5)\nexcept LostRankError as error: print(error)")
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert says in done.stderr and "waits for 5 s in all" in done.stderr
    assert "the 2 ranks did not find each other at 127.0.0.1:" in done.stdout


def test_the_time_limit_of_a_group_by_an_older_torch(one_rank: ranks.Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 lacks the public name."""
    given = []
    monkeypatch.delattr(ranks.dist, "set_timeout", raising=False)
    monkeypatch.setattr(ranks.dist.distributed_c10d, "_set_pg_timeout", lambda *args: given.append(args))
    one_rank.limit_waiting()
    assert given == [(ranks.NEVER, None)]
