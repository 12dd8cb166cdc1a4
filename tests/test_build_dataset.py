"""build_dataset.py: archives, downloads, lists for own photos, the drawn sample."""

import gzip
import hashlib
import io
import random
import re
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import SBDataset

import build_dataset
from build_dataset import COPIES, SBD_ARCHIVE, VOC, deal, download, write_lists
from model import UserError
from model.layouts import find_split
from model.sample import draw_sample
from model.voc import CLASS_NAMES, VOID
from utils import RunFailed, grouped

ARCHIVE = VOC["filename"]
DEVKIT = "VOCdevkit/VOC2012"
LISTS = "ImageSets/Segmentation"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def invented(kind: str, id_: str) -> bytes:
    """Unpacking does not decode, so no test needs a real photo; 3000 bytes span several blocks of a tar."""
    return f"{kind} {id_} ".encode().ljust(3000, b".")


def official(train: list[str], val: list[str]) -> dict[str, bytes]:
    """The members of an archive in the official layout and order, with one photo that no list names."""
    lists = {"train": train, "trainval": train + val, "val": val}
    members = {f"{DEVKIT}/Annotations/{id_}.xml": b"<annotation/>" for id_ in train + val}
    members |= {f"{DEVKIT}/{LISTS}/{name}.txt": "\n".join([*ids, ""]).encode() for name, ids in lists.items()}
    members |= {f"{DEVKIT}/JPEGImages/{id_}.jpg": invented("JPEGImages", id_) for id_ in train + val}
    members |= {f"{DEVKIT}/JPEGImages/unlisted.jpg": invented("JPEGImages", "unlisted")}
    members |= {f"{DEVKIT}/SegmentationClass/{id_}.png": invented("SegmentationClass", id_) for id_ in train + val}
    return members


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def archive(tmp_path: Path, monkeypatch) -> Path:
    """VOC2012's archive, as this test has it."""
    path = pack(tmp_path / ARCHIVE, official(["a", "b"], ["c"]))
    monkeypatch.setitem(VOC, "md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def build(*args) -> None:
    """Call the script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["build_dataset.py", *map(str, args)])
        build_dataset.main(build_dataset.parse_args())


def refusal(*args) -> str:
    """What a refused call says: one line."""
    with pytest.raises(UserError) as error:
        build(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------- archives


def test_archive_gives_the_listed_files_byte_for_byte_and_nothing_else(tmp_path, archive, capsys):
    data = tmp_path / "data"
    build("--archive", archive, "--data_dir", data)
    assert contents(data) == {
        name.removeprefix(f"{DEVKIT}/").removeprefix(f"{LISTS}/"): content
        for name, content in official(["a", "b"], ["c"]).items()
        if "Annotations" not in name and "unlisted" not in name
    }
    assert find_split("voc", data, "train").ids == ["a", "b"] and find_split("voc", data, "trainval").masks is not None
    archive.unlink()
    build("--data_dir", data)  # downloads nothing
    assert capsys.readouterr().out.count("3 photos with masks") == 2


def test_an_interrupted_unpacking_is_finished_by_the_next(tmp_path, archive, monkeypatch):
    data, write = tmp_path / "data", build_dataset._write_whole

    def interrupted(path, content):
        write(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(build_dataset, "_write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build("--archive", archive, "--data_dir", data)
    assert contents(data).keys() == {"JPEGImages/a.jpg"}
    monkeypatch.setattr(build_dataset, "_write_whole", write)
    build("--archive", archive, "--data_dir", data)
    assert len(contents(data)) == 2 * 3 + 3


def test_what_is_not_the_official_archive_is_refused_before_anything_is_written(tmp_path, archive):
    archive.write_bytes(archive.read_bytes()[:-1])
    for path in (archive, tmp_path / "absent.tar"):
        message = refusal("--archive", path, "--data_dir", tmp_path / "data")
        assert f"{path} is absent, damaged, or not the official {ARCHIVE}" in message
    assert not (tmp_path / "data").exists()


def test_another_data_set_is_left_alone(tmp_path, archive):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text("mine\n")
    for flags in ((), ("--archive", archive)):
        assert "another data set" in refusal(*flags, "--data_dir", tmp_path / "data")
    assert contents(tmp_path / "data") == {"train.txt": b"mine\n"}


# ---------------------------------------------------------------------------------------------------- downloads


WHOLE = np.random.default_rng(0).bytes(100_000)
MD5 = hashlib.md5(WHOLE).hexdigest()
SILENCE = 0.3


class Handler(BaseHTTPRequestHandler):
    """Answers in the way that the last part of the path names; keeps paths and Range headers in server.requests."""

    def do_GET(self):
        way, asked = self.path.rpartition("/")[2], self.headers.get("Range", "")
        self.server.requests.append((way, asked))
        if way == "refuses" or (way == "half" and asked):
            return self.reply(403, b"<html>Forbidden</html>", "text/html")
        if way == "page":
            return self.reply(200, b"<html>Sign in</html>", "text/html")
        if way in ("circle", "elsewhere"):
            return self.reply(302, b"", location={"circle": self.path, "elsewhere": self.server.other}[way])
        if way == "silent":
            return self.server.closing.wait(10)
        begin = int(asked[6:-1]) if asked and way != "whole" else 0
        if begin >= len(WHOLE):
            return self.reply(416, b"")
        body = (b"wrong" + WHOLE[5:] if way.startswith("wrong") else WHOLE)[begin:]
        cut = way in ("cuts", "stalls", "chunks", "half", "wrong_chunks")
        self.reply(206 if begin else 200, body, cut=cut, chunked=way.endswith("chunks"))
        if way == "stalls":
            self.server.closing.wait(10)

    def reply(self, status, body, kind="application/x-tar", *, location=None, cut=False, chunked=False):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        size = len(WHOLE) // 2 if self.path == "/half" else self.server.random.randint(1, len(body) + 1)
        self.wfile.write((b"%x\r\n" % len(body) if chunked else b"") + (body[:size] if cut else body))

    def log_message(self, *args):
        pass


@contextmanager
def serving(other: str = "") -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.closing, server.random, server.other = [], threading.Event(), random.Random(1), other
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # this machine is reached without the user's proxy
    with serving() as other, serving(f"{other.address}/good") as server:
        yield server


def fetched(server, file: Path, *ways: str) -> bytes:
    """What a download brings from a server that answers in these ways."""
    urls = [way if ":" in way else f"{server.address}/{way}" for way in ways]
    assert download(urls, file, MD5, "--archive", silence=SILENCE) == file
    return file.read_bytes()


WAYS = ["refuses", "page", "circle", "silent", "wrong", "nonsense", "stalls", "chunks", "wrong_chunks"]


@pytest.mark.parametrize("first", WAYS)
def test_a_download_comes_from_the_first_address_that_has_it_whole(tmp_path, server, first):
    file = tmp_path / "new" / ARCHIVE
    assert fetched(server, file, first, "good", "refuses") == WHOLE and contents(tmp_path / "new").keys() == {ARCHIVE}
    assert "refuses" not in [way for way, _ in server.requests[1:]]
    server.requests.clear()
    assert fetched(server, file, "good") == WHOLE and server.requests == [], "nothing is fetched that is there"


@pytest.mark.parametrize("way", ["cuts", "whole", "elsewhere"])
@pytest.mark.parametrize("before", [0, 60_000, 99_999])
def test_a_download_that_broke_off_goes_on_where_it_was(tmp_path, server, way, before):
    file = tmp_path / ARCHIVE
    file.write_bytes(WHOLE[:before])  # of an earlier start, at whatever address
    assert fetched(server, file, "silent", way) == WHOLE
    asked = [begin for way_, begin in server.requests if way_ == way]
    assert asked[0] == (f"bytes={before}-" if before else "") and (way != "cuts" or asked == sorted(set(asked)))


@pytest.mark.parametrize("before", [b"of another file", b"wrong" + WHOLE[5:], WHOLE + b"more"])
def test_wrong_bytes_of_an_earlier_start_are_fetched_anew(tmp_path, server, before):
    (tmp_path / ARCHIVE).write_bytes(before)
    assert fetched(server, tmp_path / ARCHIVE, "good") == WHOLE


def test_a_failed_download_names_every_address_and_what_it_answered(tmp_path, server):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    said = {
        "refuses": "HTTP Error 403: Forbidden",
        "page": "a web page",
        "circle": "infinite loop",
        "silent": "timed out",
        "wrong": "another file than",
        f"http://127.0.0.1:{port}/good": "refused",
    }
    with pytest.raises(RunFailed) as failure:
        fetched(server, tmp_path / ARCHIVE, *said)
    message = str(failure.value)
    for way, answer in said.items():
        assert re.search(rf"{re.escape(way)}: [^;]*{re.escape(answer)}", message), message
    assert "\n" not in message and "--archive FILE" in message and "--url ADDRESS" in message
    assert contents(tmp_path) == {}
    with pytest.raises(RunFailed, match="half: HTTP Error 403"):
        fetched(server, tmp_path / ARCHIVE, "half", "refuses")
    assert (tmp_path / ARCHIVE).read_bytes() == WHOLE[:50_000], "which the next start continues"


def test_a_full_disk_is_no_fault_of_an_address(tmp_path, server):
    (tmp_path / ARCHIVE).symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"the disk is full.*{ARCHIVE}"):
        fetched(server, tmp_path / ARCHIVE, "good", "good")
    assert len(server.requests) == 1


def test_the_script_downloads_from_an_address_of_ones_own_and_from_no_other(tmp_path, server, monkeypatch):
    archive = pack(tmp_path / ARCHIVE, official(["a"], ["b"]))
    monkeypatch.setitem(VOC, "md5", hashlib.md5(archive.read_bytes()).hexdigest())
    build("--data_dir", tmp_path / "data", "--url", archive.as_uri())
    assert find_split("voc", tmp_path / "data", "train").ids == ["a"]
    monkeypatch.setattr(build_dataset, "VOC_FOLDERS", [server.address])
    with pytest.raises(RunFailed, match=r"/wrong: another file than the official one\)\. The same"):
        build("--data_dir", tmp_path / "other", "--url", f"{server.address}/wrong")
    assert {way for way, _ in server.requests} == {"wrong"}
    with pytest.raises(SystemExit):
        build("--archive", archive, "--url", f"{server.address}/good")


def test_where_nothing_can_be_downloaded_the_script_says_so_with_status_1(tmp_path, server):
    """The server poses as the proxy, so that the real addresses are asked for and never reached."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), server.address)
    flags = ("--url", f"http://example.invalid/{ARCHIVE}")
    result = run_script("build_dataset.py", "--data_dir", tmp_path / "data", *flags, check=1, no_proxy="", **proxies)
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f"build_dataset.py: error: no download of {ARCHIVE} ")
    assert "Traceback" not in result.stderr and contents(tmp_path) == {}
    assert any(ARCHIVE in way for way, _ in server.requests)


# ---------------------------------------------------------------------------------------------------- SBD

SBD = "benchmark_RELEASE/dataset"
MASK = np.arange(12, dtype=np.uint8).reshape(3, 4)


def mat(mask: np.ndarray) -> bytes:
    """A mask as SBD has it, with its boundaries beside it."""
    stream = io.BytesIO()
    savemat(stream, {"GTcls": {"Boundaries": np.zeros(20), "Segmentation": mask, "CategoriesPresent": 1}})
    return stream.getvalue()


@pytest.fixture
def sbd(tmp_path, monkeypatch) -> Path:
    """SBD's archive, members in their order: masks, photos, and what is of no use here."""
    ids = ["b", "c", "new", "newer"]
    members = {f"{SBD}/cls/{id_}.mat": mat(MASK + index) for index, id_ in enumerate(ids)}
    members |= {f"{SBD}/img/{id_}.jpg": invented("SBD", id_) for id_ in ids}
    members |= {f"{SBD}/inst/b.mat": b"instances", f"{SBD}/train.txt": b"b\nnew\n"}
    path = tmp_path / "any.tgz"
    path.write_bytes(gzip.compress(pack(path, members).read_bytes()))
    monkeypatch.setattr(SBDataset, "md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def voc(tmp_path, archive) -> Path:
    """VOC2012 with a and b in train and c in val."""
    build("--archive", archive, "--data_dir", tmp_path / "data")
    return tmp_path / "data"


def test_sbd_adds_its_photos_to_train_and_leaves_those_of_voc_alone(voc, sbd, capsys):
    before = contents(voc)
    build("--sbd", sbd, "--data_dir", voc)
    after = contents(voc)
    assert {name: after.pop(name) for name in before} == before, "VOC's masks have void, SBD's have none"
    assert after.pop("trainaug.txt") == b"a\nb\nnew\nnewer\n"
    assert "2 photos of train and 2 of SBD" in capsys.readouterr().out
    assert after.pop("JPEGImages/new.jpg") == invented("SBD", "new")
    with Image.open(voc / "SegmentationClass" / "newer.png") as mask:
        assert mask.mode == "L" and np.array_equal(mask, MASK + 3)
    assert after.keys() == {"JPEGImages/newer.jpg", "SegmentationClass/new.png", "SegmentationClass/newer.png"}
    assert find_split("voc", voc, "trainaug", masks_required=True).ids == ["a", "b", "new", "newer"]
    sbd.unlink()
    build("--sbd", sbd, "--data_dir", voc)
    assert "complete: 4 photos" in capsys.readouterr().out


def test_sbd_goes_into_a_devkit_too(tmp_path, archive, sbd):
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path)
    (tmp_path / DEVKIT / "JPEGImages" / "new.jpg").write_bytes(b"the devkit's")
    build("--sbd", sbd, "--data_dir", tmp_path / DEVKIT)
    assert (tmp_path / DEVKIT / LISTS / "trainaug.txt").read_text() == "a\nb\nnew\nnewer\n"
    assert (tmp_path / DEVKIT / "JPEGImages" / "new.jpg").read_bytes() == b"the devkit's"


def test_an_interrupted_unpacking_of_sbd_is_finished_by_the_next(voc, sbd, monkeypatch):
    write, written = build_dataset._write_whole, []

    def interrupted(path, content):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    monkeypatch.setattr(build_dataset, "_write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build("--sbd", sbd, "--data_dir", voc)
    assert not (voc / "trainaug.txt").exists()
    monkeypatch.setattr(build_dataset, "_write_whole", write)
    build("--sbd", sbd, "--data_dir", voc)
    assert (voc / "JPEGImages" / "newer.jpg").read_bytes() == invented("SBD", "newer")
    assert not list(voc.rglob(".*"))


def test_what_is_not_sbds_archive_is_refused_before_anything_is_written(tmp_path, voc, sbd):
    before = contents(voc)
    sbd.write_bytes(sbd.read_bytes()[:-4])
    assert "any.tgz is absent, damaged, or not the official benchmark.tgz" in refusal("--sbd", sbd, "--data_dir", voc)
    assert "`python build_dataset.py`" in refusal("--sbd", sbd, "--data_dir", tmp_path / "none")
    assert contents(voc) == before


def test_without_scipy_sbd_says_what_to_install(voc, sbd, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "pip install scipy" in refusal("--sbd", sbd, "--data_dir", voc)


def test_sbd_is_downloaded_where_no_file_is_given(voc, sbd, monkeypatch):
    for url, more in ((sbd.as_uri(), []), ("nowhere", ["--url", sbd.as_uri()])):
        monkeypatch.setattr(SBDataset, "url", url)
        (voc / SBD_ARCHIVE).unlink(missing_ok=True)
        (voc / "trainaug.txt").unlink(missing_ok=True)
        build("--sbd", "--data_dir", voc, *more)
        assert (voc / "trainaug.txt").exists() and (voc / SBD_ARCHIVE).exists()


# ---------------------------------------------------------------------------------------------------- lists


def own_photos(folder: Path, ids: list[str], *, without_mask: tuple[str, ...] = ()) -> Path:
    """Dealing looks at names alone, so the files may be empty."""
    for kind, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (folder / kind).mkdir(parents=True)
        for id_ in ids:
            if kind == "JPEGImages" or id_ not in without_mask:
                (folder / kind / f"{id_}.{suffix}").touch()
    return folder


def read_lists(folder: Path) -> dict[str, list[str]]:
    return {path.stem: path.read_text(encoding="utf-8").splitlines() for path in folder.glob("*.txt")}


IDS = [f"photo{index}" for index in range(20)]


def test_lists_share_out_every_photo_once(tmp_path):
    write_lists(own_photos(tmp_path, IDS), [0.6, 0.3, 0.1], seed=230)
    lists = read_lists(tmp_path)
    assert {name: len(ids) for name, ids in lists.items()} == {"train": 12, "val": 6, "test": 2}
    assert sorted(lists["train"] + lists["val"] + lists["test"]) == sorted(IDS)


def test_lists_that_are_there_are_not_dealt_anew(tmp_path):
    own_photos(tmp_path, IDS)
    write_lists(tmp_path, [0.6, 0.3, 0.1], seed=1)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already there"):
        write_lists(tmp_path, [0.6, 0.3, 0.1], seed=2)
    assert contents(tmp_path) == before


def test_a_photo_without_a_mask_is_in_no_list(tmp_path, capsys):
    write_lists(own_photos(tmp_path, IDS, without_mask=("photo4", "photo7")), [0.5, 0.25, 0.25], seed=230)
    listed = [id_ for ids in read_lists(tmp_path).values() for id_ in ids]
    assert sorted(listed) == sorted({*IDS} - {"photo4", "photo7"})
    assert "2 photos without a mask" in capsys.readouterr().out


def test_what_cannot_be_dealt_is_refused_and_the_script_says_so_in_one_line(tmp_path):
    own_photos(tmp_path, IDS[:2])
    result = run_script("build_dataset.py", "--data_dir", tmp_path, "--split", 0.8, 0.1, 0.2, check=2)
    assert result.stderr.startswith("build_dataset.py: error: --split 0.8 0.1 0.2: give three shares that sum to 1")
    assert result.stderr.count("\n") == 1
    for shares in ([1.2, -0.1, -0.1], [1, 0, 0], [0, 1, 0], [float("nan")] * 3):
        with pytest.raises(UserError, match="sum to 1, train and val above 0"):
            write_lists(tmp_path, shares, seed=230)
    with pytest.raises(UserError, match=r"2 photos .* with a mask in .*: too few, none is left for val"):
        write_lists(tmp_path, [0.8, 0.1, 0.1], seed=230)
    assert read_lists(tmp_path) == {}


def test_lists_of_a_devkit_are_put_where_they_are_read(tmp_path):
    own_photos(tmp_path, IDS)
    (tmp_path / LISTS).mkdir(parents=True)
    write_lists(tmp_path, [0.6, 0.3, 0.1], seed=230)
    assert read_lists(tmp_path) == {} and len(find_split("voc", tmp_path, "train").ids) == 12


def test_lists_are_those_of_before(tmp_path):
    """Whoever deals anew with the same seed wants the same lists; names may have blanks and accents."""
    write_lists(own_photos(tmp_path / "my photos", [*IDS[:10], "地 é"]), [0.6, 0.3, 0.1], seed=230)
    lists = {
        "train": ["photo1", "photo3", "photo5", "photo6", "photo7", "photo9", "地 é"],
        "val": ["photo0", "photo4", "photo8"],
        "test": ["photo2"],
    }
    assert read_lists(tmp_path / "my photos") == lists
    assert {name: find_split("voc", tmp_path / "my photos", name).ids for name in lists} == lists


# ---------------------------------------------------------------------------------------------------- groups

FRAMES = [f"{video}_{frame:03}" for video in "abcdefghij" for frame in range(1, 9)]


def test_a_group_stays_together_and_shares_are_kept_about(tmp_path, capsys):
    write_lists(own_photos(tmp_path, FRAMES), [0.6, 0.3, 0.1], seed=230, group=r"(.*)_\d+")
    lists = read_lists(tmp_path)
    assert lists.pop("group") == [r"(.*)_\d+"]
    assert find_split("voc", tmp_path, "test").group == r"(.*)_\d+"
    with pytest.raises(UserError, match=r"; splits here: test, train, val$"):
        find_split("voc", tmp_path, "trainaug")
    videos = {name: {id_[0] for id_ in ids} for name, ids in lists.items()}
    assert sorted(id_ for ids in lists.values() for id_ in ids) == FRAMES
    assert {name: len(ids) for name, ids in lists.items()} == {"train": 48, "val": 24, "test": 8}
    assert sum(map(len, videos.values())) == 10, "no video is in two lists"
    stdout = capsys.readouterr().out
    assert "draw its photos together too, and say nothing of fewer than 10 groups, as in val and test\n" in stdout
    assert "48 photos of 6 groups" in stdout and f"8 photos of 1 group -> {tmp_path / 'test.txt'}" in stdout


@pytest.mark.parametrize("pattern", [r"^.", r"^(.)", r"(?P<video>\w)_", r"(?:a|b|(?:[c-j]))(?=_)"])
def test_groups_are_what_is_captured_or_the_whole_match(pattern):
    assert grouped(FRAMES, pattern) == [FRAMES[start : start + 8] for start in range(0, 80, 8)]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 99), st.floats(0.05, 0.9), st.floats(0.05, 1)
)
def test_dealing_groups_loses_none_and_misses_each_end_of_a_share_by_half_a_group(sizes, seed, train, rest):
    val = (1 - train) * rest
    groups = [[(number, index) for index in range(size)] for number, size in enumerate(sizes)]
    parts = deal(groups, [train, val, 1 - train - val], seed)
    assert sorted(group for part in parts.values() for group in part) == groups
    counts = {name: sum(map(len, part)) for name, part in parts.items()}
    for end, share in ((counts["train"], train), (counts["train"] + counts["val"], train + val)):
        # Half a group, and one for each split that would be empty; rounding takes half a photo.
        assert abs(end - share * sum(sizes)) <= max(sizes) * 2.5 + 0.5
    wanted = [
        name for name, share in zip(parts, (train, val, 1 - train - val), strict=True) if share * sum(sizes) > 0.5
    ]
    assert all(parts[name] for name in wanted) or len(sizes) < len(wanted)


@pytest.mark.parametrize(("count", "counts"), [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (20, (16, 2, 2))])
def test_a_few_videos_are_enough_for_three_lists(count, counts):
    groups = [[f"{video}_{frame}" for frame in range(10)] for video in range(count)]
    for seed in range(8):
        assert tuple(map(len, deal(groups, [0.8, 0.1, 0.1], seed).values())) == counts


def test_videos_of_unequal_length_come_as_close_to_the_shares_as_they_can():
    groups = [[f"{video}_{frame}" for frame in range(count)] for video, count in (("a", 12), ("b", 18), ("c", 11))]
    for seed in range(8):
        parts = deal(groups, [0.5, 0.25, 0.25], seed)
        assert parts["train"] == [groups[1]] and sorted(parts["val"] + parts["test"]) == [groups[0], groups[2]]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("([", "is not a regular expression: unterminated character set"),
        (r"([a-h])_", "does not match 'i_001'; it must match every name"),
        (r"_", "make 1 groups by --group '_': too few, none is left for"),
        ("", "make 1 groups by --group '': too few, none is left for"),
    ],
)
def test_a_group_that_cannot_be_is_refused_in_one_line(tmp_path, pattern, words):
    own_photos(tmp_path, FRAMES)
    assert words in refusal("--data_dir", tmp_path, "--split", 0.6, 0.3, 0.1, "--group", pattern)
    assert read_lists(tmp_path) == {}


def test_what_makes_a_group_is_kept_beside_the_lists_where_two_photos_share_one(tmp_path):
    """In a devkit too, whichever of its folders is given; of lists that are gone nothing stays."""
    root = own_photos(tmp_path / "VOC2012", [*FRAMES, "a_001.rf.0a1b"])
    (lists := root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for pattern, kept in ((r"(.*)_\d+", r"(.*)_\d+"), (None, COPIES), (r".*", None)):
        write_lists(tmp_path, [0.6, 0.3, 0.1], seed=230, group=pattern)
        assert [find_split("voc", folder, "val").group for folder in (tmp_path, root)] == [kept, kept]
        for name in ("train", "val", "test"):
            (lists / f"{name}.txt").unlink()


# ---------------------------------------------------------------------------------------------------- the sample


def test_the_sample_has_its_six_classes_in_both_splits_and_is_always_the_same(tmp_path, monkeypatch):
    """A class that val lacked would have no score."""
    build("--sample", "--data_dir", tmp_path)
    sample = tmp_path / "sample"
    drawn = contents(sample)
    assert len(set(drawn.values())) == 2 * 80 + 2
    monkeypatch.setattr("model.sample.SIZES", {"val": 16})
    assert contents(draw_sample(tmp_path / "again")).items() <= drawn.items()
    names = ("background", "aeroplane", "bottle", "bus", "cat", "sheep", "tvmonitor")
    for name, count in (("train", 64), ("val", 16)):
        split = find_split("voc", sample, name, masks_required=True)
        assert len(split.ids) == count
        shown = set(np.concatenate([np.unique(Image.open(mask)) for mask in split.masks]).tolist())
        assert shown == {CLASS_NAMES.index(name) for name in names} | {VOID}


def test_what_is_in_the_samples_place_is_left_alone(tmp_path):
    (tmp_path / "sample").mkdir()
    assert "sample is not the built-in sample" in refusal("--sample", "--data_dir", tmp_path)
    (tmp_path / "sample" / "val.txt").write_text("mine")
    build("--sample", "--data_dir", tmp_path)
    assert contents(tmp_path) == {"sample/val.txt": b"mine"}
