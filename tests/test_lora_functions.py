"""The merged and the split form: the same values and gradients, and never those of older weights."""

import copy
import math

import pytest
import torch
from tolerances import error, tolerance
from torch import Tensor, nn

from lora import functions, layers
from lora.functions import Merged, Split
from lora.layers import DoRALinear, LoRALinear
from lora.methods import merge
from minibert.layers import apply_all

LAYERS = (LoRALinear, DoRALinear)
OPTIMIZERS = {
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


@pytest.fixture(params=LAYERS, ids=lambda layer: layer.__name__)
def adapted(request) -> LoRALinear:
    """7 -> 11 features, rank 3, every trainable tensor off its start."""
    layer = request.param(nn.Linear(7, 11, dtype=torch.float64), 3, 0.6)
    for tensor in layer.parameters():
        if tensor.requires_grad:
            tensor.data += torch.randn_like(tensor) / math.sqrt(tensor.shape[-1])
    return layer


def arguments(layer: LoRALinear) -> list[Tensor | None]:
    return [layer.weight, layer.bias, layer.lora_A.weight, layer.lora_B.weight, layer.magnitude]


def fixed_mask(x: Tensor) -> Tensor:
    """x̃, the same elements kept whenever it is applied to a tensor of a shape."""
    generator = torch.Generator().manual_seed(x.numel())
    return x * 1.5 * (torch.rand(x.shape, generator=generator) > 1 / 3)


FORMS = {
    "merged": lambda x, layer: Merged.apply(x, layer.scaling, *arguments(layer))[0],
    "split": lambda x, layer: Split.apply(
        x, None, layer.weight.to(x.dtype), *arguments(layer), layer.scaling
    ),
    "dropped": lambda x, layer: Split.apply(x, fixed_mask, layer.weight, *arguments(layer), layer.scaling),
}


def gradients(form, layer: LoRALinear, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and the gradients of the input, A, B and m."""
    x = x.clone().requires_grad_()
    y = form(x, layer)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    trained = [tensor for tensor in arguments(layer)[2:] if tensor is not None]
    return y, torch.autograd.grad(y, [x, *trained], dy)


def dense(x: Tensor, layer: LoRALinear, mask=torch.positive) -> Tensor:
    """The equation, with PyTorch's gradients; ‖V‖ is held constant."""
    W, b, A, B, m = arguments(layer)
    z = x @ W.T + layer.scaling * mask(x) @ A.T @ B.T
    if m is not None:
        z = m / (W + layer.scaling * B @ A).pow(2).sum(1).sqrt().detach() * z
    return z if b is None else z + b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [5, 1, 0])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_the_dense_equation(adapted, form, tokens, bias):
    if not bias:
        adapted.bias = None
    x = torch.randn(tokens, 7, dtype=torch.float64)
    mask = fixed_mask if form == "dropped" else torch.positive
    want = gradients(lambda x, layer: dense(x, layer, mask), adapted, x)
    torch.testing.assert_close(gradients(FORMS[form], adapted, x), want, **tolerance(torch.float64))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_gradcheck(adapted, form):
    """Of A and B too where no norm is held constant, which a difference of two values would see move."""
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    W, b, A, B, m = (None if one is None else one.detach() for one in arguments(adapted))
    mask, moving = fixed_mask if form == "dropped" else None, m is None

    def compute(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if form == "merged":
            return Merged.apply(x, adapted.scaling, W, b, A, B, m)[0]
        return Split.apply(x, mask, W, W, b, A, B, m, adapted.scaling)

    assert torch.autograd.gradcheck(compute, (x, A.requires_grad_(moving), B.requires_grad_(moving)))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_of_an_input_of_any_shape_the_last_dimension_counts(adapted, shape, dropout):
    adapted.dropout.p = dropout
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert adapted(x).shape == (*shape[:-1], 11)
    torch.testing.assert_close(adapted.eval()(x), dense(x, adapted), **tolerance(torch.float64))
    adapted.train()(x).sum().backward()
    assert x.grad.shape == shape


def test_a_strided_input_and_gradient_are_as_good_as_contiguous_ones(adapted):
    x = torch.randn(7, 5, dtype=torch.float64).T
    for form in FORMS.values():
        want = gradients(form, adapted, x.contiguous())
        torch.testing.assert_close(gradients(form, adapted, x), want, **tolerance(torch.float64))
        leaf = x.clone().requires_grad_()
        form(leaf, adapted).sum().backward()  # dy is one number, expanded
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("m", [None, 0.0, 1e-9, -1e-3])
@pytest.mark.parametrize("bias", [None, 1.0, 1000.0])
@pytest.mark.parametrize("form", ["merged", "split"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_of_a_magnitude_has_its_digits_at_any_magnitude_and_bias(dtype, form, m, bias):
    """y - b holds few digits of z where b is large, and none where m is 0."""
    layer = DoRALinear(nn.Linear(64, 11, bias is not None, dtype=torch.float64), 3, 0.6)
    layer.lora_B.weight.data.normal_(std=0.1)
    if m is not None:
        layer.lora_magnitude_vector.data.fill_(m)
    if bias is not None:
        layer.bias.data.fill_(bias)
    x = torch.randn(500, 64, dtype=dtype)
    want = gradients(dense, layer, x.double())[1][-1]
    got = gradients(FORMS[form], layer.to(torch.promote_types(dtype, torch.float32)), x)[1][-1]
    assert error(got, want) <= 8 * torch.finfo(dtype).eps


def test_a_weight_kept_in_another_dtype_is_never_an_old_one(adapted):
    adapted.dropout.p = 0.5
    x = torch.ones(3, 7, dtype=torch.float32)

    def call() -> Tensor:
        torch.manual_seed(0)
        return adapted(x).detach()

    before = call()
    adapted.weight.data.mul_(2)  # which leaves the address and the version as they were
    after = call()
    adapted.weight.data = adapted.weight.data.clone()
    assert torch.equal(after, call())
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("within", [True, False])
def test_under_autocast_it_computes_in_autocasts_dtype_there_and_back(adapted, dropout, within, monkeypatch):
    """PyTorch's recipe has the backward pass outside of autocast; within, it is the same."""
    adapted.float().dropout.p = dropout
    monkeypatch.setattr(layers, "draw", lambda dropout, x: fixed_mask)
    x = torch.randn(5, 7, requires_grad=True)

    def differentiate(autocast: bool) -> list[Tensor]:
        adapted.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = adapted(x)
            assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
            if within:
                y.float().square().sum().backward()
        if not within:
            y.float().square().sum().backward()
        return [y.float(), x.grad, *(one.grad for one in adapted.parameters() if one.requires_grad)]

    for got, want in zip(differentiate(True), differentiate(False), strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 2e-2 * want.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("then", [torch.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
def test_gradients_of_gradients_are_refused(adapted, dropout, then):
    """Behind a sum PyTorch's own once_differentiable lets them pass for zero."""
    adapted.dropout.p = dropout
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second-order gradients"):
        torch.autograd.grad(then(adapted(x)), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (7,)], ids=str)
def test_an_input_of_no_floating_point_is_refused(adapted, dtype, shape):
    for call in (adapted, lambda x: LoRALinear.together([adapted, adapted], x)):
        with pytest.raises(TypeError, match=f"floating-point dtype, got {dtype}"):
            call(torch.ones(shape, dtype=dtype))


def test_b_lies_in_memory_as_the_kernels_read_it(adapted):
    assert adapted.lora_B.weight.mT.is_contiguous()
    assert copy.deepcopy(adapted).lora_B.weight.mT.is_contiguous()
    adapted.load_state_dict(copy.deepcopy(adapted.state_dict()))
    assert adapted.lora_B.weight.mT.is_contiguous()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_merged_weight_is_never_that_of_an_earlier_step(adapted, optimizer):
    """Fused optimisers change a parameter without raising its version."""
    step = OPTIMIZERS[optimizer]([tensor for tensor in adapted.parameters() if tensor.requires_grad])
    x = torch.randn(5, 7, dtype=torch.float64)
    before = adapted(x)
    for _ in range(3):
        adapted(x).pow(2).sum().backward()
        step.step()
        step.zero_grad()
        torch.testing.assert_close(adapted(x), dense(x, adapted), **tolerance(torch.float64))
    assert (adapted(x) - before).abs().max() > 1e-3


class TestTogether:
    """Layers that share their input, as query, key and value do."""

    @pytest.fixture
    def trio(self, adapted) -> list[LoRALinear]:
        """Of different widths and ranks."""
        made = [
            type(adapted)(nn.Linear(7, n, dtype=torch.float64), r, 0.6) for n, r in ((5, 2), (11, 3), (4, 1))
        ]
        for layer in made:
            for tensor in layer.parameters():
                tensor.data += 0.3 * torch.randn_like(tensor)
        return made

    def results(self, compute, trio: list[LoRALinear], x: Tensor) -> list[Tensor]:
        """The outputs, and every gradient."""
        leaves = [x, *(one for layer in trio for one in layer.parameters() if one.requires_grad)]
        outputs = compute(trio, x)
        return [*outputs, *torch.autograd.grad(sum((y * y.sin()).sum() for y in outputs), leaves)]

    def test_they_compute_what_they_compute_alone(self, trio):
        x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
        alone = self.results(lambda layers, x: [layer(x) for layer in layers], trio, x)
        torch.testing.assert_close(self.results(apply_all, trio, x), alone, **tolerance(torch.float64))

    def test_the_low_rank_passes_over_x_are_made_once(self, trio, monkeypatch):
        read = []
        for name in ("lora_down", "lora_outer"):
            operation = getattr(functions, name)

            def noted(*arguments, operation=operation, **options):
                read.extend(one.data_ptr() for one in arguments[:2])
                return operation(*arguments, **options)

            monkeypatch.setattr(functions, name, noted)
        x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
        self.results(apply_all, trio, x)
        assert read.count(x.data_ptr()) == 2  # for all h, and for all dA

    @pytest.mark.parametrize("change", ["scaling", "dropout", "class"])
    def test_layers_that_differ_are_computed_alone(self, trio, change, monkeypatch):
        if change == "scaling":
            trio[1].scaling = 0.7
        elif change == "dropout":
            trio[1].dropout.p = 0.5
        else:
            trio[1] = nn.Linear(7, 11, dtype=torch.float64)
        x = torch.randn(6, 7, dtype=torch.float64)
        torch.manual_seed(0)
        together = apply_all(trio, x)
        torch.manual_seed(0)
        torch.testing.assert_close(together, tuple(layer(x) for layer in trio), rtol=0, atol=0)


def test_an_input_that_needs_no_gradient_gets_none(adapted):
    x = torch.randn(5, 7, dtype=torch.float64)
    adapted(x).sum().backward()
    assert x.grad is None
    assert all(tensor.grad is not None for tensor in adapted.parameters() if tensor.requires_grad)


class TestMerge:
    def test_the_merged_model_computes_the_same_without_adapters(self, adapted):
        model = nn.Sequential(nn.Linear(7, 7, dtype=torch.float64), adapted, nn.Dropout(0.5)).eval()
        x = torch.randn(5, 7, dtype=torch.float64)
        merged = merge(model)
        assert not any(isinstance(module, LoRALinear) for module in merged.modules())
        torch.testing.assert_close(merged(x), model(x), **tolerance(torch.float64))

    def test_the_model_given_stays_as_it_was_and_shares_what_is_not_merged(self, adapted):
        model = nn.Sequential(nn.Linear(7, 7, dtype=torch.float64), adapted)
        before = copy.deepcopy(model.state_dict())
        merged = merge(model)
        assert merged[0].weight is model[0].weight
        assert merged[0] is not model[0]
        for tensor in merged[1].parameters():
            tensor += 1
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert model[1] is adapted

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_merged_weight_is_rounded_once(self, adapted, dtype):
        exact, rounded = merge(nn.Sequential(adapted))[0], merge(nn.Sequential(adapted), dtype)[0]
        assert torch.equal(rounded.weight, exact.weight.to(dtype))
        assert torch.equal(rounded.bias, exact.bias.to(dtype))

    def test_merging_again_and_again_gives_the_same_bits(self, adapted):
        weights = {merge(nn.Sequential(adapted))[0].weight.detach().numpy().tobytes() for _ in range(20)}
        assert len(weights) == 1
