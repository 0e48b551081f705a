"""How far two computations of the same numbers may lie apart, by dtype and by how much lies between them.

About twice PyTorch's own error against float64; half precision's rounding does not grow with depth the way
float32's does, because norms and softmax statistics are float32 throughout.
"""

import torch
from torch import Tensor

TOLERANCE = {
    (torch.float64, "layer"): 1e-10,  # an op, a layer, or the few layers of a small model
    (torch.float64, "encoder"): 1e-10,  # all of a BERT, 12 layers
    (torch.float32, "layer"): 1e-5,
    (torch.float32, "encoder"): 1e-4,
    (torch.float16, "layer"): 5e-3,
    (torch.float16, "encoder"): 5e-3,
    (torch.bfloat16, "layer"): 4e-2,
    (torch.bfloat16, "encoder"): 4e-2,
}


def tolerance(dtype: torch.dtype, kind: str = "layer") -> dict[str, float]:
    """Keyword arguments for `torch.testing.assert_close`."""
    return {"atol": TOLERANCE[dtype, kind], "rtol": TOLERANCE[dtype, kind]}


def error(values: Tensor, exact: Tensor) -> float:
    """‖values - exact‖ / ‖exact‖ (Frobenius): unlike the largest error, it hardly depends on chance."""
    return float((values.double() - exact).norm() / exact.norm())


def assert_as_near(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Our error against float64 is at most twice that of another implementation in the same dtype.

    So it holds on every CPU: how large the errors are depends on the order in which it sums; both have it.
    """
    assert ours.dtype == theirs.dtype != exact.dtype == torch.float64
    assert ours.shape == theirs.shape == exact.shape
    assert error(ours, exact) <= 2 * error(theirs, exact)
