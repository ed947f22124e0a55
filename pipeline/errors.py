class UserError(Exception):
    """What a user can cause and mend: one line that says what is wrong, where, and what to do."""


class Interrupted(Exception):  # noqa: N818  # it is no error
    """A signal asked to stop, and what was done so far is on disk."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal
