"""Gradients that are written out by hand have none of their own."""

import functools
from collections.abc import Callable

import torch


def first_order(backward: Callable) -> Callable:
    """A Function's backward, which refuses to be differentiated.

    PyTorch's once_differentiable refuses only where dy itself has a gradient: behind a sum it lets what is
    missing pass for zero.

    Raises, when it is called:
        RuntimeError: if the gradient is to be differentiated again.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():  # only with create_graph=True
            raise RuntimeError("this layer has no second-order gradients: expected create_graph=False")
        return backward(ctx, *gradients)

    return checked
