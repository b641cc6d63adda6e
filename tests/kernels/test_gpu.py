"""What only a CUDA device can show; the larger matrix of shapes and all speed figures are in benchmarks/attention.py."""

from types import SimpleNamespace

import pytest
import torch

from kernels import PATTERNS, can_run_triton, decode_attention, patterns, runtime, sparse_attention
from kernels.attention.decode import torch_decode
from tests.kernels.cases import assert_matches_reference, output_and_gradients, qkv, sample_tensors, samples


@pytest.fixture
def on_cuda():
    batch = samples("mixed", 77)
    inputs = qkv(len(batch), 2, 77 + 13 * 32, 64, device="cuda")
    return inputs, dict(grid=(13, 32), **sample_tensors(batch, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_match_reference_on_the_gpu(pattern, on_cuda):
    inputs, call = on_cuda
    assert can_run_triton(inputs[0].float(), raise_error=True)
    assert_matches_reference(sparse_attention, inputs, torch.float32, 1e-5, pattern=pattern, **call)
    assert_matches_reference(sparse_attention, inputs, torch.bfloat16, 2e-2, pattern=pattern, **call)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_with_the_10b_models_settings_match_reference_on_the_gpu(pattern):
    """Its grid is one of those for which register limits hold."""
    batch = samples("mixed", 128)
    inputs = qkv(len(batch), 2, 128 + 32 * 32, 64, device="cuda")
    call = dict(grid=(32, 32), pattern=pattern, **sample_tensors(batch, device="cuda"))
    assert_matches_reference(sparse_attention, inputs, torch.bfloat16, 2e-2, **call)


@pytest.mark.gpu
def test_fp32_does_not_drift_over_many_steps_on_the_gpu():
    """A running maximum that stays must leave the sums exactly as they are, though a GPU fuses a multiplication with a sum:
    with one key for all slots every query sees the mean of the values."""
    slots = 20 + 64 * 64
    q, k, v, _ = (x.float() for x in qkv(1, 2, slots, 64, device="cuda"))
    k, v = torch.full_like(k, 16.0), torch.linspace(-0.5, 0.5, slots, device="cuda")[:, None].expand_as(v).contiguous()
    call = dict(grid=(64, 64), pattern="dense", **sample_tensors([(20, 20, 0)], device="cuda"))
    assert (sparse_attention(q, k, v, **call) - v.double().mean(2, keepdim=True)).abs().max() < 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [32, 80, 128])
def test_every_head_width_matches_reference_on_the_gpu(channels):
    batch = samples("mixed", 9)
    inputs = qkv(len(batch), 2, 9 + 8 * 8, channels, device="cuda")
    call = dict(grid=(8, 8), pattern="conv", **sample_tensors(batch, device="cuda"))
    assert_matches_reference(sparse_attention, inputs, torch.float32, 1e-5, **call)


@pytest.mark.gpu
def test_backward_is_bitwise_repeatable_on_the_gpu(on_cuda):
    inputs, call = on_cuda
    half = [t.bfloat16() for t in inputs]
    first = output_and_gradients(sparse_attention, *half, pattern="row", **call)
    for _ in range(9):
        again = output_and_gradients(sparse_attention, *half, pattern="row", **call)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
def test_compiled_call_gives_the_same_gradients_on_the_gpu(on_cuda):
    inputs, call = on_cuda
    half = [t.bfloat16() for t in inputs]
    compiled = torch.compile(sparse_attention)
    want = output_and_gradients(sparse_attention, *half, pattern="column", **call)
    got = output_and_gradients(compiled, *half, pattern="column", **call)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decode_kernel_replays_from_a_cuda_graph(pattern):
    grid, capacity = (8, 8), patterns.cache_capacity(pattern, (8, 8))
    q, image_k, image_v, _ = (t.float() for t in qkv(6, 2, capacity, 64, device="cuda"))
    _, text_k, text_v, _ = (t.float() for t in qkv(2, 2, 20, 64, seed=1, device="cuda"))
    prefix = torch.tensor([20, 3], dtype=torch.int32, device="cuda")
    slot = torch.zeros(6, dtype=torch.int32, device="cuda")
    call = (q[:, :, 0].contiguous(), text_k, text_v, image_k, image_v)
    options = dict(grid=grid, pattern=pattern, text_prefix=prefix, image_slot=slot)
    decode_attention(*call, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(*call, **options)
    for value in (0, 17, 63):
        slot.fill_(value)
        graph.replay()
        want = torch_decode(*call, prefix, slot, patterns.window(pattern, grid), 64**-0.5)
        assert (out - want).abs().max() < 1e-5


def cuda_like(dtype=torch.bfloat16, channels=64):
    return SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 1, 4, channels), device="cuda:0")


@pytest.mark.parametrize("q, reason", [
    (torch.zeros(1, 1, 4, 64), "q is on cpu; the Triton kernels need a CUDA device"),
    (cuda_like(dtype=torch.float64), "q is float64"),
    (cuda_like(channels=48), "q has 48 channels a head; the Triton kernels take 32, 64, 80 and 128"),
    (cuda_like(), "cuda:0 has compute capability 7.5; the Triton kernels need 8.0 or more"),
])  # fmt: skip
def test_why_triton_cannot_run_is_said_and_said_once(q, reason, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    runtime.look_for_triton.cache_clear()
    runtime.warn_once.cache_clear()
    with pytest.raises(ValueError, match=reason):
        can_run_triton(q, raise_error=True)
    assert not can_run_triton(q) and not can_run_triton(q)
    assert len([w for w in recwarn if reason in str(w.message)]) == (1 if q.is_cuda else 0)
    runtime.look_for_triton.cache_clear()
