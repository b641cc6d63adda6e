"""Where pairs come from: each source becomes a stream of `Found`, raw fields not yet looked at.

- a folder of img2dataset shards, or one `.tar`; `NAME_stats.json` beside a shard says how many pairs it should hold;
- a folder of images (searched deeply) with `NAME.txt`, `NAME.json` beside `NAME.jpg|png|webp`;
- a table of captions (`.csv`, `.tsv`, `.jsonl`, or `.json` with a list of objects), images in a folder;
- a `.json` in the form of COCO's captions (`images`, `annotations`) or of Karpathy's splits (`sentences`);
- a table without a column of captions but with `question` and `answer` (or `answers`, a list), as `vilg eval vqa` reads.

Neighbouring rows of one image, and a row with a list, become one pair with several captions. A question with its answer
counts as the caption `question answer`, so that filters and the text tokenizer see it; training reads `questions` of the
JSON.
"""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vilg.config.marked import did_you_mean
from vilg.data.shards import IMAGE_FIELDS, RAW_FIELDS, ShardReader, index_shard
from vilg.errors import UserError

Text = TypeVar("Text")  # a caption, or a question with its answer

TABLES = (".csv", ".tsv", ".jsonl", ".json")
_IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "filepath", "file", "path", "img", "image_id")
_CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "title", "alt_text", "description")


@dataclass(frozen=True)
class Found:
    """A pair of a source. fault: (reason, detail) where the source itself knows that it cannot be used."""

    shard: str
    key: str
    fields: dict[str, bytes]
    fault: tuple[str, str] | None = None


@dataclass(frozen=True)
class Table:
    """How tables are read. images: folder of their images (default: the table's own); columns: guessed without a name."""

    images: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None


@dataclass
class Totals:
    """What sources say about themselves. expected: pairs, as far as known; notes: contradictions, for the report."""

    expected: int = 0
    notes: list[str] = field(default_factory=list)


def open_source(source: Path, table: Table, totals: Totals) -> Iterator[Found]:
    """The pairs of one source. Raises UserError if it is none, now or where a fault turns up while reading."""
    if source.is_file() and source.suffix == ".tar":
        return _shards([source], totals)
    if source.is_file() and source.suffix.lower() in TABLES:
        return _table(source, table)
    if source.is_dir():
        tars = sorted(source.glob("*.tar"))
        return _shards(tars, totals) if tars else _folder(source, totals)
    raise UserError(
        f"{source}: expected a folder of img2dataset shards, a .tar file, a folder of images, or a table of captions "
        f"({', '.join(TABLES)})"
    )


def _shards(shards: Sequence[Path], totals: Totals) -> Iterator[Found]:
    promised = {shard: _successes(shard) for shard in shards}
    totals.expected += sum(count or 0 for count in promised.values())
    return itertools.chain.from_iterable(_shard(shard, promised[shard], totals) for shard in shards)


def _successes(shard: Path) -> int | None:
    """Pairs that img2dataset says it wrote to a shard; None if it says nothing."""
    stats = shard.with_name(f"{shard.stem}_stats.json")
    if not stats.is_file():
        return None
    try:
        count = json.loads(stats.read_text(encoding="utf-8"))["successes"]
        if type(count) is not int or count < 0:
            raise ValueError(f"successes is {count!r}")
        return count
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{stats}: is no statistics file of img2dataset ({error!r}); delete it or repair it") from None


def _shard(shard: Path, promised: int | None, totals: Totals) -> Iterator[Found]:
    with ShardReader(shard, index_shard(shard, RAW_FIELDS, sha256="")) as reader:
        if promised is not None and promised != len(reader):
            totals.notes.append(f"{shard} holds {len(reader)} pairs, but {shard.stem}_stats.json says {promised}")
        for number in range(len(reader)):
            yield Found(f"{shard.parent.name}/{shard.name}", reader.key(number), reader.read(number))


def _folder(folder: Path, totals: Totals) -> Iterator[Found]:
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_FIELDS and p.is_file())
    if not images:
        raise UserError(f"{folder}: holds neither .tar shards nor images ({', '.join(IMAGE_FIELDS)})")
    totals.expected += len(images)
    return (_image_file(folder, path) for path in images)


def _image_file(folder: Path, path: Path) -> Found:
    fields = {path.suffix.lower().lstrip("."): path.read_bytes()}
    for name in ("txt", "json"):
        if (beside := path.with_suffix(f".{name}")).is_file():
            fields[name] = beside.read_bytes()
    return Found(folder.name, path.relative_to(folder).as_posix(), fields)


def _table(source: Path, table: Table) -> Iterator[Found]:
    images = table.images if table.images is not None else source.parent
    if not images.is_dir():
        raise UserError(f"--images {images} is no folder")
    root = images.resolve()
    rows = _rows(source)
    if rows is not None and table.caption_column is None:
        first = next(rows, None)
        rows = itertools.chain([] if first is None else [first], rows)
        if first is not None and _asks(first[1]):
            asked = _grouped(_questions(rows, source, table))
            return (_pair(source, root, name, [*map(as_caption, each)], each) for name, each in asked)
    return (_pair(source, root, name, captions) for name, captions in read_captions(source, table))


def as_caption(question: dict[str, str]) -> str:
    """A question with its answer, as filters and the text tokenizer see it."""
    return f"{question['question']} {question['answer']}"


def _asks(row: Any) -> bool:
    """Whether a table's row has a question and its answer rather than a caption."""
    asks = isinstance(row, dict) and "question" in row and ("answer" in row or "answers" in row)
    return asks and not any(name in row for name in _CAPTION_COLUMNS)


def _questions(
    rows: Iterable[tuple[int, Any]], source: Path, table: Table
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(image, questions with an answer each) of each row."""
    column = None
    for line, row in rows:
        if not _asks(row):
            raise UserError(f"{source}:{line}: expected image, question and answer, as in the rows before")
        column = column or _column(row, source, table.image_column, _IMAGE_COLUMNS, "--image-column")
        image, question = row.get(column), row["question"]
        answers = row["answers"] if "answers" in row else [row["answer"]]
        texts = answers if isinstance(answers, list) else [None]
        if not all(isinstance(text, str) for text in (image, question, *texts)):
            raise UserError(f"{source}:{line}: {column}, question and answer should be text, answers a list of texts")
        yield image, [{"question": question, "answer": text} for text in texts]


def read_captions(source: Path, table: Table) -> Iterator[tuple[str, list[str]]]:
    """(image, captions) of a table in any of its forms, as they stand there. Raises UserError."""
    if not source.exists():
        raise UserError(f"{source}: there is no such file")
    if source.suffix.lower() not in TABLES or not source.is_file():
        raise UserError(f"{source} is no table of captions ({', '.join(TABLES)})")
    rows = _rows(source)
    return _grouped(_json_rows(source, table) if rows is None else _named(rows, source, table))


def _rows(source: Path) -> Iterator[tuple[int, Any]] | None:
    """(line, row) of a table that has rows; None for the other forms."""
    if source.suffix.lower() == ".jsonl":
        return _json_lines(source)
    return None if source.suffix.lower() == ".json" else _csv_lines(source)


def _grouped(rows: Iterable[tuple[str, list[Text]]]) -> Iterator[tuple[str, list[Text]]]:
    """(image, captions or questions) with those of neighbouring rows of one image joined."""
    for name, group in itertools.groupby(rows, key=lambda row: row[0]):
        yield name, [text for _, texts in group for text in texts]


def _pair(
    source: Path, root: Path, name: str, captions: list[str], questions: Sequence[dict[str, str]] = ()
) -> Found:
    """Reads the image; a table may come from anywhere, so it reads nothing outside the folder of images."""
    try:
        path = (root / name).resolve()
        suffix = path.suffix.lower().lstrip(".")
        if not path.is_relative_to(root):
            return Found(source.name, name, {}, ("outside the images", f"{name!r} leads outside {root}; see --images"))
        if suffix not in IMAGE_FIELDS:
            return Found(source.name, name, {}, ("no image", f"{name!r} is none of {', '.join(IMAGE_FIELDS)}"))
        image = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        return Found(source.name, name, {}, ("no image", f"{name!r}: {error}; see --images"))
    fields = {suffix: image, "txt": _bytes((captions or [""])[0])}
    meta = {"captions": captions} if len(captions) > 1 else {}
    if meta := meta | ({"questions": questions} if questions else {}):
        fields["json"] = json.dumps(meta).encode()
    return Found(source.name, name, fields)


def _bytes(text: str) -> bytes:
    """The bytes of a caption as they were; what was no UTF-8 in a table is none here, and is counted later."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _csv_lines(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a table with a heading."""
    csv.field_size_limit(1 << 20)
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if source.suffix.lower() == ".tsv" else ",")
        try:
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            raise UserError(f"{source}:{rows.line_num}: no CSV: {error}") from None


def _json_lines(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_object(line, f"{source}:{number}")


def _json_object(text: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object with an image and its caption, found {type(value).__name__}")
    return value


def _json_rows(source: Path, table: Table) -> Iterator[tuple[str, list[str]]]:
    """COCO, Karpathy's splits, or a list of objects."""
    try:
        data = json.loads(source.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: no JSON: {error}") from None
    try:
        if isinstance(data, list):
            return _named(enumerate(data, 1), source, table)
        if "annotations" in data:
            captions: dict[Any, list[str]] = {}
            for annotation in data["annotations"]:
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
            return iter([(image["file_name"], captions.get(image["id"], [])) for image in data["images"]])
        return iter([
            (str(Path(image.get("filepath", ""), image["filename"])), [each["raw"] for each in image["sentences"]])
            for image in data["images"]
        ])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source}: is neither COCO's captions (images with id and file_name; annotations with image_id and "
            f"caption) nor a list of objects: {error!r}"
        ) from None


def _named(
    rows: Iterable[tuple[int, dict[str, Any]]], source: Path, table: Table
) -> Iterator[tuple[str, list[str]]]:
    """(image, captions) of each row; the columns are those of `table` or the first known name in the first row."""
    names: tuple[str, str] | None = None
    for line, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{source}: entry {line} is no object with an image and its caption")
        if names is None:
            names = (
                _column(row, source, table.image_column, _IMAGE_COLUMNS, "--image-column"),
                _column(row, source, table.caption_column, _CAPTION_COLUMNS, "--caption-column"),
            )
        image, caption = row.get(names[0]), row.get(names[1])
        captions = [caption] if isinstance(caption, str) else caption
        texts = isinstance(captions, list) and all(isinstance(c, str) for c in captions)
        if not isinstance(image, str) or not texts:
            raise UserError(
                f"{source}:{line}: {names[0]} should be text and {names[1]} text or a list of texts, "
                f"found {image!r:.60} and {caption!r:.60}"
            )
        yield image, captions


def _column(row: dict, source: Path, wanted: str | None, known: Sequence[str], flag: str) -> str:
    columns = [name for name in row if isinstance(name, str)]
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"{source} has no {flag} {wanted!r}{did_you_mean(wanted, columns)}; it has {columns}")
        return wanted
    found = next((name for name in known if name in columns), None)
    if found is None:
        raise UserError(f"{source}: none of its columns {columns} is known; name one with {flag}")
    return found
