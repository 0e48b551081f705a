"""One run from a config: read, build, train, write."""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from minibert.files import flush, write_json, write_text
from minibert.hub import resolve
from minibert.weights import read_config
from tasks.base import Example
from tasks.data import Dataset, epoch_order
from training.adapter_folder import pooled_classifier, save_adapter_folder
from training.best import best_per_task, of_kept, single
from training.build import (
    build_model,
    build_tokenizer,
    complete,
    decided_by_model,
    read_splits,
    start_heads,
)
from training.checkpoint import save_checkpoint
from training.config import PRECISIONS, Config, to_dict
from training.data_notes import origin
from training.errors import TrainingError
from training.evaluate import Prediction, predict
from training.flags import Keeping
from training.keeping import Pace, alone_in, keep
from training.loop import Trainer
from training.memory import give_back_memory, memory_once_imported, peak_memory_mib
from training.model_card import Scored, model_card
from training.precision import Choice, choose_device, choose_precision
from training.processes import ALONE, Processes
from training.profiling import StepProfile
from training.provenance import made_with, run_sha256
from training.report import Bar, closing_table, header, resumed
from training.resuming import go_on, load_newest
from training.run_folder import (
    RunFolder,
    append_line,
    save_model,
    start_run,
    write_predictions,
)
from training.signals import Interrupted
from training.tracking import Tracking


class Run:
    """Everything of one run, built and ready to train.

    Raises:
        InputError: for data, model files, a device or settings that cannot be used.
    """

    def __init__(self, config: Config, one_batch: bool = False, processes: Processes = ALONE):
        self.processes = processes
        self.device = choose_device(config.device)
        with processes.first_then_others():
            self.base = resolve(config.model)
            self.memory_at_start = memory_once_imported()
            self.splits = read_splits(config)
        self.choice = self._choose_precision(config.precision)
        precision = self.choice.precision
        # Folders by their whole path: a run is read back from wherever one stands.
        model = str(self.base.absolute()) if Path(config.model).is_dir() else config.model
        data = str(Path(config.data).absolute()) if config.data not in ("demo", "cs224n") else config.data
        config = replace(config, model=model, data=data, device=str(self.device), precision=precision)
        self.decided = decided_by_model(config, self.base)
        config = replace(config, **{name: one.value for name, one in self.decided.items()})
        config = complete(config, self.base, self.splits)
        self.config = config
        tokenizer = build_tokenizer(config, self.base)
        self.data: dict[str, dict[str, Dataset]] = {split: {} for split in ("train", "sample", "dev", "test")}
        for task in config.tasks:
            rows = dict(vars(self.splits[task.name]))
            if one_batch:
                rows = {"train": rows["train"][: config.batch_size]}
            else:
                rows["sample"] = sample(rows["train"], len(rows["dev"]), task.name)
            for split, by_task in self.data.items():
                if rows.get(split):
                    by_task[task.name] = Dataset(task, rows[split], tokenizer, config.siamese(task))
        model = build_model(config, self.base)
        start_heads(model, self.data["train"])
        self.trainer = Trainer(config, model, self.data["train"], self.device, processes)
        if self.choice.rates:
            self.trainer.progress.products = self.choice.rates._asdict()
        self.made_with = made_with(config, self.base, self.trainer.steps_per_epoch, processes.count)
        processes.check_same([self.made_with[kind] for kind in ("settings", "data file", "model file")])
        self.keeping = Keeping()

    def _choose_precision(self, name: str) -> Choice:
        """The first process's choice, in all: timed by each on its own, their choices could differ."""
        wait_for_first = name == "auto" and not self.processes.alone
        choice = Choice("auto")
        if self.processes.first or not wait_for_first:
            choice = choose_precision(name, self.device, read_config(self.base))
        if wait_for_first:
            told = self.processes.largest(PRECISIONS.index(choice.precision))  # `auto` is the least
            choice = choice._replace(precision=PRECISIONS[told])
        return choice

    def facts(self) -> dict[str, int]:
        """Numbers of parameters: what trains, and all."""
        counts = [(p.numel(), p.requires_grad) for p in self.trainer.model.parameters()]
        return {
            "trainable_parameters": sum(n for n, trains in counts if trains),
            "total_parameters": sum(n for n, _ in counts),
        }

    def train(
        self,
        folder: RunFolder,
        resume: bool,
        track: Sequence[str] = (),
        profiled: int = 0,
        keeping: Keeping | None = None,
        anyway: bool = False,
    ) -> int:
        """Train to the end, or until a signal, watched by the trackers in `track`; the exit code.

        The time of `profiled` steps is looked at. A run made otherwise is resumed only if it is `anyway`.
        """
        if not self.processes.first:
            return self._follow(folder, resume)
        self.keeping = keeping or self.keeping
        profiling = StepProfile(profiled, self.trainer.model, folder.path, self.trainer.total_steps)
        with alone_in(folder.path):
            self._begin(folder, resume, anyway)
            self.processes.wait()
            return self._train(folder, resume, track, profiling)

    def _follow(self, folder: RunFolder, resume: bool) -> int:
        """What any but the first process does: the same steps from the same state, and no word of its own."""
        self.processes.wait()  # until the first has said from where the run goes on
        if resume:
            load_newest(folder, self.trainer)
        try:
            scored = {"dev": self.data["dev"], "train": self.data["sample"]}
            self.trainer.run(scored, *[lambda *_: None] * 3)
        except Interrupted as stop:
            return stop.exit_code
        return 0

    def _train(self, folder: RunFolder, resume: bool, track: Sequence[str], profiling: StepProfile) -> int:
        trainer, progress = self.trainer, self.trainer.progress
        pace = Pace(self.keeping, progress.step)
        if self.choice.warning:
            print(self.choice.warning, file=sys.stderr)
        why = {name: one.source for name, one in self.decided.items()} | {"precision": self.choice.reason}
        told = header(self.config, self.splits, self.facts(), trainer, folder.path, why)
        print(
            told, *([resumed(trainer)] if resume else []), sep="\n", flush=True
        )  # where nothing can be said, no run begins
        if not folder.config.exists():
            start_run(folder, self.config)
        bar = Bar(trainer.total_steps, progress.step)
        tracking = Tracking(track, folder.path, self.config, progress.step)

        def on_step(line: dict) -> None:
            append_line(line, folder.steps)
            tracking.step(line, trainer.step_seconds)
            profiling.step(trainer.epoch_ended)
            bar.step(line, progress.tokens / progress.train_seconds)
            if pace.due(progress.step):
                self._checkpoint(folder)
                pace.wrote(progress.step)

        def on_epoch(line: dict) -> None:
            self._write_history(folder)
            self._save_own_best(folder)
            self._checkpoint(folder)
            pace.wrote(progress.step)
            tracking.epoch(line)
            bar.epoch(line)

        try:
            with closing(bar), tracking, profiling:
                scored = {"dev": self.data["dev"], "train": self.data["sample"]}
                trainer.run(scored, bar.encoded, on_step, on_epoch)
        except Interrupted as stop:
            self._checkpoint(folder)
            again = f"--resume --out {folder.path} goes on from there"
            print(f"{stop}: stopped after step {progress.step}, saved; {again}", file=sys.stderr)
            return stop.exit_code
        except TrainingError as error:
            self._checkpoint(folder)
            write_json({"error": str(error)} | error.about, folder.checkpoint / "failure.json")
            raise
        self._finish(folder)
        return 0

    def _begin(self, folder: RunFolder, resume: bool, anyway: bool) -> None:
        if resume and folder.config.exists():
            go_on(folder, self.trainer, self.made_with, anyway)
            self._write_history(folder)

    def _checkpoint(self, folder: RunFolder) -> None:
        trainer, progress = self.trainer, self.trainer.progress
        progress.scaler = trainer.scaler.state_dict()
        if folder.steps.exists():  # what a checkpoint says was done is on disk before it
            flush(folder.steps)
        save_checkpoint(
            folder.checkpoint,
            trainer.model,
            trainer.optimizer,
            trainer.best_weights,
            progress,
            self.made_with,
        )
        keep(folder.checkpoint, progress.step, self.keeping.kept)

    def _save_own_best(self, folder: RunFolder) -> None:
        """Before the checkpoint: a run that is killed between the two does the epoch again, and this."""
        if self.config.best == "mean" or self.config.adapters == "per-task":  # whose best weights are these
            return
        history = self.trainer.progress.history
        for task, own in best_per_task(self.config, history).items():
            if own["epoch"] == len(history):
                save_adapter_folder(folder.adapter_of(task), self.config, self.trainer.model, self.base)

    def _write_history(self, folder: RunFolder) -> None:
        history = self.trainer.progress.history
        write_text("".join(json.dumps(line) + "\n" for line in history), folder.metrics)

    def _finish(self, folder: RunFolder) -> None:
        """Write what the best epoch's weights are and say; result.json last: it marks a finished run."""
        model = self.trainer.model
        told = {}
        for split in ("dev", "test"):
            told[split] = {name: predict(model, one, self.device) for name, one in self.data[split].items()}
            write_predictions(folder, split, self.config.tasks, told[split])
        give_back_memory()  # an adapter is tried out on a model of its own before it is called saved
        save_model(folder, self.config, model, self.base)
        result = self.result() | {"files": run_sha256(folder.path)}
        write_text(self._card(result, told["dev"]), folder.card)
        write_json(result, folder.result)
        shutil.rmtree(folder.checkpoint, ignore_errors=True)
        print(closing_table(result, folder.path))

    def _card(self, result: Mapping, dev: Mapping[str, Prediction]) -> str:
        scored = [
            Scored(
                task,
                self.splits[task.name],
                dev[task.name],
                self.data["dev"][task.name].labels,
                origin(self.config, task),
            )
            for task in self.config.tasks
        ]
        classifier = pooled_classifier(self.config, self.trainer.model)
        return model_card(self.config, result, scored, classifier is not None)

    def result(self) -> dict:
        """What result.json says.

        `train_seconds` are those of the training steps, with what a frozen encoder reads for them beforehand.
        `tokens_per_second` is how fast they go through the data: a token counts each time that its example
        is trained on, whether or not the encoder reads it anew.
        """
        config, progress = self.config, self.trainer.progress
        start = self.memory_at_start if self.device.type == "cpu" else 0.0
        peak = max(start, peak_memory_mib(self.device))  # Linux counts to within some pages a core
        return {
            "task": config.task,
            "method": config.method,
            "pair": config.pair,
            "model": config.model,
            "data": config.data,
            "seed": config.seed,
            "metric": single({task.name: task.metrics[0] for task in config.tasks}),
            **of_kept(config, progress.history),
            "best_per_task": best_per_task(config, progress.history),
            "epochs": len(progress.history),
            "steps": progress.step - progress.rested,
            "train_seconds": round(progress.train_seconds, 3),
            "tokens_per_second": round(progress.tokens / progress.train_seconds, 1),
            "peak_memory_mib": round(peak, 1),
            "memory_above_start_mib": round(peak - start, 1),
            **self.facts(),
            "effective_scale": config.scaling,
            "lr": config.lr,
            "device": config.device,
            "precision": config.precision,
            "products_flops_per_second": progress.products,
            "rows": {name: self._rows(name) for name in self.splits},
            "skipped_steps": progress.skipped,
            "resumed_anyway": progress.changes,
            "config": to_dict(config),
            "sha256": {"data": self.made_with["data file"], "model": self.made_with["model file"]},
            **{name: self.made_with[name] for name in ("versions", "threads", "cpu", "gpu", "processes")},
        }

    def _rows(self, task: str) -> dict[str, int]:
        counts = {split: len(data[task]) for split, data in self.data.items() if task in data}
        return counts | {"skipped": len(self.splits[task].skipped)}


def sample(examples: list[Example], count: int, task: str) -> list[Example]:
    """The training examples that are scored: as many as dev has, always the same, as noisy as dev's score is.

    Scoring all of them after each epoch would take a fifth of a run's time.
    """
    return [examples[i] for i in sorted(epoch_order(len(examples), 0, task, 0)[:count])]


def default_out(config: Config) -> Path:
    """runs/TASK-METHOD-TIME, with a number behind it where two runs start in one second."""
    name = f"{config.task}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = 1
    while (path := Path("runs") / (name if taken == 1 else f"{name}-{taken}")).exists():
        taken += 1
    return path
