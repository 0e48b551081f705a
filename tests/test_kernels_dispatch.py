"""Which computation each device, dtype and rank gets, and what is refused with which words."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kernels import dispatch, matmul, reference
from kernels.launch import TABLE, ceil_div, find
from kernels.philox import Mask

ROOT = Path(__file__).parents[1]
M, K, N, R = 5, 24, 16, 3
MASK = Mask(0.25, seed=1, step=2, site=3)
SIZES = {"x": (M, K), "dx": (M, K), "y": (M, N), "dy": (M, N), "h": (M, R), "dh": (M, R), "A": (R, K),
         "Bt": (R, N), "W": (N, K), "B": (N, R), "m": (N,), "gK": (K,), "gN": (N,),
         "z": (M, N), "nN": (N,)}  # fmt: skip
# What each operation is called with: tensors by name, or values
CALLS = {
    "lora_down": ("x", "A", 1.5, MASK, "gK"),
    "lora_up": ("y", "h", "Bt", 1.5, MASK),
    "lora_outer": ("h", "x", 1.5, MASK, "gK"),
    "lora_outer_dot": ("h", "dy", "z", 1.5, "gN", "nN"),
    "lora_backward_x": ("x", "dx", "dh", "A", MASK),
    "lora_backward_y": ("dy", "h", "Bt", 1.5, "gN"),
    "lora_merge": ("W", "A", "B", 1.5, "m", torch.float16),
    "dora_norm": ("W", "A", "B", 1.5),
    "dora_gain": ("W", "A", "B", 1.5, "m"),
}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*size, generator=generator) for name, size in SIZES.items()}


def call(module, name: str, given: dict[str, torch.Tensor]):
    return getattr(module, name)(*(given[one] if isinstance(one, str) else one for one in CALLS[name]))


class OnGpu(NamedTuple):
    """What the choice looks at in a CUDA tensor, without one."""

    dtype: torch.dtype = torch.float16
    shape: tuple[int, int] = (64, 768)
    is_cuda: bool = True
    device: str = "cuda:0"

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]


@pytest.fixture
def gpu(monkeypatch):
    """Called with an architecture: dispatch as on such a GPU, with Triton installed."""

    def use(architecture: int) -> None:
        monkeypatch.setattr(dispatch, "architecture", lambda device: architecture)
        monkeypatch.setattr(dispatch, "why_not_fused", lambda device: "")
        dispatch._say.cache_clear()

    return use


@pytest.mark.parametrize("name", CALLS)
def test_a_cpu_gets_the_reference(name: str):
    one, two = tensors(), tensors()
    got, expected = call(dispatch, name, one), call(reference, name, two)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(one, two, rtol=0, atol=0)  # what is changed in place too


@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_must_be_where_the_others_are_and_of_the_right_shape(name: str):
    operands = [one for one in CALLS[name] if isinstance(one, str)]
    for operand in operands:
        wrong = tensors()
        # Twice the tokens, where it is from this tensor's width that the rank is read
        wrong[operand] = torch.cat([wrong[operand]] * 2, dim=0 if operand == "h" else -1)
        with pytest.raises(ValueError, match=r"\[.*\]"):
            call(dispatch, name, wrong)
        elsewhere = tensors()
        elsewhere[operand] = elsewhere[operand].to("meta")
        with pytest.raises(RuntimeError, match=r"on one device: .* on meta"):
            call(dispatch, name, elsewhere)


@pytest.mark.parametrize("name", CALLS)
def test_strided_and_integer_tensors_are_refused(name: str):
    for operand in (one for one in CALLS[name] if isinstance(one, str) and one != "B"):
        strided, integer = tensors(), tensors()
        strided[operand] = torch.stack([strided[operand]] * 2, dim=-1)[..., 0]
        with pytest.raises(ValueError, match="must be contiguous, got strides"):
            call(dispatch, name, strided)
        integer[operand] = integer[operand].long()
        with pytest.raises(TypeError, match="must be floating point, got torch.int64"):
            call(dispatch, name, integer)


def test_rank_0_and_stacks_of_matrices_are_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        dispatch.lora_down(torch.ones(2, 8), torch.ones(0, 8))
    with pytest.raises(ValueError, match=r"x must have two dimensions, got \[2, 3, 8\]"):
        dispatch.lora_down(torch.ones(2, 3, 8), torch.ones(1, 8))


@pytest.mark.parametrize(
    ("architecture", "operation", "rank", "dtype", "module"),
    [
        (75, "down", 8, torch.float16, "kernels.lora_down"),
        (75, "down", 16, torch.float32, "kernels.lora_down"),
        (75, "down", 17, torch.float16, "kernels.matmul"),
        (75, "up", 64, torch.float16, "kernels.lora_up"),
        (75, "outer", 32, torch.float16, "kernels.matmul"),
        (80, "down", 64, torch.bfloat16, "kernels.lora_down"),
        (80, "down", 65, torch.bfloat16, "kernels.matmul"),
        (80, "down", 64, torch.float32, "kernels.matmul"),
        (80, "outer_dot", 8, torch.float16, "kernels.lora_outer"),
        (75, "outer_dot", 64, torch.float16, "kernels.matmul"),
        (90, "backward_y", 8, torch.float16, "kernels.lora_backward_y"),
        (90, "outer", 8, torch.float64, "kernels.reference"),
    ],
)
def test_a_gpu_gets_the_kernel_where_it_pays(gpu, architecture, operation, rank, dtype, module):
    pytest.importorskip("triton", reason="Triton is not installed")
    gpu(architecture)
    chosen = dispatch.choose(operation, OnGpu(dtype), OnGpu(torch.float32, (rank, 768)))
    assert chosen.__module__ == module
    assert chosen.__name__ == f"lora_{operation}"


@pytest.mark.parametrize(
    ("architecture", "rank", "fits"), [(75, 15, True), (75, 24, False), (80, 24, True), (80, 96, False)]
)
def test_layers_share_a_pass_where_their_ranks_together_have_kernels(gpu, architecture, rank, fits):
    pytest.importorskip("triton", reason="Triton is not installed")
    gpu(architecture)
    assert dispatch.fits_one_pass(OnGpu(), rank) == fits
    assert dispatch.fits_one_pass(torch.ones(2, 8), rank)  # a CPU has no kernels to lose


def test_fp64_among_the_factors_is_not_rounded_to_what_kernels_sum_in(gpu):
    gpu(80)
    assert dispatch.choose("down", OnGpu(), OnGpu(torch.float64, (8, 768))) is reference.lora_down
    assert dispatch.choose_for_weight("dora_norm", OnGpu(), OnGpu(torch.float64)) is reference.dora_norm


def test_bf16_activations_are_refused_below_sm_80(gpu):
    gpu(75)
    with pytest.raises(TypeError, match="bfloat16 activations need sm_80"):
        dispatch.choose("down", OnGpu(torch.bfloat16), OnGpu(torch.float32, (8, 768)))


@pytest.mark.parametrize(
    ("x", "why", "said"),
    [
        (OnGpu(shape=(2**21, 1024)), "", "2^31 elements"),
        (OnGpu(), "Triton is not installed", "without its fused kernels: Triton is not installed"),
        (OnGpu(torch.float32), "Triton is not installed", "as matrix products"),
    ],
    ids=["large", "no Triton", "no Triton, fp32"],
)
def test_a_gpu_without_kernels_multiplies_matrices_and_says_why_once(gpu, monkeypatch, caplog, x, why, said):
    gpu(75)
    monkeypatch.setattr(dispatch, "why_not_fused", lambda device: why)
    with caplog.at_level(logging.WARNING, "kernels.dispatch"):
        for _ in range(3):
            assert dispatch.choose("down", x, OnGpu(torch.float32, (8, 1024))) is matmul.lora_down
    assert [said in record.getMessage() for record in caplog.records] == [True]


def test_a_weight_too_wide_for_registers_is_merged_unfused(gpu, caplog):
    gpu(80)
    with caplog.at_level(logging.WARNING, "kernels.dispatch"):
        chosen = dispatch.choose_for_weight("lora_merge", OnGpu(shape=(8, 8193)), OnGpu(torch.float32))
    assert chosen is reference.lora_merge
    assert "more than 8192 inputs" in caplog.text


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """A machine on which nothing keeps the kernels from running."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("MINIBERT_KERNELS", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.10.0+git1")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: f"/bin/{name}" if name == "clang" else None)
    monkeypatch.setattr(dispatch.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    return monkeypatch


@pytest.mark.parametrize(
    ("owner", "name", "value", "why"),
    [
        (None, "", None, ""),
        (torch.version, "hip", "6.2", "NVIDIA's GPUs alone"),
        (dispatch, "triton_version", lambda: None, "Triton is not installed"),
        (dispatch, "triton_version", lambda: "3.1.0", "Triton 3.1.0 is too old; install triton>=3.2"),
        (dispatch, "triton_version", lambda: "3.2.0", ""),
        (dispatch.shutil, "which", lambda name: None, "a C compiler, and there is no gcc or clang"),
        (dispatch.sysconfig, "get_path", lambda name: "/nowhere", "install Python's development files"),
        (
            torch.cuda,
            "get_device_capability",
            lambda device: (6, 1),
            "this card is sm_61, Triton needs sm_70",
        ),
        (dispatch.os, "environ", {"MINIBERT_KERNELS": "0"}, "MINIBERT_KERNELS=0"),
        (dispatch.os, "environ", {"CC": "icx -m64"}, "there is no icx"),
    ],
)
def test_what_keeps_kernels_from_running_is_named(healthy, owner, name, value, why):
    if owner is not None:
        healthy.setattr(owner, name, value)
    found = dispatch.why_not_fused.__wrapped__(torch.device("cuda"))
    assert why in found
    assert bool(found) == bool(why)


def test_triton_is_asked_for_its_version_where_it_is_installed(monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    assert dispatch.triton_version.__wrapped__() == triton.__version__
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.triton_version.__wrapped__() is None


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "dropout"])
@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
def test_matrix_products_compute_what_the_reference_does(monkeypatch, mask, full):
    monkeypatch.setattr(
        matmul, "_dropped", lambda x, mask: x if mask is None else reference.lora_drop(x, mask)
    )
    given = tensors()
    x, y, h, A, Bt = (given[name] for name in ("x", "y", "h", "A", "Bt"))
    gK = given["gK"] if full else None
    near = {"rtol": 1e-5, "atol": 1e-5}
    for operation, arguments in (("lora_down", (x, A, 1.5, mask, gK)), ("lora_outer", (h, x, 1.5, mask, gK))):
        got, expected = getattr(matmul, operation)(*arguments), getattr(reference, operation)(*arguments)
        torch.testing.assert_close(got, expected, **near)
    arguments = (h, y, y.sin(), 1.5, given["gN"], given["nN"])
    torch.testing.assert_close(
        matmul.lora_outer_dot(*arguments), reference.lora_outer_dot(*arguments), **near
    )
    got = matmul.lora_up(y.clone(), h, Bt, 1.5, mask)
    torch.testing.assert_close(got, reference.lora_up(y.clone(), h, Bt, 1.5, mask), **near)


def test_no_import_of_the_dispatch_brings_in_triton():
    code = "import sys, kernels.dispatch; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("rank", [1, 8, 24, 64, 80])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float16, 2e-3), (torch.float32, 2e-5)], ids=str)
def test_every_route_on_a_gpu_agrees_with_float64(name, rank, dtype, within):
    generator = torch.Generator().manual_seed(0)
    larger = {M: 100, K: 384, N: 136, R: rank}
    activations = ("x", "dx", "y", "dy", "z")
    given = {
        key: torch.randn(*(larger[length] for length in size), generator=generator).to(
            "cuda", dtype if key in activations else torch.float32
        )
        for key, size in SIZES.items()
    }
    exact = {key: one.double() for key, one in given.items()}
    got, expected = call(dispatch, name, given), call(reference, name, exact)
    pairs = zip(*(one if isinstance(one, tuple) else (one,) for one in (got, expected)), strict=True)
    for one, two in [*pairs, *((given[key], exact[key]) for key in activations)]:
        error = (one.double() - two.double()).norm() / two.double().norm()
        assert error <= max(within, 2e-3 if name == "lora_merge" else 0)


def test_a_launchs_constants_are_worked_out_once_and_are_the_callers_own():
    pytest.importorskip("triton", reason="Triton is not installed")
    from kernels import lora_down, tiles

    launch = find("down", 80, torch.float16, 8)
    first = tiles.compiled_for(lora_down.kernel, 768, 8, None, launch)
    expected = dict(first)
    first.clear()  # as the compiler's audit takes some out
    hits = tiles._compiled_for.cache_info().hits
    assert tiles.compiled_for(lora_down.kernel, 768, 8, None, launch) == expected
    assert tiles._compiled_for.cache_info().hits == hits + 1
    mask = Mask(0.1, seed=0, step=0, site=0)
    others = [(768, 8, mask, launch), (64, 8, None, launch), (768, 4, None, launch)]
    others += [(768, 8, None, launch._replace(warps=2))]
    assert all(tiles.compiled_for(lora_down.kernel, *other) != expected for other in others)


@pytest.mark.parametrize(("number", "by", "expected"), [(0, 8, 0), (1, 8, 1), (8, 8, 1), (9, 8, 2)])
def test_division_rounds_up(number: int, by: int, expected: int):
    assert ceil_div(number, by) == expected


@pytest.mark.parametrize("row", [75, 80, 90])
def test_fp32_has_launches_of_its_own_or_those_of_a_t4(row: int):
    ((_, own),) = TABLE["backward_x", "fp32"]
    ((_, half),) = TABLE["backward_x", row]
    assert find("backward_x", row, torch.float32, 8) == own
    assert find("backward_x", row, torch.float16, 8) == half != own
    assert find("down", row, torch.float32, 8) == find("down", 75, torch.float16, 8)
    assert find("backward_y", row, torch.float32, 8) is None  # made of two others
