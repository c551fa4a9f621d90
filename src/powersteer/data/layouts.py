"""How people lay out pairs: one small class each, found out by looking; a new layout is one more class."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from powersteer.conditions.kinds import FEATURE_SUFFIX
from powersteer.data.rows import Picture, Row
from powersteer.errors import PowersteerError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HELP = (
    "it needs a metadata.jsonl (file_name, conditioning_image_file_name, text), a prompt.json (source, target, "
    "prompt), images/ and conditioning_images/ with the same names, *.tar shards (KEY.image.png, "
    "KEY.conditioning_image.png, KEY.txt), or what datasets' save_to_disk wrote"
)


@dataclass(frozen=True)
class Columns:
    """What a layout with named columns calls them."""

    image: str = "image"
    conditioning_image: str = "conditioning_image"
    text: str = "text"
    generated_text: str = "generated_text"


class Layout(Protocol):
    """One way to lay out pairs."""

    def fits(self, folder: Path) -> bool:
        """Whether a folder looks like it."""
        ...

    def rows(self, folder: Path, columns: Columns) -> Iterator[ReadRow]:
        """Its pairs, in order; a pair that cannot be made says so when it is called, and the next may be whole."""
        ...


ReadRow = Callable[[], Row]


def read_rows(folder: Path, columns: Columns | None = None, faults: list[str] | None = None) -> list[Row]:
    """The pairs of a folder, in whichever layout it has.

    Args:
        folder: The folder.
        columns: What a layout with named columns calls them.
        faults: Where malformed rows are noted and passed over; without it, the first is raised.

    Raises:
        PowersteerError: No layout fits, there are no pairs, or a row is malformed or names a file that is not there;
            row, file and column are named.
    """
    if not folder.is_dir():
        raise PowersteerError(f"there is no folder of pairs {folder}")
    layout = next((layout for layout in LAYOUTS if layout.fits(folder)), None)
    if layout is None:
        raise PowersteerError(f"{folder} holds no pairs that can be read: {HELP}")
    rows: list[Row] = []
    for read in layout.rows(folder, columns or Columns()):
        try:
            rows.append(read())
        except PowersteerError as error:
            if faults is None:
                raise
            faults.append(str(error))
    if not rows and not faults:
        raise PowersteerError(f"{folder} has no rows")
    return rows


def hub_rows(name: str, config_name: str | None, split: str, columns: Columns) -> list[Row]:
    """The pairs of a data set on the Hub, or in a folder that `datasets` can load.

    Args:
        name: ``user/name``.
        config_name: Its configuration, where it has several.
        split: Such as ``train``.
        columns: What it calls its columns.

    Raises:
        PowersteerError: It cannot be loaded, or a column is missing.
    """
    datasets = _datasets(name)
    try:
        table: Any = datasets.load_dataset(name, config_name, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PowersteerError(f"cannot load the data set '{name}' (split {split}): {reason}") from None
    return [read() for read in _table_rows(table, f"{name}/{split}", columns)]


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line, that names files of the folder."""

    file: str
    names: Callable[[Columns], Columns]
    """What a row calls its columns, given the user's names."""

    def fits(self, folder: Path) -> bool:
        """Whether there is the file."""
        return (folder / self.file).exists()

    def rows(self, folder: Path, columns: Columns) -> Iterator[ReadRow]:
        """One a line."""
        path = folder / self.file
        lines = enumerate(_decode(path, path.read_bytes()).splitlines())
        return (partial(self._row, folder, f"{folder.name}[{i}]", line, columns) for i, line in lines if line.strip())

    def _row(self, folder: Path, where: str, line: str, columns: Columns) -> Row:
        row, names = _object(where, line), self.names(columns)
        condition = names.conditioning_image
        if condition not in row and columns.conditioning_image in row:
            condition = columns.conditioning_image  # people write it plainly; `datasets` would take it for text
        image, conditioning_image = (_file(where, row, column, folder) for column in (names.image, condition))
        return Row(where, image, conditioning_image, _texts(row, names.text), _generated(row, names))


def _image_folder(columns: Columns) -> Columns:
    """Hugging Face ImageFolder: pictures in columns that end in ``file_name``."""
    image = "file_name" if columns.image == "image" else f"{columns.image}_file_name"
    return replace(columns, image=image, conditioning_image=f"{columns.conditioning_image}_file_name")


def _controlnet(columns: Columns) -> Columns:
    """ControlNet's tutorial: ``source`` is the condition."""
    return replace(columns, image="target", conditioning_image="source", text="prompt")


class Basenames:
    """``images/`` and ``conditioning_images/`` with the same base names, captions in ``images/*.txt``."""

    def fits(self, folder: Path) -> bool:
        """Whether both folders are there."""
        return (folder / "images").is_dir() and (folder / "conditioning_images").is_dir()

    def rows(self, folder: Path, columns: Columns) -> Iterator[ReadRow]:
        """By name."""
        conditions = {file.stem: file for file in _pictures(folder / "conditioning_images", FEATURE_SUFFIX)}
        for i, image in enumerate(_pictures(folder / "images")):
            yield partial(Basenames._row, f"{folder.name}[{i}]", image, conditions.get(image.stem))

    @staticmethod
    def _row(where: str, image: Path, condition: Path | None) -> Row:
        if condition is None:
            raise PowersteerError(f"{where}: '{image}' has no partner of its name in conditioning_images")
        caption = image.with_suffix(".txt")
        return Row(
            where,
            Picture(str(image), "images", image.read_bytes, image),
            Picture(str(condition), "conditioning_images", condition.read_bytes, condition),
            (_decode(caption, caption.read_bytes()).strip(),) if caption.exists() else (),
        )


class WebDataset:
    """``.tar`` shards: members that share a key, side by side; read in place, nothing is extracted."""

    def fits(self, folder: Path) -> bool:
        """Whether there is a ``.tar``."""
        return any(folder.glob("*.tar"))

    def rows(self, folder: Path, columns: Columns) -> Iterator[ReadRow]:
        """Shard by shard, key by key."""
        for shard in sorted(folder.glob("*.tar")):
            try:
                with tarfile.open(shard, "r:") as tar:
                    members = [member for member in tar if member.isreg()]
            except (tarfile.TarError, OSError) as error:
                raise PowersteerError(f"{shard} is not a readable .tar ({error})") from None
            for key, group in groupby(members, key=lambda member: key_and_kind(member.name)[0]):
                parts: dict[str, tuple[str, Callable[[], bytes]]] = {
                    key_and_kind(m.name)[1]: (m.name, partial(_slice, shard, m.offset_data, m.size)) for m in group
                }
                yield partial(shard_row, str(shard), key, parts, columns, shard)


def shard_row(
    shard: str,
    key: str,
    parts: dict[str, tuple[str, Callable[[], bytes]]],
    columns: Columns,
    file: Path | None = None,
) -> Row:
    """One pair of a shard.

    Args:
        shard: Its name.
        key: What the members' names share.
        parts: The members' names and contents, by what follows the key.
        columns: What the members are called.
        file: The shard, where it is a file of this machine.

    Raises:
        PowersteerError: A picture is missing, or the caption cannot be read.
    """
    where = f"{shard.rpartition('/')[2]}[{key}]"

    def picture(column: str, plain: bool) -> Picture:
        kinds = [column + suffix for suffix in (*PICTURE_SUFFIXES, *(() if plain else (FEATURE_SUFFIX,)))]
        kinds += [suffix[1:] for suffix in PICTURE_SUFFIXES] if plain else []
        found = next((parts[kind] for kind in kinds if kind in parts), None)
        if found is None:
            raise PowersteerError(f"{where}: no member {key}.{column}.png (column {column})")
        return Picture(f"{shard}:{found[0]}", column, found[1], file)

    record = _object(where, parts["json"][1]()) if "json" in parts else {}
    texts = _texts(record, columns.text)
    if "txt" in parts:
        texts = (_decode(where, parts["txt"][1]()).strip(),)
    image, condition = picture(columns.image, True), picture(columns.conditioning_image, False)
    return Row(where, image, condition, texts, _generated(record, columns))


class SavedDataset:
    """What ``datasets.Dataset.save_to_disk`` wrote."""

    def fits(self, folder: Path) -> bool:
        """Whether there is its ``dataset_info.json`` or ``dataset_dict.json``."""
        return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()

    def rows(self, folder: Path, columns: Columns) -> Iterator[ReadRow]:
        """One an example."""
        datasets = _datasets(str(folder))
        if (folder / "dataset_dict.json").exists():
            splits = ", ".join(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
            raise PowersteerError(f"{folder} holds several splits ({splits}): give the folder of one")
        return _table_rows(datasets.load_from_disk(str(folder)), folder.name, columns)


LAYOUTS: tuple[Layout, ...] = (
    JsonLines("metadata.jsonl", _image_folder),
    JsonLines("prompt.json", _controlnet),
    WebDataset(),
    SavedDataset(),
    Basenames(),
)


def _datasets(wanted_by: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise PowersteerError(f"{wanted_by} needs the datasets library: pip install 'powersteer[datasets]'") from None
    return datasets


def _table_rows(table: Any, where: str, columns: Columns) -> Iterator[ReadRow]:
    """Of a table of `datasets`; pictures stay encoded until they are asked for."""
    for column in (columns.image, columns.conditioning_image):
        if column not in table.column_names:
            raise PowersteerError(f"{where}: column '{column}' is missing; there are {table.column_names}")
        table = table.cast_column(column, _datasets(where).Image(decode=False))
    words = table.select_columns([c for c in (columns.text, columns.generated_text) if c in table.column_names])

    def row(i: int) -> Row:
        image, conditioning = (
            Picture(f"{where}[{i}]", column, lambda column=column: _embedded(table[i][column]))
            for column in (columns.image, columns.conditioning_image)
        )
        record = words[i]
        return Row(f"{where}[{i}]", image, conditioning, _texts(record, columns.text), _generated(record, columns))

    return (partial(row, i) for i in range(len(table)))


def _decode(where: Path | str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise PowersteerError(f"{where} is not UTF-8 text: save it as UTF-8") from None


def _texts(row: dict[str, Any], column: str) -> tuple[str, ...]:
    """One caption, or a list of several."""
    given = row.get(column)
    return tuple(str(text) for text in (given if isinstance(given, list) else [given]) if text is not None)


def _generated(row: dict[str, Any], columns: Columns) -> str | None:
    return next(iter(_texts(row, columns.generated_text)), None)


def _object(where: str, text: str | bytes) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        row = None
    if not isinstance(row, dict):
        raise PowersteerError(f"{where}: not a JSON object")
    return row


def _file(where: str, row: dict[str, Any], column: str, folder: Path) -> Picture:
    name = row.get(column)
    if not name:
        raise PowersteerError(f"{where}: column '{column}' is missing")
    path = folder / str(name)
    if not path.is_file():
        raise PowersteerError(f"{where}: '{path}' not found (column {column})")
    return Picture(str(path), column, path.read_bytes, path)


def _pictures(folder: Path, *others: str) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in (*PICTURE_SUFFIXES, *others))


def key_and_kind(name: str) -> tuple[str, str]:
    """``a/001.image.png`` → (``a/001``, ``image.png``): a key ends at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return folder + slash + stem, kind.lower()


def _slice(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _embedded(cell: dict[str, Any]) -> bytes:
    """Of an undecoded picture in `datasets`: its bytes, or those of the file that it names."""
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
