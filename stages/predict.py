"""Classify radiographs with a registered model or a model from models/."""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.common import require_ray, stage

if TYPE_CHECKING:
    import torch

    from pipeline.inference.apply_networks import Precision
    from pipeline.inference.candidate import Candidate

TABLE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)


@stage
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option(
    "--model",
    default="champion",
    help="Alias or number of a registered version, or seed-K or bag from models/.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="bfloat16 is faster on processors that have it, and may change a label near the threshold.",
)
@click.option(
    "--prevalence",
    type=float,
    help="Share of positives where the radiographs are from, between 0 and 1: the probabilities are converted to it.",
)
@click.option("--csv", type=TABLE, help="Write the table to this file; - is standard output.")
@click.option("--json", type=TABLE, help="Write the table as JSON Lines.")
@click.option("--parquet", type=TABLE, help="Write the table as Parquet.")
@click.option(
    "--heatmaps",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write every radiograph with the Grad-CAM heatmap of its label to this folder, as PNG.",
)
@click.option(
    "--referral",
    type=float,
    help="Mark this share of the radiographs, the least certain, for a person to look at first, and all files that are "
    "not usable. The table is written when all files are classified, and is in memory until then.",
)
@click.option(
    "--log",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Append to the log for cxr monitor: no names, no images.",
)
@click.option(
    "--ray", metavar="ADDRESS", help="Use a Ray cluster; the last of FILES is the folder for the predictions."
)
def predict(
    files: tuple[str, ...],
    model: str,
    precision: "Precision",
    prevalence: float | None,
    heatmaps: Path | None,
    referral: float | None,
    log: Path | None,
    ray: str | None,
    **formats: Path | None,
) -> None:
    """Classify radiographs. For research, not for diagnosis.

    FILES are images, folders, patterns such as 'x/*.png', zips and tars, or URLs of them, such as s3://bucket/folder.
    Rows of --csv and --json are written as they come: a run that is stopped leaves those so far.
    """
    if ray is not None:
        options = {"prevalence": prevalence, **formats, "heatmaps": heatmaps, "referral": referral, "log": log}
        _predict_on_cluster(ray, files, model, precision, options)
        return
    _check_options(prevalence, referral, {**formats, "log": log})

    import pandas as pd

    from pipeline.core.config import load_config
    from pipeline.core.files import make_folder
    from pipeline.core.progress import track_progress
    from pipeline.inference import candidate, image_files
    from pipeline.inference.files import predict_files
    from pipeline.inference.prediction_table import STDOUT, count_rows, is_stream, mark_referred, open_table
    from pipeline.tracking.model_folder import open_model_folder

    device = prepare_device(precision)
    outputs = {name: path for name, path in formats.items() if path} or {"text": STDOUT}
    prints_rows = any(map(is_stream, outputs.values()))
    images = image_files.ImageFiles(files, [path for path in (*outputs.values(), heatmaps, log) if path])
    counts, skipped = Counter[str](), Counter[str]()  # skipped by ending
    with ExitStack() as stack:
        writers = [stack.enter_context(open_table(path, name)) for name, path in outputs.items()]
        if heatmaps:
            stack.enter_context(make_folder(heatmaps))
        with open_model_folder(load_config(), model) as found:
            loaded = candidate.load_candidate(found.folder, device, precision)
        click.echo(f"{found.title}: {_describe(loaded, prevalence)}", err="text" not in outputs)
        prediction_log = None
        if log:
            from pipeline.inference.prediction_log import PredictionLog

            prediction_log = PredictionLog(log, loaded, found.content_hash, found.version)
        has_bar = sys.stderr.isatty() and not (prints_rows and sys.stdout.isatty())  # not between rows
        tables = predict_files(
            loaded, track_progress(images, "predicting", images.count()) if has_bar else images,
            model=found.model, version=found.version, prevalence=prevalence, heatmaps=heatmaps, log=prediction_log,
            skip=lambda file: skipped.update([Path(file.name).suffix]),
        )  # fmt: skip
        if referral is not None:
            tables = iter([mark_referred(pd.concat(tables, ignore_index=True), referral)])
        for table in tables:
            for write in writers:
                write(table)
            counts += count_rows(table)
    if skipped:
        endings = ", ".join(f"{number} × {ending or 'no ending'}" for ending, number in skipped.most_common(3))
        click.echo(f"{skipped.total()} skipped: no image ({endings})", err=True)
    written = ", ".join(str(path) for path in outputs.values() if path != STDOUT)
    files_word = "file" if counts["files"] == 1 else "files"
    click.echo(f"{written or 'all'}: {counts['files']} {files_word}, {counts['positive']} positive", err=prints_rows)
    check_usable(counts["unusable"], counts["files"])


def prepare_device(precision: "Precision") -> "torch.device":
    """Set this process up to predict as the stage evaluate does, and return the device.

    Raises:
        UserError: the device does not compute with this precision.
    """
    from pipeline.core import memory
    from pipeline.inference.apply_networks import check_precision
    from pipeline.training import determinism

    memory.retain_freed_memory()
    determinism.make_deterministic(cpu_threads=1)
    device = determinism.select_device()
    check_precision(precision, device)
    return device


def check_usable(unusable: int, count: int) -> None:
    """Raise UserError if any of the files is not usable, so that a script notices."""
    from pipeline.core.errors import UserError

    if unusable:
        raise UserError(f"{unusable} of {count} files are not usable radiographs; the table has the reasons")


def _predict_on_cluster(
    address: str, files: Sequence[str], model: str, precision: "Precision", options: Mapping[str, object]
) -> None:
    from pipeline.core.errors import UserError

    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"--ray: leave --{given[0]} out; the predictions become Parquet files in the last of FILES")
    if len(files) < 2:
        raise UserError("--ray: give what is to be classified, and last the folder for the predictions")
    with require_ray():
        from stages import ray_predict
    ray_predict.predict(address, files[:-1], files[-1], model, precision)


def _check_options(prevalence: float | None, referral: float | None, outputs: Mapping[str, Path | None]) -> None:
    from pipeline.core.errors import UserError
    from pipeline.core.files import resolve_target

    if prevalence is not None and not 0 < prevalence < 1:
        raise UserError(f"--prevalence {prevalence:g}: must be between 0 and 1, such as 0.05")
    if referral is not None and not 0 < referral <= 1:
        raise UserError(f"--referral {referral:g}: must be above 0 and at most 1, such as 0.2")
    targets = {name: Path(os.path.realpath(resolve_target(path))) for name, path in outputs.items() if path}
    for (first, one), (second, other) in combinations(targets.items(), 2):
        if one == other or (one.exists() and other.exists() and one.samefile(other)):
            raise UserError(f"--{first} and --{second}: the same file; give each its own")


def _describe(loaded: "Candidate", prevalence: float | None) -> str:
    """Say what the probability and the label mean.

    Raises:
        UserError: the probabilities are not calibrated, so they cannot be converted to the prevalence.
    """
    import numpy as np

    from pipeline.core.errors import UserError
    from pipeline.evaluation import ensemble
    from pipeline.inference.files import convert_to_prevalence

    config, description = loaded.config, ensemble.describe_output(loaded.config, loaded.finding)
    if prevalence is None:
        return description
    if config.prevalence is None:
        raise UserError("--prevalence: the probabilities of this model are not calibrated; leave the option out")
    (threshold,) = convert_to_prevalence(np.array([config.threshold_probability]), config, prevalence)
    return f"{description}, and converted to {prevalence:.1%} positives, where the label is 1 from {threshold:.3f}"


if __name__ == "__main__":
    predict()
