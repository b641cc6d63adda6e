"""The one exception whose message is all that a user needs, and what a command's exit code then says."""

import errno
import os
import socket
import sys

FAILED = 1
USER_MISTAKE = 2
TRY_AGAIN = os.EX_TEMPFAIL  # 75: nothing to mend; batch scripts start the same command again, three times at most

# What the system says of a wrong path or missing rights. All else (a stale handle, an input error, a full disk, a
# connection refused) may be over when the next start comes, perhaps on another node.
_LASTING = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EROFS, errno.EINVAL, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT,
}  # fmt: skip


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a file, a shard, a prompt. The message names the file, key or shard, the
    value found and what would work. The command line prints it without a traceback and exits with `exit_code`.

    With TRY_AGAIN nobody made a mistake: a port or a folder is taken, a store does not answer. One that is made while an
    OSError or another UserError is handled has that one's code, unless it is given its own.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        handled = sys.exc_info()[1]
        if exit_code is None:
            exit_code = exit_code_of(handled) if isinstance(handled, (OSError, UserError)) else USER_MISTAKE
        self.exit_code: int = exit_code


def exit_code_of(error: BaseException) -> int:
    """What a command that ends by this error says: USER_MISTAKE, TRY_AGAIN, or FAILED for errors of our own."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, OSError):
        # None: of Python's own making, as for a picture that is cut short; below zero: no host has that name
        number = error.errno or 0
        lasting = number in _LASTING or (number <= 0 and number != socket.EAI_AGAIN)
        return USER_MISTAKE if lasting else TRY_AGAIN
    return FAILED
