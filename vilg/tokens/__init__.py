"""Tokenizers of both modalities and the canonical sequence they meet in."""
