"""Verify the files of all registered versions."""

import click

from stages.common import stage


@stage
def verify() -> None:
    """Compare the files of every registered version with the checksums recorded at its registration."""
    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.tracking import registry
    from pipeline.tracking.store import connect

    name = load_config().model_name
    store = connect(name)
    versions = registry.list_versions(store, name)
    if not versions:
        click.echo(f"{name}: nothing is registered yet")
    failures = 0
    for version in versions:
        try:
            registry.load_version(version)
            click.echo(f"version {version.version}: OK (checksums match)")
        except UserError as error:
            failures += 1
            click.echo(f"version {version.version}: FAILED ({error})")
    if failures:
        raise UserError(
            f"{failures} of {len(versions)} versions of {name} failed verification; if the champion is one of them, "
            "run: cxr rollback"
        )


if __name__ == "__main__":
    verify()
