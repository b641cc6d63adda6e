"""Weights & Biases and Prometheus: stand-ins and files, and what a run does when one of them fails."""

import sys
from types import SimpleNamespace

import pytest

from tests.golden.make import DEBUG_RECIPE
from vilg.config import load_recipe
from vilg.errors import UserError
from vilg.train.log import RunLog
from vilg.train.sinks import Prometheus, Wandb, open_sinks

ROW = {"step": 10, "loss": 5.25, "text_loss": None, "skipped": False, "tokens_per_second": 4e4, "time": 1.8e9}


def recipe(*overrides: str):
    return load_recipe(DEBUG_RECIPE, ["logging.tensorboard=false", *overrides], cross_checks=False)


class StandIn:
    """The part of wandb that is used."""

    def __init__(self):
        self.asked, self.logged, self.metrics, self.finished = {}, [], [], False
        self.log = self.logged.append

    def init(self, **options):
        self.asked = options
        return self

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def finish(self):
        self.finished = True


def test_wandb_is_offline_in_the_logs_folder_and_gets_figures_under_our_step(tmp_path, monkeypatch):
    standin = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", standin)
    (sink,) = open_sinks(recipe("logging.wandb=offline", "name=mine"), tmp_path, resume_step=0, warn=pytest.fail)
    sink.rows([ROW | {"val_loss": 5.5}])
    sink.event({"event": "save", "step": 10, "text": "saved"})
    sink.close()
    assert (standin.asked["mode"], standin.asked["dir"], standin.asked["name"]) == ("offline", str(tmp_path), "mine")
    assert standin.metrics == [("*", "step")] and standin.asked["config"]["optimizer"]["lr"] == 0.002
    assert standin.logged[0] == {"step": 10, "train/loss": 5.25, "train/tokens_per_second": 4e4, "val/loss": 5.5}
    assert standin.logged[1] == {"step": 10, "events/save": 1} and standin.finished


def test_wandb_that_is_not_installed_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="the package wandb is not installed.*logging.wandb=off"):
        Wandb(recipe("logging.wandb=online"), tmp_path)


def test_the_prometheus_file_has_help_type_and_the_last_figures(tmp_path):
    sink = Prometheus(tmp_path, 'my "run"/1')
    sink.rows([ROW | {"step": 9, "val_loss": 5.5}, ROW])
    sink.event({"event": "save", "step": 10, "text": "saved"})
    (path,) = tmp_path.glob("*.prom")
    lines = path.read_text().splitlines()
    assert path.name == "my__run__1.prom" and path.read_text().endswith("\n")
    at = lines.index("# TYPE vilg_loss_nats gauge")
    assert lines[at - 1].startswith("# HELP vilg_loss_nats ")
    assert lines[at + 1] == 'vilg_loss_nats{run="my \\"run\\"/1"} 5.25'
    assert 'vilg_held_out_loss_nats{run="my \\"run\\"/1"} 5.5' in lines  # of the last row that has one
    assert 'vilg_step{run="my \\"run\\"/1"} 10' in lines and not any("text_loss" in line for line in lines)
    assert 'vilg_events_total{run="my \\"run\\"/1",event="save"} 1' in lines


def test_a_prometheus_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="logging.prometheus=.*none is no folder"):
        open_sinks(recipe(f"logging.prometheus={tmp_path / 'none'}"), tmp_path, resume_step=0, warn=pytest.fail)


def test_a_service_that_does_not_answer_at_the_start_is_left_out_with_a_warning(tmp_path, monkeypatch):
    class Unreachable(StandIn):
        def init(self, **options):
            raise ConnectionError("timed out")

    monkeypatch.setitem(sys.modules, "wandb", Unreachable())
    warnings = []
    asked = recipe("logging.wandb=online", f"logging.prometheus={tmp_path}")
    (sink,) = open_sinks(asked, tmp_path, resume_step=0, warn=warnings.append)
    assert isinstance(sink, Prometheus)
    assert warnings == ["Wandb gets nothing in this start: ConnectionError: timed out"]


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full"), KeyError("disk full")])
def test_a_sink_that_fails_is_left_out_and_the_run_goes_on(tmp_path, capsys, error):
    def fail(*_):
        raise error

    failing = SimpleNamespace(rows=fail, event=fail, rewind=fail, close=fail)
    log = RunLog(tmp_path, rank=0, total_steps=10, resume_step=0, sinks=[failing])
    log.event("save", 3, "saved")
    log.event("save", 4, "saved")
    log.close()
    assert capsys.readouterr().err.count("disk full") == 1 and "saved" in (tmp_path / "rank_0.log").read_text()
