"""What one client may ask for, and all of them together."""

import asyncio
import base64
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request

from pipeline.data.image_checks import MAX_BYTES, UnusableError

MEBIBYTE = 2**20
MIN_RATE = 64 * 1024  # bytes per second that a body must have on average, after the first seconds
IMAGES_IN_FLIGHT = 1024  # of all requests together
HEATMAP_COST = 32  # images that are classified in the time of a heatmap, roughly
JSON_COPIES = 3  # of a body of ASCII characters, while it is parsed and its base64 is decoded
JSON_STRUCTURE = b"[{,:"  # each value in a JSON text, except for the outermost, follows one of these

NOT_ASCII = re.compile(rb"\\u(?!00[0-7])")  # escaped characters
Hold = Callable[[int, int], None]  # adds bytes and images


def busy_error() -> HTTPException:
    return HTTPException(503, "busy: too much is waiting; send it again later", {"Retry-After": "2"})


@dataclass(frozen=True)
class Limits:
    """What a request may have and take.

    `body_bytes` and `images` are of a request. `timeout` is the time in seconds for the head of a request, for its
    body, which has longer if it comes at `MIN_RATE` or faster, and for decoding an image.
    """

    body_bytes: int = MAX_BYTES
    images: int = 64
    timeout: float = 20.0

    @property
    def json_bytes(self) -> int:
        """Of a body in JSON, which is in memory as a body of `body_bytes` then, since it is copied."""
        return self.body_bytes // (JSON_COPIES + 1)

    @property
    def bytes_in_flight(self) -> int:
        """Of the bodies of all requests together, with the copies of JSON."""
        return 3 * self.body_bytes


class InFlight:
    """What all requests together hold at present; used by the event loop only."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.bytes = self.images = 0

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        """Yield the function with which one request adds bytes and images, which the end of the block releases.

        It raises HTTPException if all requests together would hold too much.
        """
        own_bytes = own_images = 0

        def add(count: int, images: int) -> None:
            nonlocal own_bytes, own_images
            if self.bytes + count > self.limits.bytes_in_flight or self.images + images > IMAGES_IN_FLIGHT:
                raise busy_error()
            self.bytes, self.images = self.bytes + count, self.images + images
            own_bytes, own_images = own_bytes + count, own_images + images

        try:
            yield add
        finally:
            self.bytes -= own_bytes
            self.images -= own_images


async def read_body(request: Request, max_bytes: int, seconds: float, hold: Hold) -> bytearray:
    """Read the body of a request; it has longer than `seconds` if it comes at `MIN_RATE` or faster.

    Raises:
        HTTPException: it is too large, too slow, or other requests hold too much.
        ClientDisconnect: the client has gone.
    """
    too_large = HTTPException(413, f"too large: a request of this kind may have {max_bytes / MEBIBYTE:g} MiB")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    body = bytearray()
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        async with asyncio.timeout_at(deadline) as timeout:
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise too_large
                hold(len(chunk), 0)
                body += chunk
                timeout.reschedule(deadline + len(body) / MIN_RATE)
    except TimeoutError:
        raise HTTPException(408, "the body of the request arrived too slowly") from None
    return body


def parse_images(body: bytearray, limit: int) -> list[bytes | UnusableError]:
    """Parse the JSON text {"images": [base64, …]} with at most `limit` images; what is not base64 is an error.

    Raises:
        HTTPException: it is another JSON text or none, or has too many images.
    """
    shape = '{"images": [base64, …]}'
    # Before anything is parsed: millions of small or nested values take much more memory than their text, and a single
    # other character makes Python keep a text with two or four bytes for each.
    if sum(map(body.count, JSON_STRUCTURE)) > limit + 8:
        raise HTTPException(400, f"expected {shape} with at most {limit} images")
    if not body.isascii() or NOT_ASCII.search(body):
        raise HTTPException(400, f"expected {shape} of ASCII characters")
    try:
        fields = json.loads(body)
    except ValueError:
        raise HTTPException(400, f"no JSON: expected {shape}") from None
    images = fields.get("images") if isinstance(fields, dict) and len(fields) == 1 else None
    if not isinstance(images, list) or not 0 < len(images) <= limit:
        raise HTTPException(400, f"expected {shape} with 1 to {limit} images")
    return [_decode_base64(image) for image in images]


def _decode_base64(text: Any) -> bytes | UnusableError:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        return UnusableError("not base64")
