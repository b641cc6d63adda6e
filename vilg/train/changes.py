"""What a continued run may change against the recipe that its checkpoint was made with.

Three kinds of keys: harmless ones become notes; those of the model's shape can not be continued at all; every other
change makes the run another one than the recipe says, and must be named with `--accept=KEY,KEY` (patterns as `loss.*`).
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vilg.config import Recipe
from vilg.config.marked import did_you_mean
from vilg.errors import UserError

# Harmless, and what the change means.
HARMLESS = {
    "name": "only a label",
    "run_dir": "the folder was moved",
    "init_from": "only a new run reads it",
    "logging.*": "only what is shown",
    "samples.*": "only what is drawn",
    "evaluation.*": "only what is measured",
    "checkpoint.*": "only when checkpoints are saved",
    "guards.*": "only when the run stops itself",
    "data.train": "the folder may move; its manifest's hash must stay the same",
    "data.cache_*": "batches do not depend on it",
    "data.read_timeout": "batches do not depend on it",
    "data.workers": "batches do not depend on it",
    "data.max_bad_fraction": "only when the run stops itself",
    "tokens.text_model": "the file may move; its hash must stay the same",
    "tokens.image_model": "the folder may move; its hash must stay the same",
    "batch.micro_size": "the same batches in other parts; losses differ by rounding",
    "parallel.*": "weights and moments are distributed anew; losses differ by rounding",
    "schedule.steps": "the learning rate follows the new length from here on",
    "schedule.min_lr_ratio": "the learning rate follows it from here on",
}
# The weights in the checkpoint have another shape or another meaning.
SHAPE = (
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.ffn_multiple",
    "model.norm",
    "model.qk_norm",
    "model.sandwich_norm",
    "model.reconstructor.mapping_width",
    "tokens.text_slots",
    "tokens.grid",
    "tokens.text_vocab_size",
    "tokens.image_vocab_size",
)
# Sections that cannot come or go: with them, codes in the checkpoint mean something else than in the shards.
WHOLE = ("model.reconstructor.joint_quantizer.*",)
TOKENIZERS = {"text": "tokens.text_model", "image": "tokens.image_model"}
DATA = "data.train"


def is_accepted(key: str, accept: Sequence[str]) -> bool:
    """Whether one of the patterns names the key."""
    return any(fnmatch(key, pattern) for pattern in accept)


def check_accept(accept: Sequence[str], recipe: Recipe) -> None:
    """Raises UserError for a pattern of `--accept` that names no key of a recipe."""
    keys = dict(_leaves(recipe.model_dump(mode="json")))
    for pattern in accept:
        if not any(fnmatch(key, pattern) for key in keys):
            raise UserError(f"--accept={pattern}: a recipe has no such key{did_you_mean(pattern, list(keys))}")


def compare(before: Recipe, now: Recipe, source: Path, accept: Sequence[str] = ()) -> list[str]:
    """Notes for the changes that this continued run may make. Raises UserError listing all others, with the flag that
    accepts them. source: where `before` stands, for people."""
    old, new = (dict(_leaves(recipe.model_dump(mode="json"))) for recipe in (before, now))
    notes, harmful, impossible = [], [], []
    for key in sorted(old | new):
        was, is_now = old.get(key), new.get(key)
        if was == is_now:
            continue
        why = next((text for pattern, text in HARMLESS.items() if fnmatch(key, pattern)), None)
        comes_or_goes = None in (was, is_now) and any(fnmatch(key, pattern) for pattern in WHOLE)
        if key in SHAPE or comes_or_goes:
            impossible.append(f"{key}: {_shown(was)} there, {_shown(is_now)} here: its weights are of another model")
        elif why or is_accepted(key, accept):
            meaning = why or "accepted on the command line"
            notes.append(f"{key} changed from {_shown(was)} to {_shown(is_now)} ({meaning})")
        else:
            harmful.append((key, f"{key}: {_shown(was)} there, {_shown(is_now)} here"))
    if impossible or harmful:
        keys = ",".join([*accept, *(key for key, _ in harmful)])
        advice = "" if impossible else f", or continue all the same with --accept={keys}"
        raise UserError(
            f"{source} is of another recipe:\n  " + "\n  ".join([*impossible, *(text for _, text in harmful)]) + "\n"
            f"Use its values, or give this run its own folder (--run_dir=...){advice}. Nothing was changed"
        )
    return notes


def check_tokenizers(
    before: Mapping[str, str], now: Mapping[str, str], source: Path, accept: Sequence[str]
) -> list[str]:
    """Notes for accepted tokenizers of another hash, text and image. Raises UserError naming one that is not."""
    notes = []
    for kind, key in TOKENIZERS.items():
        if before[kind] == now[kind]:
            continue
        if not is_accepted(key, accept):
            raise UserError(
                f"{source} was trained with {kind} tokenizer {before[kind][:12]}, but {key} is {now[kind][:12]}; name "
                f"the one it was trained with, or continue all the same with --accept={','.join([*accept, key])}"
            )
        notes.append(f"the {kind} tokenizer changed from {before[kind][:12]} to {now[kind][:12]} (accepted)")
    return notes


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
