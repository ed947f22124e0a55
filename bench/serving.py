"""Requests per second and latency of `cxr serve` and of `mlflow models serve`: same images, weights and cores.

`registered` is the model that `dvc repro promote` registers, `plain` a pyfunc that decodes with Pillow and classifies a
batch of one. MLflow's servers have a process per core. Each client sends one radiograph after the other: raw bytes to
`cxr serve`, base64 in JSON to the others. Prints a line per number of clients.

python bench/serving.py [SECONDS] [CLIENTS,…] [SERVER,…] [BACKBONE] [SIZE]
"""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]  # `common` has it too, but imports torch, which the clients do without
PORT = 8790
WARM_UP = 1.0  # seconds
IMAGES = 16
PLAIN = """
import base64, io
import mlflow, numpy as np, pandas as pd, timm, torch
from PIL import Image
from safetensors.torch import load_file

class Plain(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.network = timm.create_model("{name}", num_classes=2)
        self.network.load_state_dict(load_file(context.artifacts["weights"]))
        self.network.eval()

    def predict(self, context, model_input, params=None):
        rows = []
        for text in model_input["image"]:
            image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").resize(({size}, {size}))
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
            with torch.no_grad():
                rows.append(self.network(pixels).softmax(1)[0, 1].item())
        return pd.DataFrame({{"probability": rows}})

mlflow.models.set_model(Plain())
"""


def main(
    seconds: str = "8",
    clients: str = "1,8,64",
    servers: str = "serve,registered,plain",
    backbone: str = "timm/tf_efficientnet_lite0",
    size: str = "64",
) -> None:
    counts = [int(count) for count in clients.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
        os.chdir(folder)
        for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
            os.environ.pop(variable, None)
        commands = make_models(folder, backbone, int(size))
        measured = {}
        for server in servers.split(","):
            with run_server(commands[server], f"http://127.0.0.1:{PORT}/{'ready' if server == 'serve' else 'ping'}"):
                measured[server] = measure(server, counts, float(seconds))
    for index, count in enumerate(counts):
        line: dict[str, Any] = {"clients": count, "backbone": backbone, "size": int(size)}
        for server, results in measured.items():
            line |= {f"{server}_{key}": value for key, value in results[index].items()}
        for server in [server for server in measured if server != "serve" and "serve" in measured]:
            line[f"ratio_to_{server}"] = round(line["serve_per_second"] / line[f"{server}_per_second"], 1)
            line[f"ratio_of_p99_to_{server}"] = round(line["serve_p99_ms"] / line[f"{server}_p99_ms"], 2)
        print(json.dumps(line))


def make_models(folder: Path, backbone: str, size: int) -> dict[str, list[str]]:
    """Register a candidate, and save a plain model of the same backbone; return the command of each server."""
    import mlflow
    import timm
    import torch
    from joblib import cpu_count
    from safetensors.torch import save_file

    from pipeline.core.config import load_config
    from pipeline.evaluation.ensemble import EnsembleConfig
    from pipeline.inference import candidate
    from pipeline.models import classifier
    from pipeline.models.classifier import Architecture, Classifier
    from pipeline.tracking import registry
    from pipeline.tracking.store import connect

    torch.manual_seed(0)
    network = Classifier(Architecture(backbone, [], 0.0, size, "imagenet", size, "stretch"))
    classifier.save_weights([network], folder / "seed-0")
    classifier.save_description(network, folder / "seed-0", {})
    candidate.assemble_candidate(folder / "candidate", folder, EnsembleConfig(["seed-0"], "mean", "mean", [1.0], 0.5))
    config = load_config()
    store = connect(config.model_name)
    run = store.client.create_run(store.experiment_id)
    example = np.zeros((size, size), np.uint8)
    version = registry.register_candidate(
        store, config.model_name, run.info.run_id, folder / "candidate", example, {"candidate": "seed-0"}
    )
    registry.set_champion(store, config.model_name, version, "benchmark")

    name = backbone.removeprefix("timm/")
    save_file(timm.create_model(name, num_classes=2).state_dict(), folder / "plain.safetensors")
    (folder / "plain.py").write_text(PLAIN.format(name=name, size=size))
    mlflow.pyfunc.save_model(
        folder / "plain",
        python_model=str(folder / "plain.py"),
        artifacts={"weights": str(folder / "plain.safetensors")},
        pip_requirements=["mlflow", "timm"],
    )
    mlflow_serve = ["mlflow", "models", "serve", "--env-manager", "local", "--port", str(PORT)]
    mlflow_serve += ["--workers", str(cpu_count()), "--model-uri"]
    return {
        "serve": ["cxr", "serve", "--port", str(PORT)],
        "registered": [*mlflow_serve, f"models:/{config.model_name}/{version.version}"],
        "plain": [*mlflow_serve, str(folder / "plain")],
    }


def measure(server: str, counts: list[int], seconds: float, port: int = PORT) -> list[dict[str, float]]:
    """Return requests per second of a running server and percentiles of the latency for each number of clients."""
    from common import radiographs

    images = radiographs(IMAGES)
    if server == "serve":
        requests = [encode_request("/v1/predict", "application/octet-stream", image) for image in images]
    else:
        bodies = [
            json.dumps({"dataframe_records": [{"image": base64.b64encode(image).decode()}]}).encode()
            for image in images
        ]
        requests = [encode_request("/invocations", "application/json", body) for body in bodies]
    data = json.dumps([request.decode("latin-1") for request in requests])
    results = []
    for count in counts:
        client = [sys.executable, __file__, "--client", str(count), str(seconds), str(port)]
        output = subprocess.run(client, input=data, stdout=subprocess.PIPE, text=True, check=True).stdout
        results.append(json.loads(output))
    return results


@contextmanager
def run_server(command: list[str], url: str) -> Iterator[None]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{Path('mlflow.db').resolve()}",
    }
    with Path("server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while not is_ready(url):
            if process.poll() is not None:
                sys.exit(Path("server.log").read_text())
            time.sleep(0.2)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def is_ready(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=60):
        return True
    return False


def encode_request(path: str, kind: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def run_clients(count: int, seconds: float, port: int, requests: list[bytes]) -> dict[str, float]:
    """Send requests over `count` connections; none is counted that begins before the end of the warm-up."""
    begin = time.perf_counter() + WARM_UP
    latencies: list[float] = []

    async def run_client(index: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (start := time.perf_counter()) < begin + seconds:
            index += 1
            writer.write(requests[index % len(requests)])
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
            assert head.startswith(b"http/1.1 200"), body
            if start >= begin:
                latencies.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*map(run_client, range(count)))
    elapsed = time.perf_counter() - begin
    p50, p99 = (round(1000 * value, 1) for value in np.percentile(latencies, [50, 99]))
    return {"per_second": round(len(latencies) / elapsed, 1), "p50_ms": p50, "p99_ms": p99}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        clients, time_limit, server_port = int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
        encoded = [text.encode("latin-1") for text in json.load(sys.stdin)]
        print(json.dumps(asyncio.run(run_clients(clients, time_limit, server_port, encoded))))
    else:
        main(*sys.argv[1:])
