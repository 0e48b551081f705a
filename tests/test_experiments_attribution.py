"""Integrated gradients are those of functions whose integral is known, and of another BERT's fine sums."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from small_runs import call, flags
from torch import Tensor

import train
from experiments.attribution import attribute, attribute_example, framing, integrated_gradients
from lora.methods import METHODS, merge
from minibert.weights import save_bert
from tasks import TASKS
from tasks.base import Example
from tasks.data import Dataset
from training.run_folder import load_run

RUNS = {
    "sst full mean": {"task": "sst", "method": "full", "pooling": "mean", "lr": 0.001},
    "sts lora cls": {"task": "sts", "method": "lora", "pooling": "cls"},
    "sts dora siamese cosine": {"task": "sts", "method": "dora", "pair": "siamese", "pooling": "mean"},
    "qqp rslora siamese uv-diff": {"task": "qqp", "method": "rslora", "pair": "siamese",
                                   "features": "uv-diff", "hidden_layers": 1, "pooling": "pooler"},
    "qqp frozen": {"task": "qqp", "method": "frozen", "pooling": "mean"},
}  # fmt: skip
TEXTS = ("the film is not good, unaffable", "what a bad dog")


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run of RUNS, in fp64 and merged, with a dataset of one example."""
    known: dict[str, Path] = {}

    def load(kind: str, texts: tuple[str, ...] = TEXTS):
        changes = RUNS[kind]
        if kind not in known:
            known[kind] = tmp_path_factory.mktemp("finished") / "run"
            ended = call(train.main, *flags(tiny, small_data, out=known[kind], max_steps=3, **changes))
            assert ended.code == 0, ended.err
        config, model, tokenizer = load_run(known[kind])
        task = TASKS[changes["task"]]
        model = merge(model).double().eval()
        model.bert.compute_dtype = torch.float64
        example = Example("text", texts[: len(task.text_columns)], None)
        return model, Dataset(task, [example], tokenizer, config.siamese(task))

    return load


def test_every_method_is_among_the_runs() -> None:
    assert {run["method"] for run in RUNS.values()} == METHODS.keys()


@pytest.mark.parametrize(
    ("f", "integrals"),
    [
        (lambda x: (3 * x).sum((1, 2)), lambda x: 3 * x),
        (lambda x: x.square().sum((1, 2)), lambda x: x.square()),
        # f = uv: a path along which both grow alike gives each half.
        (lambda x: x[:, 0].mul(x[:, 1]).sum(1), lambda x: x[0].mul(x[1]).div(2).expand(2, -1)),
    ],
    ids=["linear", "square", "product"],
)
def test_of_a_gradient_that_is_linear_on_the_path_one_step_is_exact(f: Callable, integrals: Callable) -> None:
    x = torch.randn(2, 5, dtype=torch.float64)
    got = integrated_gradients(f, x, torch.zeros_like(x), steps=1)
    torch.testing.assert_close(got, integrals(x), rtol=0, atol=1e-14)


def test_the_midpoint_rules_error_falls_with_the_square_of_the_steps() -> None:
    x = torch.full((1, 1), 2.0, dtype=torch.float64)
    errors = []
    for steps in (8, 16, 32):
        got = integrated_gradients(lambda x: x.exp().sum((1, 2)), x, x - 1, steps)
        errors.append(abs(float(got) - (np.exp(2) - np.exp(1))))
    assert [a / b for a, b in zip(errors, errors[1:], strict=False)] == pytest.approx([4, 4], rel=0.01)


def test_the_baseline_need_not_be_zero_and_paths_longer_than_a_batch_are_whole() -> None:
    x, baseline = torch.randn(2, 700, 3, dtype=torch.float64)  # two points to a batch would be too many
    got = integrated_gradients(lambda x: x.pow(2).sum((1, 2)), x, baseline, steps=3)
    torch.testing.assert_close(got, x.pow(2) - baseline.pow(2), rtol=0, atol=1e-12)


def steep(x: Tensor) -> Tensor:
    """From 0 to 1 on a tenth of the path, about .3."""
    return (40 * (x.mean((1, 2)) - 0.3)).sigmoid()


def test_steps_double_until_the_sum_is_right() -> None:
    x = torch.ones(2, 1, dtype=torch.float64)
    found = attribute(steep, x, 0 * x, tolerance=1e-6)
    assert found.steps > 16
    assert found.is_complete
    whole = 1 / (1 + np.exp(-28)) - 1 / (1 + np.exp(12))
    assert found.values.tolist() == pytest.approx([whole / 2, whole / 2], abs=1e-6)


def test_too_few_steps_are_said_to_be_too_few() -> None:
    x = torch.ones(1, 1, dtype=torch.float64)
    found = attribute(lambda x: (4000 * (x.sum((1, 2)) - 0.5)).sigmoid(), x, 0 * x, most=64)
    assert not found.is_complete
    assert (found.steps, found.output, found.baseline) == (64, 1.0, 0.0)
    assert found.error > found.tolerance
    assert found.error == pytest.approx(abs(found.values.sum() - 1), abs=1e-15)


def test_a_sum_that_is_right_because_errors_cancel_is_not_enough() -> None:
    def f(x: Tensor) -> Tensor:  # 0 on all of the path, where each token's gradient is steep
        return steep(x) * (x[:, 0, 0] - x[:, 1, 0])

    x = torch.ones(2, 1, dtype=torch.float64)
    assert float(integrated_gradients(f, x, 0 * x, steps=4).sum()) == pytest.approx(0, abs=1e-12)
    found = attribute(f, x, 0 * x, tolerance=1e-6)
    assert found.steps > 16
    assert found.values.tolist() == pytest.approx([0.7, -0.7], abs=2e-6)  # ±∫ steep


@pytest.mark.parametrize("kind", RUNS)
def test_attributions_of_a_model_add_up_to_what_they_explain(kind: str, finished) -> None:
    model, data = finished(kind)
    before = model(data.task.name, data.collate(np.zeros(1, int))).detach()
    found = attribute_example(model, data, target=0)
    assert found.is_complete
    outputs = before.softmax(dim=1) if data.task.is_classification else before
    assert found.output == pytest.approx(float(outputs[0, 0]), abs=1e-12)
    assert found.values.sum() == pytest.approx(found.output - found.baseline, abs=1e-3)
    assert not found.values[framing(data).numpy()].any()  # [CLS] and [SEP] are the baseline's too
    assert np.count_nonzero(found.values) == (~framing(data)).sum()
    after = model(data.task.name, data.collate(np.zeros(1, int)))
    assert torch.equal(before, after)  # nothing is left hooked


@pytest.mark.parametrize("kind", RUNS)
def test_on_fp64_the_sum_is_as_near_as_asked(kind: str, finished) -> None:
    # Of |u - v| the gradient jumps where the sides are equal in a number: there the sum's error falls with
    # the number of steps alone, not with its square.
    found = attribute_example(*finished(kind), target=0, tolerance=1e-6, most=2**14)
    assert found.error <= 1e-6
    assert found.steps > 16


@pytest.mark.parametrize("kind", ["sst full mean", "sts lora cls", "sts dora siamese cosine"])
def test_attributions_are_the_fine_sums_of_gradients_through_transformers(
    kind: str, finished, tmp_path: Path
) -> None:
    model, data = finished(kind)
    save_bert(model.bert, tmp_path)
    theirs = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    head = model.heads[data.task.name].output
    sides = [(torch.tensor(side.input_ids), torch.tensor(side.token_type_ids).long()) for side in data.sides]
    words = [theirs.embeddings.word_embeddings(ids).detach() for ids, _ in sides]

    def output(points: list[Tensor]) -> Tensor:
        hidden = [
            theirs(inputs_embeds=one[None], token_type_ids=types[None]).last_hidden_state[0]
            for one, (_, types) in zip(points, sides, strict=True)
        ]
        pooled = [one[0] if kind.endswith("cls") else one.mean(0) for one in hidden]
        if len(pooled) == 2:
            return (head.weight * F.cosine_similarity(*pooled, dim=0) + head.bias)[0, 0]
        logits = head.weight @ pooled[0] + head.bias
        return logits.softmax(0)[1] if data.task.is_classification else logits[0]

    kept = [torch.isin(ids, torch.tensor([2, 3])).double()[:, None] for ids, _ in sides]  # [CLS], [SEP]
    starts = [one * frame for one, frame in zip(words, kept, strict=True)]
    sums, count = [torch.zeros(len(one), dtype=torch.float64) for one in words], 400
    for step in range(count + 1):  # the trapezoid rule
        points = [
            (x0 + step / count * (x - x0)).requires_grad_() for x0, x in zip(starts, words, strict=True)
        ]
        gradients = torch.autograd.grad(output(points), points)
        for i, gradient in enumerate(gradients):
            share = (0.5 if step in (0, count) else 1) / count
            sums[i] += share * ((words[i] - starts[i]) * gradient).sum(1)
    target = 1 if data.task.is_classification else 0
    ours = attribute_example(model, data, target, tolerance=1e-6)
    np.testing.assert_allclose(ours.values, torch.cat(sums).numpy(), atol=1e-5)


def test_a_text_without_a_word_has_nothing_to_attribute(finished) -> None:
    found = attribute_example(*finished("sst full mean", ("\u200b",)), target=2)
    assert found.values.tolist() == [0, 0]
    assert found.is_complete
    assert found.output == found.baseline
