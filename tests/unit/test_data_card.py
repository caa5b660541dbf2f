"""The card beside a packed set: what the packer knows and was told, and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data_prep import imagenet
from largescale.data.shards import ShardDataset
from largescale.host.sizes import size_text
from tests.unit.packed_pictures import picture
from tests.unit.source_files import tar
from tests.unit.test_append import pack


def read(out: Path) -> tuple[dict[str, Any], str]:
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name in "cat", "dog_1":
        (root / "first" / name).mkdir(parents=True)
        (root / "more" / name).mkdir(parents=True)
        for i in range(3):
            (root / "first" / name / f"{i}.png").write_bytes(picture(ord(name[0]) + i))
        (root / "more" / name / "9.png").write_bytes(picture(ord(name[0]) + 9))
    (root / "first/cat/bad.png").write_bytes(b"no image")
    return root


def test_a_card_says_what_is_known(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack(images / "first", out, "--licence", "cc-by-4.0", program=imagenet) == 0
    front, body = read(out)
    assert front == {"pretty_name": "imagenet-first", "license": "cc-by-4.0", "size_categories": ["n<1K"],
                     "task_categories": ["unconditional-image-generation"], "tags": ["largescale", "diffusion", "pixels"]}
    size = size_text(sum(shard["bytes"] for shard in ShardDataset(out).manifest["shards"]))
    assert f"6 images, as pixels of shape \\[3, 16, 16\\], of 2 classes (cat, dog\\_1): {size} in 2 shards." in body and size.endswith(" KB")
    assert "| imagenet-first | data\\_prep.imagenet | 7 | 6 | cc-by-4.0 |" in body and str(tmp_path) not in body and str(images) not in body
    assert "1 images, each with its reason in `skipped.jsonl`." in body and "cannot identify image file" in body
    assert "- ADM's centre crop\n- without images whose shorter side is below 4, or that have more than 178,956,970 pixels" in body
    # The picture is of the shards: their first image stands first, eight times as large.
    sheet = np.asarray(Image.open(out / "images.png"))
    first = ShardDataset(out).gather(np.array([0]))["latent"][0].transpose(1, 2, 0)
    assert np.array_equal(sheet[2:130:8, 2:130:8], first) and sheet.shape == (132, 8 * 130 + 2, 3)
    # It is written anew when the set grows, with the other licence.
    assert pack(images / "more", out, "--append", "--licence", "Of the Museum", program=imagenet) == 0
    front, grown = read(out)
    assert front["license"] == ["cc-by-4.0", "other"] and front["license_name"] == "Of the Museum"
    assert "8 images" in grown and "| imagenet-more | data\\_prep.imagenet | 2 | 2 | Of the Museum |" in grown
    assert ShardDataset(out).fingerprint in grown and grown != body


def test_no_licence_is_invented_and_no_card_of_others_replaced(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert pack(images / "first", out) == 0
    front, body = read(out)
    assert "license" not in front and "| none was given |" in body
    (out / "README.md").unlink()                        # as where it was killed before it wrote it
    assert pack(images / "first", out) == 0 and read(out) == (front, body)
    for own in b"# mine", b"\xff":
        (out / "README.md").write_bytes(own)
        capsys.readouterr()
        assert pack(images / "first", out) == 0
        assert (out / "README.md").read_bytes() == own and "README.md is not ours, and stays as it is" in capsys.readouterr().err


def test_a_card_of_captions(tmp_path: Path) -> None:
    from data_prep import webdataset

    samples = [(f"{i}.{kind}", picture(i) if kind == "png" else b"x") for i in range(3) for kind in ("png", "txt")]
    path = tar(tmp_path / "0.tar", *samples)
    out = tmp_path / "captioned"
    assert pack(path, out, "--text-encoder", "none", program=webdataset) == 0
    front, body = read(out)
    assert front["task_categories"] == ["text-to-image"] and "with 3 captions:" in body and "## Left out\n\nNothing." in body
