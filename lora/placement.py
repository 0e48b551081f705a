"""Which linear layers of an encoder are adapted, and with which ranks. Imports no torch.

A target is a name of `TARGETS` or `TARGET_SETS`, or a layer's own path, within a BERT layer or whole:

    query   all   attention.self.query   encoder.layer.3.attention.self.query   pooler.dense

and `@` behind it picks layers: `query@0`, `dense@3-5`, `all@0-2,5`. Names are matched whole, so that
`output.dense` does not hit attention's, nor `dense` the pooler. A rank pattern is a target with a rank:
`query=16`, `all@0-2=4`; of several that hit a layer the last counts.
"""

import re
from collections.abc import Sequence

# The six linears of a BERT layer.
TARGETS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
TARGET_SETS = {
    "all": tuple(TARGETS),
    "attention": ("query", "key", "value", "attention.output"),
    "dense": ("attention.output", "intermediate", "output"),
}
IN_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
LAYERS = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")


def linear_names(num_layers: int, with_pooler: bool) -> list[str]:
    """The names of a BERT's linear layers, in their order."""
    names = [f"encoder.layer.{i}.{path}" for i in range(num_layers) for path in TARGETS.values()]
    return [*names, "pooler.dense"] if with_pooler else names


def check_targets(targets: Sequence[str]) -> None:
    """Raises:
    ValueError: if there is none, or one that can match no model: an unknown name, or layers that are none.
    """
    if not targets:
        raise ValueError(f"expected targets among {_known()}, got none")
    for target in targets:
        _parse(target)


def place(targets: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Those of the linear layers' names that one of the targets means, in their order.

    Raises:
        ValueError: if a target makes no sense or matches nothing, naming what exists.
    """
    check_targets(targets)
    found = set()
    for target in targets:
        hit = _matches(target, linears)
        if not hit:
            raise ValueError(f"{target!r} matches no linear layer of the model; it has {_existing(linears)}")
        found |= hit
    return [name for name in linears if name in found]


def check_ranks(pattern: Sequence[str]) -> None:
    """Raises ValueError for a part that is no TARGET=RANK."""
    for part in pattern:
        target, _, rank = part.rpartition("=")
        if not target or not re.fullmatch(r"[1-9]\d{0,5}", rank):
            raise ValueError(f"expected TARGET=RANK, as in query=16, got {part!r}")
        _parse(target)


def place_ranks(pattern: Sequence[str], linears: Sequence[str]) -> dict[str, int]:
    """The ranks a pattern gives to linear layers, by name; `linears` are those with adapters.

    Raises:
        ValueError: if a part makes no sense or matches nothing, naming what exists.
    """
    check_ranks(pattern)
    ranks: dict[str, int] = {}
    for part in pattern:
        target, _, rank = part.rpartition("=")
        ranks |= dict.fromkeys(place([target], linears), int(rank))
    return ranks


def _parse(target: str) -> tuple[set[str], set[int] | None]:
    """A target's paths, and the layers it is limited to."""
    name, at, layers = target.partition("@")
    if name in TARGETS or name in TARGET_SETS:
        paths = {TARGETS[part] for part in TARGET_SETS.get(name, (name,))}
    elif re.fullmatch(r"\w+(\.\w+)+", name):
        paths = {name}
    else:
        raise ValueError(f"expected targets among {_known()}, got {target!r}")
    if not at:
        return paths, None
    if not LAYERS.fullmatch(layers):
        raise ValueError(f"expected layers as in @0, @3-5 or @0-2,5, got {target!r}")
    chosen: set[int] = set()
    for part in layers.split(","):
        first, _, last = part.partition("-")
        chosen |= set(range(int(first), int(last or first) + 1))
    return paths, chosen


def _matches(target: str, linears: Sequence[str]) -> set[str]:
    paths, layers = _parse(target)
    hit = set()
    for name in linears:
        inside = IN_LAYER.fullmatch(name)
        path, layer = (inside[2], int(inside[1])) if inside else (name, None)
        if (name in paths or (inside and path in paths)) and (layers is None or layer in layers):
            hit.add(name)
    return hit


def _known() -> str:
    return ", ".join([*TARGET_SETS, *TARGETS, "or a dotted path"])


def _existing(linears: Sequence[str]) -> str:
    """In short: each path once, with the numbers of the layers that have it."""
    layers: dict[str, list[int]] = {}
    for name in linears:
        if inside := IN_LAYER.fullmatch(name):
            layers.setdefault(inside[2], []).append(int(inside[1]))
    shown = [f"{path}@{min(at)}-{max(at)}" for path, at in layers.items()]
    return ", ".join([*shown, *(name for name in linears if not IN_LAYER.fullmatch(name))])
