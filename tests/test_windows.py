"""What Windows has not, hidden from the project's own code: no machine with Windows is needed, and none was at hand."""

from multiprocessing.reduction import ForkingPickler

from conftest import make_experiment, run_script

from engine.evaluation import make_dataset
from model.data_loader import make_loader
from model.layouts import class_names, find_split
from model.net import FCN_GCN
from params import Params

ABSENT = {  # in these modules, by regular expressions
    "os": "sched_|posix_|fork|get(e?[ug]id|pg|ppid|sid|login|load)|set(e?[ug]id|pg|sid)|killpg|.*chown|fchmod|.*statvfs"
    "|mkfifo|mknod|sendfile|wait|W[A-Z]|nice|sysconf|uname|pread|pwrite|sync$|O_(DIR|NO[BCF]|CLOEXEC|SYNC|DSYNC|TMPFILE)",
    "signal": "SIG(?!INT|TERM|ABRT|FPE|ILL|SEGV|_DFL|_IGN)[A-Z]|alarm|pause|.etitimer|pthread|sig(?!nal$)[a-z]",
    "select": "e?poll",
    "time": "tzset",
    "socket": "AF_UNIX",
}
MODULES = "fcntl|resource|pwd|grp|termios|tty|pty|posix|syslog|readline|_posix.*"

HIDE = f"""
import builtins, io, os, pathlib, re, runpy, sys, types
import numpy

ROOT, ABSENT, MODULES, NATIVE = os.getcwd(), {ABSENT!r}, {MODULES!r}, builtins.__import__

def refused_if_open(*paths):
    held = {{os.path.realpath(f"/proc/self/fd/{{number}}") for number in os.listdir("/proc/self/fd")}}
    held |= {{line.split(maxsplit=5)[-1].rstrip() for line in open("/proc/self/maps")}}
    if found := held & {{os.path.realpath(path) for path in paths}}:
        raise PermissionError(13, "open, so that Windows does not replace or delete it", *found)

def guarded(function):
    def call(*paths, **options):
        refused_if_open(*paths)
        return function(*paths, **options)
    return call

def open_file(path, *rest, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "a folder", str(path))
    return os.open(path, *rest, **options)

def copy(module, **changed):
    copy, absent = types.ModuleType(module), ABSENT.get(module, "$")
    here = {{key: value for key, value in vars(NATIVE(module)).items() if not re.match(absent, key)}}
    vars(copy).update(here | changed)
    return copy

changed = {{name: guarded(getattr(os, name)) for name in ("replace", "rename", "remove", "unlink")}}
COPIES = {{name: copy(name) for name in ABSENT}}
COPIES |= {{"os": copy("os", name="nt", open=open_file, **changed), "sys": copy("sys", platform="win32")}}
for name in ("unlink", "rename", "replace"):
    setattr(pathlib.Path, name, guarded(getattr(pathlib.Path, name)))

def hidden_import(name, globals=None, *rest, **options):
    if str((globals or {{}}).get("__file__")).startswith(ROOT):
        if re.fullmatch(MODULES, name):
            raise ModuleNotFoundError(f"No module named {{name!r}}")
        if name in COPIES:
            return COPIES[name]
    return NATIVE(name, globals, *rest, **options)

def text_encoding(encoding, level=2):
    assert encoding or not sys._getframe(level).f_code.co_filename.startswith(ROOT), "Windows has another encoding"
    return encoding or "locale"

io.text_encoding = text_encoding
builtins.__import__ = hidden_import
for name, module in [*sys.modules.items()]:
    if str(getattr(module, "__file__", "")).startswith(ROOT) and "tests" not in module.__file__:
        del sys.modules[name]

for command in sys.argv[1:]:
    if command.startswith("touch|"):  # while another run has the cache open
        folder = pathlib.Path(command.removeprefix("touch|"))
        held = [numpy.load(file, mmap_mode="r") for file in folder.glob(".cache/val-*.npy")]
        (folder / "JPEGImages" / "val0.jpg").touch()
        continue
    sys.argv = [os.path.join(ROOT, command.split("|")[0]), *command.split("|")[1:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, command
"""


def test_all_that_one_does_with_a_run_works_where_only_windows_has_is_there(tmp_path, data):
    experiment = make_experiment(tmp_path / "run", num_workers=1)
    (script := tmp_path / "hide.py").write_text(HIDE)
    run = ["--model_dir", experiment, "--data_dir", data]
    photo = data / "JPEGImages" / "val0.jpg"
    commands = [
        ["train.py", *run],
        ["train.py", *run, "--resume", "--set", "num_epochs=3"],
        ["touch", data],
        ["evaluate.py", *run],
        ["evaluate.py", *run, "--save_predictions", tmp_path / "masks"],
        ["predict.py", photo, "--model_dir", experiment, "--output_dir", tmp_path / "predictions"],
    ]
    result = run_script(script, *("|".join(map(str, command)) for command in commands))
    assert "continuing after epoch 2" in result.stdout and "trained 3 of 3 epochs" in result.stdout
    assert (tmp_path / "predictions" / "val0.json").exists() and len([*data.glob(".cache/val-*.npy")]) == 2


def test_what_a_loader_process_needs_can_be_sent_to_a_new_python(data):
    params = Params(image_size=32)
    split = find_split("voc", data, "val")
    dataset = make_dataset(split, class_names(split, 21), params, FCN_GCN(encoder="resnet18", pretrained=False))
    loader = make_loader(dataset, batch_size=2)
    sent = ForkingPickler.loads(ForkingPickler.dumps((dataset, loader.collate_fn, loader.worker_init_fn)))
    assert len(sent[0]) == 3 and sent[0][0][0].shape == (3, 32, 32)
