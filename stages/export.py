"""Export a registered model or a model from models/ for other programs."""

from pathlib import Path

import click

from stages.common import stage


@stage
@click.argument("model")
@click.option(
    "--onnx", type=click.Path(path_type=Path, dir_okay=False), help="Write one ONNX file, with preprocessing."
)
@click.option(
    "--huggingface",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write a folder for the Hugging Face Hub: safetensors, configuration and model card.",
)
def export(model: str, onnx: Path | None, huggingface: Path | None) -> None:
    """Export MODEL, an alias or number of a registered version, or seed-K or bag from models/, for other programs."""
    import torch

    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.inference import candidate, export_huggingface, export_onnx
    from pipeline.tracking.model_folder import open_model_folder

    if onnx is None and huggingface is None:
        raise UserError("nothing to export to; give --onnx FILE or --huggingface FOLDER")
    file = onnx and export_onnx.check_target(onnx)
    folder = huggingface and export_huggingface.check_target(huggingface)
    if file == folder:
        raise UserError(f"{onnx}: given for both exports; give two names")
    with open_model_folder(load_config(), model) as found:
        loaded = candidate.load_candidate(found.folder, torch.device("cpu"))
    origin = {"model": found.model, "version": found.version, "content_hash": found.content_hash}
    if file:
        click.echo("exporting takes several seconds per network", err=True)
        export_onnx.write_onnx(loaded, file, origin)
        click.echo(f"{onnx}: {found.title}")
    if folder:
        export_huggingface.write_huggingface(loaded, folder, origin, found.title, found.card)
        click.echo(f"{huggingface}: {found.title}; see README.md there")


if __name__ == "__main__":
    export()
