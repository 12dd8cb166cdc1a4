import argparse
import ast
import inspect
import json
import os
import pickle
import re
import subprocess
import tomllib
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_data, make_experiment, rename_classes, run_script
from torchvision.models import resnet50

import utils
from engine import checkpoints, devices, run
from model import UserError
from model.layouts import find_split
from model.net import FCN_GCN
from model.voc import CLASS_NAMES
from params import Params, table


def load(folder, text: str) -> Params:
    (folder / "params.json").write_text(text)
    return Params.load(folder / "params.json")


def test_base_model_holds_the_seven_keys_of_old_experiments():
    params = json.loads((ROOT / "experiments" / "base_model" / "params.json").read_text())
    assert params == {
        "learning_rate": 0.001,
        "batch_size": 5,
        "num_epochs": 35,
        "dropout_rate": 0.0,
        "num_channels": 32,
        "save_summary_steps": 100,
        "num_workers": 4,
    }
    assert asdict(Params(**params)) == asdict(Params()) | {"num_channels": 32}


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*/params.json")), ids=lambda p: p.parent.name)
def test_every_experiment_of_the_repository_is_valid(path):
    Params.load(path)


@pytest.mark.parametrize("key", [field.name for field in fields(Params)])
def test_every_default_is_allowed_and_every_key_refuses_nonsense(key):
    assert Params.fault(key, getattr(Params(), key)) is None
    for nonsense in (
        "",
        [],
        {},
        -1,
        float("nan"),
        float("inf"),
        True if type(getattr(Params(), key)) is not bool else 1,
    ):
        assert Params.fault(key, nonsense), nonsense


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"learning_rat": 0.1}', ['unknown key "learning_rat"', 'did you mean "learning_rate"?']),
        ('{"zzz": 0.1}', ['unknown key "zzz"', "known keys: learning_rate, batch_size"]),
        ('{"batch_size": 0}', ['"batch_size" is 0', "an integer of at least 1"]),
        ('{"batch_size": 2.0}', ['"batch_size" is 2.0', "an integer"]),
        ('{"learning_rate": "0.1"}', ['"learning_rate" is "0.1"', "a number above 0"]),
        ('{"learning_rate": NaN}', ['"learning_rate" is NaN', "a number above 0"]),
        ('{"learning_rate": 1e999}', ['"learning_rate" is Infinity']),
        ('{"learning_rate": 1' + 400 * "0" + "}", ['"learning_rate" is 1000']),
        ('{"optimizer": "nonesuch"}', ['"optimizer" is "nonesuch"', '"sgd", "adamw"']),
        ('{"kernel_size": 8}', ['"kernel_size" is 8', "odd"]),
        ('{"kernel_size": 257}', ['"kernel_size" is 257', "from 3 to 255"]),
        ('{"image_size": 100000}', ['"image_size" is 100000', "at most 16384"]),
        ('{"num_epochs": 1' + 400 * "0" + "}", ['"num_epochs" is 1000', "an integer of at least 1"]),
        ('{"train_split": "../a"}', ['"train_split" is', "the name of a list"]),
        ('{"loss_weights": {"dise": 1}}', ['"loss_weights" is {"dise": 1}', "bce, dice, inverse_dice, cross_entropy"]),
        ('{"loss_weights": {"dice": 0}}', ["not all of them 0"]),
        ('{"warmup_epochs": 35}', ['"warmup_epochs" is 35', 'fewer than "num_epochs", 35']),
        ('{"focal_gamma": 101}', ['"focal_gamma" is 101', "a number from 0 to 100"]),
        ('{"best_metric": "boundary_mIoU"}', ['"mIoU", "pixel_accuracy"', '"mean_dice", "loss"']),
        ('{"seed": 1, "seed": 2}', ["seed given twice"]),
        ('{"batch_size": 0, "cache": 1}', ['"batch_size" is 0', '"cache" is 1']),
        ("\ufeff[]", ["must hold one JSON object"]),
        ("", ["not valid JSON"]),
        ("{", ["not valid JSON"]),
        ("[" * 100_000, ["not valid JSON"]),
    ],
)
def test_a_fault_in_params_json_names_file_key_value_and_what_is_allowed(tmp_path, text, said):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "params.json") in str(caught.value)
    assert [words for words in said if words not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", '"learning_rate"'),
        ("WD", '"weight_decay"'),
        ("bs", '"batch_size"'),
        ("epochs", '"num_epochs" or "warmup_epochs"'),
        ("grad_clip", '"clip_grad_norm"'),
        ("kernal_size", '"kernel_size"'),
    ],
)
def test_an_unknown_key_names_the_known_ones_that_are_meant(key, meant):
    assert Params.fault(key, 1) == f'unknown key "{key}"; did you mean {meant}?'


@pytest.mark.parametrize("value", [[320, 240], "320x240"])
def test_photos_that_are_no_squares_are_told_of_letterbox(value):
    assert '"resize": "letterbox"' in Params.fault("image_size", value)
    assert "letterbox" not in Params.fault("image_size", 8)


def test_a_number_is_one_value_however_json_writes_it():
    whole = {"weight_decay": 0, "clip_grad_norm": 1, "loss_weights": {"bce": 1}, "batch_size": 4, "ema_decay": None}
    written = asdict(Params.parse(whole, ""))
    assert json.dumps(written) == json.dumps(
        asdict(Params.parse(whole | {"weight_decay": 0.0, "clip_grad_norm": 1.0, "loss_weights": {"bce": 1.0}}, ""))
    )
    assert (type(written["batch_size"]), type(written["weight_decay"]), written["ema_decay"]) == (int, float, None)


def test_null_is_allowed_only_where_it_is_the_default(tmp_path):
    nullable = {field.name for field in fields(Params) if Params.fault(field.name, None) is None}
    assert nullable == {"num_channels", "clip_grad_norm", "ema_decay", "early_stopping_patience"}


def unread(keys) -> set[str]:
    """The keys of params.json that nothing reads as an attribute of params, or as an option of network or loss."""
    read = {*Params().network_options(), *Params().loss_options(), "loss_weights"}
    for file in chain(ROOT.glob("*.py"), *(ROOT.glob(f"{room}/*.py") for room in ("engine", "model", "sweep"))):
        for node in ast.walk(ast.parse(file.read_text())) if file.name != "params.py" else ():
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] == "params":
                read.add(node.attr)
    return {*keys} - read


def test_a_key_that_nothing_reads_is_found():
    names = [field.name for field in fields(Params)]
    assert unread(names) == set() and unread([*names, "momentun"]) == {"momentun"}


def test_rules_over_several_keys_depend_on_the_number_of_processes():
    params = Params(batch_size=3, cutmix=0.5, compile=True, activation_checkpointing=True)
    assert params.broken_rules() == []
    said = "; ".join(params.broken_rules(2))
    assert [word in said for word in ("cannot be divided", "are for one process", "which has only one")] == [True] * 3


def test_two_params_do_not_share_their_loss_weights():
    assert Params().loss_weights is not Params().loss_weights


def test_a_length_of_time_reads_well():
    assert [run.duration(seconds) for seconds in (0.4, 59, 1380, 5000, 9000)] == [
        "0 s",
        "59 s",
        "23 min",
        "83 min",
        "2.5 h",
    ]


def test_a_file_is_replaced_whole_or_left_alone(tmp_path):
    path = tmp_path / "file"
    utils.write_text(path, "first")
    with pytest.raises(RuntimeError), utils.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_may_have_the_longest_name_there_is(tmp_path):
    for name in ("x" * 255, "ü" * 127):
        utils.write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_a_folder_may_have_any_name_whatever_the_encoding_of_the_terminal(tmp_path, encoding):
    folder = tmp_path / os.fsdecode(b"\xff\xe6\x95\xb0")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.stdout.reconfigure(encoding={encoding!r})"
    code += "; import build_dataset as b; b.run_main(lambda: b.main(b.parse_args()))"
    (script := tmp_path / "script.py").write_text(code)
    result = run_script(script, "--sample", "--data_dir", folder)
    assert "the sample is in" in result.stdout and (folder / "sample").is_dir()


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(ValueError):
        utils.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_precision_auto_is_resolved_and_what_is_given_stays():
    device = torch.device("cpu")
    assert devices.resolve_precision(Params(), device).precision in ("bf16", "fp32")
    assert devices.resolve_precision(Params(precision="fp16"), device).precision == "fp16"


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXPLOIT"],)


def test_a_checkpoint_that_carries_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPLOIT", str(tmp_path / "ran"))
    torch.save({"state_dict": Exploit()}, tmp_path / "new.pth.tar")
    (tmp_path / "old.pth.tar").write_bytes(pickle.dumps({"state_dict": Exploit()}, protocol=2))
    for name in ("new", "old"):
        with pytest.raises(UserError, match=rf"{name}\.pth\.tar is refused"):
            checkpoints.load_checkpoint(tmp_path / f"{name}.pth.tar")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 5000, -1])
def test_a_truncated_checkpoint_is_named(tmp_path, kept):
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": {"weight": torch.randn(5000)}}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"last\.pth\.tar is (damaged|refused)"):
        checkpoints.load_checkpoint(path)


def test_an_absent_checkpoint_lists_those_there_are(tmp_path):
    checkpoints.save_checkpoint({"state_dict": {}}, tmp_path / "last.pth.tar")
    with pytest.raises(UserError, match=r"no checkpoint .*best\.pth\.tar; in this folder: last\.pth\.tar"):
        checkpoints.load_checkpoint(tmp_path / "best.pth.tar")


def test_weights_under_the_names_of_a_wrapper_are_read_as_the_networks(tmp_path):
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module."):
        torch.save({"state_dict": {f"{prefix}{name}": torch.ones(1) for name in "ab"}}, tmp_path / "x.pth.tar")
        assert [*checkpoints.load_checkpoint(tmp_path / "x.pth.tar")["state_dict"]] == ["a", "b"]
    torch.save({"state_dict": {"module.a": torch.ones(1), "b": torch.ones(1)}}, tmp_path / "x.pth.tar")
    assert [*checkpoints.load_checkpoint(tmp_path / "x.pth.tar")["state_dict"]] == ["module.a", "b"]


def test_a_digest_is_of_names_values_and_types_and_not_of_how_they_lie_in_memory():
    weights = {"a": torch.arange(16.0).view(1, 4, 2, 2), "count": torch.tensor(3)}
    digest = checkpoints.weights_digest(weights)
    assert len(digest) == 16 and int(digest, 16)
    tensor = weights["a"]
    assert checkpoints.weights_digest(weights | {"a": tensor.to(memory_format=torch.channels_last)}) == digest
    for other in (tensor + torch.eye(2), tensor.half(), tensor.bfloat16(), tensor.view(4, 4), tensor[:, :0]):
        assert checkpoints.weights_digest(weights | {"a": other}) != digest


def test_git_takes_what_is_written_by_hand_below_experiments_and_no_results():
    paths = [
        "params.json",
        "a/params.json",
        "a/b/c/search_space.json",
        "a/results.md",
        "a/b/last.pth.tar",
        "results.md",
    ]
    command = ["git", "-C", ROOT, "check-ignore", "--no-index", *(f"experiments/{path}" for path in paths)]
    ignored = subprocess.run(command, capture_output=True, text=True)
    if ignored.returncode > 1:
        pytest.skip("no git repository")
    assert ignored.stdout.split() == [f"experiments/{path}" for path in paths[3:]]


def test_other_torch_files_are_not_taken_for_checkpoints(tmp_path):
    tensor = torch.zeros(2)
    for content in (tensor, {"weights": tensor}, {"state_dict": tensor}):
        torch.save(content, tmp_path / "x.pth.tar")
        with pytest.raises(UserError, match="is not a checkpoint of this network"):
            checkpoints.load_checkpoint(tmp_path / "x.pth.tar")


def test_the_page_on_params_json_is_what_params_py_says():
    assert table() in (ROOT / "docs" / "PARAMS.md").read_text()


def test_links_of_the_pages_lead_somewhere():
    for page in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "data" / "README.md",
        ROOT / "benchmarks" / "RESULTS.md",
    ):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_licence_and_version_are_the_same_wherever_they_stand():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert {f"version: {project['version']}", f"license: {project['license']}"} <= set(citation)
    assert (ROOT / "LICENSE").read_text().startswith(f"{project['license']} License\n")


def test_importing_every_module_builds_no_network_and_touches_no_file(tmp_path):
    """A network at import would be shared by all; 25 M parameters show in the memory of the process."""
    (folder := tmp_path / "empty").mkdir()
    code = """
import gc, os, sys, torch
from pathlib import Path
def large():
    return [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.numel() > 1e4]
root, folder = map(Path, sys.argv[1:])
for name, module in list(sys.modules.items()):
    if root in Path(getattr(module, "__file__", None) or "/").parents and "tests" not in module.__file__:
        del sys.modules[name]
assert "model.net" not in sys.modules
os.chdir(folder)
gc.unfreeze()
before = len(large())
import train, evaluate, build_dataset, visualize, model.sample
assert Path(sys.modules["model.net"].__file__) == root / "model" / "net.py" and len(large()) == before
"""
    (tmp_path / "script.py").write_text(code)
    result = run_script(tmp_path / "script.py", ROOT, folder)
    assert (result.stdout, result.stderr, os.listdir(folder)) == ("", "", [])


@pytest.mark.slow
def test_pretrained_weights_come_from_torch_home_and_only_for_a_new_encoder(data, tmp_path):
    """Without file and network: one line that names the file and the way out. With the file: the encoder is it."""
    offline = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    options = {"encoder": "resnet50", "pretrained": True, "learning_rate": 1e-12, "batch_size": 6, "num_epochs": 1}
    experiment = make_experiment(tmp_path / "run", **options)
    args = ("--model_dir", experiment, "--data_dir", data)

    failed = run_script("train.py", *args, check=2, **offline)
    weights_file = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    assert failed.stderr.splitlines()[-1].startswith("train.py: error: no ImageNet weights")
    assert str(weights_file) in failed.stderr
    assert "false there to train from scratch" in failed.stderr
    assert {*os.listdir(experiment)} == {"params.json", ".lock"}

    torch.manual_seed(1)
    encoder = resnet50(weights=None)
    weights_file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(encoder.state_dict(), weights_file)
    run_script("train.py", *args, **offline)
    trained = checkpoints.load_checkpoint(experiment / "last.pth.tar")["state_dict"]
    torch.testing.assert_close(trained["layer4.2.conv3.weight"], encoder.layer4[2].conv3.weight.detach())

    weights_file.unlink()  # from here on nothing may ask for it
    run_script("evaluate.py", *args, **offline)
    make_experiment(experiment, **options | {"num_epochs": 2})
    run_script("train.py", *args, "--restore_file", "last", **offline)


def test_the_averaged_weights_are_the_ones_to_predict_with():
    assert checkpoints.predicting_weights({"state_dict": "raw", "ema_state_dict": "averaged"}) == "averaged"
    assert checkpoints.predicting_weights({"state_dict": "raw", "ema_state_dict": None}) == "raw"
    assert checkpoints.predicting_weights({"state_dict": "raw"}) == "raw"


def test_network_options_are_all_keywords_of_the_network():
    keywords = inspect.signature(FCN_GCN).parameters.keys() - {"pretrained"}
    assert Params().network_options().keys() == keywords


# ---------------------------------------------------------------------------------------- the data of a trained run


def run_on_photo(script: str, experiment, *flags, check: int = 0, photo=None):
    """A script that looks at a trained run."""
    more = [photo, "--output_dir", experiment / "predictions"] if script == "predict.py" else []
    return run_script(script, *more, "--model_dir", experiment, *flags, check=check)


SCRIPTS = ["evaluate.py", "export.py", "predict.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_that_differ_from_those_of_the_checkpoint_are_refused(script, experiment, trained, tmp_path):
    _, data = trained
    folder = rename_classes(experiment, data, tmp_path / "data", [*CLASS_NAMES[:20], "screen"])
    (folder / "classes.txt").write_text("\n".join([*CLASS_NAMES[:3], "bicyclist", *CLASS_NAMES[4:20], "tv"]))
    before = {path: path.stat().st_mtime_ns for path in experiment.iterdir()}
    photo = data / "JPEGImages" / "val0.jpg"
    stderr = run_on_photo(script, experiment, "--data_dir", folder, check=2, photo=photo).stderr
    assert stderr == (
        f'{script}: error: class 3 is "bird" in {experiment / "best.pth.tar"}, "bicyclist" in '
        f"{folder / 'classes.txt'}; give the data that the run was trained on with --data_dir, or correct the names "
        "there\n"
    )
    assert {path: path.stat().st_mtime_ns for path in experiment.iterdir()} == before


def test_the_names_are_those_that_are_known(tmp_path):
    plain, named = make_data(tmp_path / "plain", train=1, val=1), make_data(tmp_path / "named", train=1, val=1)
    streets, numbers = ["road", "sky", "car"], ["0", "1", "2"]
    (named / "classes.txt").write_text("\n".join(streets))

    def names(trained: list[str] | None, root, num_classes: int = 3) -> list[str]:
        checkpoint = {} if trained is None else {"class_names": trained}
        split = root and find_split("voc", root, "val")
        return checkpoints.agreed_class_names(checkpoint, tmp_path / "best.pth.tar", split, num_classes)

    assert names(None, named) == names(numbers, named) == names(streets, named) == streets
    assert names(streets, plain) == names(streets, None) == streets, "plain has no names for three classes"
    assert names(None, plain) == names(None, None) == numbers
    assert names(None, plain, 21) == names(None, None, 21) == list(CLASS_NAMES)
    with pytest.raises(UserError, match=r'class 1 is "snow" in .*best\.pth\.tar, "sky" in .*named/classes\.txt; give'):
        names(["road", "snow", "car"], named)
    with pytest.raises(UserError, match=r'class 0 is "x0" in .*, "background" in .*plain, which has no classes\.txt; '):
        names([f"x{index}" for index in range(21)], plain, 21)


def trained_on(experiment, *folders) -> None:
    """Let run.json say that a run was started and resumed with these data folders."""
    first, *resumed = ({} if folder is None else {"data_dir": str(folder)} for folder in folders)
    utils.write_json(experiment / "run.json", first | {"resumed": resumed})


@pytest.mark.parametrize("script", ["evaluate.py", "export.py"])
def test_the_data_are_those_of_the_run(script, experiment, tmp_path):
    if script == "export.py":
        pytest.importorskip("onnxruntime")
    empty = tmp_path / "empty"
    empty.mkdir()
    trained_on(experiment, "nowhere", empty)
    assert f"error: {empty} holds no data set" in run_on_photo(script, experiment, check=2).stderr
    trained_on(experiment, empty, tmp_path / "gone")
    if script == "export.py":
        return  # which then takes the built-in sample, see test_export.py
    stderr = run_on_photo(script, experiment, check=2).stderr
    assert stderr == (
        f"{script}: error: {experiment} was trained on {tmp_path / 'gone'}, which is not there; give --data_dir\n"
    )


def test_evaluation_says_which_data_it_has_taken(experiment, trained, tmp_path):
    _, data = trained
    trained_on(experiment, data)
    assert f"3 images of val of {data} at" in run_on_photo("evaluate.py", experiment).stdout
    other = tmp_path / "other"
    other.symlink_to(data)
    assert f"3 images of val of {other} at" in run_on_photo("evaluate.py", experiment, "--data_dir", other).stdout


def test_another_number_of_names_than_the_checkpoints_is_refused_by_the_first_that_is_missing(tmp_path):
    data = make_data(tmp_path / "data", train=1, val=1)
    for names, said in (
        (["road"], 'class 1 is "sky" in {}, missing in'),
        (["road", "sky", "car"], "class 2 is missing"),
    ):
        (data / "classes.txt").write_text("\n".join(names))
        with pytest.raises(UserError, match=said.format(".*best.pth.tar")):
            split = find_split("voc", data, "val")
            checkpoints.agreed_class_names({"class_names": ["road", "sky"]}, tmp_path / "best.pth.tar", split, 2)


def test_the_sample_is_drawn_anew_where_the_folder_of_the_run_is_gone(tmp_path):
    utils.write_json(tmp_path / "run.json", {"data_dir": str(tmp_path / "gone")})
    args = argparse.Namespace(model_dir=tmp_path, data_dir=None)
    assert run.find_data_dir(args, "sample") == Path("data")
    with pytest.raises(UserError, match="gone, which is not there; give --data_dir"):
        run.find_data_dir(args, "voc")


def test_the_data_of_an_older_run_are_in_data(tmp_path):
    args = argparse.Namespace(model_dir=tmp_path, data_dir=None)
    for content in ({}, {"data_dir": None}, {"resumed": [{"argv": []}]}):
        utils.write_json(tmp_path / "run.json", content)
        assert run.find_data_dir(args, "voc") == Path("data")


def test_a_walk_comes_to_each_real_folder_once_and_by_its_own_name(tmp_path):
    for name in ("a/deep", "z", "outside/inner", "tree"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a", "z"):
        (tmp_path / name).rename(tmp_path / "tree" / name)
    tree = tmp_path / "tree"
    for link, target in {"a/deep/up": tree, "a/to_z": tree / "z", "b": tmp_path / "outside", "loop": "loop"}.items():
        (tree / link).symlink_to(target)
    found = [str(folder.relative_to(tree)) for folder, _, _ in utils.walk(tree)]
    assert found == [".", "a", "a/deep", "z", "b", "b/inner"]
