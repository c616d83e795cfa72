"""Files: checked JSON in, and writes that survive a kill at any moment.

A file is written under a temporary name and renamed, so a kill leaves the old or the new one; a
folder is sealed with manifest.json, the sha256 of each of its files.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import hosts

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there
    fcntl = None

# ----------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def writing(path: Path):
    """A disk that is full or read-only stops the script with one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise SystemExit(f"cannot write {path}: {why}; make room or choose another --out; the "
                         "checkpoints are intact") from error


def sync(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folder, and syncs no file that was opened to read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path for a new file or folder, which then takes the place of `target`."""
    temporary, old = (target.with_name(f".{word}-{target.name}") for word in ("tmp", "old"))
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if target.is_dir():  # rename cannot replace a folder; tidy() repairs a kill between the two
            os.rename(target, old)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        tidy(target.parent, re.escape(target.name))


def tidy(folder: Path, names: str) -> None:
    """Remove what interrupted writes left, and put back what they were about to replace.

    names: a pattern of the files and folders that are ours.
    """
    for path in [*folder.glob(".old-*"), *folder.glob(".tmp-*")]:
        target = path.with_name(path.name[5:])
        if not re.fullmatch(names, target.name):  # a file of the user's
            continue
        if path.name.startswith(".old-") and not target.exists():
            os.rename(path, target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, finds either the old or the new content."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any) -> None:
    """replace_file() with a value as JSON."""
    replace_file(Path(path), (json.dumps(plain(value), indent=2) + "\n").encode())


@contextlib.contextmanager
def lock(folder: Path):
    """Allow one process at a time in a folder; the kernel unlocks it when the process dies."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SystemExit(f"{folder} is in use by process {file.read()}: stop that one, or "
                             "choose another folder with --out") from None
        with writing(folder):
            (folder / ".lock").write_text(str(os.getpid()))
        yield


# -------------------------------------------------------------------------------------------- JSON


def plain(value):
    """Plain Python for JSON, which has no NaN and no infinity: those become null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def read_text(path: str | Path) -> str:
    """A file as UTF-8; ValueError names the file."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None


def parse_json(text: str | bytes) -> Any:
    """A JSON value; ValueError for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"cannot be read as JSON ({e})") from None


def read_json(path: str | Path) -> dict:
    """The JSON object in a file; ValueError names the file. `json_value` checks its values."""
    text = read_text(path)
    try:
        content = parse_json(text)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def json_value(values: dict, key: str, kind: type, default, source: str | Path, low=1e-12,
               high=2**24):
    """values[key], or the default if it is absent or null; the default `...` makes it required.

    ValueError unless it is a `kind`: a number from `low` to `high` (an int is a float too, a bool
    is no number), or a text that UTF-8 and file names can hold.
    """
    value = values.get(key)
    if value is None and default is not ...:
        return default
    is_number = kind in (int, float)
    limits = f" from {math.ceil(low) if kind is int else low:g} to {high}" if is_number else ""
    right = isinstance(value, (int, float) if kind is float else kind)
    right = right and (kind is bool or not isinstance(value, bool))
    right = right and not (kind is str and re.search("[\0\ud800-\udfff]", value))
    if not right or is_number and not low <= value <= high:
        raise ValueError(f"{source}: {key} is {value!r:.60}, expected {kind.__name__}{limits}")
    return value


def to_jsonl(rows: Iterable[dict]) -> bytes:
    """One line per row, in UTF-8; half a surrogate pair becomes an escape sequence."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return lines.encode(errors="backslashreplace")


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value) of each line that is not blank; of a bad line the ValueError."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    with file:
        for n, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = parse_json(line.decode("utf-8-sig"))
                except ValueError as error:
                    row = error
                yield n, row


def good_rows(path: str | Path, **types: type | tuple) -> list[dict]:
    """The objects of a JSONL file that have all these keys, with values of these types.

    Other lines, such as a killed run's torn last one, are left out. Numbers must be finite and 0 or
    more. A file that does not exist has no rows.
    """

    def fits(value, kind) -> bool:
        right = type(value) in (kind if isinstance(kind, tuple) else (kind,))  # True is no int
        return right and (type(value) not in (int, float) or 0 <= value < 2**53)

    rows = [row for _, row in read_jsonl(path)] if Path(path).exists() else []
    return [row for row in rows if isinstance(row, dict)
            and all(key in row and fits(row[key], kind) for key, kind in types.items())]


# ----------------------------------------------------------------------------- checksums and seals


def checksum(rows: Iterable) -> str:
    """A checksum of JSON values, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def file_checksum(path: Path) -> str:
    """The checksum of a file up to 256 MiB; of a larger one, of 64 pieces of a MiB and its size."""
    size, digest = path.stat().st_size, hashlib.sha256()
    n_pieces, piece = (64, 2**20) if size > 2**28 else (1, size)
    with open(path, "rb") as file:
        for n in range(n_pieces):
            file.seek((size - piece) * n // 63)  # the last one ends where the file ends
            digest.update(file.read(piece))
    return f"{digest.hexdigest()[:16]} ({n_pieces} x {piece:,} of {size:,} bytes)"


def _checksums(directory: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            name = path.relative_to(directory).as_posix()
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def publish(target: Path, write: Callable[[Path | None], None]) -> None:
    """Let `write` fill a folder, then seal it with a manifest: it appears whole or not at all."""
    if hosts.index > 0:
        write(None)  # helps to gather arrays that are split over processes
        return
    with writing(target), replacing(target) as temporary:
        temporary.mkdir()
        write(temporary)
        sums = _checksums(temporary)
        write_json(temporary / "manifest.json", {"name": target.name, "sha256": sums})


def find_change(directory: Path) -> str | None:
    """The first file that differs from the folder's manifest, and how; None if all are as sealed.

    Notes (*.md) and hidden files may change or be added, as a hub or a file manager does.
    """
    try:
        file = directory / "manifest.json"
        sealed = json_value(read_json(file), "sha256", dict, ..., file)
        found = _checksums(directory)
    except (OSError, ValueError) as error:
        return str(error)
    if not sealed:
        return f"{file} lists no files"
    for name in sorted({*found, *sealed} - {"manifest.json"}):
        if found.get(name) != sealed.get(name) and not re.search(r"(^|/)\.|\.md$", name):
            how = "has changed since it was saved" if name in sealed else "is not in its manifest"
            return f"{name} {how}"
    return None


def verify(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None: find_change(), and it must have its own name."""
    if wrong := find_change(checkpoint):
        return wrong
    name = read_json(checkpoint / "manifest.json").get("name")
    return None if name == checkpoint.name else f"it was saved as {name!r:.60}"
