"""ONE table: parameter name -> how it is split over tensor ranks, how it starts, and whether it is decayed.

Layers, initial weights, the optimizer's groups, checkpoints, exports and tests read this table and nothing else.
Names are those of `Vilg.state_dict()`: `layers.<index>.<parameter>`.

A split parameter is cut into equal contiguous parts along `dim`; part r lives on tensor rank r, so that joining is
plain concatenation. For that the rows of `qkv` are ordered by head, and within a head query, key, value: [H, 3, D]
flattened. A contiguous cut then holds whole heads.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rule:
    """How one family of parameters is treated.

    dim: split dimension, None if every tensor rank holds the whole. init: `normal` N(0, init_std); `residual` the same
    times 1 / sqrt(2 * num_layers) for the two matrices that write into the residual stream (GPT-2, section 2.3);
    `zeros`; `ones`. decay: whether weight decay applies.
    """

    pattern: str
    dim: int | None
    init: Literal["normal", "residual", "zeros", "ones"]
    decay: bool


RULES = (
    Rule(r"(text|image)_table\.weight", 0, "normal", False),
    Rule(r"(text_position|image_row|image_column|segment|begin_of_image)", None, "normal", False),
    Rule(r"attention\.qkv\.weight", 0, "normal", True),
    Rule(r"attention\.qkv\.bias", 0, "zeros", False),
    Rule(r"attention\.out\.weight", 1, "residual", True),
    Rule(r"attention\.out\.bias", None, "zeros", False),
    Rule(r"ffn\.up\.weight", 0, "normal", True),
    Rule(r"ffn\.up\.bias", 0, "zeros", False),
    Rule(r"ffn\.down\.weight", 1, "residual", True),
    Rule(r"ffn\.down\.bias", None, "zeros", False),
    Rule(r"(text|image)_head\.weight", 0, "normal", True),
    Rule(r"([a-z]+\.)?([qk]_|post_)?norm\.weight", None, "ones", False),
    Rule(r"([a-z]+\.)?(post_)?norm\.bias", None, "zeros", False),
)
_NAME = re.compile(r"layers\.\d+\.(.+)")


def rule_of(name: str) -> Rule:
    """The one rule for a parameter of `Vilg`. Raises KeyError if none or several match."""
    match = _NAME.fullmatch(name)
    rules = [rule for rule in RULES if match and re.fullmatch(rule.pattern, match[1])]
    if len(rules) != 1:
        raise KeyError(f"parameter {name!r} matches {len(rules)} rows of the layout table instead of one")
    return rules[0]


def shard(name: str, full: Tensor, *, rank: int, size: int) -> Tensor:
    """The part of the whole parameter that tensor rank `rank` of `size` holds: a view, or the whole if not split."""
    dim = rule_of(name).dim
    if dim is None or size == 1:
        return full
    if full.shape[dim] % size:
        raise ValueError(f"{name}: dim {dim} of {tuple(full.shape)} cannot be cut into {size} equal parts")
    return full.chunk(size, dim)[rank]


def merge(name: str, parts: Sequence[Tensor]) -> Tensor:
    """The whole parameter from the parts of all tensor ranks, in rank order."""
    dim = rule_of(name).dim
    return parts[0] if dim is None else torch.cat(list(parts), dim)


def full_shape(name: str, local_shape: Sequence[int], *, size: int) -> tuple[int, ...]:
    """Shape of the whole parameter whose part on one of `size` tensor ranks has `local_shape`."""
    shape, dim = list(local_shape), rule_of(name).dim
    if dim is not None:
        shape[dim] *= size
    return tuple(shape)


def initial_value(
    name: str, shape: Sequence[int], *, seed: int, init_std: float, num_layers: int
) -> Tensor:
    """The whole parameter at the start, fp32 [shape] on the CPU: a function of (seed, name) and the model's shape only.

    Every parallel layout starts from the same weights because each rank draws the whole parameter with the parameter's
    own generator and keeps its part. The 10B model's largest is 268 MB; a core draws all 10B values in about a minute,
    and a pipeline stage draws its share only.
    """
    rule = rule_of(name)
    if rule.init in ("zeros", "ones"):
        return torch.full(tuple(shape), float(rule.init == "ones"))
    digest = hashlib.sha256(f"initial weights/{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    std = init_std / (2 * num_layers) ** 0.5 if rule.init == "residual" else init_std
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)


def mark_parameters(module: nn.Module, *, prefix: str = "", size: int) -> None:
    """Tell DeepSpeed which parameters are parts, so that a gradient norm counts replicated ones once.

    `prefix` completes the names of `module`'s parameters to those of `Vilg`.
    """
    for name, parameter in module.named_parameters():
        is_part = size > 1 and rule_of(prefix + name).dim is not None
        parameter.model_parallel = parameter.tensor_model_parallel = is_part
