"""An explanation as the parts of a page."""

from pathlib import Path

from experiments.attention_view import Attention, Folded, Words
from experiments.blocks import Block, Cell, Heading, Paragraph, Table
from experiments.explanation import Explanation, Neighbours

Part = Block | Words | Folded | Attention

TITLE = "One example explained"
ATTRIBUTED = (
    "Integrated gradients: how much each word adds to {of}, against the same tokens with the zero vector in "
    "the place of each word's; pieces of a word are summed. Blue adds, orange (underlined) takes away. All "
    "of it is relative to that baseline, for which the model has an answer too."
)
ATTENDED = (
    "The model's own weights: what share the value of each token has in what a head gives to a token. They "
    "say what was read, not what decided. Deep layers mix what others have mixed, so a token stands for more "
    "than its word there; [CLS] and [SEP] often take what a head has no use for. Shades go up to the largest "
    "that is shown."
)


def parts_of(found: Explanation, run: Path) -> list[Part]:
    config, task = found.config, found.task
    pair = f", pairs {'Siamese' if config.siamese(task) else 'concatenated'}" if task.is_pair else ""
    about = f"{run}: {task.name} by {config.method}, model {config.model}, pooling {config.pooling}{pair}."
    return [
        Heading(TITLE, 1),
        Paragraph(about),
        *(Paragraph(f"“{text}”") for text in found.example.texts),
        *([Paragraph(cut_off(found))] if found.kept < found.tokens else []),
        *predicted(found),
        *attributed(found),
        *attended(found),
        *neighbours(found),
    ]


def cut_off(found: Explanation) -> str:
    """What is not looked at, since the run would not read it."""
    most = found.config.max_length
    return f"Cut to the run's {most} tokens: of {found.tokens} of the text {found.kept} are read."


def predicted(found: Explanation) -> list[Block]:
    given, probabilities = found.prediction.predictions[0], found.prediction.probabilities
    heading = Heading("Prediction")
    if probabilities is None:
        low, high = found.task.label_range
        return [heading, Paragraph(f"A score of {given:.4f}, where labels go from {low} to {high}.")]
    names = found.task.class_names
    rows = [[Cell(names[c], c), Cell(f"{p:.4f}", p, p)] for c, p in enumerate(probabilities[0].tolist())]
    return [heading, Paragraph(f"Class {names[given]}."), Table(("class", "probability"), rows)]


def attributed(found: Explanation) -> list[Part]:
    names = found.task.class_names
    of = f"the probability of class {names[found.target]}" if names else "the score"
    sentences = found.sentences
    rows = [
        [Cell(str(i), i), Cell(word), Cell(f"{value:+.4f}", value)]
        for i, words in enumerate(sentences, 1)
        for word, value in words
    ]
    largest = max((abs(value) for words in sentences for _, value in words), default=0.0)
    return [
        Heading("What the words add"),
        Paragraph(ATTRIBUTED.format(of=of)),
        *(Words(words, largest) for words in sentences),
        Paragraph(completeness(found)),
        Folded("The words' numbers", Table(("sentence", "word", "adds"), rows)),
    ]


def completeness(found: Explanation) -> str:
    """Sundararajan et al. 2017, proposition 1, with numbers."""
    one = found.attribution
    verdict = (
        f"Both are within the tolerance of {one.tolerance:g}."
        if one.is_complete
        else f"This is NOT within the tolerance of {one.tolerance:g}, and more steps are not tried."
    )
    return (
        f"f(x) = {one.output:.4f}, f(baseline) = {one.baseline:.4f}; their difference is "
        f"{one.output - one.baseline:+.4f}, the sum of all attributions {one.values.sum():+.4f}: an error of "
        f"{one.error:.1e} with {one.steps} steps, the last doubling of which moved no token by more than "
        f"{one.change:.1e}. {verdict}"
    )


def attended(found: Explanation) -> list[Part]:
    parts: list[Part] = [Heading("Attention"), Paragraph(ATTENDED)]
    for i, read in enumerate(found.sequences, 1):
        if len(found.sequences) > 1:
            parts.append(Heading(f"Sentence {i}, which the encoder reads on its own", 3))
        parts.append(Attention(f"attention {i}", read.tokens, read.sentences, read.frame, read.attention))
    return parts


def neighbours(found: Explanation) -> list[Part]:
    near, heading = found.neighbours, Heading("Nearest training examples")
    if near is None:
        return []
    if not isinstance(near, Neighbours):
        return [heading, Paragraph(f"Left out: {near}")]
    of = "all" if near.read == near.total else f"{near.read:,} drawn from"
    siamese = ", the mean of the two sides'," if len(found.sequences) > 1 else ""
    rows = [
        [Cell(f"{cosine:.4f}", cosine), Cell(f"{example.label:g}", example.label), *map(Cell, example.texts)]
        for example, cosine in near.examples
    ]
    return [
        heading,
        Paragraph(f"By the cosine of pooled vectors{siamese} among {of} {near.total:,} training examples."),
        Table(("cosine", "label", *found.task.text_columns), rows),
    ]
