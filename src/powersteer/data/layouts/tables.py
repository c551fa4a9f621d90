"""Data sets of Hugging Face's `datasets`: what `save_to_disk` wrote, and those of the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, reason_of
from powersteer.core.text import read_object
from powersteer.data.layouts.base import Columns, ReadRow, Seen, generated_of, listed, texts_of
from powersteer.data.rows import Picture, Row

INFO, SPLITS_INFO = "dataset_info.json", "dataset_dict.json"


class SavedDataset:
    """What ``datasets.Dataset.save_to_disk`` wrote."""

    def fits(self, folder: Path) -> bool:
        """Whether there is its ``dataset_info.json`` or ``dataset_dict.json``."""
        return is_file(folder / INFO) or is_file(folder / SPLITS_INFO)

    def rows(self, folder: Path, columns: Columns, seen: Seen) -> Iterator[ReadRow]:
        """One an example."""
        datasets = _datasets(str(folder))
        if is_file(folder / SPLITS_INFO):
            splits = read_object(folder / SPLITS_INFO).get("splits")
            named = ", ".join(map(str, splits)) if isinstance(splits, list) else "unnamed"
            raise PowersteerError(f"{folder} holds several splits ({named}): give the folder of one")
        try:
            table = datasets.load_from_disk(str(folder))
            table.data.table.validate(full=True)  # Arrow itself believes what a damaged file says of its lengths
        except Exception as error:  # of json, pyarrow, or datasets' own code
            raise PowersteerError(
                f"{folder} is not a whole saved data set ({_reason(error)}): save it again with save_to_disk"
            ) from None
        for file in folder.iterdir():
            if file.suffix in (".arrow", ".json"):
                seen.take(file)
        return table_rows(table, folder.name, columns, seen)


def hub_table(name: str, config_name: str | None, split: str) -> Any:
    """A data set on the Hub, or in a folder that `datasets` can load.

    Raises:
        PowersteerError: It cannot be loaded.
    """
    try:
        return _datasets(name).load_dataset(name, config_name, split=split)
    except PowersteerError:
        raise
    except Exception as error:  # of the network, the Hub, a builder or its parsers
        raise PowersteerError(f"cannot load the data set '{name}' (split {split}): {_reason(error)}") from None


def table_rows(table: Any, where: str, columns: Columns, seen: Seen) -> Iterator[ReadRow]:
    """The rows of a table, each as a function that reads it; pictures stay encoded until they are asked for.

    Raises:
        PowersteerError: A column of pictures is missing, or holds none.
    """
    there: list[str] = list(table.column_names)
    seen.columns.update(there)
    cells: dict[str, Any] = {}
    for column in (columns.image, columns.conditioning_image):
        if column not in there:
            raise PowersteerError(f"{where}: column '{column}' is missing; there are {listed(there)}")
        try:
            encoded = _datasets(where).Image(decode=False)
            cells[column] = table.select_columns([column]).cast_column(column, encoded)
        except Exception:  # pyarrow's, of a type that no picture has
            kind = getattr(table.features[column], "dtype", type(table.features[column]).__name__)
            raise PowersteerError(f"{where}: column '{column}' holds no pictures, but {kind}") from None
    named = [column for column in (columns.text, columns.generated_text) if column in there]
    words = table.select_columns(named) if named else None  # of no columns, `datasets` has no rows either
    return (partial(_row, f"{where}[{i}]", i, cells, words, columns, there) for i in range(len(table)))


def _row(where: str, i: int, cells: dict[str, Any], words: Any, columns: Columns, there: list[str]) -> Row:
    image, conditioning = (
        Picture(where, column, partial(_embedded, where, column, cells[column], i)) for column in cells
    )
    try:
        record: dict[str, Any] = {} if words is None else words[i]
    except Exception as error:  # pyarrow's, of a damaged file
        raise PowersteerError(f"{where} cannot be read: {_reason(error)}") from None
    texts = texts_of(where, record, columns.text)
    lacks = f"column '{columns.text}' is empty" if columns.text in there else _no_column(columns.text, there)
    return Row(where, image, conditioning, texts, generated_of(where, record, columns), "" if texts else lacks)


def _no_column(column: str, there: list[str]) -> str:
    return f"no column '{column}', but {listed(there)}"


def _embedded(where: str, column: str, cells: Any, i: int) -> bytes:
    """The bytes of an undecoded picture, or of the file that it names."""
    try:
        cell: Any = cells[i][column]
    except Exception as error:
        raise PowersteerError(f"{where}: column '{column}' cannot be read: {_reason(error)}") from None
    content, path = (None, None) if cell is None else (cell["bytes"], cell["path"])
    if content is not None:
        return content
    if path is None:
        raise PowersteerError(f"{where}: column '{column}' is empty: there is no picture")
    return Path(path).read_bytes()


def _datasets(wanted_by: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise PowersteerError(f"{wanted_by} needs the datasets library: pip install 'powersteer[datasets]'") from None
    return datasets


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {reason_of(error)}"
