"""Effect of adapting predictions to the prevalence of the test set, for a test set whose labels are known.

python bench/adaptation.py PROJECT LABELS    # a clone after `dvc repro evaluate`; a CSV with File,Label of its test set

Accuracies are means over the seeds, with 95 % intervals of a bootstrap over images. `calibrated` applies the
temperature and bias fitted on the validation set; `adapted` also the prevalence that EM estimates from the test images.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from common import compare_metrics

from pipeline.core.files import read_csv
from pipeline.evaluation import intervals
from pipeline.evaluation.calibration import fit_platt
from pipeline.evaluation.metrics import apply_threshold, compute_metrics
from pipeline.evaluation.prevalence import adapt_label_shift

RESAMPLES = 2000


def main(project: str, labels_file: str) -> None:
    validation, test = (
        read_csv(Path(project, f"predictions/{name}.csv")).set_index("file") for name in ("validation", "test")
    )
    test_labels = pd.read_csv(labels_file, index_col="File").loc[test.index, "Label"].to_numpy()
    labels = validation.pop("label").to_numpy()
    weights = intervals.bootstrap_weights(np.arange(len(test_labels)), RESAMPLES)
    metrics: dict[str, list[pd.DataFrame]] = {"plain": [], "calibrated": [], "adapted": []}
    prevalences = []
    for seed in test:
        recalibrate = fit_platt(labels, validation[seed].to_numpy())
        if recalibrate is None:
            raise SystemExit(f"{seed} cannot be calibrated on this validation set")
        calibrated = recalibrate(test[seed].to_numpy())
        shift = adapt_label_shift(calibrated, float(labels.mean()))
        prevalences.append(shift["prevalence"])
        for kind, probabilities in zip(metrics, (test[seed], calibrated, shift["probabilities"]), strict=True):
            metrics[kind].append(compute_metrics(test_labels, apply_threshold(probabilities), None, weights))
    means = {kind: sum(seeds) / len(seeds) for kind, seeds in metrics.items()}
    for kind, mean in means.items():
        line = {"predictions": kind, "accuracy": round(mean["accuracy"][0], 3)}
        for reference in list(means)[: list(means).index(kind)]:
            difference = compare_metrics(mean, means[reference], ["accuracy"]).iloc[0]
            line[f"over {reference}"] = [round(difference[key], 3) for key in ("difference", "low", "high")]
        print(json.dumps(line))
    estimated, deviation = round(np.mean(prevalences), 3), round(np.std(prevalences), 3)
    print(json.dumps({"prevalence": test_labels.mean(), "estimated": estimated, "deviation": deviation}))


if __name__ == "__main__":
    main(*sys.argv[1:])
