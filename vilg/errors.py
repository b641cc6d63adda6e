"""The one exception whose message is all that a user needs, and what a command's exit code then says."""

import os

USER_MISTAKE = 2
TRY_AGAIN = os.EX_TEMPFAIL  # 75: nothing to mend; batch scripts start the same command again


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a file, a shard, a prompt. The message names the file, key or shard, the
    value found and what would work. The command line prints it without a traceback and exits with `exit_code`.

    With TRY_AGAIN nobody made a mistake: a port or a folder is taken, a store does not answer.
    """

    def __init__(self, message: str, exit_code: int = USER_MISTAKE) -> None:
        super().__init__(message)
        self.exit_code = exit_code
