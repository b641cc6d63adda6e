"""Exit codes: what is the user's to mend, and what another start may find mended."""

import errno
import pickle
import socket
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tests.golden.make import ROOT
from vilg.checkpoint import tensors
from vilg.config import load_recipe
from vilg.data.tar import ShardError
from vilg.errors import FAILED, TRY_AGAIN, USER_MISTAKE, UserError, exit_code_of
from vilg.parallel.ranks import Ranks, SharedError

KINDS = [
    (errno.ENOENT, USER_MISTAKE), (errno.EACCES, USER_MISTAKE), (errno.ENOTDIR, USER_MISTAKE), (None, USER_MISTAKE),
    (errno.EIO, TRY_AGAIN), (errno.ESTALE, TRY_AGAIN), (errno.ENOSPC, TRY_AGAIN), (errno.EDQUOT, TRY_AGAIN),
    (errno.EADDRNOTAVAIL, USER_MISTAKE), (socket.EAI_NONAME, USER_MISTAKE), (socket.EAI_AGAIN, TRY_AGAIN), (errno.ETIMEDOUT, TRY_AGAIN), (errno.ECONNREFUSED, TRY_AGAIN), (errno.EADDRINUSE, TRY_AGAIN),
]  # fmt: skip


def of_system(number):
    return OSError("file is cut short") if number is None else OSError(number, "said the system", "file")


@pytest.mark.parametrize("number, code", KINDS)
def test_the_systems_error_decides_and_the_message_of_whoever_handles_it_keeps_that(number, code):
    assert exit_code_of(of_system(number)) == code
    with pytest.raises(UserError) as found:
        try:
            raise of_system(number)
        except OSError as error:
            raise UserError(f"recipe: {error}") from None
    assert found.value.exit_code == exit_code_of(pickle.loads(pickle.dumps(found.value))) == code
    assert UserError("afterwards").exit_code == USER_MISTAKE
    with pytest.raises(UserError) as wrapped:
        try:
            raise found.value
        except UserError as error:
            raise UserError(f"line 3: {error}") from None
    assert wrapped.value.exit_code == code


@pytest.mark.parametrize("save, of_library, error", [
    (tensors.save_tensors, "torch.save", RuntimeError("unexpected pos 64 vs 0")),
    (tensors.save_safetensors, "save_file", SafetensorError("No space left on device (os error 28)")),
    (tensors.save_safetensors, "save_file", of_system(errno.ENOSPC)),
])  # fmt: skip
def test_a_full_disk_is_not_the_recipes_fault_whatever_the_libraries_call_it(tmp_path, monkeypatch, save, of_library, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(f"vilg.checkpoint.tensors.{of_library}", full)
    with pytest.raises(UserError, match="cannot write .*weights") as found:
        save({"a": torch.zeros(3)}, tmp_path / "weights")
    assert found.value.exit_code == TRY_AGAIN


def test_a_folder_that_is_missing_is_a_mistake_whatever_the_libraries_call_it(tmp_path):
    for save in (tensors.save_tensors, tensors.save_safetensors):
        with pytest.raises(UserError, match="cannot write .*weights") as found:
            save({"a": torch.zeros(3)}, tmp_path / "missing" / "weights")
        assert found.value.exit_code == USER_MISTAKE


def test_a_recipe_whose_base_or_deepspeed_file_does_not_answer_is_not_wrong(tmp_path, monkeypatch):
    recipe = ROOT / "launch" / "recipes" / "10b.yaml"
    for name in ("300m.yaml", "zero"):  # its base, and one of ds_configs
        read = Path.read_text

        def stale(path, *args, name=name, **kwargs):
            if path.name.startswith(name):
                raise of_system(errno.ESTALE)
            return read(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", stale)
            with pytest.raises(UserError, match="said the system") as found:
                load_recipe(recipe)
        assert found.value.exit_code == TRY_AGAIN


def test_a_code_that_is_given_counts():
    try:
        raise of_system(errno.EIO)
    except OSError:
        assert UserError("the recipe is wrong", USER_MISTAKE).exit_code == USER_MISTAKE
        assert ShardError("00000.tar", "is cut short").exit_code == TRY_AGAIN
    shard = ShardError("00000.tar", "does not answer", byte=512, exit_code=TRY_AGAIN)
    assert pickle.loads(pickle.dumps(shard)).exit_code == TRY_AGAIN
    assert exit_code_of(ZeroDivisionError()) == FAILED


@pytest.mark.parametrize("agree", [Ranks.on_main, Ranks.together])
@pytest.mark.parametrize("error, code", [
    (UserError("taken", TRY_AGAIN), TRY_AGAIN), (UserError("taken"), USER_MISTAKE),
    (OSError(errno.ESTALE, "taken"), TRY_AGAIN), (FileNotFoundError(errno.ENOENT, "taken"), USER_MISTAKE),
])  # fmt: skip
def test_an_error_on_rank_zero_is_shared_with_its_exit_code(agree, error, code):
    def fail():
        raise error

    with pytest.raises(SharedError, match="taken") as shared:
        agree(Ranks(), fail)
    assert shared.value.exit_code == code
