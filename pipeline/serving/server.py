"""The server: HTTP/1.1 with deadlines for slow clients, and a clean end."""

import asyncio
import functools
import gc
import json
import logging
import os
import socket
from collections.abc import Collection
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import torch
import uvicorn
from joblib import cpu_count
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.core.config import Config
from pipeline.core.errors import UserError
from pipeline.serving.app import Service, create_app
from pipeline.serving.decoders import DecoderPool
from pipeline.serving.guard import Guard
from pipeline.serving.limits import Limits
from pipeline.serving.predictor import Predictor
from pipeline.serving.served_model import ModelFollower

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
MAX_CONNECTIONS = 512
KEEP_ALIVE_SECONDS = 20  # between two requests of a connection
WRITE_SECONDS = 60  # for taking an answer
SHUTDOWN_SECONDS = 30  # for the requests that are there when the server is stopped


def serve(
    config: Config,
    name: str,
    host: str,
    port: int,
    *,
    device: torch.device,
    poll_seconds: float,
    log_file: Path | None,
    limits: Limits,
    names: Collection[str],
) -> None:
    """Serve a model until the process gets SIGTERM or SIGINT, and print its URL when it can be used.

    Args:
        config: names the seeds and the registered model.
        name: of the model, see `open_model_folder`; an alias is followed.
        host: name or address to listen on.
        port: to listen on; 0 for any that is free.
        device: on which the model runs.
        poll_seconds: between two looks at the alias.
        log_file: the log of predictions, if one is kept.
        limits: of requests.
        names: further ones of this server, such as a proxy's, which clients may send in the header Host.

    Raises:
        UserError: the address cannot be used, there is no such model, or its files are damaged.
    """
    with _bind(host, port) as listener:
        follower = ModelFollower(config, name, device, log_file, poll_seconds)
        decoders = DecoderPool(cpu_count(), limits.timeout, with_description=log_file is not None)
        predictor = Predictor()
        service = Service(follower, decoders, predictor, limits)
        own_names = {*LOOPBACK, host, socket.gethostname(), socket.getfqdn(), *names}
        app = create_app(service, {name.lower() for name in own_names})
        settings = uvicorn.Config(
            app,
            http=functools.partial(Protocol, guard=app, head_seconds=limits.timeout),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.ERROR,  # warnings are of clients that send no HTTP
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        # At a second Ctrl-C, and after SHUTDOWN_SECONDS, requests are cancelled.
        logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
        gc.freeze()  # of what stays until the end, where it would be searched for garbage for seconds
        url_host, served = f"[{host}]" if ":" in host else host, follower.current
        url = f"http://{url_host}:{listener.getsockname()[1]}"  # where connections wait until the next statement
        print(f"version {served.version} of {served.model} answers at {url} (Ctrl-C ends it)", flush=True)
        try:
            Server(settings).run([listener])
        finally:
            follower.stop()
            predictor.close()
            decoders.close()


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address.

    Raises:
        UserError: it cannot be.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror}; give a name or an address of this machine") from None
    try:  # the address :: is for IPv4 too
        listener = socket.create_server(address, family=family, dualstack_ipv6=family == socket.AF_INET6)
        # asyncio sets it only on sockets that name their protocol; without it each answer waits 40 ms for the client.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"{host}, port {port}: {reason}; choose another --port or --host") from None
    return listener


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class Server(uvicorn.Server):
    """Lets the command end in its own way after a signal."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # uvicorn would raise them again, which would end this process with its workers


class Protocol(H11Protocol):
    """Closes connections that take too long for the head of a request or to read an answer."""

    def __init__(self, *arguments: Any, guard: Guard, head_seconds: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._guard, self._head_seconds = guard, head_seconds
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._abort_in(self._head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            if not self.flow.write_paused:
                self._cancel_deadline()
        elif self._deadline is None and not self.transport.is_closing():  # the head is not complete
            self._abort_in(self._head_seconds)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_in(WRITE_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._abort_in(WRITE_SECONDS)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_in(WRITE_SECONDS)  # if it still has not read all of its last answer

    def shutdown(self) -> None:
        if self.cycle:
            self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.transport.abort()
            return
        body = json.dumps({"detail": msg}).encode()
        headers = self._guard.headers() | {"Content-Type": "application/json", "Content-Length": str(len(body))}
        answer = h11.Response(status_code=400, headers=[*headers.items(), ("Connection", "close")])
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _abort_in(self, seconds: float) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _cancel_deadline(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None
