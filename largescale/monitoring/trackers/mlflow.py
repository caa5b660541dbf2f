"""MLflow. The server and what it asks for are mlflow's own variables (MLFLOW_TRACKING_URI, ...), which
nothing here prints."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from largescale.config.serialise import flatten
from largescale.monitoring.trackers.service import Ended, Moment, RunInfo

# The tag by which a run is found again.
ID = "largescale.id"
# MLflow's limits: parameters of one call, characters of a value in all versions.
PARAMS_AT_ONCE = 100
VALUE_LENGTH = 500

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Mlflow:
    """One run for all starts, found by a tag.

    MLflow keeps all values of a metric at a step, with their times: the newest counts. The metric
    `branch` shows where a run went back.
    """

    # A call returns when the server has what was sent.
    settle_s = 0.0

    def __init__(self) -> None:
        # The queue outlasts an outage: a call need not.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # The address may hold a password.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient()
        self._id = ""

    def start(self, run: RunInfo) -> str | None:
        client = self._client
        experiment = self._experiment()
        found = client.search_runs(
            [experiment], filter_string=f"tags.`{ID}` = '{run.id}'", max_results=1
        )
        before: dict[str, str] = {}
        if found:
            self._id = found[0].info.run_id
            before = found[0].data.params
            client.update_run(self._id, status="RUNNING")
        else:
            made = client.create_run(experiment, run_name=run.name, tags={ID: run.id})
            self._id = made.info.run_id
        self._log_config(run.config, before)
        return None

    def _experiment(self) -> str:
        """The id of the experiment that mlflow's variables name, or of `largescale`."""
        if "MLFLOW_EXPERIMENT_ID" in os.environ:
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "largescale")
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def _log_config(self, config: dict[str, Any], before: dict[str, str]) -> None:
        """Log the settings as parameters; one that has changed since, which a parameter cannot, as a
        tag."""
        from mlflow.entities import Param, RunTag

        new, tags = [], []
        for key, value in flatten(config):
            text = str(value)[:VALUE_LENGTH]
            if key not in before:
                new.append(Param(key, text))
            elif before[key] != text:
                tags.append(RunTag(f"changed.{key}", text))
        for first in range(0, len(new), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=new[first : first + PARAMS_AT_ONCE])
        if tags:
            self._client.log_batch(self._id, tags=tags)
        self._client.log_dict(self._id, config, "config.json")

    def log(self, at: Moment, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        time_ms = int(1000 * at.unix_s)
        values = {**metrics, "branch": at.branch}
        sent = [Metric(key, float(value), time_ms, at.step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=sent)

    def event(self, at: Moment, kind: str, text: str) -> None:
        row = {"step": at.step, "branch": at.branch, "event": kind, "text": text}
        name = f"events/step_{at.step:08d}_{kind.replace(' ', '_')}.json"
        self._client.log_text(self._id, json.dumps(row), name)

    def image(self, at: Moment, name: str, image: np.ndarray) -> None:
        time_ms = int(1000 * at.unix_s)
        self._client.log_image(self._id, image, key=name, step=at.step, timestamp=time_ms)

    def finish(self, ended: Ended, summary: Mapping[str, Any]) -> None:
        self._client.log_dict(self._id, dict(summary), "summary.json")
        self._client.set_terminated(self._id, status=STATUS[ended])
