"""Rows of what is not JSON lines: CSV, TSV, Parquet, a JSON array, a dataset of the Hub.

    tables.read(Path("rows.csv"))                  # an iterator of rows, or None for JSON lines
    tables.hub_dataset("hf:owner/name", "--data")  # downloaded by the package datasets

data.read_rows uses both.
"""

import contextlib
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import disk


def read(path: Path) -> Iterable | None:
    """The rows of a file by its suffix, bad ones as a ValueError; None if it is JSON lines."""
    if path.suffix in (".csv", ".tsv"):
        return _csv(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".json" and (text := disk.read_text(path)).lstrip()[:1] == "[":
        try:
            return disk.parse_json(text)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
    return None


def _csv(path: Path) -> Iterator[dict | ValueError]:
    """An empty cell is None. Other cells are texts, but for lists, objects and the difficulty."""
    csv.field_size_limit(2**30)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","):
                if None in row:
                    yield ValueError(f"more cells than the {len(row) - 1} columns of the header")
                else:
                    yield {k: _cell(k, v) for k, v in row.items()}
    except (csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: {e}") from None


def _cell(column: str, text: str | None):
    if not text:
        return None
    if text[0] in "[{" or column == "difficulty":
        with contextlib.suppress(ValueError):  # then it is a text
            return disk.parse_json(text)
    return text


def _parquet(path: Path) -> list[dict]:
    try:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    except ImportError:
        raise ValueError(f"{path}: pip install pyarrow, which reads it") from None
    except Exception as e:  # a damaged file
        raise ValueError(f"{path}: {first_line(e)}") from None
    return [{k: None if v != v else v for k, v in row.items()} for row in rows]  # NaN is no value


def hub_dataset(source: str, flag: str) -> Iterable[dict]:
    """The rows of hf:owner/name[/config][:split]; the default split is train."""
    name, _, split = source.removeprefix("hf:").partition(":")
    owner, *names = name.split("/")
    if len(names) not in (1, 2):
        raise ValueError(f"{flag} {source}: expected hf:owner/name, hf:owner/name/config, :split")
    try:
        import datasets

        return datasets.load_dataset(f"{owner}/{names[0]}", *names[1:], split=split or "train")
    except ImportError:
        raise ValueError(f"{flag} {source}: pip install datasets, which reads it") from None
    except Exception as e:  # whatever fails in it, the user sees one line
        raise ValueError(f"{flag} {source}: {type(e).__name__}: {first_line(e)}") from None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
