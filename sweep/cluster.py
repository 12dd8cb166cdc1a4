"""Trials as tasks on a Ray cluster, which finds them a GPU and runs them again where a machine is lost."""

import logging
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import ray
from ray.exceptions import RayError, TaskCancelledError

from model import UserError, first_line
from sweep.coordinator import start_train, wait_for_lock
from utils import ROOT


class Cluster:
    """A Ray cluster whose machines share the repository and the sweep. Raises UserError if none is at the address."""

    def __init__(self, address: str):
        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        try:
            ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--cluster {address}: no Ray cluster answers there ({first_line(error)})") from None
        resources = ray.cluster_resources()
        self.gpus, self.cpus = int(resources.get("GPU", 0)), int(resources["CPU"])
        self.machines = sum(node["Alive"] for node in ray.nodes())

    def start(self, folder: Path, data_dir: Path, lock_file: Path, *, jobs: int) -> "ClusterTrial":
        """Give a trial to Ray, with a GPU or, where there are none, its share of the cores."""
        cores = 1 if self.gpus else max(1, self.cpus // max(jobs, self.machines))
        options = {"num_gpus": min(1, self.gpus), "num_cpus": cores, "max_retries": -1, "name": folder.name}
        task = ray.remote(run_train).options(**options)
        return ClusterTrial(task.remote(*(path.absolute() for path in (folder, data_dir, lock_file))))


def run_train(folder: Path, data_dir: Path, lock_file: Path) -> int:
    """Run train.py on a machine of the cluster and return its exit status, negative for a signal."""
    with ExitStack() as held:
        process = start_train(folder, data_dir, [wait_for_lock([lock_file], held, lambda: None)], dict(os.environ))
        try:
            return process.wait()
        except KeyboardInterrupt:  # as Ray cancels a task
            process.terminate()
            return process.wait()


class ClusterTrial:
    """A trial on the cluster, with the methods of subprocess.Popen that a coordinator needs."""

    def __init__(self, task: ray.ObjectRef):
        self.task = task

    def poll(self) -> int | None:
        """Return the exit status of train.py, None while it runs or waits."""
        try:
            return ray.get(self.task) if ray.wait([self.task], timeout=0)[0] else None
        except TaskCancelledError:
            return -signal.SIGTERM
        except RayError as error:
            raise UserError(str(error).strip().splitlines()[-1]) from None

    def terminate(self) -> None:
        ray.cancel(self.task)

    def kill(self) -> None:
        ray.cancel(self.task, force=True)
