"""Do image and caption belong together? Any `Scorer` may say so; one for CLIP and Chinese-CLIP folders is here.

B pairs, S side in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from vilg.errors import UserError


class Scorer(Protocol):
    """image_size: S, the side of the images it wants."""

    image_size: int

    def score(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """float [B], larger is more alike, of images uint8 [B, S, S, 3] and their captions."""


class ClipScorer:
    """Cosine of the embeddings of a CLIP or Chinese-CLIP model, fp32, from a folder that transformers saved.

    Nothing is downloaded, no code of the folder is run, and weights are read from safetensors only. Raises UserError if
    transformers is missing or the folder is no such model; option: what the user named the folder with.
    """

    def __init__(self, folder: Path, *, device: str | None = None, option: str = "similarity.model"):
        if not folder.is_dir():
            raise UserError(f"{option}: {folder} is no folder; download a CLIP or Chinese-CLIP model into it")
        try:
            from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError(f"{option} needs transformers ({error}): pip install transformers") from None
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(folder, **local)
            if config.model_type not in ("clip", "chinese_clip"):
                raise ValueError(f"model_type is {config.model_type!r}, supported are clip and chinese_clip")
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            self._processor = AutoImageProcessor.from_pretrained(folder, **local)
            model = AutoModel.from_pretrained(folder, use_safetensors=True, **local)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"{option}: {folder} holds no CLIP model that can be loaded: {error}") from None
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.float().eval().to(self._device)
        self._text_length = config.text_config.max_position_embeddings
        self.image_size = config.vision_config.image_size

    @torch.inference_mode()
    def score(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        pixels = self._processor(images=list(images), return_tensors="pt")
        texts = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=self._text_length, return_tensors="pt"
        )
        output = self._model(**pixels.to(self._device), **texts.to(self._device))
        # Both are normalised by the model; row i of one belongs to row i of the other.
        return (output.image_embeds * output.text_embeds).sum(-1).cpu().numpy()
