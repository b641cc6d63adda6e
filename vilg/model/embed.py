"""Token, position and segment vectors: ids of both segments -> the residual stream.

Legend: B batch, T text slots, N = rows * columns image slots, S = T + N, C hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilg.config.schema import ModelConfig
from vilg.parallel.grid import Grid
from vilg.parallel.layers import VocabParallelEmbedding, blank
from vilg.parallel.ops import split_slots
from vilg.tokens.sequence import SequenceSpec

# Rows of `segment`: what a slot is for. Targets are shifted inputs, sources are not, so the two must be told apart.
TEXT_SOURCE, IMAGE_SOURCE = 0, 2  # the target's row is the one after


class Embed(nn.Module):
    """Learned vectors: text table + text position + segment; image table + image row + image column + segment.

    Begin-of-image is a vector of its own, so that the image table has exactly `image_vocab_size` rows.
    """

    def __init__(self, config: ModelConfig, spec: SequenceSpec, *, grid: Grid, device=None, dtype=None):
        super().__init__()
        hidden, place = config.hidden_size, dict(device=device, dtype=dtype)
        if grid.sequence_parallel and spec.num_slots % grid.tensor_size:
            raise ValueError(f"{spec.num_slots} slots are not divisible by parallel.tensor={grid.tensor_size}")
        self.spec, self.grid, self.gradient = spec, grid, config.embedding_gradient
        self.text_table = VocabParallelEmbedding(spec.text_vocab_size, hidden, group=grid.tensor_group, **place)
        self.image_table = VocabParallelEmbedding(spec.image_vocab_size, hidden, group=grid.tensor_group, **place)
        self.text_position = blank((spec.text_slots, hidden), **place)
        self.image_row = blank((spec.grid[0], hidden), **place)
        self.image_column = blank((spec.grid[1], hidden), **place)
        self.begin_of_image = blank((hidden,), **place)
        self.segment = blank((4, hidden), **place)

    def text(self, ids: Tensor, slots: Tensor, is_target: Tensor) -> Tensor:
        """ids int64 [B, t] at text slots int64 [t] or [B, t]; is_target bool or integer [B, t] -> [B, t, C]."""
        whole = slots.shape == self.text_position.shape[:1]
        positions = self.text_position if whole else self.text_position[slots]
        segment = F.embedding(TEXT_SOURCE + is_target.long(), self.segment)
        return scale_gradient(self.text_table(ids), self.gradient) + positions + segment

    def image(self, ids: Tensor, slots: Tensor, is_target: Tensor) -> Tensor:
        """ids int64 [B, n] at image slots int64 [n], raster order; is_target bool or integer [B] -> [B, n, C]."""
        columns = self.spec.grid[1]
        positions = self.image_row[slots // columns] + self.image_column[slots % columns]  # [n, C]
        segment = F.embedding(IMAGE_SOURCE + is_target.long(), self.segment)  # [B, C]
        begins = (ids == self.spec.begin_of_image)[..., None]
        codes = scale_gradient(self.image_table(ids), self.gradient)
        return torch.where(begins, self.begin_of_image, codes) + positions + segment[:, None]

    def forward(self, text_input: Tensor, image_input: Tensor, text_prefix: Tensor, image_is_target: Tensor) -> Tensor:
        """int64 [B, T], int64 [B, N], integers [B] -> [B, S, C] (this rank's slots with sequence parallelism)."""
        text_slots = torch.arange(text_input.shape[1], device=text_input.device)
        image_slots = torch.arange(image_input.shape[1], device=image_input.device)
        text = self.text(text_input, text_slots, text_slots >= text_prefix[:, None])
        hidden = torch.cat([text, self.image(image_input, image_slots, image_is_target)], 1)
        return split_slots(hidden, self.grid.tensor_group) if self.grid.sequence_parallel else hidden


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """The same values, whose gradient is multiplied by `factor`.

    CogView's embedding-gradient shrink (2105.13290 section 2.4; GLM-130B 2210.02414 section 3.3) writes it as
    factor * x + (1 - factor) * x.detach(), which rounds the values.
    """
    return values if factor == 1.0 else _ScaleGradient.apply(values, factor)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, factor):
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None
