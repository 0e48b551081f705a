from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bert import TINY
from tolerances import tolerance
from torch import Tensor

from minibert.model import Bert
from minibert.pooling import POOLINGS
from minibert.sequences import Sequences
from minibert.weights import load_bert

LENGTHS = (3, 1, 7, 2, 9, 4, 8, 5, 1, 16, 2)  # more than one block of 8
H = TINY.hidden_size


@pytest.fixture(scope="module")
def bert(tiny: Path) -> Bert:
    return load_bert(tiny).double()


def rows_of(lengths: tuple[int, ...], filler: int = 0, seed: int = 0) -> Tensor:
    """Random hidden states, [M, H]; those of filler are NaN, so that one look at them shows."""
    torch.manual_seed(seed)
    return torch.cat(
        [torch.randn(sum(lengths), H, dtype=torch.float64), torch.full((filler, H), float("nan")).double()]
    )


def by_hand(pooling: str, bert: Bert, hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """A loop over sequences and over their rows."""
    pooled, start = [], 0
    for length in lengths:
        rows = [hidden[i] for i in range(start, start + length)]
        start += length
        if pooling == "mean":
            pooled.append(sum(rows) / length)
        elif pooling == "cls":
            pooled.append(rows[0])
        else:
            dense = bert.pooler["dense"]
            pooled.append(torch.tanh(dense.weight @ rows[0] + dense.bias))
    return torch.stack(pooled)


@pytest.mark.parametrize("pooling", POOLINGS)
class TestEveryPooling:
    @given(
        lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20).map(tuple), filler=st.integers(0, 70)
    )
    @settings(max_examples=30, deadline=None)
    @torch.no_grad()
    def test_is_the_loop_over_sequences(self, bert, pooling: str, lengths: tuple[int, ...], filler: int):
        hidden = rows_of(lengths, filler)
        pooled = POOLINGS[pooling](bert, hidden, Sequences(lengths, filler))
        torch.testing.assert_close(
            pooled, by_hand(pooling, bert, hidden, lengths), **tolerance(torch.float64)
        )

    def test_has_the_gradients_of_the_loop_and_gives_filler_none(self, bert, pooling: str):
        hidden = rows_of(LENGTHS, filler=5).requires_grad_()
        weights = torch.randn(len(LENGTHS), H, dtype=torch.float64)
        wanted = [hidden, *(bert.pooler.parameters() if pooling == "pooler" else ())]
        ours = torch.autograd.grad(
            (POOLINGS[pooling](bert, hidden, Sequences(LENGTHS, 5)) * weights).sum(), wanted
        )
        theirs = torch.autograd.grad((by_hand(pooling, bert, hidden, LENGTHS) * weights).sum(), wanted)
        torch.testing.assert_close(ours, theirs, **tolerance(torch.float64))
        assert ours[0][-5:].count_nonzero() == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @torch.no_grad()
    def test_of_half_precision_is_computed_in_fp32(self, bert, pooling: str, dtype: torch.dtype):
        hidden = rows_of(LENGTHS).to(dtype)
        expected = by_hand(
            pooling, bert, hidden.double(), LENGTHS
        )  # the rounding of hidden itself left aside
        for held in (torch.float32, torch.float64):
            pooled = POOLINGS[pooling](bert.to(held), hidden, Sequences(LENGTHS))
            assert pooled.dtype == torch.float32
            torch.testing.assert_close(pooled.double(), expected, **tolerance(torch.float32))

    def test_is_of_as_many_vectors_as_sequences(self, bert, pooling: str):
        pooled = POOLINGS[pooling](bert, rows_of((4,)), Sequences((4,)))
        assert pooled.shape == (1, H)


def test_the_mean_of_many_half_precision_rows_does_not_stall():
    """Summed in bf16, a thousand ones would stop at 256."""
    pooled = POOLINGS["mean"](Bert(TINY), torch.ones(1000, H).bfloat16(), Sequences((1000,)))
    assert torch.equal(pooled, torch.ones(1, H))


def test_the_mean_is_sentence_transformers():
    """Their formula, on a padded rectangle: sum(hidden · mask) / sum(mask)."""
    hidden = rows_of(LENGTHS)
    padded = torch.nn.utils.rnn.pad_sequence(hidden.split(LENGTHS), batch_first=True, padding_value=7.0)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None])[..., None].double()
    expected = (padded * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    pooled = POOLINGS["mean"](Bert(TINY), hidden, Sequences(LENGTHS))
    torch.testing.assert_close(pooled, expected, **tolerance(torch.float64))
