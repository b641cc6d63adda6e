"""Bytes that one rank of a pipeline stage holds at the worst moment of a step.

Activations follow Korthikanti et al. (2205.05198, equations 1 to 6), recounted for our block in `block_activations`.
Sparse attention keeps no scores: only q, k, v, the result and one fp32 log-sum per query and head. A test
compares the activations with what torch keeps on a CPU, another the sum with the one run measured on a GPU
(docs/planning.md); overhead and buffers are estimates.
"""

from dataclasses import dataclass

from vilg.config.schema import ModelConfig
from vilg.tokens.sequence import SequenceSpec

# What is there before a tensor is made: the CUDA context, NCCL's channels, cuBLAS' workspaces (about 1.5 GiB on A100s
# with torch 2), and the share of the caching allocator's memory that lies in holes.
CONTEXT_BYTES = int(1.5 * 2**30)
FRAGMENTED = 0.05
# A logit in the loss, bytes beside its own two in 16 bits: the fp32 copy, log-softmax kept for the backward, its
# gradient in fp32; then the gradient in 16 bits.
LOSS_BYTES = 4 + 4 + 4
DEFAULT_BUCKET = 5 * 10**8  # numbers in DeepSpeed's reduce and all-gather buckets where its file says nothing


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    communication: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def state(self) -> int:
        """What stays from step to step: the part that can be counted to the byte."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Kept:
    """Numbers per slot that a forward pass keeps for the backward. whole: on every tensor rank, or split by slots with
    sequence parallelism; entered: inputs of column-split matrices, gathered and kept whole in either case; split: of
    this rank's heads or channels. wide, wide_split: fp32 statistics, alike."""

    whole: float
    entered: float = 0.0
    split: float = 0.0
    wide: float = 0.0
    wide_split: float = 0.0

    def bytes(self, *, slots: float, width: int, tensor: int, sequence: bool) -> float:
        """For `slots` of all sequences of a micro-batch, at `width` bytes a number."""
        rows = tensor if sequence else 1
        numbers = self.whole / rows + self.entered + self.split / tensor
        return slots * (width * numbers + 4 * (self.wide / rows + self.wide_split / tensor))


def block_activations(config: ModelConfig, recompute: str) -> Kept:
    """What a block keeps; C = hidden_size, m = ffn_multiple.

    Attention branch: its input (C whole), the norm's result (C entered); q, k, v (3 C split), the attention's result
    and the same transposed for the output matrix (2 C split); with qk_norm also q and k before it (2 C split) and their
    statistics (which the kernel on a GPU computes again instead). FFN branch: its input (C whole), the norm's result (C
    entered), GELU's input and result (2 m C split). sandwich_norm: each branch's result (C whole); dropout: each
    branch's scaled mask (C whole).
    recompute: selective keeps of the attention branch its input alone; full does of the whole block.
    """
    hidden, heads = config.hidden_size, config.num_heads
    if recompute == "full":
        return Kept(whole=hidden)
    statistics = 2 if config.norm == "layernorm" else 1
    mask, post = (hidden if config.dropout else 0), (hidden if config.sandwich_norm else 0)
    norms = statistics * (2 if config.sandwich_norm else 1)
    ffn = Kept(hidden + mask + post, hidden, 2 * config.ffn_multiple * hidden, norms)
    if recompute == "selective":
        return Kept(ffn.whole + hidden + mask, ffn.entered, ffn.split, ffn.wide)
    split = (7 if config.qk_norm else 5) * hidden
    of_heads = heads * (1 + (2 * statistics if config.qk_norm else 0))
    return Kept(2 * ffn.whole, 2 * hidden, ffn.split + split, 2 * norms, of_heads)


def activation_bytes(
    config: ModelConfig, spec: SequenceSpec, *, blocks: range, in_flight: int, sequences: int, width: int, tensor: int,
    sequence: bool, recompute: str, recompute_every: int,
) -> int:  # fmt: skip
    """Of a stage with these blocks and micro-batches of `sequences`, `in_flight` of them between forward and backward.

    On top come, for one block, what is computed again and the gradients that its backward holds at once (GELU's input
    and result, and the residual stream's).
    """
    place = dict(slots=sequences * spec.num_slots, width=width, tensor=tensor, sequence=sequence)
    chosen = sum((index + 1) % recompute_every == 0 for index in blocks)
    kept = chosen * block_activations(config, recompute).bytes(**place)
    kept += (len(blocks) - chosen) * block_activations(config, "none").bytes(**place)
    entry = Kept(config.hidden_size).bytes(**place)  # the stage's own input or embedding
    again = 0.0
    if chosen and recompute != "none":
        again = block_activations(config, "none").bytes(**place) - block_activations(config, recompute).bytes(**place)
    working = Kept(2 * config.hidden_size, split=2 * config.ffn_multiple * config.hidden_size).bytes(**place)
    return int(in_flight * (kept + entry) + again + working)


def logit_bytes(spec: SequenceSpec, *, sequences: int, width: int, tensor: int, z_loss: bool, hidden: int) -> int:
    """Of the last stage: logits of both segments, the loss' fp32 copies and gradients, the heads' normed input."""
    logits = sequences * (spec.text_slots * spec.text_vocab_size + spec.image_slots * spec.image_vocab_size) / tensor
    each = 2 * width + LOSS_BYTES + (4 if z_loss else 0)
    return int(logits * each + 2 * sequences * spec.num_slots * hidden * width)


def communication_bytes(zero: dict, *, stage: int, parameters: int, largest_layer: int, data: int, width: int) -> int:
    """Buffers of DeepSpeed's collectives, from the file's `zero_optimization` section.

    ZeRO 1-2: the bucket that gradients are reduced in (twice with overlap_comm) and the one that weights are gathered
    in. ZeRO 3: the reduce bucket twice, and whole weights: of the layer at work and of what is prefetched.
    """
    if stage == 0 or data == 1:
        return 0
    reduce = min(zero.get("reduce_bucket_size", DEFAULT_BUCKET), parameters)
    if stage < 3:
        gather = min(zero.get("allgather_bucket_size", DEFAULT_BUCKET), parameters)
        return int(width * (reduce * (2 if zero.get("overlap_comm") else 1) + gather))
    prefetch = min(zero.get("stage3_prefetch_bucket_size", DEFAULT_BUCKET // 10), parameters)
    live = min(zero.get("stage3_max_live_parameters", 10**9), 2 * largest_layer + prefetch, parameters)
    return int(width * (2 * reduce + live))
