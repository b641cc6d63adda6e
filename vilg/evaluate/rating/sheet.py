"""`vilg eval rating-sheet`: what several systems made, shuffled and without their names, as a page for each rater."""

import argparse
import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageOps

from vilg.errors import UserError
from vilg.evaluate.clip import drawn_pictures
from vilg.evaluate.rating.kinds import KINDS, Kind
from vilg.inference.options import read_lines
from vilg.tokens.files import write_atomically

FORMAT_VERSION = 1
KEY_FILE = "key.json"
LONGEST_SIDE = 1024  # pixels; larger pictures are scaled down
_PURPOSE_ORDER = 0x4E51  # keeps raters' orders apart from every other use of the same seed
Key = tuple[str, ...]


@dataclass(frozen=True)
class Output:
    """What a system made of one input. texts: what a rater reads, in order."""

    picture: Path
    texts: dict[str, str]


def main(argv: Sequence[str]) -> int:
    """Blinded sheets for raters: pages that a browser opens and that save their ratings as JSON or CSV."""
    parser = argparse.ArgumentParser(prog="vilg eval rating-sheet", description=main.__doc__)
    parser.add_argument("kind", choices=KINDS, help="what is rated")
    parser.add_argument(
        "--system", action="append", default=[], metavar="NAME=PATH", required=True,
        help="for pictures a folder of `vilg generate` (the best of each prompt is taken); for captions and answers the "
        "JSONL that `vilg caption` or `vilg answer` prints, or people's; may be given again",
    )  # fmt: skip
    parser.add_argument("--items", type=Path, help="JSONL of what to rate and its category: prompt (or image, question) and category")
    parser.add_argument("--images", type=Path, default=Path(), help="folder that images of captions and answers are relative to")
    parser.add_argument("--raters", type=int, default=1, help="sheets to write, each in another order")
    parser.add_argument("--seed", type=int, default=0, help="seed of names and orders")
    parser.add_argument("--beside", action="store_true", help="pictures in a folder beside the pages instead of inside")
    parser.add_argument("--out", type=Path, required=True, help=f"folder for the pages and {KEY_FILE}, which raters must not see")
    args = parser.parse_args(argv)
    if args.raters < 1 or args.seed < 0:
        raise UserError(f"--raters {args.raters} --seed {args.seed}: at least one rater, and a seed of 0 or more")
    kind = KINDS[args.kind]
    systems = {name: read_system(args.kind, path, args.images) for name, path in _named(args.system).items()}
    categories = read_items(args.items, kind) if args.items else dict.fromkeys(next(iter(systems.values())), None)
    for name, outputs in systems.items():
        if missing := [key for key in categories if key not in outputs]:
            raise UserError(f"--system {name}: has nothing for {' / '.join(missing[0])} ({len(missing)} of {len(categories)} missing)")

    entries = {_entry_name(args.seed, name, key): (name, key) for key in categories for name in systems}
    key_file = {
        "format_version": FORMAT_VERSION,
        "kind": args.kind,
        "seed": args.seed,
        "systems": list(systems),
        "items": {
            entry: {"system": name, **dict(zip(kind.key, key, strict=True)), "category": categories[key]}
            for entry, (name, key) in sorted(entries.items())
        },
    }
    key_file["sheet"] = sheet_id(key_file)
    pictures = _Pictures(args.out / "pictures" if args.beside else None)
    shown = {}
    for entry, (name, key) in entries.items():
        output = systems[name][key]
        shown[entry] = {"id": entry, "picture": pictures.add(output.picture), "texts": list(output.texts.items())}
    for rater in range(args.raters):
        order = order_of(sorted(shown), args.seed, rater)
        page = render(args.kind, key_file["sheet"], [shown[entry] for entry in order], pictures.embedded)
        write_atomically(args.out / f"sheet_{rater + 1}.html", page.encode())
    write_atomically(args.out / KEY_FILE, (json.dumps(key_file, indent=1, ensure_ascii=False) + "\n").encode())
    size = (args.out / "sheet_1.html").stat().st_size / 1e6
    print(f"{len(categories)} items x {len(systems)} systems -> {args.raters} sheets of {size:.1f} MB, {args.out / KEY_FILE}")
    return 0


def read_system(kind: str, path: Path, images: Path) -> dict[Key, Output]:
    """By input, what one system made. Raises UserError naming file and line."""
    found: dict[Key, Output] = {}
    if kind == "pictures":
        for picture, prompt in drawn_pictures(path):
            found.setdefault((prompt,), Output(picture, {"prompt": prompt}))  # the best one comes first
        return found
    for number, entry in read_objects(path, (*KINDS[kind].key, *KINDS[kind].shown), option="--system"):
        key = tuple(entry[field] for field in KINDS[kind].key)
        if key in found:
            raise UserError(f"{path}:{number}: {' / '.join(key)} stands there twice")
        found[key] = Output(images / entry["image"], {field: entry[field] for field in KINDS[kind].shown})
    return found


def read_items(path: Path, kind: Kind) -> dict[Key, str | None]:
    """Category by input. Raises UserError naming file and line."""
    found: dict[Key, str | None] = {}
    for number, entry in read_objects(path, kind.key, option="--items"):
        key = tuple(entry[field] for field in kind.key)
        category = entry.get("category")
        if key in found:
            raise UserError(f"{path}:{number}: {' / '.join(key)} stands there twice")
        if category is not None and not isinstance(category, str):
            raise UserError(f"{path}:{number}: category should be a text, not {category!r}")
        found[key] = category
    return found


def read_objects(path: Path, fields: Sequence[str], *, option: str) -> list[tuple[int, dict[str, Any]]]:
    """(number from 1, object) of each line of a JSONL file; `fields` are texts in each. Raises UserError."""
    expected = f"an object with {', '.join(fields)} a line"
    found = []
    for number, line in read_lines(path, option=option, expected=expected):
        try:
            entry = json.loads(line)
            complete = all(isinstance(entry[field], str) for field in fields)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: expected {expected} ({error!r})") from None
        if not complete:
            raise UserError(f"{path}:{number}: {', '.join(fields)} should be texts")
        found.append((number, entry))
    if not found:
        raise UserError(f"{option} {path}: is empty; expected {expected}")
    return found


def order_of(entries: Sequence[str], seed: int, rater: int) -> list[str]:
    """Entries as one rater sees them: a function of (seed, rater) alone."""
    sequence = np.random.SeedSequence([_PURPOSE_ORDER, seed, rater])
    return [entries[place] for place in np.random.Generator(np.random.Philox(sequence)).permutation(len(entries))]


def sheet_id(key_file: Mapping[str, Any]) -> str:
    """Name of a set of sheets: a hash of what is in its key."""
    content = {name: value for name, value in key_file.items() if name != "sheet"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def render(kind: str, sheet: str, entries: Sequence[Mapping[str, Any]], pictures: Mapping[str, str]) -> str:
    """The page as HTML, whole in itself. pictures: data URLs by name; others lie in the folder `pictures`."""
    environment = Environment(
        loader=PackageLoader("vilg.evaluate.rating", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    data = {
        "format_version": FORMAT_VERSION, "sheet": sheet, "kind": kind, "items": list(entries), "pictures": dict(pictures),
        "criteria": [asdict(criterion) for criterion in KINDS[kind].criteria],
    }  # fmt: skip
    return environment.get_template("sheet.html").render(data=data)


class _Pictures:
    """Pictures without what their files say about themselves, each once; in `folder`, or embedded where it is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.embedded: dict[str, str] = {}
        self._names: dict[Path, str] = {}

    def add(self, path: Path) -> str:
        """Take a picture in; the name that the page knows it by. Raises UserError."""
        if path not in self._names:
            content = _stripped(path)
            name = hashlib.sha256(content).hexdigest()[:16]
            if self.folder is None:
                self.embedded[name] = f"data:image/webp;base64,{base64.b64encode(content).decode()}"
            else:
                write_atomically(self.folder / f"{name}.webp", content)
            self._names[path] = name
        return self._names[path]


def _stripped(path: Path) -> bytes:
    """WebP without loss and without metadata, which would tell a rater how a picture came about."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            content = io.BytesIO()
            image.save(content, format="WEBP", lossless=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from None
    return content.getvalue()


def _entry_name(seed: int, system: str, key: Key) -> str:
    return hashlib.sha256(json.dumps([seed, system, *key]).encode()).hexdigest()[:12]


def _named(given: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in found:
            raise UserError(f"--system {text}: give NAME=PATH, each name once")
        found[name] = Path(path)
    return found
