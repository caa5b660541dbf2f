"""W&B and MLflow themselves, through three kills, a change of ranks and a roll-back: they have what metrics.jsonl has."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from largescale.monitoring.telemetry import read_metrics
from tests.ranks import ROOT, Done, free_port, ranks_of

KEY = "0123456789abcdef0123456789abcdef01234567"
Row = tuple[int, int, dict[str, Any]]  # branch, step, what was logged

# A program in a process that is forked, which finds more packages.
START = "import runpy, sys; sys.path.append({packages!r}); sys.argv[0] = {program!r}; runpy.run_path({program!r}, run_name='__main__')"


def through_everything(run: Path, data: Path, tracker: str, more_path: str = "") -> Done:
    """Killed at step 4, before the service has anything; at 12 and 16, when it has all; from step 10 on two ranks. The inputs of
    step 19 are bad: back to step 15. What the last start said."""
    code = START.format(packages=more_path, program="tests/dist/driver.py")
    run_with = ["debug", "--data.path", data, "--output", run, "--train.steps", 24, "--curriculum.patience", 0, "--anomaly.not-finite", "skip",
                "--telemetry.trackers", tracker, "--telemetry.reference-every", 0, "--telemetry.preview-every", 8, "--telemetry.preview-steps", 3]
    faults = [(1, "--die-after", 4), (1, "--die-after", 12, "--sent"), (2, "--die-after", 16, "--sent"), (2, "--bad-loss", 18, 1)]
    for ranks, *fault in faults:
        done = ranks_of("-c", code, *fault, "--", *run_with, ranks=ranks, timeout_s=300)
        killed = fault[0] == "--die-after"
        assert [each.returncode for each in done] == [-9 if killed else 0] * ranks, done[0].stderr
    return done


def check(run: Path, rows: list[Row]) -> None:
    """`rows` in the order in which the service got them."""
    wanted = read_metrics(run)
    # What counts is the newest, which is also that of the highest branch.
    newest: dict[tuple[int, str], Any] = {}
    seen: set[tuple[int, int, str]] = set()
    for branch, step, logged in rows:
        for key, value in logged.items():
            newest[step, key] = value
            if key == "loss":  # not twice, but in another branch
                assert (branch, step, key) not in seen
                seen.add((branch, step, key))
    losses = {step: value for (step, key), value in newest.items() if key == "loss"}
    # Steps that were taken again on two ranks differ in rounding, and are not sent again.
    assert losses == pytest.approx({row["step"]: row["loss"] for row in wanted if "loss" in row}, rel=1e-4)
    assert {step: value for step, value in losses.items() if step > 16} == {row["step"]: row["loss"] for row in wanted if row["step"] > 16 and "loss" in row}
    assert sorted(losses) == [*range(1, 25)] and {branch for branch, *_ in rows} == {0, 1}
    assert {step for branch, step, key in seen if branch} == {*range(16, 25)}
    for kind in ("transition", "not finite"):
        texts = {row["step"]: row["text"] for row in wanted if row.get("event") == kind}
        assert texts and {step: newest[step, f"event/{kind}"] for step in texts} == texts
    assert {"goodput/training", "checkpoint/step"} <= {key for _, key in newest}


@pytest.fixture
def failing_server() -> Iterator[int]:
    """The port of a server that answers 500 to everything."""
    class Failing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(500)

        do_GET = do_PUT = do_POST

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


# ---- wandb


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, which is a log as LevelDB's: blocks of 32 KiB; checksum, length and kind before each part.
    wandb's own reader is in its binary, without a way to call it."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    position, record = 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position:position + 7])
        record += data[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@pytest.fixture(scope="module")
def wandb_run(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """HOME cannot be written to; a key is set."""
    pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    run = tmp_path_factory.mktemp("wandb") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("HOME", "/dev/null/home")
        said = through_everything(run, blobs, "wandb")[0].stderr
    assert "wandb sync" in said and "lost" not in said and "fails" not in said
    yield run


def test_wandb_has_what_metrics_has(wandb_run: Path) -> None:
    files = sorted(wandb_run.glob("trackers/wandb/offline-run-*/*.wandb"))
    assert len(files) in (3, 4)  # the first start may be killed before wandb makes one
    rows: list[Row] = []
    counters, ids, pictures, ended = [], set(), 0, []
    for path in files:
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                assert any(item.key == "model" for item in record.run.config.update)
            elif kind == "exit":
                ended.append(record.exit.exit_code)
            elif kind == "history":
                row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                counters.append(row["_step"])
                rows.append((row["branch"], row["step"], row))
                pictures += "samples.path" in row
    check(wandb_run, rows)
    # wandb leaves out rows whose own counter goes back.
    assert counters == sorted(set(counters)) and len(ids) == 1 and ended == [0]
    assert pictures == 4 and len([*wandb_run.glob("trackers/wandb/offline-run-*/files/media/images/*.png")]) == 4  # step 16 in both branches


def test_no_key_is_in_the_run_directory(wandb_run: Path) -> None:
    files = [path for path in wandb_run.rglob("*") if path.is_file()]
    assert len(files) > 20 and [path for path in files if KEY.encode() in path.read_bytes()] == []


WANDB_ALONE = """
import sys, time
from pathlib import Path
from largescale.monitoring.trackers import wandb
from largescale.monitoring.trackers.service import Moment, RunInfo
wandb.INIT_S = 5
service = wandb.Wandb()
print(service.start(RunInfo("id", "name", {"model": {"depth": 2}}, Path(sys.argv[1]))))
service.log(Moment(1, 0, 0, time.time()), {"loss": 0.5})
service.finish("stopped", {"step": 1})
"""


@pytest.mark.parametrize("key", [KEY, ""])
def test_wandb_without_its_server_writes_a_file(key: str, failing_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers 500; or there is no key, and nobody is asked for one."""
    pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{failing_server}")
    monkeypatch.setenv("HOME", "/dev/null/home")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    (done,) = ranks_of("-c", WANDB_ALONE, tmp_path, ranks=1, timeout_s=200)
    assert done.returncode == 0, done.stderr
    why = "wandb cannot be reached" if key else "wandb has no API key"
    assert done.stdout.startswith(f"{why}") and f"wandb sync {tmp_path}/wandb/offline-*" in done.stdout
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    kinds = [record.WhichOneof("record_type") for record in wandb_records(file)]
    assert kinds.count("history") == 1 and "preempting" in kinds and kinds[-1] == "exit"


# ---- mlflow


@pytest.fixture(scope="module")
def mlflow_packages() -> Path:
    """Where mlflow is, with what a server needs: uv makes an environment for it, beside this one, whose versions it would change."""
    pytest.importorskip("uv", reason="pip install -e '.[dev]' carries uv")
    uv = [sys.executable, "-m", "uv", "run", "--quiet", "--no-project", "--python", sys.executable, "--with", "mlflow>=3"]
    said = ""
    for more in (["--offline"], []):  # in uv's cache, or else on PyPI
        env = {**os.environ, "UV_HTTP_TIMEOUT": "10", "UV_HTTP_RETRIES": "0"}
        found = subprocess.run([*uv, *more, "python", "-c", "import importlib.util as u; print(u.find_spec('mlflow').origin)"], cwd=ROOT, env=env,
                               text=True, capture_output=True, timeout=600)
        if found.returncode == 0:
            return Path(found.stdout.strip()).parents[1]
        said = found.stderr
    pytest.skip(f"mlflow is neither in uv's cache nor to be had from PyPI: {' '.join(said.split())[-200:]}")


@pytest.fixture(scope="module")
def mlflow_server(mlflow_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import requests

    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    env = {**os.environ, "PYTHONPATH": str(mlflow_packages), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/db.sqlite", "--artifacts-destination",
               folder / "artifacts", "--host", "127.0.0.1", "--port", port, "--workers", 1]
    with (folder / "log").open("w") as log, subprocess.Popen([*map(str, command)], env=env, cwd=folder, stdout=log, stderr=log) as server:
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + 240
            while True:
                with contextlib.suppress(requests.RequestException):
                    if requests.get(f"{address}/health", timeout=5).ok:
                        break
                assert server.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()


@pytest.mark.slow  # MLflow is 0.6 GB, and its server takes half a minute to start
def test_mlflow_has_what_metrics_has(mlflow_server: str, mlflow_packages: Path, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("HOME", "/dev/null/home")
    said = through_everything(tmp_path / "run", blobs, "mlflow", str(mlflow_packages))[0].stderr
    assert "lost" not in said and "fails" not in said and mlflow_server not in said
    # Read by its client, in a process of its own: its packages are of other versions than ours.
    read = subprocess.run([sys.executable, "-c", READ], env={**os.environ, "PYTHONPATH": str(mlflow_packages)}, text=True, capture_output=True)
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout)
    assert len(found) == 1 and found[0]["status"] == "FINISHED" and found[0]["params"]["train.steps"] == "24"
    rows: list[tuple[float, Row]] = []
    branches = {(time_ms, step): int(value) for step, value, time_ms in found[0]["metrics"]["branch"]}
    for key, history in found[0]["metrics"].items():
        for step, value, time_ms in history:
            rows.append((time_ms, (branches[time_ms, step], step, {key: value})))
    rows += [(0, (event["branch"], event["step"], {f"event/{event['event']}": event["text"]})) for event in found[0]["events"]]
    check(tmp_path / "run", [row for _, row in sorted(rows, key=lambda row: row[0])])
    assert sum(name.endswith(".png") for name in found[0]["images"]) == 4 and found[0]["summary"]["step"] == 24


@pytest.mark.slow  # MLflow is 0.6 GB, and its server takes half a minute to start
def test_mlflow_whose_server_fails(failing_server: int, mlflow_packages: Path, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:opensesame@127.0.0.1:{failing_server}")
    code = START.format(packages=str(mlflow_packages), program="largescale/train.py")
    (done,) = ranks_of("-c", code, "debug", "--data.path", blobs, "--output", tmp_path / "run", "--telemetry.trackers", "mlflow",
                       "--train.timeout-s", 20, ranks=1, timeout_s=200)
    assert done.returncode == 0, done.stderr
    assert "mlflow did not get" in done.stderr and "metrics.jsonl has them all" in done.stderr
    assert "opensesame" not in done.stderr + done.stdout
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"opensesame" in path.read_bytes()] == []


READ = """
import json
from mlflow.tracking import MlflowClient
from mlflow.artifacts import load_dict, load_text
client = MlflowClient()
runs = []
for run in client.search_runs([client.get_experiment_by_name("largescale").experiment_id]):
    name = run.info.run_id
    where = run.info.artifact_uri
    histories = {key: client.get_metric_history(name, key) for key in ("branch", "loss", "goodput/training", "checkpoint/step")}
    events = [json.loads(load_text(f"{where}/{file.path}")) for file in client.list_artifacts(name, "events")]
    runs.append({"status": run.info.status, "params": run.data.params, "events": events,
                 "images": [file.path for file in client.list_artifacts(name, "images")], "summary": load_dict(f"{where}/summary.json"),
                 "metrics": {key: [(m.step, m.value, m.timestamp) for m in history] for key, history in histories.items()}})
print(json.dumps(runs))
"""
