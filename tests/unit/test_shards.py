"""Shards hold what was written; whatever is missing, damaged or of another data set is named, with a remedy."""

import dataclasses
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from largescale.data import shards
from largescale.data.format import METADATA_KEY, CaptionInfo, DatasetInfo
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.errors import DataError
from largescale.host.files import sha256

INFO = DatasetInfo("toy", "latents", (2, 3, 4), num_classes=10, scale_factor=0.5, encoders={"vae": "toy-vae"})
ROWS = 25


def image(i: int) -> np.ndarray:
    return np.full(INFO.shape, i, np.float16)


def pack(out: Path, info: DatasetInfo = INFO, rows: int = ROWS, mirror: bool = False, **text: Any) -> Path:
    with ShardWriter(out, info, rows_per_shard=10) as writer:
        for i in range(rows):
            mirrored = -image(i) if mirror else None
            writer.write(id=f"row-{i}", latent=image(i), label=i % 10, latent_mirror=mirrored, **text)
    return out


def alter(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_manifest(out: Path, edit: Any) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    edit(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("mirror", [False, True])
def test_gather_gives_the_rows_in_the_order_asked(tmp_path: Path, mirror: bool) -> None:
    data = ShardDataset(pack(tmp_path, mirror=mirror), verify=True)
    indices = np.array([24, 0, 9, 10, 0, 19, 20, 3])    # across shards, with repeats
    rows = data.gather(indices)
    assert (len(data), data.info, data.has_mirror) == (ROWS, INFO, mirror)
    assert rows["latent"].dtype == np.float16 and rows["label"].dtype == np.int64
    assert np.array_equal(rows["latent"], np.stack([image(i) for i in indices]))
    assert np.array_equal(rows["label"], indices % 10)
    if mirror:
        flip = np.arange(len(indices)) % 3 == 0
        assert np.array_equal(data.gather(indices, flip)["latent"], np.stack([image(-i if f else i) for i, f in zip(indices, flip, strict=True)]))


@pytest.mark.parametrize("indices", [[-1], [ROWS], [0, 1, ROWS]])
def test_gather_refuses_an_index_outside(tmp_path: Path, indices: list[int]) -> None:
    with pytest.raises(IndexError, match=r"\[0, 25\)"):
        ShardDataset(pack(tmp_path)).gather(np.array(indices))


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = pack(tmp_path / "one"), pack(tmp_path / "two")
    files = sorted(path.name for path in one.iterdir())
    assert files == ["manifest.json", "shard_00000.arrow", "shard_00001.arrow", "shard_00002.arrow"]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)


def test_the_fingerprint_follows_content_and_info(tmp_path: Path) -> None:
    variants = [pack(tmp_path / "a"), pack(tmp_path / "b", rows=ROWS - 1), pack(tmp_path / "c", mirror=True),
                pack(tmp_path / "d", dataclasses.replace(INFO, scale_factor=1.0))]
    assert len({ShardDataset(path).fingerprint for path in variants}) == len(variants)


def test_a_shard_is_one_mapped_batch_and_its_file_is_closed(tmp_path: Path) -> None:
    data = ShardDataset(pack(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    data.gather(np.arange(ROWS))
    assert len(os.listdir("/proc/self/fd")) == before
    latent = data._shard(0).latent
    assert not latent.flags.owndata and not latent.flags.writeable


def test_more_shards_than_may_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux gives a process 65,530 maps; of LAION there are more shards."""
    expected = ShardDataset(pack(tmp_path)).gather(np.arange(ROWS))["latent"]
    monkeypatch.setattr(shards, "MAX_MAPPED", 1)
    data = ShardDataset(tmp_path, verify=True)
    for _ in range(2):
        assert np.array_equal(data.gather(np.arange(ROWS))["latent"], expected) and len(data._mapped) == 1


def test_opening_reads_no_shard(tmp_path: Path) -> None:
    """Also what is only found when a shard is first mapped, is found with its name."""
    pack(tmp_path)
    size = (tmp_path / "shard_00001.arrow").stat().st_size
    (tmp_path / "shard_00001.arrow").write_bytes(bytes(size))
    data = ShardDataset(tmp_path)
    data.gather(np.arange(10))
    with pytest.raises(DataError, match=r"shard_00001.arrow cannot be read"):
        data.gather(np.array([10]))


def test_captions_without_embeddings_are_kept(tmp_path: Path) -> None:
    data = ShardDataset(pack(tmp_path, captions=["a cat", "a dog"]), verify=True)
    assert set(data.gather(np.arange(3))) == {"latent", "label"}
    assert data.texts(np.array([24, 0])) == [["a cat", "a dog"]] * 2
    with pytest.raises(DataError, match="has no captions"):
        ShardDataset(pack(tmp_path / "without")).texts(np.array([0]))


CAPTIONED = dataclasses.replace(INFO, captions=CaptionInfo(tokens=4, width=3, pooled_width=2))


def caption(i: int, k: int) -> dict[str, Any]:
    """The k-th caption of row i has 1 to 4 tokens, each with a value of its own."""
    n = 1 + (i + k) % 4
    value = 10 * i + k
    return {"text": f"{i}/{k}", "tokens": np.full((n, 3), value, np.float16), "pooled": np.full(2, -value, np.float16)}


def pack_captioned(out: Path, rows: int = ROWS, **change: Any) -> Path:
    """Row i has 1 + i % 3 captions."""
    with ShardWriter(out, CAPTIONED, rows_per_shard=10) as writer:
        for i in range(rows):
            captions = [caption(i, k) for k in range(1 + i % 3)]
            texts, tokens, pooled = ([c[key] for c in captions] for key in ("text", "tokens", "pooled"))
            row: dict[str, Any] = {"captions": texts, "caption_tokens": tokens, "caption_pooled": pooled} | change
            writer.write(id=f"row-{i}", latent=image(i), **row)
        writer.write_empty_caption(np.ones((2, 3), np.float16), np.ones(2, np.float16))
    return out


def test_one_caption_a_row_is_chosen_padded_and_measured(tmp_path: Path) -> None:
    data = ShardDataset(pack_captioned(tmp_path), verify=True)
    indices, choice = np.array([24, 0, 11, 20, 11, 5]), np.array([0.0, 0.99, 0.5, 0.34, 0.999, 0.0])
    chosen = [0, 0, 1, 1, 2, 0]                         # floor(choice * number of captions)
    rows = data.gather(indices, choice=choice)
    for row, (i, k) in enumerate(zip(indices, chosen, strict=True)):
        expected = caption(int(i), k)
        n = len(expected["tokens"])
        assert rows["caption_length"][row] == n
        assert np.array_equal(rows["caption_tokens"][row, :n], expected["tokens"]) and not rows["caption_tokens"][row, n:].any()
        assert np.array_equal(rows["caption_pooled"][row], expected["pooled"])
    first = data.gather(indices, choice=np.zeros(6))
    assert np.array_equal(first["caption_pooled"][:, 0], -10.0 * indices)
    assert data.texts(indices) == [[f"{i}/{k}" for k in range(1 + i % 3)] for i in indices]
    assert set(data.gather(indices)) == {"latent", "label"}
    tokens, pooled = data.empty_caption
    assert tokens.shape == (2, 3) and pooled.shape == (2,) and (tokens == 1).all()


def test_only_real_tokens_are_stored(tmp_path: Path) -> None:
    shard = pack_captioned(tmp_path, rows=10) / "shard_00000.arrow"
    stored = sum(caption(i, k)["tokens"].size for i in range(10) for k in range(1 + i % 3))
    with pa.memory_map(str(shard)) as file:
        column = pa.ipc.open_file(file).get_batch(0).column("caption_tokens")
    assert len(column.values.values) == stored


@pytest.mark.parametrize(("change", "message"), [
    ({"caption_pooled": None}, "the first row"),
    ({"captions": ["one", "too", "many", "texts"]}, "4 captions"),
    ({"captions": [], "caption_tokens": [], "caption_pooled": []}, "at least one"),
    ({"caption_tokens": [np.zeros((5, 3), np.float16)]}, r"float16 \(5, 3\)"),
    ({"caption_tokens": [np.zeros((0, 3), np.float16)]}, r"float16 \(0, 3\)"),
    ({"caption_tokens": [np.zeros((1, 4), np.float16)]}, r"float16 \(1, 4\)"),
    ({"caption_tokens": [np.zeros((1, 3), np.float32)]}, r"float32 \(1, 3\)"),
    ({"caption_pooled": [np.zeros(3, np.float16)]}, r"float16 \(3,\)"),
    ({"caption_tokens": [np.full((1, 3), np.nan, np.float16)]}, "not finite"),
])
def test_captions_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    good = {"captions": ["a"], "caption_tokens": [np.zeros((1, 3), np.float16)], "caption_pooled": [np.zeros(2, np.float16)]}
    with pytest.raises(DataError, match=rf"row 'bad'.*{message}"), ShardWriter(tmp_path, CAPTIONED) as writer:
        writer.write(id="good", latent=image(0), **good)
        writer.write(id="bad", latent=image(0), **good | change)


def test_a_captioned_set_needs_the_empty_caption(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty caption"), ShardWriter(tmp_path / "a", CAPTIONED) as writer:
        writer.write(id="a", latent=image(0), captions=["a"], caption_tokens=[np.zeros((1, 3), np.float16)],
                     caption_pooled=[np.zeros(2, np.float16)])
    pack_captioned(tmp_path / "b")
    alter(tmp_path / "b/empty_caption.arrow", at=400)
    with pytest.raises(DataError, match=r"empty_caption.arrow was altered"):
        ShardDataset(tmp_path / "b", verify=True)
    (tmp_path / "b/empty_caption.arrow").unlink()
    with pytest.raises(DataError, match=r"empty_caption.arrow is missing"):
        ShardDataset(tmp_path / "b")


def test_a_full_disk_is_said_and_leaves_no_half_a_shard(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(DataError, match=r"cannot write .*shard_00000.arrow .File too large.; what is packed stays: free space"):
            pack(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("change", "message"), [
    ({"latent": np.zeros((2, 3, 5), np.float16)}, r"float16 \(2, 3, 5\)"),
    ({"latent": np.zeros((2, 3, 4), np.float32)}, "float32"),
    ({"latent": np.full((2, 3, 4), np.inf, np.float16)}, "not finite"),
    ({"latent_mirror": np.zeros((2, 3, 4), np.uint8)}, "latent_mirror is uint8"),
    ({"label": 10}, r"label=10 .*\[0, 10\)"),
    ({"label": -1}, "label=-1"),
    ({"label": 1.5}, "label=1.5"),
    ({"latent_mirror": None}, "the first row"),
    ({"captions": ["a cat"]}, "the columns"),
    ({"caption_tokens": [], "caption_pooled": []}, "the columns"),
])
def test_a_row_that_does_not_fit_is_named_and_nothing_is_finished(tmp_path: Path, change: Any, message: str) -> None:
    good: dict[str, Any] = {"latent": image(0), "label": 0, "latent_mirror": image(0)}
    with pytest.raises(DataError, match=rf"row 'bad'.*{message}"), ShardWriter(tmp_path, INFO) as writer:
        writer.write(id="good", **good)
        writer.write(id="bad", **good | change)
    assert not list(tmp_path.iterdir())


def test_the_writer_keeps_the_values_of_a_reused_array(tmp_path: Path) -> None:
    latent = image(1)
    with ShardWriter(tmp_path, INFO) as writer:
        writer.write(id="a", latent=latent, label=0)
        latent[:] = 2
    assert ShardDataset(tmp_path).gather(np.array([0]))["latent"].max() == 1


def test_killed_half_way_leaves_no_manifest(tmp_path: Path) -> None:
    pack(tmp_path)                                      # nor does the old one outlive its shards
    writer = ShardWriter(tmp_path, INFO, rows_per_shard=1)
    writer.write(id="a", latent=image(99), label=0)     # and no __exit__, as after SIGKILL
    with pytest.raises(DataError, match=r"packing did not finish.*with a program of data_prep"):
        ShardDataset(tmp_path)
    pack(tmp_path)
    assert len(ShardDataset(tmp_path, verify=True)) == ROWS


def test_refuses_the_folder_of_another_data_set(tmp_path: Path) -> None:
    pack(tmp_path)
    with pytest.raises(DataError, match=r"already holds another data set.*another --out"):
        ShardWriter(tmp_path, dataclasses.replace(INFO, name="other"))
    assert len(ShardDataset(tmp_path, verify=True)) == ROWS


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; correct the path .*, or pack .*nowhere with a program of data_prep"):
        ShardDataset(tmp_path / "nowhere")


def test_missing_shard(tmp_path: Path) -> None:
    (pack(tmp_path) / "shard_00001.arrow").unlink()
    with pytest.raises(DataError, match=r"shard_00001.arrow is missing; restore the file, or pack .* with a program of data_prep"):
        ShardDataset(tmp_path)


def test_truncated_shard(tmp_path: Path) -> None:
    path = pack(tmp_path) / "shard_00002.arrow"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=r"shard_00002.arrow has \d+ bytes, not the manifest's \d+; restore"):
        ShardDataset(tmp_path)


def test_an_altered_byte_is_found_by_verify(tmp_path: Path) -> None:
    path = pack(tmp_path) / "shard_00001.arrow"
    alter(path, path.stat().st_size // 2)
    ShardDataset(tmp_path)                              # same size: a start does not read 10 million rows
    with pytest.raises(DataError, match=r"shard_00001.arrow was altered.*restore"):
        ShardDataset(tmp_path, verify=True)


def test_a_shard_of_another_data_set_is_found_on_opening(tmp_path: Path) -> None:
    pack(tmp_path / "a")
    pack(tmp_path / "b", dataclasses.replace(INFO, name="yot"))
    (tmp_path / "b" / "shard_00000.arrow").replace(tmp_path / "a" / "shard_00000.arrow")
    with pytest.raises(DataError, match=r"shard_00000.arrow is of another data set.*: name differ"):
        ShardDataset(tmp_path / "a").gather(np.array([0]))


def test_labels_outside_the_classes(tmp_path: Path) -> None:
    edit_manifest(pack(tmp_path), lambda manifest: manifest["shards"][1].update(label_max=10))
    with pytest.raises(DataError, match=r"shard_00001.arrow has labels from 0 to 10, outside \[0, num_classes=10\)"):
        ShardDataset(tmp_path)


def test_an_edited_label_range_is_found_by_verify(tmp_path: Path) -> None:
    edit_manifest(pack(tmp_path), lambda manifest: manifest["shards"][1].update(label_max=8))
    with pytest.raises(DataError, match=r"shard_00001.arrow.*label_max differ"):
        ShardDataset(tmp_path, verify=True)


@pytest.mark.parametrize("edit", [
    lambda manifest: manifest.update(format="2"),
    lambda manifest: manifest["info"].update(num_classes=11),
    lambda manifest: manifest["info"].update(kind="jpegs"),
    lambda manifest: manifest["shards"].pop(),
    lambda manifest: manifest.pop("info"),
    lambda manifest: manifest["shards"][1].update(rows=-100),
    lambda manifest: manifest["shards"][1].update(rows=2**70),
    lambda manifest: manifest["shards"][1].update(rows=10**4000),
    lambda manifest: manifest["shards"][1].update(rows="10"),
    lambda manifest: manifest["shards"][1].update(bytes=1.5),
    lambda manifest: manifest["shards"][1].update(label_max=None),
    lambda manifest: manifest["shards"][1].update(file="../x.arrow"),
    lambda manifest: manifest["shards"].insert(0, "shard"),
    lambda manifest: manifest.update(columns=3),
    lambda manifest: manifest["info"].update(shape=[2, 0, 4]),
    lambda manifest: manifest["info"].update(shape=[2, 3]),
    lambda manifest: manifest["info"].update(num_classes=2**80),
    lambda manifest: manifest["info"].update(captions=5),
    lambda manifest: manifest["info"].update(captions={"tokens": -1, "width": 2, "pooled_width": 3}),
])
def test_an_edited_manifest_is_refused(tmp_path: Path, edit: Any) -> None:
    edit_manifest(pack(tmp_path), edit)
    with pytest.raises(DataError, match=r"manifest.json cannot be used.*restore it"):
        ShardDataset(tmp_path)


def test_a_cut_manifest_is_refused(tmp_path: Path) -> None:
    os.truncate(pack(tmp_path) / "manifest.json", 100)
    with pytest.raises(DataError, match=r"manifest.json cannot be used"):
        ShardDataset(tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"format": ' + "[" * 200_000, "[1]", "null", "\udcff"])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (pack(tmp_path) / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"manifest.json cannot be used .*restore it"):
        ShardDataset(tmp_path)


def rewrite(out: Path, column: str, array: pa.Array, rows: int | None = None) -> None:
    """Another column in a shard, with the manifest's hashes corrected."""
    path = out / "shard_00000.arrow"
    with pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
    arrays = [array if name == column else batch.column(name) for name in batch.schema.names]
    metadata = json.loads(batch.schema.metadata[METADATA_KEY]) | ({"rows": rows} if rows else {})
    schema = batch.schema.with_metadata({METADATA_KEY: json.dumps(metadata)})
    with pa.OSFile(str(path.with_suffix(".new")), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    path.with_suffix(".new").replace(path)
    edit_manifest(out, lambda m: m["shards"][0].update(bytes=path.stat().st_size, sha256=sha256(path), **({"rows": rows} if rows else {})))


def test_a_shard_whose_hash_is_right_and_structure_wrong(tmp_path: Path) -> None:
    """Offsets of captions far outside the file, text that is none, rows that are not there: no memory of others is read."""
    offsets = np.arange(11, dtype=np.int32)
    far = offsets.copy()
    far[5] = 5_000_000
    for name, at, content in ("offset", far, b"x" * 10), ("text", offsets, b"\xf6" * 10):
        out = pack(tmp_path / name, rows=10, captions=["x"])
        strings = pa.Array.from_buffers(pa.string(), 10, [None, pa.py_buffer(at), pa.py_buffer(content)])
        rewrite(out, "captions", pa.ListArray.from_buffers(pa.list_(pa.string()), 10, [None, pa.py_buffer(offsets)], children=[strings]))
        with pytest.raises(DataError, match=r"shard_00000.arrow is damaged .*restore the file"):
            ShardDataset(out, verify=True)
        with pytest.raises(DataError, match=r"shard_00000.arrow is damaged .*restore the file"):
            ShardDataset(out).texts(np.array([9]))
    out = pack(tmp_path / "rows", rows=10)
    rewrite(out, "", pa.nulls(0), rows=10_000_000)
    with pytest.raises(DataError, match=r"shard_00000.arrow holds 10 rows, not the manifest's 10,000,000"):
        ShardDataset(out, verify=True)


def test_a_folder_of_images_was_never_packed(tmp_path: Path) -> None:
    (images := tmp_path / "imagenet256").mkdir()
    (images / "a.png").touch()
    with pytest.raises(DataError, match=r"was never packed: it has no manifest\.json and no shards; correct the path .*, or "
                                        r"pack .*/imagenet256 with python -m data_prep\.imagenet$"):
        ShardDataset(images)


def test_empty_data_sets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows were written"):
        pack(tmp_path, rows=0)
    assert not list(tmp_path.iterdir())
    edit_manifest(pack(tmp_path), lambda manifest: [shard.update(rows=0) for shard in manifest["shards"]])
    with pytest.raises(DataError, match="holds no rows; pack .* with a program of data_prep"):
        ShardDataset(tmp_path)


def test_unknown_kind() -> None:
    with pytest.raises(DataError, match=r"kind='jpegs'.*pixels, latents, moments"):
        DatasetInfo("toy", "jpegs", (3, 8, 8), 10)


def test_moments_have_twice_the_channels() -> None:
    assert DatasetInfo("toy", "moments", (8, 32, 32), 10).x_shape == (4, 32, 32)
    assert DatasetInfo("toy", "latents", (4, 32, 32), 10).x_shape == (4, 32, 32)
