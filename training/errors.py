"""Base class of errors that the user can fix; reported as a message, without a stack trace."""


class TrainingError(Exception):
    """Bad input to a command of `python -m training`; the message names the cause and the fix."""
