"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a file, a shard, a prompt.

    The message names the file, key or shard, the value found and what would work. The command line prints it without a
    traceback and exits with code 2.
    """
