"""A space and its Optuna study: which trial is next, and which is the best."""

import shlex
from pathlib import Path

import numpy as np

from experiments.cells import Cell, Range, ranged
from experiments.pool import GridFolder
from experiments.space import INTEGERS, Plan, Space
from minibert.errors import InputError

try:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.storages import BaseStorage, JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, Trial, TrialState
    from sqlalchemy.exc import SQLAlchemyError
except ImportError:
    raise InputError("a search needs Optuna: pip install 'minibert[search]'") from None


def open_storage(plan: Plan, folder: GridFolder) -> BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if plan.storage is None:
        return JournalStorage(JournalFileBackend(str(folder.about("search", "journal"))))
    try:
        return optuna.storages.get_storage(plan.storage)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"search.storage: {plan.storage} cannot be used ({reason})") from None


class Study:
    """A space, and the Optuna study of its trials."""

    def __init__(self, space: Space, plan: Plan, storage: BaseStorage):
        self.space, self.plan = space, plan
        pruners = {
            "median": optuna.pruners.MedianPruner,
            "hyperband": optuna.pruners.HyperbandPruner,
            "none": optuna.pruners.NopPruner,
        }
        self.study = optuna.create_study(
            storage=storage,
            study_name=space.name,
            direction="maximize",
            pruner=pruners[plan.pruner](),
            load_if_exists=True,
        )
        self._check_same()

    def _check_same(self) -> None:
        """Raises:
        InputError: if the study was begun as another search; only its number of trials may change.
        """
        told = {name: list(one) if isinstance(one, tuple) else one for name, one in self.space.common.items()}
        axes = {name: str(axis.values) for name, axis in self.space.axes.items()}
        now = told | axes | {"sampler": self.plan.sampler, "seed of the search": self.plan.seed}
        before = self.study.user_attrs.get("search", now)
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                was = f"{name} {before.get(name)!r}, now it is {now.get(name)!r}"
                raise InputError(f"the search {self.space.name} was begun with {was}; use another --out")
        self.study.set_user_attr("search", now)

    def trials(self) -> list[FrozenTrial]:
        """Those of the budget: of one that two machines asked for at once too many, the last is none."""
        return self.study.get_trials(deepcopy=False)[: self.plan.trials]

    def ask(self) -> Trial | None:
        """The next trial, or None if all have been given out."""
        number = len(self.trials())
        if number == self.plan.trials:
            return None
        if self.plan.sampler == "grid":
            combinations = self.space.combinations()
            order = np.random.default_rng(self.plan.seed).permutation(len(combinations))
            self.study.enqueue_trial(combinations[order[number]])
        else:
            seed = int(np.random.SeedSequence([self.plan.seed, number]).generate_state(1)[0])
            random = self.plan.sampler == "random"
            sampler = optuna.samplers.RandomSampler if random else optuna.samplers.TPESampler
            self.study.sampler = sampler(seed=seed)
        trial = self.study.ask({name: self._distribution(name) for name in self.space.axes})
        if trial.number >= self.plan.trials:
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        return trial

    def _distribution(self, name: str) -> CategoricalDistribution | IntDistribution | FloatDistribution:
        axis = self.space.axes[name]
        if not ranged(axis):
            return CategoricalDistribution(self.space.choices(name))
        values: Range = axis.values
        kind = IntDistribution if name in INTEGERS else FloatDistribution
        return kind(values.low, values.high, log=values.log)

    def cell(self, trial: Trial | FrozenTrial) -> Cell:
        return self.space.cell(trial.number, trial.params)

    def best(self) -> str:
        """The command of the trial with the best dev score, the test set unseen."""
        trials = self.trials()
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        pruned, failed = (
            sum(trial.state == state for trial in trials) for state in (TrialState.PRUNED, TrialState.FAIL)
        )
        of = f"{self.space.name}, {len(trials)} trials ({pruned} pruned, {failed} failed)"
        if not complete:
            return f"{of}: none has finished"
        best = max(complete, key=lambda trial: trial.value)
        cell = self.cell(best)
        _, *arguments = cell.command(Path(cell.name))
        command = shlex.join(["python", "train.py", *arguments[:-3]])
        return f"{of}: best dev {best.value:.4f} by {cell.name}: {command}"
