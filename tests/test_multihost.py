"""Two machines: network namespaces with a host name each, and a cable, a veth pair, between them. Needs root."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, make_experiment, run_script
from test_search_hyperparams import logged, make_sweep, wait_until

import utils
from engine import checkpoints

pytestmark = [
    pytest.mark.multihost,
    pytest.mark.skipif(os.getuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"),
]


class Hosts:
    """Hosts "a" and "b", at 10.77.0.1 and 10.77.0.2."""

    ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}  # noqa: RUF012

    def __init__(self, folder: Path):
        self.names = folder / "hosts"
        self.names.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{ip} {host}\n" for host, ip in self.ADDRESSES.items())
        )
        self.space = {host: f"gcn-{os.getpid()}-{host}" for host in self.ADDRESSES}

    def __enter__(self) -> "Hosts":
        a, b = self.space.values()
        for space in (a, b):
            ip("netns", "add", space)
        ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for host, space in self.space.items():
            ip("-n", space, "address", "add", f"{self.ADDRESSES[host]}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", space, "link", "set", link, "up")
        return self

    def __exit__(self, *_) -> None:
        for host in self.space:
            self.lose(host)
            ip("netns", "delete", self.space[host])

    def inside(self, host: str) -> list[str]:
        """The beginning of a command that runs the rest on a host."""
        script = f'mount --bind {self.names} /etc/hosts && hostname {host} && exec "$@"'
        return ["ip", "netns", "exec", self.space[host], "unshare", "--uts", "sh", "-c", script, "sh"]

    def start(self, host: str, *command) -> subprocess.Popen:
        options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*self.inside(host), sys.executable, *map(str, command)], **options)

    def torchrun(
        self, *command, endpoint: str = "a", nodes: str = "2", flags: tuple = ()
    ) -> dict[str, subprocess.Popen]:
        """Start one process on each host."""
        meeting = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"{endpoint}:29400", "--rdzv_id", "test", *flags)
        launcher = ("-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", "1", *meeting)
        return {host: self.start(host, *launcher, "--local-addr", host, *command) for host in self.space}

    def processes(self, host: str) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.space[host]).split()]

    def worker(self, host: str) -> int:
        """The process that torchrun has started on a host."""
        return next(pid for pid in self.processes(host) if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes())

    def lose(self, host: str) -> None:
        """End everything there, without a chance to say goodbye."""
        for pid in self.processes(host):
            os.kill(pid, signal.SIGKILL)

    def sent(self, host: str) -> int:
        """Bytes that a host has sent through the cable."""
        statistics = "/sys/class/net/cable/statistics/tx_bytes"
        return int(subprocess.check_output(["ip", "netns", "exec", self.space[host], "cat", statistics]))


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts(tmp_path) -> Iterator[Hosts]:
    with Hosts(tmp_path) as both:
        yield both


def arguments(experiment: Path, data: Path) -> tuple:
    return ("train.py", "--model_dir", experiment, "--data_dir", data)


def test_two_machines_train_as_one_process_does(hosts, tmp_path, data):
    options = {"encoder": "resnet18", "batch_size": 4, "dropout_rate": 0.2}
    alone, both = (make_experiment(tmp_path / name, **options) for name in ("alone", "both"))
    run_script(*arguments(alone, data))
    runs = hosts.torchrun(*arguments(both, data))
    said = {host: run.communicate(timeout=120) for host, run in runs.items()}
    assert [run.returncode for run in runs.values()] == [0, 0], said
    assert sum(stdout.count("epoch 2/2") for stdout, _ in said.values()) == 1
    assert any("by 2 processes, 1 on each machine" in stdout for stdout, _ in said.values())
    for ours, theirs in zip(utils.read_history(both), utils.read_history(alone), strict=True):
        # Rounding grows with every step.
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=5e-4 if ours["epoch"] == 1 else 2e-2)
    gradients = 4 * 11_555_604  # bytes; of two processes each sends that much in a step, and there are 4
    assert all(4 * gradients < hosts.sent(host) for host in runs)


def test_a_lost_machine_ends_the_run_on_the_other_which_can_go_on_alone(hosts, tmp_path, data):
    experiment = make_experiment(tmp_path / "run", encoder="resnet18", batch_size=4, num_epochs=1000)
    runs = hosts.torchrun(*arguments(experiment, data))
    wait_until((experiment / "last.pth.tar").exists, seconds=120)
    hosts.lose("b")
    _, stderr = runs["a"].communicate(timeout=20)
    assert runs["a"].returncode == 1
    assert re.search("^train.py: error: .*another process of this run has ended", stderr, re.MULTILINE)
    epoch = checkpoints.load_checkpoint(experiment / "last.pth.tar")["epoch"]
    make_experiment(experiment, encoder="resnet18", batch_size=4, num_epochs=epoch + 1)
    run_script(*arguments(experiment, data), "--resume")
    assert len(utils.read_history(experiment)) == epoch + 1


@pytest.mark.parametrize("victim", ["a", "b"])
def test_after_a_restart_on_both_machines_the_run_goes_on_from_its_checkpoint(hosts, tmp_path, data, victim):
    experiment = make_experiment(tmp_path / "run", encoder="resnet18", batch_size=4, num_epochs=4)
    runs = hosts.torchrun(*arguments(experiment, data), "--resume", flags=("--max-restarts", "1"))
    wait_until((experiment / "last.pth.tar").exists, seconds=120)
    os.kill(hosts.worker(victim), signal.SIGKILL)
    said = {host: run.communicate(timeout=120) for host, run in runs.items()}
    assert [run.returncode for run in runs.values()] == [0, 0], said
    assert sum(stdout.count("continuing after epoch") for stdout, _ in said.values()) == 1
    assert [epoch["epoch"] for epoch in utils.read_history(experiment)] == [1, 2, 3, 4]


def test_an_elastic_run_goes_on_without_a_lost_machine(hosts, tmp_path, data):
    experiment = make_experiment(tmp_path / "run", encoder="resnet18", batch_size=4, num_epochs=12)
    flags = ("--max-restarts", "3", "--rdzv_conf", "last_call_timeout=5")
    runs = hosts.torchrun(*arguments(experiment, data), "--resume", endpoint="b", nodes="1:2", flags=flags)
    wait_until((experiment / "last.pth.tar").exists, seconds=120)
    hosts.lose("a")  # of the two the one with rank 0 and torchrun's store
    stdout, stderr = runs["b"].communicate(timeout=150)
    assert runs["b"].returncode == 0, stderr
    assert "continuing after epoch" in stdout
    starts = re.findall("images of train.*", (experiment / "train.log").read_text())
    assert ["by 2 processes" in start for start in starts] == [True, False]
    assert [epoch["epoch"] for epoch in utils.read_history(experiment)] == list(range(1, 13))


def start_ray(hosts: Hosts, folder: Path) -> str:
    """Make a cluster of both hosts, each with one core, and return its address."""
    pytest.importorskip("ray")
    address = f"{hosts.ADDRESSES['a']}:6379"
    for host, flags in (
        ("a", ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}"]),
        ("b", [f"--address={address}"]),
    ):
        own = [f"--node-ip-address={hosts.ADDRESSES[host]}", "--num-cpus=1", "--object-store-memory=80000000"]
        started = hosts.start(host, "-m", "ray.scripts.scripts", "start", *flags, *own)
        _, stderr = started.communicate(timeout=60)
        assert started.returncode == 0, stderr
    return address


def test_a_sweep_on_two_machines_loses_one_of_them_and_then_its_coordinator(hosts, tmp_path, data):
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short, for its sockets
    sweep = make_sweep(tmp_path / "sweep", {"seed": [1, 2, 3, 4]}, encoder="resnet18", num_epochs=6)
    trials = [sweep / f"seed_{seed}" for seed in (1, 2, 3, 4)]
    command = [
        "search_hyperparams.py",
        "--data_dir",
        data,
        "--parent_dir",
        sweep,
        "--cluster",
        start_ray(hosts, folder),
    ]
    coordinator = hosts.start("a", *command)
    wait_until(lambda: all(logged(trial, "epoch 2/6") for trial in trials[:2]), seconds=120)
    assert len(hosts.processes("b")) > 0, "one trial on each"
    hosts.lose("b")
    wait_until(lambda: all(logged(trial, "trained 6 of 6") for trial in trials[:2]), seconds=240)
    wait_until(lambda: logged(trials[2], "epoch 2/6"), seconds=120)
    coordinator.kill()
    coordinator.communicate()

    again = hosts.start("a", *command)
    stdout, stderr = again.communicate(timeout=300)
    assert again.returncode == 0, stderr
    assert "4 trials: 4 finished" in stdout and stdout.count(": finished, best mIoU") == 2
    for trial in trials:
        assert [epoch["epoch"] for epoch in utils.read_history(trial)] == [1, 2, 3, 4, 5, 6]
        # Nothing that a checkpoint held was trained again, but for what the kill came too late for.
        assert all(logged(trial, f"epoch {epoch}/6") <= 2 for epoch in range(1, 7))
    assert sum(logged(trial, "continuing after epoch") for trial in trials[:2]) == 1, "that of the lost machine"
    shutil.rmtree(folder)
