"""The card of repacked latents, their map to colours, and latents that are added to a set."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_prep import latent_sources
from data_prep.append import ALREADY
from data_prep.latent_files import open_source
from data_prep.listing import Listings
from largescale.data.format import LATENT_RGB
from largescale.data.shards import ShardDataset
from tests.random_models import make_vae
from tests.unit.latent_folders import N, lightningdit, mds, on_disk, repa, run
from tests.unit.packed_pictures import files, one_thread  # noqa: F401


def card(out: Path) -> tuple[dict[str, Any], str]:
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_its_card(tmp_path: Path) -> None:
    repa(tmp_path / "in")
    vae = make_vae(tmp_path / "vae")
    assert run(tmp_path / "in", tmp_path / "out", "--licence", "cc-by-4.0", "--vae", tmp_path / "vae") == 0
    front, body = card(tmp_path / "out")
    assert front["license"] == "cc-by-4.0" and front["tags"] == ["largescale", "diffusion", "moments"] and front["pretty_name"] == "in"
    assert "| in | data\\_prep.latents, REPA's .npy folder | 9 | 9 | cc-by-4.0 |" in body and "## Left out\n\nNothing." in body
    assert "- cropped and encoded by others\n" in body and f"- vae encoder: {vae.identity}\n" in body and str(tmp_path) not in body
    # Shown by a map to colours, for which the VAE decodes a few.
    assert "(images.png)" in body and (tmp_path / "out/images.png").exists()
    matrix = np.array(json.loads((tmp_path / "out" / LATENT_RGB).read_text()))
    assert matrix.shape == (5, 3) and np.isfinite(matrix).all()
    assert run(tmp_path / "in", tmp_path / "plain") == 0
    front, body = card(tmp_path / "plain")
    assert "license" not in front and "| none was given |" in body and "- encoder: not known\n" in body and "images.png" not in body


def test_the_map_to_colours_is_of_what_a_model_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE decodes x_start by the set's normalisation, which --scale-factor may have made another than its own."""
    repa(tmp_path / "in")
    vae = make_vae(tmp_path / "vae", shift_factor=0.25)
    decoded = []
    decode = type(vae.module).decode
    monkeypatch.setattr(type(vae.module), "decode", lambda self, z, **more: (decoded.append(z.clone()), decode(self, z, **more))[1])
    assert run(tmp_path / "in", tmp_path / "out", "--vae", tmp_path / "vae", "--scale-factor", 0.125) == 0
    # The means, as they were before their shift was taken from them.
    stored = ShardDataset(tmp_path / "out").gather(np.array([0]))["latent"][:, :4].astype(np.float32)
    torch.testing.assert_close(decoded[0], torch.from_numpy(stored) + 0.25, atol=2e-3, rtol=2e-3)


def test_an_addition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of other latents, and of some that the set has, which are left out."""
    z, _ = mds(tmp_path / "first")
    mds(tmp_path / "more")
    path = tmp_path / "more/1/shard.00000.mds"
    path.write_bytes(path.read_bytes().replace(z[8].astype(np.float16).tobytes(), z[8].astype(np.float16)[::-1].tobytes()))
    out = tmp_path / "out"
    assert run(tmp_path / "first", out) == 0
    before = {name: content for name, content in files(out).items() if name.endswith(".arrow")}
    assert run(tmp_path / "more", out, "--append", "--scale-factor", 0.5) == 2
    assert "info.scale_factor: 1.0 there, 0.5 here" in capsys.readouterr().err
    # Rows are numbered in both, and one is another.
    assert run(tmp_path / "more", out, "--append") == 2
    assert "9 of the source's 9 ids are in" in (said := capsys.readouterr().err) and "1 of 9 that were looked at, such as 000000008" in said
    assert run(tmp_path / "more", out, "--append", "--id-prefix", "more/") == 0
    data = ShardDataset(out, verify=True)
    assert len(data) == N + 1 and data.manifest["skipped"]["reasons"] == {ALREADY: N - 1} and data.manifest["captions"] == N + 1
    assert before.items() <= files(out).items()
    row = data.gather(np.array([N]))["latent"][0]
    assert np.array_equal(row, z[8].astype(np.float16)[::-1]) and "| more | data\\_prep.latents, MDS | 9 | 1 |" in card(out)[1]


@pytest.mark.parametrize("make", [repa, lightningdit, mds, on_disk])
def test_ids_are_those_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    make(tmp_path / "in")
    source = open_source(tmp_path / "in", None, None, None, Listings())
    ids = [item.id for item in source.part(0, 99)]
    for at_a_time in 2, 4096:
        monkeypatch.setattr(latent_sources, "IDS_AT_A_TIME", at_a_time)
        assert list(chain.from_iterable(source.ids())) == ids and len({*ids}) == N
    assert run(tmp_path / "in", tmp_path / "out", "--id-prefix", "x/") == 0
    assert [id for _, id in ShardDataset(tmp_path / "out").ids()] == [f"x/{id}" for id in ids]
