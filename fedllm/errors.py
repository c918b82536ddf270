"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in the command, the config or the data, told in one line: what, where, what would be right."""


class RunStopped(RuntimeError):
    """A run that had to end early, told in one line; everything up to its last round is kept."""
