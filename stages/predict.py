"""Classify radiographs with a registered model or a model from models/."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from stages.common import print_table, stage

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.inference.apply_networks import Precision

TABLE_START = b"file,"


@stage
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option(
    "--model",
    default="champion",
    show_default=True,
    help="Alias or number of a registered version, or seed-K or bag from models/.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="bfloat16 is faster on processors that have it, and may change a label near the threshold.",
)
@click.option("--csv", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write the table to this file.")
def predict(files: tuple[str, ...], model: str, precision: "Precision", output: Path | None) -> None:
    """Classify radiographs: images, folders or patterns such as 'x/*.png'. For research, not for diagnosis.

    With --csv, rows are written as they come: a run that is stopped leaves those so far.
    """
    import pandas as pd

    from pipeline.core import memory
    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.evaluation import ensemble
    from pipeline.inference import candidate
    from pipeline.inference import files as inference_files
    from pipeline.inference.apply_networks import check_precision
    from pipeline.tracking.model_folder import open_model_folder
    from pipeline.training import determinism

    memory.retain_freed_memory()
    determinism.make_deterministic(cpu_threads=1)  # as evaluate does
    device = determinism.select_device()
    check_precision(precision, device)
    paths = inference_files.ImageFiles(files, excluded=output)
    count = positive = unusable = 0
    tables = []
    with _open_csv(output) as csv:
        with open_model_folder(load_config(), model) as found:
            loaded = candidate.load_candidate(found.folder, device, precision)
        click.echo(ensemble.describe_output(loaded.config, loaded.finding), err=True)
        for table in inference_files.predict_files(loaded, paths):
            if csv and output:
                if not count and _is_regular(output):
                    csv.truncate(0)
                rows = table.to_csv(index=False, header=not count, float_format="%.9g", lineterminator="\n")
                _write_rows(csv, rows.encode(), can_truncate=_is_regular(output))
            else:
                tables.append(table)
            count += len(table)
            positive += int(table["label"].sum())
            unusable += int(table["reason"].ne("").sum())
    if output:
        click.echo(f"{output}: {count} files, {positive} positive")
    else:
        _print(pd.concat(tables))
    if unusable:
        raise UserError(f"{unusable} of {count} files are not usable radiographs; the table has the reasons")


@contextmanager
def _open_csv(path: Path | None) -> Iterator[BinaryIO | None]:
    """Open a table for appending, which shows whether it can be written and leaves what is in it as it was.

    Raises:
        UserError: the file is there and is no table, such as the first image of a pattern that was taken for it.
    """
    from pipeline.core.errors import UserError

    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if _is_regular(path):
        with path.open("rb") as stream:
            if stream.read(len(TABLE_START)) not in (TABLE_START, b""):
                raise UserError(f"{path}: no table of cxr predict; delete it, or give --csv another name")
    with path.open("ab", buffering=0) as stream:
        try:
            yield stream
        finally:
            if is_new and not path.stat().st_size:
                path.unlink()


def _is_regular(path: Path) -> bool:
    return path.is_file() and Path("/dev") not in path.parents  # no pipe, no /dev/stdout


def _write_rows(stream: BinaryIO, rows: bytes, *, can_truncate: bool) -> None:
    """Write rows; if the disk becomes full, none of them is left half-written."""
    left = memoryview(rows)
    while left:
        try:
            left = left[stream.write(left) :]
        except OSError:
            if can_truncate:
                stream.truncate(stream.tell() - (len(rows) - len(left)))
            raise


def _print(predictions: "pd.DataFrame") -> None:
    from rich.table import Column, Table

    table = Table(*(Column(header, overflow="fold") for header in predictions.columns))
    for row in predictions.to_dict("records"):
        metrics = ("–", "–") if row["reason"] else (f"{row['probability']:.4f}", str(row["label"]))
        table.add_row(row["file"], *metrics, row["reason"])
    print_table(table)


if __name__ == "__main__":
    predict()
