"""Several processes on the CPU do what one does, and end together."""

import contextlib
import io
import multiprocessing
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, make_data, make_experiment, run_script
from torch import nn

import evaluate
import train
import utils
from engine import checkpoints, cli, devices, training
from engine.devices import loading_options
from engine.training import Training
from model.data_loader import Batches, SegmentationDataset, make_loader
from model.layouts import class_names, find_split
from model.losses import TERMS, SegmentationLoss
from model.metrics import Metrics
from model.net import FCN_GCN
from model.parallel import Dropout2d, differentiable_sum, shard, synchronize_batch_norm
from params import Params
from train import train_epoch

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def on_processes(count: int, function: Callable[..., Any], *args: Any, connect: bool = True) -> list:
    """What function returns, or raises, in each of count processes, by rank; connect: it finds them connected."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")  # importing torch anew takes longer than most of these tests
    answers = context.Queue()

    def work(rank: int) -> None:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {key: str(value) for key, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            with devices.processes("cpu") if connect else contextlib.nullcontext():
                answer = function(*args)
        except BaseException as error:
            answer = error
        answers.put((rank, answer))

    processes = [context.Process(target=work, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    found, deadline = {}, time.monotonic() + 240
    try:
        while len(found) < count:
            try:
                found |= [answers.get(timeout=1)]
            except queue.Empty:
                codes = [process.exitcode for process in processes]
                assert not any(codes) and time.monotonic() < deadline, (codes, found)
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * count
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(count)]


def main_of(script, *args) -> tuple[int, str, str]:
    """Run a script's main() here, as under torchrun; its exit status and what it says."""
    sys.argv = [f"{script.__name__}.py", *map(str, args)]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        cli.MOMENT = 0.0  # there is no torchrun that would end this process
        try:
            status = cli.run_main(lambda: script.main(script.parse_args()), several_processes=True)
        except SystemExit as end:
            status = end.code
    return status, stdout.getvalue(), stderr.getvalue()


def of_one_and_of(counts: tuple[int, ...], function: Callable[..., Any], *args: Any) -> tuple[Any, list]:
    """What function returns here alone, and in every process of all these groups."""
    return function(*args), [answer for count in counts for answer in on_processes(count, function, *args)]


# ------------------------------------------------------------------------------------------------------ one step


def step_in_float64(images: int) -> dict:
    """One step of a small network on a batch of that many images."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Dropout2d(0.4), nn.ReLU(), nn.Conv2d(8, 5, 1)).double()
    x, labels = torch.randn(images, 3, 9, 7).double(), torch.randint(6, (images, 7, 5)) % 6
    labels[labels == 5] = 255
    labels[0] = 255  # void is not shared out evenly
    own = shard(images, devices.rank(), devices.world_size())
    rows = slice(own.start, own.stop)
    if devices.world_size() > 1:
        synchronize_batch_norm(model, torch.device("cpu"))
        model[2].whole = own.start, images
        model = training.distribute(model, torch.device("cpu"))
    sums = {term: 1 for term in TERMS if term != "lovasz"}  # which differs with the shards
    criterion = SegmentationLoss(sums, over_processes=True)
    loss = criterion(model(x[rows]), labels[rows])
    loss.backward()
    module = getattr(model, "module", model)
    return {
        "loss": loss.item(),
        "gradients": [parameter.grad.numpy() for parameter in module.parameters()],
        "statistics": [buffer.numpy() for buffer in module.buffers()],
        "random": torch.rand(3).numpy(),
    }


def assert_alike(answers: list, expected: Any, tolerance: float) -> None:
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        assert answer.keys() == expected.keys()
        for key in expected:
            ours, theirs = (value if isinstance(value, list) else [value] for value in (answer[key], expected[key]))
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("images", [6, 2])  # of four processes with two images, two have nothing
def test_a_step_has_the_loss_gradients_and_statistics_of_the_whole_batch(images):
    one, several = of_one_and_of((2, 3, 4), step_in_float64, images)
    assert_alike(several, one, 1e-12)


def gradient_of_total() -> tuple[float, float]:
    x = torch.tensor(float(devices.rank() + 1), requires_grad=True)
    y = differentiable_sum(x)
    (y.square() * (devices.rank() + 1)).backward()  # another loss in each process
    return y.item(), x.grad.item()


def test_total_adds_up_forward_and_backward():
    # The sum over processes of (r + 1) y^2 with y = 1 + 2, whose derivative by each x is 2 y (1 + 2).
    assert on_processes(2, gradient_of_total) == [(3.0, 18.0)] * 2


# ------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("length", "batch_size"), [(11, 4), (12, 4), (1, 4), (3, 1)])
def test_processes_split_training_batches_and_deal_out_those_for_scoring(length, batch_size, world_size):
    for seed in (1, None):
        whole = list(Batches(length, batch_size, seed=seed))
        parts = [Batches(length, batch_size, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [len(list(part)) for part in parts] == [len(part) for part in parts]
        if seed:
            assert [list(chain(*shares)) for shares in zip(*parts, strict=True)] == whole
            assert all(part.sizes == [len(batch) for batch in whole] for part in parts)
            assert all(max(map(len, shares)) - min(map(len, shares)) <= 1 for shares in zip(*parts, strict=True))
        else:
            dealt = [batch for turn in range(len(whole)) for part in parts for batch in list(part)[turn : turn + 1]]
            assert dealt == whole
            assert all(part.sizes == [len(batch) for batch in part] for part in parts)


def counts_of_rank() -> tuple:
    metrics, labels = Metrics(3, original_size=True), torch.arange(64).view(1, 8, 8) % 3
    for index in range(5)[devices.rank() :: devices.world_size()]:
        prediction = (labels + (torch.arange(64).view(1, 8, 8) % (index + 2) == 0)) % 3
        metrics.update(prediction, labels)
    metrics.reduce()
    return metrics.confusion.matrix.tolist(), metrics.compute()


def test_metrics_count_what_all_processes_have_seen():
    one, several = of_one_and_of((2, 4), counts_of_rank)
    assert several == [one] * 6


# ------------------------------------------------------------------------------------------------------ whole runs


def train_in_float64(data: Path, options: dict) -> dict:
    params = Params(**TINY | options)
    names = class_names(find_split("voc", data, "train"), params.num_classes)
    split = find_split("voc", data, "train")
    dataset = SegmentationDataset(split, class_names=names, image_size=params.image_size)
    loader = make_loader(dataset, batch_size=params.batch_size, seed=1, **loading_options(params))
    torch.manual_seed(1 + devices.rank())  # others begin with other weights
    training = Training(FCN_GCN(**params.network_options(), pretrained=False).double(), params, len(loader))
    torch.manual_seed(2)
    wrapped = training.wrapped_model
    training.wrapped_model = lambda x: wrapped(x.double())
    metrics = train_epoch(training, loader)
    return {
        **{key: value for key, value in metrics.items() if isinstance(value, float)},
        "weights": [value.numpy() for value in training.model.state_dict().values()],
        "average": [value.numpy() for value in training.eval_model.state_dict().values()],
        "random": torch.rand(3).numpy(),
    }


@pytest.mark.parametrize(
    ("processes", "images", "options"),
    [
        (2, 7, {"image_size": 64, "batch_size": 2, "accumulation_steps": 2}),  # a smaller last batch shares a step
        pytest.param(
            *(2, 3, {"encoder": "resnet18", "batch_size": 2, "activation_checkpointing": True, "resize": "letterbox"}),
            marks=pytest.mark.slow,
        ),
        # In the last batch two have nothing.
        pytest.param(4, 6, {"image_size": 64, "batch_size": 4}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_the_same_network_as_one(tmp_path, processes, images, options):
    data = make_data(tmp_path / "data", train=images, val=1)
    options |= {"augment": True, "dropout_rate": 0.3, "ema_decay": 0.5, "clip_grad_norm": 1.0, "save_summary_steps": 1}
    one, several = of_one_and_of((processes,), train_in_float64, data, options)
    assert 0 < one["pixel_accuracy"] < 1
    assert_alike(several, one, 1e-9)


def train_and_list_writes(*args) -> tuple[int, str, str, list[str]]:
    written, replace = [], os.replace
    os.replace = lambda source, target: written.append(Path(target).name) or replace(source, target)
    return (*main_of(train, *args), written)


def test_a_run_is_written_once_and_another_number_of_processes_goes_on_with_it(tmp_path, data):
    straight, halves = (make_experiment(tmp_path / name, batch_size=4, dropout_rate=0.2) for name in ("one", "two"))
    run_script("train.py", "--model_dir", straight, "--data_dir", data)

    make_experiment(halves, batch_size=4, dropout_rate=0.2, num_epochs=1)
    answers = on_processes(2, train_and_list_writes, "--model_dir", halves, "--data_dir", data, connect=False)
    assert [status for status, *_ in answers] == [0, 0]
    assert answers[0][1].count("epoch 1/1") == 1 and answers[1][1:] == ("", "", [])
    assert answers[0][3].count("last.pth.tar") == 1
    assert {path.name for path in halves.iterdir()} == {path.name for path in straight.iterdir()}
    shutil.copy(straight / "params.json", halves)
    run_script("train.py", "--model_dir", halves, "--data_dir", data, "--restore_file", "last")

    # Rounding grows with every step, so only the beginning is compared closely; see the test in float64 too.
    for ours, theirs, tolerance in zip(*map(utils.read_history, (halves, straight)), (5e-4, 2e-2), strict=True):
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=tolerance)
        assert ours["val"]["loss"] == pytest.approx(theirs["val"]["loss"], rel=tolerance * 10)
    first, second = (checkpoints.load_checkpoint(folder / "last.pth.tar") for folder in (halves, straight))
    assert torch.equal(first["rng"], second["rng"])
    ours, theirs = (
        torch.cat([tensor.flatten() for name, tensor in checkpoint["state_dict"].items() if "running" not in name])
        for checkpoint in (first, second)
    )
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_evaluation_by_several_processes_gives_the_same_files(trained, tmp_path):
    data = trained[1]
    for count, flags in ((4, ()), (2, ("--save_overlays", 3, "--save_predictions", tmp_path / "predictions"))):
        seen = []
        for processes in (1, count):
            folder = shutil.copytree(trained[0], tmp_path / "run", copy_function=os.link)
            (folder / "params.json").unlink()  # a link
            make_experiment(folder, encoder="resnet18", batch_size=1)
            command = (evaluate, "--model_dir", folder, "--data_dir", data, *flags)
            answers = on_processes(processes, main_of, *command, connect=False)
            assert [status for status, _, _ in answers] == [0] * processes
            assert "3 images of val" in answers[0][1]
            assert all(said == ["", ""] for _, *said in answers[1:])
            files = [*folder.glob("metrics_val_best*"), *folder.glob("counts*"), *folder.glob("overlays*/*")]
            if flags:
                files += sorted((tmp_path / "predictions").rglob("*.png"))
            assert len(files) == (10 if flags else 4)
            seen.append({file.name: file.read_bytes() for file in files})
            shutil.rmtree(folder)
        assert seen[0] == seen[1]


def test_processes_that_score_several_agree_on_what_is_scored_and_on_what_fails_in_one_of_them(trained, tmp_path):
    data = shutil.copytree(trained[1], tmp_path / "data")
    (data / "JPEGImages" / "val0.jpg").write_text("nonsense")  # which one process reads, at the photos' own size
    run = shutil.copytree(trained[0], tmp_path / "run", copy_function=os.link)
    command = (evaluate, "--model_dir", tmp_path / "gone", run, "--data_dir", data, "--split", "val", "train", "--flip")
    for state in ("scored", "was scored"):
        answers = on_processes(2, main_of, *command, connect=False)
        assert [status for status, _, _ in answers] == [1, 1] and answers[1][1:] == ("", "")
        _, stdout, stderr = answers[0]
        assert stdout.startswith(f"{run}   train  mIoU 0.") and stdout.endswith(f"  {state}\n")
        assert [line.split(": ")[:2] for line in stderr.splitlines()] == [
            ["evaluate.py", f"{folder}"] for folder in (tmp_path / "gone", run)
        ]
        assert "val0.jpg" in stderr and "Traceback" not in stderr


# ------------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 3}, '"batch_size" is 3, over all processes, and cannot be divided among 2'),
        (
            {"batch_size": 2, "compile": True, "activation_checkpointing": True},
            '"compile" and "activation_checkpointing" together are for one process; set one of them to false',
        ),
    ],
)
def test_a_mistake_ends_all_processes(tmp_path, data, options, said):
    experiment = make_experiment(tmp_path / "run", **options)
    answers = on_processes(2, main_of, train, "--model_dir", experiment, "--data_dir", data, connect=False)
    assert answers[0] == (2, "", f"train.py: error: {said}\n")
    status, _, stderr = answers[1]
    assert status == 2 and stderr.startswith("train.py: error: (rank 1 on ") and stderr.endswith(f") {said}\n")


def train_on_own_data(experiment: Path, folders: list[Path]) -> tuple[int, str, str]:
    return main_of(train, "--model_dir", experiment, "--data_dir", folders[devices.rank() % len(folders)])


@pytest.mark.parametrize("split", ["train", "val"])
def test_machines_with_other_lists_are_refused(tmp_path, split):
    folders = [make_data(tmp_path / "0"), make_data(tmp_path / "1")]
    ids = (folders[1] / f"{split}.txt").read_text().split()
    (folders[1] / f"{split}.txt").write_text("\n".join(ids[::-1]))
    experiment = make_experiment(tmp_path / "run", batch_size=3)
    answers = on_processes(3, train_on_own_data, experiment, folders, connect=False)
    words = f"{split}.txt is not the same for all processes; give all machines the same files\n"
    assert all(status == 2 and stderr.endswith(words) for status, _, stderr in answers)


def train_in_own_folder(folders: list[Path], data: Path) -> tuple[int, str, str]:
    return main_of(train, "--resume", "--model_dir", folders[devices.rank()], "--data_dir", data)


def test_processes_that_find_other_params_or_checkpoints_are_refused(tmp_path, trained):
    folders = [shutil.copytree(trained[0], tmp_path / name) for name in ("0", "1")]
    for folder in folders:
        make_experiment(folder, encoder="resnet18", num_epochs=3, batch_size=4)
    (folders[1] / "last.pth.tar").unlink()
    for path in folders[1].glob("*.*"):
        path.unlink() if path.name != "params.json" else None
    answers = on_processes(2, train_in_own_folder, folders, trained[1], connect=False)
    assert all(status == 2 and "or last.pth.tar, is not the same" in stderr for status, _, stderr in answers), answers


def decoded_by_rank(data: Path) -> bool:
    done = []
    decode, names = SegmentationDataset.decode, class_names(find_split("voc", data, "train"), 21)
    SegmentationDataset.decode = lambda self, index: done.append(index) or decode(self, index)
    SegmentationDataset(find_split("voc", data, "train"), class_names=names, image_size=32)
    return bool(done)


def test_the_cache_is_built_by_one_process_while_the_others_wait(data):
    assert sorted(on_processes(4, decoded_by_rank, data)) == [False, False, False, True]


def test_other_scripts_refuse_torchrun():
    stderr = run_script("synthesize_results.py", check=2, RANK="0", WORLD_SIZE="2").stderr
    assert stderr == "synthesize_results.py: error: this is work for one process; start it without torchrun\n"


def torchrun(experiment: Path, data: Path, *flags: str, script_flags: Sequence[str] = ()) -> subprocess.Popen:
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *flags, "train.py", "--model_dir", experiment]
    return subprocess.Popen(
        [*map(str, command), "--data_dir", str(data), *script_flags],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def workers(process: subprocess.Popen) -> dict[int, int]:
    """Process ids of what a torchrun has started, by rank: each has a session of its own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return dict(enumerate(child for child in map(int, children) if os.getsid(child) == child))


def epochs(experiment: Path) -> int:
    return len(utils.read_history(experiment))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.slow
def test_torchrun_restarts_a_run_of_which_a_process_was_killed_and_it_resumes(tmp_path, data):
    experiment = make_experiment(tmp_path / "run", batch_size=4, num_epochs=3)
    process = torchrun(experiment, data, "--max-restarts", "1", script_flags=["--resume"])
    wait_until((experiment / "last.pth.tar").exists, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "continuing after epoch" in stdout and epochs(experiment) == 3
    assert stdout.count("epoch 3/3") == 1
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_mistake_is_said_once_under_torchrun(tmp_path, data):
    process = torchrun(make_experiment(tmp_path / "run", batch_size=3), data)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr.count("train.py: error: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ends_promptly_and_clearly_whichever_process_is_stopped(tmp_path, data, rank, number):
    experiment = make_experiment(tmp_path / "run", batch_size=4, num_epochs=1000)
    process = torchrun(experiment, data)
    wait_until((experiment / "last.pth.tar").exists, process)
    ranks = workers(process)
    os.kill(ranks[rank], number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and 'train.py", line' not in stderr  # torchrun has a traceback of its own
    ours = [line for line in stderr.splitlines() if line.startswith("train.py: error")]
    assert all(re.search("terminated|another process of this run has ended", line) for line in ours)
    assert bool(ours) or (rank, number) == (0, signal.SIGKILL)
    assert not [pid for pid in ranks.values() if Path(f"/proc/{pid}").exists()]
    assert checkpoints.load_checkpoint(experiment / "last.pth.tar")["epoch"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_ends_all(tmp_path, data, number):
    experiment = make_experiment(tmp_path / "run", batch_size=4, num_epochs=1000)
    process = torchrun(experiment, data)
    wait_until((experiment / "last.pth.tar").exists, process)
    ranks = workers(process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert len(re.findall("^train.py: error: .*--resume", stderr, re.MULTILINE)) >= 1
    assert not [pid for pid in ranks.values() if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_compiled_processes_train_too(tmp_path, data):
    experiment = make_experiment(tmp_path / "run", encoder="resnet18", batch_size=4, num_epochs=1, compile=True)
    process = torchrun(experiment, data)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
