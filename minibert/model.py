"""BERT (Devlin et al. 2018), by hand, on packed tokens.

A batch is not a padded rectangle: its M real tokens stand in one row, sequence after sequence, and
everything but attention works on them as `[M, H]`. Modules are named after the keys of published
checkpoints, so loading one is a copy.

Letters: M tokens, S sequences, T the longest of them, H hidden size, N heads, D = H / N head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BertConfig:
    """The fields of a checkpoint's `config.json` that change what BERT computes."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1


class _Unpad(torch.autograd.Function):
    """rows[slots], whose gradient is a copy: no slot repeats, so nothing has to be added up."""

    @staticmethod
    def forward(ctx, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, grad.shape[1]).index_copy_(0, slots, grad), None


class Block:
    """Neighbouring sequences that are padded together for attention: S of them, to T tokens.

    T is the longest, rounded up to a multiple of 8: libraries keep a kernel for every shape they meet.
    """

    def __init__(self, lengths: Sequence[int], first_row: int, device: torch.device):
        self.shape = (len(lengths), -(-max(lengths) // 8) * 8)
        self.rows = slice(first_row, first_row + sum(lengths))
        inside = torch.arange(self.shape[1]) < torch.tensor(lengths)[:, None]  # [S, T]
        self.slots = inside.flatten().nonzero().squeeze(1).to(device)  # [M], places in the padded grid
        ragged = min(lengths) < self.shape[1]
        self.mask = inside[:, None, None, :].to(device) if ragged else None  # [S, 1, 1, T]

    def pad(self, x: Tensor) -> Tensor:
        """this block's rows of x [M, H] -> [S, T, H], zeros where a sequence has ended"""
        grid = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1])
        return grid.index_copy_(0, self.slots, x[self.rows]).unflatten(0, self.shape)  # [S, T, H]

    def unpad(self, x: Tensor) -> Tensor:
        """[S, T, H] -> this block's rows"""
        return _Unpad.apply(x.flatten(0, 1), self.slots)


@dataclass(frozen=True)
class Sequences:
    """How the row of M packed tokens divides into S sequences; none is empty.

    Attention sees them in blocks of neighbours, each padded to its own longest: the nearer in length
    neighbours are, the less is wasted. On a GPU, where every launch costs, all are one block.

    The row may end in `filler` tokens that belong to no sequence, and that no sequence sees: a matrix
    library keeps half a megabyte of code for every M it meets, so it pays to meet few.
    """

    lengths: tuple[int, ...]
    filler: int = 0
    device: torch.device = torch.device("cpu")

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(self.lengths, self.filler, device)

    @cached_property
    def blocks(self) -> list[Block]:
        size = 8 if self.device.type == "cpu" else len(self.lengths)
        starts = [0, *accumulate(self.lengths)]
        chunks = [(self.lengths[i : i + size], starts[i]) for i in range(0, len(self.lengths), size)]
        return [Block(lengths, first_row, self.device) for lengths, first_row in chunks]

    @cached_property
    def counts(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.device)  # [S]

    @cached_property
    def first(self) -> Tensor:
        """The row of each sequence's first token, [CLS]."""
        return self.counts.cumsum(0) - self.counts  # [S]

    @cached_property
    def position_ids(self) -> Tensor:
        rows = torch.arange(sum(self.lengths), device=self.device)
        return F.pad(rows - self.first.repeat_interleave(self.counts), (0, self.filler))  # [M]


class Linear(nn.Linear):
    """y = x Wᵀ + b, computed in the dtype of x whatever dtype the weight is kept in.

    This is all of mixed precision: weights that train stay fp32 masters, activations decide.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) · w + b; PyTorch takes the statistics in fp32 for any dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


class Embedding(nn.Embedding):
    """A table of vectors, [number, H], drawn from N(0, 0.02²), as in BERT's published code."""

    def reset_parameters(self) -> None:
        # On the meta device there is nothing to draw, and PyTorch would load its compiler to find that out.
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """three times [M] -> [M, H]"""
        words = self.word_embeddings(input_ids)  # [M, H]
        x = words + self.position_embeddings(position_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """softmax(Q Kᵀ / √D) V in each of N heads (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """x [M, H] -> [M, H]; the one place where tokens see each other, and where padding exists"""
        q = self.query(x) / math.sqrt(x.shape[1] // self.num_heads)  # [M, H]
        k, v = self.key(x), self.value(x)  # [M, H]
        context = torch.cat([self.attend(q, k, v, block) for block in sequences.blocks])
        return F.pad(context, (0, 0, 0, sequences.filler))  # [M, H]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        q, k, v = (self.split_heads(block.pad(part)) for part in (q, k, v))
        scores = q @ k.mT  # [S, N, T, T]
        if block.mask is not None:
            scores = scores.masked_fill_(~block.mask, -math.inf)
        probs = self.dropout(scores.softmax(dim=-1))  # [S, N, T, T]
        context = (probs @ v).transpose(1, 2).flatten(2)  # [S, T, H]
        return block.unpad(context)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [S, N, T, D]


class Output(nn.Module):
    """LayerNorm(residual + dropout(x Wᵀ + b)): how both halves of a layer end."""

    def __init__(self, in_features: int, config: BertConfig):
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))  # [M, H]


class EncoderLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        attention_output = Output(config.hidden_size, config)
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": attention_output})
        self.intermediate = nn.ModuleDict({"dense": Linear(config.hidden_size, config.intermediate_size)})
        self.output = Output(config.intermediate_size, config)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """x [M, H] -> [M, H]"""
        context = self.attention["self"](x, sequences)  # [M, H]
        x = self.attention["output"](context, residual=x)  # [M, H]
        h = F.gelu(self.intermediate["dense"](x))  # [M, 4H]; the exact GELU, not tanh's
        return self.output(h, residual=x)  # [M, H]


class Bert(nn.Module):
    """The encoder of Devlin et al. 2018, figure 1, without its pre-training heads.

    `compute_dtype` is the dtype of all activations; None means that of the weights. A checkpoint may
    come without the pooler (a dense layer and tanh on [CLS]); then `pooler` is None.
    """

    def __init__(self, config: BertConfig, with_pooler: bool = True):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        dense = Linear(config.hidden_size, config.hidden_size)
        self.pooler = nn.ModuleDict({"dense": dense}) if with_pooler else None

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, sequences: Sequences) -> Tensor:
        """input_ids [M], token_type_ids [M] -> hidden [M, H]"""
        x = self.embeddings(input_ids, token_type_ids, sequences.position_ids)  # [M, H]
        x = x.to(self.compute_dtype or x.dtype)
        for layer in self.encoder["layer"]:
            x = layer(x, sequences)  # [M, H]
        return x
