"""The network, its losses, metrics and data. Nothing here knows about params.json or the command line."""

import os
import stat
import textwrap
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend. Scripts print it as one line on stderr and exit with status 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, cut short; its kind where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return textwrap.shorten(line, 160, placeholder=" ...")


IRREGULAR = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def refuse_irregular(path: str | Path) -> None:
    """Raise UserError where a path leads to anything but a regular file: opening a FIFO would wait for ever.

    Says nothing where there is no file, or none that may be looked at; opening it will.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: a null character
        return
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in IRREGULAR if is_kind(mode)), "of unknown kind")
        raise UserError(f"{path} is not a regular file ({kind}); put a regular file in its place")


def cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
