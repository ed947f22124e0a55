"""Seconds for metrics on bootstrap resamples and for intervals of eleven models, against scikit-learn in a loop.

python bench/intervals.py [RESAMPLES]
"""

import json
import sys

import numpy as np
from common import alternate, seconds
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, log_loss, roc_auc_score

from pipeline.evaluation.intervals import bootstrap_weights, confidence_intervals
from pipeline.evaluation.metrics import compute_metrics

MODELS, IMAGES = 11, 1527
LOOP_RESAMPLES = 10  # the loop is timed on this many resamples of one model, and the time is scaled up


def main(count: int = 2000) -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(IMAGES) % 10 == 0).astype(int)
    models = np.clip(0.4 * labels[:, None] + 0.6 * rng.random((IMAGES, MODELS)), 0, 1)
    groups = np.arange(IMAGES) * 4 // 5

    def vectorized() -> float:
        def work() -> None:
            weights = bootstrap_weights(groups, count)
            for model in models.T:
                compute_metrics(labels, model >= 0.5, model, weights)

        return seconds(work)

    def intervals() -> float:
        return seconds(
            lambda: [confidence_intervals(labels, (model >= 0.5).astype(int), groups, model) for model in models.T]
        )

    def loop() -> float:
        def work() -> None:
            for _ in range(LOOP_RESAMPLES):
                rows = rng.integers(0, IMAGES, IMAGES)
                for metric in (log_loss, roc_auc_score, average_precision_score):
                    metric(labels[rows], models[rows, 0])
                for metric in (confusion_matrix, f1_score):
                    metric(labels[rows], models[rows, 0] >= 0.5)

        return seconds(work) / LOOP_RESAMPLES * count * MODELS

    fast, slow, analytic = alternate(vectorized, loop, intervals, rounds=3)
    result = {"models": MODELS, "images": IMAGES, "resamples": count, "seconds": round(fast, 2), "loop": round(slow)}
    print(json.dumps(result | {"ratio": round(slow / fast, 1), "intervals": round(analytic, 2)}))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
