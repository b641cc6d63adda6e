"""Preflight's row about the kernels: do they compute here what plain torch computes, at the sizes of the recipe?

A miscompiled kernel, an untried GPU, driver or Triton gives a loss that falls a little less well, or not at all, days
later. The check also compiles the kernels of every node before the first step needs them.

Legend: B samples, S slots, H heads, D channels a head.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import can_run_triton, split_heads
from kernels.attention.reference import reference_attention
from kernels.head_norm.op import has_kernel, torch_split_heads
from vilg.config.schema import Recipe
from vilg.model.attention import SparseAttend, layer_patterns
from vilg.parallel.precision import DTYPES
from vilg.parallel.ranks import Ranks
from vilg.tools.findings import Report, Row, node_name

ALLOWED = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 6e-2}  # rounding takes up to a third
_HEADS = 2  # of attention, whose kernels are the same for any number
_NORM_SLOTS = 256  # its kernels are the same for any number
_MOST_ON_CPU = 4500  # slots; more would take minutes, and there is no kernel to check
_QKV = ("queries", "keys", "values")


def check_kernels(report: Report, recipe: Recipe, ranks: Ranks, device: torch.device) -> None:
    """Add the row; all ranks call it. It comes last: a kernel that reads out of bounds leaves the device unusable."""
    tokens = recipe.tokens
    if device.type == "cpu" and tokens.text_slots + tokens.grid[0] * tokens.grid[1] > _MOST_ON_CPU:
        report.rows.append(Row("kernels", "absent", "plain torch, which needs no check, and sequences are long"))
        return
    worst, wrong, done = 0.0, None, []
    try:
        for name, what, error in kernel_errors(recipe, device):
            done += [] if name in done else [name]
            worst = max(worst, error)
            if not error <= ALLOWED[recipe.precision]:
                wrong = f"{name}: {what} {error:.1%} from plain torch's in fp64"
                break
    except Exception as error:  # compilers, drivers and devices have errors of their own
        lines = str(error).strip().splitlines() or [""]
        wrong = f"{type(error).__name__}: {lines[0]}"
    found = ranks.gather((worst, wrong and f"{node_name()} (rank {ranks.rank}): {wrong}"))
    if any(text for _, text in found):
        report.blame_few([node for node, (_, text) in zip(report.nodes, found, strict=True) if text])
        report.rows.append(Row("kernels", "bad", "; ".join(text for _, text in found if text)))
        return
    report.rows.append(Row("kernels", "ok", (
        f"{', '.join(done)} ({recipe.precision}, {tokens.text_slots} + {tokens.grid[0]} x {tokens.grid[1]} slots, "
        f"{'Triton' if _uses_triton(recipe, device) else 'plain torch'}): outputs and gradients within "
        f"{max(worst for worst, _ in found):.1g} of fp64's"
    )))  # fmt: skip


def kernel_errors(recipe: Recipe, device: torch.device) -> Iterator[tuple[str, str, float]]:
    """Operation, tensor and error (`_worst_row`) of outputs and gradients in the recipe's precision on a mixed batch: for each
    pattern of the model's layers, and for the norm of queries and keys where it has a kernel."""
    model, (rows, cols), text = recipe.model, recipe.tokens.grid, recipe.tokens.text_slots
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, DTYPES[recipe.precision])

    batch, channels = _samples(text, device), model.hidden_size // model.num_heads
    size = len(batch["text_len"]), text + rows * cols, _HEADS
    packed, grad = draw(*size, 3, channels), draw(*size, channels).transpose(1, 2)
    attend = SparseAttend((rows, cols), **batch, conv_size=model.conv_size)
    for pattern in dict.fromkeys(layer_patterns(model)):
        found = _with_gradients(lambda *qkv: attend(*qkv, pattern), _split(packed), grad)
        right = _exact_attention(packed, grad, batch, grid=(rows, cols), pattern=pattern, conv_size=model.conv_size)
        for what, ours, exact in zip(("output", *(f"gradient of {name}" for name in _QKV)), found, right, strict=True):
            yield pattern, what, _worst_row(ours, exact)
    heads = model.num_heads // recipe.parallel.tensor
    if model.qk_norm and has_kernel(packed):
        leaves = [draw(2, _NORM_SLOTS, heads, 3, channels), draw(channels), draw(channels)]
        grads = [draw(2, heads, _NORM_SLOTS, channels) for _ in range(3)]
        options = dict(kind=model.norm, eps=1e-5)
        found = _with_gradients(lambda *x: split_heads(*x, **options), leaves, grads)
        right = _with_gradients(
            lambda *x: torch_split_heads(*x, **options), [x.double() for x in leaves], [x.double() for x in grads]
        )
        of = ("the projection", "the queries' weight", "the keys' weight")
        for what, ours, exact in zip((*_QKV, *(f"gradient of {name}" for name in of)), found, right, strict=True):
            yield "query-key norm", what, _worst_row(ours, exact)


def _samples(text: int, device: torch.device) -> dict[str, Tensor]:
    """A long and a short prompt, a caption, an answer behind a question; int32 [4] each."""
    half, third = (text + 1) // 2, (text + 2) // 3
    columns = dict(text_len=[text, third, half, text], text_prefix=[text, third, 0, half], image_is_target=[1, 1, 0, 0])
    return {name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in columns.items()}


def _split(packed: Tensor) -> list[Tensor]:
    """[B, S, H, 3, D] -> views [B, H, S, D], as the model's attention has them without a norm between."""
    return [part.transpose(1, 2) for part in packed.unbind(3)]


def _with_gradients(function: Callable, leaves: list[Tensor], grads: Tensor | list[Tensor]) -> list[Tensor]:
    """Outputs of `function`, then the gradients of all leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(out, leaves, grads)]


def _exact_attention(packed: Tensor, grad: Tensor, batch: dict[str, Tensor], **options) -> list[Tensor]:
    """In fp64, a sample and a head at a time: all scores at once would not fit for large grids."""
    parts = [
        _with_gradients(
            lambda *qkv: reference_attention(*qkv, **{name: value[i : i + 1] for name, value in batch.items()}, **options),
            [x.double() for x in _split(packed[i : i + 1, :, h : h + 1])],
            grad[i : i + 1, h : h + 1].double(),
        )
        for i in range(packed.shape[0])
        for h in range(_HEADS)
    ]
    return [torch.cat(tensors).unflatten(0, (-1, _HEADS)).flatten(1, 2) for tensors in zip(*parts, strict=True)]


def _worst_row(found: Tensor, right: Tensor) -> float:
    """The error of a row [D], as a share of the mean of its own norm and the rows' mean norm: a row that is all wrong has
    about 1, however many are right."""
    size = right.norm(dim=-1)
    return float(((found.double() - right).norm(dim=-1) / (size + size.mean())).max() * 2)


def _uses_triton(recipe: Recipe, device: torch.device) -> bool:
    channels = recipe.model.hidden_size // recipe.model.num_heads
    return can_run_triton(torch.empty(1, 1, 1, channels, dtype=DTYPES[recipe.precision], device=device))
