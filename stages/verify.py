"""Check what the registry points at."""

import click

from stages.common import stage


@stage
def verify() -> None:
    """Compare the files of every registered version with what was recorded when it was registered."""
    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.tracking import registry
    from pipeline.tracking.store import connect

    name = load_config().model_name
    store = connect(name)
    versions = registry.list_versions(store, name)
    damaged = []
    for version in versions:
        try:
            registry.load_version(version)
            click.echo(f"version {version.version}: as it was registered")
        except UserError as error:
            damaged.append(str(error))
            click.echo(f"version {version.version}: {error}")
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(versions)} versions of {name} cannot be trusted; if the champion is among them: "
            "cxr rollback"
        )


if __name__ == "__main__":
    verify()
