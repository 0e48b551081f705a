"""A batch in pieces, and layers computed twice: less memory, and the same gradients."""

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared_steps import CASES, SHARED, STEPS, steps
from small_runs import call, flags, left_behind, settings
from stopped_runs import stopping

import train
from kernels import dropout
from tasks.mixture import Mixture
from tasks.share import Share, dealt
from training.config import COMPARING
from training.run import Run

IN_PIECES = [name for name, changes in SHARED.items() if changes.get("loss") not in COMPARING]
TRAINS_ENCODER = [name for name in CASES if name != "frozen"]


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("case", IN_PIECES)
def test_a_batch_in_pieces_has_the_loss_and_the_gradient_of_the_whole(
    case: str, most: int, tiny: Path, small_data: Path
) -> None:
    whole = steps(tiny, small_data, SHARED[case])
    pieces = steps(tiny, small_data, SHARED[case] | {"micro_batch_size": most})
    assert pieces.keys() == whole.keys()
    assert len(pieces["loss"]) == STEPS
    for name, values in whole.items():
        difference = torch.linalg.vector_norm(pieces[name] - values)
        assert difference <= 1e-9 * torch.linalg.vector_norm(values), name


def test_each_piece_of_each_step_draws_masks_of_its_own(tiny: Path, small_data: Path, monkeypatch) -> None:
    drawn, draw = [], dropout.keep_mask

    def noted(shape: torch.Size, drop: int, *key: int) -> torch.Tensor:
        drawn.append(key)
        return draw(shape, drop, *key)

    monkeypatch.setattr(dropout, "keep_mask", noted)
    trainer = Run(settings(tiny, small_data, micro_batch_size=2, encoder_dropout=0.1)).trainer
    trainer.model.train()
    for _ in range(2):
        trainer.step()
    assert len(set(drawn)) == len(drawn) > 2 * 4 * 4


@pytest.mark.parametrize("case", TRAINS_ENCODER)
def test_layers_computed_twice_leave_every_gradient_bit_for_bit(
    case: str, tiny: Path, small_data: Path
) -> None:
    kept = steps(tiny, small_data, CASES[case])
    twice = steps(tiny, small_data, CASES[case] | {"recompute": True})
    assert kept.keys() == twice.keys()
    assert all(torch.equal(kept[name], twice[name]) for name in kept)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_what_trains_gets_a_gradient_in_every_layer(method: str, tiny: Path, small_data: Path) -> None:
    changes = {"method": method, "recompute": True, "lr": 1e-3}
    trainer = Run(settings(tiny, small_data, **changes)).trainer
    trainer.model.train()
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    for _ in range(3):
        trainer.step()
    still = [n for n, p in trainer.model.named_parameters() if n in before and torch.equal(p, before[n])]
    # The pooler is no part of the mean; keys' biases cancel in the softmax, and move by rounding alone.
    assert [name for name in still if "pooler" not in name and "token_type" not in name] == []


def test_layers_computed_twice_keep_less_for_the_way_back(tiny: Path, small_data: Path) -> None:
    def saved(**changes) -> int:
        """Bytes that the graph of a step's loss holds."""
        trainer = Run(settings(tiny, small_data, method="full", lr=1e-3, **changes)).trainer
        trainer.model.train()
        held = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batches = trainer.plan.batches_of(0)
        parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.losses(batches)
        return sum(size for place, size in held.items() if place not in parameters)

    assert saved(recompute=True) < 0.5 * saved()


@pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"recompute": True}], ids=str)
def test_a_stopped_run_goes_on_to_the_same_bits(
    changes: dict, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    changes |= {"task": "sts", "method": "dora", "lora_dropout": 0.1}
    assert call(train.main, *flags(tiny, small_data, out=tmp_path / "whole", **changes)).code == 0
    with stopping(4, signal.SIGTERM):
        assert call(train.main, *flags(tiny, small_data, out=tmp_path / "run", **changes)).code == 143
    ended = call(train.main, *flags(tiny, small_data, out=tmp_path / "run", resume=True, **changes))
    assert (ended.code, ended.err) == (0, "")
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")


@pytest.mark.parametrize("loss", COMPARING)
def test_a_loss_that_compares_the_examples_of_a_batch_wants_them_at_once(
    loss: str, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    changes = {"loss": loss, "pair": "siamese", "features": "cosine", "method": "lora", "task": "sts"}
    ended = call(train.main, *flags(tiny, small_data, out=tmp_path / "run", micro_batch_size=2, **changes))
    assert ended.code == 2
    assert f"--micro-batch-size: --loss {loss} compares the examples of a batch" in ended.line


def test_a_frozen_encoder_has_nothing_to_compute_twice(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    changes = {"method": "frozen", "recompute": True}
    ended = call(train.main, *flags(tiny, small_data, out=tmp_path / "run", **changes))
    assert ended.line.startswith("error: --recompute: ")


@pytest.mark.parametrize(("processes", "count", "number"), [(1, 7, 3), (2, 23, 4), (3, 5, 2), (2, 1, 2)])
def test_pieces_are_the_examples_of_their_share_once_each_and_count_by_their_number(processes, count, number):
    shares = [Share(rank, processes, count) for rank in range(processes)]
    pieces = [piece for share in shares for piece in share.pieces(number)]
    working = [piece for piece in pieces if piece.weight]
    assert sorted(place for piece in working for place in piece.places) == list(range(count))
    assert sum(piece.weight for piece in pieces) == pytest.approx(1)
    assert all(piece.weight == len(piece.places) / count for piece in working)


@given(processes=st.integers(1, 5), count=st.integers(1, 40))
def test_shares_have_each_example_once_and_as_many_as_others(processes: int, count: int):
    runs = [Share(0, processes, count).run_of(rank) for rank in range(processes)]
    assert [place for run in runs for place in range(count)[run]] == list(range(count))
    assert {run.stop - run.start for run in runs} <= {count // processes, Share(0, processes, count).most}


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=70))
def test_examples_are_dealt_so_that_the_halves_are_as_long(lengths: list[int]):
    lengths = sorted(lengths, reverse=True)
    order = dealt(len(lengths)).tolist()
    assert sorted(order) == list(range(len(lengths)))
    for parts in (2, 4, 8):
        if len(lengths) % (2 * parts) == 0:  # whole rounds there and back
            size = len(lengths) // parts
            tokens = [
                sum(lengths[i] for i in order[start : start + size]) for start in range(0, len(order), size)
            ]
            assert max(tokens) - min(tokens) <= max(lengths) - min(lengths)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_processes_go_through_a_batch_in_the_same_number_of_pieces(most: int, tiny: Path, small_data: Path):
    data = Run(settings(tiny, small_data, task="sts", method="lora")).data["train"]
    plans = [Mixture(data, 5, seed=0, rank=rank, processes=2, most=most, apart=True) for rank in (0, 1)]
    for step in range(5):
        pieces = [plan.pieces_of(step) for plan in plans]
        assert len(pieces[0]) == len(pieces[1])
        shares = [piece["sts"].share for one in pieces for piece in one]
        assert sum(share.weight for share in shares) == pytest.approx(1)
        assert {share.processes for share in shares} == {2 * len(pieces[0])}
