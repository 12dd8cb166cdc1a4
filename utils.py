"""What all scripts share: JSON, whole files, history and logs."""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model import UserError, read_text, replacing

ROOT = Path(__file__).resolve().parent


class RunFailed(RuntimeError):
    """A run that cannot go on through no fault of the input. Scripts print it as one line and exit with status 1."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that PyTorch, on any device, or NumPy has run out of memory."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder that a flag names. Raises UserError where something else stands in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{flag}: {folder} cannot be a folder, for a file is in the way") from None


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield what os.walk() does in alphabetical order, then the same below links to folders; each real folder once."""
    seen, waiting = set(), [folder]
    while waiting:
        for here, folders, files in os.walk(waiting.pop(0)):
            if (real := os.path.realpath(here)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            yield Path(here), folders, sorted(files)
            waiting += [path for name in folders if (path := Path(here, name)).is_symlink()]


def grouped(ids: list[str], pattern: str, source: str = "--group") -> list[list[str]]:
    """Return the ids for which a regular expression captures the same text, or, without groups of its own, matches it.

    Raises UserError for one that is not valid or does not match every id, naming the source that it is from.
    """
    groups: dict[object, list[str]] = {}
    for id_ in ids:
        try:
            match = re.search(pattern, id_)
        except re.error as error:
            raise UserError(f"{source} {pattern!r} is not a regular expression: {error}") from None
        if match is None:
            raise UserError(f"{source} {pattern!r} does not match {id_!r}; it must match every name")
        groups.setdefault(match.groups() or match[0], []).append(id_)
    return list(groups.values())


def table_text(text: str) -> str:
    """Return a text as a cell of a Markdown table can hold it."""
    return " ".join(text.split()).replace("\\", r"\\").replace("|", r"\|")


def read_json(path: str | Path, *, if_absent: str) -> Any:
    """Read a JSON file. Raises UserError naming the file; if_absent says what to do where there is none."""
    path = Path(path)
    try:
        return json.loads(read_text(path), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise UserError(f"no {path}; {if_absent}") from None
    except (ValueError, RecursionError) as error:  # JSON, UTF-8, a repeated key
        raise UserError(f"{path} is not valid JSON: {error}") from None


def is_number(value: Any) -> bool:
    """Return whether a value from JSON is a finite number, and no truth value."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN too


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := {key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1}:
        raise ValueError(f"{', '.join(sorted(repeated))} given twice")
    return dict(pairs)


def save_picture(picture: Any, path: Path) -> None:
    """Write a Pillow image as a PNG, whole or not at all."""
    level = 6 if picture.mode == "P" else 1  # a photo takes three times as long at 6 and becomes no smaller
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=level)


def save_figure(figure: Any, path: Path, *, dpi: int = 100) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # that the font has not
        figure.savefig(temporary, format="png", dpi=dpi)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write value as indented JSON, whole or not at all; NaN and infinities are an error, None is null."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_history(model_dir: Path) -> list[dict]:
    """Read the epochs of history.jsonl, oldest first; [] where there is none. Raises UserError for a damaged one."""
    path = model_dir / "history.jsonl"
    history: list[dict] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            record = json.loads(line)
            sound = record["epoch"] == number and all(v is None or is_number(v) for v in record["val"].values())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise UserError(f"{path} is damaged in line {number}; mend or remove the line")
        history.append(record)
    return history


def write_history(model_dir: Path, history: list[dict]) -> None:
    write_text(model_dir / "history.jsonl", "".join(json.dumps(epoch, allow_nan=False) + "\n" for epoch in history))


def set_logger(log_file: Path) -> None:
    """Log to the terminal, and with times to log_file."""
    logging.raiseExceptions = False  # a line that cannot be written is dropped
    to_file = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")  # folders may have any name
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [to_file, logging.StreamHandler(sys.stdout)]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers, force=True)
