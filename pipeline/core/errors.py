import re


class UserError(Exception):
    """What a user can cause and mend: one line that says what is wrong, where, and what to do."""


class UnreachableError(UserError):
    """A service that does not answer now may answer later."""


class Interrupted(Exception):  # noqa: N818  # it is no error
    """A signal asked to stop, and what was done so far is on disk."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind, without the names and passwords that URLs may hold."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return redact_credentials(line)


def redact_credentials(text: str) -> str:
    return re.sub(r"(password=)[^&\s]+", r"\1…", re.sub(r"//[^/\s]*@", "//", text), flags=re.IGNORECASE)
