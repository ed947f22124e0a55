"""Seconds for the intervals of eleven models on 1527 images, against scikit-learn called on each resample.

python bench/intervals.py [RESAMPLES]
"""

import json
import sys

import numpy as np
from common import alternate, seconds

from pipeline.evaluation.intervals import bootstrap_weights, compute_metrics
from pipeline.evaluation.metrics import score_predictions

MODELS, IMAGES, PLAIN = 11, 1527, 10  # the plain way is timed on so many resamples of one model, and multiplied


def main(count: int = 2000) -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(IMAGES) % 10 == 0).astype(int)
    models = np.clip(0.4 * labels[:, None] + 0.6 * rng.random((IMAGES, MODELS)), 0, 1)
    groups = np.arange(IMAGES) * 4 // 5

    def ours() -> float:
        def work() -> None:
            weights = bootstrap_weights(groups, count)
            for model in models.T:
                compute_metrics(labels, model >= 0.5, model, weights)

        return seconds(work)

    def plain() -> float:
        def work() -> None:
            for _ in range(PLAIN):
                rows = rng.integers(0, IMAGES, IMAGES)
                score_predictions(labels[rows], models[rows, 0])

        return seconds(work) / PLAIN * count * MODELS

    mine, theirs = alternate(ours, plain, rounds=3)
    facts = {"models": MODELS, "images": IMAGES, "resamples": count}
    print(json.dumps(facts | {"seconds": round(mine, 2), "plain": round(theirs), "ratio": round(theirs / mine, 1)}))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
