from pathlib import Path
from tests.conftest import RunHere
from largescale import export
def test_x(run_here: RunHere, tmp_path: Path, capsys) -> None:
    run = run_here("--train.steps", 6, "--curriculum.patience", 0).run
    for more in ((), ("--format", "diffusers", "--license", "apache-2.0", "--datasets", "me/digits")):
        assert export.main([str(run), *more]) == 0
        with capsys.disabled():
            print(capsys.readouterr())
            out = run / ("diffusers" if more else "export")
            print((out/"README.md").read_text())
            import os; os.system(f"find {out} -type f | xargs ls -la; head -c 600 {out}/model_index.json")
