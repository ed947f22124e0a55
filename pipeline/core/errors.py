"""The errors that users see: one line each, without credentials."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """An error that a user can cause and correct: one line with what is wrong, where, and what to do."""


class UnreachableError(UserError):
    """A service does not answer; it may later."""


@contextmanager
def rename_in_errors(names: Mapping[str, str]) -> Iterator[None]:
    """Replace the keys, such as paths of temporary files, by the names that the user gave, in errors of the block."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for path, name in names.items():
            message = message.replace(path, name)
        raise type(error)(message) from None


class Interrupted(Exception):  # noqa: N818  # not an error
    """Stopped by a signal; the message says where, and from where the next run goes on."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type, without the credentials in URLs."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return redact_credentials(line)


def redact_credentials(text: str) -> str:
    return re.sub(r"(password=)[^&\s]+", r"\1…", re.sub(r"//[^/\s]*@", "//", text), flags=re.IGNORECASE)
