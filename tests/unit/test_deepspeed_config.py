import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from largescale import train
from largescale.config.deepspeed import final_ds_config, load_ds_config, precision
from largescale.config.derived import batch_layout
from largescale.config.presets import PRESETS, digits
from largescale.config.schema import Config, TrainConfig
from largescale.config.serialise import from_dict, to_dict
from largescale.config.validation import validate
from largescale.errors import ConfigError

ROOT = Path(__file__).parents[2]
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


def with_train(config: Config, **train: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def write(folder: Path, **keys: Any) -> str:
    ds = json.loads((ROOT / "ds_configs/zero2_fp32.json").read_text()) | keys
    (folder / "ds.json").write_text(json.dumps(ds))
    return str(folder / "ds.json")


@pytest.mark.parametrize("world_size", [1, 16])
@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_with_every_json(preset: str, path: Path, world_size: int) -> None:
    config = with_train(PRESETS[preset](), ds_config=f"ds_configs/{path.name}")
    validate(config, world_size)
    assert from_dict(to_dict(config)) == config
    final = final_ds_config(config, world_size)
    assert precision(final) == path.stem.removeprefix("zero2_")
    parsed = DeepSpeedConfig({**final, "train_batch_size": final["train_micro_batch_size_per_gpu"]
                              * final["gradient_accumulation_steps"]})  # its own world size is 1 here
    assert parsed.zero_config.stage == 2
    assert parsed.grad_accum_dtype in (None, "fp32") and not parsed.timers_config.enabled


def test_there_are_the_three() -> None:
    assert [path.stem for path in JSONS] == ["zero2_bf16", "zero2_fp16", "zero2_fp32"]


def test_the_headline_recipe() -> None:
    config = PRESETS["dit_l2_imagenet256"]()
    assert (config.curriculum.patience, config.curriculum.n_clusters, config.train.steps) == (400, 20, 2_000_000)
    assert (config.train.global_batch_size, config.optimizer.lr, config.optimizer.ema_decay) == (256, 1e-4, 0.9999)
    assert (config.model.hidden_size, config.model.depth, config.model.patch_size) == (1024, 24, 2)
    assert PRESETS["dit_s2_imagenet256"]().curriculum.patience == 200


@pytest.mark.parametrize(
    ("key", "value", "owner"),
    [("train_batch_size", 7, "train.global_batch_size, now 128"), ("gradient_clipping", 1.0, "optimizer.clip_grad_norm"),
     ("optimizer", {"type": "Adam"}, "owned by the run config"), ("gradient_accumulation_steps", 2, "number of ranks"),
     ("train_micro_batch_size_per_gpu", 2, "train.micro_batch_size"), ("scheduler", {}, "optimizer.lr")],
)
def test_a_key_owned_by_both_is_an_error_with_both_values(tmp_path: Path, key: str, value: Any, owner: str) -> None:
    with pytest.raises(ConfigError, match=owner) as error:
        final_ds_config(with_train(digits(), ds_config=write(tmp_path, **{key: value})), 2)
    assert f"{key}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"zero_optimisation": {}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'"),
     ({"zero_optimization": {"stage": 3}}, "stage=3 must be 2"),
     ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is not supported"),
     ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients is not supported"),
     ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "lets a NaN into the weights"),
     ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm=false lets a NaN into the weights"),
     ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads is not supported"),
     ({"data_types": {"grad_acum_dtype": "fp32"}}, "unknown key data_types.grad_acum_dtype"),
     ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "choose one")],
)
def test_settings_that_a_run_cannot_be_trusted_to(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ds_config(write(tmp_path, **keys))


def test_a_json_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zero2_bf15.json is not a file; ds_configs/ holds zero2_bf16.json"):
        load_ds_config("ds_configs/zero2_bf15.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_ds_config(str(tmp_path / "broken.json"))


def test_deepspeed_reads_the_settings_first(tmp_path: Path) -> None:
    from largescale.engine.deepspeed_engine import check_ds_config

    check_ds_config(final_ds_config(digits(), 2))
    with pytest.raises(ConfigError, match="does not take these settings(.|\n)*reduce_bucket_sise"):
        check_ds_config(load_ds_config(write(tmp_path, zero_optimization={"stage": 2, "reduce_bucket_sise": 1})))


@pytest.mark.parametrize(("content", "says"), [
    ("[]", r"must hold a JSON object \({...}\), not \[\]"),
    ("5", "must hold a JSON object"),
    ("null", "must hold a JSON object"),
    (b"\xff\xfe{", "is not valid JSON"),
    ("[" * 100_000, "is not valid JSON: it is nested too deeply"),
    ('{"zero_optimization": null}', "zero_optimization=null must be an object"),
    ('{"zero_optimization": []}', r"zero_optimization=\[\] must be an object"),
    ('{"zero_optimization": 2}', "zero_optimization=2 must be an object"),
    ('{"zero_optimization": {"stage": 2}, "bf16": true}', 'bf16=true must be an object, such as {"enabled": true}'),
    ('{"zero_optimization": {"stage": 2}, "fp16": []}', r"fp16=\[\] must be an object"),
    ('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": "false"}}', 'fp16.enabled="false" must be true or false, without quotes'),
    ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": "yes"}}', 'bf16.enabled="yes" must be true or false'),
    ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": 1}}', "bf16.enabled=1 must be true or false"),
    ('{"zero_optimization": {"stage": 2, "compute_grad_norm": "false"}}', 'compute_grad_norm="false" must be true or false'),
    ('{"zero_optimization": {"stage": 2}, "communication_data_type": "int8"}', 'communication_data_type="int8" must be fp32, fp16 or bf16'),
])
def test_a_file_of_another_kind(content: str | bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=says):
        load_ds_config(str(path))


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x" * 300, str(tmp_path)):
        with pytest.raises(ConfigError, match="is not a file; ds_configs/ holds"):
            load_ds_config(name)
    path = tmp_path / "ds.json"
    path.write_text("{}")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied; correct it, or name another"):
        load_ds_config(str(path))


def test_the_most_ranks_that_a_batch_can_be_split_over(capsys: pytest.CaptureFixture[str]) -> None:
    """As slurm/env.sh asks, of a preset with a batch of 256."""
    def most(available: int, *options: str) -> int:
        assert train.main(["dit_l2_imagenet256", *options, "--fit-ranks", str(available)]) == 0
        return int(capsys.readouterr().out)

    assert [most(n) for n in (1, 8, 16, 24, 32, 300)] == [1, 8, 16, 16, 32, 256]
    assert most(24, "--train.global-batch-size", "20") == 20
    assert most(24, "--train.micro-batch-size", "32") == 8  # 16 ranks have 16 images each
    assert train.main(["dit_l2_imagenet256", "--train.micro-batch-size", "3", "--fit-ranks", "4"]) == 2
    assert "try --train.micro-batch-size 2" in capsys.readouterr().err


def test_batch_layout() -> None:
    def layout(total: int, micro: int | None, world_size: int) -> tuple[int, int]:
        return batch_layout(Config("x", train=TrainConfig(global_batch_size=total, micro_batch_size=micro)), world_size)

    assert layout(256, None, 16) == (16, 1)
    assert layout(256, 4, 16) == (4, 4)
    with pytest.raises(ConfigError, match="start 2 or 4 ranks, or try --train.global-batch-size 258"):
        layout(256, None, 3)
    with pytest.raises(ConfigError, match="micro_batch_size.world_size=48.*try --train.micro-batch-size 2"):
        layout(256, 3, 16)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("model", "patch_size", 3), ("model", "num_heads", 7), ("model", "num_classes", 0), ("model", "class_dropout_prob", 1.0),
     ("curriculum", "patience", -1), ("curriculum", "interval", 0), ("curriculum", "n_clusters", 0),
     ("curriculum", "n_clusters", 2000), ("data", "prefetch", 0), ("optimizer", "lr", 0.0), ("optimizer", "ema_decay", 1.0),
     ("optimizer", "clip_grad_norm", -1.0), ("train", "steps", 0), ("train", "seed", -1), ("train", "threads", 0), ("checkpoint", "every", 0),
     ("checkpoint", "keep_last", 0), ("checkpoint", "keep_every", -1), ("telemetry", "log_every", 0),
     ("telemetry", "preview_steps", 1), ("telemetry", "preview_steps", 1001), ("telemetry", "preview_cfg_scale", -1.0),
     ("telemetry", "reference_images", 0), ("telemetry", "preview_images", 0),
     ("model", "class_dropout_prob", 0.0), ("optimizer", "betas", (0.9, 1.0)), ("optimizer", "eps", -1.0),
     ("optimizer", "weight_decay", -1.0), ("optimizer", "lr", float("inf")), ("train", "global_batch_size", 0),
     ("train", "micro_batch_size", 0), ("model", "depth", 0), ("model", "mlp_ratio", 0.0), ("optimizer", "lr", float("nan")),
     ("diffusion", "p_mean", float("inf")), ("telemetry", "preview_every", -1), ("telemetry", "reference_every", -1),
     ("anomaly", "spike_factor", 1.0), ("anomaly", "max_skips", -1), ("data", "augment", 1.5), ("train", "seed", 2**32)],
)
def test_values_that_cannot_be_right(section: str, field: str, value: Any) -> None:
    config = digits()
    validate(config, 2)
    wrong = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: value})})
    with pytest.raises(ConfigError, match=field if field != "class_dropout_prob" else "class_dropout_prob|preview_cfg_scale"):
        validate(wrong, 2)
