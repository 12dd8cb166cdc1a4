"""The network, its losses, metrics and data. Nothing here knows about params.json or the command line."""

import os


class UserError(ValueError):
    """A mistake that the user can mend. Scripts print it as one line on stderr and exit with status 2."""


# The choices that params.json offers, here because reading it must not wait for torch.
HEADS = ("gcn", "conv1x1", "conv", "stack")
GCN_PADDINGS = ("swapped", "same")
LOSS_TERMS = ("bce", "dice", "inverse_dice", "cross_entropy", "balanced_cross_entropy")


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
