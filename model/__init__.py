"""The network, its losses, metrics and data. Nothing here knows about params.json or the command line."""

import errno
import logging
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what Lustre and NFS answer that are mounted so


class UserError(ValueError):
    """A mistake that the user can mend. Scripts print it as one line on stderr and exit with status 2."""


def attempt(function: Callable, *arguments: Any) -> Any:
    """Return what a function returns, or the UserError that it raises: one faulty file does not end the others."""
    try:
        return function(*arguments)
    except UserError as error:
        return error


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, cut short; its kind where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return textwrap.shorten(line, 160, placeholder=" ...")


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a file in UTF-8 or, as PowerShell writes it, UTF-16."""
    content = path.read_bytes()
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors)


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
        _replace(temporary, path)
        if os.name != "nt":  # which cannot open a folder
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


def _replace(source: Path, target: Path) -> None:
    for _ in range(50 if os.name == "nt" else 0):  # Windows refuses while somebody reads target
        with suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.1)
    os.replace(source, target)


def locked(file: Path, timeout: float = -1) -> AbstractContextManager:
    """Return a lock that is held now and until its block ends. Raises filelock.Timeout after that many seconds.

    On a file system without locks another file, there while the lock is held, serves as one. It stays behind after a
    kill, and is taken over by the next process on the same machine only.
    """
    try:
        return FileLock(file, fallback_to_soft=False).acquire(timeout)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    lock = SoftFileLock(f"{file}.held")
    if timeout < 0:
        with suppress(Timeout):
            return lock.acquire(1)
        logging.warning(f"waiting for the process that {lock.lock_file} tells of; delete it if there is none")
    return lock.acquire(timeout)


def cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
