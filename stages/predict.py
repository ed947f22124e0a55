"""Judge radiographs with a model of the registry, or one of those that were just trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from stages.common import stage


@stage
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--model", default="champion", help="An alias or a version of the registry; or seed-K or bag, from models/."
)
@click.option("--csv", "table", type=click.Path(path_type=Path, dir_okay=False), help="Write the table here instead.")
def predict(files: tuple[str, ...], model: str, table: Path | None) -> None:
    """Judge FILES: images, folders and patterns. For research, not for diagnosis."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.core import memory
    from pipeline.core.errors import UserError
    from pipeline.core.files import write_csv
    from pipeline.inference import candidate
    from pipeline.inference import files as inference_files
    from pipeline.training import determinism

    memory.retain_freed_memory()
    paths = inference_files.expand_paths(files)
    with _folder(model) as folder:
        judged = inference_files.predict_files(candidate.load_candidate(folder, determinism.select_device()), paths)
    if table:
        write_csv(table, judged)
        click.echo(f"{table}: {len(judged)} files, {judged['label'].sum()} positive")
    else:
        shown = Table("file", "probability", "label", "")
        for row in judged.to_dict("records"):
            figures = ("–", "–") if row["reason"] else (f"{row['probability']:.4f}", str(row["label"]))
            shown.add_row(row["file"], *figures, row["reason"])
        Console(markup=False, emoji=False).print(shown)
    unusable = judged["reason"].ne("").sum()
    if unusable:
        raise UserError(f"{unusable} of {len(judged)} files are not usable radiographs, as the table says")


@contextmanager
def _folder(model: str) -> Iterator[Path]:
    """Bring the candidate of this name into a folder while the block runs."""
    import tempfile

    from pipeline.core.config import load_config
    from pipeline.evaluation import ensemble
    from pipeline.inference import candidate

    config = load_config()
    if model in (*config.model_names, ensemble.BAG):
        with tempfile.TemporaryDirectory() as scratch:
            candidate.assemble_candidate(Path(scratch), Path("models"), ensemble.load_candidate_configs(config)[model])
            yield Path(scratch)
    else:
        from pipeline.tracking import registry
        from pipeline.tracking.store import connect

        with registry.download_version(
            registry.get_version(connect(config.model_name), config.model_name, model)
        ) as folder:
            yield folder


if __name__ == "__main__":
    predict()
