"""Compare two recipes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.common import print_table, stage

if TYPE_CHECKING:
    import pandas as pd
    from dvc.repo import Repo

    from pipeline.evaluation.compare_recipes import Comparison, Recipe

UPSTREAM = ("download", "weights", "prepare", "split", "train", "evaluate")  # stages that the predictions come from


@stage
@click.argument("a")
@click.argument("b")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Write the result to this file; - is standard output.",
)
@click.option(
    "--png",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a forest plot of the differences to this file.",
)
def compare(a: str, b: str, json_file: Path | None, png: Path | None) -> None:
    """Compare two recipes, paired by seed and patient, on the same images. Differences are B minus A.

    The images are the validation set and, where both held out the same source (split.held_out_source), this source.

    A and B are Git revisions, names of DVC experiments, or folders of this project, such as . for the workspace.
    Nothing is checked out.
    """
    from pipeline.core.files import write_json
    from pipeline.evaluation.compare_recipes import compare_recipes
    from pipeline.report import comparison_chart

    recipe_a, recipe_b = load_experiment(a), load_experiment(b)
    comparison = compare_recipes(recipe_a, recipe_b)
    if png:
        comparison_chart.write_comparison(png, comparison.metrics, a, b)
    content = _json_content(recipe_a, recipe_b, comparison)
    if json_file == Path("-"):
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    if json_file:
        write_json(json_file, content)
    _print_comparison(content)


def load_experiment(name: str) -> "Recipe":
    """Read a recipe from a folder, or from DVC's cache if the name is not that of a folder with a params.yaml.

    Raises:
        UserError: there is no such recipe, its outs are missing, or they were not made with its params.yaml.
    """
    import tempfile

    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import RevError, SCMError

    from pipeline.core.errors import UserError, first_line
    from pipeline.evaluation.compare_recipes import FILES, load_recipe

    is_folder = (Path(name) / "params.yaml").is_file()
    folder, revision = (name, None) if is_folder else (".", name)
    try:
        with tempfile.TemporaryDirectory() as scratch, Repo.open(folder, rev=revision) as repo:
            _check_outs(repo, name, is_folder)
            files = DVCFileSystem(repo=repo)
            for path in FILES:
                try:
                    files.get_file(path, f"{scratch}/{path}")
                except FileNotFoundError:
                    where = "there" if is_folder else f"after git checkout {name}"
                    raise UserError(
                        f"{name}: {path} is neither there nor in DVC's cache; run {where}: dvc pull, or dvc repro"
                    ) from None
            try:
                return load_recipe(Path(scratch), name, repo.get_rev() if revision else None)
            except UserError as error:
                raise UserError(str(error).replace(scratch, name)) from None
    except RevError:
        raise UserError(
            f"{name}: no Git revision, DVC experiment, or folder with a params.yaml has this name; see git log, "
            "dvc exp list"
        ) from None
    except (NotDvcRepoError, SCMError):
        raise UserError(
            f"{name}: not in a project with Git and DVC; run in a clone of this project, or first: git init"
        ) from None
    except DvcException as error:
        raise UserError(f"{name}: {first_line(error)}; correct it there, then run: dvc repro") from None


def _check_outs(repo: "Repo", name: str, is_folder: bool) -> None:
    """Raise a UserError unless the stages have run with this params.yaml and the outs there are theirs."""
    from dvc.dependency.param import ParamsDependency

    from pipeline.core.errors import UserError
    from pipeline.core.files import md5_of_file
    from pipeline.evaluation.compare_recipes import FILES

    found, where = set(), "there" if is_folder else f"after git checkout {name}"
    for dvc_stage in repo.index.stages:
        if getattr(dvc_stage, "name", "").partition("@")[0] not in UPSTREAM:
            continue
        for dependency in dvc_stage.deps:
            if isinstance(dependency, ParamsDependency) and (changes := dependency.status()):
                changed = next(iter(changes.values()))  # the keys, or a text if the stage has never run
                keys = f" ({', '.join(sorted(changed))})" if isinstance(changed, dict) else ""
                raise UserError(
                    f"{name}: {dvc_stage.name} has not run with this params.yaml{keys}; run {where}: dvc repro"
                )
        for out in dvc_stage.outs:
            path = Path(out.fs_path)
            if str(out.def_path) in FILES:
                found.add(str(out.def_path))
                if is_folder and path.is_file() and md5_of_file(path) != out.hash_info.value:
                    raise UserError(f"{path}: not as in dvc.lock; run there: dvc checkout, or dvc repro")
    if missing := set(FILES[1:]) - found:
        raise UserError(f"{name}: not a project like this one, since no stage in its dvc.yaml makes {min(missing)}")


def _json_content(a: "Recipe", b: "Recipe", comparison: "Comparison") -> dict[str, Any]:
    from pipeline.evaluation.slices import count_patients

    sides = {
        side: {"name": recipe.name, "commit": recipe.commit, "seeds_left_out": comparison.left_out[side]}
        for side, recipe in (("a", a), ("b", b))
    }
    return {
        **sides, "held_out_source": a.config.active.split.held_out_source,
        "images": {name: count_patients(image_set) for name, image_set in comparison.image_sets.items()},
        "seeds": comparison.seeds, "caveats": comparison.caveats,
        "parameters": _records(comparison.parameters), "metrics": _records(comparison.metrics),
    }  # fmt: skip


def _records(table: "pd.DataFrame") -> list[dict[str, Any]]:
    """Return the rows with None for what is missing."""
    rows = table.astype(object).where(table.notna(), None)
    return [dict(zip(rows.columns, row, strict=True)) for row in rows.itertuples(index=False)]


def _print_comparison(content: dict[str, Any]) -> None:
    from rich.table import Column, Table

    from pipeline.evaluation.compare_recipes import LABELS

    a, b, seeds = content["a"]["name"], content["b"]["name"], len(content["seeds"])
    titles = {"validation": "Validation set", "external": f"Held-out source {content['held_out_source']}"}
    headers = ("", "metric", a, b, "difference", "95 % interval", f"seeds better with {b}")
    for images, counts in content["images"].items():
        title = (
            f"{titles[images]}, {b} minus {a}: {counts['images']} images of {counts['patients']} patients "
            f"({counts['positives']} of {counts['positive_patients']} positive), {seeds} seeds"
        )
        table = Table(*(Column(header, overflow="fold") for header in headers), title=title, title_justify="left")
        for row in content["metrics"]:
            if row["images"] == images:
                table.add_row(row["model"], LABELS[row["metric"]], *_format_row(row, seeds))
        print_table(table)
    parameters = Table("parameter", a, b, title="Parameters that differ", title_justify="left")
    for row in content["parameters"]:
        parameters.add_row(row["parameter"], *("–" if row[side] is None else str(row[side]) for side in ("a", "b")))
    if content["parameters"]:
        print_table(parameters)
    else:
        click.echo("No parameter differs.")
    for side in (content["a"], content["b"]):
        if names := side["seeds_left_out"]:
            click.echo(f"Only {side['name']} has {', '.join(names)}, left out here and in the bag.")
    for caveat in content["caveats"]:
        click.echo(f"Caveat: {caveat}.")


def _format_row(row: dict[str, Any], seeds: int) -> list[str]:
    values = [_format(row[side]) for side in ("a", "b")]
    interval = row["reason"] or f"{row['low']:+.3f} to {row['high']:+.3f}"
    better = "" if row["seeds_better"] is None else f"{row['seeds_better']} of {seeds}"
    return [*values, _format(row["difference"], "+.3f"), interval, better]


def _format(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    compare()
