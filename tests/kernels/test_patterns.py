"""The one definition against loops over pairs, and everything derived from it against the definition."""

import pytest
import torch

from kernels import patterns
from kernels.patterns import PATTERNS
from tests.kernels import brute_force
from tests.kernels.cases import sample_tensors, samples

GRIDS = [(1, 1), (1, 6), (5, 1), (3, 5), (6, 4)]


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text", "question", "mixed"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dense_mask_equals_loops_over_pairs(pattern, direction):
    for grid in [(3, 5), (4, 3)]:
        for text_slots in (0, 1, 5):
            batch = samples(direction, text_slots)
            for conv_size in (3, 11) if pattern == "conv" else (11,):
                ours = patterns.dense_mask(pattern, grid, text_slots, **sample_tensors(batch), conv_size=conv_size)
                assert torch.equal(ours, brute_force.mask(pattern, grid, conv_size, text_slots, batch))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", GRIDS)
def test_image_mask_and_pair_rule_equal_loops_over_pairs(pattern, grid):
    slots = range(grid[0] * grid[1])
    pairs = torch.tensor([[brute_force.joined(pattern, *grid, 3, q, k) for k in slots] for q in slots])
    assert torch.equal(patterns.image_mask(pattern, grid, conv_size=3, causal=False), pairs)
    assert torch.equal(patterns.image_mask(pattern, grid, conv_size=3, causal=True), pairs.tril())
    assert pairs.tolist() == [[patterns.image_joined(pattern, grid, 3, q, k) for k in slots] for q in slots]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", GRIDS)
def test_visible_and_kept_slots_follow_from_the_causal_mask(pattern, grid):
    mask = patterns.image_mask(pattern, grid, conv_size=3, causal=True)
    for slot in range(len(mask)):
        assert patterns.visible_image_slots(pattern, grid, slot, conv_size=3) == mask[slot].nonzero()[:, 0].tolist()
    for next_slot in range(len(mask) + 1):
        still_read = mask[next_slot:, :next_slot].any(0).nonzero()[:, 0].tolist()
        assert patterns.kept_image_slots(pattern, grid, next_slot, conv_size=3) == still_read


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", GRIDS)
def test_ring_of_cache_capacity_is_the_smallest_that_never_overwrites_a_kept_slot(pattern, grid):
    def collides(capacity: int) -> bool:
        for slot in range(grid[0] * grid[1]):
            read = patterns.visible_image_slots(pattern, grid, slot, conv_size=3)
            if len({s % capacity for s in range(slot - capacity + 1, slot + 1)} & {s % capacity for s in read}) < len(read):
                return True
            if any(slot - s >= capacity for s in read):
                return True
        return False

    capacity = patterns.cache_capacity(pattern, grid, conv_size=3)
    assert not collides(capacity)
    assert capacity == 1 or collides(capacity - 1)


@pytest.mark.parametrize("call, text", [
    (lambda: patterns.window("rows", (2, 2)), "pattern='rows' is unknown; use one of row, row_wrap"),
    (lambda: patterns.window("conv", (2, 2), 4), "conv_size=4 must be an odd positive integer"),
    (lambda: patterns.window("row", (2, 0)), r"grid=\(2, 0\) is not a pair"),
    (lambda: patterns.visible_image_slots("row", (2, 2), 4), "slot=4 is outside 0 .. 3"),
    (lambda: patterns.kept_image_slots("row", (2, 2), -1), "next_slot=-1 is outside 0 .. 4"),
])  # fmt: skip
def test_impossible_patterns_are_refused_with_the_value(call, text):
    with pytest.raises(ValueError, match=text):
        call()
