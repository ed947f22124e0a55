"""Effect of a change of the recipe: all seeds of one project against those of another, paired by image and seed.

python bench/ablation.py WITH WITHOUT    # two clones with the same split, after `dvc repro evaluate`

Each metric is the mean over the seeds on the validation set at the threshold 0.5; its interval is that of a bootstrap
over patients. `calibrated_loss` is the loss after cross-fitted recalibration with temperature and bias. `better` is the
number of seeds for which WITH is better.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.core.files import read_csv
from pipeline.data.manifest import read_split
from pipeline.evaluation import intervals
from pipeline.evaluation.calibration import fit_platt
from pipeline.evaluation.metric_tables import Predictions, ValidationSet, cross_fit_recalibration
from pipeline.evaluation.metrics import LOWER_IS_BETTER, apply_threshold

RESAMPLES = 2000
METRICS = ["loss", "calibrated_loss", "auroc", "average_precision", "f1"]


def load_predictions(project: Path) -> pd.DataFrame:
    """Return label, group and P(positive) of every seed, by file."""
    table = read_csv(project / "predictions/validation.csv").set_index("file")
    return table.join(read_split(project / "data").set_index("file")["group"])


def bootstrap_seeds(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the metrics of every seed on every resample."""
    validation, samples = ValidationSet(table["label"].to_numpy(), table["group"].to_numpy(), RESAMPLES), []
    for name in table.columns.drop(["label", "group"]):
        probabilities = table[name].to_numpy()
        sample = validation.bootstrap_metrics(Predictions(apply_threshold(probabilities), probabilities))
        calibrated, _ = cross_fit_recalibration(validation, probabilities, fit_platt)
        loss = np.nan
        if calibrated is not None:
            loss = validation.bootstrap_metrics(Predictions(apply_threshold(calibrated), calibrated))["loss"]
        samples.append(sample.assign(calibrated_loss=loss))
    return samples


def main(with_change: str, without_change: str) -> None:
    ours, theirs = (load_predictions(Path(project)) for project in (with_change, without_change))
    if list(ours) != list(theirs) or not ours[["label", "group"]].equals(theirs[["label", "group"]]):
        raise SystemExit(f"{with_change} and {without_change} differ in their split or their seeds")
    samples = [bootstrap_seeds(table) for table in (ours, theirs)]
    means = (sum(seeds) / len(seeds) for seeds in samples)
    table = intervals.compare_metrics(*means, METRICS).set_index("metric")
    for metric in METRICS:
        sign = -1 if metric in [*LOWER_IS_BETTER, "calibrated_loss"] else 1
        better = [sign * (one[metric][0] - other[metric][0]) > 0 for one, other in zip(*samples, strict=True)]
        table.loc[metric, "better"] = f"{sum(better)} of {len(better)}"
    print(table.drop(columns="probability").round(4).reset_index().to_json(orient="records", lines=True), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
