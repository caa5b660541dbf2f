"""python3 install.py EXTRA ...: this project and the pinned packages of these extras, in .venv.
`make` calls it.

Needs Python 3.11 to 3.14 and a network; nothing is compiled. Packages come from PyPI, or from the
index-url that pip is configured for, through its proxy. uv installs them: the one on the PATH, or
else one that pip puts into .venv first. Every file is checked against the hashes in
requirements.lock. Run again, it mends what is half made, and does nothing where all is there.
"""
# No syntax newer than Python 3.6's, so that an old Python prints the message below and not a
# SyntaxError.

import argparse
import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON, RECORD = VENV / "bin/python", VENV / "installed.json"
PROJECT, LOCK = ROOT / "pyproject.toml", ROOT / "requirements.lock"
EXTRAS = (
    "train",
    "demo",
    "demo-text",
    "hub",
    "prep",
    "eval",
    "examples",
    "wandb",
    "ray",
    "docs",
    "dev",
)
# Not pinned: mlflow asks for older versions of what the others are pinned to.
NOT_LOCKED = ("mlflow",)
OLDEST, NEWEST = (3, 11), (3, 14)  # requirements.lock has files for these
OLDEST_UV = (0, 11)  # older ones do not know UV_SYSTEM_CERTS
DISK_BYTES = (
    7 * 10**9
)  # the environment is 6.1 GB, and what is downloaded lies beside it for a while


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "extras", nargs="+", metavar="EXTRA", choices=EXTRAS, help=", ".join(EXTRAS)
    )
    extras = parser.parse_args().extras
    check_python()
    with open(__file__) as this_file:
        try:
            wait_for_others(this_file)
            install(extras)
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command goes on from here")


def wait_for_others(file: "IO[str]") -> None:
    """`make demo` and `make test` may be typed at the same time."""
    with contextlib.suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another installation into .venv is running: waiting for its end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)


def check_python() -> None:
    version = sys.version_info[:2]
    if OLDEST <= version <= NEWEST:
        return
    names = [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
    found = [name for name in names if shutil.which(name)] or ["/path/to/python3.12"]
    sys.exit(
        f"error: largescale needs Python {dotted(OLDEST)} to {dotted(NEWEST)}, {sys.executable} is "
        f"{dotted(version)}; try make PYTHON={found[0]}"
    )


def install(extras: "list[str]") -> None:
    """Make .venv where it is missing or broken, and install the extras that are not in it yet."""
    uv = uv_on_path()
    version = version_in_venv(pip_needed=uv is None) or make_venv(uv)
    state = {
        "inputs": hashlib.sha256(PROJECT.read_bytes() + LOCK.read_bytes()).hexdigest(),
        "python": version,
    }
    done = installed(state)
    if set(extras) <= done:
        return
    print("installing into .venv: up to 3 GB to download, which takes most of the time", flush=True)
    with contextlib.suppress(FileNotFoundError):
        RECORD.unlink()  # until all is there again
    uv = uv or install_uv()
    chosen = [word for extra in extras for word in ("--extra", extra)]
    run_uv(
        uv, "--require-hashes", "--constraints", str(LOCK), "--requirements", str(PROJECT), *chosen
    )
    run_uv(uv, "--no-deps", "--editable", str(ROOT))  # apart, since what can be edited has no hash
    RECORD.write_text(json.dumps(dict(state, extras=sorted(done.union(extras)))))


def installed(state: "dict[str, str]") -> "set[str]":
    """The extras that are in .venv, whole and in these versions."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(RECORD.read_text())
        if dict(record, **state) == record:
            return set(record["extras"])
    return set()


# ---- the environment


def version_in_venv(pip_needed: bool) -> "str | None":
    """Of the Python in .venv, such as 3.12. None where it does not work: half made, or its Python
    was removed, or replaced by another version, as a new release of the system does."""
    code = (
        "import pip; " if pip_needed else ""
    ) + "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        made_for = re.search(
            r"(?m)^version(?:_info)? *= *(\d+\.\d+)", (VENV / "pyvenv.cfg").read_text()
        )
        said = subprocess.run(
            [str(PYTHON), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    version = said.stdout.decode().strip()
    usable = OLDEST <= tuple(map(int, version.split("."))) <= NEWEST
    return version if usable and made_for and made_for.group(1) == version else None


def make_venv(uv: "str | None") -> str:
    """Returns the version of its Python."""
    free = shutil.disk_usage(str(ROOT)).free
    if free < DISK_BYTES:
        sys.exit(
            f"error: {ROOT} has {free / 1e9:.1f} GB free, the packages take {DISK_BYTES / 1e9:.0f} "
            "GB; make room"
        )
    if importlib.util.find_spec("ensurepip"):
        run(sys.executable, "-m", "venv", "--clear", str(VENV), env=environment())
    elif uv:
        run(
            uv,
            "venv",
            "--quiet",
            "--clear",
            "--python",
            sys.executable,
            str(VENV),
            env=environment(),
        )
    else:
        sys.exit(
            f"error: {sys.executable} has no module ensurepip, which .venv is made with; on Debian "
            f"and Ubuntu: apt install python{dotted(sys.version_info[:2])}-venv"
        )
    version = version_in_venv(pip_needed=uv is None)
    if version is None:
        sys.exit(
            f"error: {sys.executable} made a .venv that does not work; try make "
            "PYTHON=/path/to/another/python3"
        )
    return version


def environment() -> "dict[str, str]":
    """For uv and pip. What the user has set stays, but for paths to other packages and other places
    to install to."""
    elsewhere = (
        "PYTHONPATH",
        "PYTHONHOME",
        "PIP_USER",
        "PIP_TARGET",
        "PIP_PREFIX",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
    )
    env = {name: value for name, value in os.environ.items() if name not in elsewhere}
    env.setdefault("UV_HTTP_TIMEOUT", "120")  # slow networks; a download that is cut is tried again
    env.setdefault("UV_HTTP_RETRIES", "8")
    certificates = ssl.get_default_verify_paths()
    if certificates.cafile or certificates.capath:
        env.setdefault("UV_SYSTEM_CERTS", "1")  # with a company's own
    return env


# ---- uv


def uv_on_path() -> "str | None":
    """One that runs here, is new enough, and is none of .venv's, which may be made anew."""
    uv = shutil.which("uv")
    if uv is None or VENV in Path(uv).parents:
        return None
    try:
        said = subprocess.run([uv, "--version"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:  # another machine's, in a home that both have
        return None
    version = re.search(r"(\d+)\.(\d+)", said.stdout.decode())
    return uv if version and tuple(map(int, version.groups())) >= OLDEST_UV else None


def install_uv() -> str:
    """In its pinned version, into .venv."""
    requirements = VENV / "uv.txt"  # pip takes hashes from a requirements file only
    requirements.write_text("".join(re.findall(r"(?m)^uv==(?:.*\\\n)+.*\n", LOCK.read_text())))
    run(
        str(PYTHON),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--require-hashes",
        "-r",
        str(requirements),
        env=environment(),
    )
    return str(VENV / "bin/uv")


def run_uv(uv: str, *args: str) -> None:
    """uv pip install."""
    env = environment()
    env.update(dict(pip_settings(env), **env))
    cache = env.get("UV_CACHE_DIR") or os.path.join(
        env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "uv"
    )
    if not ("UV_CACHE_DIR" in env or is_beside(Path(cache))):
        env["UV_CACHE_DIR"] = str(VENV / "cache")
    run(
        uv,
        "pip",
        "install",
        "--python",
        str(PYTHON),
        "--build-constraints",
        str(LOCK),
        *args,
        env=env,
    )


def pip_settings(env: "dict[str, str]") -> "dict[str, str]":
    """A mirror, its certificate and a proxy, as variables of uv, which does not read pip's
    settings."""
    said = subprocess.run(
        [str(PYTHON), "-m", "pip", "config", "list"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    settings = {}
    for section in ("global", "install", ":env:"):  # the last of them counts
        for key, value in re.findall(rf"(?m)^{section}\.([a-z-]+)=(.*)$", said.stdout.decode()):
            settings[key] = " ".join(ast.literal_eval(value).split())
    names = {
        "UV_DEFAULT_INDEX": "index-url",
        "UV_INSECURE_HOST": "trusted-host",
        "SSL_CERT_FILE": "cert",
        "HTTP_PROXY": "proxy",
        "HTTPS_PROXY": "proxy",
    }
    return {name: settings[key] for name, key in names.items() if settings.get(key)}


def is_beside(cache: Path) -> bool:
    """Whether files can be linked from there into .venv. In a home on another disk they would be
    there twice, and a home may have a quota, or be read-only."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(str(cache), os.W_OK) and cache.stat().st_dev == VENV.stat().st_dev


# ---- what both need


def run(*command: str, env: "dict[str, str]") -> None:
    if subprocess.run(command, env=env, cwd=str(ROOT)).returncode:  # uv reads pyproject.toml there
        sys.exit("error: the installation stopped, see above; the same command goes on from here")


def dotted(version: "tuple[int, ...]") -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    main()
