"""An export folder as the start of a training, under any layout: `init_from` in a recipe.

Each rank reads from the safetensors only what it holds, into the model as it stands before its engine is built, in the
place where random weights would be drawn. The optimizer starts fresh.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from vilg.config.schema import ModelConfig
from vilg.errors import UserError
from vilg.inference.load import Description, read_description
from vilg.inference.weights import FolderWeights
from vilg.parallel.grid import Grid
from vilg.tokens.sequence import SequenceSpec

_FREE = {"dropout", "init_std", "embedding_gradient", "reconstructor"}  # of the model's keys: how it is trained, not what it computes


@torch.no_grad()
def fill_from_export(
    model: nn.Module, folder: Path, *, config: ModelConfig, spec: SequenceSpec, tokenizers: dict[str, str], grid: Grid
) -> str:
    """Fill this rank's part of the model; a sentence for the log.

    model: parameters named as those of `Vilg`, perhaps a stage of it. config, spec, tokenizers ("text", "image": hash):
    of the recipe. Raises UserError naming both values of everything in which the export differs from the recipe.
    """
    description = read_description(folder)
    problems = list(_differences(description, config, spec, tokenizers))
    if problems:
        raise UserError(f"init_from={folder} does not fit the recipe: {'; '.join(problems)}")
    weights = FolderWeights(folder)
    for name, parameter in model.named_parameters():
        part = weights.read(name, rank=grid.tensor_rank, size=grid.tensor_size)
        if part.shape != parameter.shape:
            raise UserError(
                f"init_from={folder}: {name} has shape {tuple(part.shape)} where the model has {tuple(parameter.shape)}"
                "; the folder is damaged, export again"
            )
        if not bool(part.isfinite().all()):
            raise UserError(f"init_from={folder}: {name} holds numbers that are not finite; export another checkpoint")
        parameter.copy_(part)
    return f"weights of {description.name}, from {folder}; the optimizer starts fresh"


def _differences(
    export: Description, config: ModelConfig, spec: SequenceSpec, tokenizers: dict[str, str]
) -> Iterator[str]:
    for key in ModelConfig.model_fields:
        here, there = getattr(config, key), getattr(export.shape, key)
        if key not in _FREE and here != there:
            yield f"model.{key} is {here} in the recipe, {there} in the export"
    for key in ("text_slots", "grid", "text_vocab_size", "image_vocab_size"):
        here, there = getattr(spec, key), getattr(export.spec, key)
        if here != there:
            yield f"tokens.{key} is {here} in the recipe, {there} in the export"
    for kind, key in (("text", "text_model"), ("image", "image_model")):
        here, there = tokenizers[kind], export.tokenizers[kind]
        if here != there:
            yield f"tokens.{key} has hash {here[:12]}, the export was trained with {there[:12]}"
