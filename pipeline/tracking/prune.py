"""Deletes from MLflow what belongs to DVC experiments that were removed."""

from collections.abc import Collection

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.tracking import registry
from pipeline.tracking.runs import runs_of_removed_experiments
from pipeline.tracking.store import Store
from pipeline.tracking.tracking_uri import shell_uri, tracking_uri


def removable_runs(
    store: Store, name: str, versions: Collection[ModelVersion], experiments: Collection[str]
) -> list[Run]:
    """Return this workspace's runs of DVC experiments that no longer exist.

    Runs that are training, that have been champion, that belong to the present candidates, or whose parent is the run
    of such a bag are never among them.

    Args:
        store: the store of the runs.
        name: the registered model.
        versions: the present candidates.
        experiments: names of the DVC experiments that exist.
    """
    champions = {record.version for record in registry.champion_history(store, name)}
    kept = {version.run_id for version in versions}
    kept |= {version.run_id for version in registry.list_versions(store, name) if str(version.version) in champions}
    parents = {store.client.get_run(str(run_id)).data.tags.get(MLFLOW_PARENT_RUN_ID) for run_id in kept}
    return [
        run
        for run in runs_of_removed_experiments(store, experiments)
        if run.info.run_id not in kept | parents and run.data.tags.get(MLFLOW_PARENT_RUN_ID) not in kept
    ]


def remove_runs(store: Store, name: str, runs: Collection[Run]) -> None:
    """Delete runs, their versions of the registered model `name`, and their logged models, which hold the weights."""
    run_ids = {str(run.info.run_id) for run in runs}
    for version in registry.list_versions(store, name):
        if version.run_id in run_ids:
            store.client.delete_model_version(name, str(version.version))
    for run_id in run_ids:
        for model in store.client.search_logged_models([store.experiment_id], f"source_run_id = '{run_id}'"):
            store.client.delete_logged_model(model.model_id)
        store.client.delete_run(run_id)


def gc_command() -> str:
    """Return the command that deletes the files of deleted runs and logged models, which MLflow keeps until then."""
    if tracking_uri().startswith("http"):
        database, hint = "DATABASE", " (DATABASE is the server's --backend-store-uri)"
    else:
        database, hint = shell_uri(), ""
    return f"mlflow gc --backend-store-uri {database} --tracking-uri {shell_uri()}{hint}"
