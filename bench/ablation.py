"""What a change of the recipe does: all seeds of one project against those of another, paired by image and seed.

python bench/ablation.py WITH WITHOUT    # two clones in which `dvc repro evaluate` has run, on the same split

Each figure is the mean over the seeds, on the validation set, at the threshold 0.5; its interval is that of a bootstrap
over patients. `calibrated_loss` is the loss once temperature and bias are fitted, each fold's by the other folds.
`better` says for how many seeds WITH is the better one.
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


def predictions(project: Path) -> pd.DataFrame:
    """Return label, group and P(positive) of every seed, by file."""
    table = read_csv(project / "predictions/validation.csv").set_index("file")
    return table.join(read_split(project / "data").set_index("file")["group"])


def figures(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the figures of every seed, resampled."""
    validation, found = ValidationSet(table["label"].to_numpy(), table["group"].to_numpy(), RESAMPLES), []
    for name in table.columns.drop(["label", "group"]):
        seed = table[name].to_numpy()
        after, _ = cross_fit_recalibration(validation, seed, fit_platt)
        loss = (
            np.nan
            if after is None
            else validation.bootstrap_metrics(Predictions(apply_threshold(after), after))["loss"]
        )
        found.append(
            validation.bootstrap_metrics(Predictions(apply_threshold(seed), seed)).assign(calibrated_loss=loss)
        )
    return found


def main(ours: str, theirs: str) -> None:
    tables = [predictions(Path(project)) for project in (ours, theirs)]
    if (
        not all(one[["label", "group"]].equals(tables[0][["label", "group"]]) for one in tables)
        or len({tuple(one) for one in tables}) > 1
    ):
        raise SystemExit(f"{ours} and {theirs} have not the same split and seeds")
    seeds = [figures(table) for table in tables]
    table = intervals.compare_metrics(*(sum(each) / len(each) for each in seeds), METRICS).set_index("metric")
    for metric in METRICS:
        sign = -1 if metric in [*LOWER_IS_BETTER, "calibrated_loss"] else 1
        better = [sign * (one[metric][0] - other[metric][0]) > 0 for one, other in zip(*seeds, strict=True)]
        table.loc[metric, "better"] = f"{sum(better)} of {len(better)}"
    print(table.drop(columns="probability").round(4).reset_index().to_json(orient="records", lines=True), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
