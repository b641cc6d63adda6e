"""Self-attention with the paper's patterns; what the heads may see is decided by the `attend` callable.

Legend: B batch, S slots (S / size per rank with sequence parallelism), C hidden, H heads of this rank, D head dim.
"""

from collections.abc import Callable

from torch import Tensor, nn

from kernels import AttentionPlan, attention_plan, sparse_attention, split_heads
from vilg.config.schema import ModelConfig
from vilg.parallel.grid import Grid
from vilg.parallel.layers import ColumnParallelLinear, Norm, RowParallelLinear

Attend = Callable[[Tensor, Tensor, Tensor, str], Tensor]


def layer_patterns(config: ModelConfig) -> tuple[str, ...]:
    """Pattern of each block (ERNIE-ViLG 3.1.2, layers counted from 1): conv in the last, else column where i mod 4 = 2.

    All others are row layers; with `attention: dense` every block is dense.
    """
    if config.attention == "dense":
        return ("dense",) * config.num_layers
    row = "row_wrap" if config.row_style == "wrap" else "row"
    layers = range(1, config.num_layers + 1)
    return tuple("conv" if i == config.num_layers else "column" if i % 4 == 2 else row for i in layers)


class SparseAttend:
    """Attention over whole sequences of one batch; a pattern's plan is made at its first use and shared by all layers.

    text_len, text_prefix, image_is_target: int32 [B] (tokens/sequence.py). conv_size: side of the conv window in slots.
    """

    def __init__(
        self, grid: tuple[int, int], text_len: Tensor, text_prefix: Tensor, image_is_target: Tensor,
        *, conv_size: int = 11,
    ):  # fmt: skip
        samples = dict(text_len=text_len, text_prefix=text_prefix, image_is_target=image_is_target)
        self.arguments = dict(grid=grid, conv_size=conv_size, **samples)
        self.plans: dict[str, AttentionPlan] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pattern: str) -> Tensor:
        """q, k, v [B, H, S, D] -> [B, H, S, D]; rows of padding slots are zero."""
        if pattern not in self.plans:
            height, width = self.arguments["grid"]
            text_slots = q.shape[2] - height * width
            self.plans[pattern] = attention_plan(
                pattern=pattern, text_slots=text_slots, dtype=q.dtype, checked=bool(self.plans), **self.arguments
            )
        return sparse_attention(q, k, v, pattern=pattern, plan=self.plans[pattern], **self.arguments)


class HeadNorm(Norm):
    """Norm over the channels of a head. One kernel runs that of the queries and that of the keys, and each weight is read
    in the call of the module that has it: ZeRO-3 and the export lend a module its weights for its own calls only."""

    def forward(self, qkv: Tensor, other: "HeadNorm | Tensor") -> tuple[Tensor, Tensor, Tensor]:
        """qkv [B, S, H, 3, D] -> queries, keys, values [B, H, S, D]. other: the queries' norm is called with the keys', the
        keys' with the queries' weight."""
        if isinstance(other, HeadNorm):
            return other(qkv, self.factor())
        return split_heads(qkv, other, self.factor(), kind=self.kind, eps=self.eps)


class Attention(nn.Module):
    """Pre-norm self-attention branch without its residual: [B, S, C] -> [B, S, C]."""

    def __init__(self, config: ModelConfig, pattern: str, *, grid: Grid, device=None, dtype=None):
        super().__init__()
        place = dict(group=grid.tensor_group, device=device, dtype=dtype)
        split = dict(sequence_parallel=grid.sequence_parallel, **place)
        hidden = config.hidden_size
        self.pattern = pattern
        self.head_dim = hidden // config.num_heads
        self.norm = Norm(hidden, config.norm, partial=grid.sequence_parallel, **place)
        self.qkv = ColumnParallelLinear(hidden, 3 * hidden, **split)
        if config.qk_norm:
            # Chameleon (2405.09818 section 2.2). Shared by all heads, which are split over ranks. No bias: that of the
            # keys would add the same to all logits of a query, which the softmax takes out again.
            self.q_norm = HeadNorm(self.head_dim, config.norm, bias=False, partial=True, **place)
            self.k_norm = HeadNorm(self.head_dim, config.norm, bias=False, partial=True, **place)
        else:
            self.q_norm = self.k_norm = None
        self.out = RowParallelLinear(hidden, hidden, **split)
        self.post_norm = post_norm(config, grid=grid, device=device, dtype=dtype)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, C] -> queries, keys, values [B, H, S, D] of this rank's heads."""
        qkv = self.qkv(self.norm(hidden)).unflatten(-1, (-1, 3, self.head_dim))  # [B, S, H, 3, D]
        if self.q_norm is None:
            # Unbound before it is transposed, so that the backward stacks the three gradients in one copy.
            return tuple(x.transpose(1, 2) for x in qkv.unbind(3))
        return self.q_norm(qkv, self.k_norm)

    def forward(self, hidden: Tensor, attend: Attend) -> Tensor:
        mixed = attend(*self.project(hidden), self.pattern)
        return self.post_norm(self.out(mixed.transpose(1, 2).flatten(2)))


def post_norm(config: ModelConfig, *, grid: Grid, device=None, dtype=None) -> nn.Module:
    """The norm that ends a residual branch with `sandwich_norm`, else nothing."""
    if not config.sandwich_norm:
        return nn.Identity()
    place = dict(group=grid.tensor_group, device=device, dtype=dtype)
    return Norm(config.hidden_size, config.norm, partial=grid.sequence_parallel, **place)
