"""BERT (Devlin et al. 2018), by hand, on packed tokens.

A batch is not a padded rectangle: its M real tokens stand in one row, sequence after sequence, and
everything but attention works on them as `[M, H]`. Modules are named after the keys of published
checkpoints, so loading one is a copy.

Letters: M tokens, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.attention import SelfAttention
from minibert.family import FAMILIES, Family
from minibert.layers import Embedding, LayerNorm, Linear
from minibert.sequences import Sequences


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
    model_type: str = "bert"

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def positions(self) -> int:
        """How many tokens a sequence may have."""
        return self.max_position_embeddings - self.family.first_position


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        types = config.type_vocab_size
        self.token_type_embeddings = Embedding(types, config.hidden_size) if types else None
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.first_position, self.reads_types = config.family.first_position, config.family.reads_types

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """three times [M] -> [M, H]"""
        if self.first_position:
            position_ids = position_ids + self.first_position
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)  # [M, H]
        if self.token_type_embeddings is not None:
            types = token_type_ids if self.reads_types else torch.zeros_like(token_type_ids)
            x = x + self.token_type_embeddings(types)
        return self.dropout(self.LayerNorm(x))


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
        self_attention = SelfAttention(
            config.hidden_size, config.num_attention_heads, config.attention_probs_dropout_prob
        )
        attention_output = Output(config.hidden_size, config)
        if not config.family.drops_attention:
            attention_output.dropout = nn.Identity()
        self.attention = nn.ModuleDict({"self": self_attention, "output": attention_output})
        self.intermediate = nn.ModuleDict({"dense": Linear(config.hidden_size, config.intermediate_size)})
        self.output = Output(config.intermediate_size, config)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """x [M, H] -> [M, H]"""
        context = self.attention["self"](x, sequences)  # [M, H]
        x = self.attention["output"](context, residual=x)  # [M, H]
        h = F.gelu(self.intermediate["dense"](x))  # [M, 4H]; the exact GELU, not tanh's
        return self.output(h, residual=x)  # [M, H]


class Bert(nn.Module):
    """The encoder of Devlin et al. 2018, figure 1, without its pre-training heads; or of a relative of it.

    `compute_dtype` is the dtype of all activations; None means that of the weights. A checkpoint may
    come without the pooler (a dense layer and tanh on [CLS]); then `pooler` is None. `call_layer` is how a
    layer is called: training may put another in its place, which keeps less.
    """

    def __init__(self, config: BertConfig, with_pooler: bool = True):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.call_layer: Callable[[nn.Module, Tensor, Sequences], Tensor] = nn.Module.__call__
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
            x = self.call_layer(layer, x, sequences)  # [M, H]
        return x
