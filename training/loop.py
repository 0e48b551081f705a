"""The training loop: steps, epochs, the best weights, interruption."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from kernels.dropout import install_dropout, seed_generator
from lora.methods import METHODS
from tasks.data import Batch, Dataset
from tasks.mixture import Mixture
from tasks.model import TaskModel, objective
from training.best import dev_scores, epochs_kept, longest_wait, mean, single
from training.casting import cast_layer_by_layer
from training.checkpoint import Progress, load_trainable, trainable_state
from training.config import COMPARING, Config
from training.errors import TrainingError, not_finite
from training.evaluate import constant, encode_once, predict, score
from training.memory import give_back_memory, keep_freed_memory, wait_for
from training.optimizer import build_optimizer, lr_factor
from training.processes import ALONE, Processes, others_there
from training.recompute import recompute_layers
from training.signals import Interrupted, Received, stop_signals


def read(scalars: Sequence[Tensor]) -> list[float]:
    """Their values. The host waits for the device, so it asks for all of them at once."""
    return torch.stack(list(scalars)).cpu().tolist()


class Trainer:
    """Trains a model on its tasks' data; what is written, shown or saved is for others to decide.

    Attributes:
        progress: how far it is; `best_weights` are those of `best.epochs_kept`.
        step_seconds: what the last step took.
        encodes_once: nothing in the encoder trains, so that what it makes of an example never changes.
    """

    def __init__(
        self,
        config: Config,
        model: TaskModel,
        train: Mapping[str, Dataset],
        device: torch.device,
        processes: Processes = ALONE,
    ):
        keep_freed_memory()
        self.config, self.model, self.device, self.processes = config, model.to(device), device, processes
        self.together = config.adapters == "per-task"
        self.plan = Mixture(
            train,
            config.batch_size,
            config.seed,
            config.mixing_temperature,
            together=self.together,
            alike=config.order == "like-length",
            rank=processes.rank,
            processes=processes.count,
            most=config.micro_batch_size,
            apart=config.loss not in COMPARING,
        )
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch
        self.encodes_once = not any(parameter.requires_grad for parameter in model.bert.parameters())
        self.loss_weights = config.by_task("loss_weight", 1.0)
        head_lr = config.by_task("task_lr", config.lr)
        self.optimizer = build_optimizer(model, config.lr, config.weight_decay, head_lr)
        self.trained_by = {name: self._trained_by(name) for name in train}
        self.dropout_key = install_dropout(model, config.seed, processes.rank)
        if METHODS[config.method].trains_encoder and device.type != "cpu":
            cast_layer_by_layer(model.bert)
        if config.recompute:
            recompute_layers(model.bert, self.dropout_key)
        # Only fp16 can underflow; what trains is fp32, so there is nothing else to scale.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.progress = Progress()
        self.step_seconds = 0.0
        self.best_weights: dict[str, Tensor] = {}
        self.stopped = Received()
        self._told: int | None = None  # the signal that a process has told the others of in the last step

    @property
    def epoch(self) -> int:
        """The one under way, or just done: 1, 2, ...; 0 before the first step."""
        return -(-self.progress.step // self.steps_per_epoch)

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps or self.out_of_patience or self.all_rest

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` epochs brought no new best of the mean."""
        if self.config.patience is None or self.config.patience_of == "per-task":
            return False
        return len(self.progress.history) - self.progress.best_epoch >= self.config.patience

    @property
    def all_rest(self) -> bool:
        """Whether all turns to come are of tasks that rest."""
        last = min(self.total_steps, self.progress.step + self.steps_per_epoch)
        resting = self.resting
        return bool(resting) and all(
            resting.issuperset(self.plan.turns.tasks(step)) for step in range(self.progress.step, last)
        )

    @property
    def resting(self) -> set[str]:
        """The tasks that take no more turns: `patience` epochs in a row brought no new best of theirs."""
        if self.config.patience_of != "per-task":
            return set()
        scores = dev_scores(self.config, self.progress.history)
        return {name for name, one in scores.items() if longest_wait(one) >= self.config.patience}

    @property
    def epoch_ended(self) -> bool:
        return self.finished or self.progress.step % self.steps_per_epoch == 0

    @property
    def unscored(self) -> bool:
        """Whether an epoch's steps are done and its scores are not; a run may be stopped in between."""
        return self.epoch_ended and len(self.progress.history) < self.epoch

    def encode_training_data(self) -> Iterator[tuple[int, int]]:
        """Where nothing in the encoder trains, have it read once what the steps train on; else do nothing.

        Yields the number of examples that are done, and of all. This is training work: its seconds count in
        the epoch under way, and once more in a resumed run. A token counts when a step trains on its example,
        as in the other methods, so in every epoch again, though it is read once.
        """
        if not self.encodes_once or self.finished:
            return
        used = {name: self.plan.used(name, self.total_steps) for name in self.plan.names}
        done, total = 0, sum(map(len, used.values()))
        started = time.perf_counter()
        for name, among in used.items():
            data = self.plan.datasets[name]
            for count in encode_once(self.model, data, self.device, among, self.processes):
                self._spend(time.perf_counter() - started)
                done = min(done + count * self.processes.count, total)
                yield done, total
                started = time.perf_counter()

    def compile_kernels(self) -> None:
        """On a GPU do the next step's work and drop it, so that Triton compiles now and in no step's time.

        It changes nothing: masks are drawn anew in each step, from the step's own seed.
        """
        if self.device.type == "cuda" and not (self.finished or self.resting):
            step = self.progress.step
            self._backward(step, self.plan.pieces_of(step))
            self.optimizer.zero_grad(set_to_none=True)
            wait_for(self.device)

    def losses(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Each task's own; of several tasks from one pass of the encoder."""
        if self.together:
            batches = self.model.encode_together(batches, self.device)
        else:
            batches = {name: batch.to(self.device) for name, batch in batches.items()}
        tasks = {name: self.plan.datasets[name].task for name in batches}
        return {
            name: objective(self.model, tasks[name], self.config.loss or tasks[name].loss, batch)
            for name, batch in batches.items()
        }

    def step(self) -> dict:
        """One optimiser step; its line of steps.jsonl.

        Raises:
            TrainingError: if the loss or the gradient is not finite (in fp16 such a step is skipped first).
        """
        started = time.perf_counter()
        step, config = self.progress.step, self.config
        factor = lr_factor(step, self.total_steps, config.warmup, config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        pieces = self.plan.pieces_of(step, without=self.resting)
        (losses, told), batches = self._backward(step, pieces), pieces[0]
        self.scaler.unscale_(self.optimizer)
        norms = [self._clip(name) for name in batches]
        numbers = read([*losses.values(), *norms, *told])  # the one time that a step waits for the device
        values, norms = (dict(zip(batches, part, strict=False)) for part in (numbers, numbers[len(norms) :]))
        self._told = int(numbers[-1]) if told else None
        for name, batch in batches.items():
            self._check_finite(step, name, batch, values[name], norms[name])
        norm = math.hypot(*norms.values())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.skipped += not math.isfinite(norm)
        self.step_seconds = time.perf_counter() - started
        tokens = sum(batch.tokens for batch in batches.values())
        self._count(sum(values.values()), len(values), tokens, self.step_seconds)
        line = {
            "step": step + 1,
            "task": "+".join(batches),
            "loss": sum(values.values()) / len(values),
            "lr": config.lr * factor,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": tokens,
        }
        return line | ({"losses": values} if self.together else {})

    def _backward(self, step: int, pieces: Sequence[Mapping[str, Batch]]) -> tuple[dict[str, Tensor], Tensor]:
        """Leave the gradient of the whole batch, summed over its pieces and the processes.

        Its losses, and the largest number of the signals that any process has received.
        """
        total = dict.fromkeys(pieces[0], 0.0)
        self.dropout_key.step = step  # pieces go on counting the uses of each site, and so draw other masks
        for number, batches in enumerate(pieces):
            seed_generator(self.device, self.config.seed, self.processes.rank, step, number)
            with others_there(self.processes):
                losses = self.losses(batches)
            losses = {name: batches[name].weight * loss for name, loss in losses.items()}
            self.scaler.scale(sum(self.loss_weights[name] * loss for name, loss in losses.items())).backward()
            total = {name: total[name] + loss.detach() for name, loss in losses.items()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]  # of the same ones in all processes
        apart = [total[name] for name, batch in batches.items() if batch.share and batch.share.apart]
        signals = self.processes.place(self.stopped.signum)
        self.processes.sum_all([*gradients, *apart, signals])  # of other losses each has computed all
        return total, [] if self.processes.alone else [signals.max()]

    def _trained_by(self, task: str) -> list[torch.nn.Parameter]:
        """All that trains or, of tasks that step together, what is the task's own."""
        names = {parameter: name.split(".") for name, parameter in self.model.named_parameters()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [p for p in parameters if not self.together or task in names[p]]

    def _clip(self, task: str) -> Tensor:
        """Bound the gradient of what a task's batch trains; what its norm was."""
        # A bound that did not grow with the weight would undo it wherever gradients are clipped.
        bound = self.loss_weights[task] * self.config.max_grad_norm or math.inf
        return torch.nn.utils.clip_grad_norm_(self.trained_by[task], bound)

    def _check_finite(self, step: int, task: str, batch: Batch, loss: float, norm: float) -> None:
        # fp16's loss scale is lowered until the gradient is finite; at 1 it scales nothing, as without fp16.
        if not math.isfinite(loss) or (not math.isfinite(norm) and self.scaler.get_scale() <= 1):
            raise not_finite("gradient" if math.isfinite(loss) else "loss", step + 1, task, batch)

    def rest(self) -> None:
        """Let the turns of tasks that rest go by: the schedule and all other batches stay as they are."""
        self.progress.step += 1
        self.progress.rested += 1

    def _count(self, loss: float, turns: int, tokens: int, seconds: float) -> None:
        self.progress.epoch_loss += loss
        self.progress.epoch_turns += turns
        self.progress.tokens += tokens
        self._spend(seconds)

    def _spend(self, seconds: float) -> None:
        self.progress.epoch_seconds += seconds
        self.progress.train_seconds += seconds

    def end_epoch(self, scored: Mapping[str, Mapping[str, Dataset]]) -> dict:
        """Score `scored` (split -> task -> data) and keep the weights if best; the line of metrics.jsonl."""
        progress, epoch = self.progress, self.epoch
        give_back_memory()  # or what scoring takes would come on top of what the steps took
        with self.stopped.at_once() if self.processes.alone else nullcontext():
            told = {split: self.scores(data) for split, data in scored.items()}
        scores = {split: one for split, (one, _) in told.items()}
        leading = {
            split: {task: next(iter(one.values())) for task, one in scores[split].items()} for split in scores
        }
        line = {"epoch": epoch, "loss": progress.epoch_loss / progress.epoch_turns}
        line |= {split: single(leading[split]) for split in scores}
        line |= {"seconds": round(progress.epoch_seconds, 3), "step": progress.step, "metrics": scores}
        line["constant"] = told["dev"][1]
        progress.history.append(line)
        progress.epoch_loss = progress.epoch_seconds = 0.0
        progress.epoch_turns = 0
        if progress.best is None or mean(leading["dev"]) > mean(progress.best):
            progress.best, progress.best_epoch = leading["dev"], epoch
        self._keep_best()
        return line

    def _keep_best(self) -> None:
        """The weights of the epoch just scored, if it is the best; else, or of each task, what they were."""
        kept, epoch = epochs_kept(self.config, self.progress.history), self.progress.history[-1]["epoch"]
        new = {task for task, one in kept.items() if one == epoch}
        for name, tensor in trainable_state(self.model).items():
            # Either all tasks keep one epoch, or whatever trains is some task's own.
            if len(new) == len(kept) or new.intersection(name.split(".")):
                self.best_weights[name] = tensor.clone()

    def scores(self, data: Mapping[str, Dataset]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Each task's scores; and the value that is predicted for all of its examples, if it is one."""
        scores, same = {}, {}
        for name, one in data.items():
            if self.encodes_once and one.features is None:
                for _ in encode_once(self.model, one, self.device, processes=self.processes):
                    pass
            prediction = predict(self.model, one, self.device, processes=self.processes)
            if not prediction.is_finite:
                step = self.progress.step
                raise TrainingError(f"step {step}: a prediction of {name} is not finite; try a lower --lr")
            scores[name] = score(one.task, prediction, one.labels)
            if (value := constant(one.task, prediction)) is not None:
                same[name] = value
        return scores, same

    def run(
        self,
        scored: Mapping[str, Mapping[str, Dataset]],
        on_encoded: Callable[[int, int], None],
        on_step: Callable[[dict], None],
        on_epoch: Callable[[dict], None],
    ) -> None:
        """Train to the end from wherever `progress` is, then put the best weights into the model.

        Raises:
            Interrupted: after the step or the batch under way, if a signal came; scores are left.
        """
        with stop_signals() as self.stopped:
            self.model.train()
            for done, total in self.encode_training_data():
                on_encoded(done, total)
                if self.processes.alone:
                    self.stopped.check()
            self.compile_kernels()
            while self.unscored or not self.finished:
                self._check_stopped()
                if self.unscored:
                    on_epoch(self.end_epoch(scored))
                elif self.resting.issuperset(self.plan.turns.tasks(self.progress.step)):
                    self.rest()
                else:
                    on_step(self.step())
            self._check_stopped()
        load_trainable(self.model, self.best_weights)

    def _check_stopped(self) -> None:
        """Between the same two steps in all processes, whichever of them a signal came to."""
        # One that comes after the others were told of none is left for the next time.
        told, self._told = self._told, None
        if signum := self.processes.largest(self.stopped.signum) if told is None else told:
            raise Interrupted(signum)
