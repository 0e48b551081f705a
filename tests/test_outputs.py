"""Every command with an output: what cannot be written is said before any work; there is one writer."""

import ast
import os
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from small_runs import call
from test_imports import FILES, ROOT, TREES

NAMES = {"report": "x.html", "explain": "x.html", "evaluate": "x.json", "bench": "x.png", "embed": "x.npy"}
COMMANDS = {
    "predict": ["run", "--input", "a", "--output"],
    "training.embed": ["run", "--input", "a", "--output"],
    "kernels.bench": ["--csv"],
    "experiments.summary": ["run", "--csv"],
    "experiments.compare": ["run", "--csv"],
    "experiments.report": ["run", "--out"],
    "experiments.explain": ["run", "--text", "a", "--out"],
    "experiments.evaluate": ["run", "--out"],
    "experiments.batch_size": ["--out"],
    "benchmarks.faults": ["--out"],
    "benchmarks.methods": ["--out"],
    "benchmarks.processes": ["--out"],
    "benchmarks.scaling": ["--plot"],
    "benchmarks.startup": ["--out"],
    "benchmarks.inference_speed": ["--out"],
    "benchmarks.train_speed": ["--plot"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_where_no_file_can_be_is_said_before_any_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main, flag = import_module(command).main, COMMANDS[command][-1]
    name = NAMES.get(command.split(".")[-1], "x.csv")
    os.mkdir(name)
    for place, reason in ((name, "Is a directory"), (f"none/{name}", "No such file or directory")):
        if command == "experiments.evaluate" and place != name:
            continue  # it makes the folders
        ended = call(main, *COMMANDS[command], place)
        assert (ended.code, ended.line) == (2, f"error: {flag}: {place} cannot be written ({reason})")
    for place, says in (
        ("", "expected a path, got an empty text"),
        ("\udcff", "expected UTF-8, got '\\udcff'"),
    ):
        ended = call(main, *COMMANDS[command], place)
        assert (ended.code, ended.line) == (2, f"error: argument {flag}: {says}")
    assert os.listdir() == [name]


@pytest.mark.parametrize("command", ["predict", "training.embed", "experiments.evaluate"])
@pytest.mark.parametrize(
    "name", ["run/config.json", "run/adapter/adapter_config.json", "run/head.safetensors"]
)
def test_no_output_takes_the_place_of_a_runs_own_file(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run/adapter").mkdir(parents=True)
    Path(name).write_text("own")
    link = Path("x" + NAMES.get(command.split(".")[-1], "x.csv")[1:])
    link.symlink_to(name)
    ended = call(import_module(command).main, *COMMANDS[command], link)
    flag = COMMANDS[command][-1]
    said = f"error: {flag}: expected a new file, {link} is read by this command"
    assert (ended.code, ended.line, Path(name).read_text()) == (2, said, "own")


# Within temporary folders, or what grows line by line.
OTHER_WRITES = {
    "minibert/files.py": 2,  # the writer
    "minibert/sources.py": 1,
    "tasks/course.py": 1,
    "kernels/compiled.py": 1,
    "training/exit.py": 1,
    "training/run_folder.py": 1,
    "experiments/pool.py": 2,
    "benchmarks/fault_kinds.py": 1,
    "benchmarks/fault_runs.py": 2,
    "benchmarks/gpu_day.py": 1,
    "benchmarks/gpu_tests.py": 1,
    "benchmarks/startup.py": 1,
    "benchmarks/train_speed.py": 1,
}


def is_write(node: ast.AST) -> bool:
    """Whether it opens a file for writing, or is a method that does, but for the one writer's temporary."""
    if not isinstance(node, ast.Call) or (node.args and ast.unparse(node.args[0]) in ("temporary", "text")):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else f".{getattr(node.func, 'id', '')}"
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    opens = any(isinstance(one, ast.Constant) and one.value in ("w", "wb", "a", "ab", "w+") for one in given)
    return name in ("write_text", "write_bytes", "savefig") or (name.strip(".") == "open" and opens)


def test_what_a_command_leaves_is_written_by_one_writer() -> None:
    writes = Counter(
        str(path.relative_to(ROOT))
        for path in FILES.values()
        for node in ast.walk(TREES[path])
        if is_write(node)
    )
    assert writes == OTHER_WRITES
