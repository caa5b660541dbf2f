"""Frozen lists of prompts: which captions they hold, that they stay what they are, and what is said of other files."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from eval import prompts
from eval.prompts import freeze, read_prompts
from largescale.errors import ConfigError, DataError
from tests.ranks import ROOT

SHARED = Path(os.environ.get("LARGESCALE_SHARED", ROOT.parent / "shared")) / "data"


def document(images: int = 20) -> dict[str, Any]:
    """Image i has i % 4 captions: none, one, two or three."""
    return {"images": [{"id": 7 * i, "file_name": f"{7 * i:012d}.jpg"} for i in range(images)],
            "annotations": [{"id": 100 * i + k, "image_id": 7 * i, "caption": f" é{i}, the {k}th\n"}
                            for i in range(images) for k in range(i % 4)]}


def captions_file(path: Path, **change: Any) -> Path:
    path.write_text(json.dumps(document() | change))
    return path


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    return captions_file(tmp_path / "captions_x.json")


def rows_of(text: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    return rows


def start(*args: Any) -> int:
    return prompts.main([*map(str, args)])


def write_list(path: Path, rows: Any, **head: Any) -> Path:
    path.write_text(json.dumps({"name": "mine", "sha256": prompts._sha256_of(rows), "rows": rows} | head))
    return path


# ---- which captions

def test_one_caption_of_each_of_so_many_images(captions: Path) -> None:
    full = document()
    for num in (1, 4, 15):                              # 15 of the 20 have captions
        rows = rows_of(freeze(captions, num, 0))
        assert len(rows) == len({row["image_id"] for row in rows}) == num
        for row in rows:
            assert row.keys() == {"image_id", "file_name", "caption_id", "caption"}
            assert {"id": row["image_id"], "file_name": row["file_name"]} in full["images"]
            [theirs] = [a for a in full["annotations"] if a["id"] == row["caption_id"]]
            assert theirs["image_id"] == row["image_id"] and theirs["caption"].strip() == row["caption"] != theirs["caption"]


def test_the_first_of_a_longer_list_are_the_shorter_one(captions: Path) -> None:
    assert rows_of(freeze(captions, 15, 3))[:6] == rows_of(freeze(captions, 6, 3))


def test_a_function_of_file_number_and_seed(captions: Path, tmp_path: Path) -> None:
    """Golden, as no version of Python may change it; and the seed moves the images, their order, and the captions."""
    text = freeze(captions, 15, 0)
    assert text == freeze(captions, 15, 0)
    assert json.loads(text)["sha256"] == "f69d94fdfaf64318555f509c5798d0274d3293f176cfa8dbe28b11c848f7956a"
    assert [row["image_id"] // 7 for row in rows_of(text)] == [6, 9, 14, 11, 15, 19, 18, 5, 10, 7, 3, 2, 1, 17, 13]
    other = rows_of(freeze(captions, 15, 1))
    caption_of, others = ({row["image_id"]: row["caption_id"] for row in some} for some in (rows_of(text), other))
    assert list(caption_of) != list(others) and sorted(caption_of) == sorted(others) and caption_of != others
    assert {row["image_id"] for row in rows_of(freeze(captions, 6, 0))} != {row["image_id"] for row in rows_of(freeze(captions, 6, 1))}
    # the order of the file is nothing that the prompts depend on
    turned = {key: value[::-1] for key, value in document().items()}
    assert rows_of(freeze(captions_file(tmp_path / "turned.json", **turned), 15, 0)) == rows_of(text)


def test_any_caption_may_be_chosen_and_any_image_come_first(captions: Path) -> None:
    lists = [rows_of(freeze(captions, 15, seed)) for seed in range(300)]
    first = Counter(rows[0]["image_id"] for rows in lists)
    assert len(first) == 15 and max(first.values()) < 45          # 20 each on average
    chosen = Counter(row["caption_id"] for rows in lists for row in rows if row["image_id"] == 7 * 3)
    assert len(chosen) == 3 and min(chosen.values()) > 70         # 100 each on average


def test_empty_captions_are_no_captions(tmp_path: Path) -> None:
    annotations = [{"id": 1, "image_id": 0, "caption": " \n"}, {"id": 2, "image_id": 7, "caption": ""},
                   *({"id": 3 + k, "image_id": 7, "caption": "x" if k == 17 else "\t"} for k in range(20))]
    file = captions_file(tmp_path / "x.json", annotations=annotations)
    assert [(row["caption_id"], row["caption"]) for row in rows_of(freeze(file, 1, 0))] == [(20, "x")]
    with pytest.raises(ConfigError, match="has captions of 1 images"):
        freeze(file, 2, 0)


@pytest.mark.parametrize(("num", "message"), [
    (16, r"num=16: .*captions_x\.json has captions of 15 images; set --num 15 or less"),
    (0, "num=0 must be at least 1; set --num"),
])
def test_numbers_that_cannot_be_had(captions: Path, num: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        freeze(captions, num, 0)


ONE = {"id": 1, "image_id": 0, "caption": "a"}


@pytest.mark.parametrize(("change", "message"), [
    ({"annotations": [ONE, ONE]}, "has 1 caption ids that are given twice, such as 1"),
    ({"images": [{"id": 0, "file_name": "a"}, {"id": 0, "file_name": "b"}]}, "has 1 image ids that are given twice, such as 0"),
    ({"annotations": [ONE, {**ONE, "id": 2, "image_id": 99}]}, "has 1 captions of images that it does not list, by image id, such as 99"),
    ({"annotations": [ONE, {**ONE, "id": 2, "caption": "half \ud83d"}]}, "has 1 captions that are not Unicode text, by caption id, such as 2"),
    ({"annotations": [ONE, {**ONE, "id": 2, "caption": None}]}, "has 1 captions that are not Unicode text, by caption id, such as 2"),
    ({"annotations": [{"id": 1, "image_id": 0, "bbox": []}]}, "is not COCO captions .*; give a file such as captions_val2014"),
    ({"annotations": None}, "is not COCO captions"),
])
def test_other_captions_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        freeze(captions_file(tmp_path / "x.json", **change), 1, 0)


@pytest.mark.parametrize(("content", "message"), [
    (b'{"images": [\n', "x.json is not JSON .*line 2.*; give COCO's captions file"),
    (b"[]", "is not COCO captions"),
    (b'{"images":\n"\xe9"}', "x.json: line 2 is not UTF-8"),
    (None, "x.json cannot be read .No such file.*correct the path"),
])
def test_files_of_another_kind(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        freeze(tmp_path / "x.json", 1, 0)


# ---- the program

def test_the_program(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/deep/mine.json"
    assert start("--captions", captions, "--num", 15, "--seed", 5, "--out", out) == 0
    text = out.read_text(encoding="ascii")
    assert text == freeze(captions, 15, 5) and [path.name for path in out.parent.iterdir()] == ["mine.json"]
    assert text.count("\n{") == 15                      # one row a line
    head = json.loads(text)
    rows = head.pop("rows")
    canonical = json.dumps(rows, sort_keys=True, separators=(",", ":")).encode()
    assert head == {"name": "captions_x-15-seed5", "source": "captions_x.json", "seed": 5,
                    "source_sha256": hashlib.sha256(captions.read_bytes()).hexdigest(),
                    "sha256": hashlib.sha256(canonical).hexdigest()}
    assert capsys.readouterr().out == f"{out}: 15 prompts, sha256 {head['sha256']}; written\n"
    read = read_prompts(out)
    assert read.texts == [row["caption"] for row in rows] and read.images == [row["file_name"] for row in rows]
    assert read.sha256 == head.pop("sha256") and read.source == head and any("é" in text for text in read.texts)

    before = out.stat().st_mtime_ns, out.stat().st_ino
    assert start("--captions", captions, "--num", 15, "--seed", 5, "--out", out) == 0
    assert capsys.readouterr().out.endswith("; already there, left alone\n") and (out.stat().st_mtime_ns, out.stat().st_ino) == before
    for other in (("--num", 14, "--seed", 5), ("--num", 15, "--seed", 6)):
        assert start("--captions", captions, *other, "--out", out) == 2
        assert capsys.readouterr().err == f"error: {out} is there and holds something else; give another --out, or delete it\n"
    assert out.read_text() == text


@pytest.mark.parametrize(("more", "message"), [
    (("--out", "mine.txt"), "--out mine.txt must end in .json"),
    (("--out", "FOLDER/x.json"), "x.json cannot be written ([Errno 21] Is a directory"),
    (("--out", "FOLDER/file/y.json"), "folder/file'); give another --out"),
    (("--out", "x.json", "--num", "16"), "set --num 15 or less"),
    (("--out", "x.json", "--captions", "/nowhere.json"), "/nowhere.json cannot be read (No such file or directory)"),
])
def test_what_the_program_refuses_in_one_line(captions: Path, tmp_path: Path, more: tuple[str, ...], message: str,
                                              capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder/x.json").mkdir(parents=True)
    (tmp_path / "folder/file").touch()
    more = tuple(word.replace("FOLDER", str(tmp_path / "folder")) for word in more)
    assert start("--captions", captions, "--num", 1, *more) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not any((tmp_path / name).exists() for name in ("mine.txt", "x.json"))


def test_defaults_are_those_of_fid_30k(captions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--captions", captions, "--out", "x.json") == 2
    assert "num=30000: " in capsys.readouterr().err and prompts.Freeze(captions, captions).seed == 0


def test_a_write_cut_short_leaves_nothing(captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert start("--captions", captions, "--num", 3, "--out", tmp_path / "x.json") == 2
    assert not (tmp_path / "x.json").exists()
    assert start("--captions", captions, "--num", 3, "--out", tmp_path / "x.json") == 0


def test_no_torch_and_no_words_of_the_locale(captions: Path, tmp_path: Path) -> None:
    code = f"import sys; from eval import prompts; s = prompts.main({['--captions', str(captions), '--num', '15', '--out', str(tmp_path / 'x.json')]!r});" \
           " sys.exit(s or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert (tmp_path / "x.json").read_text() == freeze(captions, 15, 0)


# ---- reading

def test_a_list_that_was_altered(captions: Path, tmp_path: Path) -> None:
    good = json.loads(freeze(captions, 5, 0))
    file = tmp_path / "x.json"
    for change in (
        lambda rows: rows[2].update(caption="another"), lambda rows: rows.pop(), lambda rows: rows.reverse(),
        lambda rows: rows[0].update(image_id=1), lambda rows: rows[0].update(file_name="another.jpg"), lambda rows: rows.append(rows[0]),
    ):
        document = json.loads(json.dumps(good))
        change(document["rows"])
        file.write_text(json.dumps(document))
        with pytest.raises(DataError, match=r"x\.json was altered: its rows have the sha256 \w{64}, not \w{64}; write it again with eval\.prompts"):
            read_prompts(file)
    file.write_text(json.dumps(good, indent=4, ensure_ascii=False), encoding="utf-8")     # spelt otherwise, the same
    assert read_prompts(file).sha256 == good["sha256"]


@pytest.mark.parametrize(("rows", "message"), [
    ([], "x.json: it holds no prompts"),
    ([{"caption": "a", "file_name": "b"}, {"caption": " ", "file_name": "b"}], "x.json: row 2 is empty"),
    ([{"caption": "half \ud83d", "file_name": "b"}], "x.json: row 1 is not Unicode"),
    ([{"caption": "a"}], "has rows that are no prompts .*file_name"),
    (["a"], "has rows that are no prompts"),
    ([{"caption": 1, "file_name": "b"}], "has rows that are no prompts"),
    ({"a": 1}, "has rows that are no prompts"),
    (3, "has rows that are no prompts"),
])
def test_lists_of_something_else(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(write_list(tmp_path / "x.json", rows))


@pytest.mark.parametrize("content", ["[]", '["a cat"]', '"a cat"', '{"rows": []}', '{"name": 1, "sha256": "", "prompts": []}', '{"sha256": "", "rows": []}'])
def test_json_that_is_no_list_of_prompts(tmp_path: Path, captions: Path, content: str) -> None:
    (tmp_path / "x.JSON").write_text(content)
    for path in (tmp_path / "x.JSON", captions):
        with pytest.raises(DataError, match=rf"{path.name} is no list of prompts; .*--captions .*{path.name} --out FILE, or give a \.txt file, one prompt a line"):
            read_prompts(path)


def test_text_files(tmp_path: Path) -> None:
    texts = ["a cat, on a mat", "ein Bär\u2028zwei", "{not JSON", "a cat, on a mat"]
    ways = {"x.txt": "\n".join(texts), "y.txt": "\n".join(texts) + "\n", "crlf.txt": "\r\n".join(texts) + "\r\n",
            "bom": "\ufeff" + " \n\t".join(texts)}
    hashes = set()
    for name, content in ways.items():
        (tmp_path / name).write_bytes(content.encode())
        read = read_prompts(tmp_path / name)
        assert (read.texts, read.source, read.images) == (texts, {"name": name}, None)
        hashes.add(read.sha256)
    assert len(hashes) == 1                             # of the prompts, however they are written down
    for name, other in {"x.txt": [*texts[::-1]], "y.txt": texts[:3], "z.txt": ["a ca", "t, on a mat", *texts[1:]]}.items():
        (tmp_path / name).write_text("\n".join(other), encoding="utf-8")
        hashes.add(read_prompts(tmp_path / name).sha256)
    assert len(hashes) == 4


@pytest.mark.parametrize(("name", "content", "message"), [
    ("x.txt", b"", "x.txt holds no prompts; give one a line"),
    ("x.txt", b" \n\n", "x.txt holds no prompts; give one a line"),
    ("x.txt", b"a\n\nb\n", "x.txt: line 2 is empty; delete it"),
    ("x.txt", b"a\nb\n \t\n", "x.txt: line 3 is empty; delete it"),
    ("x.txt", b"a\nb\n\n", "x.txt: line 3 is empty; delete it"),
    ("x.txt", b"a\nb\nc\xe9\n", "x.txt: line 3 is not UTF-8 .*; save it as UTF-8"),
    ("x.json", b'{"name":\n', "x.json is not JSON .*line 2.*; write it again"),
    ("x.tsv", b"Prompt\tCategory\n", "x.tsv is a table; give its prompts as a .txt file, one a line"),
    ("x.CSV", b"Prompt,Category\n", "x.CSV is a table"),
    ("x.txt", None, r"x.txt cannot be read .No such file or directory.; correct the path"),
    ("", None, r"cannot be read .Is a directory."),
])
def test_files_without_prompts(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


# ---- COCO's own

def test_real_coco(tmp_path: Path) -> None:
    file = SHARED / "coco2017-mini/annotations/captions_val2017.json"
    if not file.exists():
        pytest.skip(f"{file} is not here; LARGESCALE_SHARED names the folder above data/")
    assert start("--captions", file, "--num", 5000, "--out", tmp_path / "coco.json") == 0
    read = read_prompts(tmp_path / "coco.json")
    assert read.sha256 == "aac549da8ecca39e01cf7befd7f6ba4523b403210949d70b1d38a8cd32175aac"
    coco = json.loads(file.read_text())
    assert read.images and len(set(read.images)) == len(read.texts) == 5000
    file_of = {image["id"]: image["file_name"] for image in coco["images"]}
    told = {(file_of[a["image_id"]], a["caption"].strip()) for a in coco["annotations"]}
    assert {*zip(read.images, read.texts, strict=True)} <= told
    # first to fifth caption of the image, each about as often
    place: dict[str, list[str]] = {}
    for a in sorted(coco["annotations"], key=lambda a: a["id"]):
        place.setdefault(file_of[a["image_id"]], []).append(a["caption"].strip())
    places = Counter(place[image].index(text) for image, text in zip(read.images, read.texts, strict=True))
    assert all(900 < places[k] < 1100 for k in range(5))
    with pytest.raises(ConfigError, match=r"num=30000: .* has captions of 5000 images; set --num 5000 or less"):
        freeze(file, 30_000, 0)
