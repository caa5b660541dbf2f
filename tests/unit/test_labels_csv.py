"""A CSV file of labels: read many rows at a time, and every odd row named by its line."""

import codecs
from pathlib import Path

import pytest

from data_prep import imagenet, labels_csv
from data_prep.labels_csv import Place, read_rows
from data_prep.walk import list_images
from largescale.errors import DataError


@pytest.fixture(autouse=True, params=[2, 512])
def at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_csv, "AT_A_TIME", request.param)


def rows(path: Path, content: str | bytes) -> list[tuple[str, str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [pair for some in read_rows(path) for pair in zip(*some, strict=True)]


PLAIN = [("a.png", "0"), ("sub/b.png", "1"), ("é c.png", "0")]
LINES = ["file,label", "a.png,0", "sub/b.png,1", "é c.png,0"]


@pytest.mark.parametrize("content", [
    "\n".join(LINES), "\n".join(LINES) + "\n", "\r\n".join(LINES) + "\r\n", "\r".join(LINES), "\n\n".join(LINES) + "\n\n\n",
    codecs.BOM_UTF8 + "\r\n".join(LINES).encode(), "\n".join(f"{line}," for line in LINES),
    "label,more,file\n0,x,a.png\n1,,sub/b.png\n0,\"x\ny\",é c.png", "file,label,more\na.png,0\nsub/b.png,1,x\né c.png,0",
    'file,label\n"a.png","0"\n"sub/b.png",1\né c.png,"0"', "file,label\n a.png , 0\n./sub//b.png,1 \nx/../é c.png,0",
    "file,label,file\nx,0,a.png\ny,1,sub/b.png\nz,0,é c.png"])
def test_ways_to_write_the_same(tmp_path: Path, content: str | bytes) -> None:
    assert rows(tmp_path / "x.csv", content) == PLAIN


def test_quotes_over_lines_and_commas(tmp_path: Path) -> None:
    found = rows(tmp_path / "x.csv", 'file,label\n"a\nb.png",0\n\n"c,d.png","x ""y"""\n')
    assert found == [("a\nb.png", "0"), ("c,d.png", 'x "y"')]
    assert [Place(tmp_path / "x.csv", number).line for number in range(2)] == [3, 5]


@pytest.mark.parametrize(("content", "message"), [
    ("", r"x\.csv is empty, or begins with an empty line; its first line must name file and label"),
    ("\nfile,label\na.png,0", "begins with an empty line; its first line"),
    ("path;label\na.png;0", "has the columns path;label; its first line must name file and label"),
    ("file,label\na.png,0\nb.png\n", "line 3: no file, or no label; complete the line, or remove it"),
    ("file,label\na.png,0\n\n\nb.png,\nc.png,1", "line 5: no file, or no label"),
    ("file,label\r\na.png,0\r\nb.png, \r\n", "line 3: no file, or no label"),
    ("file,label\na.png,0\nb.png,0\nc.png,0\n  ,1\n", "line 5: no file, or no label"),
    ('file,label\n"a\n.png",0\nb.png\n', "line 4: no file, or no label"),
    ("file,label\na.png,0\nb,c.png,1\n", r"line 3: 3 fields, and the header has 2; put a name that has a comma in quotes"),
    ("file,label\na.png,0\n/b.png,1\n", r"line 3: '/b\.png' does not lie below --images"),
    ("file,label\na.png,0\nb.png,1\nx/../../b.png,1\n", r"line 4: 'x/\.\./\.\./b\.png' does not lie below"),
    ("file,label\na.png,0\nb\0.png,1\n", r"line 3: 'b\\x00\.png' does not lie below"),
    ("file,label\na.png,0\n\"b.png,1\n" + 20_000 * "c.png,1\n", r"is no CSV \(field larger than field limit .*, line \d+\); give one line .*close every quote"),
    (b"file,label\na.png,0\nb\xe9.png,1\n", "x.csv cannot be read: line 3 is not UTF-8; save it as UTF-8"),
    (b"file,label\n" + 3000 * b"a.png,0\n" + b"b.png,\xe4\xb8", "line 3002 is not UTF-8"),
    ("file,label\na.png,0\n".encode("utf-16"), "line 1 is not UTF-8"),
])
def test_what_is_no_such_file(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows(tmp_path / "x.csv", content)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.csv cannot be read .*; correct the path"):
        list(read_rows(tmp_path / "x.csv"))


def test_places_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file given twice, and of the first of a wrong label, wherever the rows were cut."""
    for name in "abcde":
        (tmp_path / f"{name}.png").touch()
    labels = tmp_path / "x.csv"
    rows(labels, "file,label\na.png,0\nb.png,0\n\nc.png,1\nd.png,1\n./b.png,1\na.png,0\n")
    with pytest.raises(DataError, match=r"x\.csv, line 7: b\.png is given a second time, first in line 3; keep one"):
        imagenet.read(tmp_path, labels)
    rows(labels, "file,label\na.png,0\nb.png,0\n\nc.png,x\nd.png,1\ne.png,x\n")
    with pytest.raises(DataError, match=r"x\.csv, line 5 \(c\.png\): label 'x' is not a number, as others are"):
        imagenet.read(tmp_path, labels)
    monkeypatch.setattr(imagenet, "MOST_CLASSES", 2)
    rows(labels, "file,label\na.png,x\nb.png,y\nc.png,x\nd.png,z\n")
    with pytest.raises(DataError, match=r"x\.csv has more than 2 labels; the column label must name classes"):
        imagenet.read(tmp_path, labels)


def test_rows_are_labelled_and_left_out_in_order(tmp_path: Path) -> None:
    names = [f"{i:02d}.png" for i in range(41)]
    for name in names[::2]:
        (tmp_path / name).touch()
    rows(tmp_path / "x.csv", "file,label\n" + "".join(f"{name},{i % 3}\n" for i, name in enumerate(names)))
    source = imagenet.read(tmp_path, tmp_path / "x.csv", skip_missing=True)
    assert [(item.id, item.label) for item in source.part(0, 99)] == [(names[i], i % 3) for i in range(0, 41, 2)]
    assert list(source.skipped) == [(name, "the file is missing") for name in names[1::2]]
    assert list_images(tmp_path)[0] == names[::2] and source.facts["images_missing"] == 20
