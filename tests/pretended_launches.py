"""How many kernels an operation of PyTorch launches on a GPU, as its source for CUDA has it (2.13).

An operation that is not named here launches one; views and empty tensors launch none. Matrix products count
as one kernel: cuBLAS may split a long sum in two, which depends on the card. Not counted are copies between
host and device, and what a kernel's first call loads.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

FREE = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh",
    "_reshape_alias", "_unsafe_view", "split_with_sizes", "split", "unbind", "resize_", "set_", "numel",
}  # fmt: skip
CHUNK, MOST_BLOCKS = 65536, 320  # MultiTensorApply.cuh: numbers of a block, blocks of a launch
MOST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # of a launch, by the number of lists


def multi_tensor(lists: int, tensors: Sequence[Tensor]) -> int:
    """Launches of multi_tensor_apply over tensors like these: MultiTensorApply.cuh."""
    launches = held = blocks = 0
    for number, tensor in enumerate(tensors, 1):
        held += 1
        chunks = -(-tensor.numel() // CHUNK)
        for chunk in range(1, chunks + 1):
            blocks += 1
            done = chunk == chunks
            full = (held == MOST_TENSORS[lists] and done) or blocks == MOST_BLOCKS
            if full or (done and number == len(tensors)):
                launches, blocks = launches + 1, 0
                held = 0 if done else 1
    return launches


def by_mask(args: tuple) -> int:
    """An index of bool is turned into numbers by nonzero, each."""
    return sum(4 for index in args[1] if index is not None and not index.dtype.is_signed)


def put(args: tuple) -> int:
    """index_put_: where it adds up, places are computed (2) and sorted (5) first: Indexing.cu."""
    adds = len(args) > 3 and args[3]
    return (8 if adds else 1) + by_mask(args)


LAUNCHES: dict[str, int | Callable[[tuple], int]] = {
    # cuBLAS takes a bias vector along; a matrix that is added to is copied first: Blas.cpp.
    "addmm": lambda args: 1 if args[0].dim() == 1 else 2,
    "baddbmm": 2,
    # dx in one kernel, dw and db in another, each only if wanted: layer_norm_kernel.cu.
    "native_layer_norm_backward": lambda args: bool(args[-1][0]) + (args[-1][1] or args[-1][2]),
    # Zeros, then rows added up; that is for at most 3072 tokens, more are sorted first: Embedding.cu.
    "embedding_dense_backward": 2,
    "nonzero": 4,  # count, select (2), and from places to coordinates: Nonzero.cu
    "masked_select": 5,
    "index": lambda args: 1 + by_mask(args),
    "index_put_": put,
    "_index_put_impl_": put,
    "index_put": lambda args: 1 + put(args),
    "index_copy": 2,  # a copy, then the rows: so it is for all that are out of place
    "index_add": 2,
    "scatter": 2,
    "scatter_add": 2,
    "masked_fill": 2,
    "constant_pad_nd": 2,  # fill, copy
    "cumsum": 2,  # CUB's scan
    "repeat_interleave": 3,  # of counts: their sum so far (2), the numbers
    # max, three that mend infinities, subtract, exp, sum, log, add: ReduceOps.cpp.
    "logsumexp": 9,
    "nll_loss_backward": 2,
    "_foreach_norm": lambda args: multi_tensor(1, args[0]) + 2,  # zeros, parts, roots: ForeachReduceOp.cu
    "_foreach_add_": lambda args: multi_tensor(1 if isinstance(args[1], int | float) else 2, args[0]),
    "_foreach_sub_": lambda args: multi_tensor(2, args[0]),
    "_foreach_mul_": lambda args: multi_tensor(1, args[0]),
    "_foreach_copy_": lambda args: multi_tensor(2, args[0]),
    "_amp_foreach_non_finite_check_and_unscale_": lambda args: multi_tensor(1, args[0]),
    "_fused_adamw_": lambda args: multi_tensor(4, args[0]),
    # dQ after a sum of dO and O, dK and dV in the same kernel: attention_backward.cu.
    "_scaled_dot_product_efficient_attention_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
}


def launches_of(name: str, args: tuple) -> int:
    """Of one operation; only of one that is no view."""
    if name in FREE:
        return 0
    launches = LAUNCHES.get(name, 1)
    return int(launches(args)) if callable(launches) else launches
