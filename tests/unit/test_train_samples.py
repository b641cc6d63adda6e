"""Sample sheets of a run: drawn in between, never its end, and without a trace in its losses."""

import errno
import os

import pytest
import torch

from tests.golden.make import DEBUG_RECIPE, make_data, read_losses
from vilg.config import load_recipe
from vilg.train import samples
from vilg.train.distributed import distributed
from vilg.train.events import read_events
from vilg.train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("samples"))


def trained(data, folder, **changes):
    """The run's folder after four steps; dropout shows whether the model trains on in training mode."""
    values = {"parallel.engine": "torch", "model.num_layers": 2, "model.dropout": 0.1, "logging.tensorboard": "false"}
    values |= {"schedule.steps": 4, "schedule.warmup_steps": 1, "checkpoint.every_steps": 4, "run_dir": folder}
    values |= data | {key.replace("__", "."): value for key, value in changes.items()}
    with distributed(torch.device("cpu")) as ranks:
        train(load_recipe(DEBUG_RECIPE, [f"{k}={v}" for k, v in values.items()]), ranks, torch.device("cpu"))
    return folder


def test_a_sheet_that_cannot_be_written_is_warned_about_and_the_run_goes_on(data, tmp_path, monkeypatch, capfd):
    write, tries = samples.grid_sheet, []

    def full_at_first(*args, **options):
        tries.append(args)
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*args, **options)

    monkeypatch.setattr(samples, "grid_sheet", full_at_first)
    plain = trained(data, tmp_path / "plain")
    drawing = trained(data, tmp_path / "drawing", samples__every_steps=2, samples__prompts='["a cat"]')
    assert [path.name for path in sorted((drawing / "samples").iterdir())] == ["step_00000004.png"]
    assert read_losses(drawing) == read_losses(plain)
    first, second = (event["text"] for event in read_events(drawing / "logs") if event["event"] == "draw")
    assert first == "samples/step_00000002.png could not be written: [Errno 28] No space left on device"
    assert second == "drew samples/step_00000004.png" and f"warning: {first}" in capfd.readouterr().err
