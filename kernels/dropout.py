"""Dropout whose mask is a pure function of (seed, rank, step, site, use), and cheap on a CPU.

PyTorch draws CPU masks one value after another: in a fine-tuning step that costs more than the matrix
products. Here a counter-based generator (Philox, Salmon et al. 2011) gives random bytes, one a value,
and the mask is applied by bitwise AND. Nothing of the generator has to be saved to resume a run.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dispatch import runs_kernels
from kernels.gradients import first_order
from kernels.philox import Mask, Masking

INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of a floating-point number's size in bytes


class DropoutKey:
    """What the masks of a training step depend on; the training loop sets `step`.

    A site may be used several times in a step, for each block of attention and each piece of a batch: its
    uses are counted, and setting `step` begins the count anew.
    """

    def __init__(self, seed: int, step: int = 0):
        self.seed, self.step = seed, step

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step, self._uses = step, Counter()

    def again(self) -> AbstractContextManager:
        """A context in which the draws that follow now are made once more, whatever was drawn since."""
        return self._again(Counter(self._uses))

    @contextmanager
    def _again(self, uses: Counter) -> Iterator[None]:
        since, self._uses = self._uses, uses
        try:
            yield
        finally:
            self._uses = since

    def next_use(self, site: int) -> int:
        """0 the first time a site asks in this step, then 1, 2, ..."""
        self._uses[site] += 1
        return self._uses[site] - 1


class _Generators(threading.local):
    """One for each thread: making one takes as long as a small mask, telling it where to begin does not."""

    def __init__(self):
        self.philox = np.random.Philox(0)


_of_thread = _Generators()
_START = np.random.Philox(0).state  # with nothing drawn yet


def keep_mask(shape: torch.Size, drop: int, seed: int, step: int, site: int, use: int = 0) -> Tensor:
    """int8: -1 (all bits set) where a value is kept, 0 where it is dropped, with probability drop / 256."""
    count = shape.numel()
    # Said to be uint64: of a list with a number from 2**63 on, NumPy makes floats, and seeds collide.
    key = np.array([seed % 2**64, (site << 40) + step], dtype=np.uint64)
    counter = np.array([0, 0, 0, use], dtype=np.uint64)
    _of_thread.philox.state = _START | {"state": {"counter": counter, "key": key}}
    bits = _of_thread.philox.random_raw(-(-count // 8)).view(np.uint8)[:count]
    kept = np.greater_equal(bits, drop, out=bits.view(np.bool_)).view(np.int8)  # 1 or 0, where the bits were
    return torch.from_numpy(np.negative(kept, out=kept)).view(shape)


class _Masked(torch.autograd.Function):
    """y = mask(x), a linear function and its own gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.mask = mask
        return mask(x)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.mask(grad), None


def masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(x AND mask) · scale: a bit mask of 0 or -1 promotes to any width and is cheaper than a product."""
    return (x.view(INTEGER[x.element_size()]) & mask).view(x.dtype).mul_(scale)


class Dropout(nn.Dropout):
    """y = x ⊙ keep / (1 - p) (Srivastava et al. 2014), with p rounded to 1/256ths: exactly unbiased.

    A p of at most 1/512 drops nothing, one below 1 never everything. `site` tells the layers of a model
    apart, `key` is shared by all of them. On a GPU PyTorch's own dropout is fast, and is used: its random
    numbers are those of `seed_generator`.
    """

    def __init__(self, p: float, key: DropoutKey, site: int):
        super().__init__(p)
        self.key, self.site = key, site
        self.drop = 256 if p == 1 else min(round(256 * p), 255)  # of 256 byte values

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        return _Masked.apply(x, self.draw(x)) if self.training and self.drop else x

    def draw(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """One mask for tensors like x, as the function that applies it; its own gradient, since linear."""
        if not self.training or self.drop == 0:
            return torch.positive  # +x, x itself
        if x.device.type != "cpu":
            return F.dropout(torch.ones_like(x), self.p).mul
        if self.drop == 256:
            return torch.zeros_like(x).mul
        use = self.key.next_use(self.site)
        mask = keep_mask(x.shape, self.drop, self.key.seed, self.key.step, self.site, use)
        return partial(masked, mask=mask, scale=256 / (256 - self.drop))

    def draw_rows(self, x: Tensor) -> Masking:
        """The same for x [M, K] in the low-rank path, whose kernels draw the mask themselves."""
        if not runs_kernels(x):
            return self.draw(x)
        site = (self.key.next_use(self.site) << 16) + self.site
        return Mask(self.p, self.key.seed, self.key.step, site)


def seed_of(*numbers: int) -> int:
    """One seed for several numbers, any of which changes it."""
    words = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)
    return int(words[0])


def seed_generator(device: torch.device, *numbers: int) -> None:
    """Have a GPU's masks from here on be a function of these numbers; a CPU's are one of their key.

    The seed goes along with what is queued next: the host waits for nothing.
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed_of(*numbers))


def draw(dropout: nn.Dropout, x: Tensor) -> Masking:
    """A mask for x [M, K] by any dropout layer; of one without a key, from PyTorch's random numbers."""
    if isinstance(dropout, Dropout):
        return dropout.draw_rows(x)
    return F.dropout(torch.ones_like(x), dropout.p).mul


def install_dropout(model: nn.Module, seed: int, rank: int = 0) -> DropoutKey:
    """Put this dropout in the place of every `nn.Dropout` in a model; the model need not know.

    Each process of a run draws masks of its own: the first one those of a run of one process.

    Sites are numbered in the order of `named_modules`, so they are the same in every run of a model.
    Installed again, all of them follow the new key.
    """
    key = DropoutKey(seed_of(seed, rank) if rank else seed)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    for site, (name, module) in enumerate(found):
        model.set_submodule(name, Dropout(module.p, key, site).train(module.training))
    return key
