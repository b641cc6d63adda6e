"""Batch scripts as `vilg submit` fills them in; what needs a cluster is in tests/slurm."""

import contextlib
import io
import re
import subprocess
from pathlib import Path

import pytest

from tests.golden.make import DEBUG_RECIPE
from vilg.__main__ import main as vilg
from vilg.errors import UserError
from vilg.tools.batch import render
from vilg.tools.submit import REMEMBERED

ON_CPU = ["--gpus-per-node", "0", "--tasks-per-node", "2", "--batch.micro_size=4"]


def test_options_replace_the_templates_and_stand_before_the_first_command():
    template = "#!/bin/sh\n# about\n#SBATCH --job-name=old\n#SBATCH --requeue\nset -u\n"
    script = render(template, {"job-name": "new", "requeue": None, "nodes": "2"}, {"A": "x y"}, ["r.yaml", "--a.b=c d"])
    assert script.splitlines() == [
        "#!/bin/sh",
        "# about",
        "#SBATCH --job-name=new",
        "#SBATCH --requeue",
        "#SBATCH --nodes=2",
        "export A='x y'",
        "set -- r.yaml '--a.b=c d'",
        "set -u",
    ]


@pytest.fixture
def at_root(repository, monkeypatch, tmp_path):
    """In the repository, with a machine that has no SLURM."""
    monkeypatch.chdir(repository)
    monkeypatch.setattr("vilg.tools.batch.shutil.which", lambda name: None)


def test_a_dry_run_prints_a_script_that_bash_can_read_and_writes_nothing(at_root, tmp_path, capsys):
    arguments = [str(DEBUG_RECIPE), "--nodes", "1-2", "--time", "1:00:00", "--exclude-bad", "--chain", "2", "--dry-run"]
    assert vilg(["submit", *arguments, *ON_CPU, f"--run_dir={tmp_path / 'a run'}"]) == 0
    script = capsys.readouterr().out
    assert not (tmp_path / "a run").exists()
    for line in ("nodes=1-2", "mincpus=2", "time=1:00:00", "dependency=singleton", "signal=B:USR1@180"):
        assert f"#SBATCH --{line}\n" in script
    assert f"#SBATCH --output='{tmp_path}/a run/logs/slurm-%j.out'\n" in script and "#SBATCH --gpus" not in script
    assert "export VILG_TASKS_PER_NODE=2\n" in script and "#SBATCH --ntasks" not in script
    assert f"export VILG_RUN_DIR='{tmp_path}/a run'\n" in script
    assert "export VILG_CHAINED=yes\n" in script and "export VILG_EXCLUDE_BAD=yes\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "4-3"], "--nodes 4-3: write a number of nodes, or the least and the most"),
        (["--nodes", "few"], "--nodes few: write a number"),
        (["--nodes", "2", "--chain", "0"], "--chain 0 is no number of jobs"),
        (["--nodes", "1-3"], r"on 3 of --nodes 1-3 \(6 processes\): .*batch.global_size=16"),
        (["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "0"], "say the processes too"),
        (["--nodes", "2", "--accept=sead"], "--accept=sead: a recipe has no such key"),
        (["--nodes", "2", "--gpus-per-node", "-2"], "--gpus-per-node -2: use 1 or more, or 0 with"),
        (["--nodes", "2", "--gpus-per-node", "4"], "--tasks-per-node 2 beside --gpus-per-node 4: .* leave it out, or add"),
        (["--nodes", "2", "--cpus-per-task", "-5"], "--cpus-per-task -5: use 1 or more"),
        (["--nodes", "2", "--warn-seconds", "-5"], "--warn-seconds -5: use 1 to 65535"),
        (["--nodes", "2", "--exclude-bad", "--no-preflight"], "give it or --no-preflight, not both"),
        (["--nodes", "2", "--gpu", "h100"], "--gpu=h100 is for the plan of memory and time"),
    ],
)
def test_mistakes_in_the_command_are_named(at_root, arguments, message):
    with pytest.raises(UserError, match=message):
        from vilg.tools.submit import main

        main([str(DEBUG_RECIPE), *ON_CPU, *arguments, "--dry-run"])


def test_without_slurm_the_message_says_so(at_root, tmp_path, capsys):
    assert vilg(["submit", str(DEBUG_RECIPE), "--nodes", "2", *ON_CPU, f"--run_dir={tmp_path / 'run'}"]) == 2
    assert "sbatch is not found: this machine is no login node" in capsys.readouterr().err


def test_a_recipe_that_does_not_fit_the_gpus_is_refused_with_what_would(at_root, capsys):
    arguments = ["launch/recipes/10b-tensor4.yaml", "--nodes", "1", "--gpu", "a100-40g", "--dry-run"]
    assert vilg(["submit", *arguments]) == 2
    error = capsys.readouterr().err
    assert "more than the 39.4 GiB of a a100-40g, on 8 GPUs" in error and "would fit" in error


def planned(*arguments: str) -> str:
    """What a dry run on one node of eight GPUs says behind the script."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = vilg(["submit", "launch/recipes/300m.yaml", "--nodes", "1", "--dry-run", *arguments])
    assert code == 0
    return said.getvalue()


def test_the_gpu_that_a_plan_assumes_is_named_and_can_be_changed(at_root, capsys):
    assumed = planned()
    assert "# note: planned for a100-80g, as no --gpu names the cluster's" in assumed
    named = planned("--gpu", "a100-80g")
    assert "# note: planned" not in named
    assert planned("--gpu", "a100-80g", "--peak-tflops", "65", "--memory-gib=70") != named
    assert vilg(["submit", "launch/recipes/300m.yaml", "--nodes", "1", "--dry-run", "--gpu", "t4"]) == 2
    error = capsys.readouterr().err
    assert "--gpu t4 is not in the table; name the nearest of a100-40g" in error
    advised = set(re.findall(r"--[\w-]+", error)) - {"--gpu"}
    assert len(advised) == 5 and planned("--gpu", "h100", *(f"{option}=60" for option in advised))


def test_the_plan_is_for_nodes_of_so_many_gpus(at_root):
    scripts = [planned("--gpus-per-node", str(gpus), "--nodes", str(8 // gpus)) for gpus in (8, 2)]
    plans = {script.partition("# note: planned")[2] for script in scripts}
    assert len(plans) == 2 and all(plans)


def test_submitting_again_forgets_fruitless_starts_and_mistakes(at_root, tmp_path, monkeypatch):
    for name, said in (("partitions", []), ("test_only", "would start"), ("sbatch", "7")):
        monkeypatch.setattr(f"vilg.tools.submit.{name}", lambda *_, said=said: said)
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    for name in REMEMBERED:
        (logs / name).write_text("3 step_00000010")
    assert vilg(["submit", str(DEBUG_RECIPE), "--nodes", "2", *ON_CPU, f"--run_dir={tmp_path / 'run'}"]) == 0
    assert [path.name for path in logs.iterdir()] == ["submitted.sbatch"]
    script = Path("launch/train.sbatch").read_text()
    assert all(f"$LOGS/{name}" in script for name in REMEMBERED)
