"""Trials as tasks on a Ray cluster, which finds them a GPU and runs them again where a machine is lost."""

import logging
import os
import signal
import time
from pathlib import Path

import ray
from ray.exceptions import RayError, TaskCancelledError

from model import UserError, first_line
from sweep.coordinator import POLL, start_train
from utils import ROOT


class Cluster:
    """A Ray cluster whose machines share the repository and the sweep. Raises UserError if none is at the address."""

    def __init__(self, address: str, jobs: int | None):
        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--cluster {address}: no Ray cluster answers there ({first_line(error)})") from None
        signal.signal(signal.SIGTERM, handler)  # where Ray puts its own
        resources = ray.cluster_resources()
        gpus, machines = int(resources.get("GPU", 0)), sum(node["Alive"] for node in ray.nodes())
        self.jobs = jobs or gpus or machines  # trials at once
        cores = 1 if gpus else max(1, int(resources["CPU"]) // max(self.jobs, machines))
        self.options = {"num_gpus": min(1, gpus), "num_cpus": cores, "max_retries": -1}

    def start(self, folder: Path, data_dir: Path) -> "ClusterTrial":
        """Give a trial to Ray, with a GPU or, where there are none, its share of the cores."""
        task = ray.remote(run_train).options(name=folder.name, **self.options)
        return ClusterTrial(task.remote(folder.absolute(), data_dir.absolute()))


def run_train(folder: Path, data_dir: Path) -> int:
    """Run train.py on a machine of the cluster and return its exit status, negative for a signal."""
    process = start_train(folder, data_dir, {**os.environ})
    try:
        while process.poll() is None:
            time.sleep(POLL)  # which a cancellation interrupts, and not process.wait()
    except KeyboardInterrupt:
        process.terminate()
    return process.wait()


class ClusterTrial:
    """A trial on the cluster, with the methods of subprocess.Popen that a coordinator needs."""

    def __init__(self, task: ray.ObjectRef):
        self.task = task

    def poll(self) -> int | None:
        """Return the exit status of train.py, None while it runs or waits."""
        return self.wait() if ray.wait([self.task], timeout=0)[0] else None

    def wait(self) -> int:
        """Return the exit status of train.py. Raises UserError if Ray cannot run it."""
        try:
            return ray.get(self.task)
        except TaskCancelledError:
            return -signal.SIGTERM
        except RayError as error:
            raise UserError(str(error).strip().splitlines()[-1]) from None

    def terminate(self) -> None:
        ray.cancel(self.task)
