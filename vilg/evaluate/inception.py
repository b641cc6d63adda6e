"""The feature network behind FID and IS: a TorchScript file on this machine, told apart by its sha256.

What is meant is the 2015 Inception graph as one TorchScript file, `inception-2015-12-05.pt`, which StyleGAN2-ADA and
clean-fid use: its forward takes uint8-valued pictures [B, 3, H, W] and scales them itself to 299 x 299 as the original
graph did; with return_features it gives [B, 2048], with no_output_bias the class probabilities [B, 1008] that IS uses.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vilg.data.shards import file_sha256
from vilg.errors import UserError

SIDE = 299
Resize = Literal["network", "clean"]
RESIZES: dict[str, str] = {
    "network": "inside the feature network (bilinear without antialiasing, as the original graph)",
    "clean": f"PIL bicubic with antialiasing to {SIDE} x {SIDE}, each channel in float (clean-fid, arXiv 2104.11222)",
}


class Inception:
    """Features and class probabilities of pictures. Raises UserError for a file that is none or has another hash.

    sha256: what the file's must be; None takes any, which the report then names.
    """

    def __init__(self, path: Path, *, sha256: str | None = None, resize: Resize = "network", device: str = "cpu") -> None:
        try:
            self.sha256 = file_sha256(path)
        except OSError as error:
            raise UserError(f"--inception {path}: {error.strerror}") from None
        if sha256 is not None and sha256.lower() != self.sha256:
            raise UserError(f"--inception {path}: sha256 is {self.sha256}, not {sha256}; figures would not compare")
        try:
            self._network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise UserError(f"--inception {path}: no TorchScript file: {str(error).splitlines()[0]}") from None
        self.path, self.resize, self._device = path, resize, device

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 [B, H, W, 3] -> features float [B, D] and probabilities float [B, C], on the CPU."""
        if self.resize == "clean":
            values = torch.from_numpy(np.stack([_clean(picture) for picture in pictures]))
        else:
            values = torch.from_numpy(pictures).float()
        values = values.permute(0, 3, 1, 2).to(self._device)
        try:
            features = self._network(values, return_features=True)
            probabilities = self._network(values, no_output_bias=True)
        except RuntimeError as error:
            raise UserError(
                f"--inception {self.path}: does not take return_features and no_output_bias as "
                f"inception-2015-12-05.pt does: {str(error).splitlines()[0]}"
            ) from None
        return features.float().cpu(), probabilities.float().cpu()


def _clean(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [299, 299, 3], clipped to what a picture can hold."""
    channels = [Image.fromarray(picture[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=-1).clip(0, 255)
