"""The layout table: one row per parameter, parts that join to the whole, weights that no layout changes."""

import pytest
import torch

from tests.model_support import SPEC, tiny_config, tiny_model
from vilg.errors import UserError
from vilg.model.vilg import Vilg, check_shape
from vilg.parallel import layout
from vilg.parallel.grid import Grid, axis_ranks, check_sizes

CONFIGS = [tiny_config(), tiny_config(norm="rmsnorm", qk_norm=True), tiny_config(attention="dense", qk_norm=True, sandwich_norm=True)]


@pytest.mark.parametrize("config", CONFIGS, ids=["layernorm", "rmsnorm", "dense"])
def test_every_parameter_matches_exactly_one_row_of_the_table(config):
    for name, _ in Vilg(config, SPEC, device="meta").named_parameters():
        layout.rule_of(name)  # raises on none or several


def test_every_row_of_the_table_is_used():
    names = [name for name, _ in Vilg(tiny_config(qk_norm=True), SPEC, device="meta").named_parameters()]
    assert {layout.rule_of(name).pattern for name in names} == {rule.pattern for rule in layout.RULES}


def test_unknown_parameter_is_refused():
    for name in ("layers.1.attention.gate.weight", "attention.qkv.weight", "layers.1.attention.qkv.weight.more"):
        with pytest.raises(KeyError, match="matches 0 rows"):
            layout.rule_of(name)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_join_to_the_whole_and_have_equal_shapes(size):
    for name, whole in tiny_model().state_dict().items():
        parts = [layout.shard(name, whole, rank=rank, size=size) for rank in range(size)]
        assert torch.equal(layout.merge(name, parts), whole)
        assert {layout.full_shape(name, part.shape, size=size) for part in parts} == {tuple(whole.shape)}


def test_parts_of_qkv_hold_whole_heads():
    config = tiny_config()
    head_dim = config.hidden_size // config.num_heads
    whole = torch.arange(3 * config.hidden_size).view(-1, 1)
    part = layout.shard("layers.1.attention.qkv.weight", whole, rank=1, size=2).view(-1, 3, head_dim)
    assert torch.equal(part, whole.view(config.num_heads, 3, head_dim)[2:])


def test_uneven_cut_is_refused_with_the_values():
    with pytest.raises(ValueError, match=r"text_table.*cannot be cut into 5"):
        layout.shard("layers.0.text_table.weight", torch.zeros(24, 2), rank=0, size=5)


def test_heads_or_vocabulary_that_do_not_divide_are_refused_with_what_would_work():
    with pytest.raises(UserError, match="num_heads=4 is not divisible by parallel.tensor=3; use one of 1, 2, 4"):
        check_shape(tiny_config(), SPEC, tensor=3)


def test_initial_weights_depend_on_seed_and_name_only():
    first, again, other = (tiny_model(seed=seed).state_dict() for seed in (0, 0, 1))
    deeper = tiny_model(tiny_config(num_layers=5, attention="dense"), seed=0).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, deeper[name])
        if layout.rule_of(name).init in ("normal", "residual"):
            assert not torch.equal(value, other[name])
    same_shape = [first[f"layers.{i}.attention.qkv.weight"] for i in (1, 2)]
    assert not torch.equal(*same_shape)


def test_initial_standard_deviations_and_constants():
    config = tiny_config(hidden_size=64, init_std=0.02)
    for name, value in tiny_model(config).state_dict().items():
        rule = layout.rule_of(name)
        if rule.init in ("zeros", "ones"):
            assert (value == float(rule.init == "ones")).all()
        elif value.numel() > 1000:
            wanted = 0.02 if rule.init == "normal" else 0.02 / (2 * config.num_layers) ** 0.5
            assert value.std().item() == pytest.approx(wanted, rel=0.1)


def test_bf16_model_starts_from_the_rounded_fp32_weights():
    for (name, value), whole in zip(
        tiny_model(dtype=torch.bfloat16).state_dict().items(), tiny_model().state_dict().values()
    ):
        assert torch.equal(value, whole.bfloat16()), name


def test_only_matrices_are_decayed():
    decayed = {name.split(".", 2)[2] for name in tiny_model().state_dict() if layout.rule_of(name).decay}
    matrices = {"attention.qkv", "attention.out", "ffn.up", "ffn.down", "text_head", "image_head"}
    assert decayed == {f"{matrix}.weight" for matrix in matrices}


def test_parameters_are_marked_as_parts_only_where_they_are_split():
    model = Vilg(tiny_config(), SPEC, device="meta")
    layout.mark_parameters(model, size=2)
    marked = {name for name, p in model.named_parameters() if p.tensor_model_parallel and p.model_parallel}
    assert marked == {name for name, _ in model.named_parameters() if layout.rule_of(name).dim is not None}
    layout.mark_parameters(model, size=1)
    assert not any(p.tensor_model_parallel for p in model.parameters())


def test_axes_cover_all_ranks_with_the_tensor_axis_fastest():
    axes = axis_ranks(data=2, tensor=3, pipeline=2)
    assert axes["tensor"] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert axes["data"][0] == [0, 3] and axes["pipeline"][0] == [0, 6]
    for groups in axes.values():
        assert sorted(sum(groups, [])) == list(range(12))
    for rank in range(12):
        grid = Grid(data_size=2, tensor_size=3, pipeline_size=2, rank=rank)
        assert [g.index(rank) for g in axes["tensor"] if rank in g] == [grid.tensor_rank]
        assert [g.index(rank) for g in axes["data"] if rank in g] == [grid.data_rank]
        assert [g.index(rank) for g in axes["pipeline"] if rank in g] == [grid.pipeline_rank]


def test_world_that_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match="6 processes .* parallel.tensor=4 .* start a multiple of 4"):
        check_sizes(6, tensor=4, pipeline=1)


def test_single_grid_is_one_process():
    grid = Grid.build()
    assert (grid.world_size, grid.tensor_group, grid.data_rank) == (1, None, 0)
