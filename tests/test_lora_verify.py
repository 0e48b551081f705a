"""lora.verify: every claim holds, a faulty layer breaks the one about it, a run's own weights are checked."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_runs import Ended, call, flags
from tolerances import TOLERANCE as TESTS_TOLERANCE
from torch import Tensor, nn

import train
from lora import claims, verify
from lora.functions import Merged
from lora.layers import DoRALinear, LoRALinear
from training import run_folder

DTYPES = tuple(claims.TOLERANCE)
KINDS = {
    "rslora": {"max_steps": 3},
    "dora": {"task": "sst", "method": "dora", "lora_dropout": 0.1, "max_steps": 3},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.text)
def test_claim(claim: claims.Claim, dtype: torch.dtype) -> None:
    assert claim.error(dtype) <= claim.tolerance(dtype)


def test_claims_are_held_to_the_tolerances_of_all_tests() -> None:
    assert {dtype: TESTS_TOLERANCE[dtype, "layer"] for dtype in DTYPES} == claims.TOLERANCE


def parameters(layer: LoRALinear) -> tuple[Tensor | None, ...]:
    return layer.weight, layer.bias, layer.lora_A.weight, layer.lora_B.weight, layer.magnitude


# Faults, each put in the place of a layer's own method.


def scaling_ignored(layer: LoRALinear, x: Tensor) -> Tensor:
    return Merged.apply(x, 1.0, *parameters(layer))[0]


def bias_rescaled(layer: LoRALinear, x: Tensor) -> Tensor:
    W, b, A, B, m = parameters(layer)
    gain = (m / layer.weight_norm()).to(x.dtype)
    return Merged.apply(x, layer.scaling, W, gain * b, A, B, m)[0]


def norm_differentiated(layer: LoRALinear, x: Tensor) -> Tensor:
    W, b, A, B, m = parameters(layer)
    V = W.to(B.dtype) + layer.scaling * B @ A
    return F.linear(x, (m / V.norm(dim=1))[:, None].mul(V).to(x.dtype), b)


def merged_once(layer: LoRALinear, x: Tensor) -> Tensor:
    layer.kept = getattr(layer, "kept", None) or layer.merged()
    return (
        F.linear(x, layer.kept.weight, layer.bias) + 0 * Merged.apply(x, layer.scaling, *parameters(layer))[0]
    )


def b_detached(layer: LoRALinear, x: Tensor) -> Tensor:
    W, b, A, B, m = parameters(layer)
    return Merged.apply(x, layer.scaling, W, b, A, B.detach(), m)[0]


def merged_in_place(layer: LoRALinear, dtype: torch.dtype | None = None) -> nn.Linear:
    layer.weight.data += (
        (layer.scaling * layer.lora_B.weight @ layer.lora_A.weight).detach().to(layer.weight.dtype)
    )
    plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    plain.weight, plain.bias = nn.Parameter(layer.weight.clone()), nn.Parameter(layer.bias.clone())
    return plain


def not_a_number(layer: LoRALinear, x: Tensor) -> Tensor:
    return Merged.apply(x, layer.scaling, *parameters(layer))[0] * float("nan")


@pytest.mark.parametrize(
    ("cls", "method", "fault", "broken"),
    [
        (LoRALinear, "forward", scaling_ignored, "LoRA, rsLoRA == dense"),
        (LoRALinear, "forward", scaling_ignored, "gradients == projections"),
        (DoRALinear, "forward", bias_rescaled, "DoRA's bias is not rescaled"),
        (DoRALinear, "forward", norm_differentiated, "gradients == projections"),
        (DoRALinear, "forward", norm_differentiated, "DoRA == dense"),
        (LoRALinear, "forward", merged_once, "merged == split == exported"),
        (LoRALinear, "forward", b_detached, "one step moves every B"),
        (LoRALinear, "merged", merged_in_place, "training and merging leave the base's bits"),
        (LoRALinear, "merged", merged_in_place, "100 merges give the same bits"),
        (LoRALinear, "forward", not_a_number, "a fresh adapter == base"),
    ],
)  # fmt: skip
def test_a_faulty_layer_breaks_the_claim_about_it(
    cls: type, method: str, fault: Callable, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cls, method, fault)
    about = [claim for claim in claims.CLAIMS if claim.text.startswith(broken)]
    assert len(about) == 1
    monkeypatch.setattr(claims, "CLAIMS", about)
    ended = call(verify.main)
    assert (ended.code, ended.err) == (1, "")
    assert ended.out.endswith(f"\n1 of 1 claims fail:\n  {about[0].text}\n")


@pytest.mark.parametrize("fault", [bias_rescaled, norm_differentiated])
def test_a_fault_of_dora_leaves_the_claims_about_lora(
    fault: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DoRALinear, "forward", fault)
    for claim in claims.CLAIMS:
        if "dora" not in claim.methods:
            assert claim.error(torch.float64) <= claim.tolerance(torch.float64)


def test_the_table_has_a_line_for_every_claim_and_dtype() -> None:
    ended = call(verify.main)
    assert (ended.code, ended.err) == (0, "")
    header, *lines = ended.out.splitlines()
    assert header.split()[:5] == ["claim", "dtype", "error", "tolerance", "ok"]
    wanted = [(claim.text, dtype) for claim in claims.CLAIMS for dtype in ("fp64", "fp32", "bf16", "fp16")]
    rows = [re.fullmatch(r"(.+?)  +(\w+)  +\S+  +\S+  +yes", line) for line in lines[:-2]]
    assert [row.groups() for row in rows] == wanted
    assert lines[-2:] == ["", f"all {len(claims.CLAIMS)} claims hold"]


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    known: dict[str, Path] = {}

    def run(**changes) -> Path:
        if str(changes) not in known:
            known[str(changes)] = tmp_path_factory.mktemp("finished") / "run"
            arguments = flags(tiny, small_data, out=known[str(changes)], **changes)
            assert call(train.main, *arguments).code == 0
        return known[str(changes)]

    return run


class TestRun:
    @pytest.fixture
    def own(self, finished: Callable, tmp_path: Path) -> Callable[..., Path]:
        """A copy, to be damaged."""
        return lambda **changes: Path(shutil.copytree(finished(**changes), tmp_path / "run"))

    @pytest.fixture(autouse=True)
    def _without_claims(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claims, "CLAIMS", [])

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_run_holds(self, kind: str, finished: Callable) -> None:
        ended = call(verify.main, finished(**KINDS[kind]))
        assert (ended.code, ended.err) == (0, ""), ended.out
        assert "this run: merged == split == exported" in ended.out
        assert ("magnitude is above 0" in ended.out) == (kind == "dora")
        assert ended.out.endswith(f"\nall {5 if kind == 'dora' else 4} claims hold\n")

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_a_run_is_checked_in_its_own_precision_too(self, precision: str, own: Callable) -> None:
        folder = own(**KINDS["dora"])
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"precision": precision, "device": "cuda"}
        path.write_text(json.dumps(config))
        ended = call(verify.main, folder)
        assert ended.code == 0, ended.out
        lines = [line for line in ended.out.splitlines() if "merged == split" in line]
        assert [re.search(r"exported +(\w+)", line)[1] for line in lines] == ["fp32", precision]

    @pytest.mark.parametrize(
        ("parameter", "damage", "broken"),
        [
            ("lora_B.weight", lambda one: one.zero_(), "no lora_B is all zeros"),
            ("lora_A.weight", lambda one: one[0].fill_(float("inf")), "what trained is finite"),
            ("lora_magnitude_vector", lambda one: one.neg_(), "every magnitude is above 0"),
            ("weight", lambda one: one[3].add_(1e-6), "base weights are the checkpoint's bits"),
            ("bias", lambda one: one[3].add_(1e-6), "base weights are the checkpoint's bits"),
        ],
    )
    def test_a_damaged_layer_is_told_by_its_name(
        self,
        parameter: str,
        damage: Callable,
        broken: str,
        finished: Callable,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        loaded, name = run_folder.load_run, "encoder.layer.1.attention.self.key"

        def load(path: Path) -> tuple:
            config, model, tokenizer = loaded(path)
            damage(model.bert.get_parameter(f"{name}.{parameter}").data)
            return config, model, tokenizer

        monkeypatch.setattr(run_folder, "load_run", load)
        ended = call(verify.main, finished(**KINDS["dora"]))
        assert ended.code == 1
        (line,) = (line for line in ended.out.splitlines() if broken in line and "NO" in line)
        assert line.split()[-1] in (name, f"{name}.{parameter}")

    @pytest.mark.parametrize("method", ["full", "frozen"])
    def test_a_run_without_adapters_is_refused(self, method: str, finished: Callable) -> None:
        folder = finished(method=method, max_steps=1)
        refused(
            call(verify.main, folder), f"{folder}: expected a run with adapters, --method {method} has none"
        )

    @pytest.mark.parametrize("name", ["config.json", "result.json", "adapter/adapter_config.json"])
    def test_a_folder_that_is_no_finished_run_is_refused(self, name: str, own: Callable) -> None:
        folder = own(**KINDS["rslora"])
        (folder / name).unlink()
        refused(call(verify.main, folder), folder)

    def test_bad_usage_is_refused(self, tmp_path: Path) -> None:
        refused(call(verify.main, tmp_path / "no"), "no/config.json: cannot be read")
        refused(call(verify.main, "one", "two"), "unrecognized arguments: two")


def refused(ended: Ended, words: object) -> None:
    assert (ended.code, ended.out) == (2, "")
    assert ended.line.startswith("error: ")
    assert str(words) in ended.line
