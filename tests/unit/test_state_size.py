"""Training state counted from the config alone, by DeepSpeed's rules; tests/distributed/test_state_bytes.py holds the
counts against real engines."""

import pytest
import torch

from tests.unit.test_size import TEN_BILLION, TEN_BILLION_SPEC, each_config
from vilg.model import size
from vilg.model.state_size import Parameter, StateBytes, stage_parameters, state_bytes
from vilg.model.vilg import Vilg
from vilg.parallel import layout

# 1,007 and 3 numbers: no multiple of what DeepSpeed aligns to.
ODD = (Parameter(1000, True), Parameter(3, False), Parameter(7, True))
SUMMED = {"data_types": {"grad_accum_dtype": "fp32"}}


def odd_state(
    stage: int, *, data: int = 4, micro_batches: int = 2, precision: str = "bf16", **zero: object
) -> StateBytes:
    values = {"zero_optimization": {"stage": stage, **zero}, **(SUMMED if stage else {})}
    return state_bytes(ODD, precision=precision, zero=values, data_size=data, micro_batches=micro_batches)


@each_config
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 1), (2, 4)])
def test_a_rank_holds_its_part_of_its_stages_parameters(config, spec, tensor, pipeline):
    bounds = size.stage_bounds(size.stage_costs(config, spec), pipeline)
    found = stage_parameters(config, spec, tensor=tensor, pipeline=pipeline)
    named = {name: p.shape for name, p in Vilg(config, spec, device="meta").named_parameters()}
    for held, start, stop in zip(found, bounds[:-1], bounds[1:], strict=True):
        wanted = []
        for name, shape in named.items():
            if start <= int(name.split(".")[1]) < stop:
                part = layout.shard(name, torch.empty(shape, device="meta"), rank=0, size=tensor)
                wanted.append(Parameter(part.numel(), layout.rule_of(name).decay))
        assert held == tuple(wanted)


def test_parameters_of_all_stages_are_the_models():
    held = stage_parameters(TEN_BILLION, TEN_BILLION_SPEC, pipeline=4)
    assert sum(p.numel for stage in held for p in stage) == size.num_parameters(TEN_BILLION, TEN_BILLION_SPEC)


def test_without_zero_a_parameter_takes_sixteen_bytes_and_a_sixteen_bit_one_its_newest_gradient():
    assert odd_state(0, precision="fp32") == StateBytes(4 * 1010, 4 * 1010, 8 * 1010)
    assert odd_state(0, precision="bf16", micro_batches=1) == StateBytes(2 * 1010, 4 * 1010, 12 * 1010)
    assert odd_state(0, precision="bf16") == StateBytes(2 * 1010, 6 * 1010, 12 * 1010)


def test_zero_1_and_2_pad_each_group_to_twice_the_data_ranks():
    padded = 1008 + 8  # 1,007 and 3 to multiples of 8
    assert odd_state(1) == StateBytes(2 * padded, 4 * padded, 3 * padded)
    assert odd_state(2) == StateBytes(2 * padded, padded, 3 * padded)
    # fp32 weights have an fp32 copy too, and whole gradients of their own, unpadded
    assert odd_state(1, precision="fp32") == StateBytes(4 * padded, 4 * 1010, 3 * padded)
    # Nor are these in a flat buffer: DeepSpeed sums them up beside the parameters
    offloaded, half = odd_state(1, offload_optimizer={"device": "cpu"}), odd_state(1, precision="fp16")
    assert offloaded.gradients == half.gradients == 4 * 1010


def test_zero_2_holds_border_parameters_whole_where_gradients_sum_up_in_the_weights_type():
    # Parts of 252 and 2: the last rank has the ends of 1,000 and all of 7, and pads both groups, by 1 and by 2.
    assert odd_state(2, precision="fp32", micro_batches=1).gradients == 4 * (1007 + 1 + 2)
    assert odd_state(2, precision="fp32", micro_batches=2).gradients == 4 * (2 * 1007 + 1 + 2)


def test_zero_3_pads_each_parameter_and_keeps_small_ones_whole():
    part = 250 + 1 + 2
    assert odd_state(3, stage3_param_persistence_threshold=0) == StateBytes(2 * part, 4 * part, 12 * part)
    whole = {"stage3_param_persistence_threshold": 7}
    assert odd_state(3, **whole).weights == 2 * (part + 4 + 8)
    assert odd_state(3).weights == 2 * (part + 4 * part)  # DeepSpeed's default: up to 100,000 numbers
    assert odd_state(3, stage3_model_persistence_threshold=9, **whole).weights == 2 * (part + 4)  # 3 fit, 3 + 7 do not
    assert odd_state(3, data=1).weights == 2 * 1010  # the part is the whole
    shared = odd_state(3, zero_hpz_partition_size=2, **whole)
    assert shared == StateBytes(2 * (part + 4 + 8 + 1000 // 2), 4 * part, 12 * part)
    assert odd_state(3, precision="fp32").optimizer == 12 * part  # an fp32 copy of fp32 weights
