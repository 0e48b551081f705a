"""What PEFT's layers launch, move and keep: counted from the operations that PEFT really calls.

They run forward and backward on meta tensors, which have shapes and no numbers. Each operation that is no
view counts as one launch that reads every tensor it is given once and writes its result once, so that fusions
by a compiler are left out, and what stays in a cache between two operations is counted twice.

PEFT is set up at its cheapest: everything in the activations' dtype, the adapters too, no autocast. By
default get_peft_model keeps the adapters of such a base in fp32, and each layer then casts x to it.
"""

import importlib
import importlib.util
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.costs import DROPOUT, Pass, Path

aten = torch.ops.aten
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty)
PRODUCTS = (aten.mm, aten.addmm)


class Settings(NamedTuple):
    dora: bool
    dropout: float


# The rows of a table. With dropout PEFT's DoRA drops out the base term's input too, in a second product.
VARIANTS = {
    "PEFT LoRA, dropout": Settings(False, DROPOUT),
    "PEFT LoRA": Settings(False, 0.0),
    "PEFT DoRA, dropout": Settings(True, DROPOUT),
    "PEFT DoRA": Settings(True, 0.0),
}


def installed() -> bool:
    return importlib.util.find_spec("peft") is not None


def peft_layer(base: nn.Linear, rank: int, scaling: float, dora: bool, dropout: float) -> nn.Module:
    """PEFT's layer around a frozen `base`; A, B and m in the dtype of its weight, and on its device."""
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(
        r=rank, lora_alpha=scaling * rank, lora_dropout=dropout, use_dora=dora, target_modules=["0"]
    )
    return peft.inject_adapter_in_model(config, nn.Sequential(base.requires_grad_(False)))[0].train()


def count(M: int, K: int, N: int, rank: int, dora: bool, dropout: float) -> Path:
    """The passes of a layer in fp16, and what autograd keeps between forward and backward."""
    on_meta = {"device": "meta", "dtype": torch.float16}
    layer = peft_layer(nn.Linear(K, N, **on_meta), rank, 2.0, dora, dropout)
    if dropout:
        layer.lora_dropout["default"] = GpuDropout(dropout)
    x, dy = torch.empty(M, K, **on_meta, requires_grad=True), torch.empty(M, N, **on_meta)
    forward, backward, saved = Passes(), Passes(), Saved()
    with forward, torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        y = layer(x)
    kept = saved.bytes(layer)
    with backward:
        y.backward(dy)
    return Path(tuple(forward.seen), tuple(backward.seen), kept)


class GpuDropout(nn.Dropout):
    """Dropout as a GPU runs it: one operation, which keeps a byte an element; on meta tensors it is four."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0]


class Passes(TorchDispatchMode):
    """The operations within it, each as a launch."""

    def __init__(self):
        super().__init__()
        self.seen: list[Pass] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function.overloadpacket not in ALLOCATIONS:
            read, written = tensors((args, kwargs)), tensors(result)
            moved = sum(size(one) for one in (*read, *written))
            flops = 0
            if function.overloadpacket in PRODUCTS:
                flops = 2 * result.numel() * args[-2].shape[1]  # [rows, inner] @ [inner, columns]
            self.seen.append(Pass(moved, flops=flops))
        return result


def tensors(tree: object) -> list[Tensor]:
    """Each once, however often it is named. What an operation changes in place is among both."""
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return list({one.untyped_storage()._cdata: one for one in found}.values())


def size(one: Tensor) -> int:
    """In bytes; of what is expanded, those that are there."""
    return min(one.numel() * one.element_size(), one.untyped_storage().nbytes())


class Kept:
    """A tensor in autograd's keeping, for as long as its graph lives."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Saved:
    """The hooks by which autograd saves tensors."""

    def __init__(self):
        self.kept: list[weakref.ref[Kept]] = []

    def pack(self, tensor: Tensor) -> Kept:
        one = Kept(tensor)
        self.kept.append(weakref.ref(one))
        return one

    def unpack(self, one: Kept) -> Tensor:
        return one.tensor

    def bytes(self, layer: nn.Module) -> int:
        """Of distinct storages, without the layer's own parameters.

        What only a graph that is gone had saved is not counted: PEFT's DoRA makes B A of a unit matrix
        [K, K], and then detaches it.
        """
        alive = [one.tensor for one in (reference() for reference in self.kept) if one is not None]
        own = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
        storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in alive}
        return sum(nbytes for storage, nbytes in storages.items() if storage not in own)
