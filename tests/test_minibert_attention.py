"""Attention's own gradients: those of its equation, sequence by sequence, whatever dropout's mask."""

import math

import pytest
import torch
from tolerances import tolerance
from torch import Tensor, nn

from kernels.dropout import Dropout as KeyedDropout
from kernels.dropout import DropoutKey
from minibert.attention import Attention, SelfAttention, fused_attention
from minibert.blocks import block_sizes
from minibert.layers import Dropout
from minibert.sequences import Sequences

HEADS, HIDDEN = 2, 6
LENGTHS, FILLER = (3, 20, 8, 1, 17, 4, 32, 7, 6, 3, 2, 5, 9, 16, 4), 2  # two blocks
FEW = (3, 20, 8, 17)  # one, as the two short ones join the longer ones


class FixedDropout(nn.Module):
    """The same masks at every forward, block by block, and open to be read."""

    def __init__(self):
        super().__init__()
        self.masks: list[Tensor] = []

    def draw(self, x: Tensor):
        generator = torch.Generator().manual_seed(x.shape[0] * 1000 + x.shape[-1])
        mask = 1.5 * (torch.rand(x.shape, generator=generator) > 1 / 3).to(x.dtype)
        self.masks.append(mask)
        return mask.mul


def random_rows(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """q, k, v, [M, H] each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, sum(lengths) + FILLER, HIDDEN)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_().unbind())


def by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], masks: list[Tensor]) -> Tensor:
    """The equation for one sequence and one head at a time, with PyTorch's gradients.

    `masks` are those of the blocks, [S, N, T, T] each.
    """
    blocks = zip(block_sizes(lengths), masks, strict=True)
    of = {i: one for (_, members), mask in blocks for i, one in zip(members, mask, strict=True)}  # [N, T, T]
    size, first, out = HIDDEN // HEADS, 0, []
    for i, length in enumerate(lengths):
        mask = of[i]
        rows, heads = slice(first, first + length), []
        for n in range(HEADS):
            columns = slice(n * size, (n + 1) * size)
            scores = q[rows, columns] @ k[rows, columns].T
            probs = scores.exp() / scores.exp().sum(1, keepdim=True)
            heads.append((probs * mask[n, :length, :length]) @ v[rows, columns])
        out.append(torch.cat(heads, dim=1))
        first += length
    return torch.cat([*out, torch.zeros(FILLER, HIDDEN, dtype=q.dtype)])


@pytest.mark.parametrize(("lengths", "blocks"), [(LENGTHS, 2), (FEW, 1)], ids=["two blocks", "one block"])
def test_values_and_gradients_are_those_of_the_equation_sequence_by_sequence(lengths, blocks):
    rows, dropout = random_rows(0, lengths), FixedDropout()
    ours = Attention.apply(*rows, Sequences(lengths, FILLER), HEADS, dropout)
    assert len(dropout.masks) == blocks
    theirs = by_sequence(*rows, lengths, dropout.masks)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weighing = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    gradients = [torch.autograd.grad((out * weighing).sum(), rows) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_gradients_pass_gradcheck():
    sequences, dropout = Sequences((3, 1, 5), filler=1), FixedDropout()
    rows = [x[:10].detach().requires_grad_() for x in random_rows(2)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: Attention.apply(q, k, v, sequences, HEADS, dropout), tuple(rows)
    )


def test_the_filler_sees_nothing_and_is_seen_by_none():
    rows = random_rows(3)
    out = Attention.apply(*rows, Sequences(LENGTHS, FILLER), HEADS, Dropout(0.0))
    assert out[-FILLER:].count_nonzero() == 0
    gradients = torch.autograd.grad(out.sum(), rows)
    assert all(gradient[-FILLER:].count_nonzero() == 0 for gradient in gradients)


class TestFused:
    """A GPU's form, called on a CPU."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(
        ("lengths", "filler"), [(LENGTHS, 2), ((8, 8), 2), ((8, 8), 0), ((3,), 1)], ids=str
    )
    def test_values_and_gradients_are_those_of_the_packed_form(self, lengths, filler: int, dtype):
        shape = (3, sum(lengths) + filler, HIDDEN)
        q, k, v = torch.randn(shape, dtype=dtype).requires_grad_().unbind()
        sequences, tokens = Sequences(lengths, filler), sum(lengths)
        packed = Attention.apply(q / math.sqrt(HIDDEN // HEADS), k, v, sequences, HEADS, Dropout(0.0))
        fused = fused_attention(q, k, v, sequences, HEADS, 0.0)
        torch.testing.assert_close(fused[:tokens], packed[:tokens], **tolerance(dtype))
        weighing = torch.randn_like(fused)  # of the filler too: it has no gradient whatever stands there
        ours, theirs = (torch.autograd.grad((out * weighing).sum(), (q, k, v)) for out in (fused, packed))
        torch.testing.assert_close(ours, theirs, **tolerance(dtype))
        assert all(gradient[tokens:].count_nonzero() == 0 for gradient in ours)
        assert fused.isfinite().all()

    def test_neither_probabilities_nor_scores_are_kept(self):
        lengths, kept = (128, 120), []
        rows = list(torch.randn(3, sum(lengths), HIDDEN).requires_grad_().unbind())
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            fused_attention(*rows, Sequences(lengths), HEADS, 0.0)
        assert kept
        assert max(x.untyped_storage().nbytes() for x in kept) < 4 * 2 * HEADS * 128 * 128

    def test_its_dropout_keeps_the_mean_and_follows_the_generator(self):
        rows, sequences = [x.float() for x in random_rows(0, FEW)], Sequences(FEW, FILLER)
        draws = [fused_attention(*rows, sequences, HEADS, 0.5).detach() for _ in range(2000)]
        without = fused_attention(*rows, sequences, HEADS, 0.0).detach()
        assert not torch.equal(draws[0], draws[1])
        error = (torch.stack(draws).mean(0) - without)[:-FILLER].abs().max()
        assert error < 5 * torch.stack(draws).std(0).max() / math.sqrt(len(draws))
        torch.manual_seed(0)
        again = fused_attention(*rows, sequences, HEADS, 0.5)
        torch.manual_seed(0)
        assert torch.equal(again, fused_attention(*rows, sequences, HEADS, 0.5))

    @pytest.mark.parametrize("training", [True, False])
    def test_it_is_what_a_layer_calls_on_any_other_device(self, training: bool, monkeypatch):
        told = []
        monkeypatch.setattr(
            "minibert.attention.fused_attention", lambda *arguments: told.append(arguments) or arguments[0]
        )
        layer = SelfAttention(HIDDEN, HEADS, dropout=0.25).train(training).to("meta")
        sequences = Sequences(FEW).to(torch.device("meta"))
        assert layer(torch.empty(sum(FEW), HIDDEN, device="meta"), sequences).is_meta
        ((*_, heads, dropout),) = told
        assert (heads, dropout) == (HEADS, 0.25 if training else 0.0)


@pytest.mark.parametrize(
    "dropout", [Dropout(0.5), KeyedDropout(0.5, DropoutKey(0), 0)], ids=["plain", "keyed"]
)
class TestDraw:
    def test_one_draw_is_applied_alike_again_and_again(self, dropout):
        x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
        mask = dropout.train().draw(x)
        kept = mask(x) != 0
        assert torch.equal(mask(x), mask(x))
        assert torch.equal(mask(x)[kept], 2 * x[kept])
        assert abs(kept.float().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(x.numel())

    def test_nothing_is_dropped_in_eval(self, dropout):
        x = torch.randn(4, 5)
        assert dropout.eval().draw(x)(x) is x


def test_a_keyed_draw_is_the_mask_that_the_layer_itself_applies():
    x = torch.randn(33, 17, generator=torch.Generator().manual_seed(0))
    one, other = (KeyedDropout(0.3, DropoutKey(5, step=2), site=4).train() for _ in range(2))
    assert torch.equal(one(x), other.draw(x)(x))
