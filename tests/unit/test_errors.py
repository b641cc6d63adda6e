"""Exit codes: what is the user's to mend, and what another start may find mended."""

import errno
import pickle

import pytest

from vilg.data.tar import ShardError
from vilg.errors import FAILED, TRY_AGAIN, USER_MISTAKE, UserError, exit_code_of
from vilg.parallel.ranks import Ranks, SharedError

KINDS = [
    (errno.ENOENT, USER_MISTAKE), (errno.EACCES, USER_MISTAKE), (errno.ENOTDIR, USER_MISTAKE), (None, USER_MISTAKE),
    (errno.EIO, TRY_AGAIN), (errno.ESTALE, TRY_AGAIN), (errno.ENOSPC, TRY_AGAIN), (errno.EDQUOT, TRY_AGAIN),
    (errno.ETIMEDOUT, TRY_AGAIN), (errno.ECONNREFUSED, TRY_AGAIN), (errno.EADDRINUSE, TRY_AGAIN),
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
