"""Classify radiographs with a registered model or a model from models/."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from stages.common import print_table, stage


@stage
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option(
    "--model",
    default="champion",
    show_default=True,
    help="Alias or number of a registered version, or seed-K or bag from models/.",
)
@click.option("--csv", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write the table to this file.")
def predict(files: tuple[str, ...], model: str, output: Path | None) -> None:
    """Classify radiographs: images, folders or patterns such as 'x/*.png'. For research, not for diagnosis."""
    from rich.table import Column, Table

    from pipeline.core import memory
    from pipeline.core.errors import UserError
    from pipeline.core.files import write_csv
    from pipeline.evaluation import ensemble
    from pipeline.inference import candidate
    from pipeline.inference import files as inference_files
    from pipeline.training import determinism

    memory.retain_freed_memory()
    paths = inference_files.expand_paths(files)
    with _candidate_folder(model) as folder:
        loaded = candidate.load_candidate(folder, determinism.select_device())
        predictions = inference_files.predict_files(loaded, paths)
    click.echo(ensemble.describe_output(loaded.config), err=True)
    if output:
        write_csv(output, predictions)
        click.echo(f"{output}: {len(predictions)} files, {predictions['label'].sum()} positive")
    else:
        table = Table(*(Column(header, overflow="fold") for header in ("file", "probability", "label", "reason")))
        for row in predictions.to_dict("records"):
            metrics = ("–", "–") if row["reason"] else (f"{row['probability']:.4f}", str(row["label"]))
            table.add_row(row["file"], *metrics, row["reason"])
        print_table(table)
    unusable = predictions["reason"].ne("").sum()
    if unusable:
        raise UserError(f"{unusable} of {len(predictions)} files are not usable radiographs; the table has the reasons")


@contextmanager
def _candidate_folder(model: str) -> Iterator[Path]:
    """Yield a folder with the candidate; it is deleted afterwards."""
    import tempfile

    from pipeline.core.config import BAG, load_config
    from pipeline.evaluation import ensemble
    from pipeline.inference import candidate

    config = load_config()
    if model in (*config.model_names, BAG):
        with tempfile.TemporaryDirectory() as scratch:
            candidate.assemble_candidate(Path(scratch), Path("models"), ensemble.load_candidate_configs(config)[model])
            yield Path(scratch)
    else:
        from pipeline.tracking import registry
        from pipeline.tracking.store import connect

        version = registry.get_version(connect(config.model_name), config.model_name, model)
        with registry.download_version(version) as folder:
            yield folder


if __name__ == "__main__":
    predict()
