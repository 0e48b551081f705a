"""Where and in which dtype a run computes, with the hardware's answers given by the test."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import settings

from lora.layers import LoRALinear
from training.build import build_model, complete
from training.loop import Trainer
from training.precision import choose_device, choose_precision
from training.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what torch says of the hardware."""

    def be(gpus: int = 0, gpu_bf16: bool = False, emulated: bool = True, cpu: str = "") -> None:
        def is_bf16_supported(including_emulation: bool = True) -> bool:
            return gpu_bf16 or (including_emulation and emulated)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: bool(cpu) and cpu in probe)

    return be


def test_a_t4_computes_in_fp16_and_not_in_emulated_bf16(machine, refusal) -> None:
    machine(gpus=1, gpu_bf16=False, emulated=True)
    assert choose_precision("auto", GPU) == "fp16"
    assert "this cuda has no bf16 arithmetic; best here is fp16" in refusal(choose_precision, "bf16", GPU)


def test_an_ampere_gpu_computes_in_bf16(machine) -> None:
    machine(gpus=1, gpu_bf16=True)
    assert choose_precision("auto", GPU) == "bf16"


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx"])
def test_a_cpu_with_bf16_instructions_uses_them(machine, instructions: str) -> None:
    machine(cpu=instructions)
    assert choose_precision("auto", CPU) == "bf16"


def test_a_cpu_without_bf16_instructions_computes_in_fp32(machine, refusal) -> None:
    machine(gpus=1, gpu_bf16=True)  # what a GPU has is no matter
    assert choose_precision("auto", CPU) == "fp32"
    assert "this cpu has no bf16 arithmetic; best here is fp32" in refusal(choose_precision, "bf16", CPU)


def test_a_torch_without_the_probes_computes_in_fp32(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe)
    assert choose_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("bf16", [False, True])
def test_a_precision_that_is_asked_for_is_kept(machine, bf16: bool, refusal) -> None:
    machine(gpus=1, gpu_bf16=bf16, cpu="amx")
    assert choose_precision("fp32", GPU) == "fp32"
    assert choose_precision("fp16", GPU) == "fp16"
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"
    assert "--precision fp16: expected a GPU" in refusal(choose_precision, "fp16", CPU)


def test_the_device_is_a_gpu_where_there_is_one(machine) -> None:
    machine(gpus=1)
    assert choose_device("auto") == GPU
    machine(gpus=0)
    assert choose_device("auto") == CPU
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "meta", "mps"])
def test_a_device_that_is_none_is_refused(machine, name: str, refusal) -> None:
    machine(gpus=1)
    assert refusal(choose_device, name) == f"--device: expected cpu, cuda or cuda:N, got {name!r}"


def test_a_gpu_that_is_not_there_is_refused(machine, refusal) -> None:
    machine(gpus=0)
    assert refusal(choose_device, "cuda") == "--device cuda: this machine has 0 CUDA devices"
    machine(gpus=2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert "this machine has 2 CUDA devices" in refusal(choose_device, "cuda:2")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["frozen", "full", "lora", "rslora", "dora"])
def test_what_trains_and_what_adapters_merge_into_stay_in_fp32(
    method: str, precision: str, tiny: Path, small_data: Path
) -> None:
    config = complete(settings(tiny, small_data, method=method, precision=precision), tiny)
    model = build_model(config, tiny)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for name, parameter in model.named_parameters():
        module, own = name.rsplit(".", 1)
        merged_into = isinstance(model.get_submodule(module), LoRALinear) and own == "weight"
        unchanged = name.startswith("bert.") and ".lora_" not in name and not merged_into and method != "full"
        assert parameter.dtype == (half if unchanged else torch.float32), name
    hidden = []
    model.bert.register_forward_hook(lambda module, given, output: hidden.append(output.dtype))
    run = Run(settings(tiny, small_data, method=method, max_steps=1))
    logits = model("sts", run.trainer.plan.batch(0)[1])
    assert hidden == [half]
    assert logits.dtype == torch.float32


def fp16_trainer(tiny: Path, small_data: Path) -> Trainer:
    """A trainer as on a GPU without bf16; the scaler's own kernels exist for CPUs too."""
    run = Run(settings(tiny, small_data))
    config = replace(run.config, precision="fp16", device="cpu")
    return Trainer(config, build_model(config, tiny), run.data["train"], CPU)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_an_fp16_step_that_overflows_is_skipped_and_the_scale_halves(tiny: Path, small_data: Path) -> None:
    trainer = fp16_trainer(tiny, small_data)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = weights(trainer)
    line = trainer.step()
    assert all(map(torch.equal, weights(trainer), before))
    assert trainer.scaler.get_scale() == 2.0**39
    assert line["grad_norm"] is None  # not Infinity, which is no JSON
    assert trainer.progress.skipped == 1
    assert math.isfinite(line["loss"])


def test_the_scale_of_the_loss_is_taken_out_of_the_gradients(tiny: Path, small_data: Path) -> None:
    lines, moved = [], []
    for scale in (1.0, 2.0**8):
        trainer = fp16_trainer(tiny, small_data)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        lines.append(trainer.step())
        moved.append(weights(trainer))
    assert trainer.progress.skipped == 0
    assert lines[0]["loss"] == lines[1]["loss"]
    assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=0.01)
    assert not all(map(torch.equal, moved[0], weights(fp16_trainer(tiny, small_data))))


@pytest.mark.parametrize(("precision", "scales"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_only_fp16_scales_its_loss(precision: str, scales: bool, tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data))
    config = replace(run.config, precision=precision)
    trainer = Trainer(config, build_model(config, tiny), run.data["train"], CPU)
    assert trainer.scaler.is_enabled() == scales
