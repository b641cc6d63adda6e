"""The kernels of `split_heads` against torch's norms in fp64: results and every gradient, memory poisoned."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.head_norm import triton_kernels, triton_op
from kernels.head_norm.op import torch_split_heads
from tests.kernels.interpreted.planted import plant
from tests.kernels.norm_cases import NAMES, largest_errors, packed, results

KINDS = ["layernorm", "rmsnorm"]


def run(qkv, q_weight, k_weight, *, kind, eps=1e-5):
    return triton_op.triton_split_heads(qkv, q_weight, k_weight, kind == "layernorm", eps)


def errors(inputs, dtype, function=run, **options):
    options = {"eps": 1e-5, **options}
    wanted = results(torch_split_heads, inputs, torch.float64, **options)
    return largest_errors(results(function, inputs, dtype, **options), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [3, 16, 64, 80, 256])
def test_kernels_match_torch_at_every_width(channels, kind):
    assert max(errors(packed(2, 7, 3, channels), torch.float64, kind=kind).values()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_match_torch_over_several_programs(kind):
    """642 rows of 64 channels: programs of 32 rows forward, of 256 backward, neither filled by the last rows."""
    assert max(errors(packed(2, 107, 3, 64), torch.float64, kind=kind, eps=0.1).values()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_in_any_memory_order_is_taken_as_it_is(kind):
    inputs = packed(2, 7, 3, 20)
    inputs[0] = inputs[0].permute(3, 1, 0, 2, 4).contiguous().permute(2, 1, 3, 0, 4)
    seen = [run(inputs[0], *inputs[1:3], kind=kind)[2].data_ptr(), inputs[0][:, :, :, 2].data_ptr()]
    assert seen[0] == seen[1] and not inputs[0].is_contiguous()
    assert max(errors(inputs, torch.float64, kind=kind).values()) < 1e-12


def test_weights_in_any_memory_order_are_taken():
    inputs = packed(2, 7, 3, 16)
    inputs[1], inputs[2] = inputs[1].new_ones(16, 2)[:, 0] * 3, inputs[2][:1].expand(16)
    inputs[1] = torch.stack([inputs[1], inputs[2]], 1)[:, 0]
    assert (inputs[1].stride(0), inputs[2].stride(0)) == (2, 0)
    wanted = torch_split_heads(*inputs[:3], kind="rmsnorm", eps=1e-5)
    for ours, theirs in zip(run(*inputs[:3], kind="rmsnorm"), wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
    leaves = [x.requires_grad_() for x in inputs[:3]]
    found, exact = (
        torch.autograd.grad(f(*leaves, kind="rmsnorm", eps=1e-5), leaves, inputs[3:]) for f in (run, torch_split_heads)
    )
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_stays_within_1e_5_and_half_precision_errs_little_more_than_torch(kind):
    inputs = packed(2, 33, 3, 64)
    assert max(errors(inputs, torch.float32, kind=kind).values()) < 1e-5
    for dtype in (torch.float16, torch.bfloat16):
        half = [x.to(dtype).double() for x in inputs]
        ours, theirs = (errors(half, dtype, function, kind=kind) for function in (run, torch_split_heads))
        assert all(ours[name] <= 1.5 * theirs[name] + 1e-9 for name in NAMES), (dtype, ours, theirs)


def test_custom_ops_keep_torchs_contract():
    qkv, q_weight, k_weight, dq, dk, dv = packed(2, 7, 3, 20)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(triton_op.split_heads, (qkv, q_weight, k_weight, True, 1e-5), test_utils=utilities)
    arguments = (dq, dk, dv, qkv, q_weight, k_weight, True, 1e-5)
    torch.library.opcheck(triton_op.split_heads_gradient, arguments, test_utils=utilities)


def test_compiled_and_checkpointed_calls_give_the_same():
    inputs = packed(2, 7, 3, 20)

    def projected(qkv, q_weight, k_weight):
        return tuple(x * 2 for x in run(qkv + 1, q_weight, k_weight, kind="layernorm"))

    def checkpointed(*inputs):
        return checkpoint(projected, *inputs, use_reentrant=False)

    wanted = results(projected, inputs, torch.float64)
    for function in (checkpointed, torch.compile(projected, backend="aot_eager", fullgraph=True)):
        assert all(torch.equal(a, b) for a, b in zip(results(function, inputs, torch.float64), wanted, strict=True))


BUGS = {
    "mean not taken out": ("x = x - (tl.sum(x, 1) / D)[:, None]", "x = x"),
    "padded channels not zero": ("x = tl.where(inside, x, 0.0)", "x = x"),
    "eps outside the root": ("tl.sqrt(tl.sum(x * x, 1) / D + eps)", "(tl.sqrt(tl.sum(x * x, 1) / D) + eps)"),
    "keys by the queries' weight": ("narrow(k_unit * k_weight,", "narrow(k_unit * q_weight,"),
    "gradient's mean forgotten": ("along = along * unit + (tl.sum(scaled, 1) / D)[:, None]", "along = along * unit"),
    "keys' gradient by the queries' weight": ("unit, reciprocal, k_weight, D, CENTRED)", "unit, reciprocal, q_weight, D, CENTRED)"),
    "one step short": ("for step in range(STEPS):", "for step in range(STEPS - 1):"),
    "weight's gradient of the last step alone": ("k_part += grad.to(ACC) * unit", "k_part = grad.to(ACC) * unit"),
    "values' gradient in the keys' place": ("tl.store(out + 2 * D, grad", "tl.store(out + D, grad"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    broken = plant(triton_kernels, *BUGS[bug], tmp_path)
    for name in ("split_heads_kernel", "split_heads_gradient_kernel"):
        monkeypatch.setattr(triton_op, name, getattr(broken, name))
    found = errors(packed(2, 61, 3, 40), torch.float64, kind="layernorm", eps=0.1)
    assert not max(found.values()) < 1e-12
