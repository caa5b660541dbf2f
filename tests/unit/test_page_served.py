"""The page on a run, served, and in a browser."""

import contextlib
import html
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from largescale import status
from largescale.errors import ConfigError
from largescale.monitoring.run_log import LogReader
from largescale.page import document
from largescale.page.sections import RunView
from largescale.page.series import Series
from largescale.page.server import Server
from tests.unit import test_status as made_up
from tests.unit.pages import page
from tests.unit.test_requeue import NO_TORCH, ROOT
from tests.unit.test_status import log, row

now = made_up.now
small_run = made_up.run
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NEEDS_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, as by: apt-get install chromium")


# ---- served


@pytest.fixture
def serve() -> Iterator[Any]:
    servers = []

    def start(make: Any, fresh_s: float = 0.0) -> Server:
        server = Server(make, 0, fresh_s)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server: Server, path: str = "/", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_a_run_that_changes_while_it_is_served(small_run: Path, tmp_path: Path, serve: Any) -> None:
    watched = status.Watched((small_run,))
    server = serve(lambda: status.followed(watched))
    code, made = get(server)
    assert code == 200 and "step 47 of 400" in made and "connect-src 'self'" in made and made.count("<script") == 1
    with (small_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(50)) + '\n{"step": 51, "lo')
    assert "step 50 of 400" in get(server)[1]
    moved = small_run.rename(tmp_path / "moved")
    code, said = get(server)
    assert code == 503 and "does not exist" in said and 'http-equiv="refresh"' in said
    moved.rename(small_run)
    assert get(server)[0] == 200


def test_a_run_that_is_removed_while_it_is_read(small_run: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = status.Watched((small_run,))
    server = serve(lambda: status.followed(watched))
    read = status.facts

    def removing(*args: Any) -> Any:
        found = read(*args)
        shutil.rmtree(small_run)
        return found

    monkeypatch.setattr(status, "facts", removing)
    assert get(server)[0] == 200
    assert get(server)[0] == 503


def test_only_this_machine_and_only_the_page(serve: Any) -> None:
    made = []
    server = serve(lambda: made.append(1) or "page", fresh_s=60.0)
    assert get(server) == (200, "page") and get(server, "/?x", "localhost:1") == (200, "page") and made == [1]
    assert get(server, host="127.0.0.1")[0] == 200  # port 80, which a browser leaves out
    assert get(server, "/metrics.jsonl")[0] == 404 and get(server, host="evil.example:80")[0] == 403
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(ConfigError, match=f"port={server.server_port} cannot be served on: .*; give another --port"):
        Server(lambda: "", server.server_port, 0.0)


def test_follow_until_it_is_interrupted(small_run: Path) -> None:
    code = NO_TORCH + "from largescale import status; sys.exit(status.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(small_run), "--follow", "--port", "0"]  # and so without torch
    # Where the tests run in the background, Ctrl-C is ignored, which a process inherits.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, **heard))
        stack.callback(process.kill)
        assert process.stdout
        address = re.match(r"http://127\.0\.0\.1:(\d+)/ shows ", process.stdout.readline())
        assert address
        connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert status.main([str(small_run / "none"), "--follow"]) == 2


# ---- in a browser


def browse(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'chromium'}",
               "--virtual-time-budget=2000", "--enable-logging=stderr", *args]
    return subprocess.run(command, text=True, capture_output=True, timeout=120, check=True)


@NEEDS_BROWSER
def test_in_light_and_dark(small_run: Path, tmp_path: Path) -> None:
    page(tmp_path, small_run)
    mean = []
    for scheme in (0, 1):
        picture = tmp_path / f"{scheme}.png"
        done = browse(tmp_path, "--window-size=1280,900", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}",
                      f"file://{tmp_path}/pages/page.html")
        assert "CONSOLE" not in done.stderr  # what the policy refuses, and other errors of the page
        with Image.open(picture) as image:
            mean.append(np.asarray(image.convert("L")).mean())
    assert mean[0] < 60 and mean[1] > 200


@NEEDS_BROWSER
def test_a_served_page_takes_its_own_place(small_run: Path, tmp_path: Path, serve: Any) -> None:
    made = []

    def make() -> str:
        made.append(1)
        found = Series()
        view = RunView("run", status.facts(small_run, False, LogReader(small_run, found.take)), found)
        return document.page([view], 1e9 + 86400 * len(made), 0.2)

    done = browse(tmp_path, "--dump-dom", serve(make).address)
    shown = re.search("made 2001-09-([0-9]+)", done.stdout)
    assert shown and int(shown[1]) > 10 and len(made) > 2  # the first one is of the 10th at most
    assert "No newer page" not in done.stdout.split("<script")[0] and "CONSOLE" not in done.stderr


@NEEDS_BROWSER
def test_on_a_phone(small_run: Path, tmp_path: Path) -> None:
    """Nothing but what scrolls by itself is wider than 390 pixels, and keys reach what is folded."""
    log(small_run, {"step": 46, "event": "spike", "text": "x" * 300})
    made = re.sub("<meta http-equiv[^>]*>", "", page(tmp_path, small_run, small_run))
    measure = "d=document.querySelector('iframe').contentDocument;s=[...d.querySelectorAll('summary,section>.scroll')];s.forEach(e=>e.focus());" \
              "document.title=[d.documentElement.scrollWidth,s.length>9&&s.at(-1)===d.activeElement].join()"
    (tmp_path / "phone.html").write_text(f'<iframe width=390 height=800 style="border:0" srcdoc="{html.escape(made)}"></iframe>'
                                         f"<script>onload=()=>{{{measure}}}</script>")
    done = browse(tmp_path, "--dump-dom", f"file://{tmp_path}/phone.html")
    assert re.findall("<title>(.*?)</title>", done.stdout)[-1] == "390,true", done.stdout[-2000:]
