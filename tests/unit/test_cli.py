"""The command line: what a user sees, right or wrong."""

import inspect
import subprocess
import sys

import pytest

from vilg import __main__ as cli
from vilg.errors import TRY_AGAIN, UserError


def test_help_lists_every_command_in_the_order_from_data_to_export(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    steps = ["demo-data", "data ingest", "tokenizer train-text", "data tokenize", "train ", "export ", "generate "]
    positions = [text.index(f"\n  {step}") for step in steps]
    assert positions == sorted(positions)
    assert all(f"\n  {words} " in text for words in cli.COMMANDS)


@pytest.mark.parametrize("words", cli.COMMANDS)
def test_every_command_exists_and_takes_its_arguments(words):
    function = cli._function(cli.COMMANDS[words])
    assert len(inspect.signature(function).parameters) == 1


@pytest.mark.parametrize("words", cli.COMMANDS)
def test_every_command_explains_its_options(words, capsys):
    try:
        code = cli.main([*words.split(), "--help"])
    except SystemExit as exit_:
        code = exit_.code or 0
    text = capsys.readouterr().out
    assert code == 0
    assert text.startswith(f"usage: vilg {words}")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["trian", "recipe.yaml"], "there is no command 'trian'; did you mean 'train'?"),
        (["data", "tokenise"], "there is no command 'data tokenise'; did you mean 'data tokenize'?"),
        (["dta", "tokenize"], "there is no command 'dta tokenize'; did you mean 'data tokenize'?"),
        (["data"], "'data' needs one word more: data ingest, data tokenize, data lint, data index"),
        (["eval", "--help"], "'eval' needs one word more: eval caption, eval fid, eval vqa, eval clip, eval rating-sheet, eval rating-tally, eval scenes"),
        (["import", "runs/mine/export"], f"there is no command 'import': {cli.NO_COMMAND['import']}"),
        (["qqqq"], "there is no command 'qqqq'; vilg --help lists them"),
    ],
)
def test_mistyped_commands_get_the_nearest_name_and_exit_2(argv, expected, capsys):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == f"vilg: error: {expected}\n"


def _command(monkeypatch, function):
    monkeypatch.setattr(cli, "_function", lambda command: function)


def test_mistake_of_a_user_is_one_paragraph_without_traceback(monkeypatch, capsys):
    def fail(argv):
        raise UserError(f"no such thing: {argv[0]}")

    _command(monkeypatch, fail)
    assert cli.main(["train", "x.yaml"]) == 2
    assert capsys.readouterr().err == "vilg: error: no such thing: x.yaml\n"


def test_what_another_start_may_find_mended_has_a_code_of_its_own(monkeypatch, capsys):
    def fail(argv):
        raise UserError("port 20000 is taken", TRY_AGAIN)

    _command(monkeypatch, fail)
    assert cli.main(["train", "x.yaml"]) == 75
    assert capsys.readouterr().err == "vilg: error: port 20000 is taken\n"


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    _command(monkeypatch, interrupted)
    assert cli.main(["train"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def broken(argv):
        raise ZeroDivisionError

    _command(monkeypatch, broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (3, 3)])
def test_exit_code_is_what_the_command_returns(monkeypatch, returned, code):
    _command(monkeypatch, lambda argv: returned)
    assert cli.main(["eval", "scenes", "x"]) == code


def test_help_loads_no_heavy_library(repository):
    code = "import sys; from vilg.__main__ import main; main(['--help']); print({'torch', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, check=True)
    assert result.stdout.endswith("\nset()\n")


def test_env_shows_versions_and_backends_as_table_and_json(capsys):
    import json

    import torch

    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__
    assert found["optimizer"] and found["apex"] and found["norms"]
    assert cli.main(["env"]) == 0
    assert f"torch{' ' * 20}{torch.__version__}" in capsys.readouterr().out
