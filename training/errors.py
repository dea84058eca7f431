"""The base of errors that a user can mend: told as one sentence, never as a stack trace."""


class TrainingError(Exception):
    """Bad input to a command of `python -m training`; the message names the cause and the fix."""
