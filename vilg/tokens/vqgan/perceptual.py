"""How unlike two pictures look: LPIPS where its weights lie on disk, else an edge loss at several scales.

Pictures are float [B, 3, H, W] in [-1, 1]. Both are modules (output, images) -> scalar; nothing here is trained.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilg.errors import UserError
from vilg.tokens.vqgan.weights import SAFETENSORS, TORCH, read_weights

_WIDTHS = (64, 128, 256, 512, 512)  # channels of VGG16's five stages
_CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # their numbers in torchvision's `features`
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, of pixels in [-1, 1]
_SMALLEST = 16  # pixels a side: VGG16 halves four times before its last stage
_EDGE_SCALES = 3  # whole, half and quarter size


def perceptual_loss(weights: Path | None) -> nn.Module:
    """LPIPS with these weights (a file or a folder of files), without any `EdgeLoss`. UserError for unfit weights."""
    return EdgeLoss() if weights is None else Lpips.load(weights)


def edge_loss(output: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of the differences of neighbouring pixels, across and down, summed over whole, half and
    quarter size: what a blurred or misplaced edge costs at any scale. No weights, no learned idea of likeness."""
    error, total = output - images, output.new_zeros(())
    for _ in range(_EDGE_SCALES):
        total = total + error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
        if min(error.shape[2:]) < 4:
            break
        error = F.avg_pool2d(error, 2)
    return total


class EdgeLoss(nn.Module):
    """`edge_loss` as a module."""

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        return edge_loss(output, images)


class Lpips(nn.Module):
    """Learned Perceptual Image Patch Similarity, VGG16 variant (Zhang 2018, arXiv 1801.03924, equation 1).

    Features after the last rectifier of each of VGG16's five stages, scaled to unit length over their channels; squared
    differences are weighted per channel, averaged over places and summed over stages. The mean over the batch is returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        channels = 3
        for width, numbers in zip(_WIDTHS, _CONVS, strict=True):
            convs = [nn.Conv2d(channels if n == numbers[0] else width, width, 3, padding=1) for n in numbers]
            self.stages.append(nn.ModuleList(convs))
            channels = width
        self.heads = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in _WIDTHS)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls, path: Path | str) -> "Lpips":
        """From torchvision's VGG16 (`features.N.*`) and the five linear heads of the lpips package (`linK.model.1.weight`):
        one file with both, or a folder of files. Without gradients. Raises UserError naming what is missing or unfit.
        """
        path = Path(path)
        files = sorted(p for p in path.iterdir() if p.suffix in (SAFETENSORS, *TORCH)) if path.is_dir() else [path]
        found: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in read_weights(file).items():
                if (ours := _our_name(name)) is not None:
                    found[ours] = tensor.float()
        loss = cls()
        needed = loss.state_dict()
        problems = [f"{_their_name(name)} is missing" for name in needed if name not in found]
        problems += [
            f"{_their_name(name)} is {list(found[name].shape)}, needed {list(tensor.shape)}"
            for name, tensor in needed.items()
            if name in found and found[name].shape != tensor.shape
        ]
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise UserError(
                f"{path}: no LPIPS weights: {'; '.join(problems[:4])}{more}; needed are torchvision's vgg16 (features.*) "
                "and the lpips package's vgg heads (lin0..lin4), in one file or one folder"
            )
        loss.load_state_dict(found)
        return loss.requires_grad_(False).eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """images -> five maps [B, C, h, w], each of unit length over C. Raises ValueError for sides below 16 pixels."""
        if min(images.shape[2:]) < _SMALLEST:
            raise ValueError(f"LPIPS needs images of at least {_SMALLEST} pixels a side, not {list(images.shape[2:])}")
        hidden = (images - self.shift) / self.scale
        maps = []
        for number, convs in enumerate(self.stages):
            hidden = F.max_pool2d(hidden, 2) if number else hidden
            for conv in convs:
                hidden = F.relu(conv(hidden))
            # the epsilon inside the root keeps the gradient finite where all channels are 0
            maps.append(hidden / (hidden.square().sum(1, keepdim=True) + 1e-20).sqrt().add(1e-10))
        return maps

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(images)
        distances = [
            ((ours - theirs).square() * head).sum(1).mean()
            for ours, theirs, head in zip(self.features(output), wanted, self.heads, strict=True)
        ]
        return torch.stack(distances).sum()


def _our_name(theirs: str) -> str | None:
    """Name in `Lpips` of a tensor of torchvision's VGG16 or of the lpips package; None for what is not needed."""
    if match := re.fullmatch(r"lins?\.?(\d)\.model\.1\.weight", theirs):
        return f"heads.{match[1]}"
    if match := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)", theirs):
        for stage, numbers in enumerate(_CONVS):
            if int(match[1]) in numbers:
                return f"stages.{stage}.{numbers.index(int(match[1]))}.{match[2]}"
    return None


def _their_name(ours: str) -> str:
    kind, stage, *rest = ours.split(".")
    return f"lin{stage}.model.1.weight" if kind == "heads" else f"features.{_CONVS[int(stage)][int(rest[0])]}.{rest[1]}"
