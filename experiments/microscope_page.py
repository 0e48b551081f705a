"""Runs seen closely, as the parts of a page."""

from collections.abc import Sequence

from experiments.attention_view import Folded
from experiments.blocks import Block, Cell, Figures, Heading, Paragraph, Table
from experiments.microscope_plots import by_layer, intruding, lines_of, spectrum, turned
from experiments.microscope_tables import (
    GROUP,
    MODULE,
    OF_RUN,
    RUN,
    layer_rows,
    module_rows,
    not_measured,
    run_rows,
)
from experiments.microscopy import Magnified
from lora.placement import TARGETS

Part = Block | Folded

TITLE = "What training changed"
TABLE = (
    "ΔW = W' - W of every linear layer that training may change, W' with its adapter merged, in fp64. ‖ΔW‖ "
    "is over all of them (Frobenius); rank, effective rank, rank 90 %, ΔM and ΔD are means over them. "
    "outside: the share of all squared change that lies in other parameters (embeddings, norms, biases)."
)
SPECTRA = (
    "The singular values σ_i of ΔW, the mean over the layers, all runs on one axis. An adapter of rank r "
    "ends at i = r; DoRA's go on, for its magnitudes rescale all of W. What falls off steeply is nearly "
    "low-rank, whatever the method allows."
)
LAYERS = (
    "‖ΔW‖/‖W‖: how far a layer has moved. Effective rank: exp of the entropy of σ_i/Σσ (Roy and Vetterli "
    "2007), the mean over a layer's modules. Adapter norm: ‖s · B A‖, before DoRA's magnitudes."
)
TURNED = (
    "What happened to the rows of each W: ΔM, the mean change of their length, against ΔD, the mean of 1 - "
    "cosine with where they pointed (Liu et al. 2024, figure 2). r(ΔM, ΔD) in the table is Pearson's over "
    "the modules: near 1, where one changes much, so does the other."
)
INTRUDERS = (
    "Of each W' the first left singular vectors, and whether any of W's is like them: one whose greatest "
    "|cosine| is below the threshold ({threshold:g}) is an intruder dimension (Shuttleworth et al. 2024) and "
    "stands right of the dashed line. They found many in LoRA, hardly any in full fine-tuning, and "
    "forgetting where there are many."
)
DRIFT = (
    "The loss of the base's own masked-language-model head, on {tokens:,} tokens masked in the sentences of "
    "the built-in dev files, before training and with each run's encoder: how much worse it fills in words."
)


def parts_of(runs: Sequence[Magnified], threshold: float) -> list[Part]:
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'} of {runs[0].config.model}."
    return [
        Heading(TITLE, 1),
        Paragraph(count),
        *map(Paragraph, not_measured(runs)),
        Table((*RUN, *GROUP, *OF_RUN[:-1]), [row[:-1] for row in run_rows(runs, threshold)]),
        Paragraph(TABLE),
        *drifted(runs),
        *(pictures(runs, threshold) if any(run.modules for run in runs) else []),
    ]


def drifted(runs: Sequence[Magnified]) -> list[Part]:
    rows = [
        [
            Cell(str(number), number),
            Cell(run.path.name or str(run.path)),
            Cell(run.config.method),
            *(Cell(f"{loss:.4f}", loss) for loss in (run.drift.before, run.drift.after)),
            Cell(f"{run.drift.change:+.4f} ± {run.drift.error:.4f}", run.drift.change),
        ]
        for number, run in enumerate(runs, 1)
        if run.drift
    ]
    if not rows:
        return []
    tokens = next(run.drift.tokens for run in runs if run.drift)
    columns = (*RUN, "loss before", "loss after", "change ± standard error")
    return [Heading("Filling in words"), Paragraph(DRIFT.format(tokens=tokens)), Table(columns, rows)]


def pictures(runs: Sequence[Magnified], threshold: float) -> list[Part]:
    legend = [
        (line.sample(), f"{line.number} {run.path.name or run.path} ({run.config.method})")
        for line, run in lines_of(runs)
    ]
    spectra = [spectrum(runs, part) for part in (*TARGETS.values(), "pooler.dense")]
    layers = [
        by_layer(runs, "‖ΔW‖/‖W‖ by layer", lambda group: group.relative),
        by_layer(runs, "effective rank of ΔW by layer", lambda group: group.mean("effective_rank")),
        by_layer(runs, "‖ΔW‖ by layer", lambda group: group.change),
    ]
    if any(run.all.adapter_norm is not None for run in runs):
        layers.append(by_layer(runs, "adapter norm by layer", lambda group: group.adapter_norm))
    intruders = [
        intruding(runs, threshold),
        by_layer(runs, "intruder dimensions by layer", lambda group: group.intruders(threshold)),
    ]
    return [
        Heading("Singular values"),
        Paragraph(SPECTRA),
        Figures([one for one in spectra if one], legend),
        Heading("By layer"),
        Paragraph(LAYERS),
        Figures(layers, legend),
        Folded("The layers' numbers", Table((*RUN, "layer", *GROUP), layer_rows(runs, threshold))),
        Heading("Magnitude and direction"),
        Paragraph(TURNED),
        Figures([turned(runs)], legend),
        Heading("Intruder dimensions"),
        Paragraph(INTRUDERS.format(threshold=threshold)),
        Figures(intruders, legend),
        Heading("Every module"),
        *(
            Folded(
                f"{number} {run.path.name or run.path} ({run.config.method})",
                Table(MODULE, module_rows(run, threshold)),
            )
            for number, run in enumerate(runs, 1)
            if run.modules
        ),
    ]
