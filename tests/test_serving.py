"""`cxr serve`: it answers as `cxr predict` does, keeps within its limits, follows the champion, and ends cleanly."""

import base64
import functools
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import uvicorn
from conftest import (
    ROOT,
    clean_environment,
    copy_project,
    error_line_of,
    free_port,
    invoke,
    output_of,
    use_project,
    write_files,
)
from fastapi import HTTPException
from fuzzing import damage
from odd_files import chest, dicom, encode, formats
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from pipeline.data.image_checks import MAX_PIXELS, UnusableError
from pipeline.evaluation.prevalence import change_prevalence
from pipeline.serving import server as server_module
from pipeline.serving.decoders import WORKER_MEMORY, DecoderError, DecoderPool
from pipeline.serving.limits import Limits, parse_images
from pipeline.serving.served_model import render_card

TIMEOUT, MAX_MEBIBYTES, POLL_SECONDS = 3, 4, 0.5
LOADING_SECONDS = 15  # of a version, on a busy machine
JSON_TYPE = {"Content-Type": "application/json"}


@dataclass
class Server:
    project: Path
    process: subprocess.Popen
    errors: Path  # what it writes to stderr
    port: int

    def ask(
        self, method: str = "POST", path: str = "/v1/predict", body: bytes = b"", connection=None, **headers: str
    ) -> tuple[int, dict, dict[str, str]]:
        """Return status, JSON and headers of an answer, over a connection of its own or a given one."""
        connection = connection or self.connect()
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        text = answer.read()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else {"text": text.decode()}, dict(answer.getheaders())

    def predict(self, image: bytes, query: str = "") -> dict:
        status, answer, _ = self.ask(path=f"/v1/predict{query}", body=image)
        assert status == 200, answer
        return answer

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def open_socket(self, data: bytes) -> socket.socket:
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        opened.sendall(data)
        return opened

    def metric(self, name: str) -> float:
        text = self.ask("GET", "/metrics")[1]["text"]
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


@contextmanager
def run_server(project: Path, *arguments: str) -> Iterator[Server]:
    command = ["cxr", "serve", "--port", "0", *arguments]
    errors, environment = project / "serve.log", clean_environment(TMPDIR=str(project / "temporary"))
    (project / "temporary").mkdir()
    with errors.open("w") as log:
        options = {"env": environment, "stdout": subprocess.PIPE, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(command, cwd=project, text=True, **options)
    try:
        line = process.stdout.readline()
        assert " answers at http://127.0.0.1:" in line, errors.read_text()
        server = Server(project, process, errors, int(re.search(r":(\d+) ", line)[1]))
        while server.ask("GET", "/ready")[0] != 200:
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def server(demo_project, tmp_path_factory) -> Iterator[Server]:
    project = copy_project(demo_project, tmp_path_factory.mktemp("serving") / "project")
    options = ["--timeout", TIMEOUT, "--max-size", MAX_MEBIBYTES, "--poll-seconds", POLL_SECONDS, "--log", "log.jsonl"]
    with run_server(project, "--name", "Proxy.example.org", *map(str, options)) as running:
        yield running


@pytest.fixture(scope="module")
def radiographs(server) -> dict[str, bytes]:
    with zipfile.ZipFile(server.project / "data/raw.zip") as archive:
        names = [name for name in archive.namelist() if name.startswith("test/")]
        found = {Path(name).name: archive.read(name) for name in names}
    return found | {name: formats(72)[name] for name in ("gray16.png", "windowed.dcm", "gray16.tiff")}


def batch(*images: bytes) -> bytes:
    return json.dumps({"images": [base64.b64encode(image).decode() for image in images]}).encode()


def test_answers_are_those_of_cxr_predict(server, radiographs, tmp_path, monkeypatch):
    for name, data in radiographs.items():
        (tmp_path / name).write_bytes(data)
    use_project(server.project, monkeypatch)
    output_of(f"cxr predict {tmp_path} --csv {tmp_path / 'table.csv'}")
    expected = pd.read_csv(tmp_path / "table.csv").assign(file=lambda table: table["file"].map(lambda f: Path(f).name))
    expected = expected.set_index("file").loc[list(radiographs)]
    assert len(set(expected["probability"].round(6))) > 3

    logged = len((server.project / "log.jsonl").read_text().splitlines())
    single = [server.predict(data) for data in radiographs.values()]
    together = server.ask(body=batch(*radiographs.values()), **JSON_TYPE)[1]
    for predictions in ([answer["predictions"][0] for answer in single], together["predictions"]):
        table = pd.DataFrame(predictions, list(radiographs))
        assert table["probability"].to_numpy() == pytest.approx(expected["probability"].to_numpy(), abs=1e-6)
        assert list(table["label"]) == list(expected["label"])
    log = pd.read_json(server.project / "log.jsonl", lines=True)[logged:]
    assert len(log) == 2 * len(radiographs)
    assert list(log["probability"][: len(radiographs)]) == pytest.approx(list(expected["probability"]), abs=1e-5)

    model = server.ask("GET", "/v1/model")[1]
    for answer in (*single, together):
        assert {key: answer[key] for key in ("model", "version", "threshold", "prevalence")} == {
            key: model[key] for key in ("model", "version", "threshold", "prevalence")
        }
    for one in together["predictions"]:
        assert list(one["members"]) == model["members"]
        is_positive = [value >= model["threshold"] for value in one["members"].values()]
        assert one["agreement"] == pytest.approx(np.mean([value == one["label"] for value in is_positive]))
        assert one["class"] == model["classes"][one["label"]]
        assert one["label"] == (one["probability"] >= model["threshold"])
    with Image.open(io.BytesIO(next(iter(radiographs.values())))) as first:
        assert (together["predictions"][0]["width"], together["predictions"][0]["height"]) == first.size


def test_the_benchmark_counts_the_answers_of_a_server(server, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import serving

    classified = 'cxr_images_total{outcome="classified"}'
    before = server.metric(classified)
    (measured,) = serving.measure("serve", [1], 0.3, server.port)
    assert 0 < measured["p50_ms"] <= measured["p99_ms"]
    assert 0 < measured["per_second"] * 0.3 < server.metric(classified) - before


def test_a_log_that_cannot_be_written_costs_no_answer(server, radiographs):
    log = server.project / "log.jsonl"
    for times in (1, 2):
        log.rename(log.with_suffix(".old"))
        log.mkdir()
        try:
            server.predict(radiographs["gray16.png"])
            server.predict(radiographs["gray16.png"])
        finally:
            log.rmdir()
            log.with_suffix(".old").rename(log)
        server.predict(radiographs["gray16.png"])
        assert server.metric("cxr_unlogged_images_total") == 2 * times
        assert server.errors.read_text().count("predictions are not logged: Is a directory") == times


def test_what_all_requests_together_hold_is_bounded(server, radiographs):
    size = MAX_MEBIBYTES * 2**20
    start = HEAD + b"Content-Length: %d\r\n\r\n" % size + bytes(size - 10_000)
    with ExitStack() as stack:
        for _ in range(2):  # all but the end
            stack.enter_context(closing(server.open_socket(start)))
        text = batch(bytes(size * 3 // 16 - 100))  # the largest JSON
        status, answer, _ = server.ask(body=text, **JSON_TYPE)
        assert (status, answer["predictions"][0]["content"]) == (200, "unknown")
        assert server.ask(body=text + b" " * 200, **JSON_TYPE)[0] == 413
        stack.enter_context(closing(server.open_socket(start)))
        while server.metric("cxr_bytes_in_flight") < 2.9 * size:
            time.sleep(0.05)
        status, answer, headers = server.ask(body=bytes(size))
        assert (status, headers["retry-after"]) == (503, "2")
        assert "busy" in answer["detail"]
        assert server.predict(radiographs["gray16.png"])["predictions"]  # a small one fits
    while server.metric("cxr_bytes_in_flight"):
        time.sleep(0.05)


def test_the_model_is_described(server):
    status, model, headers = server.ask("GET", "/v1/model")
    assert (status, headers["x-model-version"], model["follows"]) == (200, model["version"], "champion")
    assert model["poll_seconds"] == POLL_SECONDS
    assert model["limits"] == {"bytes": MAX_MEBIBYTES * 2**20, "pixels": MAX_PIXELS, "images": 64, "seconds": TIMEOUT}
    assert "Limitations" in model["card_html"]
    assert "<table>" in model["card_html"]
    assert server.ask("GET", "/health")[:2] == (200, {"status": "ok"})
    ready = {"status": "ready", "version": model["version"], "registry": "ok"}
    assert server.ask("GET", "/ready")[:2] == (200, ready)


def test_another_prevalence_moves_probability_and_threshold_alike(server, radiographs):
    image = radiographs["gray16.png"]
    known, changed = server.predict(image), server.predict(image, "?prevalence=0.6")
    one, other = known["predictions"][0], changed["predictions"][0]
    values = np.array([one["probability"], known["threshold"], *one["members"].values()])
    expected = change_prevalence(values, known["prevalence"], 0.6)
    assert [other["probability"], changed["threshold"], *other["members"].values()] == pytest.approx(list(expected))
    assert abs(other["probability"] - one["probability"]) > 1e-3
    assert (other["label"], other["agreement"]) == (one["label"], one["agreement"])
    assert changed["prevalence"] == 0.6


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("curl --data-binary @radiographs/test/test/cxr-00833.jpg 127.0.0.1:8000/v1/predict", '"probability":'),
        (
            "curl --data-binary @radiographs/test/test/cxr-00833.jpg '127.0.0.1:8000/v1/predict?prevalence=0.01'",
            '"prevalence":0.01',
        ),
        ("curl 127.0.0.1:8000/metrics", "cxr_model_info{"),
    ],
)
def test_the_documented_commands_are_answered(server, radiographs, tmp_path, command, answer):
    write_files(tmp_path, {"radiographs/test/test/cxr-00833.jpg": next(iter(radiographs.values()))})
    command = command.replace(":8000", f":{server.port}")
    ran = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert answer in ran.stdout


def test_a_heatmap_lies_over_the_image(server):
    gray = np.tile(chest(600), (1, 3))
    (one,) = server.predict(encode(Image.fromarray(gray)), "?heatmap=true")["predictions"]
    image, heatmap = (Image.open(io.BytesIO(base64.b64decode(one[name]))) for name in ("image", "heatmap"))
    assert (one["width"], one["height"]) == (1800, 600)
    assert (image.size, image.mode, image.format) == ((1024, 341), "L", "PNG")
    assert (heatmap.size, heatmap.mode, heatmap.format) == ((1024, 341), "RGBA", "PNG")
    expected = Image.fromarray(gray).resize(image.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image, float) - np.asarray(expected)).mean() < 2
    opacity = np.asarray(heatmap)[..., 3]
    assert opacity.max() > opacity.min()


def nested(depth: int) -> bytes:
    return b'{"images": ' + b"[" * depth


@pytest.mark.parametrize(
    ("status", "detail", "request_of"),
    [
        (400, "no JSON", lambda _: {"body": b"{", **JSON_TYPE}),
        (400, "1 to 64 images", lambda _: {"body": b'{"images": []}', **JSON_TYPE}),
        (400, "1 to 64 images", lambda _: {"body": b'{"images": ["QQ=="], "path": "x"}', **JSON_TYPE}),
        (400, "at most 64 images", lambda _: {"body": batch(*[b"a"] * 80), **JSON_TYPE}),
        (400, "at most 64 images", lambda _: {"body": nested(100_000), **JSON_TYPE}),
        (400, "at most 64 images", lambda _: {"body": b'{"images": [' + b"{}," * 10**5, **JSON_TYPE}),
        (400, "ASCII", lambda _: {"body": b"\xff\xfe\x00", **JSON_TYPE}),
        (400, "prevalence: Input should be less than or", lambda image: {"path": "?prevalence=0.99999", "body": image}),
        (400, "prevalence: Input should be greater", lambda image: {"path": "?prevalence=1e-300", "body": image}),
        (400, "ASCII", lambda image: {"body": batch(image)[:-3] + "\N{GRINNING FACE}".encode() + b'"]}', **JSON_TYPE}),
        (400, "prevalence: Input should be a valid number", lambda image: {"path": "?prevalence=1%25", "body": image}),
        (400, "prevalance: Extra inputs", lambda image: {"path": "?prevalance=0.1", "body": image}),
        (400, "heatmap: only for one image", lambda image: {"path": "?heatmap=1", "body": batch(image), **JSON_TYPE}),
        (403, "other web sites", lambda image: {"body": image, "Origin": "https://example.org"}),
        (403, "other web sites", lambda image: {"body": image, "Origin": "null"}),
        (403, "other web sites", lambda image: {"body": image, "Sec_Fetch_Site": "cross-site"}),
        (421, "Host", lambda image: {"body": image, "Host": "rebound.example.org"}),
        (413, "may have 4 MiB", lambda _: {"body": bytes(MAX_MEBIBYTES * 2**20 + 1)}),
        (413, "may have 1 MiB", lambda _: {"body": bytes(MAX_MEBIBYTES * 2**18 + 1), **JSON_TYPE}),
        (413, "may have 4 MiB", lambda _: {"body": (bytes(2**20) for _ in range(6))}),  # in chunks
        (415, "curl --data-binary", lambda image: {"body": image, "Content_Type": "multipart/form-data; boundary=x"}),
        (415, "curl --data-binary", lambda image: {"body": image, "Content_Encoding": "gzip"}),
        (422, "empty file", lambda _: {}),
        (422, "not an image", lambda _: {"body": b"/etc/passwd"}),
        (422, "truncated", lambda image: {"body": image[:-2000]}),
        (405, "Method Not Allowed", lambda image: {"method": "PUT", "body": image}),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_an_error_with_the_reason(server, status, detail, request_of):
    request = request_of(encode(Image.fromarray(chest(200))))
    path = f"/v1/predict{request.pop('path', '')}"
    answered, answer, headers = server.ask(path=path, **request)
    assert (answered, answer.keys() - {"content"}) == (status, {"detail"}), answer
    assert detail in answer["detail"]
    for leak in (str(server.project), "/tmp", "site-packages", "Traceback", ".py", " at 0x"):
        assert leak not in answer["detail"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not {"server", "access-control-allow-origin", "set-cookie"} & headers.keys()
    documented = server.ask("GET", "/openapi.json")[1]["paths"]["/v1/predict"]["post"]["responses"]
    assert str(status) in documented or status == 405


def test_a_request_of_a_page_of_its_own_or_of_none_is_answered(server, radiographs):
    image = radiographs["gray16.png"]
    for headers in (
        {"Origin": f"http://127.0.0.1:{server.port}", "Host": f"127.0.0.1:{server.port}"},
        {"Origin": "https://proxy.example.org", "Sec_Fetch_Site": "same-origin"},  # of a page behind a proxy
        {"Host": f"localhost:{server.port}"},
        {"Host": f"[::1]:{server.port}"},
        {"Host": socket.getfqdn()},
        {"Host": "proxy.example.org"},
    ):
        assert server.ask(body=image, **headers)[0] == 200, headers
    assert server.ask("HEAD", "/")[0] == 200


@pytest.mark.parametrize(
    ("data", "content"),
    [
        (b"a,b\n1,2\n", "text"),
        (b"\1\2" * 99, "unknown"),
        (b"PK\3\4", "unknown"),
        (b"", "unknown"),
        (encode(Image.fromarray(chest(64)))[:900], ""),
    ],
)
def test_what_has_no_known_format_is_told_from_a_broken_image(server, data, content):
    assert server.ask(body=data)[1].get("content", "") == content
    assert server.ask(body=batch(data), **JSON_TYPE)[1]["predictions"][0].get("content", "") == content


def test_what_is_no_http_is_answered_with_the_headers_of_every_answer(server):
    with server.open_socket(b"\0 no HTTP\r\n\r\n") as opened:
        answer = b"".join(iter(lambda: opened.recv(10_000), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert {b"content-security-policy", b"x-model-version"} <= {
        line.partition(b":")[0].lower() for line in head.split(b"\r\n")
    }
    assert "Invalid HTTP" in json.loads(body)["detail"]


def test_a_string_is_never_a_path(server, radiographs, tmp_path):
    for name in ("there.png", "there"):
        (tmp_path / name).write_bytes(radiographs["gray16.png"])
    paths = [str(tmp_path / name) for name in ("there.png", "there", "absent.png")]
    unusable = server.metric('cxr_images_total{outcome="unusable"}')
    answers = server.ask(body=json.dumps({"images": [*paths, 7, "file:///etc/passwd"]}).encode(), **JSON_TYPE)
    assert answers[1]["predictions"] == [{"error": "not base64"}] * 5
    assert server.metric('cxr_images_total{outcome="unusable"}') == unusable + 5
    for path in paths:
        assert server.ask(body=path.encode())[:2] == (422, server.ask(body=b"absent")[1])
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/static/..%2fapp.py", "/docs"):
        assert server.ask("GET", path)[0] == 404, path


def test_an_unusable_image_of_several_has_its_reason_in_its_place(server, radiographs):
    image = radiographs["gray16.png"]
    first, *errors, last = server.ask(body=batch(image, b"text", b"", image), **JSON_TYPE)[1]["predictions"]
    assert [one["error"] for one in errors] == ["not an image in a known format", "empty file"]
    assert first == last


def bombs() -> dict[str, bytes]:
    """Return small files whose content is, or claims to be, very large."""
    side = 30_000
    row = zlib.compress(bytes(side * 1000))
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50 * 2**20)))
    small = encode(Image.fromarray(chest(64)))
    progressive = encode(Image.fromarray(chest(200)), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    white = Image.new("1", (13_000, 13_000), 1)
    return {
        "PNG": header + chunk(b"IDAT", row) + chunk(b"IEND", b""),
        "PNG with a large text": small[:33] + text + small[33:],
        "TIFF": encode(white, "TIFF", compression="tiff_deflate"),
        "JPEG of many scans": progressive[:-2] + scan * 250 + progressive[-2:],
        "JPEG of 65500 pixels": encode(Image.fromarray(chest(64)), "JPEG").replace(
            struct.pack(">HH", 64, 64), struct.pack(">HH", 65_500, 65_500)
        ),
        "DICOM of 65535 pixels": dicom(chest(64), Rows=65_535, Columns=65_535),
        "deflated DICOM": dicom(np.zeros((8000, 8000), np.uint16), DeflatedExplicitVRLittleEndian),
        "DICOM of many frames": dicom(chest(64), NumberOfFrames=10**9),
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def test_decompression_bombs_are_unusable_and_cost_little(server):
    workers = psutil.Process(server.process.pid).children()
    files, before = bombs(), cpu_seconds(workers)
    for name, data in files.items():
        assert len(data) < MAX_MEBIBYTES * 2**20, name
        status, answer, _ = server.ask(body=data)
        assert status == 422 or name == "PNG with a large text", (name, answer)
    assert cpu_seconds(workers) - before < 2 * TIMEOUT
    assert psutil.Process(server.process.pid).children() == workers
    peaks = [Path(f"/proc/{worker.pid}/status").read_text() for worker in workers]
    assert max(int(re.search(r"VmHWM:\s+(\d+)", peak)[1]) for peak in peaks) < 1.5 * 2**20  # KiB


def test_clients_at_the_same_time_get_their_own_answers(server, radiographs):
    images = list(radiographs.values())
    expected = [server.predict(image)["predictions"][0]["probability"] for image in images]

    def ask_all(first: int) -> list[float]:
        order = images[first:] + images[:first]
        connection = server.connect()
        answers = [server.ask(body=image, connection=connection)[1] for image in order]
        found = [answer["predictions"][0]["probability"] for answer in answers]
        return found[len(images) - first :] + found[: len(images) - first]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(ask_all, range(0, len(images), 3)):
            assert found == pytest.approx(expected, abs=1e-6)
    assert server.metric("cxr_images_in_flight") == 0
    assert server.metric("cxr_bytes_in_flight") == 0


def resources(server: Server) -> tuple[list[psutil.Process], int, float]:
    """Return the worker processes, the open files, and the memory of all processes, MiB."""
    process = psutil.Process(server.process.pid)
    children = process.children(recursive=True)
    memory = sum(one.memory_info().rss for one in (process, *children)) / 2**20
    return children, process.num_fds(), memory


HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n"
SAMPLES = [*formats(48).values()]


def send_damaged_images(server: Server, rng: random.Random) -> None:
    connection = server.connect()
    statuses = [server.ask(body=damage(rng, SAMPLES), connection=connection)[0] for _ in range(10)]
    assert set(statuses) <= {200, 422}


def send_damaged_json(server: Server, rng: random.Random) -> None:
    connection = server.connect()
    for _ in range(10):
        body = bytearray(batch(SAMPLES[0]))
        body[rng.randrange(20)] = rng.randrange(256)
        assert server.ask(body=bytes(body), connection=connection, **JSON_TYPE)[0] in (200, 400)


def send_no_http(server: Server, rng: random.Random) -> None:
    for _ in range(10):
        send_refused(server, rng.randbytes(300) + b"\r\n\r\n", "no HTTP")


def send_wrong_lengths(server: Server, rng: random.Random) -> None:
    lengths = [
        b"Content-Length: -1", b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: x",
        b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked\r\nContent-Length: 3",
    ]  # fmt: skip
    for length in lengths * 2:
        send_refused(server, b"%s%s\r\n\r\nzzzz\r\n" % (HEAD, length), "wrong length")


def send_endless_heads(server: Server, rng: random.Random) -> None:
    for _ in range(10):
        send_refused(server, HEAD + b"A: " + b"a" * 200_000, "endless head")


REFUSED: Counter[str] = Counter()  # requests whose answer was read, by what is wrong with them


def send_refused(server: Server, data: bytes, kind: str) -> None:
    # The connection may be closed before all was sent; then there is no answer to read.
    with suppress(ConnectionError), server.open_socket(data) as opened:
        answer = opened.recv(100)[:10]
        assert answer in (b"HTTP/1.1 4", b"HTTP/1.1 5", b"")
        REFUSED[kind] += answer != b""


def cut_bodies(server: Server, rng: random.Random) -> None:
    for _ in range(10):
        opened = server.open_socket(HEAD + b"Content-Length: 90000\r\n\r\n" + rng.randbytes(rng.randrange(50_000)))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
        opened.close()


def leave_before_the_answer(server: Server, rng: random.Random) -> None:
    for _ in range(10):
        body = rng.choice(SAMPLES)
        server.open_socket(b"%sContent-Length: %d\r\n\r\n%s" % (HEAD, len(body), body)).close()


def ask_for_what_is_not_there(server: Server, rng: random.Random) -> None:
    for method, path in (
        ("DELETE", "/v1/predict"), ("POST", "/"), ("GET", "/v1/predict"), ("POST", "/v1/model"), ("GET", "/v2/predict"),
        ("OPTIONS", "/v1/predict"), ("POST", "/metrics"), ("GET", "/static/%00"), ("TRACE", "/"), ("GET", "/%ff/..//"),
    ):  # fmt: skip
        assert 400 <= server.ask(method, path)[0] < 500


BAD_REQUESTS = [
    send_damaged_images, send_damaged_json, send_no_http, send_wrong_lengths, send_endless_heads, cut_bodies,
    leave_before_the_answer, ask_for_what_is_not_there,
]  # fmt: skip


def test_a_thousand_bad_requests_slow_clients_and_cut_connections_leave_it_as_it_was(server, radiographs):
    image = radiographs["gray16.png"]
    expected = server.predict(image)["predictions"]
    with ThreadPoolExecutor(4) as pool:
        send = lambda seed: BAD_REQUESTS[seed % len(BAD_REQUESTS)](server, random.Random(seed))  # noqa: E731
        list(pool.map(send, range(len(BAD_REQUESTS))))  # so that it has used what all kinds need
        workers, files, memory = resources(server)
        crashes = server.metric('cxr_images_total{outcome="crash"}')
        # Partial heads and bodies, most of which send nothing more, some a byte now and then.
        slow = [server.open_socket(HEAD) for _ in range(40)]
        slow += [server.open_socket(HEAD + b"Content-Length: 100000\r\n\r\nabc") for _ in range(40)]
        silent = [server.open_socket(b"") for _ in range(40)]
        start = time.monotonic()
        list(pool.map(send, range(100)))  # ten each
        assert server.predict(image)["predictions"] == expected
    assert set(REFUSED) == {"no HTTP", "wrong length", "endless head"}
    assert min(REFUSED.values()) > 0, REFUSED
    while time.monotonic() - start < TIMEOUT + 30 and slow:
        for opened in slow[::8]:
            with suppress(OSError):
                opened.sendall(b"a")
        time.sleep(0.3)
        slow = [opened for opened in slow if not is_closed(opened)]
    assert not slow
    assert all(map(is_closed, silent))
    assert server.predict(image)["predictions"] == expected
    after = resources(server)
    while after[1] > files and time.monotonic() - start < 60:  # connections that a client has left are closed soon
        time.sleep(0.2)
        after = resources(server)
    assert len(after[0]) == len(workers)
    assert after[1] <= files
    assert after[2] < memory + 100
    assert server.metric('cxr_images_total{outcome="crash"}') == crashes
    assert "Traceback" not in server.errors.read_text()


def is_closed(opened: socket.socket) -> bool:
    """Return whether the server has closed a connection, after an answer or without one."""
    opened.settimeout(0.01)
    try:
        while data := opened.recv(1000):
            assert data.startswith(b"HTTP/1.1 4") or b"detail" in data
    except TimeoutError:
        return False
    except OSError:
        pass
    opened.close()
    return True


def test_a_slow_body_is_told_so(server):
    with server.open_socket(HEAD + b"Content-Length: 100000\r\n\r\n") as opened:
        assert opened.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_promotion_and_rollback_change_the_model_without_a_failed_request(server, radiographs, monkeypatch):
    from pipeline.core.config import load_config
    from pipeline.tracking import registry
    from pipeline.tracking.store import connect

    use_project(server.project, monkeypatch)
    config = load_config()
    store = connect(config.model_name)
    old = registry.get_champion(store, config.model_name)
    others = [one for one in registry.list_versions(store, config.model_name) if one.version != old.version]
    answers: list[tuple[int, str]] = []
    is_over = threading.Event()

    def ask() -> None:
        connection = server.connect()
        while not is_over.is_set():
            status, answer, headers = server.ask(body=radiographs["gray16.png"], connection=connection)
            answers.append((status, answer.get("version", "")))
            assert headers["x-model-version"] == answer["version"]
            time.sleep(0.01)

    def wait_for(is_reached: Callable[[], bool]) -> None:
        start = time.monotonic()
        while not is_reached():
            assert time.monotonic() - start < POLL_SECONDS + LOADING_SECONDS
            time.sleep(0.05)

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            wait_for(lambda: bool(answers))
            registry.set_champion(store, config.model_name, others[0], "better", person="somebody")
            wait_for(lambda: answers[-1][1] == str(others[0].version))
            output_of("cxr rollback")
            wait_for(lambda: answers[-1][1] == str(old.version))
            assert server.ask("GET", "/v1/model")[1]["version"] == str(old.version)

            model_id = registry.logged_model_id(others[-1])
            weights = next((server.project / "mlartifacts").rglob(f"{model_id}/**/model.safetensors"))
            weights.write_bytes(weights.read_bytes()[:-1])
            registry.set_champion(store, config.model_name, others[-1], "damaged", person="somebody")
            wait_for(lambda: server.ask("GET", "/ready")[1]["registry"] == "failing")
            failures = server.metric("cxr_poll_failures_total")
            time.sleep(3 * POLL_SECONDS)
            assert server.metric("cxr_poll_failures_total") == failures  # it is not downloaded at every look
            output_of("cxr rollback")
            wait_for(lambda: server.ask("GET", "/ready")[1]["registry"] == "ok")
            assert server.ask("GET", "/ready")[1]["version"] == str(old.version)
        finally:
            is_over.set()
        for one in asking:
            one.result()
    versions = [version for _, version in answers]
    assert {status for status, _ in answers} == {200}
    assert set(versions) == {str(old.version), str(others[0].version)}
    assert sum(one != other for one, other in pairwise(versions)) < 10  # each of the two clients sees two changes
    messages = server.errors.read_text()
    assert messages.count("is damaged") == 1
    assert server.metric("cxr_model_changes_total") == 2


def test_it_finishes_requests_and_leaves_nothing_behind_when_it_is_stopped(server, radiographs):
    image = radiographs["gray16.png"]
    expected = server.predict(image)["predictions"]
    workers = psutil.Process(server.process.pid).children(recursive=True)
    assert len(workers) >= 2
    head = HEAD + b"Content-Length: %d\r\n\r\n"
    with server.open_socket(head % len(image) + image[:100]) as opened, server.open_socket(head % 9) as unfinished:
        time.sleep(0.2)
        os.killpg(server.process.pid, signal.SIGTERM)  # as a service manager does: its workers get it too
        time.sleep(0.3)
        opened.sendall(image[100:])
        answer = b"".join(iter(lambda: opened.recv(10_000), b""))
        server.process.send_signal(signal.SIGINT)  # a second signal, which cancels what is unfinished
        assert server.process.wait(20) == 0
        unfinished.recv(1000)
    assert b"\r\nconnection: close" in answer.partition(b"\r\n\r\n")[0].lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"] == expected
    assert psutil.wait_procs(workers, 5)[1] == []
    assert "Traceback" not in server.errors.read_text()
    assert list((server.project / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    "option",
    ["--max-size nan", "--max-size inf", "--max-size 1e300", "--timeout nan", "--timeout inf", "--poll-seconds nan"],
)
def test_an_option_that_is_no_sensible_number_is_refused(option):
    result = invoke(f"cxr serve --port 0 {option}")
    assert result.exit_code == 2, result.output
    assert option.split()[0] in result.output


def test_a_client_that_never_reads_is_cut_off_though_it_sends(monkeypatch):
    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": bytes(20 * 2**20), "more_body": True})
        await send({"type": "http.response.body", "body": b""})  # waits until the client has read most of it

    monkeypatch.setattr(server_module, "WRITE_SECONDS", 0.5)
    http = functools.partial(server_module.Protocol, guard=None, head_seconds=60)
    running = uvicorn.Server(uvicorn.Config(answer, http=http, ws="none", lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        thread = threading.Thread(target=running.run, args=[[listener]])
        thread.start()
        try:
            client.connect(listener.getsockname())
            client.settimeout(10)
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            is_cut_off = False
            for _ in range(50):
                time.sleep(0.2)
                try:
                    client.sendall(b"G")
                except ConnectionError:
                    is_cut_off = True
                    break
            assert is_cut_off
        finally:
            client.close()
            running.should_exit = True
            thread.join()


def test_what_it_cannot_start_with_is_one_line(demo_project, monkeypatch, tmp_path, empty_store):
    use_project(demo_project, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = error_line_of(f"cxr serve --model bag --port {port}")
    assert message == f"Error: 127.0.0.1, port {port}: Address already in use; choose another --port or --host"
    port = free_port()
    assert "has no version or alias 'absent'" in error_line_of(f"cxr serve --model absent --port {port}")
    assert "--host no.such.invalid: " in error_line_of(f"cxr serve --host no.such.invalid --port {port}")
    message = error_line_of(f"cxr serve --model bag --port {port} --log params.yaml")
    assert message == "Error: params.yaml: no log of predictions; give the log another name"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{empty_store}")
    assert "nothing is registered yet" in error_line_of(f"cxr serve --port {port}")


@pytest.fixture(scope="module")
def slow_image() -> bytes:
    """A JPEG that passes all checks and takes seconds: each of its scans is a pass over 39 megapixels."""
    image = Image.new("L", (7900, 5000), 128)
    image.paste(30, (0, 0, 4000, 5000))
    data = encode(image, "JPEG", progressive=True, quality=50)
    first, second = (match.start() for match in list(re.finditer(b"\xff\xda", data))[:2])
    scan = data[first : data.index(b"\xff\xc4", first) if b"\xff\xc4" in data[first:second] else second]
    return data[:second] + scan * 190 + data[second:]


def test_a_decoder_that_takes_too_long_or_crashes_costs_one_image(slow_image):
    options = {"size": 32, "resize": "stretch", "with_preview": False}
    good = encode(Image.fromarray(chest(64)))
    before = set(psutil.Process().children())
    pool = DecoderPool(1, seconds=1)
    try:
        assert pool.decode(good, **options).result().pixels.shape == (32, 32)
        (worker,) = [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]
        limits = Path(f"/proc/{worker.pid}/limits").read_text()
        assert re.search(rf"Max address space\s+{WORKER_MEMORY}\s", limits)
        assert re.search(r"Max core file size\s+0\s", limits)
        assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text()

        late, next_one = pool.decode(slow_image, **options), pool.decode(good, **options)
        with pytest.raises(DecoderError, match=r"decoding takes longer than 1 s") as error:
            late.result()
        assert error.value.outcome == "timeout"
        assert next_one.result().width == 64
    finally:
        pool.close()

    pool = DecoderPool(1, seconds=60)
    try:
        assert pool.decode(good, **options).result().height == 64
        killed, next_one = pool.decode(slow_image, **options), pool.decode(good, **options)
        (worker,) = [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]
        time.sleep(0.2)
        worker.send_signal(signal.SIGSEGV)
        with pytest.raises(DecoderError, match="its decoder crashed") as error:
            killed.result()
        assert error.value.outcome == "crash"
        assert next_one.result().width == 64

        ours, theirs = multiprocessing.Pipe()
        theirs.send_bytes(b"[" * 10_000)  # as a decoder that a crafted image has taken over may send
        pool._workers[0]._connection.close()
        pool._workers[0]._connection = ours
        with pytest.raises(DecoderError, match="its decoder crashed"):
            pool.decode(good, **options).result()
        assert pool.decode(good, **options).result().width == 64

        (worker,) = [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]
        worker.kill()  # while it waits
        while worker.status() != psutil.STATUS_ZOMBIE or len(worker.threads()) > 1:  # they end one by one
            time.sleep(0.01)
        assert pool.decode(good, **options).result().width == 64

        busy, cancelled = pool.decode(good, **options), pool.decode(good, **options)
        cancelled.cancel()
        with pytest.raises(UnusableError, match="empty file"):
            pool.decode(b"", **options).result()
        assert busy.result().height == 64
    finally:
        pool.close()
    assert "spawn_main" not in str([one.cmdline() for one in set(psutil.Process().children()) - before])


@pytest.mark.parametrize(
    "text",
    ["é", '{"images": ["\\u20ac"]}', "[" * 10**6, '{"images": ' + "9" * 10**6, '{"images": ["a", NaN', '["a"]', "null"],
)
def test_a_hostile_json_text_is_refused(text):
    with pytest.raises(HTTPException) as error:
        parse_images(bytearray(text.encode()), Limits().images)
    assert error.value.status_code == 400


def test_escaped_base64_is_read():
    assert parse_images(bytearray(rb'{"images": ["\/\u002b8="]}'), 1) == [b"\xff\xef"]


def test_a_card_contains_nothing_that_runs_or_loads():
    html = render_card(
        "# Card\n\n<script>alert(1)</script> [a](javascript:alert(1)) [b](https://example.org) ![c](https://example.org/c)"
        "\n\n| a | b |\n|---|---|\n| 1 | <img src=x onerror=alert(1)> |"
    )
    assert Counter(re.findall(r"<(\w+)", html)) == Counter(
        ["h3", "p", "a", "a", "div", "table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    )
    assert re.findall(r'href="([^"]*)"', html) == ["https://example.org", "https://example.org/c"]
