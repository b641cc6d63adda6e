"""The whole model in one process (or one tensor-parallel rank): embedding, blocks, heads, run one after another.

`layer_list` is the one list of layers; `pipe.py` makes pipeline stages of the same list under the same names.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vilg.config.schema import ModelConfig
from vilg.errors import UserError
from vilg.model.attention import SparseAttend, layer_patterns
from vilg.model.block import Block
from vilg.model.embed import Embed
from vilg.model.heads import Heads
from vilg.parallel import layout
from vilg.parallel.grid import Grid
from vilg.tokens.sequence import SequenceSpec


def layer_list(
    config: ModelConfig, spec: SequenceSpec, *, grid: Grid, device=None, dtype=None
) -> list[tuple[type[nn.Module], dict[str, Any]]]:
    """Class and keyword arguments of every layer, in order: Embed, one Block per pattern, Heads.

    Raises UserError if the heads or a vocabulary cannot be divided as asked.
    """
    check_shape(config, spec, tensor=grid.tensor_size)
    place = dict(config=config, grid=grid, device=device, dtype=dtype)
    blocks = [(Block, dict(index=i, pattern=pattern, **place)) for i, pattern in enumerate(layer_patterns(config))]
    return [(Embed, dict(spec=spec, **place)), *blocks, (Heads, dict(spec=spec, **place))]


class Vilg(nn.Module):
    """Bidirectional vision-language transformer (ERNIE-ViLG, 2112.15283). Parameters are NaN until filled.

    `grid=None` is one process. Parameters are named `layers.<index>....` under every layout (parallel/layout.py).
    """

    def __init__(
        self, config: ModelConfig, spec: SequenceSpec, *, grid: Grid | None = None, device=None, dtype=None
    ):
        super().__init__()
        self.config, self.spec, self.grid = config, spec, grid or Grid.single()
        layers = layer_list(config, spec, grid=self.grid, device=device, dtype=dtype)
        self.layers = nn.ModuleList(build(**arguments) for build, arguments in layers)
        layout.mark_parameters(self, size=self.grid.tensor_size)

    @property
    def embed(self) -> Embed:
        return self.layers[0]

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)[1:-1]

    @property
    def heads(self) -> Heads:
        return self.layers[-1]

    def forward(
        self,
        text_input: Tensor,
        image_input: Tensor,
        text_len: Tensor,
        text_prefix: Tensor,
        image_is_target: Tensor,
        *,
        dropout_seeds: Tensor | None = None,
        with_states: bool = False,
    ) -> tuple[Tensor, ...]:
        """Logits of every slot: text [B, T, Vt], image [B, N, Vi], in the model's dtype.

        The first five are `SequenceBatch.inputs()`: int64 [B, T], int64 [B, N], integers [B]. dropout_seeds: int64 [B]
        of `parallel.rng.sequence_seeds`, needed in training mode if config.dropout > 0. On a tensor-parallel rank the
        logits are its columns of the vocabulary. Logits of padding text slots are finite and mean nothing. with_states: also the last
        layer's normed states of the image slots [B, N, C], for the reconstructor.
        """
        attend = SparseAttend(
            self.spec.grid, text_len, text_prefix, image_is_target, conv_size=self.config.conv_size
        )
        hidden = self.embed(text_input, image_input, text_prefix, image_is_target)
        for block in self.blocks:
            hidden = block(hidden, attend, dropout_seeds)
        return self.heads(hidden, with_states=with_states)

    def reset_parameters(self, seed: int) -> None:
        """Fill all parameters with the initial weights of run seed `seed`; the same weights under every layout."""
        fill_parameters(self, self.config, seed, grid=self.grid)


@torch.no_grad()
def fill_parameters(module: nn.Module, config: ModelConfig, seed: int, *, grid: Grid, prefix: str = "") -> None:
    """Draw the initial weights of `module`, whose parameters have the names of `Vilg` once `prefix` is put before."""
    layout.mark_parameters(module, prefix=prefix, size=grid.tensor_size)
    for name, parameter in module.named_parameters():
        name = prefix + name
        shape = layout.full_shape(name, parameter.shape, size=grid.tensor_size)
        full = layout.initial_value(
            name, shape, seed=seed, init_std=config.init_std, num_layers=config.num_layers
        )
        parameter.copy_(layout.shard(name, full, rank=grid.tensor_rank, size=grid.tensor_size))


def check_shape(config: ModelConfig, spec: SequenceSpec, *, tensor: int) -> None:
    """Raise UserError, naming every problem, unless heads and vocabularies divide evenly over `tensor` ranks."""
    problems = []
    if config.hidden_size % config.num_heads:
        hidden, heads = config.hidden_size, config.num_heads
        problems.append(f"model.hidden_size={hidden} is not a multiple of model.num_heads={heads}")
    sizes = {
        "model.num_heads": config.num_heads,
        "tokens.text_vocab_size": spec.text_vocab_size,
        "tokens.image_vocab_size": spec.image_vocab_size,
    }
    for key, value in sizes.items():
        if value % tensor:
            fits = ", ".join(str(n) for n in range(1, min(value, 64) + 1) if value % n == 0)
            problems.append(f"{key}={value} is not divisible by parallel.tensor={tensor}; use one of {fits}")
    if problems:
        raise UserError("; ".join(problems))
