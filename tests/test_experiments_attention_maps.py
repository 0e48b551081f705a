"""Attention's weights are transformers', and weigh the layer's values into the layer's own output."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from tiny_bert import TINY
from tolerances import tolerance
from torch import Tensor

from experiments.explanation import attention_maps, attention_weights
from lora.methods import METHODS, apply_method
from minibert.model import Bert
from minibert.sequences import Sequences
from minibert.weights import load_bert
from tasks.data import Batch

LENGTHS, FILLER = (9, 1, 17), 5


def random_batch(vocab_size: int) -> Batch:
    """Sequences whose second half is of the second type; no [PAD], id 0."""
    generator = torch.Generator().manual_seed(0)
    count = sum(LENGTHS)
    ids = torch.randint(1, vocab_size, (count,), generator=generator)
    types = torch.cat([(torch.arange(length) >= (length + 1) // 2).long() for length in LENGTHS])
    ids, types = (torch.cat([one, torch.zeros(FILLER, dtype=torch.long)]) for one in (ids, types))
    return Batch(("a", "b", "c"), ids, types, Sequences(LENGTHS, FILLER), None)


def by_transformers(folder: Path, batch: Batch, dtype: torch.dtype) -> list[Tensor]:
    """[L, N, T, T] of each sequence, one at a time."""
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()
    maps = []
    for ids, types in zip(batch.input_ids.split([*LENGTHS, FILLER])[:-1],
                          batch.token_type_ids.split([*LENGTHS, FILLER])[:-1], strict=True):  # fmt: skip
        with torch.no_grad():
            out = model(input_ids=ids[None], token_type_ids=types[None], output_attentions=True)
        maps.append(torch.cat(out.attentions))
    return maps


@pytest.mark.parametrize(("which", "dtype"), [("tiny", torch.float64), ("minilm", torch.float32)])
def test_the_weights_of_every_layer_and_head_are_transformers(
    which: str, dtype: torch.dtype, request
) -> None:
    folder = request.getfixturevalue(which)
    bert = load_bert(folder).to(dtype).eval()
    batch = random_batch(bert.config.vocab_size)
    ours, theirs = attention_maps(bert, batch), by_transformers(folder, batch, dtype)
    layers, heads = bert.config.num_hidden_layers, bert.config.num_attention_heads
    assert [one.shape for one in ours] == [(layers, heads, length, length) for length in LENGTHS]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance(dtype, "encoder"))
        torch.testing.assert_close(one.sum(dim=-1), torch.ones_like(one[..., 0]))


@pytest.mark.parametrize("method", METHODS)
def test_weights_times_values_are_the_layers_own_output(method: str) -> None:
    bert = Bert(TINY).double().eval()
    apply_method(bert, METHODS[method], rank=3)
    for parameter in bert.parameters():  # adapters have to do something
        torch.nn.init.normal_(parameter.data, std=0.2)
    attention = copy.deepcopy(bert.encoder["layer"][1].attention["self"])
    x = torch.randn(11, TINY.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        A, V = attention_weights(attention, x), attention.value(x)  # [N, T, T], [T, H]
        by_head = [A[n] @ values for n, values in enumerate(V.chunk(TINY.num_attention_heads, dim=1))]
        own = attention(x, Sequences((11,)))
    torch.testing.assert_close(torch.cat(by_head, dim=1), own, **tolerance(torch.float64))
