"""Dropout's masks: the right share, independent of each other, and a pure function of their key."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from kernels.dropout import Dropout, DropoutKey, install_dropout, keep_mask, seed_generator
from minibert.sequences import Sequences
from minibert.weights import load_bert

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MANY = torch.Size([1000, 1001])


def dropout(p: float, seed: int = 0, step: int = 0, site: int = 0) -> Dropout:
    return Dropout(p, DropoutKey(seed, step), site)


def kept_by(seed: int, step: int, site: int, use: int, drop: int, count: int) -> np.ndarray:
    """Which values are kept, from the bytes that NumPy's own Generator makes of Philox."""
    key = np.array([seed % 2**64, site * 2**40 + step], dtype=np.uint64)
    counter = np.array([0, 0, 0, use], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return np.frombuffer(generator.bytes(count), dtype=np.uint8) >= drop


class TestMask:
    @pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
    def test_the_share_of_kept_values_is_within_five_sigma(self, p: float):
        layer = dropout(p)
        keep = 1 - layer.drop / 256
        assert abs(keep - (1 - p)) <= 1 / 512
        share = (layer(torch.ones(MANY)) != 0).double().mean().item()
        assert abs(share - keep) < 5 * math.sqrt(keep * (1 - keep) / MANY.numel())

    @pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
    def test_every_position_in_a_word_is_dropped_alike(self, p: float):
        layer = dropout(p)
        keep, rows = 1 - layer.drop / 256, 100_000
        share = (layer(torch.ones(rows, 8)) != 0).double().mean(dim=0)
        assert (share - keep).abs().max() < 5 * math.sqrt(keep * (1 - keep) / rows)

    @pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9, 0.999])
    def test_the_expectation_is_the_input(self, p: float):
        """Exactly, not only as well as p is a multiple of 1/256: the scale is that of the bytes."""
        layer = dropout(p)
        scale = layer(torch.ones(MANY, dtype=torch.float64)).max().item()
        assert scale * (256 - layer.drop) / 256 == pytest.approx(1, abs=1e-15)

    @pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
    def test_the_mean_over_steps_approaches_the_input(self, p: float):
        x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        layer, steps = dropout(p), 4000
        total = torch.zeros_like(x)
        for layer.key.step in range(steps):
            total += layer(x)
        deviation = x.abs() * math.sqrt(p / (1 - p) / steps)
        assert ((total / steps - x).abs() < 5 * deviation).all()

    def test_masks_of_other_keys_are_uncorrelated(self):
        keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1)]
        keys += [
            (-1, 0, 0, 0),
            (-2, 0, 0, 0),
            (2**63, 0, 0, 0),
            (2**63 + 1, 0, 0, 0),
            (2**63 - 1, 0, 2**23, 0),
        ]
        masks = {key: -keep_mask(MANY, 128, *key).flatten().double() for key in keys}
        limit = 5 / math.sqrt(MANY.numel())
        for one, other in combinations(keys, 2):
            correlation = torch.corrcoef(torch.stack([masks[one], masks[other]]))[0, 1]
            assert abs(correlation) < limit, (one, other)

    def test_neighbours_in_a_mask_are_uncorrelated(self):
        mask = -keep_mask(MANY, 128, 0, 0, 0).flatten().double()
        for lag in (1, 2, 4, 8, 16, 32, 64, 256, 1001):
            correlation = torch.corrcoef(torch.stack([mask[lag:], mask[:-lag]]))[0, 1]
            assert abs(correlation) < 5 / math.sqrt(MANY.numel()), lag

    @pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1003])
    @pytest.mark.parametrize(("seed", "step", "site", "use"), [
        (0, 0, 0, 0), (3, 17, 5, 0), (3, 17, 5, 2), (-1, 1, 0, 0), (2**63 - 1, 2**40 - 1, 2**24 - 1, 9),
    ])  # fmt: skip
    def test_masks_are_those_of_numpys_generator(self, count, seed, step, site, use):
        mask = keep_mask(torch.Size([count]), 77, seed, step, site, use)
        expected = kept_by(seed, step, site, use, 77, count)
        assert mask.dtype == torch.int8
        assert mask.tolist() == (-expected.astype(int)).tolist()

    def test_masks_do_not_depend_on_the_global_generators(self):
        torch.manual_seed(1)
        np.random.seed(1)
        before = torch.get_rng_state()
        first = keep_mask(MANY, 26, 1, 2, 3)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        np.random.seed(2)
        assert torch.equal(keep_mask(MANY, 26, 1, 2, 3), first)

    def test_a_shorter_tensor_has_the_beginning_of_a_longer_ones_mask(self):
        assert torch.equal(
            keep_mask(torch.Size([5]), 99, 1, 2, 3), keep_mask(torch.Size([40]), 99, 1, 2, 3)[:5]
        )


class TestLayer:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(), (1,), (7, 11), (3, 5, 7), (64, 64)])
    def test_output_and_gradient_are_the_masked_and_scaled_input(self, dtype: torch.dtype, shape):
        x = torch.randn(shape).to(dtype).requires_grad_()
        grad = torch.randn(shape).to(dtype)
        y = dropout(0.3, seed=5, step=6, site=7)(x)
        y.backward(grad)
        kept = torch.from_numpy(kept_by(5, 6, 7, 0, 77, x.numel()).copy()).view(shape)
        assert y.dtype == x.grad.dtype == dtype
        assert y.shape == x.shape
        # A product of two numbers of this dtype rounded once, whichever way PyTorch computes it.
        exact = {"atol": 0, "rtol": torch.finfo(dtype).eps}
        zero = torch.zeros(())
        torch.testing.assert_close(y.double(), torch.where(kept, x.double() * 256 / 179, zero), **exact)
        torch.testing.assert_close(
            x.grad.double(), torch.where(kept, grad.double() * 256 / 179, zero), **exact
        )

    def test_the_gradient_is_that_of_finite_differences(self):
        layer, x = dropout(0.5), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)

        def at_step_3(x: torch.Tensor) -> torch.Tensor:
            layer.key.step = 3
            return layer(x)

        assert torch.autograd.gradcheck(at_step_3, x)

    def test_gradients_of_gradients_are_refused(self):
        x = torch.randn(4, 5, requires_grad=True)
        with pytest.raises(RuntimeError, match="no second-order gradients"):
            torch.autograd.grad(dropout(0.5)(x).square().sum(), x, create_graph=True)

    def test_layouts_that_are_not_contiguous_give_what_contiguous_ones_give(self):
        x = torch.randn(6, 10)
        expected = dropout(0.5)(x.T.contiguous())
        leaf = x.clone().requires_grad_()
        y = dropout(0.5)(leaf.T)
        assert torch.equal(y, expected)
        y.backward(torch.ones(6, 10).T)  # a gradient that is not contiguous either
        assert torch.equal(leaf.grad, dropout(0.5)(torch.ones(10, 6)).T)
        assert torch.equal(dropout(0.5)(x[:, ::2]), dropout(0.5)(x[:, ::2].contiguous()))
        assert torch.equal(dropout(0.5)(x[0].expand(4, 10)), dropout(0.5)(x[0].repeat(4, 1)))

    def test_the_input_is_left_as_it_was(self):
        x = torch.randn(9, 9)
        before = x.clone()
        dropout(0.5)(x)
        assert torch.equal(x, before)

    @pytest.mark.parametrize("shape", [(0,), (0, 8), (5, 0, 3)])
    def test_an_empty_input_gives_an_empty_output(self, shape):
        x = torch.empty(shape, requires_grad=True)
        y = dropout(0.5)(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape

    def test_the_same_key_gives_the_same_mask_bitwise(self):
        x = torch.randn(33, 17)
        assert torch.equal(dropout(0.1, 1, 2, 3)(x), dropout(0.1, 1, 2, 3)(x))

    @pytest.mark.parametrize("other", [(2, 2, 3), (1, 3, 3), (1, 2, 4)])
    def test_another_seed_step_or_site_gives_another_mask(self, other):
        x = torch.randn(33, 17)
        assert not torch.equal(dropout(0.5, 1, 2, 3)(x), dropout(0.5, *other)(x))

    def test_a_site_used_again_in_a_step_draws_anew_and_a_step_can_be_done_again(self):
        x, layer = torch.ones(33, 17), dropout(0.5, step=4)
        first, second = layer(x), layer(x)
        assert not torch.equal(first, second)
        layer.key.step = 5
        assert not torch.equal(layer(x), first)
        layer.key.step = 4
        assert torch.equal(layer(x), first)
        assert torch.equal(layer(x), second)

    def test_uses_of_one_site_leave_others_alone(self):
        x, key = torch.ones(33, 17), DropoutKey(0)
        Dropout(0.5, key, 0)(x)
        assert torch.equal(Dropout(0.5, key, 1)(x), dropout(0.5, site=1)(x))

    def test_eval_is_the_identity_and_draws_nothing(self):
        x, layer = torch.randn(33, 17), dropout(0.5)
        assert layer.eval()(x) is x
        assert torch.equal(layer.train()(x), dropout(0.5)(x))

    @pytest.mark.parametrize("p", [0.0, 1e-6, 1 / 512])
    def test_a_p_that_rounds_to_zero_is_the_identity(self, p: float):
        x = torch.randn(33, 17)
        assert dropout(p)(x) is x

    @pytest.mark.parametrize("p", [0.99, 0.999, 1 - 1e-9])
    def test_a_p_just_below_one_keeps_something(self, p: float):
        y = dropout(p)(torch.ones(MANY))
        assert y.mean().item() == pytest.approx(1, abs=5 * math.sqrt(255 / MANY.numel()))

    def test_p_of_one_drops_everything(self):
        x = torch.randn(33, 17, requires_grad=True)
        y = dropout(1.0)(x)
        y.sum().backward()
        assert not y.any()
        assert not x.grad.any()

    @pytest.mark.parametrize("p", [-0.1, 1.1])
    def test_a_p_that_is_no_probability_is_refused(self, p: float):
        with pytest.raises(ValueError, match="probability"):
            dropout(p)

    def test_signs_and_infinities_that_are_kept_stay(self):
        x = torch.tensor([-1.0, math.inf, -math.inf, 1e-45, -0.0]).repeat(64)
        y = dropout(0.5)(x)
        kept = torch.from_numpy(kept_by(0, 0, 0, 0, 128, len(x)).copy())
        assert torch.equal(y[kept], 2 * x[kept])
        assert not y[~kept].any()


class TestInstall:
    def model(self) -> nn.Module:
        block = nn.ModuleDict(
            {"drop": nn.Dropout(0.2), "inner": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))}
        )
        return nn.Sequential(nn.Dropout(0.5), block, nn.ReLU(), nn.ModuleList([nn.Dropout(0.3)]))

    def sites(self, model: nn.Module) -> dict[str, tuple[int, float]]:
        return {n: (m.site, m.p) for n, m in model.named_modules() if isinstance(m, Dropout)}

    def test_every_dropout_is_replaced_and_keeps_its_p(self):
        model = self.model()
        key = install_dropout(model, seed=9)
        assert not [n for n, m in model.named_modules() if type(m) is nn.Dropout]
        assert self.sites(model) == {
            "0": (0, 0.5),
            "1.drop": (1, 0.2),
            "1.inner.1": (2, 0.0),
            "3.0": (3, 0.3),
        }
        assert key.seed == 9
        assert all(m.key is key for m in model.modules() if isinstance(m, Dropout))

    def test_equal_models_have_equal_sites_and_so_equal_masks(self):
        one, other = self.model(), self.model()
        install_dropout(one, 1)
        install_dropout(other, 1)
        assert self.sites(one) == self.sites(other)
        x = torch.ones(40, 3)
        assert torch.equal(one[3][0](x), other[3][0](x))

    def test_the_model_sees_the_steps_of_the_key(self):
        model = self.model()
        key = install_dropout(model, 1)
        x = torch.ones(40, 3)
        first = model[0](x)
        key.step = 1
        assert torch.equal(model[0](x), dropout(0.5, seed=1, step=1, site=0)(x))
        assert not torch.equal(model[0](x), first)

    def test_training_and_eval_mode_stay(self):
        model = self.model()
        model[1].eval()
        before = [m.training for m in model.modules()]
        install_dropout(model, 1)
        assert [m.training for m in model.modules()] == before

    def test_installed_again_every_site_follows_the_new_key(self):
        model = self.model()
        install_dropout(model, 1)
        before = self.sites(model)
        key = install_dropout(model, 2)
        assert self.sites(model) == before
        assert all(m.key is key for m in model.modules() if isinstance(m, Dropout))

    def test_each_process_of_each_run_has_masks_of_its_own(self):
        seeds = [install_dropout(self.model(), seed, rank).seed for seed in range(4) for rank in range(4)]
        assert len(set(seeds)) == 16
        assert seeds[::4] == [0, 1, 2, 3]  # the first process's are a single one's

    def test_names_of_parameters_stay(self):
        model = self.model()
        names = list(model.state_dict())
        install_dropout(model, 1)
        assert list(model.state_dict()) == names

    def test_the_blocks_of_attention_have_masks_of_their_own(self, tiny):
        """Attention uses one dropout for each block of eight sequences: equal blocks must not drop alike."""
        bert = load_bert(tiny)
        for module in bert.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        attention = bert.encoder["layer"][0].attention["self"]
        attention.dropout.p = 0.5
        install_dropout(bert, 0)
        bert.train()
        ids = torch.arange(5, 13).repeat(16)
        hidden = bert(ids, torch.zeros_like(ids), Sequences((8,) * 16))  # [16 · 8, H]
        first, second = hidden.unflatten(0, (2, -1))
        assert not torch.isclose(first, second).all(dim=-1).any()


class TestOnAGpu:
    def test_a_layer_is_pytorchs_own_dropout_and_draws_nothing_by_its_key(self):
        layer, x = dropout(0.5).train(), torch.ones(4, 5, device="meta", requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.is_meta
        assert layer.key.next_use(layer.site) == 0
        assert layer.eval()(x) is x

    def test_the_seed_is_a_function_of_each_number_and_of_their_order(self, monkeypatch):
        generators = (torch.Generator(), torch.Generator())
        monkeypatch.setattr(torch.cuda, "default_generators", generators)
        device, seeds = torch.device("cuda", 1), []
        several = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (-1, 0, 0, 0)]
        for numbers in several:
            seed_generator(device, *numbers)
            seeds.append(generators[1].initial_seed())
            torch.rand(3, generator=generators[1])
            drawn = torch.rand(3, generator=generators[1])
            seed_generator(device, *numbers)
            torch.rand(3, generator=generators[1])
            assert torch.equal(torch.rand(3, generator=generators[1]), drawn)
        assert len(set(seeds)) == len(several)
        assert generators[0].initial_seed() not in seeds

    def test_a_cpus_random_numbers_are_left_alone(self):
        before = torch.get_rng_state()
        seed_generator(torch.device("cpu"), 1, 2, 3, 4)
        assert torch.equal(torch.get_rng_state(), before)
