"""How long ranks wait for one another on the host: as long as the recipe lets a save or a start take."""

from datetime import timedelta

import pytest
import torch

from tests.distributed.helpers import run_distributed
from tests.golden.make import DEBUG_RECIPE
from vilg.train import loop
from vilg.train.distributed import distributed, host_timeout


def waits(rank: int, world_size: int, pause_timeout: float | None) -> tuple[timedelta, list[int]]:
    with distributed(torch.device("cpu"), pause_timeout=pause_timeout) as ranks:
        return ranks.group._get_backend(torch.device("cpu")).options._timeout, ranks.sum(1)


def test_the_host_group_outlasts_the_longest_pause_of_the_recipe():
    for pause, least in ((7200.0, timedelta(hours=2)), (0.0, timedelta(days=10))):
        for found, sums in run_distributed(2, waits, (pause,), init=False):
            assert found > least and sums == [2]


def test_commands_without_a_recipe_wait_half_an_hour_and_no_wait_overflows():
    assert host_timeout(None) == timedelta(minutes=30)
    assert host_timeout(1e300) == host_timeout(0.0) < timedelta(milliseconds=2**31)


def test_training_gives_the_group_its_recipes_pause(monkeypatch):
    def asked(device, *, pause_timeout):
        raise Asked(pause_timeout)

    monkeypatch.setattr(loop, "distributed", asked)
    with pytest.raises(Asked, match="10800"):
        loop.main([str(DEBUG_RECIPE), "--guards.pause_timeout=10800"])


class Asked(Exception):
    """Raised in place of a start."""
