"""Names of classes, for pipelines of diffusers: ImageNet's, and files of names."""

from pathlib import Path

import pytest

from largescale.errors import ConfigError
from largescale.interop.diffusers_pipeline import class_names
from tests.random_models import STOCK, make_trained


def test_imagenets_names() -> None:
    pytest.importorskip("torchvision")
    trained = make_trained(**STOCK)
    trained.info["data_info"]["name"] = "ImageNet256"
    names = class_names(None, trained)
    assert len(names) == 1000 and names[0] == "tench" and names[207] == "golden retriever"


@pytest.mark.parametrize(("content", "says"), [
    (b"\n".join([b"a"] * 12), "names 12 classes, and the model has 10; give one line for each class"),
    (b"a\nb\n", "names 2 classes, and the model has 10"),
    (b"\xff\xfe", "cannot be read .*codec"),
    (None, "cannot be read .*No such file"),
])
def test_names_that_do_not_fit(content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        class_names(tmp_path / "names.txt", make_trained())
