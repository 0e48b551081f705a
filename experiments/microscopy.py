"""What finished runs made of one base's weights, as plain values; `experiments.microscope` shows them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from torch import Tensor

from experiments.left_out import LeftOut, usable
from experiments.masked_lm import LONGEST, Drift, drift, losses, mask, read_masked_head, sentences
from experiments.spectra import (
    closeness,
    effective_rank,
    left_vectors,
    magnitude_and_direction,
    rank_for_energy,
    singular_values,
)
from experiments.updates import Trained, Update, read_trained
from minibert.errors import InputError
from minibert.tokenizer import Tokenizer
from tasks.metrics import pearson
from training.config import Config


@dataclass(frozen=True)
class Module:
    """A linear layer that training may have changed: W -> W' = W + ΔW, all norms Frobenius's.

    Attributes:
        layer: the number of its BERT layer; None for the pooler.
        adapter_norm: ‖s · B A‖, where it has an adapter.
        values: the singular values of ΔW, in descending order; 0 is what rounding could have made.
        magnitude, direction: ΔM and ΔD of its rows.
        closest: of each first singular vector of W' its greatest |cosine| with one of W.
    """

    name: str
    layer: int | None
    part: str
    norm: float
    change: float
    adapter_norm: float | None
    values: tuple[float, ...]
    rank: int
    effective_rank: float
    rank_90: int
    magnitude: float
    direction: float
    closest: tuple[float, ...]

    def intruders(self, threshold: float) -> int:
        return sum(cosine < threshold for cosine in self.closest)


@dataclass(frozen=True)
class Group:
    """Modules together: those of a layer, or all of a run."""

    modules: tuple[Module, ...]

    @property
    def change(self) -> float:
        return math.sqrt(sum(one.change**2 for one in self.modules))

    @property
    def relative(self) -> float:
        """‖ΔW‖/‖W‖ over all of them."""
        return self.change / math.sqrt(sum(one.norm**2 for one in self.modules))

    @property
    def adapter_norm(self) -> float | None:
        norms = [one.adapter_norm for one in self.modules if one.adapter_norm is not None]
        return math.sqrt(sum(norm**2 for norm in norms)) if norms else None

    def mean(self, name: str) -> float:
        return mean(getattr(one, name) for one in self.modules)

    def intruders(self, threshold: float) -> int:
        return sum(one.intruders(threshold) for one in self.modules)

    @property
    def examined(self) -> int:
        return sum(len(one.closest) for one in self.modules)


@dataclass(frozen=True)
class Magnified:
    """A run seen closely; without modules if nothing of its encoder was trained.

    Attributes:
        outside: the share of the squared change that lies outside of the modules' weights.
        drift: of the masked-language-model loss; None if the base has no head for it.
    """

    path: Path
    config: Config
    modules: tuple[Module, ...]
    outside: float
    drift: Drift | None

    @property
    def all(self) -> Group:
        return Group(self.modules)

    @property
    def layers(self) -> dict[int | None, Group]:
        """By number; the pooler, which is in none, last."""
        numbers = sorted({one.layer for one in self.modules}, key=lambda at: math.inf if at is None else at)
        return {at: Group(tuple(one for one in self.modules if one.layer == at)) for at in numbers}

    @property
    def correlation(self) -> float | None:
        """Pearson's of ΔM with ΔD over the modules; None of fewer than three, or where one is constant."""
        pairs = np.array([(one.magnitude, one.direction) for one in self.modules])
        if len(pairs) < 3 or 0 in np.ptp(pairs, axis=0):
            return None
        return pearson(*pairs.T)


class Microscope:
    """Measures runs of one base model, whose singular vectors and masked sentences are made once."""

    def __init__(self, top: int):
        self.top = top
        self.first: Trained | None = None
        self.known: dict[str, Tensor] = {}
        self.masked_loss: Callable[[Trained], Drift] | None = None

    def look(self, trained: Trained) -> Magnified:
        """Raises:
        InputError: if the run is of another base than those before, or its weights are not finite.
        """
        if self.first is None:
            self.first, self.masked_loss = trained, masked_loss(trained)
        elif trained.sha256 != self.first.sha256:
            wanted = f"a run of the same base model as {self.first.path}, {self.first.config.model}"
            raise InputError(f"{trained.path}: expected {wanted}; it is of {trained.config.model}")
        modules = tuple(self._module(update) for update in trained.updates())
        found = self.masked_loss(trained) if self.masked_loss else None
        return Magnified(trained.path, trained.config, modules, trained.outside(), found)

    def _module(self, one: Update) -> Module:
        if one.name not in self.known:
            self.known[one.name] = left_vectors(one.before)
        change, norm = one.after - one.before, one.before.norm().item()
        values = singular_values(change, norm)
        magnitude, direction = magnitude_and_direction(one.before, one.after)
        return Module(
            name=one.name,
            layer=one.layer,
            part=one.part,
            norm=norm,
            change=change.norm().item(),
            adapter_norm=one.adapter_norm,
            values=tuple(values.tolist()),
            rank=int((values > 0).sum()),
            effective_rank=effective_rank(values),
            rank_90=rank_for_energy(values),
            magnitude=magnitude,
            direction=direction,
            closest=tuple(closeness(self.known[one.name], left_vectors(one.after, self.top)).tolist()),
        )


def masked_loss(trained: Trained) -> Callable[[Trained], Drift] | None:
    """What measures the drift of runs of the same base; None if it has no head."""
    head = read_masked_head(trained.base)
    if head is None:
        return None
    config = trained.start.config
    length = min(LONGEST, config.positions)
    masked = mask(sentences(), Tokenizer(trained.base, length, config.vocab_size))
    before = losses(trained.start, head, masked)
    counts = np.array([len(one.places) for one in masked])
    return lambda run: drift(before, losses(run.merged, head, masked), counts)


def magnify(paths: Sequence[Path], task: str | None, top: int) -> tuple[list[Magnified], list[LeftOut]]:
    """The runs of the first one's base model, and those that cannot be used.

    One at a time: of a large model only one is in memory beside the base.

    Raises:
        InputError: if there is no such folder, one is given twice, or none can be used.
    """
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise InputError(f"{paths[i]}: expected each run once, it is given twice")
    microscope = Microscope(top)
    return usable(paths, lambda path: microscope.look(read_trained(path, task)))
