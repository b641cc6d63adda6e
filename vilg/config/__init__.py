"""Recipes: schema, reading, cross checks, DeepSpeed files. Nothing here imports torch or DeepSpeed."""

from vilg.config.check import check_recipe
from vilg.config.deepspeed import merged_deepspeed_config
from vilg.config.ingest import IngestRecipe
from vilg.config.load import dump_recipe, load_ingest_recipe, load_recipe, take_overrides
from vilg.config.schema import Recipe

__all__ = [
    "IngestRecipe",
    "Recipe",
    "check_recipe",
    "dump_recipe",
    "load_ingest_recipe",
    "load_recipe",
    "merged_deepspeed_config",
    "take_overrides",
]
