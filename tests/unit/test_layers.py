"""Who may import whom (the table in docs/architecture.md): imports only go down, and two libraries have one door each."""

import ast
import graphlib
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Lowest first. A name is a module of largescale/ or a folder of it, and may import from those before it.
LAYERS = (
    "errors", "registry", "randomness", "condition", "noise_schedule", "power_ema", "host", "curriculum", "encoders", "config", "models",
    "diffusion", "data", "distributed", "checkpoint", "interop", "monitoring", "page", "engine", "planning", "training", "pipeline", "export",
    "convert", "ema", "status", "requeue", "train",
)
PROGRAMS = ("export", "convert", "ema", "status", "requeue", "train")  # which do not import each other
NO_TORCH = ("errors", "registry", "noise_schedule", "power_ema", "host", "curriculum", "config", "checkpoint.files", "monitoring.telemetry",
            "monitoring.run_record", "monitoring.run_facts", "monitoring.run_log", "monitoring.same_keys", "monitoring.run_words", "page", "status", "requeue", "train")  # at import; functions of some load it
EMPTY = {"largescale.checkpoint", "largescale.config", "largescale.data", "largescale.diffusion", "largescale.distributed", "largescale.encoders",
         "largescale.engine", "largescale.host", "largescale.interop", "largescale.models", "largescale.monitoring", "largescale.monitoring.trackers", "largescale.page", "largescale.planning", "largescale.training",
         "largescale", "eval", "eval.comparison", "eval.curves", "eval.difficulty_study", "eval.drawing", "eval.reproduction", "eval.scoring", "data_prep"}  # packages that import nothing
# ... but what names the extra that a missing package is in, which is set before a program's first line
MISSING = {"sys", "largescale", "largescale.host.extras", "largescale.host.extras.name_the_extra"}
ABOVE_THE_LIBRARY = ("data_prep", "eval")
WITHOUT_DEEPSPEED = LAYERS[: LAYERS.index("monitoring")]  # what packing and sampling may use


def layer(module: str) -> str:
    return module.removeprefix("largescale.").split(".")[0]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules(package: str) -> dict[str, Path]:
    paths = (ROOT / package).rglob("*.py")
    return {str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): p for p in paths}


def test_imports_only_go_down() -> None:
    library = modules("largescale")
    assert {layer(name) for name in library.keys() - {"largescale"}} == {*LAYERS}
    for name, path in library.items() - {("largescale", library["largescale"])}:
        for imported in imports(path) & library.keys() - EMPTY:
            down = LAYERS.index(layer(imported)) < LAYERS.index(layer(name)) and layer(imported) not in PROGRAMS
            assert down or layer(imported) == layer(name), f"{name} imports {imported}, which lies above it"


def test_no_import_goes_in_a_circle() -> None:
    """Not even one that is made inside a function."""
    everything = {**modules("largescale"), **modules("data_prep"), **modules("eval")}
    arrows = {name: imports(path) & everything.keys() - EMPTY - {name} for name, path in everything.items()}
    for package in (name for name, path in everything.items() if path.name == "__init__.py"):
        arrows[package] -= {name for name in everything if name.startswith(f"{package}.")}  # its own parts, handed on
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError


@pytest.mark.parametrize("package", ["largescale", *ABOVE_THE_LIBRARY])
def test_no_import_goes_in_a_circle_of_folders(package: str) -> None:
    """A folder, and a module beside it, is one node."""
    everything = modules(package)

    def node(name: str) -> str:
        return ".".join(name.split(".")[:2])

    arrows: dict[str, set[str]] = {node(name): set() for name in everything}
    for name, path in everything.items():
        arrows[node(name)] |= {node(other) for other in imports(path) & everything.keys() - EMPTY} - {node(name)}
    graphlib.TopologicalSorter(arrows).prepare()


def test_programs_use_the_library_below_the_engine() -> None:
    library = modules("largescale").keys() - EMPTY
    for package in ABOVE_THE_LIBRARY:
        for name, path in modules(package).items():
            for imported in imports(path) & library:
                allowed = layer(imported) in (*WITHOUT_DEEPSPEED, "page") or imported in ("largescale.monitoring.telemetry", "largescale.monitoring.run_record")
                assert allowed, f"{name} imports {imported}: packing and sampling run without DeepSpeed"
    for name, path in modules("largescale").items():
        above = {i for i in imports(path) if i.split(".")[0] in (*ABOVE_THE_LIBRARY, "tests")}
        assert not above, f"{name} imports {above}"


def test_empty_packages_are_empty() -> None:
    """But for `largescale.load`, a function that imports what it needs when it is called."""
    for name in EMPTY:
        allowed = MISSING if "." not in name else set()
        assert not imports(modules(name.split(".")[0])[name], top_level_only=name == "largescale") - allowed, name


def test_no_program_lies_beside_a_module_that_hides_pythons() -> None:
    """`python largescale/train.py` puts largescale/ first on the path, where `inspect.py` would be Python's."""
    for package in ("largescale", *ABOVE_THE_LIBRARY):
        names = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
        assert not names & sys.stdlib_module_names, package


def test_one_door_each() -> None:
    def users(library: str) -> set[str]:
        everything = {**modules("largescale"), **modules("data_prep"), **modules("eval")}
        return {n for n, p in everything.items() if any(i == library or i.startswith(library + ".") for i in imports(p))}

    assert users("deepspeed") == {"largescale.engine.deepspeed_engine", "largescale.engine.deepspeed_patches"}
    assert users("torch.distributed") == {"largescale.distributed.ranks"}
    assert users("wandb") == {"largescale.monitoring.trackers.wandb"}
    assert users("mlflow") == {"largescale.monitoring.trackers.mlflow"}
    assert users("ray") == {"data_prep.ray_engine"}
    assert users("torch.utils.tensorboard") == {"largescale.monitoring.trackers.tensorboard"}


@pytest.mark.skipif(not ((ROOT / ".git").exists() and shutil.which("git")), reason="this is no clone")
def test_no_link_is_committed() -> None:
    """A .venv that was a link to another clone's came along once, and `make test` passed in it."""
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert listed.stdout and not [line for line in listed.stdout.splitlines() if line.startswith("120000")]


def test_no_torch_below() -> None:
    for name, path in modules("largescale").items():
        short = name.removeprefix("largescale.")
        if any(short == start or short.startswith(f"{start}.") for start in NO_TORCH):
            torch = {i for i in imports(path, top_level_only=True) if i.split(".")[0] == "torch"}
            assert not torch, f"{name} imports {torch}"


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """As pytest by itself passes over a folder named dist."""
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parent.parts}
    patterns = pytestconfig.getini("norecursedirs")
    assert folders == {"tests", "dist", "e2e", "gpu", "slurm", "unit"}
    assert [folder for folder in folders if any(fnmatch(folder, pattern) for pattern in patterns)] == []


def test_what_ranks_are_forked_from_is_loaded() -> None:
    """Python says nothing where it cannot be, and every rank of every test then takes seconds more to start."""
    code = "import tests.preloaded, sys; assert {'largescale.training.trainer', 'deepspeed', 'torch._dynamo'} <= sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
