"""The study's tables as data: what to run for each row, and what the study scored.

Stoll, Ho & Tyshler 2024, "Comparing BERT Fine-Tuning Methods" (CS224N, Stanford): bert-base-uncased on one
T4. Times are in seconds, memory in GiB of the GPU's peak. What a table leaves unsaid stands in its `note`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

TASK_NAMES = {"sst": "SST", "qqp": "Quora", "sts": "STS"}
DEV_ROWS = {"sst": 1101, "qqp": 40429, "sts": 863}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: what its own columns say.
        settings: fields of `Config` that make it this row; all others are the recipe's.
        dev, train: the study's scores by task; accuracy, of sts Pearson.
        loss, seconds, gib: as printed, where the table has them.
    """

    label: tuple[str, ...]
    settings: Mapping[str, object]
    dev: Mapping[str, float]
    train: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    seconds: float | None = None
    gib: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of the study.

    Attributes:
        columns: titles of the rows' labels.
        against: for each task the row, as (table, label), that its rows are compared with: what the study's
            finding is about is how far they are apart, which another encoder may share.
        note: what is to be said with it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    against: Mapping[str, tuple[str, tuple[str, ...]]]
    note: str = ""

    def best(self) -> "Table":
        """The rows that say so, compared with none."""
        return replace(self, rows=tuple(row for row in self.rows if "best" in row.label), against={})

    def references(self) -> dict[str, Row]:
        """For each task the row that `against` names."""
        return {
            task: next(row for row in TABLES[number].rows if row.label == label)
            for task, (number, label) in self.against.items()
        }


def clock(text: str) -> float:
    """ "17:32" or "3:03:00" -> seconds"""
    seconds = 0
    for part in text.split(":"):
        seconds = 60 * seconds + int(part)
    return float(seconds)


def one_task(task: str, label: tuple[str, ...], told: str, /, **settings) -> Row:
    """A row of one task from a line of its table, "dev train", "dev train time" or "dev train time GiB"."""
    dev, train, *rest = told.split()
    seconds = clock(rest[0]) if rest else None
    gib = float(rest[1]) if len(rest) > 1 else None
    settings = {"task": task} | settings
    return Row(label, settings, {task: float(dev)}, {task: float(train)}, seconds=seconds, gib=gib)


def methods(task: str, pair: str | None, lines: Mapping[str, str]) -> list[Row]:
    pairing = {"pair": pair} if pair else {}
    return [
        one_task(task, (TASK_NAMES[task], pair or "-", name), told, method=name, **pairing)
        for name, told in lines.items()
    ]


def learning_rates(task: str, lines: Mapping[float, str]) -> list[Row]:
    """Rows from "dev train loss time" of each rate, frozen and Siamese."""
    rows = []
    for lr, told in lines.items():
        dev, train, loss, time = told.split()
        settings = {"task": task, "method": "frozen", "lr": lr}
        if task != "sst":
            settings["pair"] = "siamese"
        scores = {task: float(dev)}, {task: float(train)}
        rows.append(Row((TASK_NAMES[task], f"{lr:g}"), settings, *scores, float(loss), clock(time)))
    return rows


def together(tasks: str, dev: tuple[float, ...], train: tuple[float, ...], loss: float, time: str) -> Row:
    names = tasks.split("+")
    label = " + ".join(TASK_NAMES[name] for name in names)
    settings = {"task": tasks, "method": "full", "lr": 1e-4, "pair": "siamese"}
    scores = dict(zip(names, dev, strict=True)), dict(zip(names, train, strict=True))
    return Row((label,), settings, *scores, loss, clock(time))


def decays(task: str, lines: Mapping[float, str]) -> list[Row]:
    return [
        one_task(task, (TASK_NAMES[task], f"{decay:g}"), told, method="full", weight_decay=float(decay))
        for decay, told in lines.items()
    ]


TARGETS = {
    "all": "all",
    "all dense": "dense",
    "query, value": "query value",
    "query, key, value": "query key value",
}

TABLES: dict[str, Table] = {
    "1": Table(
        "methods",
        ("task", "input", "method"),
        (
            *methods(
                "sst",
                None,
                {
                    "lora": ".4541 .4878 17:32 2.59",
                    "dora": ".4569 .4884 32:34 4.20",
                    "rslora": ".4777 .5202 17:31 2.62",
                    "full": ".5204 .9540 18:45 3.02",
                },
            ),
            *methods(
                "qqp",
                "siamese",
                {
                    "lora": ".7375 .7377 3:03:00 12.19",
                    "dora": ".7440 .7454 5:25:00 9.30",
                    "rslora": ".7523 .7572 2:43:00 5.99",
                },
            ),
            *methods(
                "qqp",
                "concat",
                {
                    "lora": ".8406 .8444 2:23:00 6.47",
                    "dora": ".8408 .8450 4:30:00 9.76",
                    "rslora": ".8532 .8598 2:22:00 6.47",
                    "full": ".8974 .9488 2:41:00 6.48",
                },
            ),
            *methods(
                "sts",
                "siamese",
                {
                    "lora": ".2532 .2861 17:31 3.74",
                    "dora": ".2559 .2911 33:04 6.28",
                    "rslora": ".3071 .3485 17:30 3.74",
                },
            ),
            *methods(
                "sts",
                "concat",
                {
                    "lora": ".8051 .8286 16:31 4.03",
                    "dora": ".8052 .8298 30:03 6.53",
                    "rslora": ".8152 .8420 16:25 4.03",
                    "full": ".8746 .9860 18:11 4.24",
                },
            ),
        ),
        {
            "sst": ("1", ("SST", "-", "full")),
            "qqp": ("1", ("Quora", "concat", "full")),
            "sts": ("1", ("STS", "concat", "full")),
        },
        "the study gives neither alpha nor the adapters' learning rate: alpha is 16, the rate our default",
    ),
    "2": Table(
        "target modules (LoRA, SST)",
        ("targets",),
        tuple(
            one_task("sst", (label,), told, method="lora", targets=tuple(TARGETS[label].split()))
            for label, told in {
                "all": ".4541 .4878 17:32 2.62",
                "all dense": ".4450 .4881 16:20 2.24",
                "query, value": ".4378 .4654 15:00 1.82",
                "query, key, value": ".4260 .4589 15:25 1.94",
            }.items()
        ),
        {"sst": ("2", ("all",))},
    ),
    "3": Table(
        "rank (LoRA, SST)",
        ("rank",),
        tuple(
            one_task("sst", (str(rank),), told, method="lora", rank=rank)
            for rank, told in {
                32: ".4614 .4881 17:56 2.69",
                16: ".4469 .4959 17:37 2.64",
                8: ".4541 .4878 17:31 2.62",
                4: ".4523 .4974 17:23 2.61",
                2: ".4369 .4844 17:19 2.61",
                1: ".4550 .5056 16:46 2.61",
            }.items()
        ),
        {"sst": ("3", ("8",))},
        "alpha is 16 at every rank in ours; the study does not say",
    ),
    "4": Table(
        "multi-task (full, Siamese)",
        ("tasks",),
        (
            together("qqp+sts", (0.7841, 0.3871), (0.8036, 0.9925), 1.6, "2:40:53"),
            together("sst+qqp", (0.4914, 0.7820), (0.9973, 0.8041), 1.585, "2:24:22"),
            together("sst+sts", (0.4523, 0.3623), (0.4698, 0.4483), 1.56, "5:04"),
            together("sst+qqp+sts", (0.4977, 0.7762, 0.3767), (0.9947, 0.7930, 0.9909), 1.485, "3:25:05"),
        ),
        {  # each task alone
            "sst": ("1", ("SST", "-", "full")),
            "qqp": ("5", ("Quora", "siamese")),
            "sts": ("5", ("STS", "siamese")),
        },
        "the study's losses repeat those of its table 6, and SST + STS's time is as printed",
    ),
    "5": Table(
        "Siamese against concatenation (full)",
        ("task", "input"),
        tuple(
            one_task(task, (TASK_NAMES[task], pair), told, method="full", pair=pair)
            for task, pair, told in (
                ("qqp", "siamese", ".7963 .7972 3:10:00"),
                ("qqp", "concat", ".8930 .8925 2:51:00"),
                ("sts", "siamese", ".3324 .9425 18:39"),
                ("sts", "concat", ".8721 .9860 18:46"),
            )
        ),
        {"qqp": ("5", ("Quora", "concat")), "sts": ("5", ("STS", "concat"))},
    ),
    "6": Table(
        "learning rate",
        ("task", "rate"),
        (
            *learning_rates(
                "sst",
                {
                    1e-4: ".2997 .3179 1.6 10:43",
                    3e-4: ".3497 .3653 1.56 10:14",
                    1e-3: ".3688 .3971 1.491 10:26",
                    3e-3: ".3906 .4197 1.485 10:22",
                    1e-2: ".3742 .4037 1.585 10:15",
                },
            ),
            *learning_rates(
                "sts",
                {
                    3e-4: ".2481 .2623 1.253 10:55",
                    1e-3: ".2655 .2961 1.234 10:51",
                    3e-3: ".2735 .3013 1.41 10:46",
                    1e-2: ".2675 .2984 1.527 10:29",
                },
            ),
            *learning_rates(
                "qqp",
                {
                    3e-4: ".6485 .6465 .6385 1:55:01",
                    1e-3: ".4852 .4858 .7083 1:54:53",
                    3e-3: ".5522 .5512 .6309 1:55:12",
                },
            ),
        ),
        {"sst": ("6", ("SST", "0.003")), "qqp": ("6", ("Quora", "0.0003")), "sts": ("6", ("STS", "0.003"))},
        "the study does not state the method; its numbers are those of the frozen baselines of table 8",
    ),
    "7": Table(
        "weight decay (full)",
        ("task", "decay"),
        (
            *decays("sst", {1: ".5241 .9346", 0.3: ".5223 .9568", 0.1: ".5268 .9484", 0.05: ".5204 .9428"}),
            *decays("sts", {4.5: ".8804 .9848", 4: ".8807 .9852", 3: ".8798 .9854", 1: ".8775 .9859"}),
        ),
        {"sst": ("7", ("SST", "0.05")), "sts": ("7", ("STS", "1"))},
    ),
    "8": Table(
        "best and baseline",
        ("task", "which"),
        (
            one_task("sst", ("SST", "best"), ".5268 .9484", method="full", weight_decay=0.1),
            one_task("sst", ("SST", "baseline"), ".3906 .4197", method="frozen", lr=3e-3),
            one_task("sts", ("STS", "best"), ".8816 .9923", method="full", weight_decay=4.0, epochs=11),
            one_task("sts", ("STS", "baseline"), ".2735 .3013", method="frozen", pair="siamese", lr=3e-3),
            one_task("qqp", ("Quora", "best"), ".9004 .9789", method="full", epochs=4),
            one_task("qqp", ("Quora", "baseline"), ".6485 .6465", method="frozen", pair="siamese", lr=3e-4),
        ),
        {"sst": ("8", ("SST", "best")), "qqp": ("8", ("Quora", "best")), "sts": ("8", ("STS", "best"))},
        "the study trained 10 epochs, yet names the 11th as STS's best",
    ),
}

# Of its best models on the test set: the mean of SST accuracy, Quora accuracy and (1 + STS Pearson) / 2.
OVERALL = 0.791
