"""A run that is asked to stop before its loop has started."""

from collections.abc import Callable

from largescale.distributed.ranks import Ranks
from largescale.host.launch import tell_torchrun
from largescale.host.signals import stop_requested


def asked_to_stop(ranks: Ranks, log: Callable[[str], None], when: str) -> bool:
    """Whether a rank was asked to stop before the loop started, which is logged. Collective.

    `when`: such as "while the model was built".
    """
    stop = ranks.any(stop_requested())
    if stop:
        text = f"asked to stop {when}; nothing is lost, run again to continue"
        # Else torchrun's summary gives no reason for the exit status.
        tell_torchrun(text)
        log(text)
    return stop
