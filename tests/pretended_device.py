"""A cuda:0 that is not there: tensors say they are on it, and are computed on the CPU; costs are counted.

As on a GPU, an operation on tensors of two devices raises. Counted are kernel launches, copies from pageable
memory (in which the host waits for the device's queue), and other waits of the host, the last two by the line
of the project that asked for them. What a GPU's memory and time would be is not known here.
"""

import functools
import importlib
import os
import sys
from collections import Counter
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from pretended_launches import launches_of
from torch import Tensor
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kernels import dispatch, reference
from kernels.philox import VALUES, Mask

ATTENTION = F.scaled_dot_product_attention
CUDA = torch.device("cuda:0")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
OURS = tuple(
    ROOT + name for name in ("minibert", "kernels", "lora", "tasks", "training", "tests/pretended_runs")
)
LIBRARY = tuple(os.sep + os.path.join("torch", name) for name in ("amp", "optim", "nn", "utils"))
ANSWERS = {"_local_scalar_dense", "equal", "is_nonzero"}  # whose result is a number on the host
SIZED = {"nonzero", "masked_select", "unique_consecutive", "_unique2"}  # whose result's size is read back


class Counts:
    """What the device was asked to do since `clear`: operation -> launches, place -> copies and waits."""

    def __init__(self):
        self.launches, self.copies, self.waits = Counter(), Counter(), Counter()
        self.pinned: dict[
            int, Tensor
        ] = {}  # address of a storage -> its owner, which keeps the address taken
        self.waiting_is_an_error = False

    def clear(self) -> None:
        for counter in (self.launches, self.copies, self.waits):
            counter.clear()

    def wait(self, name: str) -> None:
        if self.waiting_is_an_error:
            raise RuntimeError(f"called a synchronizing CUDA operation: {name} at {place()}")
        self.waits[f"{place()} {name}"] += 1

    def copy(self, name: str, source: Tensor, non_blocking: bool) -> None:
        """From the host to the device."""
        if address(source) not in self.pinned:
            self.copies[f"{place()} {name}"] += 1
        elif not non_blocking:
            self.wait(name)


COUNTS = Counts()


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def place() -> str:
    """The line of the project under way, and below it the one of PyTorch's own Python, if any."""
    frame, below = sys._getframe(1), ""
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{file.removeprefix(ROOT)}:{frame.f_lineno}{below}"
        if not below and any(part in file for part in LIBRARY):
            below = f" ({file.rpartition('site-packages/')[2]}:{frame.f_lineno})"
        frame = frame.f_back
    return f"the autograd engine{below}"


class Pretended(Tensor):
    """A tensor on cuda:0; `real` holds its numbers, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor):
        layout = {"strides": real.stride(), "storage_offset": real.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, real.shape, dtype=real.dtype, device=CUDA, **layout)
        tensor.real_numbers = real
        return tensor

    def __repr__(self):
        return f"Pretended({self.real_numbers})"

    def data_ptr(self) -> int:
        return self.real_numbers.data_ptr()

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Sees what no argument shows: a tensor made with device="cuda"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


def real(x: object) -> object:
    if isinstance(x, Pretended):
        return x.real_numbers
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def call(func, args: tuple, kwargs: dict) -> object:
    """One operation, on whichever device its arguments are."""
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if name in ("is_pinned", "_pin_memory") or kwargs.get("pin_memory"):
        return pinned(name, func, args, kwargs)
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked).type
    here = any(isinstance(x, Pretended) for x in tensors)
    if name in ("_to_copy", "copy_"):
        moved = move(name, args, kwargs, asked)
        count = here and not moved
    else:
        if here:
            check_devices(func, name, args, tensors)
            count_waits(func, name, args, kwargs)
        count = here or asked == "cuda"
    out = func(*tree_map(real, args), **tree_map(real, kwargs))
    if count and not func.is_view:
        COUNTS.launches[name] += launches_of(name, args)
    return out if name in ANSWERS else answer(out, tensors, on_device(name, args, here, asked))


def on_device(name: str, args: tuple, here: bool, asked: str | None) -> bool:
    """Whether an operation's result is on the device."""
    if asked is not None:
        return asked == "cuda"
    return isinstance(args[0], Pretended) if name in ("_to_copy", "copy_") else here


def answer(out: object, tensors: list[Tensor], device: bool) -> object:
    """The result as a caller expects it: what was written in place is what was given."""
    if not device:
        given = {id(real(x)): x for x in tensors}
        return tree_map(lambda x: given.get(id(x), x) if isinstance(x, Tensor) else x, out)
    given = {id(x.real_numbers): x for x in tensors if isinstance(x, Pretended)}

    def wrap(x: object) -> object:
        if not isinstance(x, Tensor) or isinstance(x, Pretended):
            return x
        return given[id(x)] if id(x) in given else Pretended(x)

    return tree_map(wrap, out)


def check_devices(func, name: str, args: tuple, tensors: list[Tensor]) -> None:
    """Raises RuntimeError for tensors of two devices; a CPU tensor of no dimension counts as a number."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        tensors = [args[0], *(x for x in args[2:3] if isinstance(x, Tensor))]  # indices may lie on the CPU
    strangers = [tuple(x.shape) for x in tensors if not isinstance(x, Pretended) and x.dim() > 0]
    if strangers or (tensors and not isinstance(tensors[0], Pretended) and name.endswith("_")):
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} got cuda:0 and {strangers} on the cpu,"
            f" at {place()}"
        )


def count_waits(func, name: str, args: tuple, kwargs: dict) -> None:
    sized = name == "repeat_interleave" and func._overloadname == "Tensor" and not kwargs.get("output_size")
    if name in ANSWERS | SIZED or sized:
        COUNTS.wait(name)
    if name in ("index", "index_put_", "_index_put_impl_", "index_put"):
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                COUNTS.wait(f"{name} by bool")
            if index is not None and not isinstance(index, Pretended):
                COUNTS.copy(f"{name} by a CPU index", index, False)


def move(name: str, args: tuple, kwargs: dict, asked: str | None) -> bool:
    """Whether a copy crosses from one device to the other; counts it if so."""
    first, source = args[0], args[1] if name == "copy_" else args[0]
    to_device = isinstance(first, Pretended) if name == "copy_" or asked is None else asked == "cuda"
    if to_device == isinstance(source, Pretended):
        return False
    non_blocking = bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    if to_device:
        COUNTS.copy("copy to the device", source, non_blocking)
    elif not non_blocking:
        COUNTS.wait("copy to the host")
    return True


def pinned(name: str, func, args: tuple, kwargs: dict) -> object:
    """Pinned memory is memory like any other, kept in a list."""
    if name == "is_pinned":
        return not isinstance(args[0], Pretended) and address(args[0]) in COUNTS.pinned
    out = args[0].clone() if name == "_pin_memory" else func(*args, **{**kwargs, "pin_memory": False})
    COUNTS.pinned[address(out)] = out
    return out


class Kernel:
    """Stands for a Triton kernel: one launch, and what `compute` makes of the arguments by name."""

    def __init__(self, name: str, kernel, compute):
        self.name, self.fn, self.names, self.compute = name, kernel.fn, kernel.arg_names, compute

    def __getitem__(self, grid: tuple):
        return self.launch

    def launch(self, *args: object, **constants: object) -> None:
        if any(isinstance(x, Tensor) and not isinstance(x, Pretended) for x in args):
            raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor?): {self.name}")
        COUNTS.launches[f"triton {self.name}"] += 1
        names = (name.removesuffix("_ptr") for name in self.names)
        given = SimpleNamespace(**dict(zip(names, map(real, args), strict=False)), mask=None)
        if constants.get("DROPOUT") or self.name == "drop":  # which always drops
            where = (given.seed, given.step, given.site, given.first_row)
            given.mask = Mask(given.threshold / VALUES, *where)
            given.scale /= given.mask.scale  # a kernel is given the product
        with torch.no_grad():
            self.compute(given)


def outer(k: SimpleNamespace) -> None:
    if k.z is None:
        k.total.copy_(reference.lora_outer(k.h, k.x, k.scale, k.mask, k.gain))
    else:
        k.total[:-1], k.total[-1] = reference.lora_outer_dot(k.h, k.x, k.z, k.scale, k.gain, k.norm)


def backward_y(k: SimpleNamespace) -> None:
    k.dh[:], k.dB[:] = reference.lora_backward_y(k.dy, k.h, k.B, k.scale, k.gain)


def merge(k: SimpleNamespace) -> None:
    magnitude = torch.ones(len(k.W)) if k.magnitude is None and k.norm is not None else k.magnitude
    dtype = k.W.dtype if k.merged is None else k.merged.dtype
    made = reference.lora_merge(k.W, k.A, k.B, k.scale, magnitude, dtype, k.gained)
    for into, value in zip((k.merged, k.norm, k.gain), made, strict=True):
        if into is not None:
            into.copy_(value)


KERNELS = {
    "down": lambda k: k.h.copy_(reference.lora_down(k.x, k.A, k.scale, k.mask, k.gain)),
    "up": lambda k: reference.lora_up(k.y, k.h, k.B, k.scale, k.mask),
    "outer": outer,
    "backward_x": lambda k: k.dA.copy_(reference.lora_backward_x(k.x, k.dx, k.dh, k.A, k.mask)),
    "backward_y": backward_y,
    "merge": merge,
    "drop": lambda k: k.dropped.copy_(reference.lora_drop(k.x, k.mask)),
}


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """Give this process the device, for good."""
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _foreach_supported_types.append(Pretended)
    pretend_module(torch.cuda, capability)
    dispatch.why_not_fused = lambda device: ""  # no kernel is compiled, so no compiler is needed
    for name, compute in KERNELS.items():
        module = importlib.import_module(f"kernels.lora_{name}")
        module.kernel = Kernel(name, module.kernel, compute)
    Mask.keep = functools.lru_cache(1024)(Mask.keep)  # slow, pure, and needed twice
    F.scaled_dot_product_attention = FusedAttention.of
    Device().__enter__()


class FusedAttention(torch.autograd.Function):
    """A GPU's attention in one kernel, and two on the way back; without a GPU PyTorch takes many.

    It is computed as on a CPU. Dropout's mask comes from the default generator, as on a GPU. What comes out
    lies in memory as [S, T, N, D], as in attention.cu and attention_backward.cu: heads stand side by side.
    """

    @staticmethod
    def on_device(out: Tensor) -> Pretended:
        """out [S, N, T, D]"""
        return Pretended(out.transpose(1, 2).contiguous().transpose(1, 2))

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, **more: object) -> Tensor:
        if not isinstance(q, Pretended):
            return ATTENTION(q, k, v, attn_mask, dropout_p, **more)
        return FusedAttention.apply(q, k, v, attn_mask, dropout_p)

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
        COUNTS.launches["fused attention"] += 1
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.p, ctx.drawn_from = mask, p, torch.get_rng_state()
        return FusedAttention.on_device(ATTENTION(*map(real, (q, k, v, mask)), p))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        COUNTS.launches["fused attention"] += 2
        inputs = [real(x).detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.random.fork_rng(devices=()), torch.enable_grad():
            torch.set_rng_state(ctx.drawn_from)  # the same mask once more
            out = ATTENTION(*inputs, real(ctx.mask), ctx.p)
        return *map(FusedAttention.on_device, torch.autograd.grad(out, inputs, real(grad))), None, None


def pretend_module(cuda: ModuleType, capability: tuple[int, int]) -> None:
    """What the project and PyTorch's own Python ask `torch.cuda`."""

    def set_sync_debug_mode(mode: str | int) -> None:
        COUNTS.waiting_is_an_error = mode in ("error", 2)

    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "is_bf16_supported": capability >= (8, 0),
        "mem_get_info": (2**34, 2**34),
        "max_memory_allocated": 2**30,
        "get_device_name": "pretended",
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),  # the CPU's numbers are drawn, and saved, anyway
        "set_rng_state": None,
        "_lazy_init": None,
        "empty_cache": None,
        "device": nullcontext(),
        "device_of": nullcontext(),
        "current_stream": SimpleNamespace(cuda_stream=0),
    }
    for name, value in answers.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    cuda.default_generators = (torch.default_generator,)
    cuda.synchronize = lambda device=None: COUNTS.wait("synchronize")
    cuda.set_sync_debug_mode = set_sync_debug_mode
    cuda.get_sync_debug_mode = lambda: 2 * COUNTS.waiting_is_an_error
