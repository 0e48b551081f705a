"""Which rows of a whole batch's tensors a process has, for dropout's masks.

Letters: M tokens, S sequences, B examples, N heads, T the longest sequence of a block.
"""

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from kernels.dropout import Rows
from minibert.sequences import Sequences
from tasks.data import Batch, join


def row_places(batches: Mapping[str, Batch]) -> Callable[[str, Tensor, int], Rows]:
    """What `DropoutKey.rows` is in a step on these batches, of which this process has a share each.

    What the rows of a layer's x are follows from x and from its name: attention's are sequences of a block, a
    head's are examples, those of a task's own adapter are the task's tokens, and all others the step's.
    """
    sequences = join(list(batches.values())).sequences
    blocks, whole = sequences.blocks, sequences.blocks_of_batch
    tokens = token_rows(sequences)
    by_task = {task: token_rows(batch.sequences) for task, batch in batches.items()}

    def rows(name: str, x: Tensor, use: int) -> Rows:
        parts = name.split(".")
        if x.dim() == 4:  # [S, N, T, T], a block after the other, and so again in another pass
            block = blocks[use % len(blocks)]
            return Rows.at(np.array(block.places), use // len(blocks) * whole + block.number)
        if parts[0] == "heads":  # [B, H]
            return Rows.at(np.array(batches[parts[1]].share.places), use)
        own = by_task[parts[parts.index("adapters") + 1]] if "adapters" in parts else tokens
        return own._replace(use=use)

    return rows


def token_rows(sequences: Sequences) -> Rows:
    """Of a share's tokens. What comes behind them is filler, and as good as any row."""
    starts = np.cumsum((0, *sequences.whole))
    spans = [np.arange(starts[place], starts[place + 1]) for place in sequences.places]
    return Rows.at(np.concatenate(spans), use=0)
