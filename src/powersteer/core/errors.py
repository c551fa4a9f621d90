"""What a user can cause and mend: errors, which the command line prints in one line, exit status 2; and warnings."""


class PowersteerError(ValueError):
    """Bad input. The message says what was wrong, where, and what to do about it."""


class NonFiniteError(PowersteerError):
    """A loss or a gradient became infinite or no number: training has diverged."""


class PowersteerWarning(UserWarning):
    """Something that a user should know; the work goes on."""
