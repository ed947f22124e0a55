"""Kaggle through its own client: credentials, patience, and one line for what went wrong, with nothing secret in it."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from kagglehub.clients import get_user_agent
from kagglehub.config import KaggleApiCredentials, get_kaggle_credentials
from kagglehub.exceptions import DataCorruptionError
from kagglesdk.kaggle_client import KaggleClient
from requests import PreparedRequest, RequestException, Response
from requests.adapters import HTTPAdapter

from pipeline.core.config import KaggleParams
from pipeline.core.errors import UserError

log = logging.getLogger(__name__)

RETRY_DELAYS = (2, 4, 8, 16, 32)  # seconds before another try
TIMEOUT = (10, 60)  # seconds to connect, and between two bytes
TOKEN_ADVICE = (
    "create a token at https://www.kaggle.com/settings and put it into KAGGLE_API_TOKEN or ~/.kaggle/access_token"  # noqa: S105
)

Answer = TypeVar("Answer")


class _TimeoutAdapter(HTTPAdapter):
    """Gives a silent server up; kagglesdk sets no time limit and would wait for ever."""

    def send(self, request: PreparedRequest, *args: Any, **options: Any) -> Response:
        return super().send(request, *args, **{"timeout": TIMEOUT, **options})


@contextmanager
def open_client() -> Iterator[KaggleClient]:
    """Yield a client with the credentials that kagglehub finds where Kaggle's tools keep them.

    Raises:
        UserError: there are none, or they cannot be used.
    """
    found = _credentials()
    # kagglehub's own way to make one prints every header, credentials too, in one of Kaggle's environments.
    made = KaggleClient(
        username=found.username, password=found.key, api_token=found.api_key, user_agent=get_user_agent()
    )
    with made:
        for scheme in ("https://", "http://"):
            made.http_client()._session.mount(scheme, _TimeoutAdapter())  # noqa: SLF001
        yield made


def page_url(params: KaggleParams) -> str:
    """Return the address of the competition or the data set."""
    kind, name = ("competitions", params.competition) if params.competition else ("datasets", params.dataset)
    return f"https://www.kaggle.com/{kind}/{name}"


def retry(call: Callable[[], Answer], params: KaggleParams, *, repeatable: bool = True) -> Answer:
    """Make a call again, after longer and longer pauses, until Kaggle answers it.

    Args:
        call: to Kaggle.
        params: the competition or the data set that it is about.
        repeatable: not so when it matters that Kaggle may have heard a call that broke.

    Raises:
        UserError: Kaggle refuses, or does not answer.
    """
    for pause in (*RETRY_DELAYS, None):
        ignored = False  # whether it is certain that nothing came of the call
        try:
            return call()
        except DataCorruptionError:
            reason = "what came is not what Kaggle sent (size or hash differs)"
        except RequestException as error:
            answer = error.response
            if answer is None:  # the error's text may hold a signed address or a proxy's password
                reason = f"no connection to Kaggle ({type(error).__name__}); check the network and HTTPS_PROXY"
            elif answer.status_code < 500 and answer.status_code != 429 and "ApiService/" in answer.url:
                raise UserError(_refusal(answer, params)) from None
            else:  # what Kaggle's storage refuses is an address that has run out; another try gets a new one
                reason, ignored = f"Kaggle answers {answer.status_code}", answer.status_code == 429
        if not (repeatable or ignored):
            raise UserError(f"{reason}; Kaggle may have taken it all the same: look at {page_url(params)}/submissions")
        if pause is not None:
            log.warning("%s; another try in %s s", reason, pause)
            time.sleep(pause)
    raise UserError(f"{page_url(params)}: tried {len(RETRY_DELAYS) + 1} times: {reason}; run again later")


def _credentials() -> KaggleApiCredentials:
    try:
        found = get_kaggle_credentials()
    except (OSError, ValueError) as error:
        # An OSError names the file, and a token that is too long for a name was taken for one.
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"Kaggle: the credentials cannot be read ({reason}); {TOKEN_ADVICE}") from None
    if found is None:
        raise UserError(f"Kaggle: there are no credentials; {TOKEN_ADVICE}")
    parts = [part for part in (found.username, found.key, found.api_key) if part]
    if not all(part.isascii() and part.isprintable() for part in parts):
        raise UserError(f"Kaggle: the credentials hold a line break or a letter that none can have; {TOKEN_ADVICE}")
    return found


def _refusal(response: Response, params: KaggleParams) -> str:
    """Say what Kaggle's answer means and what to do."""
    words = _words(response)
    match response.status_code, params.competition:
        case 401, _:
            return f"Kaggle does not accept these credentials (401{words}); {TOKEN_ADVICE}"
        case 403, None:
            return (
                f"{page_url(params)}: not open to this account (403{words}); ask its owner for access, then run again"
            )
        case 403, _:
            return (
                f"{params.competition} is not open to this account (403{words}); accept its rules, with the account of "
                f"these credentials, at {page_url(params)}/rules and run again"
            )
        case 404, None:
            return f"Kaggle knows no data set {params.dataset!r} (404{words}); correct download.dataset in params.yaml"
        case 404, name:
            return f"Kaggle knows no competition {name!r} (404{words}); correct download.competition in params.yaml"
        case status, _:
            return f"{page_url(params)}: Kaggle answers {status}{words}"


def _words(response: Response) -> str:
    """Return the message in Kaggle's answer, less any credentials it repeats."""
    try:
        words = " ".join(str(response.json()["message"]).split())
    except (ValueError, KeyError, TypeError):
        return ""
    found = _credentials()
    for secret in filter(None, (found.key, found.api_key)):
        words = words.replace(secret, "…")
    return f": {words[:300]}"
