"""Who may import whom (the table in docs/layout.md): imports only go down, and two libraries have one door each."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = {
    0: ["errors", "files", "launch", "machine", "signals", "starts", "anomaly", "config", "validation", "presets", "ds_config", "cost", "curriculum", "diffusion.schedule"],
    1: ["diffusion", "models", "optim", "draws", "images", "build", "compiling", "half", "agreed", "memory", "encoders", "noise_sampling", "weighting", "augment"],
    2: ["data", "checkpoint_files", "telemetry", "sampling", "inference", "weights", "export", "inspect", "requeue"],
    3: ["distributed", "engine", "checkpoint", "fit"],
    4: ["meter", "goodput", "watch", "saving", "trouble", "preview", "profiling", "reference", "trainer"],
    5: ["train", "dry_run"],
}
NO_TORCH = [*LAYERS[0], "checkpoint_files", "telemetry", "inspect", "requeue"]  # at import; some functions of the last two load it
EMPTY = {"largescale", "largescale.data", "largescale.diffusion", "largescale.encoders", "largescale.models"}  # packages that import nothing
ABOVE_THE_LIBRARY = {"data_prep", "eval"}


def layer(module: str) -> int:
    name = module.removeprefix("largescale.")
    while name:
        for number, names in LAYERS.items():
            if name in names:
                return number
        name = name.rpartition(".")[0]
    raise AssertionError(f"{module} has no layer; give it one in LAYERS")


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
    for name, path in library.items():
        for imported in imports(path) & library.keys() - EMPTY:
            assert layer(imported) <= layer(name), f"{name} imports {imported}, which lies above it"


def test_programs_use_the_library_below_the_engine() -> None:
    allowed = {"largescale.distributed.ranks"}
    library = modules("largescale").keys() - EMPTY
    for package in ABOVE_THE_LIBRARY:
        for name, path in modules(package).items():
            for imported in imports(path) & library - allowed:
                assert layer(imported) <= 2, f"{name} imports {imported}: packing and sampling run without DeepSpeed"
    for name, path in modules("largescale").items():
        above = {i for i in imports(path) if i.split(".")[0] in ABOVE_THE_LIBRARY | {"tests"}}
        assert not above, f"{name} imports {above}"


def test_empty_packages_are_empty() -> None:
    for name in EMPTY:
        assert not imports(modules("largescale")[name])


def test_one_door_each() -> None:
    def users(library: str) -> set[str]:
        everything = {**modules("largescale"), **modules("data_prep"), **modules("eval")}
        return {n for n, p in everything.items() if any(i == library or i.startswith(library + ".") for i in imports(p))}

    assert users("deepspeed") == {"largescale.engine.deepspeed_engine"}
    assert users("torch.distributed") == {"largescale.distributed.ranks"}


def test_no_torch_below() -> None:
    for name, path in modules("largescale").items():
        if name.removeprefix("largescale.").split(".")[0] in NO_TORCH or name == "largescale.noise_schedule":
            torch = {i for i in imports(path, top_level_only=True) if i.split(".")[0] == "torch"}
            assert not torch, f"{name} imports {torch}"


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """As pytest by itself passes over a folder named dist."""
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parent.parts}
    patterns = pytestconfig.getini("norecursedirs")
    assert folders == {"tests", "dist", "e2e", "gpu", "slurm", "unit"}
    assert [folder for folder in folders if any(fnmatch(folder, pattern) for pattern in patterns)] == []
