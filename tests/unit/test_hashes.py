"""Lists of texts compared by their hashes, and what identifies a list, however many at a time."""

import hashlib
import random
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep import hashes
from data_prep.fingerprints import fingerprint
from data_prep.hashes import Hashes, given_twice, lacking, texts_at


def added(texts: list[list[str]], folder: Path) -> Hashes:
    made = Hashes(folder)
    for some in texts:
        made.add(some)
    return made


def cut(texts: list[str], size: int) -> list[list[str]]:
    return [texts[i:i + size] for i in range(0, len(texts), size)]


@pytest.fixture(autouse=True, params=[3, 10**6])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(hashes, "RANGE", request.param)
    monkeypatch.setattr(hashes, "BLOCK", request.param)
    return int(request.param)


def test_what_another_list_lacks(tmp_path: Path, size: int) -> None:
    texts = [f"{i}é" for i in range(50)]
    asked = added(cut(texts, size), tmp_path)
    for there, gone in (texts[::3], [i for i in range(50) if i % 3]), ([], list(range(50))), (texts, []), (["x"] * 99, list(range(50))):
        found = [numbers.tolist() for numbers in lacking(asked, added(cut(there, 7), tmp_path))]
        assert sorted(chain.from_iterable(found)) == gone and all(numbers == sorted(numbers) for numbers in found)
    assert not sum(map(len, lacking(added([], tmp_path), asked)))


def test_what_is_given_twice(tmp_path: Path, size: int) -> None:
    texts = [str(i) for i in range(40)]

    def found(texts: list[str]) -> tuple[int, list[tuple[int, int, str]]]:
        return given_twice(added(cut(texts, 7), tmp_path), lambda: cut(texts, 7))

    assert found([]) == found(["x"]) == found(texts) == (0, [])
    assert found([*texts, "5", "3", "5", "5"]) == (2, [(5, 40, "5"), (3, 41, "3")])
    assert found(["x"] * 30) == (1, [(0, 1, "x")])
    # Of many the first that a reader of the list meets.
    count, twice = found(texts + texts[::-1])
    assert count == 40 and twice == [(i, 79 - i, str(i)) for i in range(39, 35, -1)]
    shuffled = texts + texts
    random.Random(0).shuffle(shuffled)
    assert found(shuffled)[1][0][1] == min(i for i, text in enumerate(shuffled) if text in shuffled[:i])


def test_texts_of_one_hash_are_not_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_hash", lambda text: len(text) - 3)
    texts = [["a", "bb", "c"]]
    assert given_twice(added(texts, tmp_path), lambda: texts) == (0, [])
    assert given_twice(added([["bb", "ddd", "bb"]], tmp_path), lambda: [["bb", "ddd", "bb"]]) == (1, [(0, 2, "bb")])


def test_texts_are_found_again() -> None:
    texts = [list("abc"), [], list("de")]
    assert texts_at(texts, {4, 0, 2, 3}) == {0: "a", 2: "c", 3: "d", 4: "e"} and texts_at(texts, []) == {}


def test_the_fingerprint_of_an_array_is_that_of_its_texts() -> None:
    """As versions before have made it: a set that is being packed is found again by it."""
    texts = ["", "a", "é\n", "中文.png", "\U0001f600", "1:x", ""]
    arrays = [pa.array(["x", *texts[:4]])[1:], pa.array(texts[4:])]
    plain = "".join(f"{len(text)}:{text}" for text in texts).encode()
    expected = hashlib.sha256(plain + f"#{len(plain)}".encode() + b"3:end#5").hexdigest()
    assert fingerprint(texts, ["end"]) == fingerprint(iter(arrays), iter([pa.array(["end"])])) == expected
    assert fingerprint((), b"", iter([b"a", b"b"])) == fingerprint([], iter([]), b"ab") == hashlib.sha256(b"#0#0ab#2").hexdigest()
