"""Exports for diffusers on the hub, from a run and back."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from largescale import convert, export
from largescale.checkpoint.weights import load_trained
from tests.conftest import RunHere
from tests.hub_server import TOKEN, Hub, serve
from tests.lazy import Lazy
from tests.unit.exported_pipelines import content, modules_of_folders  # noqa: F401

diffusers = Lazy("diffusers")
hub = pytest.importorskip("huggingface_hub")


def main(*args: object) -> int:
    return export.main([*map(str, args), "--format", "diffusers"])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, as huggingface_hub's only one."""
    with serve() as found:
        point_at(found.url, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)
        yield found


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is read when the library is loaded."""
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_HOME"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", url, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_what_is_sent_comes_back(server: Hub, run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every byte, sharded; diffusers and convert open what was fetched."""
    run = run_here("--train.steps", 3).run
    (run / "diffusers").mkdir()
    (run / "diffusers/.hidden").write_text("mine")
    assert main(run, "--push-to-hub", "me/digits", "--private", "--license", "mit", "--max-shard-size", "100KB") == 0
    assert capsys.readouterr().out.endswith(f"sent to {server.url}/me/digits\n") and server.private == {"me/digits": True}
    fetched = Path(hub.snapshot_download("me/digits"))
    sent = {name: data for name, data in content(run / "diffusers").items() if name != ".hidden"}
    assert content(fetched) == sent == server.repositories["me/digits"] and len(server.sent_large["me/digits"]) > 1
    assert 'from_pretrained("me/digits", trust_remote_code=True)' in (fetched / "README.md").read_text()

    pipe = diffusers.DiffusionPipeline.from_pretrained("me/digits", trust_remote_code=True)
    assert torch.equal(pipe.transformer.proj_out_2.weight, load_trained(run).model.final_layer.linear.weight)
    assert convert.main(["me/digits", "--out", str(tmp_path / "back")]) == 0
    assert torch.equal(load_trained(tmp_path / "back").model.state_dict()["pos_embed"], load_trained(run).model.state_dict()["pos_embed"])

    # Sent again as one file, nothing of the shards is left.
    assert main(run, "--push-to-hub", "me/digits") == 0
    assert [name for name in server.repositories["me/digits"] if "safetensors" in name] == ["transformer/diffusion_pytorch_model.safetensors"]
    assert server.repositories["me/digits"] == {name: data for name, data in content(run / "diffusers").items() if name != ".hidden"}


def test_the_programs_as_they_are_typed(run_here: RunHere, tmp_path: Path) -> None:
    """In processes of their own, which know the hub by their environment."""
    run = run_here("--train.steps", 2).run
    with serve() as there:
        there.repositories["me/ours"], there.private["me/ours"] = {".gitattributes": b"theirs"}, False
        settings = {"HF_ENDPOINT": there.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
        fetch = "import huggingface_hub; huggingface_hub.snapshot_download('me/ours', local_dir='fetched')"
        for command in (["-m", "largescale.export", str(run), "--push-to-hub", "me/ours"], ["-c", fetch]):
            done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env | {"PYTHONPATH": str(Path(__file__).parents[2])},
                                  capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "fetched/.cache")
    # What was in the repository stays.
    assert content(tmp_path / "fetched") == content(run / "export") | {".gitattributes": b"theirs"}
    assert torch.equal(load_trained(tmp_path / "fetched").model.state_dict()["pos_embed"], load_trained(run).model.state_dict()["pos_embed"])


def test_the_card_alone_is_sent(server: Hub, run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 3).run
    assert export.main([str(run), "--push-to-hub", "me/ours"]) == 0
    before = server.repositories["me/ours"]
    assert sorted(before) == ["README.md", "config.json", "model.safetensors"]
    assert export.main([str(run), "--push-to-hub", "me/ours", "--card-only", "--license", "mit"]) == 0
    after = server.repositories["me/ours"]
    assert b'license: "mit"' in after["README.md"] and after == before | {"README.md": after["README.md"]}
    assert server.commits == ["Export by largescale", "Card by largescale"]
    assert main(run, "--out", tmp_path / "card", "--push-to-hub", "me/new", "--card-only") == 0
    assert server.repositories["me/new"].keys() == {"README.md"}


def test_what_the_hub_refuses(server: Hub, run_here: RunHere, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and the folder stays."""
    run = run_here("--train.steps", 2).run
    for token, refuse, says in (("hf_wrong", 0, "the hub refuses me/x (HTTP 401: Invalid credentials)"), (TOKEN, 403, "the token needs the right to write there"), (TOKEN, 413, "the hub does not take me/x (HTTP 413: refused)")):
        monkeypatch.setenv("HF_TOKEN", token)
        server.refuse = refuse
        capsys.readouterr()
        assert export.main([str(run), "--push-to-hub", "me/x"]) == 2
        said = capsys.readouterr().err.splitlines()
        assert says in said[-1] and said[-1].startswith("error: ") and f"{run}/export stays as it is" in said[-1] and "Traceback" not in "".join(said)
        assert load_trained(run / "export").info["step"] == 2
    assert token not in " ".join(said)


def test_without_a_network(run_here: RunHere, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 2).run
    with serve() as gone:
        pass
    point_at(gone.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    capsys.readouterr()
    assert export.main([str(run), "--push-to-hub", "me/x"]) == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"me/x could not be sent to {gone.url}" in said and "is there a network?" in said and f"{run}/export stays as it is" in said
    assert load_trained(run / "export").info["step"] == 2


def test_names_and_tokens_are_checked_before_any_work(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(export, "read_weights", lambda *where: 1 / 0)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("a/b/c", "me/x y", "-me/x", "", "me/x..y"):
        assert export.main([str(tmp_path), f"--push-to-hub={name}"]) == 2
        assert f"--push-to-hub {name} is no name of a repository" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert export.main([str(tmp_path), "--push-to-hub", "me/x"]) == 2
    assert "there is no token for the hub: `hf auth login` keeps one, or set HF_TOKEN" in capsys.readouterr().err


def test_only_the_export_sends() -> None:
    """Training has nothing that could."""
    root = Path(__file__).parents[2]
    files = [path for name in ("largescale", "eval", "data_prep") for path in (root / name).rglob("*.py")]
    assert [str(path.relative_to(root)) for path in files if "hub_upload" in path.read_text()] == ["largescale/export.py"]
