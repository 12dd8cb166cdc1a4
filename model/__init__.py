"""The network, its losses, metrics and data. Nothing here knows about params.json or the command line."""

import os
import textwrap


class UserError(ValueError):
    """A mistake that the user can mend. Scripts print it as one line on stderr and exit with status 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, cut short; its kind where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return textwrap.shorten(line, 160, placeholder=" ...")


def cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
