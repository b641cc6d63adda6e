"""The one exception whose message is all that a user needs, and what a command's exit code then says."""

import errno
import os
import sys

FAILED = 1
USER_MISTAKE = 2
TRY_AGAIN = os.EX_TEMPFAIL  # 75: nothing to mend; batch scripts start the same command again, three times at most

# What the system says of a wrong path or missing rights. All else (a stale handle, an input error, a full disk, a
# connection refused) may be over when the next start comes, perhaps on another node.
_LASTING = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EROFS, errno.EINVAL, None,
}  # fmt: skip


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a file, a shard, a prompt. The message names the file, key or shard, the
    value found and what would work. The command line prints it without a traceback and exits with `exit_code`.

    With TRY_AGAIN nobody made a mistake: a port or a folder is taken, a store does not answer. That is the default for one
    that is made while an OSError of such a kind is handled.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        handled = sys.exc_info()[1]
        of_system = isinstance(handled, OSError) and exit_code is None
        self.exit_code: int = exit_code_of(handled) if of_system else exit_code or USER_MISTAKE


def exit_code_of(error: BaseException) -> int:
    """What a command that ends by this error says: USER_MISTAKE, TRY_AGAIN, or FAILED for errors of our own."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, OSError):
        return USER_MISTAKE if error.errno in _LASTING else TRY_AGAIN
    return FAILED
