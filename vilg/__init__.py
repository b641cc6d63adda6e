"""vilg: one transformer that writes and draws, trained with text -> image and image -> text on the same weights."""

__version__ = "0.1.0"
