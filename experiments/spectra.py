"""What a change of a weight matrix looks like: how many directions it has, what it turned, what is new.

Letters: N output features (rows), K input features, p = min(N, K). Weights as stored, [N, K], in fp64.
"""

import torch
from torch import Tensor


def singular_values(change: Tensor, scale: float) -> Tensor:
    """σ of ΔW in descending order, [p]; 0 where rounding alone could have made it.

    `scale` is the norm of the weights that ΔW is the difference of: what lies below N-or-K roundings of it
    is none of ΔW's (the tolerance of numpy's matrix_rank, for a difference).
    """
    values = torch.linalg.svdvals(change)
    return values.where(values > max(change.shape) * torch.finfo(change.dtype).eps * scale, 0.0)


def effective_rank(values: Tensor) -> float:
    """exp(-Σ p_i ln p_i) with p_i = σ_i / Σσ (Roy and Vetterli 2007, definition 1); of no change 0.

    r equal singular values give r; the fewer of them carry the sum, the nearer it is to 1.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def rank_for_energy(values: Tensor, share: float = 0.9) -> int:
    """The fewest k whose σ_1² + ... + σ_k² is at least a share of all: of ‖ΔW‖²; of no change 0."""
    energy = values.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1 if energy[-1] > 0 else 0


def magnitude_and_direction(before: Tensor, after: Tensor) -> tuple[float, float]:
    """ΔM and ΔD of W -> W' (Liu et al. 2024, equations 3 and 4), over the N rows, whose norms DoRA's m are.

    ΔM = Σ_n |‖w'_n‖ - ‖w_n‖| / N,    ΔD = Σ_n (1 - cos(w'_n, w_n)) / N

    A row that is 0 before or after has no direction, and counts as not turned.
    """
    norms, new_norms = before.norm(dim=1), after.norm(dim=1)  # [N]
    lengths = norms * new_norms
    # 1 - cos = ‖w'/‖w'‖ - w/‖w‖‖² / 2, which does not cancel where the two are nearly one.
    units = [w / n.where(n > 0, 1.0)[:, None] for w, n in ((before, norms), (after, new_norms))]
    turned = (units[1] - units[0]).square().sum(dim=1) / 2  # [N]
    return float((new_norms - norms).abs().mean()), float(turned.where(lengths > 0, 0.0).mean())


def left_vectors(weight: Tensor, top: int | None = None) -> Tensor:
    """The left singular vectors u_1, u_2, ... of a weight as columns, [N, p], or the first `top`."""
    return torch.linalg.svd(weight, full_matrices=False).U[:, :top]


def closeness(known: Tensor, new: Tensor) -> Tensor:
    """max_i |cos(u_i, u'_j)| of each column u'_j of `new` [N, k] with all those of `known` [N, p]; [k].

    One below a threshold is an intruder dimension (Shuttleworth et al. 2024, algorithm 1).
    """
    return (known.mT @ new).abs().amax(dim=0)
