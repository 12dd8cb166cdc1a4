"""Who is who among the processes that torchrun has started; without torchrun a process is alone."""

import os


class LostConnection(ConnectionError):
    """Another process of this run has ended, or has not answered in time."""


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Return how many processes this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Return whether this is the process that writes and speaks: rank 0."""
    return rank() == 0


def bar_disabled() -> bool | None:
    """Return what tqdm calls disable: one progress bar is enough, and that only on a terminal."""
    return None if is_main() else True


def launcher() -> list[str]:
    """Return the words of a command line that start a script as this one was started, but for addresses."""
    if world_size() == 1:
        return ["python"]
    machines = world_size() // local_world_size()
    command = ["torchrun", "--nproc_per_node", str(local_world_size())]
    if (restarts := os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) != "0":
        command += ["--max-restarts", restarts]
    if machines > 1:
        command += ["--nnodes", str(machines), "--rdzv_backend", "c10d", "--rdzv_endpoint", "HOST:PORT"]
        command += ["--rdzv_id", os.environ.get("TORCHELASTIC_RUN_ID", "ID")]
    return command
