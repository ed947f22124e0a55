"""ASGI middleware around every request: who may send it, the headers of every answer, and the metrics."""

import asyncio
import ipaddress
import time
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving import metrics
from pipeline.serving.served_model import ModelFollower

VERSION_HEADER = "X-Model-Version"
HEADERS = {
    # Scripts and styles are files of this server only, so that what a page shows of a file cannot become code.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
DRAIN_SECONDS = 10  # for the rest of a body that was refused: a client that still sends does not read the answer


class Guard:
    """Refuses requests for other hosts and from other web sites."""

    def __init__(self, app: ASGIApp, hosts: Collection[str], follower: ModelFollower) -> None:
        """Wrap an app; `hosts` are the names under which it is served, in lower case."""
        self._app, self._hosts, self._follower = app, hosts, follower

    def headers(self) -> dict[str, str]:
        """Return the headers of every answer."""
        return {**HEADERS, VERSION_HEADER: self._follower.current.version}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, start, has_more_body = Headers(scope=scope), time.perf_counter(), True

        async def receive_body() -> Message:
            nonlocal has_more_body
            message = await receive()
            has_more_body = message.get("more_body", False)
            return message

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                if has_more_body and message["status"] != 408 and "expect" not in headers:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(DRAIN_SECONDS):
                            while has_more_body:
                                await receive_body()
                answer = MutableHeaders(scope=message)
                for name, value in self.headers().items():
                    answer.setdefault(name, value)
                if has_more_body:  # or the connection would be open as long as its client sends a byte now and then
                    answer["Connection"] = "close"
                route = getattr(scope.get("route"), "path", "other")
                metrics.REQUESTS.labels(route, message["status"]).inc()
                metrics.REQUEST_SECONDS.labels(route).observe(time.perf_counter() - start)
            await send(message)

        await (self._refusal(scope, headers) or self._app)(scope, receive_body, send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")  # absent only in HTTP/1.0, which no browser sends
        if host and not self._is_served(_host_name(host)):
            # A web site whose name its owner lets point to this machine (DNS rebinding) sends its own name.
            return JSONResponse({"detail": "this server is not known by the name in the header Host"}, 421)
        if scope["method"] not in ("GET", "HEAD") and _is_cross_origin(headers, host):
            return JSONResponse({"detail": "requests from other web sites are refused"}, 403)
        return None

    def _is_served(self, name: str) -> bool:
        with suppress(ValueError):
            ipaddress.ip_address(name)
            return True  # an address cannot be made to point elsewhere
        return name in self._hosts


def _host_name(host: str) -> str:
    """Return the name of a Host header, without the port, or an empty string."""
    with suppress(ValueError):
        return urlsplit(f"//{host}").hostname or ""
    return ""


def _is_cross_origin(headers: Headers, host: str) -> bool:
    site = headers.get("sec-fetch-site")  # browsers send it to https and localhost, and it is right behind a proxy
    if site:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != host.lower()
