"""What a user gets wrong about a layout: all of it in one message, before any process waits for another."""

import pytest
import torch.distributed as dist

from tests.golden.make import DEBUG_RECIPE, ROOT
from vilg.__main__ import main as vilg
from vilg.train import loop

WRONG = {
    "model.num_heads": 6,  # with hidden_size 96
    "model.hidden_size": 96,
    "parallel.tensor": 4,
    "parallel.pipeline": 9,
    "parallel.deepspeed": ROOT / "ds_configs" / "zero2.json",
    "batch.global_size": 17,
    "parallel.recompute_every": 2,
}
EXPECTED = (
    "model.num_heads=6 is not divisible by parallel.tensor=4; use 1, 2, 3 or 6",
    "parallel.pipeline=9 stages, but model.num_layers=4; use at most 4",
    "cannot be joined with ZeRO stage 2",
    "10 processes are not divisible by parallel.tensor=4 x parallel.pipeline=9; start a multiple of 36",
    "batch.global_size=17 is not divisible by batch.micro_size=8; use 16 or 24",
    "parallel.recompute=none; use 1, or parallel.recompute=full",
)


@pytest.fixture
def ten_processes(monkeypatch):
    """The environment of rank 0 of 10, in which nobody may start a process group."""

    def refuse(*arguments, **options):
        raise AssertionError("a process group was started")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20000"}
    for name, value in {"RANK": "0", "WORLD_SIZE": "10", "LOCAL_RANK": "0", **address}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def train_wrongly() -> int:
    return vilg(["train", str(DEBUG_RECIPE), *(f"--{key}={value}" for key, value in WRONG.items())])


def test_all_problems_of_a_layout_are_listed_before_a_process_group_starts(ten_processes, capsys):
    assert train_wrongly() == 2
    message = capsys.readouterr().err
    assert [part for part in EXPECTED if part not in message] == []


def test_problems_in_the_file_are_shown_with_line_and_column(ten_processes, capsys, tmp_path):
    text = DEBUG_RECIPE.read_text().replace("global_size: 16", "global_size: 17")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    line = 1 + text[: text.index("global_size")].count("\n")
    assert vilg(["train", str(recipe)]) == 2
    assert f"{recipe}:{line}:3: batch.global_size=17" in capsys.readouterr().err


def test_other_ranks_let_the_first_one_print(ten_processes):
    waited = []
    ten_processes.setenv("RANK", "3")
    ten_processes.setattr(loop.time, "sleep", waited.append)
    assert train_wrongly() == 2
    assert waited == [loop._MAIN_FIRST]
