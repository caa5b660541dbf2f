"""Which names a state dict has, and which it should have."""

from collections.abc import Iterable

from largescale.errors import CheckpointError

# Names that an error lists before it only counts the rest.
LISTED = 4


def listed(names: Iterable[str]) -> str:
    """Some names for a message: the first few in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - LISTED} more" if len(ordered) > LISTED else ""
    return ", ".join(ordered[:LISTED]) + more


def require_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Raises CheckpointError where the names of a state dict are not those expected; `what` says
    whose these are, as in "a DiT of 12 blocks"."""
    missing = set(expected) - set(found)
    unknown = set(found) - set(expected)
    problems = []
    if missing:
        problems.append(f"lack {listed(missing)}")
    if unknown:
        problems.append(f"have {listed(unknown)} besides")
    if problems:
        raise CheckpointError(
            f"the weights are not those of {what}: they {' and '.join(problems)}; give the complete "
            "file of a model of that kind"
        )
