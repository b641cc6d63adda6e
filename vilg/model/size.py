"""Parameters and floating-point operations of a model, from its config alone.

A matrix product of [m, k] with [k, n] counts 2 m k n operations; norms, softmax, GELU and embeddings are not counted.
Per sequence and forward pass (Megatron-LM 2104.04473, appendix; PaLM 2204.02311, appendix B):

    2 * (weights of all matrices) * (slots they act on)  +  4 * C * (visible pairs), summed over layers

The second term is q k^T and p v over all heads. It counts the pairs that the pattern lets see each other, the work that
a perfect sparse kernel does, with full text segments. Backward is twice the forward.
Legend: C hidden, T text slots, N image slots, S = T + N, L layers.
"""

from collections.abc import Sequence
from itertools import accumulate

from vilg.config.schema import ModelConfig, ParallelConfig
from vilg.model.attention import layer_patterns
from vilg.tokens.sequence import SequenceSpec

BACKWARD_FACTOR = 2  # one product for the gradient of the input, one for that of the weights
# Forward operations that take as long, in forward and backward, as clearing, writing and adding up the gradient of one
# weight once a micro-batch; see `stage_costs`.
GRADIENT_COST = 25


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block: four matrices with biases, two norms (four with sandwich_norm), and two per head channel
    with qk_norm."""
    hidden, wide = config.hidden_size, config.ffn_multiple * config.hidden_size
    matrices = 4 * hidden * hidden + 2 * hidden * wide
    biases = 3 * hidden + hidden + wide + hidden
    qk_norms = 2 * (hidden // config.num_heads) if config.qk_norm else 0
    norms = 4 if config.sandwich_norm else 2
    return matrices + biases + norms * _norm_parameters(config) + qk_norms


def embedding_parameters(config: ModelConfig, spec: SequenceSpec) -> int:
    """Both tables, text positions, image rows and columns, begin-of-image, four segments."""
    rows = spec.text_vocab_size + spec.image_vocab_size + spec.text_slots + sum(spec.grid) + 1 + 4
    return rows * config.hidden_size


def head_parameters(config: ModelConfig, spec: SequenceSpec) -> int:
    """Final norm and the two output matrices."""
    return _norm_parameters(config) + (spec.text_vocab_size + spec.image_vocab_size) * config.hidden_size


def layer_parameters(config: ModelConfig, spec: SequenceSpec) -> list[int]:
    """Parameters of every layer of `vilg.layer_list`: Embed, blocks, Heads."""
    blocks = [block_parameters(config)] * config.num_layers
    return [embedding_parameters(config, spec), *blocks, head_parameters(config, spec)]


def num_parameters(config: ModelConfig, spec: SequenceSpec) -> int:
    """Parameters of the whole model."""
    return sum(layer_parameters(config, spec))


def visible_pairs(pattern: str, spec: SequenceSpec, *, image_is_target: bool, conv_size: int = 11) -> int:
    """(query, key) pairs of one sequence whose text fills all T slots: all source, or all target."""
    text, (rows, columns) = spec.text_slots, spec.grid
    image = rows * columns
    if image_is_target:
        text_pairs = text * text + image * text
    else:
        text_pairs = text * (text + 1) // 2 + text * image
    if pattern == "row":
        joined = rows * columns**2
    elif pattern == "column":
        joined = columns * rows**2
    elif pattern == "row_wrap":
        joined = _band(image, columns)
    elif pattern == "conv":
        joined = _band(rows, conv_size // 2) * _band(columns, conv_size // 2)
    elif pattern == "dense":
        joined = image**2
    else:
        raise ValueError(f"pattern={pattern!r} is unknown")
    # Windows are symmetric, so the causal half holds (joined - image) / 2 pairs and every slot itself.
    return text_pairs + ((joined + image) // 2 if image_is_target else joined)


def layer_costs(config: ModelConfig, spec: SequenceSpec, *, image_is_target: bool = True) -> list[int]:
    """Forward operations of one sequence in every layer of `vilg.layer_list`; Embed has none."""
    hidden = config.hidden_size
    weights = (4 + 2 * config.ffn_multiple) * hidden * hidden
    blocks = [
        2 * weights * spec.num_slots
        + 4 * hidden * visible_pairs(pattern, spec, image_is_target=image_is_target, conv_size=config.conv_size)
        for pattern in layer_patterns(config)
    ]
    heads = 2 * hidden * (spec.text_slots * spec.text_vocab_size + spec.image_slots * spec.image_vocab_size)
    return [0, *blocks, heads]


def stage_costs(config: ModelConfig, spec: SequenceSpec) -> list[int]:
    """What pipeline stages are cut by, of every layer of `vilg.layer_list`: its operations, and `GRADIENT_COST` for each
    of its parameters. No figure of speed or memory counts the latter.

    Without it Embed, which multiplies nothing, would be free. On one CPU core (hidden 1024, 64 + 16 x 16 slots, 40,960
    rows) it took 0.26, 0.15 and 0.08 of a block with 1, 2 and 4 sequences in fp32, 0.16 with 2 in bf16; with 16,384 rows
    0.06. That is about 50 operations a weight and micro-batch; 25 stand for two sequences in each. The same is in the
    heads: 1.24 of a block in fp32 and 1.12 in bf16, where operations alone say 1.05.
    """
    return [
        operations + GRADIENT_COST * parameters
        for operations, parameters in zip(layer_costs(config, spec), layer_parameters(config, spec), strict=True)
    ]


def sequence_flops(config: ModelConfig, spec: SequenceSpec, *, image_is_target: bool = True) -> int:
    """Operations of one sequence, forward and backward, without recomputation: the numerator of MFU."""
    return (1 + BACKWARD_FACTOR) * sum(layer_costs(config, spec, image_is_target=image_is_target))


def recomputed_costs(
    config: ModelConfig, spec: SequenceSpec, parallel: ParallelConfig, *, image_is_target: bool = True
) -> list[int]:
    """Forward operations of one sequence that the backward does again, in every layer of `vilg.layer_list`: of the
    blocks that `model/block.py: set_recompute` chooses, the attention branch (selective) or all (full). HFU counts them,
    MFU does not. torch stops a recomputation once it has all it needs, so the last matrix of it is not multiplied again
    unless its result is needed, as it is under a norm (sandwich_norm)."""
    hidden, wide = config.hidden_size, config.ffn_multiple * config.hidden_size
    if parallel.recompute == "none":
        return [0] * (config.num_layers + 2)
    costs = layer_costs(config, spec, image_is_target=image_is_target)
    feed_forward = 2 * 2 * hidden * wide * spec.num_slots
    last = 2 * hidden * (hidden if parallel.recompute == "selective" else wide) * spec.num_slots
    skipped = 0 if config.sandwich_norm else last
    again = [cost - skipped - (feed_forward if parallel.recompute == "selective" else 0) for cost in costs[1:-1]]
    return [0, *(cost if (i + 1) % parallel.recompute_every == 0 else 0 for i, cost in enumerate(again)), 0]


def stage_bounds(costs: Sequence[int], stages: int) -> tuple[int, ...]:
    """Cut layers into `stages` contiguous stages, none empty, whose dearest is as cheap as possible.

    Stage s holds layers bounds[s] .. bounds[s + 1] - 1. Among equal cuts the earlier stages are the longer ones.
    Raises ValueError for more stages than layers.
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} layers cannot fill {stages} pipeline stages; use at most {count}")
    total = [0, *accumulate(costs)]
    best = {(count, 0): (0, ())}  # (first layer, stages left) -> (dearest stage, bounds after first)
    for left in range(1, stages + 1):
        for first in range(count - left, -1, -1):
            options = []
            for stop in range(count - left + 1, first, -1):
                if (stop, left - 1) in best:
                    dearest, rest = best[stop, left - 1]
                    options.append((max(total[stop] - total[first], dearest), (stop, *rest)))
            if options:
                best[first, left] = min(options, key=lambda option: option[0])
    return (0, *best[0, stages][1])


def _norm_parameters(config: ModelConfig) -> int:
    return config.hidden_size * (2 if config.norm == "layernorm" else 1)


def _band(length: int, reach: int) -> int:
    """Pairs (i, j) of 0 .. length - 1 with |i - j| <= reach."""
    reach = min(reach, length - 1)
    return length * (2 * reach + 1) - reach * (reach + 1)
