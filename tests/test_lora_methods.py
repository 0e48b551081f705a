"""Applying a method: which layers become adapters, what trains, and where adapters start."""

import copy
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_bert import TINY
from tolerances import tolerance
from torch import Tensor, nn

from lora.layers import DoRALinear, LoRALinear
from lora.methods import METHODS, apply_method
from lora.placement import TARGET_SETS, TARGETS, check_ranks, check_targets, linear_names, place, place_ranks
from minibert.model import Bert, BertConfig
from minibert.sequences import Sequences
from minibert.weights import load_bert

ROOT = Path(__file__).parents[1]
ADAPTED = ("lora", "rslora", "dora")
LAYER = ("attention.self.query", "attention.self.key", "attention.self.value",
         "attention.output.dense", "intermediate.dense", "output.dense")  # fmt: skip
MINILM = BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
)


@pytest.fixture
def bert(tiny: Path) -> Bert:
    return load_bert(tiny).eval()


@pytest.fixture
def fresh(tiny: Path) -> Callable[[], Bert]:
    return lambda: load_bert(tiny).double().eval()


def adapters(encoder: nn.Module, part: str = "lora_") -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in encoder.named_parameters() if part in name}


def move(encoder: nn.Module) -> None:
    """Move every trainable tensor off its start, by amounts that depend on its name's place alone."""
    generator = torch.Generator().manual_seed(1)
    for tensor in adapters(encoder).values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def hidden(bert: Bert) -> Tensor:
    ids = torch.arange(5, 30)
    return bert(ids, (ids > 20).long(), Sequences((9, 16)))


def snapshot(encoder: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {name: (p.detach().clone(), p.requires_grad) for name, p in encoder.named_parameters()}


def unchanged(encoder: nn.Module, before: dict[str, tuple[Tensor, bool]]) -> bool:
    now = snapshot(encoder)
    return now.keys() == before.keys() and all(
        torch.equal(now[name][0], tensor) and now[name][1] == trains
        for name, (tensor, trains) in before.items()
    )


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "ends"),
        [
            (("all",), LAYER),
            (("attention",), LAYER[:4]),
            (("dense",), LAYER[3:]),
            (("query", "value"), (LAYER[0], LAYER[2])),
            (("output",), LAYER[5:]),
            (("attention.output",), LAYER[3:4]),
            (("value", "query", "value"), (LAYER[0], LAYER[2])),
            (("output", "attention"), (*LAYER[:4], LAYER[5])),
        ],
    )
    @pytest.mark.parametrize("method", ADAPTED)
    def test_exactly_the_targets_become_adapters(self, bert: Bert, method: str, targets, ends):
        expected = [f"encoder.layer.{i}.{end}" for i in range(TINY.num_hidden_layers) for end in ends]
        assert apply_method(bert, METHODS[method], rank=3, targets=targets) == expected
        found = {name: module for name, module in bert.named_modules() if isinstance(module, LoRALinear)}
        assert set(found) == set(expected)
        assert {type(module) for module in found.values()} == {DoRALinear if method == "dora" else LoRALinear}

    def test_the_pooler_is_never_adapted(self, bert: Bert):
        assert bert.pooler is not None
        apply_method(bert, METHODS["lora"])
        assert not isinstance(bert.pooler["dense"], LoRALinear)

    @pytest.mark.parametrize(
        ("targets", "expected"),
        [
            (("query@1",), ["encoder.layer.1.attention.self.query"]),
            (("attention.self.query@0",), ["encoder.layer.0.attention.self.query"]),
            (("output.dense",), ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]),
            (("encoder.layer.1.output.dense",), ["encoder.layer.1.output.dense"]),
            (("pooler.dense", "key@0"), ["encoder.layer.0.attention.self.key", "pooler.dense"]),
            (("all@0-1",), linear_names(2, with_pooler=False)),
            (("all@0,1", "query"), linear_names(2, with_pooler=False)),
        ],
    )
    def test_paths_and_layers_pick_exactly_these(self, bert: Bert, targets, expected):
        assert apply_method(bert, METHODS["lora"], rank=3, targets=targets) == expected

    def test_the_names_known_without_a_model_are_those_a_model_has(self, bert: Bert):
        linears = [name for name, module in bert.named_modules() if isinstance(module, nn.Linear)]
        assert linear_names(TINY.num_hidden_layers, with_pooler=True) == linears

    def test_the_names_of_targets_and_sets_are_those_of_the_paper(self):
        assert TARGET_SETS["all"] == tuple(TARGETS)
        assert not set(TARGETS) & set(TARGET_SETS)
        assert tuple(TARGETS.values()) == LAYER

    @pytest.mark.parametrize(
        "names", [["dense", "pooler"], ["Query"], [""], ["all-linear"], ["lora_A"], "all", [".*"], ["a..b"]]
    )
    def test_an_unknown_target_is_refused_with_the_known_ones(self, names):
        known = re.escape("all, attention, dense, query, key, value, attention.output, intermediate, output")
        with pytest.raises(ValueError, match=f"expected targets among {known}, or a dotted path, got '"):
            check_targets(names)

    @pytest.mark.parametrize("target", ["query@", "query@x", "query@1-", "query@-1", "all@1;2", "all@0@1"])
    def test_layers_that_are_none_are_refused(self, target: str):
        with pytest.raises(ValueError, match=f"expected layers as in @0, .* got '{re.escape(target)}'"):
            check_targets([target])

    @pytest.mark.parametrize("target", ["query@2", "all@3-9", "query@1-0", "encoder.dense", "pooler.dense@0"])
    def test_a_target_that_matches_nothing_is_refused_with_what_exists(self, target: str):
        with pytest.raises(ValueError, match="matches no linear layer") as caught:
            place(["all", target], linear_names(2, with_pooler=True))
        assert repr(target) in str(caught.value)
        assert "attention.self.query@0-1" in str(caught.value)
        assert str(caught.value).endswith("pooler.dense")

    def test_no_target_is_refused(self):
        with pytest.raises(ValueError, match="got none"):
            check_targets([])


class TestRanks:
    def test_of_several_patterns_that_hit_a_layer_the_last_counts(self):
        linears = place(["query", "value"], linear_names(2, with_pooler=False))
        ranks = place_ranks(["all@0=4", "query=16"], [*linears])
        assert ranks == {
            "encoder.layer.0.attention.self.query": 16,
            "encoder.layer.0.attention.self.value": 4,
            "encoder.layer.1.attention.self.query": 16,
        }

    def test_ranks_and_alphas_reach_the_layers_they_name(self, bert: Bert):
        name = "encoder.layer.1.attention.self.key"
        adapted = apply_method(bert, METHODS["rslora"], rank=3, ranks={name: 7}, alphas={name: 5.0})
        for one in adapted:
            layer = bert.get_submodule(one)
            assert layer.lora_A.out_features == (7 if one == name else 3)
            assert layer.scaling == pytest.approx(5 / math.sqrt(7) if one == name else 2)

    @pytest.mark.parametrize("given", [{"ranks": {"pooler.dense": 2}}, {"alphas": {"query": 2.0}}])
    def test_a_rank_for_a_layer_without_adapter_is_refused(self, bert: Bert, given):
        before = snapshot(bert)
        with pytest.raises(ValueError, match="for adapted layers alone"):
            apply_method(bert, METHODS["lora"], rank=3, **given)
        assert unchanged(bert, before)

    @pytest.mark.parametrize("part", ["query", "query=", "query=0", "query=-1", "query=1.5", "=3", "query=x"])
    def test_what_is_no_rank_pattern_is_refused(self, part: str):
        with pytest.raises(ValueError, match=f"expected TARGET=RANK, as in query=16, got '{part}'"):
            check_ranks([part])


class TestWhatTrains:
    @pytest.mark.parametrize("r", [1, 8, 12])
    @pytest.mark.parametrize(
        ("method", "targets", "formula"),
        [
            ("frozen", ("all",), lambda r: 0),
            # embeddings and their norm; per layer 4 H·H, 2 H·4H, their biases and 2 norms; the pooler
            ("full", ("all",), lambda r: (
                (30522 + 512 + 2 + 2) * 384 + 6 * (12 * 384**2 + (4 + 4 + 1 + 4) * 384) + 384 * 384 + 384)),
            # r (in + out): four of H + H, two of H + 4H
            ("lora", ("all",), lambda r: 6 * 18 * 384 * r),
            ("rslora", ("all",), lambda r: 6 * 18 * 384 * r),
            # and a magnitude per output: four of H, one of 4H, one of H
            ("dora", ("all",), lambda r: 6 * (18 * 384 * r + 9 * 384)),
            ("lora", ("attention",), lambda r: 6 * 8 * 384 * r),
            ("lora", ("dense",), lambda r: 6 * 12 * 384 * r),
            ("dora", ("query", "value"), lambda r: 6 * (4 * 384 * r + 2 * 384)),
        ],
    )  # fmt: skip
    def test_minilm_trains_as_many_parameters_as_by_hand(self, method: str, targets, formula, r: int):
        with torch.device("meta"):
            encoder = Bert(MINILM)
            apply_method(encoder, METHODS[method], rank=r, targets=targets)
        assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == formula(r)

    def test_the_real_minilm_has_as_many_parameters_as_published(self, minilm: Path):
        encoder = load_bert(minilm)
        apply_method(encoder, METHODS["full"])
        assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == 22_713_216

    @pytest.mark.parametrize("method", ADAPTED)
    def test_only_adapters_train(self, bert: Bert, method: str):
        apply_method(bert, METHODS[method], rank=3)
        parts = {n.rsplit(".lora_", 1)[-1] for n, p in bert.named_parameters() if p.requires_grad}
        assert parts == {"A.weight", "B.weight"} | ({"magnitude_vector"} if method == "dora" else set())

    @pytest.mark.parametrize("method", METHODS)
    def test_frozen_tensors_do_not_move_and_all_others_do(self, bert: Bert, method: str):
        """Two steps: A has no gradient in the first, while B is zero."""
        apply_method(bert, METHODS[method], rank=3)
        before = snapshot(bert)
        optimizer = torch.optim.AdamW(bert.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(2):
            loss = hidden(bert).pow(3).sum() + bert.pooler["dense"](hidden(bert)).pow(2).sum()
            if loss.requires_grad:
                loss.backward()
            assert [n for n, p in bert.named_parameters() if p.grad is not None and not p.requires_grad] == []
            optimizer.step()
            optimizer.zero_grad()
        moved = {name for name, p in bert.named_parameters() if not torch.equal(p, before[name][0])}
        assert moved == {name for name, (_, trains) in before.items() if trains}
        if METHODS[method].layer:
            assert (
                len([name for name in moved if name.endswith("lora_B.weight")]) == 6 * TINY.num_hidden_layers
            )

    @pytest.mark.parametrize("method", METHODS)
    def test_a_fresh_method_computes_what_the_bare_encoder_computes(self, fresh, method: str):
        bare, encoder = fresh(), fresh()
        apply_method(encoder, METHODS[method], rank=3, dropout=0.5)
        torch.testing.assert_close(hidden(encoder), hidden(bare), **tolerance(torch.float64, "encoder"))

    @pytest.mark.parametrize("training", [True, False])
    def test_adapters_take_the_encoders_mode(self, bert: Bert, training: bool):
        bert.train(training)
        apply_method(bert, METHODS["lora"], rank=3, dropout=0.5)
        assert {module.training for module in bert.modules()} == {training}


class TestStart:
    def test_lora_rslora_and_dora_start_from_the_same_a(self, fresh):
        started = []
        for method in ADAPTED:
            torch.manual_seed(len(started))  # the global generator has no say
            encoder = fresh()
            apply_method(encoder, METHODS[method], rank=3, seed=7)
            started.append(adapters(encoder, "lora_A"))
        assert len(started[0]) == 12
        for other in started[1:]:
            torch.testing.assert_close(other, started[0], rtol=0, atol=0)

    def test_an_adapters_start_depends_on_no_other_adapter(self, fresh):
        every, some = fresh(), fresh()
        apply_method(every, METHODS["lora"], rank=3, seed=7)
        apply_method(some, METHODS["lora"], rank=3, seed=7, targets=("output", "key"))
        started = adapters(some, "lora_A")
        assert len(started) == 4
        torch.testing.assert_close({n: adapters(every)[n] for n in started}, started, rtol=0, atol=0)

    def test_every_layer_and_every_seed_starts_elsewhere(self, fresh):
        starts = []
        for seed in (0, 1):
            encoder = fresh()
            apply_method(encoder, METHODS["lora"], rank=3, seed=seed, targets=("attention",))
            starts += [tuple(tensor.flatten().tolist()) for tensor in adapters(encoder, "lora_A").values()]
        assert len(set(starts)) == len(starts) == 16

    @pytest.mark.parametrize("rank", [1, 3, 8, 12])
    def test_by_default_every_method_has_an_effective_scale_of_two(self, bert: Bert, rank: int):
        for method in ADAPTED:
            encoder = copy.deepcopy(bert)
            name = apply_method(encoder, METHODS[method], rank=rank)[0]
            assert encoder.get_submodule(name).scaling == pytest.approx(2, abs=1e-12)

    @pytest.mark.parametrize(("alpha", "r"), [(5.0, 3), (16.0, 8), (1.0, 1), (7.5, 12)])
    def test_scaling_is_alpha_over_r_and_in_rslora_over_its_root(self, alpha: float, r: int):
        assert METHODS["lora"].scaling(alpha, r) == METHODS["dora"].scaling(alpha, r) == alpha / r
        assert METHODS["rslora"].scaling(alpha, r) == pytest.approx(alpha / r**0.5, rel=1e-15)

    @pytest.mark.parametrize(("alpha", "r"), [(5.0, 3), (16.0, 8), (7.5, 12)])
    def test_rslora_at_alpha_is_lora_at_alpha_root_r(self, fresh, alpha: float, r: int):
        one, other, unlike = fresh(), fresh(), fresh()
        apply_method(one, METHODS["rslora"], rank=r, alpha=alpha)
        apply_method(other, METHODS["lora"], rank=r, alpha=alpha * math.sqrt(r))
        apply_method(unlike, METHODS["lora"], rank=r, alpha=alpha)
        for encoder in (one, other, unlike):
            move(encoder)
        torch.testing.assert_close(hidden(one), hidden(other), **tolerance(torch.float64, "encoder"))
        assert (hidden(one) - hidden(unlike)).abs().max() > 1e-3

    def test_alpha_and_dropout_reach_every_layer(self, bert: Bert):
        names = apply_method(bert, METHODS["lora"], rank=3, alpha=5.0, dropout=0.25)
        layers = [bert.get_submodule(name) for name in names]
        assert {(one.scaling, one.dropout.p, one.lora_A.out_features) for one in layers} == {(5 / 3, 0.25, 3)}


class TestErrors:
    @pytest.mark.parametrize("method", ADAPTED)
    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"rank": 0}, "rank must be at least 1, got 0"),
            ({"rank": -3}, "rank must be at least 1, got -3"),
            ({"rank": 33}, r"rank must be in \[1, 32\]"),
            ({"alpha": 0.0}, "scaling must be a positive number"),
            ({"alpha": -1.0}, "scaling must be a positive number"),
            ({"alpha": math.nan}, "scaling must be a positive number"),
            ({"alpha": math.inf}, "scaling must be a positive number"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
            ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
            ({"targets": ("pooler",)}, "expected targets among"),
            ({"targets": ()}, "expected targets among"),
        ],
    )
    def test_nonsense_is_refused_and_leaves_the_encoder_as_it_was(self, bert, method, setting, message):
        next(bert.parameters()).requires_grad_(False)  # not all alike, so that nobody guesses
        before = snapshot(bert)
        with pytest.raises(ValueError, match=message):
            apply_method(bert, METHODS[method], **setting)
        assert unchanged(bert, before)

    def test_a_layer_refused_after_others_leaves_the_encoder_as_it_was(self):
        encoder = Bert(replace(TINY, intermediate_size=16))  # rank 20 suits attention's layers alone
        before = snapshot(encoder)
        with pytest.raises(ValueError, match=r"rank must be in \[1, 16\]"):
            apply_method(encoder, METHODS["lora"], rank=20)
        assert unchanged(encoder, before)

    @pytest.mark.parametrize("second", METHODS)
    def test_a_method_on_top_of_adapters_is_refused(self, bert: Bert, second: str):
        apply_method(bert, METHODS["lora"], rank=3, targets=("query",))
        before = snapshot(bert)
        with pytest.raises(ValueError, match="the encoder has adapters already"):
            apply_method(bert, METHODS[second], rank=3)
        assert unchanged(bert, before)

    def test_an_encoder_without_such_layers_is_refused(self):
        with pytest.raises(ValueError, match="'all' matches no linear layer"):
            apply_method(nn.Sequential(nn.Linear(4, 4)), METHODS["lora"], rank=2)


@pytest.mark.parametrize("module", ["lora.methods", "lora", "kernels", "training.config", "training.cli"])
def test_what_the_command_line_reads_imports_no_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_table_holds_the_methods_of_the_study():
    assert list(METHODS) == ["frozen", "full", "lora", "rslora", "dora"]
    for name, method in METHODS.items():
        assert method.trains_encoder == (name == "full")
        assert (method.layer is None) == (method.scaling is None) == (method.alpha is None)
