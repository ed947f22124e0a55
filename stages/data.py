"""Look at data before the pipeline runs on them."""

from pathlib import Path

import click

from stages.common import CONTEXT_SETTINGS, stage


@click.group(context_settings=CONTEXT_SETTINGS)
def data() -> None:
    """Look at data before the pipeline runs on them."""


@stage
@click.argument("path", required=False)
@click.option(
    "--images",
    "limit",
    default=1000,
    type=click.IntRange(min=0),
    help="Images to decode, evenly spaced; 0 for all.",
)
@click.option(
    "--sheet",
    default="contact_sheet.jpg",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for the contact sheet of the most unusual images.",
)
def check(path: str | None, limit: int, sheet: Path) -> None:
    """Show what the pipeline would make of PATH, a folder or an archive; by default of the profile's download.path.

    It shows what is understood, what is not, and a contact sheet of the most unusual images. The contact sheet is all
    that it writes. For a PATH that no profile of params.yaml names, it guesses what the profile needs, which for a
    public data set with a page in docs/data is the section of the page.
    """
    import numpy as np

    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.data import data_check, outliers, sources
    from pipeline.data.sources import detection

    config = load_config()
    name, remark = config.profile, ""
    if path is not None:
        paths = {key: str(getattr(profile.download, "path", None)) for key, profile in config.profiles.items()}
        names = [config.profile, *paths]  # the active one first
        name = next((key for key in names if paths[key].rstrip("/") == path.rstrip("/")), "")
    if path is None or name:
        params, prepare = config.profiles[name].download, config.profiles[name].prepare
        _print_rows({"profile": f"{name}: {sources.name_data(params)}"})
    else:
        section, remark = detection.guess_section(path)
        click.echo(f"What the profile in params.yaml needs:\n\n{detection.format_section(section)}", err=True)
        params = detection.parse_section(section)
        prepare = config.active.prepare.model_copy(update={"excluded_files": []})  # which are of other data
    with data_check.open_data(params, f"{path}: {remark}" if remark else "") as opened:
        for warning in opened.warnings:
            click.echo(f"Warning: {warning}", err=True)
        if opened.rows is not None:
            _print_rows(data_check.describe_rows(opened.rows, prepare))
        images = data_check.check_images(opened, prepare, limit)
    _print_rows(data_check.describe_images(images, len(opened.names)))
    if images.names:
        order = np.argsort(-outliers.rank_outliers(images.pixels), kind="stable")
        outliers.write_contact_sheet(sheet, images.pixels[order], [images.names[row] for row in order])
        click.echo(f"{sheet}: the most unusual images, the most unusual first; look at them")
    if opened.problem:
        raise UserError(opened.problem)


def _print_rows(described: dict[str, str]) -> None:
    for key, value in described.items():
        click.echo(f"{key:<18} {value}")


data.add_command(check)

if __name__ == "__main__":
    data()
