"""The image tokenizer: a vector-quantised autoencoder in the line of VQGAN (Esser 2021, arXiv 2012.09841)."""

from vilg.tokens.vqgan.config import ImageTokenizerConfig
from vilg.tokens.vqgan.model import ImageTokenizer

__all__ = ["ImageTokenizer", "ImageTokenizerConfig"]
