"""Who is who among the processes that torchrun has started, and which GPUs there are, without importing torch.

Without torchrun a process is alone.
"""

import os
import shutil
import subprocess


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


def visible_gpus() -> list[str]:
    """Return each GPU as CUDA_VISIBLE_DEVICES calls it, those that it lists if it is set."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for part in listed.split(",") if (name := part.strip()) not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):  # a driver without a device
        return []
