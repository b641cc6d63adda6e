"""`split_heads` on CPU tensors, its checks, and the Triton kernels on a GPU."""

from types import SimpleNamespace

import pytest
import torch

from kernels import runtime, split_heads
from kernels.head_norm import op
from kernels.head_norm.op import torch_split_heads
from tests.kernels.norm_cases import largest_errors, packed, results, written_out

KINDS = ["layernorm", "rmsnorm"]


@pytest.mark.parametrize("kind", KINDS)
def test_cpu_path_is_the_formula(kind):
    inputs, options = packed(2, 5, 3, 20), dict(kind=kind, eps=1e-3)
    wanted = results(written_out, inputs, torch.float64, **options)
    assert max(largest_errors(results(split_heads, inputs, torch.float64, **options), wanted).values()) < 1e-12
    assert max(largest_errors(results(split_heads, inputs, torch.float32, **options), wanted).values()) < 1e-5


def test_values_are_a_view_and_nothing_is_an_empty_batch():
    qkv, *weights = (x.detach() for x in packed(2, 5, 3, 20)[:3])
    assert split_heads(qkv, *weights, kind="layernorm")[2].data_ptr() == qkv[:, :, :, 2].data_ptr()
    assert [x.shape for x in split_heads(qkv[:0], *weights, kind="rmsnorm")] == [(0, 3, 5, 20)] * 3


@pytest.mark.parametrize("change, message", [
    (dict(kind="batchnorm"), "kind='batchnorm'; use 'layernorm' or 'rmsnorm'"),
    (dict(qkv=torch.zeros(2, 5, 3, 8)), r"qkv has shape \(2, 5, 3, 8\); expected \[B, S, H, 3, D\]"),
    (dict(qkv=torch.zeros(2, 5, 4, 2, 8)), r"qkv has shape \(2, 5, 4, 2, 8\)"),
    (dict(qkv=torch.zeros(1, 1, 1, 3, 300)), "qkv has 300 channels a head; use 1 to 256"),
    (dict(qkv=torch.zeros(2, 5, 4, 8, 3).transpose(3, 4)), r"stride 3 in its last dimension; call qkv.contiguous\(\)"),
    (dict(qkv=torch.zeros(2, 5, 4, 3, 8, dtype=torch.int32)), "qkv is torch.int32; use a floating type"),
    (dict(q_weight=torch.zeros(7)), r"q_weight is \(7,\) torch.float32 on cpu; expected \[8\] torch.float32 on cpu"),
    (dict(k_weight=torch.zeros(8).half()), r"k_weight is \(8,\) torch.float16 on cpu"),
])  # fmt: skip
def test_what_does_not_fit_is_named(change, message):
    call = dict(qkv=torch.zeros(2, 5, 4, 3, 8), q_weight=torch.ones(8), k_weight=torch.ones(8), kind="layernorm")
    with pytest.raises(ValueError, match=message):
        split_heads(**(call | change))


@pytest.mark.parametrize("dtype, capability, reason", [
    (torch.float64, (9, 0), "it is torch.float64; the Triton kernels take float32, bfloat16 and float16"),
    (torch.bfloat16, (7, 5), "has compute capability 7.5; the Triton kernels need 8.0 or more"),
])  # fmt: skip
def test_why_triton_does_not_run_is_said_once(dtype, capability, reason, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    runtime.look_for_triton.cache_clear()
    runtime.warn_once.cache_clear()
    qkv = SimpleNamespace(is_cuda=True, numel=lambda: 1, dtype=dtype, device="cuda:0")
    assert not op.has_kernel(qkv) and not op.has_kernel(qkv)
    (warning,) = [str(w.message) for w in recwarn if reason in str(w.message)]
    assert warning.startswith("the norm of queries and keys runs in plain torch, slowly: ")
    runtime.look_for_triton.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [32, 64, 80, 128])
def test_kernels_match_the_formula_on_the_gpu(kind, channels):
    inputs, options = packed(3, 77, 5, channels, device="cuda"), dict(kind=kind, eps=1e-5)
    wanted = results(written_out, inputs, torch.float64, **options)
    found = results(split_heads, inputs, torch.float32, **options)
    assert max(largest_errors(found, wanted).values()) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(found, results(split_heads, inputs, torch.float32, **options)))
    ours = largest_errors(results(split_heads, inputs, torch.bfloat16, **options), wanted)
    theirs = largest_errors(results(torch_split_heads, inputs, torch.bfloat16, **options), wanted)
    assert all(ours[name] <= 1.5 * theirs[name] for name in ours), (ours, theirs)


@pytest.mark.gpu
def test_compiled_call_gives_the_same_on_the_gpu():
    inputs, options = packed(2, 40, 4, 64, device="cuda"), dict(kind="layernorm", eps=1e-5)
    wanted = results(split_heads, inputs, torch.bfloat16, **options)
    found = results(torch.compile(split_heads), inputs, torch.bfloat16, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
