"""The one kind of error a user can cause and mend: the command line prints it in one line and exits with 2."""


class PowersteerError(ValueError):
    """Bad input. The message says what was wrong, where, and what to do about it."""


class NonFiniteError(PowersteerError):
    """A loss or a gradient became infinite or no number: training has diverged."""
