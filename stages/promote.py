"""Make MLflow show what DVC holds, and promote the best candidate."""

from pathlib import Path

import click

from stages.common import stage


@stage
@click.option("--model", metavar="VERSION", help="Make this version champion, whatever the gate says.")
@click.option("--because", metavar="REASON", help="Why; kept with the version and in `cxr history`.")
def promote(model: str | None, because: str | None) -> None:
    """Complete the MLflow runs and the registry, and make the best candidate champion if it is better.

    Writes metrics/promotion.json. With --model nothing is compared: the version becomes champion.
    """
    from pipeline.config import load
    from pipeline.errors import UserError
    from pipeline.files import read_json, write_json
    from pipeline.tracking import registry
    from pipeline.tracking.store import connect
    from pipeline.tracking.sync import said, sync

    if (model is None) != (because is None):
        raise click.UsageError('give both: --model VERSION --because "REASON"')
    config = load()
    if model and because:
        store = connect(config.model_name)
        chosen = registry.find(store, config.model_name, model)
        champion = registry.champion(store, config.model_name)
        if champion and champion.version == chosen.version:
            raise UserError(f"{config.model_name}: version {chosen.version} is champion already; see: cxr history")
        registry.crown(store, config.model_name, chosen, f"by hand: {because}")
        click.echo(f"{config.model_name}: version {chosen.version} is champion, by hand: {because}")
        return
    decision = sync(config)
    path = Path("metrics/promotion.json")
    decisions = read_json(path)["decisions"] if path.exists() else []
    if not decisions or (decision["new"] and decision != decisions[-1]):
        write_json(path, {**decision, "decisions": [*decisions, decision]})
    click.echo(said(config.model_name, decision))


if __name__ == "__main__":
    promote()
