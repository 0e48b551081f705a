"""One batch learnt by heart: the first thing to try if something is wrong."""

from contextlib import closing
from dataclasses import replace

from training.config import Config
from training.errors import TrainingError
from training.report import Bar
from training.run import Run

OVERFIT_STEPS = 300
OVERFIT_SHARE = 0.05


def overfit_batch(config: Config) -> int:
    """Train on one batch alone, without dropout or decay; 0 if its loss falls below 5 % of its start.

    Whatever is wired up wrong - labels, loss, gradients, learning rate - fails here first, in seconds.

    Raises:
        TrainingError: if it does not.
    """
    still = {"dropout": 0.0, "encoder_dropout": 0.0, "lora_dropout": 0.0, "weight_decay": 0.0}
    steps = config.max_steps or OVERFIT_STEPS
    run = Run(replace(config, **still, schedule="constant", max_steps=steps), one_batch=True)
    trainer = run.trainer
    trainer.model.train()
    losses = []
    with closing(Bar(steps, 0)) as bar:
        for done, total in trainer.encode_training_data():
            bar.encoded(done, total)
        while not trainer.finished:
            line = trainer.step()
            losses.append(line["loss"])
            bar.step(line, trainer.progress.tokens / trainer.progress.train_seconds)
    # Several tasks take turns; each one's last loss counts.
    last = sum(losses[-len(config.tasks) :]) / sum(losses[: len(config.tasks)])
    print(f"one batch of {config.batch_size}: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {steps} steps")
    if last >= OVERFIT_SHARE:
        raise TrainingError(f"expected a loss below {OVERFIT_SHARE:.0%} of its start, got {last:.1%}")
    return 0
