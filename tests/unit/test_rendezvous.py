"""Ranks that cannot find each other say so; on one machine they need no name for it."""

import socket
import subprocess
import sys
import time
from collections.abc import MutableMapping

import pytest

from largescale.distributed import ranks
from largescale.errors import LostRankError
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
