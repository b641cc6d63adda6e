"""Final norm and the two output heads, each on its own segment: no shared softmax over both vocabularies.

Legend: B batch, T text slots, S slots, C hidden, V vocabulary (V / size columns per rank when it is split).
"""

from collections.abc import Callable

from torch import Tensor, nn

from vilg.config.schema import ModelConfig
from vilg.parallel.grid import Grid
from vilg.parallel.layers import ColumnParallelLinear, Norm, enter_split
from vilg.parallel.ops import join_slots
from vilg.tokens.sequence import SequenceSpec


class Heads(nn.Module):
    """Residual stream -> logits in the model's dtype; the loss and sampling take them to fp32. Untied, without bias.

    watch: what the normed states pass through on their way to the logits and nowhere else, for whoever looks at the
    generation loss's gradient there. It is given the states [B, s, C] of this rank's slots, and which of them is the
    first of an image.
    """

    watch: Callable[[Tensor, int], Tensor] | None = None

    def __init__(self, config: ModelConfig, spec: SequenceSpec, *, grid: Grid, device=None, dtype=None):
        super().__init__()
        place = dict(group=grid.tensor_group, device=device, dtype=dtype)
        self.text_slots, self.grid = spec.text_slots, grid
        self.norm = Norm(config.hidden_size, config.norm, partial=grid.sequence_parallel, **place)
        head = dict(bias=False, enters=False, **place)
        self.text_head = ColumnParallelLinear(config.hidden_size, spec.text_vocab_size, **head)
        self.image_head = ColumnParallelLinear(config.hidden_size, spec.image_vocab_size, **head)

    def text(self, hidden: Tensor) -> Tensor:
        """Text slots [B, t, C] -> this rank's columns of the text logits [B, t, V]. For decoding."""
        return self.text_head(self.norm(hidden))

    def image(self, hidden: Tensor) -> Tensor:
        """Image slots [B, n, C] -> this rank's columns of the image logits [B, n, V]. For decoding."""
        return self.image_head(self.norm(hidden))

    def forward(self, hidden: Tensor, *, with_states: bool = False) -> tuple[Tensor, ...]:
        """[B, S, C] -> text logits [B, T, Vt], image logits [B, N, Vi] (this rank's columns).

        with_states: and the normed states of the image slots [B, N, C], whole and the same on every tensor rank.
        """
        group, split = self.grid.tensor_group, self.grid.sequence_parallel
        normed = self.norm(hidden)
        entered = enter_split(self._watched(normed), group, split)
        logits = self.text_head(entered[:, : self.text_slots]), self.image_head(entered[:, self.text_slots :])
        if not with_states:
            return logits
        states = join_slots(normed, group) if split else normed
        return *logits, states[:, self.text_slots :]

    def _watched(self, normed: Tensor) -> Tensor:
        if self.watch is None:
            return normed
        first_slot = self.grid.tensor_rank * normed.shape[1] if self.grid.sequence_parallel else 0
        return self.watch(normed, max(0, self.text_slots - first_slot))
