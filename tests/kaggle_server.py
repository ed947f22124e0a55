"""A fake Kaggle server with the part of the API that the pipeline uses, and injected faults."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMPETITION = "stat946winter2021"
DATASET = "owner/radiographs"
USERNAME = "user"
TOKEN = "KGAT_0123456789abcdef"
KEY = "fedcba9876543210"
SIGNATURE = "signed-0a1b2c3d"  # of the signed URLs of files, which are secret
BASIC = "Basic " + base64.b64encode(f"{USERNAME}:{KEY}".encode()).decode()


class Kaggle:
    """The state of the server, the requests it received, and the faults of the next requests.

    Each request takes the next fault of the first name in `faults` that its path contains: an HTTP status, optionally
    with a message; or `cut`, `wrong hash`, `no range`, `error page` or `lost` (processed, but not answered).
    """

    def __init__(self, archive: bytes) -> None:
        self.archive = archive
        self.requests: list[tuple[str, dict[str, str]]] = []  # path and headers
        self.faults: dict[str, list[int | str | tuple[int, str]]] = {}
        self.length = len(archive)  # in the header Content-Length
        self.hashed = True  # whether the storage sends a hash
        self.download_request: dict = {}
        self.upload_request: dict = {}
        self.uploaded = b""
        self.submissions: list[dict] = []
        self.polls_until_scored = 2
        self.result = {"status": "COMPLETE", "publicScore": "0.96500"}
        self.endpoint = self.storage = ""

    def count(self, name: str) -> int:
        return sum(name in path for path, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    kaggle: Kaggle

    def log_message(self, *_) -> None:
        pass

    def next_fault(self) -> int | str | tuple[int, str] | None:
        kaggle = self.kaggle
        kaggle.requests.append((self.path, dict(self.headers)))
        queue = next((faults for name, faults in kaggle.faults.items() if name in self.path and faults), None)
        return queue.pop(0) if queue else None

    def answer(self, status: int, content: dict | bytes = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        content_type = "application/zip" if isinstance(content, bytes) else "application/json"
        headers = {"Content_Type": content_type, "Content_Length": str(len(body))} | headers
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault, service = self.next_fault(), self.path.rpartition("/")[2]
        name = body.get("competitionName") or f"{body.get('ownerSlug')}/{body.get('datasetSlug')}"
        if isinstance(fault, int | tuple):
            status, message = fault if isinstance(fault, tuple) else (fault, "injected fault")
        elif self.headers["Authorization"] not in (f"Bearer {TOKEN}", BASIC):
            status, message = 401, "Unauthenticated"
        elif name not in (COMPETITION, DATASET):
            status, message = 404, "Not found"
        else:
            return self.serve(service, body, fault)
        return self.answer(status, {"code": status, "message": message})

    def serve(self, service: str, body: dict, fault: str | None) -> None:
        kaggle = self.kaggle
        match service:
            case "DownloadDataFiles" | "DownloadDataset":
                kaggle.download_request = body
                self.answer(302, Location=f"{kaggle.storage}/archive.zip?X-Goog-Signature={SIGNATURE}")
            case "StartSubmissionUpload":
                kaggle.upload_request = body
                url = f"{kaggle.storage}/upload?X-Goog-Signature={SIGNATURE}"
                self.answer(200, {"token": "blob-1", "createUrl": url})
            case "CreateSubmission":
                assert body["blobFileTokens"] == "blob-1"
                new = {"ref": 41 + len(kaggle.submissions), "description": body["submissionDescription"]}
                kaggle.submissions.insert(0, new | {"status": "PENDING", "publicScore": ""})
                if fault != "lost":
                    self.answer(200, {"message": "Successfully submitted", "ref": new["ref"]})
            case "ListSubmissions":
                if kaggle.count(service) > kaggle.polls_until_scored:
                    kaggle.submissions[0] |= kaggle.result
                self.answer(200, {"submissions": [*kaggle.submissions, {"ref": 7, "status": "COMPLETE"}]})

    def do_GET(self) -> None:
        kaggle, fault = self.kaggle, self.next_fault()
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        if fault == "no range":
            start = 0
        content = b"<html>busy</html>" if fault == "error page" else kaggle.archive[start:]
        digest = hashlib.md5(kaggle.archive if fault != "wrong hash" else b"").digest()
        hashes = {"x_goog_hash": f"crc32c=AAAAAA==,md5={base64.b64encode(digest).decode()}"} if kaggle.hashed else {}
        length = str(kaggle.length - start if content == kaggle.archive[start:] else len(content))
        body = content[: len(content) // 2] if fault == "cut" else content
        status = fault if isinstance(fault, int) else 206 if start else 200
        self.answer(status, body, Accept_Ranges="bytes", Content_Length=length, **hashes)

    def do_PUT(self) -> None:
        content, fault = self.rfile.read(int(self.headers["Content-Length"])), self.next_fault()
        if isinstance(fault, int):
            return self.answer(fault)
        self.kaggle.uploaded = content
        return self.answer(200)


@contextmanager
def serve(archive: bytes) -> Iterator[Kaggle]:
    """Run the server during the block; like Kaggle's, its API and its storage have different host names."""
    kaggle = Kaggle(archive)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"kaggle": kaggle}))
    kaggle.endpoint, kaggle.storage = (f"http://{host}:{server.server_port}" for host in ("localhost", "127.0.0.1"))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield kaggle
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
