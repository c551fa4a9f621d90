"""How people lay out pairs: one small class each, found out by looking; a new layout is one more class."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

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
        return Row(where, image, conditioning_image, _text(row, names.text))


def _image_folder(columns: Columns) -> Columns:
    """Hugging Face ImageFolder: pictures in columns that end in ``file_name``."""
    image = "file_name" if columns.image == "image" else f"{columns.image}_file_name"
    return Columns(image, f"{columns.conditioning_image}_file_name", columns.text)


def _controlnet(_: Columns) -> Columns:
    """ControlNet's tutorial: ``source`` is the condition."""
    return Columns("target", "source", "prompt")


class Basenames:
    """``images/`` and ``conditioning_images/`` with the same base names, captions in ``images/*.txt``."""

    def fits(self, folder: Path) -> bool:
        """Whether both folders are there."""
        return (folder / "images").is_dir() and (folder / "conditioning_images").is_dir()

    def rows(self, folder: Path, columns: Columns) -> Iterator[ReadRow]:
        """By name."""
        conditions = {file.stem: file for file in _pictures(folder / "conditioning_images")}
        for i, image in enumerate(_pictures(folder / "images")):
            yield partial(Basenames._row, f"{folder.name}[{i}]", image, conditions.get(image.stem))

    @staticmethod
    def _row(where: str, image: Path, condition: Path | None) -> Row:
        if condition is None:
            raise PowersteerError(f"{where}: '{image}' has no partner of its name in conditioning_images")
        caption = image.with_suffix(".txt")
        return Row(
            where,
            Picture(str(image), "images", image.read_bytes),
            Picture(str(condition), "conditioning_images", condition.read_bytes),
            _decode(caption, caption.read_bytes()).strip() if caption.exists() else None,
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
            for key, group in groupby(members, key=lambda member: _key_and_kind(member.name)[0]):
                parts = {_key_and_kind(member.name)[1]: member for member in group}
                yield partial(WebDataset._row, shard, key, parts, columns)

    @staticmethod
    def _row(shard: Path, key: str, parts: dict[str, tarfile.TarInfo], columns: Columns) -> Row:
        where = f"{shard.name}[{key}]"

        def bytes_of(member: tarfile.TarInfo) -> partial[bytes]:
            return partial(_slice, shard, member.offset_data, member.size)

        def picture(column: str, plain: bool) -> Picture:
            kinds = [column + suffix for suffix in PICTURE_SUFFIXES]
            kinds += [suffix[1:] for suffix in PICTURE_SUFFIXES] if plain else []
            member = next((parts[kind] for kind in kinds if kind in parts), None)
            if member is None:
                raise PowersteerError(f"{where}: no member {key}.{column}.png (column {column})")
            return Picture(f"{shard}:{member.name}", column, bytes_of(member))

        text = None
        if "txt" in parts:
            text = _decode(where, bytes_of(parts["txt"])()).strip()
        elif "json" in parts:
            text = _text(_object(where, bytes_of(parts["json"])()), columns.text)
        return Row(where, picture(columns.image, True), picture(columns.conditioning_image, False), text)


class SavedDataset:
    """What ``datasets.Dataset.save_to_disk`` wrote."""

    def fits(self, folder: Path) -> bool:
        """Whether there is its ``dataset_info.json`` or ``dataset_dict.json``."""
        return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()

    def rows(self, folder: Path, columns: Columns) -> Iterator[ReadRow]:
        """One an example; pictures stay encoded until they are asked for."""
        try:
            import datasets
        except ImportError:
            raise PowersteerError(f"{folder} needs the datasets library: pip install 'powersteer[datasets]'") from None
        if (folder / "dataset_dict.json").exists():
            splits = ", ".join(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
            raise PowersteerError(f"{folder} holds several splits ({splits}): give the folder of one")
        table: Any = datasets.load_from_disk(str(folder))
        for column in (columns.image, columns.conditioning_image):
            if column not in table.column_names:
                raise PowersteerError(f"{folder}: column '{column}' is missing; there are {table.column_names}")
            table = table.cast_column(column, datasets.Image(decode=False))
        texts = table[columns.text] if columns.text in table.column_names else None

        def row(i: int) -> Row:
            where = f"{folder.name}[{i}]"
            image, conditioning = (
                Picture(where, column, lambda column=column: _embedded(table[i][column]))
                for column in (columns.image, columns.conditioning_image)
            )
            return Row(where, image, conditioning, None if texts is None else str(texts[i]))

        return (partial(row, i) for i in range(len(table)))


LAYOUTS: tuple[Layout, ...] = (
    JsonLines("metadata.jsonl", _image_folder),
    JsonLines("prompt.json", _controlnet),
    WebDataset(),
    SavedDataset(),
    Basenames(),
)


def _decode(where: Path | str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise PowersteerError(f"{where} is not UTF-8 text: save it as UTF-8") from None


def _text(row: dict[str, Any], column: str) -> str | None:
    text = row.get(column)
    return None if text is None else str(text)


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
    return Picture(str(path), column, path.read_bytes)


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)


def _key_and_kind(name: str) -> tuple[str, str]:
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
