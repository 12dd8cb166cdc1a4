"""Runs that are killed, stopped, starved of disk or memory, on odd systems, and input of any bytes."""

import errno
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, as_network, make_data, make_experiment, paused, run_script, start_script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import utils
from engine import checkpoints, cli, run
from engine.run import sole_run
from engine.training import Training
from model import UserError
from model.data_loader import SegmentationDataset, make_loader
from model.layouts import Split, find_split
from model.net import FCN_GCN
from model.photos import read_mask, read_photo
from model.sample import draw_scene
from model.transforms import to_square
from model.voc import CLASS_NAMES, colour_mask
from params import Params
from train import backward

# Everything random or stateful switched on.
EVERYTHING = {
    "deterministic": True,
    "augment": True,
    "cutmix": 0.5,
    "dropout_rate": 0.2,
    "ema_decay": 0.5,
    "schedule": "cosine",
    "num_epochs": 3,
    "num_workers": 1,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, Path]:
    """A run of three epochs that nothing has disturbed, and its data."""
    folder = tmp_path_factory.mktemp("straight")
    data = make_data(folder / "data")
    experiment = make_experiment(folder / "run", **EVERYTHING)
    run_script("train.py", "--model_dir", experiment, "--data_dir", data)
    return experiment, data


def start(experiment: Path, data: Path, *more: str, limits: Mapping[int, int] | None = None) -> subprocess.Popen:
    """Start, or go on with, a run as its own process group, under limits of its resources."""
    process = start_script(
        "train.py", "--resume", "--model_dir", experiment, "--data_dir", data, *more, new_session=True
    )
    for limited, number in (limits or {}).items():
        resource.prlimit(process.pid, limited, (number, number))
    return process


def little_memory(megabytes: int = 700) -> dict[int, int]:
    """Limits for start(): so much beyond what this process has mapped, and with it its forks."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return {resource.RLIMIT_AS: pages * resource.getpagesize() + megabytes * 1_000_000}


def wait_for(process: subprocess.Popen, condition) -> bool:
    """Wait until condition() holds; False if the process ended first."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def logged(experiment: Path, words: str) -> int:
    log = experiment / "train.log"
    with suppress(FileNotFoundError):  # a run that starts over deletes it
        return log.read_text().count(words)
    return 0


def kill_at(experiment: Path, data: Path, moment: str | float) -> int:
    """Start or go on, and kill the process group that many seconds after it began to train, or while it "saves".

    With "saves again", while it saves and has saved before. Returns how many processes were killed: 0 if the run was
    over before.
    """
    process = start(experiment, data)
    begun = logged(experiment, "images of train")
    last = experiment / "last.pth.tar"
    if moment in ("saves", "saves again"):
        hit = wait_for(
            process,
            lambda: list(experiment.glob(".last.pth.tar.*.tmp")) and (last.exists() or moment == "saves"),
        )
        time.sleep(random.uniform(0, 0.1))
    else:
        hit = wait_for(process, lambda: logged(experiment, "images of train") > begun)
        time.sleep(moment)
    hit = hit and process.poll() is None
    if hit:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if last.exists():
        assert all(tensor.isfinite().all() for tensor in weights(experiment).values())
    return int(hit)


def finish(experiment: Path, data: Path) -> None:
    process = start(experiment, data)
    _, stderr = process.communicate()
    assert process.returncode == 0 and stderr == ""


def weights(experiment: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(experiment / f"{name}.pth.tar")["state_dict"]


def assert_same_run(first: Path, second: Path) -> None:
    """Bit by bit the same, but for times."""
    times = ("seconds", "images_per_second")
    histories = [
        [{key: value for key, value in epoch.items() if key not in times} for epoch in utils.read_history(folder)]
        for folder in (first, second)
    ]
    assert histories[0] == histories[1]
    ours, theirs = (checkpoints.load_checkpoint(folder / "last.pth.tar") for folder in (first, second))
    for part in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])
    states = [checkpoint["optim_dict"]["state"] for checkpoint in (ours, theirs)]
    assert all(torch.equal(states[0][i]["momentum_buffer"], states[1][i]["momentum_buffer"]) for i in states[1])
    ours, theirs = (checkpoints.load_checkpoint(folder / "best.pth.tar") for folder in (first, second))
    assert ours["epoch"] == theirs["epoch"]
    assert all(torch.equal(ours["state_dict"][key], theirs["state_dict"][key]) for key in theirs["state_dict"])
    for name in ("last", "best"):
        metrics = [(folder / f"metrics_val_{name}_weights.json").read_bytes() for folder in (first, second)]
        assert metrics[0] == metrics[1]


# ---------------------------------------------------------------------------------------- kills


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(straight, tmp_path):
    experiment, data = straight
    cut = make_experiment(tmp_path / "cut", **EVERYTHING)
    kill_at(cut, data, random.uniform(0, 0.8))
    assert kill_at(cut, data, "saves again") and (cut / "last.pth.tar").exists()
    finish(cut, data)
    assert_same_run(cut, experiment)
    assert not list(cut.glob(".*.tmp"))


@pytest.mark.parametrize(
    "number, status, word", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_the_run_and_says_how_to_continue_it(straight, tmp_path, number, status, word):
    experiment, data = straight
    cut = make_experiment(tmp_path / "a run", **EVERYTHING)
    process = start(cut, data)
    assert wait_for(process, (cut / "last.pth.tar").exists)
    os.killpg(process.pid, number)  # as terminals and batch systems do: its loaders too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert stderr == f"train.py: error: {word}; the same command with --resume continues the run\n"
    assert not list(cut.glob(".*.tmp"))
    if number == signal.SIGTERM:
        finish(cut, data)
        assert_same_run(cut, experiment)


def test_a_second_run_is_refused(straight, tmp_path):
    _, data = straight
    cut = make_experiment(tmp_path / "run", **EVERYTHING)
    process = start(cut, data)
    assert wait_for(process, lambda: logged(cut, "images of train"))
    with paused(process.pid):
        second = run_script("train.py", "--model_dir", cut, "--data_dir", data, "--overwrite", check=2)
    assert second.stderr == f"train.py: error: another train.py is at work in {cut}; wait for it, or stop it first\n"
    process.kill()
    process.communicate()


def test_an_unforeseen_error_ends_the_process_though_loaders_live(data, tmp_path):
    code = """
import sys
from engine import cli
from model.data_loader import SegmentationDataset, make_loader
from model.layouts import find_split
from model.voc import CLASS_NAMES
def main():
    data = SegmentationDataset(find_split("voc", sys.argv[1], "train"), class_names=CLASS_NAMES, image_size=32)
    loader = make_loader(data, batch_size=2, num_workers=1)  # kept alive by the traceback
    for batch in loader:
        raise ZeroDivisionError
cli.run_main(main)
"""
    (tmp_path / "script.py").write_text(code)
    result = run_script(tmp_path / "script.py", data, check=1)
    assert result.stderr.rstrip().endswith("ZeroDivisionError")


def test_a_reader_who_leaves_costs_no_traceback_and_no_epoch(tmp_path, data):
    experiment = make_experiment(tmp_path / "run")
    head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process = start_script("train.py", "--model_dir", experiment, "--data_dir", data, stdout=head.stdin)
    assert head.communicate()[0].count(b"\n") == 1
    assert process.communicate()[1] == ""
    assert "trained 2 of 2 epochs" in (experiment / "train.log").read_text()


# ---------------------------------------------------------------------------------------- loader processes


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_name_that_is_too_long_for_the_sockets_of_loader_processes_is_one_line(script, trained, experiment, tmp_path):
    (folder := tmp_path / ("x" * 90)).mkdir()
    flags = ["--model_dir", experiment, "--data_dir", trained[1], *(["--overwrite"] if script == "train.py" else [])]
    stderr = run_script(script, *flags, check=1, TMPDIR=str(folder)).stderr
    assert stderr.startswith(f"{script}: error: loader processes have failed (OSError: AF_UNIX path too long")
    assert stderr.endswith(
        '; set TMPDIR to a folder with a shorter name, or set "num_workers" lower, or to 0 for none\n'
    )
    assert stderr.count("\n") == 1 and ("--resume" in stderr) == (script == "train.py")


class Unsendable:
    """A batch that raises an error when it is sent, or ends its process then."""

    def __init__(self, error: Exception | None):
        self.error = error

    def __reduce__(self):
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise self.error


class OwnError(RuntimeError):
    pass


class Unnamed(Exception):
    """Cannot be sent itself: it is not found by its name."""


Unnamed.__qualname__ = "nowhere"


SHARED = "unable to open shared memory object </torch_1_2>: "
LOADERS = r"^loader processes have failed \(.*\); {}, or set \"num_workers\" lower, or to 0 for none$"


@pytest.mark.parametrize(
    ("sent", "error", "said"),
    [
        (True, RuntimeError(f"{SHARED}No space left (28)"), LOADERS.format(r".*\(docker run --shm-size 8g\)")),
        (False, RuntimeError(f"{SHARED}Too many open files (24)"), LOADERS.format(r".*\(ulimit -n 65536\)")),
        (True, None, LOADERS.format("memory may have been short")),
        (False, FileNotFoundError(2, "No such", "a.jpg"), r"^FileNotFoundError: \[Errno 2\] No such: 'a\.jpg'$"),
        (True, UserError("a.jpg is no photo"), r"^a\.jpg is no photo$"),
        (True, Unnamed("last"), r"(?s)Caught RuntimeError in .*nowhere: last"),  # a traceback: the code is wrong
        (False, OwnError("first\nlast"), r"(?s)Caught OwnError in .*OwnError: first\nlast$"),
    ],
)
def test_what_ends_a_loader_process_is_raised_in_the_main_process(sent, error, said):
    """Where a batch is made, and where a thread sends it."""

    def collate(examples):
        if sent:
            return Unsendable(error)
        raise error

    with pytest.raises(Exception) as caught:
        next(iter(make_loader(list(range(4)), batch_size=2, num_workers=1, collate=collate)))
    assert re.search(said, (cli.explained(caught.value) or (1, str(caught.value).strip()))[1])


@pytest.mark.slow
def test_compiling_without_a_compiler_is_one_line(tmp_path, monkeypatch):
    for name, value in {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "g++"))
    with pytest.raises(Exception) as caught:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(100))
    status, line = cli.explained(caught.value)
    assert status == 1 and line.startswith('"compile" is true, but: ') and "\n" not in line
    assert "C++ compiler" in line and line.endswith("; install what is missing, or set it to false")


# ---------------------------------------------------------------------------------------- locks

HOLD = """
import fcntl, pathlib, sys
def refuse(*args):
    raise OSError(int(sys.argv[1]), "no locks here")
fcntl.flock = refuse
from model import locked
held = [locked(pathlib.Path(file)) for file in sys.argv[2:]]
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_does(tmp_path, data, monkeypatch, caplog, number):
    def refuse(*args):
        raise OSError(number, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(run, "LOCK_PATIENCE", 0.1)
    experiment, split = make_experiment(tmp_path / "run"), find_split("voc", data, "val")
    (data / ".cache").mkdir()
    files = [experiment / ".lock", data / ".cache" / "val-32px-21classes.lock"]
    command = [sys.executable, "-c", HOLD, str(number), *map(str, files)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    assert run.is_running(experiment)
    with pytest.raises(UserError, match=rf"in {experiment}; .* \(or delete {files[0]}\.held if"), sole_run(experiment):
        pass
    with ThreadPoolExecutor(1) as pool:
        dataset = pool.submit(SegmentationDataset, split, class_names=CLASS_NAMES, image_size=32)
        while "delete it if there is none" not in caplog.text:
            time.sleep(0.01)
        holder.kill()
        holder.wait()
        assert len(dataset.result(timeout=60)) == 3
    assert not run.is_running(experiment)
    with sole_run(experiment):
        assert Path(f"{files[0]}.held").exists()
    assert [*tmp_path.rglob("*.held")] == []
    holder.communicate()


# ---------------------------------------------------------------------------------------- disk and memory


def test_a_full_disk_leaves_the_last_checkpoint_and_ends_in_one_line(straight, tmp_path):
    """The checkpoint is larger than a file may be."""
    experiment, data = straight
    cut = tmp_path / "run"
    shutil.copytree(experiment, cut)
    (cut / "params.json").write_text(json.dumps(TINY | EVERYTHING | {"num_epochs": 4, "schedule": "constant"}))
    before = {name: (cut / name).read_bytes() for name in ("last.pth.tar", "best.pth.tar")}
    process = start(cut, data, limits={resource.RLIMIT_FSIZE: len(before["last.pth.tar"]) // 2})
    _, stderr = process.communicate()
    assert process.returncode == 1 and stderr.count("\n") == 1 and stderr.startswith("train.py: error: ")
    assert "File too large" in stderr or "cannot write" in stderr
    assert str(cut) in stderr
    assert {name: (cut / name).read_bytes() for name in before} == before
    assert not list(cut.glob(".*.tmp"))
    finish(cut, data)
    assert [epoch["epoch"] for epoch in utils.read_history(cut)] == [1, 2, 3, 4]


def test_out_of_memory_is_one_line_that_names_the_keys_and_the_next_try_needs_no_flag(tmp_path):
    experiment = make_experiment(tmp_path / "run", image_size=1500, batch_size=6)
    data = make_data(tmp_path / "data", val=1)
    process = start(experiment, data, "--device", "cpu", limits=little_memory())
    _, stderr = process.communicate()
    assert process.returncode == 2 and stderr.count("\n") == 1
    assert all(word in stderr for word in ("out of memory", '"batch_size"', '"accumulation_steps"', '"precision"'))
    make_experiment(experiment, num_epochs=1)
    run_script("train.py", "--model_dir", experiment, "--data_dir", data)


def test_weights_that_are_not_finite_are_never_saved(data, tmp_path):
    experiment = make_experiment(tmp_path / "run", batch_size=6, learning_rate=1e30, num_epochs=2)
    result = run_script("train.py", "--model_dir", experiment, "--data_dir", data, check=1)
    assert (
        "epoch 1 ended with weights, optimizer or validation loss not finite, at learning rate 1e+30" in result.stderr
    )
    assert "no checkpoint was written yet" in result.stderr and result.stderr.count("\n") == 1
    assert not list(experiment.glob("*.pth.tar"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_single_value_that_is_not_finite_is_seen(value):
    for optimizer, buffer in (("sgd", "momentum_buffer"), ("adamw", "exp_avg_sq")):
        network = as_network(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)))
        training = Training(network, Params(optimizer=optimizer), batches=1)
        assert training.is_finite()
        backward(training, network(torch.rand(2, 3, 5, 5)).sum())
        assert training.is_finite()
        training.optimizer.state[network[0].weight][buffer][1] = value
        assert not training.is_finite()
        training.optimizer.state.clear()
        network[1].running_var[2] = value
        assert not training.is_finite()


def test_a_first_step_that_is_skipped_leaves_momentum_of_zero():
    """As in half precision, whose first scale may be too high; PyTorch would leave the buffer as memory was."""
    for attempt in range(20):
        network = as_network(torch.nn.Conv2d(3, 64 + attempt, 3))
        training = Training(network, Params(precision="fp16"), batches=1)
        backward(training, network(torch.rand(1, 3, 9, 9)).sum() * float("inf"))
        buffers = [state["momentum_buffer"] for state in training.optimizer.state.values()]
        assert len(buffers) == 2 and not any(buffer.any() for buffer in buffers)


def test_momentum_that_a_resume_turns_on_begins_with_zero(tmp_path):
    network = as_network(torch.nn.Conv2d(3, 64, 3))
    before = Training(network, Params(momentum=0, num_epochs=1), batches=1)
    backward(before, network(torch.rand(1, 3, 9, 9)).sum())
    after = Training(network, Params(momentum=0.9, precision="fp16"), batches=1)
    after.load_state_dict(before.state_dict(), tmp_path)
    assert [state["momentum_buffer"].any().item() for state in after.optimizer.state.values()] == [False, False]


def test_an_optimizer_that_has_overflowed_is_never_saved(data, tmp_path):
    """AdamW's mean of squared gradients does, while the loss and the weights are finite."""
    experiment = make_experiment(tmp_path / "run", loss_weights={"bce": 1e30}, optimizer="adamw", num_epochs=1)
    result = run_script("train.py", "--model_dir", experiment, "--data_dir", data, check=1)
    assert "epoch 1 ended with weights, optimizer or validation loss not finite" in result.stderr
    assert not list(experiment.glob("*.pth.tar"))


# ---------------------------------------------------------------------------------------- resuming


def test_an_early_stopped_run_has_nothing_to_do_and_a_longer_one_continues(tmp_path, data):
    """At a learning rate of almost 0 only the batch norm's statistics move, and they settle."""
    experiment = make_experiment(tmp_path / "run", learning_rate=1e-30, early_stopping_patience=2, num_epochs=40)
    arguments = ("train.py", "--model_dir", experiment, "--data_dir", data)
    stopped = run_script(*arguments).stdout
    scores = [epoch["val"]["mIoU"] for epoch in utils.read_history(experiment)]
    trained = len(scores)
    assert trained == scores.index(max(scores)) + 3 < 40
    line = f"stopped early after epoch {trained}: no better mIoU in 2 epochs; best mIoU"
    best = {name: (experiment / name).read_bytes() for name in ("metrics_val_best_weights.json", "history.jsonl")}
    for name in best:  # the checkpoint knows better
        (experiment / name).write_text("junk")
    assert line in stopped and line in run_script(*arguments, "--resume").stdout
    assert {name: (experiment / name).read_bytes() for name in best} == best

    make_experiment(experiment, learning_rate=1e-30, num_epochs=trained + 1)
    (data / "train.txt").write_text("".join(f"train{number}\n" for number in range(5)))
    result = run_script(*arguments, "--restore_file", "last")
    assert "changed since: num_epochs, early_stopping_patience, the list of training images" in result.stdout
    assert len(utils.read_history(experiment)) == trained + 1
    run = json.loads((experiment / "run.json").read_text())
    assert run["params"]["num_epochs"] == 40
    assert [each["params"]["num_epochs"] for each in run["resumed"]] == [trained + 1]  # the other trained nothing


def test_a_checkpoint_that_cannot_be_resumed_is_one_line(straight, tmp_path):
    experiment, _ = straight
    params = Params.load(experiment / "params.json")
    training = Training(FCN_GCN(**params.network_options(), pretrained=False), params, batches=2)
    file = experiment / "last.pth.tar"
    sound = checkpoints.load_checkpoint(file)
    name = next(iter(sound["state_dict"]))
    nan = sound["state_dict"] | {name: sound["state_dict"][name] * float("nan")}
    no_history = {key: value for key, value in sound.items() if key != "history"}
    faults = [no_history, checkpoints.to_predict_with(sound), sound | {"rng": None}, sound | {"state_dict": nan}]
    for fault in [*faults, sound | {"optim_dict": {}}, sound | {"state_dict": {"x": torch.ones(1)}}]:
        with pytest.raises(UserError, match=r"last\.pth\.tar"):
            training.load_state_dict(fault, file)
    training.load_state_dict(sound, file)


# ---------------------------------------------------------------------------------------- any bytes

fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
json_text = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from([*Params.__dataclass_fields__, "typo"])


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """content cut short, or with a few bytes replaced."""
    places = st.integers(0, len(content) - 1)
    replaced = st.dictionaries(places, st.integers(0, 255), min_size=1, max_size=8)
    return places.map(lambda end: content[:end]) | replaced.map(
        lambda changes: bytes(changes.get(index, byte) for index, byte in enumerate(content))
    )


def only_user_errors(function, *arguments, **options) -> None:
    """Any other error fails the test; what is said must fit one line."""
    try:
        function(*arguments, **options)
    except UserError as error:
        assert str(error) and "\n" not in str(error)


@fuzz
@given(st.binary(max_size=60) | st.dictionaries(keys, json_text, max_size=4).map(lambda d: json.dumps(d).encode()))
@example(b"[" * 100_000)
@example(b'{"seed": ' + b"9" * 5000 + b"}")
def test_any_params_json(tmp_path, content):
    (tmp_path / "params.json").write_bytes(content)
    only_user_errors(Params.load, tmp_path / "params.json")


@fuzz
@given(st.binary(max_size=40) | st.text(max_size=20).map(lambda text: text.encode(errors="surrogatepass")))
@example(b"../../etc/passwd")
@example(b"a" * 5000)
@example(b"train0\x00")
def test_any_list(data, content):
    (data / "train.txt").write_bytes(content)
    try:
        find_split("voc", data, "train")
    except UserError as error:  # a line for each fault
        assert str(error)


@fuzz
@given(st.data())
def test_any_photo_and_any_mask(tmp_path, data):
    photo, mask = tmp_path / "a.jpg", tmp_path / "a.png"
    photo.write_bytes(data.draw(st.just(PHOTO) | mutated(PHOTO)))
    mask.write_bytes(data.draw(mutated(MASK) | st.binary(max_size=30)))
    only_user_errors(Split("a", ["a"], [photo], [mask]).read, 0, 21)


MODES = ("RGB", "RGBA", "CMYK", "LAB", "L", "P", "1", "I;16", "F")


def _stored() -> dict[str, bytes]:
    """One small picture in every format, and of every mode, that Pillow can write and read."""
    Image.init()
    stored = {}
    for name, mode in product(sorted(Image.SAVE.keys() & Image.OPEN.keys()), MODES):
        for compression in (None, "tiff_lzw", "jpeg") if name == "TIFF" else (None,):  # with them libtiff decodes
            stream = io.BytesIO()
            with suppress(OSError, ValueError, KeyError, TypeError):  # a format that has no such mode
                Image.effect_noise((24, 16), 99).convert(mode).save(stream, name, compression=compression)
                stored[f"{name} {mode} {compression}"] = stream.getvalue()
    return {name: content for name, content in stored.items() if len(content) < 4000}  # ICNS can be large


kinds_of_edit = st.sampled_from(("replace", "insert", "delete", "cut"))
edits = st.lists(st.tuples(kinds_of_edit, st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4)


def edited(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """content with bytes replaced, put in or taken out, or cut short, at places given as shares of its length."""
    for kind, share, other in edits:
        at = int(share * len(content))
        rest = {"replace": at + len(other), "insert": at, "delete": at + len(other), "cut": len(content)}[kind]
        content = content[:at] + (other if kind in ("replace", "insert") else b"") + content[rest:]
    return content


@pytest.mark.filterwarnings("ignore:::PIL")  # as in cli.run_main
@pytest.mark.parametrize("kind", ["photo", "mask"])
def test_any_image_of_any_format(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**16)  # a damaged header may call for any amount of memory
    stored = _stored()
    assert len({name.split()[0] for name in stored}) >= 20
    sound, path = colour_mask(np.zeros((16, 24), np.uint8)), tmp_path / f"a.{'jpg' if kind == 'photo' else 'png'}"
    ways = {
        "photo": lambda: to_square(read_photo(path), sound, 32, "squash"),
        "mask": lambda: read_mask(path, Image.new("RGB", (24, 16)), 255),
    }

    @settings(deadline=None)
    @given(st.sampled_from(sorted(stored)), edits)
    def check(name, edits):
        path.write_bytes(edited(stored[name], edits))
        only_user_errors(ways[kind])

    check()


@fuzz
@given(st.data())
def test_any_checkpoint(tmp_path, data):
    (tmp_path / "last.pth.tar").write_bytes(data.draw(mutated(CHECKPOINT) | st.binary(max_size=30)))
    only_user_errors(checkpoints.load_checkpoint, tmp_path / "last.pth.tar")


def _bytes(save) -> bytes:
    stream = io.BytesIO()
    save(stream)
    return stream.getvalue()


_photo, _mask = draw_scene(np.random.default_rng(0))
PHOTO = _bytes(lambda stream: _photo.resize((40, 30)).save(stream, format="JPEG"))
MASK = _bytes(
    lambda stream: colour_mask(np.array(_mask.resize((40, 30), Image.Resampling.NEAREST))).save(stream, format="PNG")
)
CHECKPOINT = _bytes(lambda stream: torch.save({"epoch": 1, "state_dict": {"conv.weight": torch.ones(2, 2)}}, stream))
