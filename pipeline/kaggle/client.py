"""Access to Kaggle through its own client: credentials, retries, and error messages without secrets."""

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

RETRY_DELAYS = (2, 4, 8, 16, 32)  # seconds
TIMEOUT = (10, 60)  # to connect, and between two bytes, seconds
TOKEN_ADVICE = (
    "create a token at https://www.kaggle.com/settings and put it into KAGGLE_API_TOKEN or ~/.kaggle/access_token"  # noqa: S105
)

Result = TypeVar("Result")


class _TimeoutAdapter(HTTPAdapter):
    """Sets a timeout for every request; kagglesdk sets none and could wait forever."""

    def send(self, request: PreparedRequest, *args: Any, **options: Any) -> Response:
        return super().send(request, *args, **{"timeout": TIMEOUT, **options})


@contextmanager
def open_client() -> Iterator[KaggleClient]:
    """Yield a client with the credentials that kagglehub finds in the places where Kaggle's tools store them.

    Raises:
        UserError: there are no credentials, or they are malformed.
    """
    credentials = _load_credentials()
    # Not kagglehub's own constructor, which in Kaggle's test environment prints every header, including credentials.
    client = KaggleClient(
        username=credentials.username,
        password=credentials.key,
        api_token=credentials.api_key,
        user_agent=get_user_agent(),
    )
    with client:
        for scheme in ("https://", "http://"):
            client.http_client()._session.mount(scheme, _TimeoutAdapter())  # noqa: SLF001
        yield client


def page_url(params: KaggleParams) -> str:
    """Return the URL of the competition or data set."""
    kind, name = ("competitions", params.competition) if params.competition else ("datasets", params.dataset)
    return f"https://www.kaggle.com/{kind}/{name}"


def retry(call: Callable[[], Result], params: KaggleParams, *, repeatable: bool = True) -> Result:
    """Call Kaggle, and retry with increasing delays after transient errors.

    Args:
        call: request to Kaggle.
        params: competition or data set that the request is about.
        repeatable: whether the call may be repeated if Kaggle might have processed it.

    Returns:
        The result of the call.

    Raises:
        UserError: Kaggle refuses or does not answer.
    """
    for delay in (*RETRY_DELAYS, None):
        not_processed = False  # whether it is certain that the call had no effect
        try:
            return call()
        except DataCorruptionError:
            reason = "the download is corrupt (size or hash differs)"
        except RequestException as error:
            response = error.response
            if response is None:  # the text of the error is omitted: it may contain a signed URL or a proxy's password
                reason = f"no connection to Kaggle ({type(error).__name__}); check the network and HTTPS_PROXY"
            elif response.status_code < 500 and response.status_code != 429 and "ApiService/" in response.url:
                raise UserError(_describe_refusal(response, params)) from None
            else:  # also a 403 or 404 of Kaggle's storage: the signed URL expired, and a retry gets a new one
                reason, not_processed = f"Kaggle answers {response.status_code}", response.status_code == 429
        if not (repeatable or not_processed):
            raise UserError(f"{reason}; Kaggle may have accepted it: check {page_url(params)}/submissions")
        if delay is not None:
            log.warning("%s; retrying in %s s", reason, delay)
            time.sleep(delay)
    raise UserError(f"{page_url(params)}: {len(RETRY_DELAYS) + 1} attempts failed: {reason}; run again later")


def _load_credentials() -> KaggleApiCredentials:
    try:
        credentials = get_kaggle_credentials()
    except (OSError, ValueError) as error:
        # str(OSError) contains the file name, which can be a token: kagglehub tries to open a token as a file first.
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"Kaggle: cannot read the credentials ({reason}); {TOKEN_ADVICE}") from None
    if credentials is None:
        raise UserError(f"Kaggle: no credentials found; {TOKEN_ADVICE}")
    values = [value for value in (credentials.username, credentials.key, credentials.api_key) if value]
    if not all(value.isascii() and value.isprintable() for value in values):
        raise UserError(f"Kaggle: the credentials contain a line break or an invalid character; {TOKEN_ADVICE}")
    return credentials


def _describe_refusal(response: Response, params: KaggleParams) -> str:
    """Explain Kaggle's response and what to do, in one line."""
    message = _response_message(response)
    match response.status_code, params.competition:
        case 401, _:
            return f"Kaggle rejects these credentials (401{message}); {TOKEN_ADVICE}"
        case 403, None:
            return f"{page_url(params)}: no access with this account (403{message}); ask the owner, then run again"
        case 403, _:
            return (
                f"{params.competition}: no access with this account (403{message}); accept the rules with the account "
                f"of these credentials at {page_url(params)}/rules and run again"
            )
        case 404, None:
            return f"Kaggle has no data set {params.dataset!r} (404{message}); correct download.dataset in params.yaml"
        case 404, name:
            return f"Kaggle has no competition {name!r} (404{message}); correct download.competition in params.yaml"
        case status, _:
            return f"{page_url(params)}: Kaggle answers {status}{message}"


def _response_message(response: Response) -> str:
    """Return the message in Kaggle's response without any credentials that it repeats."""
    try:
        message = " ".join(str(response.json()["message"]).split())
    except (ValueError, KeyError, TypeError):
        return ""
    credentials = _load_credentials()
    for secret in filter(None, (credentials.key, credentials.api_key)):
        message = message.replace(secret, "…")
    return f": {message[:300]}"
