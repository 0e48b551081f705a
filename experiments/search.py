"""A search by Optuna: a study for each space, and each trial a run that reports dev after every epoch.

Trials are asked for one at a time in a folder, with a sampler seeded by the trial's number, so that a search
of one job is the same however often it was stopped. Another process goes on with a trial whose own is gone.
"""

import json
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import IO

from experiments.cells import Cell
from experiments.pool import GridFolder, run_all
from experiments.runs import check_data, check_same, outcome_of, report
from experiments.space import Plan, Space, make_spaces, read_plan
from experiments.study import FrozenTrial, Study, Trial, TrialState, open_storage
from minibert.files import read_json


def run_search(table: Mapping, where: str, given: Namespace, say: Callable[[str], None]) -> int:
    """What `python -m experiments.grid` does with a search; its exit code.

    Raises:
        InputError: if the search makes no sense, or its folder or storage cannot be used.
    """
    spaces, plan = make_spaces(table, where, read_plan(table, where, given))
    if given.dry_run:
        say(listing(spaces, plan))
        return 0
    folder = GridFolder(given.out)
    folder.make()
    storage = open_storage(plan, folder)
    work = SearchWork([Study(space, plan, storage) for space in spaces], plan, folder, say)
    say(f"{len(spaces)} searches of {plan.trials} trials each in {given.out}, {work.done()} trials done")
    stopped = run_all(work, folder, given.jobs)
    if stopped:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 128 + stopped
    say(report(work.finished_here(), given.out))
    for study in work.studies:
        say(study.best())
    for name, error in work.failed.items():
        print(f"error: {name}: {error}", file=sys.stderr)
    return 1 if work.failed else 0


class SearchWork:
    """The trials of several studies, in turn, for a pool."""

    def __init__(self, studies: Sequence[Study], plan: Plan, folder: GridFolder, say: Callable[[str], None]):
        self.studies, self.plan, self.folder, self.say = studies, plan, folder, say
        self.here = f"{socket.gethostname()}:{folder.path.absolute()}"
        self.active: dict[str, tuple[Study, Trial]] = {}
        self.failed: dict[str, str] = {}

    def done(self) -> int:
        return sum(trial.state.is_finished() for study in self.studies for trial in study.trials())

    def finished_here(self) -> list[Cell]:
        told = [(study, trial) for study in self.studies for trial in study.trials()]
        return [study.cell(trial) for study, trial in told if trial.state == TrialState.COMPLETE]

    def _left(self, study: Study) -> list[FrozenTrial]:
        """Trials under way in this folder, but not by this process."""
        return [
            trial
            for trial in study.trials()
            if trial.state == TrialState.RUNNING
            and trial.user_attrs.get("folder") == self.here
            and study.cell(trial).name not in self.active
        ]

    def take(self) -> tuple[Cell, IO] | None:
        turn = self.folder.lock("search")  # or two processes would ask for the same trial
        if turn is None:
            return None
        with turn:
            for study in sorted(self.studies, key=lambda study: len(study.trials())):
                for left in self._left(study):
                    trial = Trial(study.study, left._trial_id)
                    if taken := self._start(study, trial):
                        return taken
                if trial := study.ask():
                    trial.set_user_attr("folder", self.here)
                    return self._start(study, trial)
        return None

    def _start(self, study: Study, trial: Trial) -> tuple[Cell, IO] | None:
        cell = study.cell(trial)
        lock = self.folder.lock(cell.name)
        if lock is not None:
            check_same(cell, self.folder.run(cell.name))
            self.active[cell.name] = study, trial
            return cell, lock
        return None

    def expects_more(self) -> bool:
        return any(len(study.trials()) < self.plan.trials or self._left(study) for study in self.studies)

    def prunes(self, cell: Cell) -> bool:
        """Report the epochs that are new; whether the pruner gives the run up, before its last epoch."""
        study, trial = self.active[cell.name]
        path = self.folder.run(cell.name) / "metrics.jsonl"
        if not path.exists():
            return False
        history = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        known = study.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        new = [line for line in history if line["epoch"] not in known]
        for line in new:
            trial.report(score(line["dev"]), line["epoch"])
        if not new:
            return False
        made = read_json(self.folder.run(cell.name) / "config.json")
        ended = history[-1]["step"] >= (made["max_steps"] or history[0]["step"] * made["epochs"])
        return not ended and bool(trial.should_prune())

    def ended(self, cell: Cell, error: str) -> None:
        if not error:
            self.prunes(cell)  # for the epochs since
        study, trial = self.active.pop(cell.name)
        result = self.folder.result(cell.name)
        if error:
            self.failed[cell.name] = error
            study.study.tell(trial, state=TrialState.FAIL)
            outcome = f"failed: {error}"
        elif result.exists():
            study.study.tell(trial, score(read_json(result)["dev"]))
            outcome = outcome_of(self.folder, cell)
        else:
            study.study.tell(trial, state=TrialState.PRUNED)
            outcome = "pruned"
        self.say(f"[{self.done()}/{self.plan.trials * len(self.studies)}] {cell.name}  {outcome}")


def score(dev: float | Mapping[str, float]) -> float:
    """The number that picks the best epoch: of several tasks the mean."""
    return fmean(dev.values()) if isinstance(dev, Mapping) else dev


def listing(spaces: Sequence[Space], plan: Plan) -> str:
    """A line a space, once its data has been read."""
    check_data([space.middle() for space in spaces])
    told = [f"{space.name}  {plan.trials} trials" for space in spaces]
    return "\n".join([*told, f"{plan.trials * len(spaces)} trials"])
