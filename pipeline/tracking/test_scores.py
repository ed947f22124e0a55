"""Logs the scores on the test set to the candidates' runs."""

import pandas as pd

from pipeline.core.config import Config
from pipeline.tracking import runs
from pipeline.tracking.fingerprint import candidate_fingerprints
from pipeline.tracking.store import connect


def log_test_scores(config: Config, scores: pd.DataFrame) -> list[str]:
    """Log every value and its interval as `test/METRIC`, `test/METRIC_low` and `test/METRIC_high`.

    A repeated call changes nothing.

    Args:
        config: names the experiment.
        scores: from `evaluation.test_scores.score_candidates`.

    Returns:
        The candidates that have no run.

    Raises:
        UserError: MLflow cannot be used, or a model is not up to date.
    """
    fingerprints, store, without_run = candidate_fingerprints(config), connect(config.model_name), []
    for candidate, rows in scores.groupby("model", sort=False):
        run = runs.find_run(store, fingerprints[str(candidate)])
        if run is None:
            without_run.append(str(candidate))
            continue
        metrics = {
            f"test/{row['metric']}{suffix}": row[column]
            for row in rows.to_dict("records")
            for suffix, column in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        changed = {key: value for key, value in metrics.items() if run.data.metrics.get(key) != value}
        runs.log_metrics(store.client, run.info.run_id, changed)
    return without_run
