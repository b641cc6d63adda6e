"""Recipes from YAML and `--section.key=value`, with every problem at its file:line:column in one error."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vilg.config.check import find_ingest_problems, find_problems
from vilg.config.deepspeed import read_deepspeed_file, surroundings
from vilg.config.ingest import IngestRecipe
from vilg.config.marked import KeyPath, Marked, Place, did_you_mean, dotted, read_file, read_value, write_yaml
from vilg.config.problems import NotGiven
from vilg.config.schema import Recipe, Section
from vilg.config.validate import partial, validate
from vilg.errors import TRY_AGAIN, UserError

_OVERRIDE = re.compile(r"(?:--)?([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.DOTALL)


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None, cross_checks: bool = True
) -> Recipe:
    """Read a recipe; `overrides` like `optimizer.lr=1e-3` (a leading `--` is allowed) replace single keys.

    A recipe may start from another: `base: FILE`, beside it, whose keys hold unless they are given again. Other relative
    paths inside stay relative to the current directory. With `world_size` (processes of this run) the rules
    that depend on it are checked too; `cross_checks=False` reads a recipe whose files may lie on another machine.
    Raises UserError naming all problems as `file:line:column: key: message`.
    """
    marked = _read_with_base(Path(path), ())
    problems = marked.problems
    for override in overrides:
        _apply_override(marked, override)
    recipe, schema_problems = validate(marked, Recipe)
    problems.extend(schema_problems)
    if cross_checks:
        problems.extend(_cross_problems(recipe or partial(Recipe, marked.value), marked, world_size))
    if problems:
        raise UserError(_report(path, problems))
    return recipe


def load_ingest_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> IngestRecipe:
    """Read the recipe of `vilg data ingest`, None being an empty one; otherwise as `load_recipe`."""
    marked = _read_with_base(Path(path), ()) if path is not None else Marked("ingest", {})
    for override in overrides:
        _apply_override(marked, override)
    recipe, problems = validate(marked, IngestRecipe)
    problems = marked.problems + problems
    if recipe is not None:
        problems += [(marked.place(tuple(p.key.split("."))), p.message) for p in find_ingest_problems(recipe)]
    if problems:
        raise UserError(_report(path, problems))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML that `load_recipe` reads back as the same recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def take_overrides(argv: Sequence[str], *, recipe: type[Section] = Recipe) -> tuple[list[str], list[str]]:
    """Split a command line into (overrides, the rest): `--section.key=value` of a recipe goes to the first."""
    overrides, rest = [], []
    for argument in argv:
        match = _OVERRIDE.fullmatch(argument) if argument.startswith("--") else None
        is_key = match and ("." in match[1] or match[1] in recipe.model_fields)
        (overrides if is_key else rest).append(argument)
    return overrides, rest


def _read_with_base(path: Path, heirs: tuple[Path, ...]) -> Marked:
    """The recipe's values over those of its base. Raises UserError; `heirs`: the recipes that start from this one."""
    if path.resolve() in heirs:
        raise UserError(f"recipe {path} starts from itself: {' -> '.join(p.name for p in (*heirs, path))}")
    marked = read_file(path, what="recipe")
    if marked.value is None:
        raise UserError(f"recipe {path} is empty")
    if not isinstance(marked.value, dict):
        raise UserError(f"{marked.place(())}: a recipe is a mapping of sections, like 'model: {{num_layers: 4}}'")
    if "base" not in marked.value:
        return marked
    name, place = marked.value.pop("base"), marked.place(("base",))
    if not isinstance(name, str):
        raise UserError(f"{place}: base: should be the name of a recipe's file; found {shown(name)}")
    try:
        base = _read_with_base(path.parent / name, (*heirs, path.resolve()))
    except UserError as error:
        raise UserError(f"{place}: base: {error}") from None
    return Marked(
        marked.source,
        _joined(base.value, marked.value),
        {key: where for key, where in base.places.items() if not _replaced(key, marked.value)} | marked.places,
        base.problems + marked.problems,
    )


def _joined(base: Any, over: Any) -> Any:
    """Sections key by key; everything else as `over` says."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: _joined(base.get(key), value) for key, value in over.items()}


def _replaced(path: KeyPath, over: Any) -> bool:
    """Whether the value at `path` is one that `over` gives anew as a whole."""
    for part in path:
        if not isinstance(over, dict):
            return True
        if part not in over:
            return False
        over = over[part]
    return not isinstance(over, dict)


def _apply_override(marked: Marked, override: str) -> None:
    match = _OVERRIDE.fullmatch(override)
    if not match:
        raise UserError(f"'{override}' is no override; write --section.key=value, for example --optimizer.lr=1e-3")
    path = tuple(match[1].split("."))
    place = Place(f"--{match[1]}={match[2]}")
    if marked.places.get(path, place).line == 0 and path in marked.places:
        marked.problems.append((place, f"{dotted(path)}: given twice on the command line; keep one of the two"))
        return
    try:
        value = read_value(match[2])
    except UserError:
        marked.problems.append((place, f"{dotted(path)}: {match[2]!r} is not a YAML value; quote it if it is text"))
        return
    section = marked.value
    for depth, part in enumerate(path[:-1], 1):
        inner = section.setdefault(part, {})
        marked.places.setdefault(path[:depth], place)
        if not isinstance(inner, dict):
            marked.problems.append((place, f"{dotted(path[:depth])}: is a value, it has no key '{path[depth]}'"))
            return
        section = inner
    section[path[-1]] = value
    for inner in [p for p in marked.places if p[: len(path)] == path]:
        del marked.places[inner]
    marked.places[path] = place


def _cross_problems(recipe: Any, marked: Marked, world_size: int | None) -> list[tuple[Place, str]]:
    """Problems of the DeepSpeed file and of the cross rules; a file that cannot be read is a problem of its key."""
    found: list[tuple[Place, str]] = []
    values = None
    try:
        if recipe.parallel.engine == "deepspeed":
            deepspeed = read_deepspeed_file(recipe.parallel.deepspeed)
            found.extend(deepspeed.problems)
            values = deepspeed.value
    except NotGiven:
        pass  # the key itself is wrong, which the schema has said
    except UserError as error:
        if error.exit_code == TRY_AGAIN:
            raise
        found.append((marked.place(("parallel", "deepspeed")), str(error)))
    for problem in find_problems(recipe, surroundings(values, world_size=world_size)):
        found.append((marked.place(tuple(problem.key.split("."))), problem.message))
    return found


def _report(path: str | Path, problems: list[tuple[Place, str]]) -> str:
    lines = [f"{place}: {message}" for place, message in sorted(set(problems), key=lambda p: (p[0].source, p[0]))]
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} problems in recipe {path}:", *(f"  {line}" for line in lines)])
