"""`vilg eval rating-tally`: means with intervals from filled sheets, by system and category, and the raters' agreement."""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vilg.errors import UserError
from vilg.evaluate.rating.agreement import RESAMPLES, equal_pairs, krippendorff_alpha, mean_interval
from vilg.evaluate.rating.kinds import KINDS, Criterion
from vilg.evaluate.rating.sheet import FORMAT_VERSION, KEY_FILE, sheet_id
from vilg.tokens.files import write_atomically

Ratings = dict[str, dict[str, int]]  # entry -> criterion -> value
INTERVAL = f"95 % by {RESAMPLES:,} resamples of the items"


def tally(key: Mapping[str, Any], ratings: Mapping[str, Ratings]) -> dict[str, Any]:
    """Figures of all raters together. key: of the sheets; ratings: by rater.

    An item's value is the mean over its raters, a system's the mean over its items, so that an item that more people
    rated does not weigh more. Differences are between the systems' values of the same item.
    """
    kind = KINDS[key["kind"]]
    by_input: dict[tuple[str, ...], dict[str, str]] = {}  # what was given -> system -> entry
    for entry, item in key["items"].items():
        by_input.setdefault(tuple(item[field] for field in kind.key), {})[item["system"]] = entry
    categories = sorted({item["category"] for item in key["items"].values() if item["category"] is not None})
    first, *others = key["systems"]
    result: dict[str, Any] = {"systems": {name: {} for name in key["systems"]}, "agreement": {}, "differences": {}}
    for criterion in kind.criteria:
        given = {entry: [one[entry][criterion.name] for one in ratings.values() if entry in one] for entry in key["items"]}
        values = {entry: sum(each) / len(each) for entry, each in given.items() if each}
        for system, figures in result["systems"].items():
            entries = [each[system] for each in by_input.values() if each[system] in values]
            figures[criterion.name] = _figure([values[entry] for entry in entries])
            for category in categories:
                inside = [values[entry] for entry in entries if key["items"][entry]["category"] == category]
                figures.setdefault("categories", {}).setdefault(category, {})[criterion.name] = _figure(inside)
        for other in others:
            pairs = [(each[first], each[other]) for each in by_input.values()]
            apart = [values[a] - values[b] for a, b in pairs if a in values and b in values]
            result["differences"].setdefault(f"{first} - {other}", {})[criterion.name] = _figure(apart)
        units = list(given.values())
        result["agreement"][criterion.name] = {
            "alpha": krippendorff_alpha(units, criterion.level),
            "level": criterion.level,
            "equal_pairs": equal_pairs(units),
        }
    return result


def _figure(values: Sequence[float]) -> dict[str, float | int | None]:
    if not values:
        return {"mean": None, "low": None, "high": None, "items": 0}
    mean, low, high = mean_interval(values)
    return {"mean": mean, "low": low, "high": high, "items": len(values)}


def main(argv: Sequence[str]) -> int:
    """Means, 95 % intervals, categories and agreement from the sheets that raters filled in."""
    parser = argparse.ArgumentParser(prog="vilg eval rating-tally", description=main.__doc__)
    parser.add_argument("key", type=Path, help=f"{KEY_FILE} of `vilg eval rating-sheet`")
    parser.add_argument("ratings", type=Path, nargs="+", help="what the pages saved, JSON or CSV, one file a rater")
    parser.add_argument("--partial", action="store_true", help="take sheets that are not filled in to the end")
    parser.add_argument("--out", type=Path, help="JSON file for the figures and the settings behind them")
    args = parser.parse_args(argv)
    key = read_key(args.key)
    ratings: dict[str, Ratings] = {}
    for path in args.ratings:
        rater, found = read_ratings(path, key)
        if rater in ratings:
            raise UserError(f"{path}: rater {rater!r} has rated in another of these files too")
        if len(found) < len(key["items"]) and not args.partial:
            raise UserError(f"{path}: {len(key['items']) - len(found)} of {len(key['items'])} are not rated; --partial takes it so")
        ratings[rater] = found
    result = {
        "format_version": FORMAT_VERSION, "kind": key["kind"], "sheet": key["sheet"], "raters": sorted(ratings),
        "rated": sum(map(len, ratings.values())), "interval": INTERVAL, **tally(key, ratings),
    }  # fmt: skip
    if args.out:
        write_atomically(args.out, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    print(report(result, [criterion.name for criterion in KINDS[key["kind"]].criteria]))
    return 0


def report(result: Mapping[str, Any], criteria: Sequence[str]) -> str:
    """The figures as a table."""
    rows = []
    for system, figures in result["systems"].items():
        rows.append((system, figures))
        rows += [(f"  {category}", found) for category, found in figures.get("categories", {}).items()]
    rows += list(result["differences"].items())
    width = max(len(name) for name, _ in rows)
    lines = [f"{len(result['raters'])} raters, {result['rated']} ratings; mean and [{result['interval']}]"]
    lines.append(" " * width + "".join(f"  {name:<20}" for name in criteria))
    lines += [f"{name:<{width}}" + "".join(f"  {_cell(figures[c]):<20}" for c in criteria) for name, figures in rows]
    alphas = (f"{name} {_number(found['alpha'])}" for name, found in result["agreement"].items())
    lines.append(f"agreement (Krippendorff's alpha): {', '.join(alphas)}")
    return "\n".join(line.rstrip() for line in lines)


def _cell(figure: Mapping[str, float | None]) -> str:
    if figure["mean"] is None:
        return "not rated"
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def read_key(path: Path) -> dict[str, Any]:
    """key.json of a set of sheets. Raises UserError if it is none, of another version, or was changed."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        version, sheet = key["format_version"], key["sheet"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no {KEY_FILE} of `vilg eval rating-sheet` ({error!r})") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version {version!r}; this vilg reads {FORMAT_VERSION}")
    if sheet != sheet_id(key):
        raise UserError(f"{path}: was changed after the sheets were written; take the one that lies beside them")
    return key


def read_ratings(path: Path, key: Mapping[str, Any]) -> tuple[str, Ratings]:
    """(rater, ratings) of a file. Raises UserError naming what does not fit the key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        sheet, rater, rows = _from_csv(text) if path.suffix.lower() == ".csv" else _from_json(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no ratings as the sheets save them ({error!r})") from None
    if sheet != key["sheet"]:
        raise UserError(f"{path}: rates sheet {sheet}, but the key is of {key['sheet']}")
    if not rater.strip():
        raise UserError(f"{path}: does not say who rated")
    found: Ratings = {}
    for row in rows:
        entry = row.get("item")
        if entry not in key["items"] or entry in found:
            raise UserError(f"{path}: item {entry!r} is {'there twice' if entry in found else 'not in the key'}")
        found[entry] = {criterion.name: _value(path, entry, row, criterion) for criterion in KINDS[key["kind"]].criteria}
    return rater, found


def _value(path: Path, entry: str, row: Mapping[str, Any], criterion: Criterion) -> int:
    value = row.get(criterion.name)
    try:
        number = int(value)  # type: ignore[arg-type]
        right = float(value) == number and criterion.least <= number <= criterion.most  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):  # the last of JSON's Infinity
        right = False
    if not right:
        raise UserError(f"{path}: item {entry}: {criterion.name} is {value!r}, not from {criterion.least} to {criterion.most}")
    return number


def _from_json(text: str) -> tuple[str, str, list[dict[str, Any]]]:
    content = json.loads(text)
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version {content['format_version']!r}, this vilg reads {FORMAT_VERSION}")
    rows = content["ratings"]
    if not all(isinstance(row, dict) for row in rows):
        raise TypeError("ratings should be objects")
    return str(content["sheet"]), str(content["rater"]), rows


def _from_csv(text: str) -> tuple[str, str, list[dict[str, Any]]]:
    rows = list(csv.DictReader(text.splitlines()))
    who = {(row["sheet"], row["rater"]) for row in rows}
    if len(who) != 1:
        raise ValueError(f"{len(who)} raters or sheets in one file, instead of one")
    return *who.pop(), rows
