"""The network, its losses, metrics and data. Nothing here knows about params.json or the command line."""

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend. Scripts print it as one line on stderr and exit with status 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, cut short; its kind where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return textwrap.shorten(line, 160, placeholder=" ...")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to that takes path's place, synced to disk, when the block ends without an error."""
    path = Path(path)
    kept = os.fsdecode(os.fsencode(path.name)[:200])  # a name may have 255 bytes
    temporary = path.with_name(f".{kept}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):  # not every file system can
            os.fsync(folder)  # or a power cut could undo the renaming
        os.close(folder)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
