"""build_dataset.py as a user meets it: archives, downloads, lists for own photos, the drawn sample."""

import gzip
import hashlib
import io
import os
import re
import resource
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

import build_dataset
from build_dataset import ARCHIVE, deal, download, grouped, write_lists
from model import UserError
from model.layouts import find_split, read_list
from model.voc import CLASS_NAMES, VOID
from utils import RunFailed

DEVKIT = "VOCdevkit/VOC2012"
LISTS = "ImageSets/Segmentation"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def invented(kind: str, id_: str) -> bytes:
    """Unpacking does not decode, so most tests need no real photo; 3000 bytes span several blocks of a tar."""
    return f"{kind} {id_} ".encode().ljust(3000, b".")


def official(train: list[str], val: list[str], read=invented) -> dict[str, bytes]:
    """The members of an archive in the official layout and order, with one photo that no list names."""
    lists = {"train": train, "trainval": train + val, "val": val}
    members = {f"{DEVKIT}/Annotations/{id_}.xml": b"<annotation/>" for id_ in train + val}
    members |= {f"{DEVKIT}/{LISTS}/{name}.txt": "\n".join([*ids, ""]).encode() for name, ids in lists.items()}
    members |= {f"{DEVKIT}/JPEGImages/{id_}.jpg": read("JPEGImages", id_) for id_ in train + val}
    members |= {f"{DEVKIT}/JPEGImages/unlisted.jpg": invented("JPEGImages", "unlisted")}
    members |= {f"{DEVKIT}/SegmentationClass/{id_}.png": read("SegmentationClass", id_) for id_ in train + val}
    return members


def pack(path: Path, members: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in others:
            tar.addfile(member)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return pack(tmp_path / ARCHIVE, official(["a", "b"], ["c"]))


def unpack(archive: Path, data_dir: Path) -> None:
    run_script("build_dataset.py", "--archive", archive, "--data_dir", data_dir)


def refusal(*args) -> str:
    """What a refused call says: exit status 2 and one line on stderr."""
    stderr = run_script("build_dataset.py", *args, check=2).stderr
    assert stderr.startswith("build_dataset.py: error: ") and stderr.count("\n") == 1, stderr
    return stderr


def refused_archive(tmp_path: Path, archive: Path) -> str:
    """As refusal, and no file has been added, changed or removed anywhere in tmp_path."""
    before = contents(tmp_path)
    message = refusal("--archive", archive, "--data_dir", tmp_path / "deep" / "data")
    assert contents(tmp_path) == before
    return message


# ---------------------------------------------------------------------------------------------------- archives


def test_archive_gives_the_listed_files_byte_for_byte_and_nothing_else(tmp_path, voc2012):
    def read(kind: str, id_: str) -> bytes:
        return (voc2012 / kind / id_).with_suffix(".jpg" if kind == "JPEGImages" else ".png").read_bytes()

    train, val = ([*(voc2012 / LISTS / f"{name}.txt").read_text().split()[:3]] for name in ("train", "val"))
    members = official(train, val, read)
    data = tmp_path / "data"
    unpack(pack(tmp_path / "any name.tar", members), data)
    wanted = {
        name.removeprefix(f"{DEVKIT}/").removeprefix(f"{LISTS}/"): content
        for name, content in members.items()
        if "Annotations" not in name and "unlisted" not in name
    }
    assert contents(data) == wanted
    assert {name: find_split("voc", data, name).ids for name in ("train", "val")} == {"train": train, "val": val}
    assert find_split("voc", data, "trainval").masks is not None


def test_archive_with_a_leading_dot_is_the_same(tmp_path, archive):
    """`tar -cf x.tar ./VOCdevkit` of an unpacked devkit."""
    dotted = pack(tmp_path / "x.tar", {f"./{name}": body for name, body in official(["a", "b"], ["c"]).items()})
    for source, folder in ((archive, "one"), (dotted, "two")):
        unpack(source, tmp_path / folder)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_unpacking_again_touches_no_photo(tmp_path, archive):
    data = tmp_path / "data"
    unpack(archive, data)
    before = {path: path.stat().st_mtime_ns for path in data.glob("*/*")}
    unpack(archive, data)
    assert len(before) == 6 and {path: path.stat().st_mtime_ns for path in data.glob("*/*")} == before


def test_unpacking_again_repairs_a_truncated_photo(tmp_path, archive):
    data = tmp_path / "data"
    unpack(archive, data)
    whole = contents(data)
    (data / "JPEGImages" / "b.jpg").write_bytes(whole["JPEGImages/b.jpg"][:1000])
    unpack(archive, data)
    assert contents(data) == whole


def test_an_interrupted_unpacking_is_finished_by_the_next(tmp_path, archive):
    data = tmp_path / "data"
    unpack(archive, data)
    whole = contents(data)
    for name in ("val.txt", "SegmentationClass/c.png", "JPEGImages/a.jpg"):
        (data / name).unlink()
    unpack(archive, data)
    assert contents(data) == whole


@pytest.mark.parametrize("name", ["../../escaped.jpg", f"{DEVKIT}/JPEGImages/../../../../../escaped.jpg"])
def test_a_member_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    members = official(["a", "b"], ["c"]) | {name: b"escaped"}
    assert name in refused_archive(tmp_path, pack(tmp_path / "x.tar", members))


def test_an_absolute_member_is_refused(tmp_path):
    name = str(tmp_path / "escaped.jpg")
    assert name in refused_archive(tmp_path, pack(tmp_path / "x.tar", official(["a"], ["b"]) | {name: b"escaped"}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE], ids=["symbolic", "hard", "fifo"])
def test_a_link_is_refused(tmp_path, kind):
    link = tarfile.TarInfo(f"{DEVKIT}/JPEGImages/link.jpg")
    link.type, link.linkname = kind, "/etc/hostname"
    assert "link.jpg" in refused_archive(tmp_path, pack(tmp_path / "x.tar", official(["a"], ["b"]), link))


@pytest.mark.parametrize("place", ["in a photo", "in a header", "between two members", "in the last mask"])
def test_a_truncated_archive_is_refused(tmp_path, archive, place):
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    photo = next(member for member in members if member.name.endswith("a.jpg"))
    cut = {
        "in a photo": photo.offset_data + 1500,
        "in a header": photo.offset + 100,
        "between two members": members[-1].offset,
        "in the last mask": members[-1].offset_data + 1500,
    }
    archive.write_bytes(archive.read_bytes()[: cut[place]])
    assert ARCHIVE in refused_archive(tmp_path, archive)


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>" * 100], ids=["empty", "a web page"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "page.tar").write_bytes(content)
    assert "page.tar cannot be read as a tar archive" in refused_archive(tmp_path, tmp_path / "page.tar")


def test_an_absent_archive_is_refused(tmp_path):
    assert f"no archive {tmp_path / 'absent.tar'}" in refused_archive(tmp_path, tmp_path / "absent.tar")


@pytest.mark.parametrize("lost", ["JPEGImages/b.jpg", "SegmentationClass/b.png"])
def test_an_archive_that_lists_what_it_lacks_is_refused(tmp_path, lost):
    members = official(["a", "b"], ["c"])
    del members[f"{DEVKIT}/{lost}"]
    assert "lists b without its photo or mask" in refused_archive(tmp_path, pack(tmp_path / "x.tar", members))


def test_an_archive_without_lists_is_refused(tmp_path):
    members = {name: body for name, body in official(["a"], ["b"]).items() if LISTS not in name}
    assert LISTS in refused_archive(tmp_path, pack(tmp_path / "x.tar", members))


def test_an_archive_whose_list_is_not_text_is_refused(tmp_path):
    members = official(["a"], ["b"]) | {f"{DEVKIT}/{LISTS}/train.txt": b"\xff\xfe\x00a"}
    assert "x.tar" in refused_archive(tmp_path, pack(tmp_path / "x.tar", members))


def test_another_data_set_is_left_alone(tmp_path, archive):
    data = tmp_path / "deep" / "data"
    data.mkdir(parents=True)
    (data / "train.txt").write_text("mine\n")
    assert f"{data / 'train.txt'} belongs to another data set" in refused_archive(tmp_path, archive)


# ---------------------------------------------------------------------------------------------------- downloads


class Handler(BaseHTTPRequestHandler):
    """Answers with server.content[path]; counts in server.requests."""

    def do_GET(self):
        self.server.requests.append(self.path)
        if (body := self.server.content.get(self.path.rpartition("/")[2])) is None:
            self.send_error(404)
            return
        self.send_response(200)
        # A chunk that is announced and not sent in full is what a connection lost on the way looks like.
        kind = ("Transfer-Encoding", "chunked") if body.startswith(b"chunk") else ("Content-Length", str(len(body)))
        self.send_header(*kind)
        self.end_headers()
        self.wfile.write(b"ff\r\n" + body if body.startswith(b"chunk") else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # this machine is reached without the user's proxy
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.requests = {"good": b"the archive", "damaged": b"half the arch", "lost": b"chunk"}, []
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


MD5 = hashlib.md5(b"the archive").hexdigest()


def test_download_comes_from_the_first_address(tmp_path, server):
    path = download([f"{server.address}/good", f"{server.address}/other"], tmp_path / "data", MD5)
    assert contents(tmp_path) == {f"data/{ARCHIVE}": b"the archive"} and path == tmp_path / "data" / ARCHIVE
    assert set(server.requests) == {"/good"}


@pytest.mark.parametrize("first", ["absent", "damaged", "lost"])
def test_download_goes_on_to_the_next_address(tmp_path, server, first):
    path = download([f"{server.address}/{first}", f"{server.address}/good"], tmp_path, MD5)
    assert path.read_bytes() == b"the archive"


def test_an_address_where_nobody_answers_is_passed_over(tmp_path, server):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    assert download([f"http://127.0.0.1:{port}/good", f"{server.address}/good"], tmp_path, MD5).exists()


def test_an_archive_that_is_there_is_not_downloaded_again(tmp_path, server):
    (tmp_path / ARCHIVE).write_bytes(b"the archive")
    assert download([f"{server.address}/good"], tmp_path, MD5) == tmp_path / ARCHIVE
    assert server.requests == []


def test_a_damaged_archive_that_is_there_is_replaced(tmp_path, server):
    (tmp_path / ARCHIVE).write_bytes(b"the arch")
    assert download([f"{server.address}/good"], tmp_path, MD5).read_bytes() == b"the archive"


@pytest.mark.parametrize("second", ["damaged", "absent", "lost"])
def test_a_failed_download_names_every_address_and_leaves_nothing(tmp_path, server, second):
    urls = [f"{server.address}/damaged?1", f"{server.address}/{second}"]
    server.content["damaged?1"] = b"other bytes"
    with pytest.raises(RunFailed) as failure:
        download(urls, tmp_path, MD5)
    assert all(text in str(failure.value) for text in (*urls, "--archive"))
    assert contents(tmp_path) == {}


def test_where_nothing_can_be_downloaded_the_script_says_so_with_status_1(tmp_path, server):
    """The server poses as the proxy, so that the real addresses are asked for and never reached."""
    server.content[ARCHIVE] = b"not VOC2012"
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), server.address)
    result = run_script("build_dataset.py", "--data_dir", tmp_path / "data", check=1, no_proxy="", **proxies)
    message = result.stderr.splitlines()[-1]
    assert message.startswith("build_dataset.py: error: ") and "--archive" in message
    assert "Traceback" not in result.stderr and contents(tmp_path) == {}
    assert any(ARCHIVE in request for request in server.requests)


def test_a_complete_data_set_is_not_downloaded_again(tmp_path, archive, server):
    data = tmp_path / "data"
    unpack(archive, data)
    before = contents(data)
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), server.address)
    result = run_script("build_dataset.py", "--data_dir", data, no_proxy="", **proxies)
    assert "3 photos with masks" in result.stdout
    assert contents(data) == before and server.requests == []


# ---------------------------------------------------------------------------------------------------- SBD


SBD = "benchmark_RELEASE/dataset"


def mat(mask: np.ndarray) -> bytes:
    """A mask as SBD has it, with its boundaries beside it."""
    stream = io.BytesIO()
    savemat(stream, {"GTcls": {"Boundaries": np.zeros(20), "Segmentation": mask, "CategoriesPresent": 1}})
    return stream.getvalue()


MASK = np.arange(12, dtype=np.uint8).reshape(3, 4)


def sbd(ids: list[str]) -> dict[str, bytes]:
    """The members of SBD's archive in their order: masks, photos, and what is of no use here."""
    members = {f"{SBD}/cls/{id_}.mat": mat(MASK + index) for index, id_ in enumerate(ids)}
    members |= {f"{SBD}/img/{id_}.jpg": invented("SBD", id_) for id_ in ids}
    return members | {f"{SBD}/inst/{ids[0]}.mat": b"instances", f"{SBD}/train.txt": b"b\nnew\n"}


def pack_sbd(path: Path, members: dict[str, bytes]) -> Path:
    path.write_bytes(gzip.compress(pack(path, members).read_bytes()))
    return path


@pytest.fixture
def voc(tmp_path, archive) -> Path:
    """VOC2012 with a and b in train and c in val."""
    unpack(archive, tmp_path / "data")
    return tmp_path / "data"


def test_sbd_adds_its_photos_to_train_and_leaves_those_of_voc_alone(tmp_path, voc):
    before = contents(voc)
    archive = pack_sbd(tmp_path / "any.tgz", sbd(["b", "c", "new", "newer"]))
    stdout = run_script("build_dataset.py", "--sbd", archive, "--data_dir", voc).stdout
    after = contents(voc)
    assert {name: after.pop(name) for name in before} == before, "VOC's masks have void, SBD's have none"
    assert after.pop("trainaug.txt") == b"a\nb\nnew\nnewer\n" and "2 photos of train and 2 of SBD" in stdout
    assert after.pop("JPEGImages/new.jpg") == invented("SBD", "new")
    with Image.open(voc / "SegmentationClass" / "newer.png") as mask:
        assert mask.mode == "L" and np.array_equal(mask, MASK + 3)
    assert after.keys() == {"JPEGImages/newer.jpg", "SegmentationClass/new.png", "SegmentationClass/newer.png"}
    assert find_split("voc", voc, "trainaug", masks_required=True).ids == ["a", "b", "new", "newer"]
    archive.unlink()
    assert "complete: 4 photos" in run_script("build_dataset.py", "--sbd", archive, "--data_dir", voc).stdout


def test_sbd_goes_into_a_devkit_too(tmp_path):
    with tarfile.open(pack(tmp_path / ARCHIVE, official(["a"], ["c"]))) as tar:
        tar.extractall(tmp_path, filter="data")
    archive = pack_sbd(tmp_path / "x.tgz", sbd(["a", "unlisted"]))
    run_script("build_dataset.py", "--sbd", archive, "--data_dir", tmp_path / DEVKIT)
    assert (tmp_path / DEVKIT / LISTS / "trainaug.txt").read_text() == "a\nunlisted\n"
    photo = tmp_path / DEVKIT / "JPEGImages" / "unlisted.jpg"
    assert photo.read_bytes() == invented("JPEGImages", "unlisted"), "a devkit has the photos of SBD already"


def test_an_interrupted_unpacking_of_sbd_is_finished_by_the_next(tmp_path, voc):
    before = contents(voc)
    members = sbd(["new", "newer"])
    half = pack_sbd(tmp_path / "half.tgz", members | {f"{SBD}/cls/newer.mat": b"no MATLAB"})
    assert "newer.mat is no mask of SBD" in refusal("--sbd", half, "--data_dir", voc)
    assert contents(voc).keys() - before.keys() == {"SegmentationClass/new.png"}
    archive = pack_sbd(tmp_path / "x.tgz", members)
    run_script("build_dataset.py", "--sbd", archive, "--data_dir", voc)
    assert (voc / "JPEGImages" / "newer.jpg").read_bytes() == invented("SBD", "newer")
    assert not list(voc.rglob(".*"))


@pytest.mark.parametrize("damage", ["one bit", "a gap", "cut short", "no archive", "no tar"])
def test_a_damaged_archive_of_sbd_is_refused_before_anything_is_written(tmp_path, voc, damage):
    archive = pack_sbd(tmp_path / "x.tgz", sbd(["new", "newer"]))
    whole, before = archive.read_bytes(), contents(voc)
    middle = len(whole) // 2
    archive.write_bytes(
        {
            "one bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "a gap": whole[:20] + b"\xff" * 20 + whole[40:],
            "cut short": whole[:-4],
            "no archive": b"<html>404</html>",
            "no tar": gzip.compress(b"<html>404</html>"),
        }[damage]
    )
    assert "cannot be read as a .tgz archive" in refusal("--sbd", archive, "--data_dir", voc)
    assert contents(voc) == before


@pytest.mark.parametrize(
    "change, words",
    [
        ({f"{SBD}/cls/new.mat": None}, "has new without its photo or mask"),
        ({f"{SBD}/img/new.jpg": None}, "has new without its photo or mask"),
        ({f"{SBD}/cls/new.mat": b"no MATLAB"}, "cls/new.mat is no mask of SBD"),
        ({f"{SBD}/cls/new.mat": mat(MASK)[:200]}, "cls/new.mat is no mask of SBD"),
        ({f"{SBD}/cls/new.mat": mat(MASK.astype(float))}, "cls/new.mat is no mask of SBD (float64 of shape (3, 4))"),
        ({f"{SBD}/cls/new.mat": mat(MASK[:0])}, "cls/new.mat is no mask of SBD"),
        ({f"{SBD}/{kind}": None for kind in ("cls/new.mat", "img/new.jpg")}, "adds no photo"),
    ],
)
def test_a_faulty_archive_of_sbd_is_refused(tmp_path, voc, change, words):
    members = {name: body for name, body in (sbd(["b", "new"]) | change).items() if body is not None}
    assert words in refusal("--sbd", pack_sbd(tmp_path / "x.tgz", members), "--data_dir", voc)
    assert not (voc / "trainaug.txt").exists()


def test_sbd_needs_voc_first_and_a_file_that_is_there(tmp_path, voc):
    assert "`python build_dataset.py`" in refusal("--sbd", tmp_path / "x.tgz", "--data_dir", tmp_path / "none")
    assert f"no archive {tmp_path / 'x.tgz'}" in refusal("--sbd", tmp_path / "x.tgz", "--data_dir", voc)


def test_without_scipy_sbd_says_what_to_install(tmp_path, voc):
    arguments = ("--sbd", tmp_path / "x.tgz", "--data_dir", voc)
    result = run_script("build_dataset.py", *arguments, check=2, without=["scipy"])
    assert "pip install scipy" in result.stderr and result.stderr.count("\n") == 1


def test_sbd_is_downloaded_where_no_file_is_given(tmp_path, voc, server):
    """The server poses as the proxy, so that the real address is asked for and never reached."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), server.address)
    before = contents(voc)
    result = run_script("build_dataset.py", "--sbd", "--data_dir", voc, check=1, no_proxy="", **proxies)
    message = result.stderr.splitlines()[-1]
    assert "benchmark.tgz" in message and "--sbd FILE" in message and "Traceback" not in result.stderr
    assert contents(voc) == before


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


def test_no_test_share_gives_no_test_list(tmp_path):
    write_lists(own_photos(tmp_path, IDS), [0.75, 0.25, 0], seed=230)
    assert {name: len(ids) for name, ids in read_lists(tmp_path).items()} == {"train": 15, "val": 5}


def dealt(folder: Path, ids: list[str], seed: int) -> dict[str, list[str]]:
    write_lists(own_photos(folder, ids), [0.6, 0.3, 0.1], seed=seed)
    return read_lists(folder)


def test_lists_are_the_same_for_the_same_seed_only(tmp_path):
    first, again, other = (dealt(tmp_path / name, IDS, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again != other


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs, which lists files as they were created")
def test_lists_do_not_depend_on_the_order_in_which_files_were_created():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert dealt(Path(folder) / "a", IDS, 1) == dealt(Path(folder) / "b", IDS[::-1], 1)


def test_lists_are_not_merely_the_first_names(tmp_path):
    write_lists(own_photos(tmp_path, IDS), [0.5, 0.5, 0], seed=230)
    assert set(read_lists(tmp_path)["train"]) not in (set(sorted(IDS)[:10]), set(sorted(IDS)[10:]))


def test_lists_that_are_there_are_not_dealt_anew(tmp_path):
    own_photos(tmp_path, IDS)
    write_lists(tmp_path, [0.6, 0.3, 0.1], seed=1)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already there"):
        write_lists(tmp_path, [0.6, 0.3, 0.1], seed=2)
    assert contents(tmp_path) == before


def test_one_list_that_is_there_is_enough_to_refuse(tmp_path):
    own_photos(tmp_path, IDS)
    (tmp_path / "test.txt").write_text("photo3\n")
    with pytest.raises(UserError, match=r"test\.txt is already there"):
        write_lists(tmp_path, [0.6, 0.3, 0.1], seed=1)
    assert read_lists(tmp_path) == {"test": ["photo3"]}


def test_a_photo_without_a_mask_is_in_no_list(tmp_path, capsys):
    write_lists(own_photos(tmp_path, IDS, without_mask=("photo4", "photo7")), [0.5, 0.25, 0.25], seed=230)
    listed = [id_ for ids in read_lists(tmp_path).values() for id_ in ids]
    assert sorted(listed) == sorted({*IDS} - {"photo4", "photo7"})
    assert "2 photos without a mask" in capsys.readouterr().out


def test_what_is_no_file_is_in_no_list(tmp_path):
    own_photos(tmp_path, IDS[:5])
    for path in (tmp_path / "JPEGImages" / "folder.jpg", tmp_path / "JPEGImages" / "fifo.jpg"):
        path.mkdir() if path.stem == "folder" else os.mkfifo(path)
        (tmp_path / "SegmentationClass" / f"{path.stem}.png").touch()
    write_lists(tmp_path, [0.6, 0.4, 0], seed=1)
    assert sorted(id_ for ids in read_lists(tmp_path).values() for id_ in ids) == sorted(IDS[:5])


def test_lists_of_a_devkit_are_put_where_they_are_read(tmp_path):
    own_photos(tmp_path, IDS)
    (tmp_path / LISTS).mkdir(parents=True)
    write_lists(tmp_path, [0.6, 0.3, 0.1], seed=230)
    assert read_lists(tmp_path) == {} and len(find_split("voc", tmp_path, "train").ids) == 12


@pytest.mark.parametrize("shares", [[0.8, 0.1, 0.2], [1.2, -0.1, -0.1], [1, 0, 0], [0, 1, 0], [float("nan")] * 3])
def test_impossible_shares_are_refused(tmp_path, shares):
    own_photos(tmp_path, IDS)
    with pytest.raises(UserError, match="sum to 1, train and val above 0"):
        write_lists(tmp_path, shares, seed=230)
    assert read_lists(tmp_path) == {}


def test_too_few_photos_are_refused(tmp_path):
    own_photos(tmp_path, IDS[:2])
    with pytest.raises(UserError, match="too few"):
        write_lists(tmp_path, [0.8, 0.1, 0.1], seed=230)
    assert read_lists(tmp_path) == {}


def test_script_deals_names_with_spaces_and_accents(tmp_path):
    ids = [f"Straße à côté {index}" for index in range(8)] + ["地図 1", "地図 2"]
    own_photos(tmp_path / "my photos", ids)
    run_script("build_dataset.py", "--data_dir", tmp_path / "my photos", "--split", 0.5, 0.3, 0.2)
    splits = [find_split("voc", tmp_path / "my photos", name) for name in ("train", "val", "test")]
    assert sorted(id_ for split in splits for id_ in split.ids) == sorted(ids)
    assert [len(split.ids) for split in splits] == [5, 3, 2]


def test_script_refuses_impossible_shares_in_one_line(tmp_path):
    own_photos(tmp_path, IDS)
    assert "--split 0.8 0.1 0.2: " in refusal("--data_dir", tmp_path, "--split", 0.8, 0.1, 0.2)
    assert read_lists(tmp_path) == {}


def test_lists_are_those_of_before(tmp_path):
    """Whoever deals anew with the same seed wants the same lists."""
    write_lists(own_photos(tmp_path, [*IDS[:10], "x y"]), [0.6, 0.3, 0.1], seed=230)
    assert read_lists(tmp_path) == {
        "train": ["photo1", "photo3", "photo5", "photo6", "photo7", "photo9", "x y"],
        "val": ["photo0", "photo4", "photo8"],
        "test": ["photo2"],
    }


# ---------------------------------------------------------------------------------------------------- names

UNREADABLE = [b"\xff\xfe", b" a", b"a ", "a\u2028b".encode(), "\x85a".encode(), b"a\x0bb", b"a\x1cb", b"a\x0c", b"a\nb"]
UNREADABLE += ["\ufeffa".encode(), "\u3000a".encode(), b"\t"]


def touch(folder: Path, name: bytes) -> None:
    for kind, suffix in (("JPEGImages", b".jpg"), ("SegmentationClass", b".png")):
        Path(os.fsdecode(os.fsencode(folder / kind) + b"/" + name + suffix)).touch()


@pytest.mark.parametrize("name", UNREADABLE, ids=repr)
def test_a_name_that_a_list_cannot_hold_is_refused_before_anything_is_written(tmp_path, name):
    touch(own_photos(tmp_path, IDS), name)
    message = refusal("--data_dir", tmp_path, "--split", 0.6, 0.3, 0.1)
    assert ascii(os.fsdecode(name))[1:-1] in ascii(message).replace("\\\\", "\\") and "rename" in message
    assert read_lists(tmp_path) == {} and not list(tmp_path.glob(".*"))


def test_of_many_such_names_a_few_are_shown(tmp_path):
    for index in range(8):
        touch(own_photos(tmp_path, IDS) if index == 0 else tmp_path, b" %d" % index)
    message = refusal("--data_dir", tmp_path, "--split", 0.6, 0.3, 0.1)
    assert "' 0', ' 1', ' 2', ' 3', ' 4' and 3 more" in message


def test_a_folder_whose_name_is_not_utf8_can_be_dealt(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    own_photos(folder, IDS)
    assert "-> " in run_script("build_dataset.py", "--data_dir", folder, "--split", 0.6, 0.3, 0.1).stdout
    assert len(find_split("voc", folder, "train").ids) == 12


characters = st.sampled_from([*"ab .\u00e9\x0b\x1c\u2028\x85\ufeff\t\n\r\u3000\x00\udcff", "\u5730", "\U0001f600"])
file_names = st.text(characters | st.characters(exclude_characters="/\0"), min_size=1, max_size=6).filter(
    lambda name: "\0" not in name and not name.startswith(".") and len(name.encode(errors="replace")) < 200
)


@settings(deadline=None)
@given(st.sets(file_names, min_size=1, max_size=3))
def test_any_name_that_is_accepted_can_be_read_back(names):
    with tempfile.TemporaryDirectory() as folder:
        data = own_photos(Path(folder), ["1", "2", "3"])
        try:
            for name in names:
                touch(data, os.fsencode(name))
        except UnicodeEncodeError:  # half of a surrogate pair, which no file is called
            return
        wanted = {"1", "2", "3", *names}
        try:
            write_lists(data, [0.5, 0.5, 0], seed=1)
        except UserError as error:
            assert "\n" not in str(error) and repr(min(names - {"1"})).isprintable()
            assert read_lists(data) == {}
        else:
            assert {id_ for name in ("train", "val") for id_ in read_list(data / f"{name}.txt")} == wanted
            assert all(find_split("voc", data, name).masks for name in ("train", "val"))


def test_lists_are_written_all_or_none_on_a_full_disk(tmp_path):
    """val.txt is longer than the limit on a file's size, train.txt is not."""
    own_photos(tmp_path, [f"{index:0200}" for index in range(100)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_lists(tmp_path, [0.1, 0.9, 0], seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.iterdir() if not path.is_dir()]
    write_lists(tmp_path, [0.1, 0.9, 0], seed=1)
    assert len(read_lists(tmp_path)["val"]) == 90


def test_a_list_that_cannot_take_its_place_takes_the_others_away(tmp_path):
    (tmp_path / "first").mkdir()
    with pytest.raises(OSError):
        build_dataset._write_all({tmp_path / "first": "a\n", tmp_path / "second": "b\n"})
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


# ---------------------------------------------------------------------------------------------------- groups

FRAMES = [f"{video}_{frame:03}" for video in "abcdefghij" for frame in range(1, 9)]


def test_a_group_stays_together_and_shares_are_kept_about(tmp_path, capsys):
    write_lists(own_photos(tmp_path, FRAMES), [0.6, 0.3, 0.1], seed=230, group=r"(.*)_\d+")
    lists = read_lists(tmp_path)
    videos = {name: {id_[0] for id_ in ids} for name, ids in lists.items()}
    assert sorted(id_ for ids in lists.values() for id_ in ids) == FRAMES
    assert {name: len(ids) for name, ids in lists.items()} == {"train": 48, "val": 24, "test": 8}
    assert sum(map(len, videos.values())) == 10, "no video is in two lists"
    stdout = capsys.readouterr().out
    assert "48 train (groups: 6), 24 val (groups: 3), 8 test (groups: 1)" in stdout and "approximate" in stdout


@pytest.mark.parametrize("pattern", [r"^.", r"^(.)", r"(?P<video>\w)_", r"(?:a|b|(?:[c-j]))(?=_)"])
def test_groups_are_what_is_captured_or_the_whole_match(pattern):
    assert grouped(FRAMES, pattern) == [FRAMES[start : start + 8] for start in range(0, 80, 8)]


def test_several_groups_of_an_expression_count_together():
    assert grouped(["a1x", "a2x", "b1x", "a1y", "x"], r"(?:([ab])\d)?(.)$") == [["a1x", "a2x"], ["b1x"], ["a1y"], ["x"]]


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


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("count", "dealt"), [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (20, (16, 2, 2))])
def test_a_few_videos_are_enough_for_three_lists(count, dealt, seed):
    groups = [[f"{video}_{frame}" for frame in range(10)] for video in range(count)]
    assert tuple(map(len, deal(groups, [0.8, 0.1, 0.1], seed).values())) == dealt


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("([", "is not a regular expression: unterminated character set"),
        (r"([a-h])_", "does not match 'i_001', 'i_002', 'i_003', 'i_004', 'i_005' and 11 more"),
        (r"_", "makes too few groups (1 of 80 photos): none is left for train and val; give"),
        ("", "makes too few groups (1 of 80 photos): none is left for train and val; give"),
    ],
)
def test_a_group_that_cannot_be_is_refused_in_one_line(tmp_path, pattern, words):
    own_photos(tmp_path, FRAMES)
    assert words in refusal("--data_dir", tmp_path, "--split", 0.6, 0.3, 0.1, "--group", pattern)
    assert read_lists(tmp_path) == {}


def test_group_without_split_is_refused(tmp_path):
    assert "--group '(.)' is of use with --split only" in refusal("--data_dir", tmp_path, "--group", "(.)", "--sample")


def videos(folder: Path, count: int, frames: int, *, step: int = 3) -> Path:
    """Frames of a camera that moves over a scene, a few pixels a frame, with noise."""
    own_photos(folder, [f"{video}_{frame}" for video in range(count) for frame in range(frames)])
    rng = np.random.default_rng(0)
    for video in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
        scene = colours.resize((480, 320), Image.Resampling.BICUBIC)
        for frame in range(frames):
            view = np.array(scene.crop((step * frame, step * frame, 240 + step * frame, 160 + step * frame)))
            view = (view + rng.normal(0, 8, view.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(view).save(folder / "JPEGImages" / f"{video}_{frame}.jpg")
    return folder


def pieces_torn(data: Path, count: int, frames: int) -> int:
    """How many neighbouring frames lie in different lists."""
    where = {id_: name for name, ids in read_lists(data).items() for id_ in ids}
    return sum(where[f"{v}_{f}"] != where[f"{v}_{f - 1}"] for v in range(count) for f in range(1, frames))


@pytest.mark.parametrize(("count", "frames"), [(5, 8), (3, 12), (1, 40)])
def test_frames_of_a_video_are_warned_of_with_a_group_that_works(tmp_path, count, frames):
    data = videos(tmp_path, count, frames)
    arguments = ("build_dataset.py", "--data_dir", data, "--split", 0.6, 0.2, 0.2)
    result = run_script(*arguments)
    assert result.stderr.startswith("warning: about ") and result.stderr.count("\n") == 1
    assert sum(map(len, read_lists(data).values())) == count * frames, "the lists are written all the same"
    (pattern,) = re.findall("--group '(.*)'", result.stderr)
    for path in data.glob("*.txt"):
        path.unlink()
    stderr = run_script(*arguments, "--group", pattern).stderr
    if count == 1:  # nothing keeps one video together and fills three lists
        assert "take val from another scene" in result.stderr and "take val from another scene" in stderr
        assert 0 < pieces_torn(data, count, frames) <= 3
    else:
        assert "another scene" not in result.stderr and stderr == "" and pieces_torn(data, count, frames) == 0


def test_a_group_that_tears_videos_apart_is_warned_of(tmp_path):
    data = videos(tmp_path, 5, 12)
    result = run_script("build_dataset.py", "--data_dir", data, "--split", 0.6, 0.2, 0.2, "--group", "(.*)")
    assert result.stderr.startswith("warning: ") and r"--group '(.*?)\d*$'" in result.stderr


def test_photos_that_are_no_frames_are_not_warned_of(tmp_path, voc2012):
    data = own_photos(tmp_path, [])
    for path in sorted((voc2012 / "JPEGImages").glob("*.jpg"))[:60]:
        (data / "JPEGImages" / path.name).symlink_to(path)
        (data / "SegmentationClass" / f"{path.stem}.png").touch()
    assert run_script("build_dataset.py", "--data_dir", data, "--split", 0.6, 0.3, 0.1).stderr == ""


# ---------------------------------------------------------------------------------------------------- the sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    run_script("build_dataset.py", "--sample", "--data_dir", folder)
    return folder / "sample"


def test_sample_holds_64_and_16_photos_with_masks(sample):
    splits = {name: find_split("voc", sample, name) for name in ("train", "val")}
    assert {name: len(split.ids) for name, split in splits.items()} == {"train": 64, "val": 16}
    assert all(split.masks for split in splits.values())
    assert len(contents(sample)) == 2 * 80 + 2


def test_sample_is_the_same_everywhere(sample, tmp_path):
    run_script("build_dataset.py", "--sample", "--data_dir", tmp_path)
    assert contents(tmp_path / "sample") == contents(sample)


def test_sample_scenes_differ(sample):
    assert len({hashlib.md5(body).digest() for name, body in contents(sample).items() if "JPEG" in name}) == 80


def test_sample_photos_and_masks_are_in_voc_format(sample):
    for id_ in find_split("voc", sample, "val").ids:
        with (
            Image.open(sample / "JPEGImages" / f"{id_}.jpg") as photo,
            Image.open(sample / "SegmentationClass" / f"{id_}.png") as mask,
        ):
            assert (photo.format, photo.mode, mask.format, mask.mode) == ("JPEG", "RGB", "PNG", "P")
            assert photo.size == mask.size


@pytest.mark.parametrize("split", ["train", "val"])
def test_sample_shows_its_six_classes_and_no_others(sample, split):
    """Each in both splits: a class that val lacked would have no score."""
    shown = set()
    for mask in find_split("voc", sample, split).masks:
        with Image.open(mask) as image:
            shown |= set(np.unique(image).tolist())
    names = ("background", "aeroplane", "bottle", "bus", "cat", "sheep", "tvmonitor")
    assert shown == {CLASS_NAMES.index(name) for name in names} | {VOID}


def test_sample_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "val.txt").write_text("mine")
    run_script("build_dataset.py", "--sample", "--data_dir", tmp_path)
    assert contents(tmp_path) == {"sample/val.txt": b"mine"}


def test_a_folder_in_the_sample_s_place_is_not_taken_for_it(tmp_path):
    (tmp_path / "sample").mkdir()
    assert "sample is not the built-in sample" in refusal("--sample", "--data_dir", tmp_path)
