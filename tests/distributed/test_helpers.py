"""The helper itself: a distributed test that cannot fail is worth nothing."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.distributed.helpers import free_port, run_distributed


def _sum_of_ranks(rank: int, world_size: int, offset: int) -> torch.Tensor:
    value = torch.tensor([float(rank + offset)])
    dist.all_reduce(value)
    return value


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("planted")
    dist.barrier()


def _die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def test_values_come_back_in_rank_order_and_collectives_work():
    values = run_distributed(2, _sum_of_ranks, (10,))
    assert [v.tolist() for v in values] == [[21.0], [21.0]]


def test_error_of_one_rank_reaches_the_test_and_ends_the_others():
    with pytest.raises(AssertionError, match="(?s)rank 1 failed.*KeyError.*planted"):
        run_distributed(2, _fail_on_one)


def test_rank_that_dies_is_named():
    with pytest.raises(AssertionError, match="rank 1 died|rank 0 failed"):
        run_distributed(2, _die_on_one)


def test_free_port_is_below_the_range_of_outgoing_connections():
    assert 20000 <= free_port() < 32000
