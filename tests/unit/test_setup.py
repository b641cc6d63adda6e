"""Installation: mistakes are told before it starts, an interrupted one is repeated, a finished one re-used."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from vilg.tools import setup_checks

Usage = namedtuple("Usage", "total used free")

FAKE_PYTHON = """\
#!/bin/sh
# Stands for Python: makes a folder as virtual environment, notes what pip is asked for, fails while `broken` exists.
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install "*) echo "$*" >> pip.log; [ ! -e broken ] ;;
  *setup_checks.py) echo checked >> pip.log ;;
esac
"""


@pytest.fixture
def clone(tmp_path, repository):
    """A copy of what `make setup` reads, and the Python that stands for the real one."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(repository / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def make_setup(clone) -> subprocess.CompletedProcess:
    command = ["make", "setup", f"PYTHON={clone / 'python'}"]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=60)


def installs(clone) -> int:
    return (clone / "pip.log").read_text().count("-m pip install -r requirements.txt")


def test_finished_setup_is_used_again_and_renewed_when_the_pins_change(clone):
    assert make_setup(clone).returncode == 0
    assert make_setup(clone).returncode == 0
    assert installs(clone) == 1
    later = (clone / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(clone / "requirements.txt", (later, later))
    assert make_setup(clone).returncode == 0
    assert installs(clone) == 2


def test_failed_setup_says_what_to_do_and_starts_from_an_empty_environment(clone):
    (clone / "broken").touch()
    result = make_setup(clone)
    assert result.returncode != 0
    assert "run the same command again" in result.stdout
    assert not (clone / ".venv" / ".installed").exists()
    (clone / ".venv" / "half-installed").touch()
    (clone / "broken").unlink()
    result = make_setup(clone)
    assert result.returncode == 0
    assert "was interrupted: starting again" in result.stdout
    assert not (clone / ".venv" / "half-installed").exists()


def test_sound_machine_has_no_problem(repository):
    assert setup_checks.problems(str(repository)) == []


def test_missing_compiler_is_told_with_the_package_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (problem,) = setup_checks.problems(str(tmp_path))
    assert "no C++ compiler" in problem and "apt install g++" in problem


def test_named_compiler_must_exist(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert setup_checks.compiler() is None


def test_full_disk_is_told_with_what_is_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_checks.shutil, "disk_usage", lambda folder: Usage(10**12, 10**12, 2**30))
    (problem,) = setup_checks.problems(str(tmp_path))
    assert "1.0 GiB free" in problem and "make room" in problem


def test_old_python_and_all_problems_together(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup_checks.sys, "version_info", (3, 8, 1))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert setup_checks.main() == 1
    error = capsys.readouterr().err
    assert "Python 3.8 is too old" in error and "C++ compiler" in error


def test_checks_run_as_a_plain_script(repository):
    command = [sys.executable, "vilg/tools/setup_checks.py"]
    assert subprocess.run(command, cwd=repository, timeout=60).returncode == 0


def test_every_requirement_is_pinned(repository):
    lines = (repository / "requirements.txt").read_text().splitlines()
    pins = [line.split(";")[0] for line in lines if line and not line.startswith("#")]
    assert all(pin.count("==") == 1 for pin in pins)
    assert not [pin for pin in pins if pin.startswith(("torchvision", "apex"))]
