"""Who may import whom, and what no file may do, read from the source by `ast`."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
OPTIONS = SETUP["options"]

# Each package or script, and the parts of this project that it may import.
MAY_IMPORT = {
    "minibert": {"minibert"},
    "kernels": {"kernels"},
    "lora": {"lora", "kernels", "minibert.errors", "minibert.files"},
    "tasks": {"tasks", "minibert"},
    "training": {"training", "tasks", "lora", "kernels", "minibert"},
    "experiments": {"experiments", "training", "tasks", "lora", "kernels", "minibert"},
    "benchmarks": {"benchmarks", "experiments", "training", "tasks", "lora", "kernels", "minibert"},
    "train": {"training", "tasks", "lora", "kernels", "minibert"},
    "predict": {"training", "tasks", "lora", "kernels", "minibert"},
}
# Modules that are run: each may import what predict.py may, and nothing imports it.
SCRIPTS = {
    "lora.verify",
    "lora.merge",
    "kernels.audit",
    "kernels.bench",
    "kernels.roofline",
    "training.embed",
}
# Formats whose reader runs code, and ways to run text as code.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "imp"}
UNSAFE_CALLS = {"eval", "exec", "__import__"}
# The one reader of a pickle, with weights_only, and the name of what it raises.
MAY_UNPICKLE = {
    ROOT / "minibert" / "files.py": ["import pickle", "torch.load"],
    ROOT / "tests" / "test_minibert_older_files.py": ["torch.save"] * 5,
}
UNSAFE_ATTRIBUTES = {"torch.load", "torch.save", "torch.hub", "np.load", "numpy.load"}
# Handlers of `Exception`, in the one place where a library raises just that.
TOO_BROAD = {ROOT / "minibert" / "tokenizer.py": 1}


def name_of(path: Path) -> str:
    """The name a file is imported by: lora/layers.py -> lora.layers, lora/__init__.py -> lora"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    name_of(path): path
    for top in MAY_IMPORT
    for path in (
        [ROOT / f"{top}.py"] if (ROOT / f"{top}.py").exists() else sorted((ROOT / top).rglob("*.py"))
    )
}
EVERY_FILE = [*FILES.values(), *sorted((ROOT / "tests").glob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), path) for path in EVERY_FILE}


def imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Every module that is imported, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for (
                alias
            ) in node.names:  # `from lora import layers` imports a module, `... import x` a name of one
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module


def ours(path: Path) -> set[str]:
    return {module for module in imports(TREES[path], set(FILES)) if module.split(".")[0] in MAY_IMPORT}


def allowed(module: str, rule: set[str]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in rule)


def unsafe(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
            yield f"{node.lineno}: {node.func.id}(...)"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_ATTRIBUTES:
            yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield f"{node.value.lineno}: allow_pickle"
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names} & UNSAFE_ATTRIBUTES
            yield from (f"{node.lineno}: {name}" for name in names)
        if isinstance(node, ast.Import | ast.ImportFrom):
            tops = {module.split(".")[0] for module in imports(node, set())}
            yield from (f"{node.lineno}: import {name}" for name in tops & UNSAFE_MODULES)


def too_broad(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = (
                [] if node.type is None else {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            )
            if not caught or {"Exception", "BaseException"} & set(caught):
                yield f"{node.lineno}: except {ast.unparse(node.type) if node.type else ''}"


def test_every_package_and_script_has_a_rule():
    named = [*OPTIONS["packages"].split(","), *OPTIONS["py_modules"].split(",")]
    assert {name.strip() for name in named} == set(MAY_IMPORT)
    assert {name.split(".")[0] for name in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_its_package_may(name: str):
    rule = MAY_IMPORT["predict" if name in SCRIPTS else name.split(".")[0]]
    assert {module for module in ours(FILES[name]) if not allowed(module, rule)} == set()


def test_no_file_imports_a_script():
    assert {name for name, path in FILES.items() if ours(path) & (SCRIPTS | {"train", "predict"})} == set()


def test_no_import_is_relative():
    relative = [
        str(path) for path in FILES.values() if any(m.startswith(".") for m in imports(TREES[path], set()))
    ]
    assert relative == []


def test_no_cycle_even_among_imports_within_functions():
    TopologicalSorter({name: ours(path) - {name} for name, path in FILES.items()}).prepare()


def test_what_is_imported_from_outside_is_declared():
    extras = SETUP["options.extras_require"]
    wanted = OPTIONS["install_requires"] + extras["search"] + extras["bench"]
    packages = [re.match(r"[\w-]+", line)[0] for line in wanted.split("\n") if line[:1].isalpha()]
    declared = {package.replace("-", "_") for package in packages}
    outside = {module.split(".")[0] for path in FILES.values() for module in imports(TREES[path], set())}
    newer = {"tomllib"}  # Python 3.11's, which tomli stands in for
    assert outside - set(sys.stdlib_module_names) - newer - set(MAY_IMPORT) <= declared


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: str(path.relative_to(ROOT)))
class TestEveryFile:
    def test_runs_no_text_as_code_and_reads_no_pickle(self, path: Path):
        assert [line.partition(": ")[2] for line in unsafe(TREES[path])] == MAY_UNPICKLE.get(path, [])

    def test_catches_no_exception_it_does_not_name(self, path: Path):
        assert len(list(too_broad(TREES[path]))) == TOO_BROAD.get(path, 0)


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from pickle import loads", "def f():\n  import pickle as p", "import os, marshal",
     "x = eval('1')", "exec(y)", "torch.load('x')", "f = torch.load", "from torch import load",
     "np.load(f, allow_pickle=True)", "read(allow_pickle=x)", "torch.hub.load('x')"],
)  # fmt: skip
def test_the_check_sees_unsafe_code(code: str):
    assert list(unsafe(ast.parse(code)))


@pytest.mark.parametrize("code", ["model.eval()", "torch.load_state_dict", "re.compile('x')", "executor(f)"])
def test_the_check_passes_safe_code(code: str):
    assert not list(unsafe(ast.parse(code)))


@pytest.mark.parametrize("caught", ["", " Exception", " Exception as e", " (OSError, BaseException)"])
def test_the_check_sees_handlers_that_are_too_broad(caught: str):
    assert list(too_broad(ast.parse(f"try:\n  f()\nexcept{caught}:\n  pass")))


@pytest.mark.parametrize(
    ("code", "found"),
    [("import lora.layers", "lora.layers"), ("from lora import layers", "lora.layers"),
     ("from tasks import TASKS", "tasks"),
     ("def f():\n  from lora.layers import LoRALinear", "lora.layers"), ("from . import layers", "."),
     ("if TYPE_CHECKING:\n  import lora", "lora")],
)  # fmt: skip
def test_the_check_sees_imports_wherever_they_stand(code: str, found: str):
    assert list(imports(ast.parse(code), {"lora.layers"})) == [found]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["train.py", "--help"], 0),
        (["predict.py", "--help"], 0),
        (["train.py", "--task", "nope"], 2),
        (["train.py", "--rank", "4", "--method", "full"], 2),
        (["predict.py"], 2),
        (["-m", "experiments.multitask", "--help"], 0),
        (["-m", "experiments.multitask", "run"], 2),
        (["-m", "lora.verify", "--help"], 0),
        (["-m", "lora.verify", "one", "two"], 2),
        (["-m", "experiments.compare", "--help"], 0),
        (["-m", "experiments.compare"], 2),
        (["-m", "experiments.evaluate", "--help"], 0),
        (["-m", "experiments.evaluate"], 2),
        (["-m", "experiments.report", "--help"], 0),
        (["-m", "experiments.report", "nowhere", "--out", "page.txt"], 2),
        (["-m", "experiments.microscope", "--help"], 0),
        (["-m", "experiments.microscope", "run", "--out", "x", "--top", "0"], 2),
        (["-m", "training.embed", "--help"], 0),
        (["-m", "training.embed", "run", "--input", "a", "--output", "b.pt"], 2),
        (["-m", "kernels.audit", "--help"], 0),
        (["-m", "kernels.audit", "nope"], 2),
        (["-m", "experiments.grid", "--help"], 0),
        (["-m", "experiments.grid", "--out", "x", "--method", "full", "--rank", "4", "8"], 2),
        (["-m", "benchmarks.train_speed", "--help"], 0),
        (["-m", "benchmarks.train_speed", "--rounds", "0"], 2),
        (["-m", "benchmarks.inference_speed", "--help"], 0),
        (["-m", "benchmarks.startup", "--help"], 0),
        (["-m", "benchmarks.scaling", "--help"], 0),
        (["-m", "benchmarks.scaling", "--steps", "0"], 2),
        (["-m", "benchmarks.gpu_day", "--help"], 0),
        (["-m", "benchmarks.gpu_day", "--out", "x", "--seconds", "5"], 2),
        (["-m", "benchmarks.faults", "--help"], 0),
        (["-m", "benchmarks.faults", "--kills", "-1"], 2),
        (["-m", "kernels.roofline", "--help"], 0),
        (["-m", "kernels.roofline", "--device", "abacus"], 2),
    ],
    ids=str,
)
def test_help_and_usage_errors_answer_without_torch(command: list[str], code: int):
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == code
    imported = {
        line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")
    }
    assert "argparse" in imported  # otherwise this reads nothing
    assert {name.split(".")[0] for name in imported} & {"torch", "numpy", "scipy", "tokenizers"} == set()
