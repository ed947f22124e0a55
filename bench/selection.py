"""Bias and coverage of F1, before and after its correction for selection, by simulation with known truth.

Ten seeds are validated after every epoch on 175 images, 20 of them positive, of patients with 1 to 4 images; a late
epoch has an AUROC of about 0.95. A score is the sum of effects of the patient, the image, the seed and the epoch, and
every epoch has its own offset and separation of the classes, which settle down during training. Their variances are
chosen so that the apparent F1 of the best seed is about as much too high as with real networks. The truth is the F1 of
the selected networks on 20000 other patients.

BBC subtracts all of the optimism that it finds in the resamples, the product a fraction of it; see
`pipeline/evaluation/selection.py`.

python bench/selection.py [REPLICATES]
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.random import Generator
from scipy.special import expit
from scipy.stats import norm

from pipeline.core.config import BAG, Keep
from pipeline.evaluation import selection
from pipeline.evaluation.intervals import bootstrap_weights
from pipeline.evaluation.metrics import THRESHOLD_METRICS, compute_metrics

SEEDS, IMAGES, POSITIVES, RESAMPLES, POPULATION = 10, 175, 20, 200, 20_000
PATIENT_SD, IMAGE_SD, SEED_SD, EPOCH_SD = np.sqrt([0.50, 0.32, 0.06, 0.12])  # of the scores within a class
SEED_OFFSET_SD, EPOCH_OFFSET_SD, SEPARATION_SD = 0.3, 0.55, 0.28
SEPARATION, EARLY_LOSS = norm.ppf(0.95) * np.sqrt(2), 1.0  # of the classes, finally and less at the start
THRESHOLD, LOGIT_SCALE = 1.7, 2


@dataclass(frozen=True)
class Networks:
    """Separation and offset (S, E) of the scores by seed and epoch."""

    separation: np.ndarray
    offset: np.ndarray


def draw_networks(rng: Generator, epochs: int) -> Networks:
    progress = np.arange(1, epochs + 1) / epochs
    shape, spread = (SEEDS, epochs), np.sqrt(1 - 0.8 * progress)
    separation = SEPARATION - EARLY_LOSS * np.exp(-3 * progress) + SEPARATION_SD * spread * rng.normal(size=shape)
    offset = SEED_OFFSET_SD * rng.normal(size=(SEEDS, 1)) + EPOCH_OFFSET_SD * spread * rng.normal(size=shape)
    return Networks(separation, offset)


def draw_patients(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and groups (N,)."""
    sizes: list[list[int]] = []
    for total in (POSITIVES, IMAGES - POSITIVES):
        ends = np.cumsum(rng.integers(1, 5, total)).clip(max=total)
        sizes.append([size for size in np.diff(ends, prepend=0) if size])
    counts = [*sizes[0], *sizes[1]]
    return np.repeat([1, 0], [POSITIVES, IMAGES - POSITIVES]), np.repeat(np.arange(len(counts)), counts)


def draw_probabilities(rng: Generator, labels: np.ndarray, groups: np.ndarray, networks: Networks) -> np.ndarray:
    """Return P(positive) (S, E, N)."""
    seeds, epochs = networks.offset.shape
    shared = PATIENT_SD * rng.normal(size=groups.max() + 1)[groups] + IMAGE_SD * rng.normal(size=len(labels))
    of_seed = SEED_SD * rng.normal(size=(seeds, 1, len(labels)))
    of_epoch = EPOCH_SD * rng.normal(size=(seeds, epochs, len(labels)))
    signal = networks.separation[..., None] * labels + networks.offset[..., None] - THRESHOLD
    return np.asarray(expit(LOGIT_SCALE * (shared + of_seed + of_epoch + signal)))


def true_f1(rng: Generator, networks: Networks) -> np.ndarray:
    """Return the F1 of every seed (with one epoch), and of the bag, (S + 1,), on other patients."""
    labels = (np.arange(POPULATION) < POPULATION * POSITIVES / IMAGES).astype(int)
    members = draw_probabilities(rng, labels, np.arange(POPULATION), networks)[:, 0]
    cells = selection.confusion_cells(labels, np.vstack([members, members.mean(axis=0)]) >= 0.5, np.ones(POPULATION))
    return f1_of_cells(cells)


def f1_of_cells(cells: np.ndarray) -> np.ndarray:
    return np.asarray(2 * cells[..., 0] / np.maximum(2 * cells[..., 0] + cells[..., 1] + cells[..., 2], 1))


def interval(labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, bias: pd.Series) -> list[float]:
    """Return F1 and the ends of its interval, after subtracting the bias of sensitivity and specificity."""
    rates = selection.correct_rates(labels, predicted, groups, bias)
    return list(selection.corrected_metrics(labels, *rates).to_numpy()[THRESHOLD_METRICS.index("f1")])


def simulate(rng: Generator, epochs: int, keep: Keep) -> Iterator[dict[str, object]]:
    """Yield a row per candidate and estimate: `bias`, `covered`, `width`; and rows of the ranks."""
    labels, groups = draw_patients(rng)
    networks, folds = draw_networks(rng, epochs), np.zeros(IMAGES)
    probabilities, weights = draw_probabilities(rng, labels, groups, networks), bootstrap_weights(groups, RESAMPLES)
    chosen = selection.choose_epochs(labels, folds, probabilities, keep, weights[:1])[0, :, 0]
    seeds = np.arange(SEEDS)
    selected = Networks(networks.separation[seeds, chosen][:, None], networks.offset[seeds, chosen][:, None])
    truth = true_f1(rng, selected)
    kept = probabilities[seeds, chosen]
    predicted = (np.vstack([kept, kept.mean(axis=0)]) >= 0.5).astype(int)
    samples = pd.DataFrame({k: compute_metrics(labels, row, None, weights)["f1"] for k, row in enumerate(predicted)})
    best = int(samples.iloc[0, :-1].to_numpy().argmax())
    bias = selection.estimate_selection_bias(
        labels,
        folds,
        probabilities,
        keep,
        weights[1:],
        range(SEEDS),
        lambda members, _: members.mean(axis=2),
        lambda scores, _: np.full(len(scores), 0.5),
    )
    for name, key, index in (("first seed", 0, 0), ("best seed", selection.BEST, best), ("bag", BAG, SEEDS)):
        amount = pd.Series(bias.loc[key])
        estimates = {
            "apparent": interval(labels, predicted[index], groups, 0 * amount),
            "apparent, percentiles": [samples.iloc[0, index], *np.nanquantile(samples.iloc[1:, index], [0.025, 0.975])],
            "corrected": interval(labels, predicted[index], groups, amount),
            "BBC": interval(labels, predicted[index], groups, amount / selection.OPTIMISM_FRACTION),
        }
        if name == "best seed":
            estimates["mean of the seeds"] = [samples.iloc[0, :-1].mean(), np.nan, np.nan]
        for estimate, (value, low, high) in estimates.items():
            target = truth[:-1].mean() if estimate == "mean of the seeds" else truth[index]
            covered = float(low <= target <= high) if np.isfinite(low) else np.nan
            yield {"candidate": name, "estimate": estimate, "true": target, "bias": value - target,
                   "covered": covered, "width": high - low}  # fmt: skip
    ranks = selection.rank_probabilities(samples.iloc[1:])
    yield {"candidate": "best seed", "estimate": "is the best seed", "true": float(truth[:-1].argmax() == best)}
    yield {"candidate": "bag", "estimate": "beats the best seed", "true": float(truth[-1] > truth[best])}
    beats = (samples.iloc[1:, SEEDS] > samples.iloc[1:, best]) + 0.5 * (
        samples.iloc[1:, SEEDS] == samples.iloc[1:, best]
    )
    yield {"candidate": "bag", "estimate": "share of resamples in which it beats the best seed", "true": beats.mean()}
    yield {"candidate": "best seed", "estimate": "rank probability", "true": ranks[best]}
    yield {"candidate": "bag", "estimate": "rank probability", "true": ranks[SEEDS]}


def main(replicates: int = 200) -> None:
    tables = []
    for epochs in (8, 30):
        for keep in ("best_f1", "best_loss", "last"):
            rows = [row for index in range(replicates) for row in simulate(np.random.default_rng(index), epochs, keep)]
            groups = pd.DataFrame(rows).groupby(["candidate", "estimate"], sort=False)
            table = groups.mean()
            table.insert(2, "mc_error", groups["bias"].sem())
            tables.append(table.reset_index().assign(epochs=epochs, keep=keep))
    table = pd.concat(tables).round(3).assign(coverage_error=round(float(np.sqrt(0.95 * 0.05 / replicates)), 3))
    print(table.to_json(orient="records", lines=True), end="")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
