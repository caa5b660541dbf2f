"""What the parts of a set add up to once all are packed, and the list of what was left out of it."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from largescale.host.files import write_atomically

SKIPPED = "skipped.jsonl"
# Reasons to leave images out that are counted apart.
MOST_REASONS = 10_000


class Totals(Iterable[tuple[str, str]]):
    """What the records of all parts add up to, once they are read: reading them gives what the parts
    have left out, (id, reason) each."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self._records = records
        self.shards: list[dict[str, Any]] = []
        self.columns: list[str] = []
        self.captions = self.captions_cut = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for record in self._records:
            self.shards += record["shards"]
            self.captions += record["captions"]
            self.captions_cut += record.get("captions_cut", 0)
            # A part of which every image was left out has no columns.
            self.columns = self.columns or record["columns"]
            yield from record["skipped"]


def write_skipped(
    path: Path, skipped: Iterable[tuple[str, str]], before: Iterable[str] = ()
) -> Counter[str]:
    """Writes the list of (id, reason), behind the lines `before`; returns how often each reason
    occurs."""
    reasons: Counter[str] = Counter()

    def lines() -> Iterator[str]:
        yield from before
        for id, reason in skipped:
            # A reason may have a file's name in it, and be another for each of millions.
            known = reason in reasons or len(reasons) < MOST_REASONS
            reasons[reason if known else "other reasons"] += 1
            yield json.dumps({"id": id, "reason": reason}) + "\n"

    write_atomically(path, lines())
    return reasons
