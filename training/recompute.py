"""Activation checkpointing (Chen et al. 2016, section 4): of each encoder layer the input alone is kept.

On the way back a layer is computed once more, dropout's masks and all, just before its gradients: about a
third more work, and the memory of one layer's activations instead of all layers'. Dropout's masks are kept.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.dropout import DropoutKey
from minibert.model import Bert
from minibert.sequences import Sequences


def recompute_layers(bert: Bert, key: DropoutKey) -> None:
    """Have `bert` keep its layers' inputs alone wherever gradients are wanted, however it calls them."""
    call_layer = bert.call_layer

    def call(layer: nn.Module, x: Tensor, sequences: Sequences) -> Tensor:
        """x [M, H] -> [M, H]"""
        if not torch.is_grad_enabled():
            return call_layer(layer, x, sequences)
        # Not reentrant: a frozen input, which the first layer's is, would cut its adapters off.
        contexts = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), key.again())}
        return checkpoint(call_layer, layer, x, sequences, **contexts)

    bert.call_layer = call
