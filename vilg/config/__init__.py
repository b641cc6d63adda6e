"""Recipes: schema, reading, cross checks, DeepSpeed files."""
