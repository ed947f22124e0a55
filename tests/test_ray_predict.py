"""`cxr predict --ray`: partitions of the input, each predicted once, on a cluster that loses workers and drivers."""

import io
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import (
    copy_project,
    encode_jpeg,
    error_line_of,
    error_message,
    free_port,
    invoke,
    run_s3_server,
    use_project,
    write_files,
    write_zip,
)
from test_many_processes import ray_node
from test_served import make_candidate

from pipeline.inference import partitions
from pipeline.inference.image_files import ImageFiles
from pipeline.inference.partitions import PartitionFolder, split_into_partitions
from pipeline.inference.prediction_table import REQUIRED

pytestmark = pytest.mark.slow

PARTITIONS = 12  # of the run that is stopped
MAX_IN_FLIGHT = 5  # partitions that wait for a worker that waits
DOCUMENTED = "cxr predict --ray auto radiographs predicted"
SETTINGS = {"model": "x", "version": "1", "input": ["a", "b"]}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def radiographs(count: int, seed: int) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    return {f"{index}.jpg": encode_jpeg(rng, bright=index % 2 == 0) for index in range(count)}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with run_s3_server() as s3:
        s3.create_bucket(Bucket="radiographs")
        for name, data in radiographs(4, seed=4).items():
            s3.put_object(Bucket="radiographs", Key=f"folder/{name}", Body=data)
        yield "radiographs"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, bucket) -> Iterator[str]:
    """The temporary folder of a Ray cluster of two nodes with one core each."""
    logs, port = tmp_path_factory.mktemp("ray"), free_port()
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray-") as folder,
        ray_node(logs, "--head", f"--port={port}", "--include-dashboard=false", RAY_TMPDIR=folder),
        ray_node(logs, f"--address=127.0.0.1:{port}", RAY_TMPDIR=folder),
    ):
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TMPDIR", folder)
        yield folder


def readers(pipe: Path) -> set[int]:
    """Return the other processes that have a named pipe open."""
    found = set()
    for pid in set(psutil.pids()) - {os.getpid()}:
        with suppress(OSError):  # it has ended
            if str(pipe) in map(os.readlink, Path(f"/proc/{pid}/fd").iterdir()):
                found.add(pid)
    return found


def wait_for(condition: Callable[[], bool], driver: BaseProcess | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert driver is None or driver.is_alive()
        time.sleep(0.1)


def written_parts(output: Path) -> dict[str, int]:
    """Return when each part was written."""
    return {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}


def open_to_reader(pipe: Path, opened: list[int]) -> bool:
    """Open a named pipe for writing if a process waits to read from it; return whether one does."""
    with suppress(OSError):
        opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    return bool(opened)


def start_run(command: str, output: Path, slow: Path, result: Path) -> tuple[BaseProcess, int, int]:
    """Start the command, and return when it has predicted what it can while a worker waits for the slow file.

    Returns:
        The process, the open slow file, and the process that reads it.
    """

    def run() -> None:
        finished = invoke(command)
        result.write_text(f"{finished.stdout}{finished.exit_code} {finished.stderr.splitlines()[-1]}")

    driver, opened = multiprocessing.get_context("fork").Process(target=run), list[int]()  # saves the imports
    driver.start()
    wait_for(lambda: len(written_parts(output)) >= PARTITIONS - MAX_IN_FLIGHT, driver)
    wait_for(lambda: open_to_reader(slow, opened), driver)
    wait_for(lambda: bool(readers(slow)), driver)
    (reader,) = readers(slow)
    return driver, opened[0], reader


def test_a_stopped_run_goes_on_and_predicts_what_cxr_predict_does(
    demo_project, cluster, bucket, tmp_path, monkeypatch, capfd
):
    project = copy_project(demo_project, tmp_path / "project")
    use_project(project, monkeypatch)
    monkeypatch.setattr(partitions, "IMAGES_PER_PARTITION", 2)
    folder = write_files(project / "radiographs", radiographs(9, seed=1) | {"notes.txt": b"no image"})
    (folder / "broken.jpg").write_bytes((folder / "0.jpg").read_bytes()[:300])
    archive = write_zip(folder / "a.zip", radiographs(5, seed=2))
    (folder / "damaged.zip").write_bytes(archive.read_bytes()[:2000])
    write_tar(folder / "b.tar", radiographs(5, seed=3))
    slow, output = tmp_path / "slow.jpg", project / "predicted"
    os.mkfifo(slow)  # a worker that reads it waits until it is written and closed
    names = f"{slow} {folder} s3://{bucket}/folder"
    command = DOCUMENTED.replace("radiographs", names)
    result = tmp_path / "result"

    first, pipe, _ = start_run(command, output, slow, result)
    first.kill()
    first.join()
    wait_for(lambda: not readers(slow))  # workers end with the driver
    os.close(pipe)
    written = written_parts(output)
    assert len(written) < PARTITIONS

    second, pipe, worker = start_run(command, output, slow, result)
    os.kill(worker, signal.SIGKILL)
    content = encode_jpeg(np.random.default_rng(5))
    wait_for(lambda: bool(readers(slow) - {worker}), second)
    os.write(pipe, content)
    os.close(pipe)
    second.join(120)
    assert capfd.readouterr().err == ""  # also of Ray's C++ code
    *_, counts, error = result.read_text().splitlines()
    files, positive = re.fullmatch(
        r"predicted: (\d+) files, (\d+) positive, 2 unusable, 1 skipped that are no images; \d+\.\d images/s", counts
    ).groups()
    assert error == "2 Error: 2 of 26 files are not usable radiographs; the table has the reasons"
    assert len(written_parts(output)) == PARTITIONS
    assert written_parts(output).items() >= written.items()  # nothing was written twice

    slow.unlink()
    slow.write_bytes(content)
    later = folder / "later.jpg"
    later.write_bytes(content)
    finished = invoke(command.replace("--ray auto", "--ray 127.0.0.1:1"))  # where no cluster is
    assert f"{counts.partition(';')[0]}; nothing is missing" in finished.stdout
    assert re.search(r"\npredicted: the images as listed on 20.+; later ones are not included\n", finished.stderr)
    later.unlink()
    unreachable = command.replace("--ray auto", "--ray 127.0.0.1:1").replace("predicted", "other")
    assert error_line_of(unreachable).startswith("Error: no Ray cluster at 127.0.0.1:1: ")
    assert not Path("other").exists()
    assert invoke(f"cxr predict {names} --csv expected.csv").exit_code == 2
    expected = pd.read_csv("expected.csv", dtype={"version": str}).fillna({"reason": ""})
    predicted = pd.read_parquet(output).astype({"label": float})
    assert list(predicted) == list(expected)
    predicted, expected = (table.sort_values("file", ignore_index=True) for table in (predicted, expected))
    assert (len(predicted), predicted["label"].sum()) == (int(files), int(positive))
    # The last bits depend on the size of a batch, and so of the small partitions here.
    pd.testing.assert_frame_equal(predicted, expected, check_dtype=False, rtol=0, atol=5e-6)
    assert predicted["reason"].ne("").sum() == 2

    is_of_another = f"Error: {output}: holds predictions with"
    assert error_line_of(f"{command} --model seed-0").startswith(f"{is_of_another} model covid-xray-demo, not models/;")
    assert error_line_of(DOCUMENTED).startswith(f"{is_of_another} input {slow}, {folder}, s3://")
    assert len(list(output.iterdir())) == PARTITIONS + 1
    assert error_line_of(DOCUMENTED.replace("predicted", f"{slow}/out")).startswith(f"Error: {slow}/out: ")


def test_the_benchmark_compares_the_cluster_with_cxr_predict(demo_project, cluster, run_here, forked_stages):
    (line,) = run_here("python bench/ray_predict.py", str(demo_project), "8", "champion", "1", "auto")
    assert (line["images"], line["model"]) == (8, "champion")
    assert all(value > 0 for name, value in line.items() if name.endswith(("ray", "predict", "ratio")))


def test_partitions_in_a_bucket_are_written_once_and_counted(bucket, tmp_path):
    files = ImageFiles([str(write_files(tmp_path / "folder", radiographs(3, seed=1)))])
    folder = PartitionFolder(f"s3://{bucket}/out/")
    folder.start(SETTINGS, files)
    (partition,) = folder.missing()
    assert list(map(vars, folder.read_partition(partition))) == list(map(vars, files))
    rows = {"file": ["a.jpg", "b.jpg"], "reason": ["", "no image"], "label": [1, None]}
    table = pd.DataFrame(rows, columns=list(REQUIRED)).astype(REQUIRED)
    assert not folder.has_predictions(partition)
    folder.write_predictions(partition, table, skipped=3)
    again = PartitionFolder(f"s3://{bucket}/out")
    again.start(SETTINGS, files)
    assert again.has_predictions(partition)
    assert list(again.missing()) == []
    assert again.count() == Counter(files=2, positive=1, unusable=1, skipped=3)
    assert pd.read_parquet(f"s3://{bucket}/out")["file"].tolist() == ["a.jpg", "b.jpg"]
    message = error_message(again.start, SETTINGS | {"version": "2"}, files)
    assert (
        message == f"s3://{bucket}/out: holds predictions with version 1, not 2; give the same again, or a new folder"
    )
    assert "no such bucket" in error_message(PartitionFolder("s3://absent/out").start, SETTINGS, files)


def test_a_partition_is_a_tar_or_some_files_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "IMAGES_PER_PARTITION", 2)
    write_files(tmp_path, radiographs(3, seed=1))
    write_tar(tmp_path / "0.tar", radiographs(4, seed=2))
    files = ImageFiles([str(tmp_path)])
    split = [[file.name for file in partition] for partition in split_into_partitions(files)]
    assert split == [[f"{tmp_path}/0.tar"], [f"{tmp_path}/0.jpg", f"{tmp_path}/1.jpg"], [f"{tmp_path}/2.jpg"]]
    expected = sorted(map(vars, files), key=str)
    folder = PartitionFolder(f"{tmp_path}/out")
    folder.start(SETTINGS, files)
    read = [vars(file) for partition in folder.missing() for file in folder.read_partition(partition)]
    assert sorted(read, key=str) == expected


@pytest.mark.parametrize("output", ["out", "s3://radiographs/shared"])
def test_of_two_drivers_the_list_of_the_first_is_kept(output, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(write_files(Path(name), radiographs(count, seed=1))) for name, count in {"a": 1, "b": 2}.items()]
    folder = PartitionFolder(output)

    class OvertakenFiles(ImageFiles):
        def unexpanded(self):
            PartitionFolder(output).start(SETTINGS, ImageFiles(names[1:]))
            return super().unexpanded()

    folder.start(SETTINGS, OvertakenFiles(names))
    (partition,) = folder.missing()
    assert [file.name for file in folder.read_partition(partition)] == ["b/0.jpg", "b/1.jpg"]
    assert folder._names() == {"_partitions.jsonl"}


def test_only_what_can_be_read_gets_rows(tmp_path, monkeypatch):
    from stages.ray_predict import PartitionPredictor, _hash_code

    monkeypatch.setattr(partitions, "IMAGES_PER_PARTITION", 2)
    monkeypatch.chdir(tmp_path)
    write_files(Path("in"), radiographs(3, seed=1))
    write_zip(Path("in/a.zip"), radiographs(2, seed=2))
    write_tar(Path("in/b.tar"), radiographs(2, seed=3))
    folder = PartitionFolder("out")
    folder.start(SETTINGS, ImageFiles(["in"]))

    def predict(code_hash: str = _hash_code()) -> list[str]:
        """Predict what is missing; return the failures."""
        predictor = PartitionPredictor(folder.name, None, "x", "1", "float32", 1, code_hash)
        vars(predictor)["_candidate"] = make_candidate(1)
        batches = ({name: [value] for name, value in vars(one).items()} for one in list(folder.missing()))
        return list(filter(None, (predictor(batch)["failure"][0] for batch in batches)))

    failures = predict("other code")
    assert len(failures) == 4
    assert failures[0].endswith(" has another version of this project; install the same everywhere")
    moved = {name: Path("in", name).rename(name) for name in ("0.jpg", "b.tar")}
    write_zip(Path("in/a.zip"), {"other.jpg": b""})
    assert [failure.split("] ")[1] for failure in predict()] == [
        f"No such file or directory: 'in/{name}'" for name in moved
    ]
    for name, path in moved.items():
        path.rename(Path("in", name))
    assert predict() == []
    assert folder.count() == Counter(files=7, positive=folder.count()["positive"], unusable=2)
    table = pd.read_parquet("out")
    assert table.loc[table["reason"] != "", ["file", "reason"]].to_numpy().tolist() == [
        [f"in/a.zip/{index}.jpg", "no longer in the zip"] for index in range(2)
    ]


def test_an_error_of_ray_is_one_line(demo_project, tmp_path, monkeypatch):
    from ray.exceptions import RayActorError

    from stages import ray_backend, ray_predict

    def fail(*_: object) -> None:
        raise RayActorError(error_msg="The actor died.\nclass: x")

    use_project(copy_project(demo_project, tmp_path / "project"), monkeypatch)
    write_files(Path("radiographs"), radiographs(1, seed=1))
    monkeypatch.setattr(ray_predict, "connect", lambda _: None)
    monkeypatch.setattr("ray.put", lambda files: files)
    monkeypatch.setattr(ray_predict, "_predict_partitions", fail)
    assert error_line_of(DOCUMENTED) == (
        "Error: Ray failed: The actor died.; the same command again predicts what is missing"
    )
    assert error_message(ray_backend.open_cluster, "local", None).startswith("--ray local: only cxr predict takes it; ")


@pytest.mark.parametrize(
    ("nodes", "expected"),  # cores and GPUs of nodes; workers, and cores and GPUs of each
    [
        ([(1, 0), (1, 0)], (2, 1, 0)),
        ([(2, 0), (2, 0)], (2, 2, 0)),
        ([(64, 0), (8, 0)], (18, 4, 0)),
        ([(6, 0)], (2, 3, 0)),
        ([(0, 0), (5, 0)], (5, 1, 0)),
        ([(32, 4), (16, 4), (64, 0)], (8, 4, 1)),
    ],
)
def test_workers_use_all_gpus_or_all_cores(nodes, expected, monkeypatch):
    from stages import ray_predict

    found = [{"Alive": True, "Resources": {"CPU": float(cores), "GPU": float(gpus)}} for cores, gpus in nodes]
    lost = {"Alive": False, "Resources": {"CPU": 16.0}}
    monkeypatch.setattr("ray.nodes", lambda: [*found, lost])
    assert ray_predict._plan_workers() == expected
    monkeypatch.setattr("ray.nodes", lambda: [lost])
    assert error_message(ray_predict._plan_workers).startswith("the Ray cluster has no cores; ")


def test_what_prevents_a_run_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    write_files(Path("in"), radiographs(1, seed=1))
    write_files(Path("other"), {"notes.txt": b""})
    before = sorted(Path().rglob("*"))
    has_secret = "the URL has a password or query, "
    for arguments, message in {
        "127.0.0.1:1 http://me:SECRET@127.0.0.1/a.tar out": f"http://127.0.0.1/a.tar: {has_secret}",
        "127.0.0.1:1 http://127.0.0.1/a.tar?sig=SECRET out": f"http://127.0.0.1/a.tar: {has_secret}",
        "127.0.0.1:1 in s3://key:SECRET@bucket/out": f"s3://bucket/out: {has_secret}",
        f"127.0.0.1:1 in file://{tmp_path}/in/out": f"{tmp_path}/in/out: is in the input {tmp_path}/in; ",
        "127.0.0.1:1 in in/out": f"{tmp_path}/in/out: is in the input {tmp_path}/in; give an output outside of it",
        "127.0.0.1:1 absent out": f"{tmp_path}/absent: no files found; ",
    }.items():
        assert error_line_of(f"cxr predict --ray {arguments}").startswith(f"Error: {message}")
    for output, message in {"other": "not empty, and no output of", "in/0.jpg": "a file; give a folder"}.items():
        assert message in error_message(PartitionFolder(output).start, SETTINGS, ImageFiles(["in"]))
    monkeypatch.delattr("stages.ray_predict")
    monkeypatch.delitem(sys.modules, "stages.ray_predict")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert error_line_of("cxr predict --ray 127.0.0.1:1 in out").startswith(
        "Error: Ray is not installed; run: pip install"
    )
    assert sorted(Path().rglob("*")) == before
