"""Where and in which dtype a run computes, with the hardware's answers given by the test."""

import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from small_runs import call, flags, left_behind, settings, strict_json
from tiny_bert import TINY
from torch.profiler import ProfilerActivity, profile

import train
from lora.layers import LoRALinear
from training.build import build_model, complete
from training.config import PRECISIONS
from training.loop import Trainer
from training.precision import (
    BUDGET,
    MOST_ROWS,
    Rates,
    choose_device,
    choose_precision,
    layer_products,
    measure,
)
from training.report import Bar
from training.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Callable[..., None]:
    """Sets what torch and the system say of the hardware, and which rates a measurement finds."""

    def be(
        gpus: int = 0,
        gpu_bf16: bool = False,
        emulated: bool = True,
        cpu: str = "",
        rates: Rates | None = None,
    ) -> None:
        def is_bf16_supported(including_emulation: bool = True) -> bool:
            return gpu_bf16 or (including_emulation and emulated)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        monkeypatch.setattr("training.machine.CPU_INFO", own_cache.with_name("cpuinfo"))
        own_cache.with_name("cpuinfo").write_text(cpu)
        monkeypatch.setattr("training.precision.measure", lambda multiply: rates)

    return be


def cpu_info(flags: str, name: str = "A CPU") -> str:
    """What Linux tells of an x86 CPU."""
    return f"model name\t: {name}\ncpu family\t: 6\nmodel\t\t: 207\nflags\t\t: fpu {flags} sse\n"


BF16 = cpu_info("avx512_bf16")
FASTER, SLOWER = Rates(2e11, 9e11), Rates(3.44e11, 1.71e11)


def test_a_t4_computes_in_fp16_and_not_in_emulated_bf16(machine, refusal) -> None:
    machine(gpus=1, gpu_bf16=False, emulated=True)
    assert choose_precision("auto", GPU, TINY).precision == "fp16"
    said = refusal(choose_precision, "bf16", GPU, TINY)
    assert "this cuda has no bf16 arithmetic; best here is fp16" in said


def test_an_ampere_gpu_computes_in_bf16(machine) -> None:
    machine(gpus=1, gpu_bf16=True)
    assert choose_precision("auto", GPU, TINY).precision == "bf16"


@pytest.mark.parametrize(
    ("rates", "taken"),
    [(FASTER, "bf16"), (SLOWER, "fp32"), (Rates(1e11, 1.09e11), "fp32"), (Rates(1e11, 1.11e11), "bf16")],
)
def test_a_cpu_computes_in_what_is_faster_by_more_than_a_tenth(machine, rates, taken: str) -> None:
    machine(gpus=1, gpu_bf16=True, cpu=BF16, rates=rates)  # what a GPU has is no matter
    choice = choose_precision("auto", CPU, TINY)
    assert (choice.precision, choice.rates, choice.warning) == (taken, rates, "")
    assert choice.reason == f"measured: {rates}"


@pytest.mark.parametrize(
    ("cpu", "bf16"),
    [
        (cpu_info("avx512_bf16"), True),
        (cpu_info("amx_bf16 amx_tile"), True),
        ("Features\t: fp asimd bf16 i8mm\n", True),  # Arm
        (cpu_info("avx2 avx512f avx512bw"), False),
        (cpu_info("avx2 not_bf16"), False),
        ("", False),
    ],
)
def test_a_cpu_without_bf16_instructions_is_not_timed(machine, cpu: str, bf16: bool) -> None:
    machine(cpu=cpu, rates=FASTER)
    choice = choose_precision("auto", CPU, TINY)
    assert choice.precision == ("bf16" if bf16 else "fp32")
    assert (choice.rates is None) == (not bf16)
    assert bf16 or choice.reason == "this CPU has no bf16 instructions"


def test_timings_that_contradict_each_other_give_fp32_and_are_not_kept(machine) -> None:
    machine(cpu=BF16, rates=None)
    choice = choose_precision("auto", CPU, TINY)
    assert (choice.precision, choice.rates) == ("fp32", None)
    assert "too busy to time bf16" in choice.reason
    machine(cpu=BF16, rates=FASTER)
    assert choose_precision("auto", CPU, TINY).precision == "bf16"


def test_what_was_measured_once_is_taken_again_on_the_same_machine(machine) -> None:
    machine(cpu=BF16, rates=FASTER)
    assert choose_precision("auto", CPU, TINY).rates == FASTER
    machine(cpu=BF16, rates=SLOWER)
    assert choose_precision("auto", CPU, TINY).rates == FASTER
    assert choose_precision("auto", CPU, replace(TINY, hidden_size=96)).rates == SLOWER
    machine(cpu=cpu_info("avx512_bf16", "Another CPU"), rates=SLOWER)
    assert choose_precision("auto", CPU, TINY).rates == SLOWER


@pytest.mark.parametrize("name", ["torch.__version__", "torch.get_num_threads"])
def test_another_torch_or_number_of_threads_is_measured_anew(machine, monkeypatch, name: str) -> None:
    machine(cpu=BF16, rates=FASTER)
    choose_precision("auto", CPU, TINY)
    machine(cpu=BF16, rates=SLOWER)
    monkeypatch.setattr(name, "2.99" if name.endswith("version__") else lambda: 77)
    assert choose_precision("auto", CPU, TINY).rates == SLOWER


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text(path.read_text().replace('"bf16": 9', '"bf16": -9')),
        lambda path: path.write_text(path.read_text().replace('"bf16": 900000000000.0', '"bf16": NaN')),
        lambda path: path.write_text(path.read_text().replace('"threads"', '"cores"')),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["cut off", "negative", "nan", "of another kind", "a folder"],
)
def test_a_damaged_measurement_is_made_again(machine, own_cache: Path, damage: Callable) -> None:
    machine(cpu=BF16, rates=FASTER)
    choose_precision("auto", CPU, TINY)
    (path,) = (own_cache / "rates").iterdir()
    before = path.read_bytes()
    damage(path)
    assert path.is_dir() or path.read_bytes() != before
    machine(cpu=BF16, rates=SLOWER)
    assert choose_precision("auto", CPU, TINY).rates == SLOWER


def test_a_cache_that_cannot_be_written_does_not_matter(machine, own_cache: Path) -> None:
    own_cache.write_text("a file in its place")
    machine(cpu=BF16, rates=FASTER)
    assert choose_precision("auto", CPU, TINY).rates == FASTER


def test_a_precision_that_is_asked_for_is_kept(machine, refusal) -> None:
    machine(gpus=1, gpu_bf16=True, cpu=BF16, rates=FASTER)
    assert choose_precision("fp32", GPU, TINY).precision == "fp32"
    assert choose_precision("fp16", GPU, TINY).precision == "fp16"
    assert choose_precision("fp32", CPU, TINY) == ("fp32", None, "", "")
    assert "--precision fp16: expected a GPU" in refusal(choose_precision, "fp16", CPU, TINY)
    choice = choose_precision("bf16", CPU, TINY)
    assert (choice.precision, choice.warning) == ("bf16", "")


@pytest.mark.parametrize(
    ("cpu", "said"),
    [
        (BF16, "--precision bf16: fp32 is faster here, 344 GFLOP/s in fp32, 171 in bf16"),
        (cpu_info("avx2"), "--precision bf16: this CPU has no bf16 instructions; fp32 is many times faster"),
    ],
)
def test_bf16_where_it_is_slower_is_done_and_said(machine, cpu: str, said: str) -> None:
    machine(cpu=cpu, rates=SLOWER)
    choice = choose_precision("bf16", CPU, TINY)
    assert (choice.precision, choice.warning) == ("bf16", said)


class Clock:
    """A clock that only products move on, at the given FLOP/s; `jumps`: seconds lost at the n-th product."""

    def __init__(self, rates: Callable[[int, str], float], jumps: dict[int, float] | None = None):
        self.now, self.rates, self.jumps = 100.0, rates, jumps or {}
        self.done: list[tuple[int, str]] = []

    def __call__(self) -> float:
        return self.now

    def multiply(self, rows: int, precision: str) -> float:
        self.now += self.jumps.get(len(self.done), 0.0)
        self.done.append((rows, precision))
        flops = 5e6 * rows
        self.now += flops / self.rates(rows, precision)
        return flops


@pytest.mark.parametrize("rates", [FASTER, SLOWER, Rates(5e10, 5e10), Rates(5e12, 1e13)])
def test_the_rates_are_those_of_the_clock_and_the_time_is_kept(rates: Rates) -> None:
    clock = Clock(lambda rows, precision: getattr(rates, precision))
    assert measure(clock.multiply, clock) == pytest.approx(rates)
    assert clock.now - 100 <= BUDGET
    assert clock.done[:4] == [(16, "fp32")] * 2 + [(16, "bf16")] * 2
    assert max(rows for rows, _ in clock.done) <= MOST_ROWS


def test_large_products_count_where_small_ones_tell_another_story() -> None:
    clock = Clock(lambda rows, precision: 1e12 * (min(rows / 64, 3) if precision == "bf16" else 1))
    assert measure(clock.multiply, clock) == pytest.approx((1e12, 3e12))


def test_a_first_call_that_builds_a_kernel_does_not_count() -> None:
    seen: set[tuple[int, str]] = set()

    def rate(rows: int, precision: str) -> float:
        first = (rows, precision) not in seen
        seen.add((rows, precision))
        return 5e10 if first and precision == "bf16" else getattr(FASTER, precision)

    clock = Clock(rate)
    assert measure(clock.multiply, clock) == pytest.approx(FASTER)


@pytest.mark.parametrize(
    "clock",
    [
        Clock(lambda rows, precision: 1e9),  # no product ends in time
        Clock(lambda rows, precision: 1e9 if rows > 16 else 1e11),
        Clock(lambda rows, precision: 1e11 if (rows > 64) == (precision == "bf16") else 2e11),
        Clock(lambda rows, precision: 1e11, {0: -1e-3}),
        Clock(lambda rows, precision: 1e11, {5: -3600.0}),
        Clock(lambda rows, precision: 1e11, {2: 3600.0}),
        Clock(lambda rows, precision: math.inf),  # a clock that stands still
    ],
    ids=["busy", "soon busy", "contradictory", "back a little", "an hour back", "an hour on", "still"],
)
def test_a_clock_that_cannot_be_believed_gives_no_rates(clock: Clock) -> None:
    assert measure(clock.multiply, clock) is None
    assert len(clock.done) <= 4 * 6


def test_what_is_timed_is_a_layer_s_products() -> None:
    multiply = layer_products(TINY)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
        told = multiply(32, "fp32")
    assert told == sum(event.flops for event in seen.events())
    hidden, wide = TINY.hidden_size, TINY.intermediate_size
    assert told == 2 * 2 * 32 * (hidden * hidden + 2 * hidden * wide)  # forward and dx, three shapes


def test_measuring_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    measure(layer_products(TINY))
    assert torch.equal(torch.get_rng_state(), before)


def trained(arguments: list[str]) -> str:
    ended = call(train.main, *arguments)
    assert ended.code == 0, ended.err
    return ended.out


def test_a_run_says_both_rates_and_one_from_its_config_takes_the_same_precision(
    machine, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    machine(cpu=BF16, rates=FASTER)
    out, again = tmp_path / "out", tmp_path / "again"
    said = trained(flags(tiny, small_data, out=out, precision="auto", max_steps=3))
    assert "computing  bf16 on cpu (measured: 200 GFLOP/s in fp32, 900 in bf16)\n" in said
    result = strict_json((out / "result.json").read_text())
    assert (result["precision"], result["products_flops_per_second"]) == ("bf16", FASTER._asdict())

    shutil.rmtree(Path(os.environ["MINIBERT_CACHE"]))
    machine(cpu=BF16, rates=SLOWER)
    ended = call(train.main, "--config", out / "config.json", "--out", again)
    assert ended.code == 0
    assert ended.err.splitlines()[0].startswith("--precision bf16: fp32 is faster here")
    assert strict_json((again / "result.json").read_text())["precision"] == "bf16"
    for name in ("predictions-dev.csv", "head.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_a_resumed_run_keeps_the_precision_and_the_rates_it_began_with(
    machine, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    whole, out = ([*flags(tiny, small_data, precision="auto", epochs=3)] for _ in range(2))
    machine(cpu=BF16, rates=FASTER)
    trained([*whole, "--out", str(tmp_path / "whole")])

    class StoppingBar(Bar):
        def epoch(self, line: dict) -> None:
            super().epoch(line)
            os.kill(os.getpid(), signal.SIGTERM)

    with patch("training.run.Bar", StoppingBar):
        assert call(train.main, *out, "--out", tmp_path / "out").code == 143
    shutil.rmtree(Path(os.environ["MINIBERT_CACHE"]))
    machine(cpu=BF16, rates=SLOWER)  # busy with something else, and the cache is gone
    assert "computing  bf16 on cpu" in trained([*out, "--out", str(tmp_path / "out"), "--resume"])
    assert left_behind(tmp_path / "out") == left_behind(tmp_path / "whole")


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_one_s_choice_is_everybody_s(machine, rank: int, tiny: Path) -> None:
    machine(cpu=BF16, rates=(FASTER, SLOWER)[rank])  # as two timings at one moment could turn out
    run, asked = SimpleNamespace(device=CPU, base=tiny), []

    def largest(value: int) -> int:
        asked.append(value)
        return max(value, PRECISIONS.index("bf16"))  # what the other has, if this is not the first

    run.processes = SimpleNamespace(first=rank == 0, alone=False, largest=largest)
    choice = Run._choose_precision(run, "auto")
    assert choice.precision == "bf16"
    assert choice.rates == (FASTER if rank == 0 else None)
    assert asked == [PRECISIONS.index("bf16" if rank == 0 else "auto")]
    assert Run._choose_precision(run, "fp32").precision == "fp32"
    assert len(asked) == 1  # what is asked for is everybody's anyway


def test_a_gpu_is_taken_where_there_is_one(machine) -> None:
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
    said = refusal(choose_device, "cuda")
    assert said.startswith("--device cuda: this machine has 0 CUDA devices: this PyTorch ")
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
