"""Parts of parameters for any number of tensor ranks out of files of any other number, without files."""

from pathlib import Path

import pytest
import torch

from vilg.checkpoint.reader import Weights
from vilg.checkpoint.state import RunState
from vilg.errors import UserError
from vilg.parallel import layout

SHAPES = {
    "layers.1.attention.qkv.weight": (24, 8),  # cut along the rows
    "layers.1.attention.out.weight": (8, 8),  # cut along the columns
    "layers.1.ffn.norm.weight": (8,),  # whole on every rank
    "layers.10.ffn.down.bias": (8,),
}


class Held(Weights):
    """Whole tensors in memory, as if `size` tensor ranks had written them."""

    tensor_size = 1
    optimizer_steps = 3

    def __init__(self, size: int) -> None:
        table = {name: {"shape": list(shape), "split": None, "stage": 0} for name, shape in SHAPES.items()}
        axes = dict(engine="deepspeed", precision="fp32", zero_stage=1, data=1, tensor=size, pipeline=1)
        super().__init__(Path("step"), RunState(3, 0, 0, {}, {}, axes, {}, {}, table))
        self.tensor_size, self.asked = size, []
        self.whole = {name: torch.randn(shape, generator=torch.manual_seed(0)) for name, shape in SHAPES.items()}

    def _local(self, name, kind, rank):
        self.asked.append(rank)
        return layout.shard(name, self.whole[name], rank=rank, size=self.tensor_size)


@pytest.mark.parametrize("written_by", [1, 2, 4])
@pytest.mark.parametrize("read_by", [1, 2, 4, 8])
def test_parts_are_those_of_the_whole_whoever_wrote_them(written_by, read_by):
    weights = Held(written_by)
    for name, whole in weights.whole.items():
        for rank in range(read_by):
            part = weights.part(name, kind="master", rank=rank, size=read_by)
            assert torch.equal(part, layout.shard(name, whole, rank=rank, size=read_by))
        assert torch.equal(weights.read(name, kind="exp_avg"), whole)


def test_only_the_files_that_a_part_lies_in_are_touched():
    weights = Held(4)
    weights.part("layers.1.attention.qkv.weight", kind="master", rank=1, size=2)
    assert weights.asked == [2, 3]


def test_names_are_in_the_order_of_layers():
    assert Held(1).names[-1] == "layers.10.ffn.down.bias"


def test_a_part_that_cannot_be_cut_and_a_tensor_of_another_shape_are_named():
    weights = Held(1)
    with pytest.raises(UserError, match="qkv.weight: 24 rows or columns cannot be cut for 5"):
        weights.part("layers.1.attention.qkv.weight", kind="master", rank=0, size=5)
    weights.whole["layers.1.attention.qkv.weight"] = torch.zeros(24, 7)
    with pytest.raises(UserError, match=r"exp_avg of layers.1.attention.qkv.weight has shape \(24, 7\) instead of \(24"):
        weights.read("layers.1.attention.qkv.weight", kind="exp_avg")
