"""Compare the images that came in with those of the model that predicted them."""

import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.common import NumberRange, stage, user_message

if TYPE_CHECKING:
    from pipeline.core.config import Config

DATES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]


@stage
@click.argument("log", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--out",
    default="monitor.html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Page to write.",
)
@click.option(
    "--model", help="Alias or number of a registered version, or seed-K or bag; by default that of the last prediction."
)
@click.option("--since", type=click.DateTime(DATES), help="Leave out earlier predictions (UTC).")
@click.option(
    "--prevalence",
    type=NumberRange(0, 1),
    help="Share of positives that is expected; by default that of the validation images.",
)
def monitor(log: Path, out: Path, model: str | None, since: datetime | None, prevalence: float | None) -> None:
    """Compare the images in LOG, which --log of predict or serve wrote, with those of their model, and write a page.

    The exit code is 0 if no difference was found, 1 if one was, and 2 for an error. An image counts once.
    """
    try:
        is_different = _write_comparison(log, out, model, since, prevalence)
    except Exception as error:
        if user_message(error):
            raise
        traceback.print_exc()
        sys.exit(2)  # Python's 1 would mean a difference
    if is_different:
        sys.exit(1)


def _write_comparison(
    log: Path, out: Path, model: str | None, since: datetime | None, prevalence: float | None
) -> bool:
    """Write the page, print what was found, and return whether anything differs."""
    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.core.files import atomic_path
    from pipeline.evaluation import monitoring
    from pipeline.inference.prediction_log import read_log
    from pipeline.inference.reference import find_candidate, load_reference
    from pipeline.report.monitor_page import render_page

    _check_page(out)
    with atomic_path(out) as temporary:
        temporary.touch()  # before the work, which takes longer
        config = load_config()
        content_hash = _content_hash(config, model) if model else None
        images, lines = read_log(log, content_hash, since and since.replace(tzinfo=UTC))
        left_out = {label: str(count) for label, count in lines.items() if count}
        if len(images) < monitoring.MIN_IMAGES:
            options = f"{f' of model {content_hash[:12]}' if content_hash else ''}{f' since {since}' if since else ''}"
            raise UserError(
                f"{log}: too few to tell: {len(images)} images{options}, of at least {monitoring.MIN_IMAGES}"
                + "".join(f"; {label}: {count}" for label, count in left_out.items())
            )
        content_hash = images["content_hash"].iloc[-1]
        name = find_candidate(config, content_hash)
        comparison = monitoring.compare(load_reference(config, name), images, prevalence)
        if comparison.tests["p"].isna().all():
            reasons = "; ".join(comparison.tests["reason"].unique())
            raise UserError(f"{log}: nothing can be compared: {reasons}")
        version = images["version"].iloc[-1]
        counts = {
            "model": f"{config.model_name}, version {version} (candidate {name}, {content_hash[:12]})",
            "time (UTC)": f"{images['time'].min():%Y-%m-%d %H:%M} to {images['time'].max():%Y-%m-%d %H:%M}",
            "images": str(len(images)),
            **left_out,
        }
        temporary.write_text(
            render_page(comparison, f"{config.model_name} version {version}", counts), encoding="utf-8"
        )
    click.echo("\n".join(f"{label}: {value}" for label, value in counts.items()), err=True)
    click.echo("\n".join(monitoring.describe(comparison)))
    click.echo(f"{out} written")
    return comparison.has_covariate_shift or comparison.has_label_shift


def _check_page(out: Path) -> None:
    """Refuse to replace what is no page, such as the log, before the work, which takes longer."""
    from pipeline.core.errors import UserError
    from pipeline.inference.prediction_table import is_stream

    if is_stream(out):
        raise UserError(f"{out}: a page needs a file; give --out its name")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no folder; create it, or give --out another name")
    if out.exists():
        with out.open("rb") as file:
            if file.read(15) not in (b"", b"<!doctype html>"):
                raise UserError(f"{out}: exists and is no page of this command; give --out another name")


def _content_hash(config: "Config", model: str) -> str:
    """Return the content hash of a registered version or of a candidate in `models/`."""
    from pipeline.inference.reference import hash_of_candidate
    from pipeline.tracking.model_folder import is_in_models

    if is_in_models(config, model):
        return hash_of_candidate(config, model)
    from pipeline.tracking import registry
    from pipeline.tracking.store import connect

    version = registry.get_version(connect(config.model_name), config.model_name, model)
    return version.tags.get(registry.CONTENT_HASH_TAG, "")  # one that other code registered has none


if __name__ == "__main__":
    monitor()
