"""All settings of a run. Imports no torch, so that `--help` and usage errors answer at once."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

from lora.methods import LARGEST_ALPHA, LARGEST_RANK, METHODS
from lora.placement import TARGET_SETS, check_ranks, check_targets
from minibert.errors import InputError
from tasks import TASKS
from tasks.base import Task
from tasks.own import from_json, to_json

PAIRS = ("concat", "siamese")
FEATURES = ("uv", "uv-diff", "uv-diff-prod", "cosine")
SCORE_LOSSES = ("mse", "pearson", "cosent")
COMPARING = ("pearson", "cosent", "simcse", "simcse-unsup")  # a batch's examples with one another
SIDE_LOSSES = ("cosine", "contrastive", "simcse", "simcse-unsup")  # of the two sides' vectors
LOSSES = ("cross-entropy", *SCORE_LOSSES, *SIDE_LOSSES)
POOLINGS = ("cls", "pooler", "mean")
SCHEDULES = ("linear", "cosine", "constant")
# How several tasks share the steps, as the temperature T of `tasks.mixture`; None: --temperature says it.
SAMPLINGS = {"round-robin": math.inf, "proportional": 1.0, "sqrt": 2.0, "temperature": None}
BESTS = ("mean", "per-task")
ADAPTERS = ("shared", "per-task")
ORDERS = ("random", "like-length")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
QUOTES = ("csv", "plain")


def setting(default, text: str, choices: tuple[str, ...] | None = None, names: str = "", added: bool = False):
    """A field with the text and the choices its flag shows; `names` is what the items of a list are called.

    `added` marks one that older runs' config.json lacks; its default is what they did.
    """
    about = {"help": text, "choices": choices, "names": names, "added": added}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Config:
    """The settings of a run; None stands for a default that depends on the others, until `complete`."""

    task: str = setting(
        "sts",
        f"{', '.join(TASKS)}, or FILE.toml of your own, or several joined by +: one encoder, a head each",
    )
    method: str = setting("rslora", "what trains in the encoder", tuple(METHODS))
    pair: str = setting("concat", "a pair as one sequence, or each side on its own", PAIRS)
    features: str | None = setting(
        None,
        "how a Siamese head compares two vectors [cosine for scores, uv-diff-prod for classes]",
        FEATURES,
    )
    model: str = setting(
        "all-MiniLM-L6-v2", "a known name, org/name@revision on the Hugging Face hub, or a folder"
    )
    data: str = setting(
        "demo", "demo (built in), cs224n (downloaded), or a folder of files in the same format"
    )
    max_length: int | None = setting(
        None, "tokens of a sequence; what is longer is cut [the model's max_seq_length, else 256]"
    )
    pooling: str | None = setting(
        None, "hidden states -> vector [the model's 1_Pooling, mean for MiniLM; else cls]", POOLINGS
    )
    loss: str | None = setting(None, "training loss: docs/siamese.md [the task's own]", LOSSES)
    rank: int = setting(8, "r of the adapters")
    alpha: float | None = setting(
        None, "alpha of the adapters [2r; rslora 2 sqrt(r): an effective scale of 2]"
    )
    lora_dropout: float = setting(0.0, "dropout before the adapters")
    targets: tuple[str, ...] = setting(
        ("all",), f"adapted linears: {', '.join(TARGET_SETS)}, names as query, paths, all@0-2", names="TARGET"
    )
    rank_pattern: tuple[str, ...] = setting(
        (), "ranks of some of them, as query=16 or all@0-2=4", names="TARGET=RANK", added=True
    )
    adapters: str = setting(
        "shared", "of several tasks: one for all, or one each, trained in mixed batches", ADAPTERS, added=True
    )
    sampling: str = setting(
        "round-robin", "how several tasks share the steps: docs/multitask.md", tuple(SAMPLINGS), added=True
    )
    temperature: float | None = setting(
        None, "T of temperature sampling: shares go as n^(1/T) [the strategy's own]", added=True
    )
    task_lr: tuple[str, ...] = setting(
        (), "peak learning rates of some tasks' heads, as sts=2e-3", names="TASK=LR", added=True
    )
    loss_weight: tuple[str, ...] = setting(
        (), "weights of some tasks' losses, 1 for others", names="TASK=WEIGHT", added=True
    )
    task_dropout: tuple[str, ...] = setting(
        (), "dropout of some tasks' heads", names="TASK=DROPOUT", added=True
    )
    epochs: int | None = setting(None, "passes over the largest task's data [10; 2 above 100,000 rows]")
    max_steps: int | None = setting(
        None, "end after so many steps, mid-epoch if need be; the schedule's length too [all of the epochs]"
    )
    best: str = setting(
        "mean", "keep the weights of the best mean, or each task's best adapter too", BESTS, added=True
    )
    patience: int | None = setting(
        None, "end after so many epochs without a new best of the dev scores' mean [never]", added=True
    )
    patience_of: str = setting(
        "mean", "whose new best is waited for; a task's: it takes no more turns", BESTS, added=True
    )
    batch_size: int = setting(32, "examples of a step")
    micro_batch_size: int | None = setting(
        None,
        "so many at most go through the model at once, for the same gradient [all]",
        added=True,
    )
    recompute: bool = setting(
        False, "on the way back compute each layer's activations again, and keep none of them", added=True
    )
    order: str = setting(
        "random", "of the examples; like-length: each batch's are of nearly one length", ORDERS, added=True
    )
    lr: float | None = setting(
        None, f"peak learning rate [{', '.join(f'{n} {m.lr:g}' for n, m in METHODS.items())}]"
    )
    weight_decay: float = setting(0.01, "AdamW's, of matrices alone")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 does not clip")
    dropout: float = setting(0.3, "the head's dropout")
    encoder_dropout: float | None = setting(
        None, "BERT's own dropout [the checkpoint's; the frozen encoder has none]"
    )
    hidden_layers: int = setting(0, "the head's hidden layers")
    schedule: str = setting("linear", "the learning rate after warm-up", SCHEDULES)
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises from 0")
    seed: int = setting(0, "of initial weights, data order and dropout")
    device: str = setting("auto", "cpu, cuda, cuda:1, ... [cuda where there is one]")
    precision: str = setting(
        "auto", "of activations; what trains stays in fp32 [on a CPU the faster one, timed first]", PRECISIONS
    )
    strict: bool = setting(False, "a row without text or label is an error, not skipped")
    quotes: str = setting(
        "csv", "of the data files: around fields as in CSV, or plain characters", QUOTES, added=True
    )
    own: tuple[str, ...] = setting(
        (),
        "definitions of tasks of your own, as a run keeps them",
        names="JSON",
        added=True,
    )

    @property
    def tasks(self) -> tuple[Task, ...]:
        known = TASKS | {task.name: task for task in map(from_json, self.own)}
        return tuple(known[name] for name in self.task.split("+"))

    @property
    def scaling(self) -> float | None:
        """The factor s of the low-rank update, what rsLoRA and LoRA differ in."""
        method = METHODS[self.method]
        return method.scaling(self.alpha, self.rank) if method.layer else None

    @property
    def mixing_temperature(self) -> float:
        """T: a task's share of the steps is ∝ n^(1/T)."""
        return self.temperature or SAMPLINGS[self.sampling]

    def by_task(self, name: str, otherwise: float) -> dict[str, float]:
        """Of a setting that is a list of TASK=NUMBER each task's number, `otherwise` where it has none."""
        return {task.name: otherwise for task in self.tasks} | numbers(getattr(self, name))

    def siamese(self, task: Task) -> bool:
        return self.pair == "siamese" and task.is_pair


def check(config: Config) -> Config:
    """The config, with the defaults filled in that need no model or data.

    Raises:
        InputError: naming the flag, for a value that is none of its choices, out of range, or in conflict.
    """
    names, own = config.task.split("+"), {}
    for text in config.own:
        task = from_json(text)
        if task.name in TASKS or task.name in own:
            raise InputError(f"--own: expected another name, there is a task {task.name!r} already")
        own[task.name] = to_json(json.loads(text))
    for name in names:
        if name not in TASKS.keys() | own:
            wanted = f"{', '.join(TASKS)}, or several joined by +, or FILE.toml of your own"
            raise InputError(f"--task: expected {wanted}; got {name!r}")
    config = replace(config, own=tuple(own[name] for name in names if name in own))
    if len(set(names)) < len(names):
        raise InputError(f"--task: expected each task once, got {config.task!r}")
    for one in fields(Config):
        choices, value = one.metadata["choices"], getattr(config, one.name)
        if choices and value is not None and value not in choices:
            raise InputError(f"{flag(one.name)}: expected one of {', '.join(choices)}; got {value!r}")
    for name, (low, high, wanted) in RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"{flag(name)}: expected {wanted}, got {value}")
    features = default_features(config.pair, config.tasks, config.loss, config.hidden_layers)
    config = replace(config, features=config.features or features)
    _check_conflicts(config)
    method = METHODS[config.method]
    return replace(
        config,
        alpha=float(method.alpha(config.rank)) if config.alpha is None and method.layer else config.alpha,
        lr=method.lr if config.lr is None else config.lr,
        loss=config.loss or (config.tasks[0].loss if len(config.tasks) == 1 else None),
    )


OF_ADAPTERS = ("rank", "alpha", "lora_dropout", "targets", "rank_pattern")  # settings of adapters alone
# Settings of runs of several tasks alone, as a run of one task has them.
OF_SEVERAL = {
    "adapters": "shared", "sampling": "round-robin", "temperature": None, "task_lr": (), "loss_weight": (),
    "task_dropout": (), "best": "mean", "patience_of": "mean",
}  # fmt: skip
AT_LEAST_1 = (1, 2**31 - 1, "a whole number of at least 1")
ABOVE_0 = (1e-9, 1e9, "a number above 0")
BELOW_1 = (0, 0.999, "a number from 0 to 0.999")
RANGES = {
    "max_length": (4, 2**31 - 1, "at least 4 tokens"),
    "rank": (1, LARGEST_RANK, "a whole number of at least 1"),
    "alpha": (1e-9, LARGEST_ALPHA, f"a number above 0 and at most {LARGEST_ALPHA:g}"),
    "lora_dropout": BELOW_1,
    "temperature": (1, 1e9, "a number of at least 1"),
    "epochs": AT_LEAST_1,
    "max_steps": AT_LEAST_1,
    "patience": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "micro_batch_size": AT_LEAST_1,
    "lr": (1e-12, 1e3, "a number above 0"),
    "weight_decay": (0, 1e6, "a number of at least 0"),
    "max_grad_norm": (0, 1e9, "a number of at least 0"),
    "dropout": BELOW_1,
    "encoder_dropout": BELOW_1,
    "hidden_layers": (0, 100, "a whole number from 0 to 100"),
    "warmup": (0, 1, "a share from 0 to 1"),
    "seed": (0, 2**63 - 1, "a whole number of at least 0"),
}
# Of each number in a list of TASK=NUMBER.
TASK_RANGES = {"task_lr": RANGES["lr"], "loss_weight": ABOVE_0, "task_dropout": BELOW_1}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_conflicts(config: Config) -> None:
    method, default = METHODS[config.method], {one.name: one.default for one in fields(Config)}
    if config.pair == "siamese" and not any(task.is_pair for task in config.tasks):
        raise InputError(f"--pair siamese: expected a task of sentence pairs, got --task {config.task}")
    if config.features != "uv-diff-prod" and config.pair != "siamese":
        raise InputError("--features: only a Siamese head compares two vectors; add --pair siamese")
    if config.method == "frozen" and config.recompute:
        raise InputError("--recompute: nothing goes back through --method frozen's encoder")
    if config.method == "frozen" and config.encoder_dropout:
        raise InputError("--encoder-dropout: the frozen encoder runs without dropout")
    if not method.layer:
        for name in OF_ADAPTERS:
            if getattr(config, name) != default[name]:
                raise InputError(f"{flag(name)}: --method {config.method} has no adapters")
    for name, check_names in (("targets", check_targets), ("rank_pattern", check_ranks)):
        try:
            check_names(getattr(config, name))
        except ValueError as error:
            raise InputError(f"{flag(name)}: {error}") from None
    _check_tasks(config)
    _check_pairs(config)
    if config.precision == "fp16" and config.device == "cpu":
        raise InputError("--precision fp16: expected a GPU; a CPU has fp32 and bf16")


def _check_pairs(config: Config) -> None:
    compared = [(task, config.features if config.siamese(task) else None) for task in config.tasks]
    if config.features == "cosine" and config.hidden_layers:
        raise InputError("--hidden-layers: a cosine is a single number; use other --features")
    for task, features in compared:
        if features == "cosine" and task.num_outputs > 2:
            raise InputError(f"--features cosine: expected a score or two classes, got --task {task.name}")
    if config.loss in SIDE_LOSSES and config.method == "frozen":
        raise InputError(f"--loss {config.loss}: trains the encoder alone, which --method frozen does not")
    if config.micro_batch_size is not None and config.loss in COMPARING:
        compares = f"--loss {config.loss} compares the examples of a batch"
        raise InputError(f"--micro-batch-size: {compares}, so all must go through the model at once")
    try:
        check_loss(config.loss, compared)
    except ValueError as error:
        raise InputError(f"--loss: {error}") from None


def _check_tasks(config: Config) -> None:
    names = [task.name for task in config.tasks]
    if config.sampling != "round-robin" and len(names) == 1:
        raise InputError(f"--sampling {config.sampling}: expected several tasks, got --task {config.task}")
    if (config.sampling == "temperature") != (config.temperature is not None):
        raise InputError("--temperature: expected together with --sampling temperature, got one alone")
    if config.adapters == "per-task" and (len(names) == 1 or not METHODS[config.method].layer):
        got = f"--task {config.task} --method {config.method}"
        raise InputError(f"--adapters per-task: expected several tasks and a method with adapters, got {got}")
    if config.adapters == "per-task" and config.loss == "simcse-unsup":
        raise InputError("--loss simcse-unsup: reads a batch twice, --adapters per-task reads it once")
    if config.best == "per-task" and (len(names) == 1 or not METHODS[config.method].layer):
        got = f"--task {config.task} --method {config.method}"
        raise InputError(f"--best per-task: expected several tasks and a method with adapters, got {got}")
    if config.patience_of == "per-task" and (len(names) == 1 or config.patience is None):
        got = f"--task {config.task}, --patience {config.patience}"
        raise InputError(f"--patience-of per-task: expected several tasks and --patience, got {got}")
    for name, bounds in TASK_RANGES.items():
        try:
            check_numbers(getattr(config, name), names, *bounds)
        except ValueError as error:
            raise InputError(f"{flag(name)}: {error}") from None


def to_dict(config: Config) -> dict:
    plain = {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()
    }
    return plain | {"own": [json.loads(text) for text in config.own]}


def from_dict(raw: Mapping, where: str) -> Config:
    """The config that `to_dict` wrote.

    Raises:
        InputError: for an unknown or missing key, a value of another type, or one `check` refuses.
    """
    known = {one.name: one for one in fields(Config)}
    needed = {name for name, one in known.items() if not one.metadata["added"]}
    for problem, names in (("unknown", raw.keys() - known), ("missing", needed - raw.keys())):
        if names:
            raise InputError(f"{where}: {problem} key {min(names)!r}")
    if isinstance(own := raw.get("own"), list):
        raw = {**raw, "own": [to_json(one) if isinstance(one, dict) else one for one in own]}
    for name, value in raw.items():
        kind = known[name].type
        if not _fits(value, kind):
            raise InputError(f"{where}: expected {name} to be {_kind(kind)}, got {value!r}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    try:
        return check(Config(**given))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _fits(value: object, kind: type) -> bool:
    if kind == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if isinstance(value, bool):  # which Python counts among the ints
        return kind is bool
    return isinstance(value, kind | int if isinstance(0.0, kind) else kind)


def _kind(kind: type) -> str:
    return getattr(kind, "__name__", str(kind)) if kind != tuple[str, ...] else "a list of names"


def default_features(pair: str, tasks: Sequence[Task], loss: str | None, hidden_layers: int) -> str:
    """Cosine if all pairs have scores or the loss needs it; runs that compare nothing say uv-diff-prod."""
    learned = hidden_layers or any(task.is_pair and task.is_classification for task in tasks)
    return "cosine" if pair == "siamese" and (loss in SIDE_LOSSES or not learned) else "uv-diff-prod"


def losses_of(task: Task, features: str | None) -> tuple[str, ...]:
    """The losses that can train a task; `features` is None unless its pairs are Siamese."""
    own = ("cross-entropy",) if task.is_classification else SCORE_LOSSES
    if features != "cosine":
        return own
    return own + tuple(name for name in SIDE_LOSSES if name != "contrastive" or task.is_classification)


def check_loss(loss: str | None, compared: Sequence[tuple[Task, str | None]]) -> None:
    """`compared`: each task of the run, and the features of its Siamese pairs; None is each task's own loss.

    Raises:
        ValueError: if one of the tasks cannot be trained by that loss.
    """
    if loss in SIDE_LOSSES and not any(features == "cosine" for _, features in compared):
        raise ValueError(f"{loss} compares two vectors; add --pair siamese --features cosine")
    fitting = {task.name: losses_of(task, features) for task, features in compared}
    if loss is not None and any(loss not in losses for losses in fitting.values()):
        wanted = ", ".join(f"{' or '.join(losses)} for {name}" for name, losses in fitting.items())
        raise ValueError(f"expected {wanted}; got {loss}")


def check_numbers(given: Sequence[str], tasks: Sequence[str], low: float, high: float, wanted: str) -> None:
    """Raises:
    ValueError: for a part that is no TASK=NUMBER, of a task that the run lacks or that came before, or with
        a number out of range.
    """
    seen = set()
    for part in given:
        task, equals, number = part.partition("=")
        if not equals:
            raise ValueError(f"expected TASK=NUMBER, as in {tasks[0]}=0.5, got {part!r}")
        if task not in tasks:
            raise ValueError(f"expected tasks of the run, {', '.join(tasks)}; got {task!r}")
        if task in seen:
            raise ValueError(f"expected each task once, got {task!r} twice")
        seen.add(task)
        try:
            fits = low <= float(number) <= high
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"expected {wanted} for {task}, got {number!r}")


def numbers(given: Sequence[str]) -> dict[str, float]:
    """Of parts that were checked, by task."""
    return {task: float(number) for task, _, number in (part.partition("=") for part in given)}
