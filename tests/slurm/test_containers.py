"""CONTAINER=: the command lines that Apptainer and pyxis get, and training in containers in a real Slurm."""

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT
from tests.slurm import test_jobs
from tests.slurm.conftest import Lab, Submit, apt_install

# Takes the place of a program: notes what it is called with, and runs what comes after its own arguments.
NOTE = '#!/bin/bash\necho "${0##*/} $*${PYTHONPATH+ PYTHONPATH}" >> "$NOTES"\n'
APPTAINER = NOTE + 'while [[ $1 != *.sif && $1 != */sandbox ]]; do shift; done\nshift\nexec "$@"\n'
CH_RUN = NOTE + 'while [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n'
SRUN = NOTE + 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
PYXIS = '#!/bin/bash\n[ "$1" != --help ] || { echo "      --container-image=IMAGE"; exit; }\n' + SRUN
SCONTROL = NOTE + """[ "$2" != job ] || cat <<END
JobId=7 JobName=NAME
   UserId=u(1) GroupId=g(1) MCS_label=N/A
   JobState=STATE Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   Comment=COMMENT
END
"""


def scontrol(state: str, said: str = "x") -> str:
    """`said`: the job's name and comment."""
    return SCONTROL.replace("STATE", state).replace("NAME", said).replace("COMMENT", said)


PYTHON = NOTE + """case "$*" in
    *--fit-ranks*) echo "${!#}" ;;
    "-m largescale.train "*) exit 75 ;;
esac
"""


@dataclass
class Shell:
    """The training script in a shell that takes itself for a job, with nothing on PATH but the named programs."""

    folder: Path

    def __call__(self, container: Path | str, restarts: int = 0, stage: str = "", **programs: str) -> tuple[int, str, list[str]]:
        """(status, what was said, the calls of programs)."""
        bin, notes = self.folder / "bin", self.folder / "notes"
        bin.mkdir()
        notes.touch()
        for tool in ("bash", "cat", "head", "id", "realpath"):
            (bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool}"))
        for name, text in {"srun": SRUN, "scontrol": scontrol("RUNNING Reason=None"), **programs}.items():
            (bin / name.replace("_", "-")).write_text(text)
            (bin / name.replace("_", "-")).chmod(0o755)
        env = {"PATH": str(bin), "NOTES": str(notes), "CONTAINER": str(container), "BIND": "/scratch,/datasets",
               "PYTHON": str(bin / "image-python"), "PYTHONPATH": "/another/python", "RUN": "R", "DATA": "D", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x",
               "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_DIR": str(ROOT)}
        if stage:
            env["STAGE"] = stage
        if restarts:
            env["SLURM_RESTART_COUNT"] = str(restarts)
        done = subprocess.run(["bash", str(ROOT / "slurm/dit_l2_2m.sh"), "--train.steps", "9"], env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        return done.returncode, done.stdout, notes.read_text().splitlines()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def image(shell: Shell, name: str) -> Path:
    path = shell.folder / name
    if path.suffix:
        path.touch()
    else:
        (path / (".singularity.d" if name == "sandbox" else "usr")).mkdir(parents=True)
    return path


@pytest.mark.parametrize(("name", "programs", "inside", "options"), [
    ("largescale.sif", {"apptainer": APPTAINER}, "apptainer exec --nv --bind {folders} --pwd {root} {image} ", ""),
    ("sandbox", {"apptainer": APPTAINER, "ch_run": CH_RUN}, "apptainer exec --nv --bind {folders} --pwd {root} {image} ", ""),
    ("unpacked", {"apptainer": APPTAINER, "ch_run": CH_RUN},
     "ch-run --bind={root} --bind=/scratch --bind=/datasets --cd={root} {image} -- ", ""),
    ("largescale.sqsh", {"srun": PYXIS}, "",
     "--container-image={image} --container-mounts={folders} --container-workdir={root} "),
    ("docker://ghcr.io#me/largescale", {"srun": PYXIS}, "",
     "--container-image=ghcr.io#me/largescale --container-mounts={folders} --container-workdir={root} "),
])
def test_command_lines(name: str, programs: dict[str, str], inside: str, options: str, shell: Shell) -> None:
    """The ranks run in the container, and so does what decides about another start, with the status of the ranks."""
    container = name if name.startswith("docker:") else image(shell, name)
    status, said, calls = shell(container, image_python=PYTHON, **programs)
    values = {"image": container, "root": ROOT, "folders": f"{ROOT},/scratch,/datasets"}
    inside, options = inside.format(**values), options.format(**values)
    python = inside + str(shell.folder / "bin/image-python")
    alone = f"srun --overlap --nodes=1 --ntasks=1 {options}" if options else ""
    assert status == 75, said
    assert calls[0] == f"{alone}{python} -c "  # before anything else
    assert any(call.startswith(f"{alone}{python} -m largescale.train ") and call.endswith(" --fit-ranks 1") for call in calls)
    assert (f"srun --cpus-per-task=1 {options}--kill-on-bad-exit=0 --wait=120 {python} -m largescale.train "
            "dit_l2_imagenet256 --output R --data.path D --train.steps 9") in calls
    assert f"{alone}{python} -m largescale.requeue R --status 75 --max-restarts 5" in calls
    assert calls[-1] == "scontrol requeue 7"
    assert not any("PYTHONPATH" in call for call in calls)


@pytest.mark.parametrize(("name", "programs", "said"), [
    ("missing.sif", {"apptainer": APPTAINER}, "error: no CONTAINER={image} in {root}; it is a .sif, a .sqsh, a folder, or docker://IMAGE"),
    ("image.tar", {"apptainer": APPTAINER}, "error: CONTAINER={image} is neither a .sif, a .sqsh, a folder, nor docker://IMAGE"),
    ("largescale.sif", {}, "error: CONTAINER={image} needs apptainer, which is not on PATH; load its module before sbatch"),
    ("unpacked", {}, "error: CONTAINER={image} needs ch-run, which is not on PATH; load its module before sbatch"),
    ("largescale.sqsh", {}, "error: CONTAINER={image} needs pyxis, which is not installed here"),
    ("largescale.sif", {"apptainer": APPTAINER}, "error: {python} does not start in CONTAINER={image}, see above"),
])
def test_cannot_start(name: str, programs: dict[str, str], said: str, shell: Shell) -> None:
    """Nothing is started, and nothing comes back."""
    container = shell.folder / name if name.startswith("missing") else image(shell, name)
    status, text, calls = shell(container, **programs)
    assert status == 2
    assert text.splitlines()[-1] == said.format(image=container, root=ROOT, python=shell.folder / "bin/image-python")
    assert not [call for call in calls if "-m largescale." in call or "scontrol requeue" in call]


def test_a_later_start_that_fails(shell: Shell) -> None:
    """It has started before, so no person is asked: what decides about another start is."""
    container = image(shell, "largescale.sif")
    status, said, calls = shell(container, restarts=1, apptainer=APPTAINER, image_python=NOTE + "exit 9\n")
    assert status == 9 and "does not start in CONTAINER" not in said
    assert calls[-1].endswith("-m largescale.requeue R --status 9 --max-restarts 5")


def test_a_folder_on_the_nodes_own_disks(shell: Shell) -> None:
    status, said, calls = shell(image(shell, "largescale.sif"), stage="/local/my data", apptainer=APPTAINER, image_python=PYTHON)
    assert status == 75, said
    trained = [call for call in calls if " -m largescale.train " in call]
    ends = ["--train.steps 9 --data.stage /local/my data --fit-ranks 1", "--train.steps 9 --data.stage /local/my data"]
    assert all(call.endswith(tuple(ends)) for call in trained) and len({call.endswith(ends[1]) for call in trained}) == 2


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An image for Charliecloud with nothing in it but places to mount what is this machine's; and what to mount."""
    apt_install("Charliecloud", ("ch-run",), ("charliecloud-runtime",))
    image = tmp_path_factory.mktemp("image")
    binds = ["/usr", *{sys.prefix, sys.base_prefix}, str(tmp_path_factory.getbasetemp())]
    for folder in ("dev", "etc", "home", "proc", "root", "sys", "tmp"):
        (image / folder).mkdir()
    for file in ("group", "hosts", "passwd", "resolv.conf"):
        (image / "etc" / file).touch()
    for link in Path("/").glob("*"):
        if link.is_symlink():
            (image / link.name).symlink_to(link.readlink())  # /bin and /lib, into /usr
    for folder in (*binds, str(ROOT)):
        (image / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
    may = subprocess.run(["ch-run", *(f"--bind={bind}" for bind in binds), str(image), "--", sys.executable, "-c", ""],
                         env={"USER": "root", **os.environ}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if may.returncode:
        pytest.skip(f"Charliecloud starts nothing here: {may.stdout.strip()[-300:]}")
    return image, ",".join(binds)


@pytest.fixture(params=["charliecloud", pytest.param("pyxis", marks=pytest.mark.slow)])
def contained(request: pytest.FixtureRequest, training: Submit, tmp_path: Path) -> Submit:
    """The training script in a container. In place of pyxis srun without its options: what is left are Slurm's steps."""
    if request.param == "charliecloud":
        container, binds = request.getfixturevalue("unpacked")
        settings = {"CONTAINER": container, "BIND": binds}
    else:
        (tmp_path / "image.sqsh").touch()
        (tmp_path / "bin").mkdir()
        real = shutil.which("srun")
        (tmp_path / "bin/srun").write_text(
            PYXIS.removesuffix('while [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
            + f'for word; do [[ $word == --container-* ]] || words+=("$word"); done\nexec {real} "${{words[@]}}"\n')
        (tmp_path / "bin/srun").chmod(0o755)
        settings = {"CONTAINER": tmp_path / "image.sqsh", "NOTES": tmp_path / "notes",
                    "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def start(*options: Any, **more: Any) -> Any:
        return training(*options, **{**settings, **more})

    return start


@pytest.mark.parametrize("test", [
    test_jobs.test_preempted,
    pytest.param(test_jobs.test_preempted_without_grace, marks=pytest.mark.slow),
    pytest.param(test_jobs.test_asked_to_save_and_restart, marks=pytest.mark.slow),
    pytest.param(test_jobs.test_time_limit, marks=pytest.mark.slow),
    pytest.param(test_jobs.test_over_the_time_limit, marks=pytest.mark.slow),
    pytest.param(test_jobs.test_crash_loop, marks=pytest.mark.slow),
])
def test_in_a_container(test: Callable[..., None], contained: Submit, lab: Lab, truth: Path, tmp_path: Path) -> None:
    """As without one: the same run comes out, to the bit."""
    given = {"training": contained, "lab": lab, "truth": truth, "tmp_path": tmp_path}
    test(**{name: given[name] for name in inspect.signature(test).parameters})


@pytest.mark.parametrize(("state", "said", "comes_back"), [
    ("RUNNING Reason=None", " JobState=COMPLETING Reason=None Requeue=1 Restarts=0 ", True),
    ("COMPLETING Reason=None", " JobState=RUNNING Reason=TimeLimit Restarts=1 ", False),
    ("COMPLETING Reason=TimeLimit", " JobState=COMPLETING Reason=None Requeue=1 Restarts=1 ", True),
])
def test_a_comment_in_slurms_words(state: str, said: str, comes_back: bool, shell: Shell) -> None:
    """Whether a job was cancelled is read where Slurm says it, not in what its user wrote."""
    status, text, calls = shell(image(shell, "largescale.sif"), image_python=PYTHON, apptainer=APPTAINER, scontrol=scontrol(state, said))
    assert status == 75 and ("scontrol requeue 7" in calls) == comes_back, text
    assert ("was cancelled" in text) != comes_back
