"""The transformer: one list of layers (embedding, blocks, heads) that runs in one process, split or as a pipeline."""
