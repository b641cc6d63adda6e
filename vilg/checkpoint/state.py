"""`run_state.json`: what a checkpoint says about itself."""

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from vilg import __version__
from vilg.errors import UserError
from vilg.parallel import layout
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks

STATE_FILE = "run_state.json"
STATE_VERSION = 2
# Nothing of the generators' state need be stored: every random choice is a pure function of these.
RANDOMNESS = "every random choice is a function of (seed, purpose, step or global sample index)"
_PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece")


@dataclass(frozen=True)
class RunState:
    """Everything of a checkpoint but the tensors.

    step: optimizer steps done. samples: pairs, tokens: filled slots, both over the whole run and all ranks. loader: its
    state as a dictionary. skipped: what the guards counted and keep (`train.guards.StepGuards.to_dict`). layout:
    engine, precision, ZeRO stage and sizes of the axes that wrote the files. recipe: resolved. tokenizers: hashes.
    parameters: the table of `parameter_table`. commit: of the program's source, empty where that is not known. files:
    name -> bytes, checksums: name -> CRC-32 in hex, of every file beside this one.
    """

    step: int
    samples: int
    tokens: int
    loader: dict[str, Any]
    skipped: dict[str, Any]
    layout: dict[str, Any]
    recipe: dict[str, Any]
    tokenizers: dict[str, str]
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    files: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    randomness: str = RANDOMNESS

    @property
    def recipe_hash(self) -> str:
        """sha256 of the resolved recipe, hex."""
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"format_version": STATE_VERSION, "recipe_hash": self.recipe_hash, **asdict(self)}, indent=1)


def read_state(checkpoint: Path) -> RunState:
    """The state of a checkpoint folder whose files are all there with their sizes.

    Raises UserError naming the file that is missing, cut, of another version or damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing, so {checkpoint} is no checkpoint; name a run or one of its checkpoints/step_*"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); use an earlier checkpoint") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__} instead of an object {{...}}; use an earlier checkpoint")
    found = data.pop("format_version", None)
    if found != STATE_VERSION:
        raise UserError(
            f"{path}: format_version {found!r}; this vilg reads {STATE_VERSION}. Use the vilg that wrote it"
        )
    recipe_hash = data.pop("recipe_hash", None)
    known = {f.name for f in fields(RunState)}
    if set(data) != known:
        raise UserError(f"{path}: keys {sorted(set(data) ^ known)} are missing or unknown; use an earlier checkpoint")
    state = RunState(**data)
    if state.recipe_hash != recipe_hash:
        raise UserError(f"{path}: the recipe in it was changed by hand (its hash differs); use an earlier checkpoint")
    for name, size in state.files.items():
        file = checkpoint / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            what = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise UserError(f"{file}: {what}; the checkpoint is not whole. Use an earlier one")
    return state


def is_whole(checkpoint: Path) -> bool:
    """Whether `read_state` finds nothing to complain about."""
    try:
        read_state(checkpoint)
    except UserError:
        return False
    return True


def parameter_table(model: nn.Module, grid: Grid, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Name -> whole shape, dimension that is cut over the tensor ranks (None: whole on each), pipeline stage, in the
    order of registration. All ranks call it: each pipeline stage knows its own layers."""
    here = {}
    for name, parameter in model.named_parameters():
        local = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 keeps the shape of what it has cut
        shape = layout.full_shape(name, local, size=grid.tensor_size)
        here[name] = {"shape": list(shape), "split": layout.rule_of(name).dim, "stage": grid.pipeline_rank}
    everywhere = ranks.gather(here) if grid.pipeline_size > 1 else [here]
    return {name: entry for stage in everywhere for name, entry in stage.items()}


@cache
def source_commit() -> str:
    """The git commit of this program's source, with `+` for changes since; empty outside a git checkout."""
    folder = Path(__file__).parent
    try:
        found = [
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "."])
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return found[0].strip() + ("+" if found[1].strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version(), "vilg": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source tree"
    return found
