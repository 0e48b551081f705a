"""A grid is the cartesian product of its axes, every cell checked, and what makes no sense is one line."""

from itertools import product
from pathlib import Path

import pytest

import train
from experiments.cells import Range, make_blocks, make_cells, read_table
from training.cli import parse


def test_cells_are_the_cartesian_product_of_the_axes():
    axes = {"method": ["lora", "dora"], "lr": [1e-4, 1e-3], "seed": [0, 1, 2]}
    cells = make_cells({"task": "sst", "axes": axes})
    told = [(cell.config.method, cell.config.lr, cell.config.seed) for cell in cells]
    assert told == list(product(*axes.values()))
    assert {cell.config.task for cell in cells} == {"sst"}
    assert cells[0].name == "lora-lr0.0001-seed0"


def test_methods_get_axes_of_their_own():
    table = {
        "axes": {"seed": [0, 1]},
        "grid": [{"method": "lora", "rank": [2, 4]}, {"method": "full", "lr": [1e-5]}],
    }
    assert [cell.name for cell in make_cells(table)] == [
        "lora-rank2-seed0",
        "lora-rank2-seed1",
        "lora-rank4-seed0",
        "lora-rank4-seed1",
        "full-lr1e-05-seed0",
        "full-lr1e-05-seed1",
    ]


def test_an_axis_of_one_value_is_in_the_name_so_that_it_can_grow():
    assert [cell.name for cell in make_cells({"axes": {"seed": [3]}})] == ["seed3"]


def test_a_cells_command_says_to_train_what_the_cell_is():
    axes = {
        "targets": ["query+value", ["all@0-2,5"]],
        "rank_pattern": ["query=16", ""],
        "strict": [True, False],
    }
    cells = make_cells({"method": "dora", "lr": 1e-3, "axes": axes})
    assert len({cell.name for cell in cells}) == 8
    for cell in cells:
        script, *arguments = cell.command(Path("runs/x"))
        config, given = parse(arguments)
        assert (config, given.out, given.resume) == (cell.config, Path("runs/x"), True)
        assert Path(script) == Path(train.__file__)


@pytest.mark.parametrize("data", ["..", "/", "a/..", "."])
def test_no_cell_lies_outside_the_folder(data: str):
    for cell in make_cells({"axes": {"data": [data]}}):
        assert "/" not in cell.name
        assert not cell.name.startswith(".")


def test_a_range_has_a_low_and_a_high_end():
    (block,) = make_blocks({"axes": {"lr": {"low": 1e-5, "high": 1e-3, "log": True}}}, "x")
    assert block["lr"].values == Range(1e-5, 1e-3, log=True)


REFUSED = {
    "g: lrr: unknown key 'lrr'": {"lrr": 1},
    "g: axes.lrr: unknown key 'lrr'": {"axes": {"lrr": [1]}},
    "g: axes.lr: expected a list of values, got an empty one": {"axes": {"lr": []}},
    "g: axes.lr: expected a list of values, got 0.1": {"axes": {"lr": 0.1}},
    "g: axes.seed: 1 stands there twice": {"axes": {"seed": [1, 2, 1]}},
    "g: axes: expected a table": {"axes": 3},
    "g: grid: expected tables": {"grid": {"lr": [1]}},
    "g: axes.lr: cell x: expected lr to be float": {"axes": {"lr": ["x"]}},
    "g: axes.lr: cell lr-1: --lr: expected a number above 0, got -1": {"axes": {"lr": [-1]}},
    "g: axes.rank: cell full-rank4: --rank: --method full has no adapters": {
        "axes": {"method": ["lora", "full"], "rank": [4]}
    },
    "g: grid[2].pair: cell sst-siamese: --pair siamese: expected a task of sentence pairs": {
        "grid": [{"task": "sts"}, {"task": "sst", "pair": "siamese"}]
    },
    "g: cells sts-full and lr0.0001 are the same": {
        "grid": [{"method": "full"}, {"method": "full", "lr": [1e-4]}]
    },
    "g: axes.lr: a range of lr is for a search": {"axes": {"lr": {"low": 1, "high": 2}}},
    "g: axes.lr: expected a range as": {"axes": {"lr": {"low": 2, "high": 1}}},
    "g: expected at most 10,000 cells, got 20,000": {"axes": {"seed": list(range(20_000))}},
    "g: two cells would be called data": {"axes": {"data": ["a/data", "b/data"]}},
}


@pytest.mark.parametrize(("message", "table"), REFUSED.items(), ids=list(REFUSED))
def test_a_grid_that_makes_no_sense_is_refused_with_its_place(message: str, table: dict, refusal):
    assert refusal(make_cells, table, "g").startswith(message)


@pytest.mark.parametrize("text", ["a = ", "a = 1\na = 2", "[axes", "\x01"])
def test_what_is_no_toml_is_refused(text: str, tmp_path: Path, refusal):
    file = tmp_path / "grid.toml"
    file.write_text(text)
    assert refusal(read_table, file).startswith(f"{file}: expected TOML")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, refusal):
    assert "cannot be read" in refusal(read_table, tmp_path / "none.toml")
