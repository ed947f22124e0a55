"""What adapting predictions to the prevalence of the test set gains, where the labels of the test set are known.

python bench/adaptation.py PROJECT LABELS    # a clone in which `dvc repro evaluate` has run; File,Label of its test set

Accuracies are the means over the seeds, with intervals of a bootstrap over images. `calibrated` has the temperature and
bias that fit the validation set; `adapted` moves that on to the prevalence that EM finds among the test images.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.core.files import read_csv
from pipeline.evaluation import intervals
from pipeline.evaluation.calibration import fit_platt
from pipeline.evaluation.metrics import apply_threshold
from pipeline.evaluation.prevalence import adapt_label_shift

RESAMPLES = 2000


def main(project: str, labels: str) -> None:
    given, test = (
        read_csv(Path(project, f"predictions/{name}.csv")).set_index("file") for name in ("validation", "test")
    )
    truth = pd.read_csv(labels, index_col="File").loc[test.index, "Label"].to_numpy()
    known = given.pop("label").to_numpy()
    weights = intervals.bootstrap_weights(np.arange(len(truth)), RESAMPLES)
    seeds: dict[str, list[pd.DataFrame]] = {"plain": [], "calibrated": [], "adapted": []}
    found = []
    for seed in test:
        calibrate = fit_platt(known, given[seed].to_numpy())
        if calibrate is None:
            raise SystemExit(f"{seed} cannot be calibrated on this validation set")
        calibrated = calibrate(test[seed].to_numpy())
        shift = adapt_label_shift(calibrated, float(known.mean()))
        found.append(shift["prevalence"])
        for way, probabilities in zip(seeds, (test[seed], calibrated, shift["probabilities"]), strict=True):
            seeds[way].append(intervals.compute_metrics(truth, apply_threshold(probabilities), None, weights))
    means = {way: sum(each) / len(each) for way, each in seeds.items()}
    for way, mean in means.items():
        line = {"way": way, "accuracy": mean["accuracy"][0]}
        for other in list(means)[: list(means).index(way)]:
            gain = intervals.compare_metrics(mean, means[other], ["accuracy"]).iloc[0]
            line[f"over {other}"] = [gain["difference"], gain["low"], gain["high"]]
        print(json.dumps({key: np.round(value, 3).tolist() if key != "way" else value for key, value in line.items()}))
    print(
        json.dumps(
            {"prevalence": truth.mean(), "estimated": round(np.mean(found), 3), "spread": round(np.std(found), 3)}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
