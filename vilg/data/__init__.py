"""From raw image-text pairs to batches: ingest, tokenize, lint, and a loader with exact elastic resume."""
