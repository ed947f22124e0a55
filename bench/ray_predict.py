"""Radiographs per second of `cxr predict --ray`, compared with `cxr predict`, on all cores of this machine.

By default Ray's cluster is a new one on this machine too; ADDRESS is that of another one.

`ratio` is of the rates after the first rows are written, without the start of the processes and the loading of the
model; `whole_ratio` is of the whole commands.

python bench/ray_predict.py PROJECT [IMAGES] [MODEL] [ROUNDS] [ADDRESS]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from common import ROOT, UNIQUE_IMAGES, radiographs

Rates = tuple[float, float]  # images per second: after the first rows, and of the whole command


def main(
    project: str = str(ROOT),
    count: str = "4096",
    model: str = "champion",
    rounds: str = "3",
    address: str = "local",
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, jpegs = Path(name, "images"), radiographs(min(int(count), UNIQUE_IMAGES))
        folder.mkdir()
        for index in range(int(count)):
            (folder / f"{index:06}.jpg").write_bytes(jpegs[index % UNIQUE_IMAGES])
        command = [sys.executable, "-m", "stages.predict", str(folder), "--model", model]
        measured = [
            (predict_with_ray(project, command, address, Path(name, f"out-{index}")), predict(project, command))
            for index in range(int(rounds))
        ]
    (ray_rate, whole_ray_rate), (rate, whole_rate) = (
        tuple(map(statistics.median, zip(*rates, strict=True))) for rates in zip(*measured, strict=True)
    )
    rates = {"ray": ray_rate, "predict": rate, "whole_ray": whole_ray_rate, "whole_predict": whole_rate}
    ratios = {"ratio": round(ray_rate / rate, 2), "whole_ratio": round(whole_ray_rate / whole_rate, 2)}
    settings = {"images": int(count), "model": model}
    print(json.dumps(settings | {name: round(value, 1) for name, value in rates.items()} | ratios))


def predict(project: str, command: list[str]) -> Rates:
    start, times = time.time(), list[float]()
    with subprocess.Popen(
        [*command, "--csv", "-"], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as run:
        header = run.stdout.readline()
        assert header.startswith(b"file,"), header
        for _ in run.stdout:
            times.append(time.time())
    return compute_rates(start, time.time(), pd.Series(1, times))


def predict_with_ray(project: str, command: list[str], address: str, output: Path) -> Rates:
    start = time.time()
    command = [*command, "--ray", address, str(output)]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    end, parts = time.time(), list(output.glob("part-*"))
    written = pd.Series({part.stat().st_mtime: len(pd.read_parquet(part)) for part in parts})
    return compute_rates(start, end, written.sort_index())


def compute_rates(start: float, end: float, written: pd.Series) -> Rates:
    """Return the rates from the number of rows that were written at each time, which is the index."""
    first, last = written.index[0], written.index[-1]
    whole_rate = float(written.sum() / (end - start))
    if last - first < 1:  # too few images
        return whole_rate, whole_rate
    return float(written[written.index > first].sum() / (last - first)), whole_rate


if __name__ == "__main__":
    main(*sys.argv[1:])
