"""Inception's features are torch-fidelity's and ADM's, and no weights means no features."""

import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eval.scoring import extractors
from eval.scoring.extractors import Extractor, load_extractor
from largescale.errors import DataError
from largescale.host.files import sha256
from tests.unit.drawn_images import assert_each_by_itself, assert_equal, drawn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in torch-fidelity's format."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Bare(module.FeatureExtractorInceptionV3):     # type: ignore[name-defined,misc]
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None: ...

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Bare("bare", ["2048"], str(path))
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.8, 1.2)
        elif name.endswith(("bn.bias", "running_mean")):
            tensor.normal_(0, 0.1)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> Extractor:
    return load_extractor("inception", CPU, inception_weights=inception_file)


def test_inception_describes_itself(inception: Extractor) -> None:
    """Made-up weights are not Inception's, and give no FID."""
    assert (inception.name, inception.width, inception.spatial_width, inception.classes) == ("other-inception", 2048, 2023, 1008)
    assert not inception.fid and inception.frechet_name == "FD-other-inception"
    assert inception.identity.startswith("torch_fidelity:inception-v3-compat sha256:")


def test_the_published_weights_give_fid(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256(inception_file))
    published = load_extractor("inception", CPU, inception_weights=inception_file)
    assert published.name == "inception" and published.fid and published.frechet_name == "FID"


def test_inception_is_torch_fidelitys(inception: Extractor, inception_file: Path) -> None:
    from torch_fidelity.utils import create_feature_extractor

    theirs = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased", "logits"], cuda=False, verbose=False,
                                      feature_extractor_weights_path=str(inception_file))
    for height, width in ((32, 32), (40, 77)):
        images = drawn(2, height, width)
        with torch.no_grad():
            pooled, unbiased, logits = theirs(images)
        ours = inception(images)
        assert torch.equal(ours.pooled, pooled) and ours.logits is not None and torch.equal(ours.logits, unbiased)
        assert pooled.std() > 0.01 and not torch.allclose(unbiased, logits)     # the bias is not in them


def test_inception_spatial_is_adms(inception: Extractor, inception_file: Path) -> None:
    """mixed_6/conv: relu(batchnorm(1x1 convolution)) of what mixed_5 gives, 7 channels, in TensorFlow's order."""
    from torch_fidelity.utils import create_feature_extractor

    theirs = create_feature_extractor("inception-v3-compat", ["2048"], cuda=False, verbose=False,
                                      feature_extractor_weights_path=str(inception_file))
    mixed_5: list[torch.Tensor] = []
    theirs.Mixed_6c.register_forward_hook(lambda module, args, output: mixed_5.append(output))
    images = drawn(2, 48, 48)
    w = torch.load(inception_file, weights_only=True)
    with torch.no_grad():
        theirs(images)
        x = F.conv2d(mixed_5[0], w["Mixed_6d.branch1x1.conv.weight"])
        mean, var, scale, shift = (w[f"Mixed_6d.branch1x1.bn.{name}"][:, None, None]
                                   for name in ("running_mean", "running_var", "weight", "bias"))
        x = ((x - mean) / (var + 0.001).sqrt() * scale + shift).clamp(min=0)        # (2, 192, 17, 17)
    nhwc = x.numpy().transpose(0, 2, 3, 1)              # as TensorFlow has it
    expected = nhwc[..., :7].reshape(2, -1)             # evaluator.py of ADM
    assert (expected == 0).mean() > 0.05                # a relu
    assert_equal(inception(images).spatial, torch.from_numpy(expected), 1e-5)


def test_inception_each_by_itself(inception: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_each_by_itself(inception, drawn(3, 24, 24), monkeypatch)
    none = inception(drawn(1, 24, 24)[:0])
    assert none.spatial is not None and (none.pooled.shape, none.spatial.shape) == ((0, 2048), (0, 2023))


def test_inception_in_float64(inception: Extractor, inception_file: Path) -> None:
    double = load_extractor("inception", CPU, inception_weights=inception_file, dtype=torch.float64)
    assert double.identity == f"{inception.identity} float64"
    images = drawn(1, 32, 32)
    assert_equal(inception(images).pooled, double(images).pooled, 1e-4)
    assert not torch.equal(inception(images).pooled, double(images).pooled)


def test_running_statistics_are_part_of_the_identity(inception: Extractor, inception_file: Path, tmp_path: Path) -> None:
    weights = torch.load(inception_file, weights_only=True)
    weights["Conv2d_1a_3x3.bn.running_mean"][0] += 1
    torch.save(weights, tmp_path / "other.pth")
    other = load_extractor("inception", CPU, inception_weights=tmp_path / "other.pth")
    assert other.identity != inception.identity


def test_inception_in_half_precision_is_refused(inception_file: Path) -> None:
    with pytest.raises(DataError, match="inception computes in float32 or float64, not torch.bfloat16"):
        load_extractor("inception", CPU, inception_weights=inception_file, dtype=torch.bfloat16)


class Evil:
    """What is pickled as a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_weights_that_are_swapped_after_they_were_checked(inception_file: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    file, load = shutil.copy(inception_file, tmp_path / "weights.pth"), torch.load

    def check_and_swap(path: Any, *args: Any, **more: Any) -> Any:
        state = load(path, *args, **more)
        if path == file:
            torch.save(state | {"fc.bias": Evil(tmp_path / "ran")}, file)
        return state

    monkeypatch.setattr(torch, "load", check_and_swap)
    load_extractor("inception", CPU, inception_weights=file)
    assert not (tmp_path / "ran").exists()


def test_bad_inception_weights(inception_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.pth is not a file; give weights-inception-2015-12-05-6726825d.pth"):
        load_extractor("inception", CPU, inception_weights=tmp_path / "nowhere.pth")
    weights = torch.load(inception_file, weights_only=True)
    (tmp_path / "cut.pth").write_bytes(inception_file.read_bytes()[:10_000])
    torch.save({k: v for k, v in weights.items() if not k.startswith("fc.")}, tmp_path / "lacks.pth")
    torch.save(weights | {"fc.weight": weights["fc.weight"][:1000]}, tmp_path / "torchvision.pth")
    torch.save(weights | {"fc.bias": Evil(tmp_path / "ran")}, tmp_path / "code.pth")
    for name in ("cut", "lacks", "torchvision", "code"):
        with pytest.raises(DataError, match=rf"{name}.pth cannot be loaded \(.+\); give --inception-weights FILE"):
            load_extractor("inception", CPU, inception_weights=tmp_path / f"{name}.pth")
    assert not (tmp_path / "ran").exists()
    weights["Conv2d_1a_3x3.conv.weight"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    with pytest.raises(DataError, match="are not finite"):
        load_extractor("inception", CPU, inception_weights=tmp_path / "nan.pth")


@pytest.mark.parametrize("trouble", ["no name", "silent", "cut", "other"])
def test_no_inception_weights(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, with one that does not answer, and where something else or a part arrives."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(extractors, "DOWNLOAD_TIMEOUT_S", 0.5)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth"
        monkeypatch.setattr(module, "URL_INCEPTION_V3", "http://nowhere.invalid/x" if trouble == "no name" else url)

        over = threading.Event()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                if trouble != "silent":
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * (100 if trouble == "other" else 50))
                if trouble != "other":
                    over.wait(600)

        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        with pytest.raises(DataError, match=r"the weights of Inception cannot be loaded \(.+\); give --inception-weights FILE.*"
                                            "or score with --extractor efficientnet-lite0"):
            load_extractor("inception", CPU)
        assert answering.is_alive() or trouble == "other"  # we gave up, not the server
        over.set()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert socket.getdefaulttimeout() is None


def test_inception_weights_that_torch_fidelity_fetched(inception: Extractor, inception_file: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / module.URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.symlink_to(inception_file)
    assert load_extractor("inception", CPU).identity == inception.identity
