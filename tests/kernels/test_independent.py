"""FlexAttention with the brute-force mask as an independent witness, and the tiles against the mask."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from kernels import PATTERNS, sparse_attention
from kernels.attention.tiles import BLOCK, Tile, choose_tile, image_box, score_tiles
from kernels.patterns import image_mask, window
from tests.kernels import brute_force
from tests.kernels.cases import qkv, sample_tensors, samples


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_the_brute_force_mask_gives_the_same_output(pattern):
    grid, text_slots, batch = (4, 5), 6, samples("mixed", 6)
    mask = brute_force.mask(pattern, grid, 3, text_slots, batch)
    q, k, v, _ = qkv(len(batch), 2, text_slots + 20, 16)

    def score(value, b, h, query, key):
        return torch.where(mask[b, query, key], value, float("-inf"))

    want = flex_attention(q.float(), k.float(), v.float(), score_mod=score)
    want = want.masked_fill(~mask.any(-1)[:, None, :, None], 0)
    got = sparse_attention(q, k, v, grid=grid, pattern=pattern, conv_size=3, **sample_tensors(batch))
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [(3, 5), (9, 13), (16, 16)])
def test_every_joined_pair_lies_in_its_tiles_box(pattern, grid, causal):
    view = window(pattern, grid, 5)
    tile = choose_tile(view)
    mask = image_mask(pattern, grid, conv_size=5, causal=causal)
    for first_row in range(0, view.rows, tile.rows):
        for first_col in range(0, view.cols, tile.cols):
            a, b, c, d = image_box(view, first_row, first_col, tile, causal)
            inside = torch.zeros(view.rows, view.cols, dtype=torch.bool)
            inside[a:b, c:d] = True
            owned = torch.zeros_like(inside)
            owned[first_row : first_row + tile.rows, first_col : first_col + tile.cols] = True
            assert not mask[owned.flatten()][:, ~inside.flatten()].any()


def test_tiles_of_the_10b_model_follow_its_patterns():
    chosen = {p: choose_tile(window(p, (32, 32))) for p in ("row", "column", "dense")}
    assert chosen == {"row": Tile(2, 32), "column": Tile(32, 2), "dense": Tile(1, 64)}
    row, dense = (score_tiles(window(p, (32, 32)), chosen[p], True) for p in ("row", "dense"))
    assert (row, dense) == (16, 16 * 17 // 2) and BLOCK == 64
