"""What a run says on the terminal: a header, a progress bar, a line an epoch, a closing table."""

import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from training.build import Splits
from training.config import Config
from training.data_notes import warnings
from training.loop import Trainer

SHOWN_ROWS = 5  # skipped rows named in the header; the rest are counted


def header(
    config: Config,
    splits: Mapping[str, Splits],
    facts: Mapping[str, int],
    trainer: Trainer,
    out: Path,
    why: Mapping[str, str] = {},
) -> str:
    """Everything that decides a run, before it starts; `why`: the reason for a setting that was left open."""
    lines = []
    for task in config.tasks:
        one, pair = splits[task.name], f" ({config.pair})" if task.is_pair else ""
        counts = [f"{len(one.train):,} train", f"{len(one.dev):,} dev"]
        counts += [f"{len(one.test):,} test"] if one.test else []
        lines.append(f"task       {task.name}{pair}, {config.data}: {', '.join(counts)}")
        if one.skipped:
            lines.append(f"           {len(one.skipped)} rows skipped:")
            lines += [f"             {row.where}: {row.reason}" for row in one.skipped[:SHOWN_ROWS]]
            if len(one.skipped) > SHOWN_ROWS:
                lines.append(f"             and {len(one.skipped) - SHOWN_ROWS} more")
        lines += [f"warning    {task.name}: {text}" for text in warnings(task, one)]
    pooling, length, precision = (
        f" ({why[name]})" if why.get(name) else "" for name in ("pooling", "max_length", "precision")
    )
    read = f"{config.pooling} pooling{pooling}, at most {config.max_length} tokens{length}"
    lines.append(f"model      {config.model}, {read}")
    trainable, total = facts["trainable_parameters"], facts["total_parameters"]
    share = f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%})"
    lines.append(f"method     {config.method}: {share}")
    if config.scaling is not None:
        targets = " ".join(config.targets)
        scale = f"alpha {config.alpha:g}, effective scale {config.scaling:.4g}"
        each = " for each task" if config.adapters == "per-task" else ""
        lines.append(f"adapters   rank {config.rank}{each}, {scale}, targets {targets}")
    if len(config.tasks) > 1:
        turns = ", ".join(f"{task} {count:,}" for task, count in trainer.plan.turns.per_epoch.items())
        of = "in" if trainer.together else "of"
        lines.append(f"mixture    {config.sampling}; {of} {trainer.steps_per_epoch:,} steps an epoch {turns}")
    steps, epochs = trainer.total_steps, trainer.total_steps / trainer.steps_per_epoch
    pace = f"{steps:,} steps ({epochs:.4g} epochs) of {config.batch_size}"
    lines.append(f"training   {pace}, learning rate {config.lr:g} {config.schedule}, seed {config.seed}")
    lines.append(f"computing  {config.precision} on {config.device}{precision}")
    lines.append(f"output     {out}")
    return "\n".join(lines)


def resumed(trainer: Trainer) -> str:
    """From where a run goes on."""
    progress, epochs = trainer.progress, -(-trainer.total_steps // trainer.steps_per_epoch)
    if not progress.step:
        where = "no step was saved: from the first"
    elif trainer.finished and not trainer.unscored:
        where = f"after step {progress.step:,}, the last; the results are still to be written"
    else:
        epoch = f"epoch {len(progress.history) + 1} of {epochs}"
        where = f"after step {progress.step:,} of {trainer.total_steps:,}, in {epoch}"
    return f"resumed    {where}"


class Bar:
    """The progress bar: loss, real tokens per second, time to go. Epochs are printed above it."""

    def __init__(self, total: int, done: int):
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            leave=False,
            disable=None,  # where nobody watches
        )

    def encoded(self, done: int, total: int) -> None:
        """Before the first step of a run whose encoder never changes."""
        self.bar.set_postfix_str(f"encoding once: {done:,} of {total:,} examples")

    def step(self, line: Mapping, tokens_per_second: float) -> None:
        self.bar.set_postfix_str(f"loss {line['loss']:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def epoch(self, line: Mapping) -> None:
        self.bar.clear()
        scores = f"dev {numbers(line['dev'])}  train {numbers(line['train'])}"
        told = f"epoch {line['epoch']:>3}  loss {line['loss']:.4f}  {scores}  {line['seconds']:.1f} s"
        print(told + "".join(f"  {one}" for one in constants(line)), flush=True)

    def close(self) -> None:
        self.bar.close()


def numbers(scores: float | Mapping[str, float]) -> str:
    if isinstance(scores, Mapping):
        return " ".join(f"{task} {value:.4f}" for task, value in scores.items())
    return f"{scores:.4f}"


def constants(told: Mapping) -> list[str]:
    """What an epoch's line or a result says of tasks for whose every dev example one value is predicted."""
    return [f"{task}: predicts {value:.4g} for all of dev" for task, value in told["constant"].items()]


def epochs(best: int | Mapping[str, int]) -> str:
    """`epoch 3`, or of tasks that keep one each `epochs sst 1, sts 3`"""
    if isinstance(best, Mapping):
        return "epochs " + ", ".join(f"{task} {epoch}" for task, epoch in best.items())
    return f"epoch {best}"


def closing_table(result: Mapping, out: Path) -> str:
    """The result, for people; result.json has it for programs."""
    peak, above = result["peak_memory_mib"], result["memory_above_start_mib"]
    rows = {
        f"dev {numbers_name(result['metric'])}": f"{numbers(result['dev'])} ({epochs(result['best_epoch'])})",
        **{
            f"{task}'s own best": f"{own['dev']:.4f} (epoch {own['epoch']})"
            for task, own in result["best_per_task"].items()
            if len(result["best_per_task"]) > 1
        },
        **({"warning": ", ".join(constants(result))} if result["constant"] else {}),
        "train": numbers(result["train"]),
        "training": f"{result['train_seconds']:.1f} s, {result['tokens_per_second']:,.0f} tokens/s",
        "peak memory": f"{peak:,.0f} MiB ({above:,.0f} above start)",
        "written": str(out),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def numbers_name(metric: str | Mapping[str, str]) -> str:
    return metric if isinstance(metric, str) else "scores"
