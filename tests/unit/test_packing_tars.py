"""Packing tar files, whose parts have a length that only reading tells, and their captions."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep import describe as data_inspect
from data_prep import encoding, packer
from data_prep.images import decode
from largescale.data.shards import ShardDataset
from largescale.encoders.text import TextEncoder
from largescale.errors import Stopped
from tests.unit.packed_pictures import files, one_thread, pack, picture  # noqa: F401


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tar files of 25 and 20 captioned images: more than two shards of ten, and exactly two."""
    for number, count in enumerate((25, 20)):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            for i in range(count):
                add(tar, f"{i:04d}.png", picture(100 * number + i))
                if i != 7:
                    add(tar, f"{i:04d}.txt", f"picture {i} of {number}".encode())
    return tmp_path / "*.tar"


def test_tar_files(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--text-encoder", "none")
    assert pack(tars, tmp_path / "one", *more, program="webdataset") == 0
    data = ShardDataset(tmp_path / "one", verify=True)
    assert [s["rows"] for s in data.manifest["shards"]] == [9, 10, 5, 9, 10] and data.manifest["captions"] == 43
    expected = [f"picture {i} of {n}" for n, count in enumerate((25, 20)) for i in range(count) if i != 7]
    assert data.texts(np.arange(len(data))) == [[text] for text in expected]
    assert [json.loads(line)["id"] for line in (tmp_path / "one/skipped.jsonl").read_text().splitlines()] == ["00000/0007", "00001/0007"]
    assert np.array_equal(data.gather(np.array([9]))["latent"][0], decode(picture(10), 16, 4))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert pack(tars, tmp_path / "three", *more, program="webdataset") == 0
    assert files(tmp_path / "three") == files(tmp_path / "one")


@pytest.mark.parametrize("at", range(1, 6))
def test_tar_files_stopped_and_gone_on_with(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    more = ("--text-encoder", "none", "--batch-size", 4)
    pack(tars, tmp_path / "truth", *more, program="webdataset")
    written, write, decoded, decode_item = 0, packer.Shard.write, 0, packer.Packer.decode

    def stopping(self: packer.Shard, path: Path) -> dict[str, Any]:
        nonlocal written
        written += 1
        if written == at:
            raise Stopped
        return write(self, path)

    def counting(self: packer.Packer, item: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode_item(self, item)

    monkeypatch.setattr(packer.Shard, "write", stopping)
    assert pack(tars, tmp_path / "out", *more, program="webdataset") == 75
    monkeypatch.setattr(packer.Packer, "decode", counting)
    assert pack(tars, tmp_path / "out", *more, program="webdataset") == 0
    assert files(tmp_path / "out") == files(tmp_path / "truth")
    assert decoded == [45, 35, 25, 20, 10][at - 1]      # the whole shards are not decoded again


def test_a_tar_that_is_cut_short_stops_the_packing(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = tmp_path / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:20_480])
    assert pack(tars, tmp_path / "out", "--text-encoder", "none", program="webdataset") == 2
    said = capsys.readouterr().err
    assert "00001.tar cannot be read to its end" in said and not (tmp_path / "out/manifest.json").exists()


def test_one_bad_sample_costs_one_line(tmp_path: Path) -> None:
    """Half an emoji; a name that is not UTF-8, which the list of what was left out must hold all the same."""
    odd = os.fsdecode(b"caf\xe9")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, caption in ("a", b'"fine"'), ("b", b'"so happy \\ud83d"'), (odd, b'"fine"'):
            add(tar, f"{name}.png", picture(1))
            add(tar, f"{name}.json", b'{"caption": %s}' % caption)
    assert pack(tmp_path / "0.tar", tmp_path / "out", "--text-encoder", "none", program="webdataset") == 0
    assert ShardDataset(tmp_path / "out", verify=True).texts(np.arange(1)) == [["fine"]]
    assert [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()] == [
        {"id": "0/b", "reason": r"its caption is not Unicode: so happy \ud83d"}, {"id": f"0/{odd}", "reason": "its name is not UTF-8"}]


def test_captions_that_are_cut_are_counted(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    """A token a word: of "picture 3 of 1" four. None is cut where all just fit."""
    def load(spec: str, device: Any, dtype: Any, limit: int) -> TextEncoder:
        def encode(captions: list[str]) -> tuple[torch.Tensor, ...]:
            lengths = count(captions, limit)
            return torch.zeros(len(captions), max(lengths), 2), torch.zeros(len(captions), 3), torch.tensor(lengths)

        def count(captions: list[str], limit: int) -> list[int]:
            return [max(1, min(len(caption.split()), limit)) for caption in captions]

        return TextEncoder("fake", limit, 2, 3, encode, count)  # type: ignore[arg-type]

    monkeypatch.setattr(encoding, "load_text_encoder", load)
    for limit, cut in (3, 43), (4, 0):
        out = tmp_path / str(limit)
        assert pack(tars, out, "--text-encoder", "fake", "--max-tokens", limit, program="webdataset") == 0
        assert ShardDataset(out).manifest["captions_cut"] == cut
        assert (", 43 captions (43 are cut at 3 tokens)," in capsys.readouterr().out) == (cut > 0)
        assert data_inspect.main([str(out)]) == 0
        assert ("a caption; 43 were longer, and are cut" in capsys.readouterr().out) == (cut > 0)


def test_captions_need_an_encoder_or_a_word(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(tars, tmp_path / "out", program="webdataset") == 2
    assert "or --text-encoder none to keep the texts only" in capsys.readouterr().err
