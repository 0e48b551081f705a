"""LoRALinear and DoRALinear against dense formulas written out here, values and every gradient.

Nothing is left at its start value: at B = 0 or m = ‖W‖ most mistakes cannot be seen.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tolerances import tolerance
from torch import Tensor, nn
from torch.func import functional_call

from lora.layers import DoRALinear, LoRALinear

LAYERS = (LoRALinear, DoRALinear)
# M tokens, K in, N out, r: odd and prime, rank 1, a rank that is no square and no power of two, aligned,
# full rank
SHAPES = ((5, 7, 11, 3), (3, 9, 5, 1), (13, 17, 29, 12), (16, 32, 24, 8), (4, 6, 9, 6))
SCALINGS = {"lora": lambda alpha, r: alpha / r, "rslora": lambda alpha, r: alpha / math.sqrt(r)}
ALPHA = 5.0  # unlike any rank here

pytestmark = pytest.mark.filterwarnings("error")


def make(
    layer: type[LoRALinear],
    shape=SHAPES[0],
    bias: bool = True,
    scaling: float = 0.6,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    weight_dtype: torch.dtype | None = None,
) -> tuple[LoRALinear, Tensor]:
    """A layer with every trainable tensor moved off its start value, and an input."""
    M, K, N, r = shape
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(K, N, bias, dtype=torch.float64)
    for tensor in base.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / math.sqrt(K)
    adapted = layer(base.to(weight_dtype or dtype), r, scaling, dropout)
    adapted.reset_parameters(generator)
    for tensor in trained(adapted).values():
        step = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / math.sqrt(
            tensor.shape[-1]
        )
        tensor.data += step.to(tensor.dtype)
    x = torch.randn(M, K, generator=generator, dtype=torch.float64).to(dtype)
    return adapted, x


def trained(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in layer.named_parameters() if tensor.requires_grad}


def dense(layer: type[LoRALinear], s: float) -> Callable[..., Tensor]:
    """The layer as one dense weight, a function of (x, W, b, A, B[, m])."""

    def lora(x, W, b, A, B):
        return x @ (W + s * B @ A).T + b

    def dora(x, W, b, A, B, m):
        V = W + s * B @ A
        return x @ (m / V.detach().pow(2).sum(1).sqrt() * V.T) + b

    return dora if layer is DoRALinear else lora


def arguments(layer: LoRALinear) -> list[Tensor]:
    """(W, b, A, B[, m]), copied in fp64; a bias that is not there is zeros."""
    b = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    tensors = [layer.weight, b, layer.lora_A.weight, layer.lora_B.weight]
    if isinstance(layer, DoRALinear):
        tensors.append(layer.lora_magnitude_vector)
    return [tensor.detach().double().clone() for tensor in tensors]


@pytest.fixture(params=LAYERS, ids=lambda layer: layer.__name__)
def layer(request) -> type[LoRALinear]:
    return request.param


class TestFresh:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_a_fresh_layer_computes_what_its_base_computes(self, layer, shape, bias, dtype):
        M, K, N, r = shape
        base, x = nn.Linear(K, N, bias, dtype=dtype), torch.randn(M, K, dtype=dtype)
        torch.testing.assert_close(layer(base, r, 3.0)(x), base(x), **tolerance(dtype))

    def test_a_fresh_layer_with_dropout_computes_what_its_base_computes_in_training_too(self, layer):
        base, x = nn.Linear(9, 5, dtype=torch.float64), torch.randn(30, 9, dtype=torch.float64)
        adapted = layer(base, 3, 3.0, dropout=0.5).train()
        torch.testing.assert_close(adapted(x), base(x), **tolerance(torch.float64))

    def test_a_starts_uniform_as_nn_linear_does_and_b_at_zero(self, layer):
        adapted = layer(nn.Linear(400, 300), 50, 1.0)
        A = adapted.lora_A.weight.detach() * math.sqrt(400)  # uniform in ±1
        assert A.abs().max() <= 1
        assert abs(A.mean().item()) < 5 / math.sqrt(3 * A.numel())
        assert A.var().item() == pytest.approx(1 / 3, rel=0.02)
        assert not adapted.lora_B.weight.any()

    def test_the_magnitude_starts_at_the_norms_of_the_rows(self):
        base = nn.Linear(7, 11)
        m = DoRALinear(base, 3, 1.0).lora_magnitude_vector
        np.testing.assert_allclose(
            m.detach().numpy(), np.linalg.norm(base.weight.detach().numpy(), axis=1), rtol=1e-6
        )

    def test_a_row_of_zeros_starts_as_it_was_and_can_train(self, layer):
        """As pruned models have: m/‖V‖ is 0/0 there."""
        base, x = nn.Linear(7, 11, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
        base.weight.data[3] = 0
        adapted = layer(base, 3, 1.0)
        torch.testing.assert_close(adapted(x), base(x), **tolerance(torch.float64))
        adapted(x).sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in trained(adapted).values())
        assert adapted.lora_B.weight.grad[3].any()

    def test_a_start_drawn_from_a_generator_depends_on_nothing_else(self, layer):
        drawn = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            adapted = layer(nn.Linear(7, 11), 3, 1.0)
            adapted.reset_parameters(torch.Generator().manual_seed(5))
            drawn.append(adapted.lora_A.weight)
        assert torch.equal(*drawn)

    def test_it_is_a_linear_layer_whose_base_keeps_its_names(self, layer):
        base = nn.Linear(7, 11)
        adapted = layer(base, 3, 1.0)
        names = {"weight", "bias", "lora_A.weight", "lora_B.weight"}
        assert isinstance(adapted, nn.Linear)
        assert set(adapted.state_dict()) == names | (
            {"lora_magnitude_vector"} if layer is DoRALinear else set()
        )
        assert adapted.weight.data_ptr() == base.weight.data_ptr()  # not a second copy of the model

    def test_the_base_is_left_as_it_was(self, layer):
        base = nn.Linear(7, 11)
        before = copy.deepcopy(base.state_dict())
        layer(base, 3, 1.0)
        assert base.weight.requires_grad
        assert base.bias.requires_grad
        torch.testing.assert_close(base.state_dict(), before, rtol=0, atol=0)

    @pytest.mark.parametrize("rank", [0, -1, 8, 1000])
    def test_a_rank_that_is_none_is_refused(self, layer, rank):
        with pytest.raises(ValueError, match=rf"rank must be in \[1, 7\] .*got {rank}"):
            layer(nn.Linear(7, 11), rank, 1.0)

    @pytest.mark.parametrize("scaling", [0.0, -1.0, math.nan, math.inf])
    def test_a_scaling_that_is_none_is_refused(self, layer, scaling):
        with pytest.raises(ValueError, match="scaling must be a positive number"):
            layer(nn.Linear(7, 11), 3, scaling)

    @pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
    def test_a_dropout_that_is_none_is_refused(self, layer, dropout):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
            layer(nn.Linear(7, 11), 3, 1.0, dropout)


class TestDense:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("scaling", SCALINGS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_a_layer_is_its_dense_equivalent_and_so_is_every_gradient(self, layer, shape, scaling, bias):
        s = SCALINGS[scaling](ALPHA, shape[-1])
        adapted, x = make(layer, shape, bias, s)
        dy = torch.randn(x.shape[0], adapted.out_features, dtype=torch.float64)
        W, b, *moved = arguments(adapted)
        leaves = [x.clone().requires_grad_(), *(tensor.requires_grad_() for tensor in moved)]
        expected = dense(layer, s)(leaves[0], W, b, *leaves[1:])
        y = adapted(x.requires_grad_())
        torch.testing.assert_close(y, expected, **tolerance(torch.float64))
        wanted = torch.autograd.grad(expected, leaves, dy)
        y.backward(dy)
        names = ["x", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"][: len(leaves)]
        got = {"x": x, **trained(adapted)}
        assert set(got) == set(names)
        for name, gradient in zip(names, wanted, strict=True):
            assert gradient.abs().max() > 1e-3, f"{name}: this compares nothing"
            torch.testing.assert_close(
                got[name].grad, gradient, **tolerance(torch.float64), msg=lambda m, name=name: f"{name}: {m}"
            )

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
    def test_every_gradient_is_a_difference_quotient_of_the_dense_formula(self, layer, shape, bias):
        """With DoRA's norm held at its value Σ dy ⊙ y is linear in each of x, A, B and m alone: a quotient
        over a step of any width is the derivative, and no autograd is trusted."""
        adapted, x = make(layer, shape, bias)
        dy = torch.randn(x.shape[0], adapted.out_features, dtype=torch.float64).numpy()
        W, _, A, B, *m = (tensor.numpy() for tensor in arguments(adapted))
        norm = np.linalg.norm(W + 0.6 * B @ A, axis=1)

        def loss(x: np.ndarray, A: np.ndarray, B: np.ndarray, *m: np.ndarray) -> float:
            gain = m[0] / norm if m else 1.0
            return float((dy * gain * (x @ (W + 0.6 * B @ A).T)).sum())

        adapted(x.requires_grad_()).backward(torch.from_numpy(dy))
        names = ["x", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
        point = [x.detach().numpy(), A, B, *m]
        for i, (name, tensor) in enumerate(zip(names, point, strict=False)):
            quotients = np.empty(tensor.shape)
            for index in np.ndindex(tensor.shape):
                ends = []
                for step in (0.5, -0.5):
                    there = tensor.copy()
                    there[index] += step
                    ends.append(loss(*point[:i], there, *point[i + 1 :]))
                quotients[index] = ends[0] - ends[1]
            gradient = {"x": x, **trained(adapted)}[name].grad.numpy()
            np.testing.assert_allclose(gradient, quotients, rtol=1e-10, atol=1e-10, err_msg=name)

    def test_gradcheck(self, layer):
        """For DoRA in x and m alone: the norm is a function of A and B too, and by design has no gradient."""
        adapted, x = make(layer)
        names = [n for n in trained(adapted) if layer is LoRALinear or n == "lora_magnitude_vector"]
        inputs = [adapted.get_parameter(name).detach().clone().requires_grad_() for name in names]

        def forward(x: Tensor, *tensors: Tensor) -> Tensor:
            return functional_call(adapted, dict(zip(names, tensors, strict=True)), (x,))

        assert torch.autograd.gradcheck(forward, (x.requires_grad_(), *inputs))

    def test_the_norm_of_dora_has_no_gradient(self):
        """And it would matter: differentiated, it gives B another gradient."""
        adapted, x = make(DoRALinear)
        assert not adapted.weight_norm().requires_grad
        W, b, A, B, m = arguments(adapted)
        B.requires_grad_()
        V = W + 0.6 * B @ A
        (through_norm,) = torch.autograd.grad((x @ (m / V.norm(dim=1) * V.T) + b).sum(), B)
        adapted(x).sum().backward()
        assert (adapted.lora_B.weight.grad - through_norm).abs().max() > 0.01

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [SHAPES[3], (64, 96, 128, 8)], ids=str)
    def test_any_dtype_of_x_and_of_the_base_is_near_the_dense_equivalent(
        self, layer, shape, dtype, weight_dtype
    ):
        adapted, x = make(layer, shape, dtype=dtype, weight_dtype=weight_dtype)
        y = adapted(x.requires_grad_())
        dy = (torch.randn(y.shape, dtype=torch.float64) / math.sqrt(y.numel())).to(dtype)
        y.backward(dy)
        W, b, *moved = arguments(adapted)
        leaves = [x.detach().double().requires_grad_(), *(tensor.requires_grad_() for tensor in moved)]
        expected = dense(layer, 0.6)(leaves[0], W, b, *leaves[1:])
        wanted = torch.autograd.grad(expected, leaves, dy.double())
        assert y.dtype == x.grad.dtype == dtype
        torch.testing.assert_close(y.double(), expected, **tolerance(dtype))
        got = [x, adapted.lora_A.weight, adapted.lora_B.weight]
        got += [adapted.lora_magnitude_vector] if layer is DoRALinear else []
        for tensor, gradient in zip(got, wanted, strict=True):
            torch.testing.assert_close(tensor.grad.double(), gradient, **tolerance(dtype))

    @pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_adapters_are_kept_in_fp32_or_better(self, layer, weight_dtype):
        adapted = layer(nn.Linear(7, 11, dtype=weight_dtype), 3, 1.0)
        kept = torch.float64 if weight_dtype == torch.float64 else torch.float32
        assert {tensor.dtype for tensor in trained(adapted).values()} == {kept}
        assert adapted.weight.dtype == weight_dtype

    @pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 3, 7)])
    def test_any_leading_shape_is_mapped_row_by_row(self, layer, shape):
        adapted, _ = make(layer)
        x = torch.randn(shape, dtype=torch.float64)
        expected = adapted(x.reshape(-1, 7)).reshape(*shape[:-1], 11)
        torch.testing.assert_close(adapted(x), expected, **tolerance(torch.float64))


class TestBias:
    def test_the_bias_is_not_scaled_when_the_magnitude_moves(self):
        adapted, x = make(DoRALinear)
        b = adapted.bias.detach().clone()
        before = adapted(x).detach()
        adapted.lora_magnitude_vector.data *= 1.1
        torch.testing.assert_close(adapted(x) - b, 1.1 * (before - b), **tolerance(torch.float64))

    def test_nothing_comes_out_as_the_bias(self, layer):
        adapted, x = make(layer)
        assert torch.equal(adapted(torch.zeros_like(x)), adapted.bias.detach().expand(len(x), -1))


class TestTraining:
    def test_frozen_tensors_get_no_gradient_and_do_not_move_and_all_others_do(self, layer):
        adapted, x = make(layer)
        before = copy.deepcopy(dict(adapted.named_parameters()))
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1, weight_decay=0.1)
        adapted(x).pow(2).sum().backward()
        optimizer.step()
        moved = {n for n, tensor in adapted.named_parameters() if not torch.equal(tensor, before[n])}
        magnitude = {"lora_magnitude_vector"} if layer is DoRALinear else set()
        assert moved == {"lora_A.weight", "lora_B.weight"} | magnitude
        assert adapted.weight.grad is None
        assert adapted.bias.grad is None

    def test_dropout_touches_the_low_rank_term_alone(self, layer):
        """With A and B the identity that term is s · dropout(x): each value is 0 or twice what it is."""
        adapted, x = make(layer, (400, 6, 6, 6), dropout=0.5)
        for adapter in (adapted.lora_A, adapted.lora_B):
            adapter.weight.data = torch.eye(6, dtype=torch.float64)
        W, b, _, _, *m = arguments(adapted)
        gain = m[0] / (W + 0.6 * torch.eye(6, dtype=torch.float64)).norm(dim=1) if m else 1.0
        kept = (adapted.train()(x) - gain * (x @ W.T) - b) / (gain * 0.6 * x)  # 0 or 2
        torch.testing.assert_close(kept, kept.round(), **tolerance(torch.float64))
        assert set(kept.round().abs().unique().tolist()) == {0.0, 2.0}
        assert abs(kept.mean().item() - 1) < 5 / math.sqrt(kept.numel())

    def test_dropout_acts_only_in_training(self, layer):
        adapted, x = make(layer, dropout=0.5)
        without, _ = make(layer, dropout=0.0)
        assert torch.equal(adapted.eval()(x), without(x))
        assert not torch.equal(adapted.train()(x), without(x))
        assert torch.equal(without.train()(x), without.eval()(x))

    def test_training_mode_changes_no_tensor(self, layer):
        adapted, x = make(layer, dropout=0.5)
        before = copy.deepcopy(adapted.state_dict())
        for _ in range(3):
            adapted.train()(x)
            adapted.eval()(x)
        torch.testing.assert_close(adapted.state_dict(), before, rtol=0, atol=0)
