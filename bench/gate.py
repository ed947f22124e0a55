"""How often the gate promotes a model that is not better, and how often one that is: before and now, by simulation.

python bench/gate.py [SIMULATIONS]

Every model is a score with a normal distribution in each class and F1-optimal threshold: ten seeds, correlated because
some images (and, where clustered, patients of one to four images) are hard for all, with an AUROC of 0.95. The
eleventh candidate stands for the bag, as good as a seed. With another operating point, champion and candidates have the
same true F1, but one threshold is below the optimum and the other above it, and the number of positives varies.
Before: the candidate with the best F1 was promoted if its F1 was higher in at least 80 % of the bootstrap resamples of
patients.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm

from pipeline.evaluation.gate import comparison_level, f1_score, randomization_p_value

SEEDS, RATE, OLD_PROBABILITY, RETRAININGS, SEPARATION = 10, 0.05, 0.8, 20, 2.33
RESAMPLES = 500  # the smallest p-value, 0.002, is below the level of the 20th comparison
LOWER = 0.6  # by which a threshold is below the optimal one, in standard deviations of the score in a class
HARDNESS, SEED, EPOCH = 0.65, 0.2, 0.15  # shares of a score's variance: the image, the seed, the epoch


@dataclass(frozen=True)
class Setting:
    images: int
    positives: int
    clustered: bool
    epochs: int  # from which the best was kept; 1 for `keep: last`


class ValidationSet:
    """A validation set, and trainings that are evaluated on it."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.rng = setting, np.random.default_rng(seed)
        sizes = []
        for count in (setting.positives, setting.images - setting.positives):
            left = count
            while left:
                sizes.append(min(left, int(self.rng.integers(1, 5)) if setting.clustered else 1))
                left -= sizes[-1]
        self.groups = np.repeat(np.arange(len(sizes)), sizes)
        self.labels = (np.arange(setting.images) < setting.positives).astype(int)
        noise, by_group = self.rng.standard_normal((2, setting.images))
        self.hardness = HARDNESS**0.5 * ((by_group[self.groups] + noise) / 2**0.5 if setting.clustered else noise)

    def train(self, separation: float, threshold: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels predicted by every seed after every epoch, (N, seeds, epochs), and by the bag, (N, 1)."""
        if threshold is None:
            threshold = optimal_threshold(separation, self.setting.positives / self.setting.images)
        shape = (self.setting.images, SEEDS, self.setting.epochs)
        means = (self.hardness + separation * self.labels)[:, None]
        by_seed = means + SEED**0.5 * self.rng.standard_normal(shape[:2])
        scores = by_seed[:, :, None] + EPOCH**0.5 * self.rng.standard_normal(shape)
        predicted = (scores >= threshold).astype(int)
        best = self.f1(predicted).argmax(axis=1)
        bag = scores[:, np.arange(SEEDS), best].mean(axis=1, keepdims=True)
        missing_variance = (SEED + EPOCH) * (1 - 1 / SEEDS)  # else the bag would be better than a seed
        bag += missing_variance**0.5 * self.rng.standard_normal(bag.shape)
        return predicted, (bag >= threshold).astype(int)

    def f1(self, predicted: np.ndarray) -> np.ndarray:
        true_positives = np.tensordot(self.labels, predicted, 1)
        return f1_score(np.stack([true_positives, predicted.sum(axis=0)]), self.labels.sum())

    def select(self, training: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Return the labels predicted by the candidate with the best F1, (N,)."""
        seeds, bag = training
        candidates = np.concatenate([seeds.reshape(len(seeds), -1), bag], axis=1)
        return candidates[:, self.f1(candidates).argmax()]

    def compare(self, training: tuple[np.ndarray, np.ndarray], champion: np.ndarray) -> tuple[float, float]:
        """Return the old rule's probability and the p-value."""
        seeds, bag = training
        challenger = self.select(training)
        weights = self.rng.multinomial(
            len(np.unique(self.groups)), np.full(self.groups[-1] + 1, 1 / (self.groups[-1] + 1)), RESAMPLES
        )[:, self.groups]
        pair = np.stack([challenger, champion], axis=1)
        tp, predicted, positives = weights @ (pair * self.labels[:, None]), weights @ pair, weights @ self.labels
        f1 = 2 * tp / np.maximum(predicted + positives[:, None], 1)
        candidates = [*np.moveaxis(seeds, 1, 0), bag]
        p_value = randomization_p_value(self.labels, self.groups, challenger, champion, candidates, RESAMPLES)
        return float((f1[:, 0] > f1[:, 1]).mean()), p_value


@cache
def optimal_threshold(separation: float, prevalence: float) -> float:
    return float(minimize_scalar(lambda t: -true_f1(separation, t, prevalence), bounds=(-2, 6), method="bounded").x)


def true_f1(separation: float, threshold: float, prevalence: float) -> float:
    true_positives = prevalence * norm.sf(threshold - separation)
    return float(2 * true_positives / (prevalence + true_positives + (1 - prevalence) * norm.sf(threshold)))


@cache
def thresholds_of_equal_f1(prevalence: float) -> tuple[float, float]:
    """Return a threshold below the optimal one, and the one above it with the same true F1."""
    optimum = optimal_threshold(SEPARATION, prevalence)
    f1 = true_f1(SEPARATION, optimum - LOWER, prevalence)
    return optimum - LOWER, float(brentq(lambda t: true_f1(SEPARATION, t, prevalence) - f1, optimum, optimum + 4))


@cache
def separation_with_gain(gain: float, prevalence: float) -> float:
    """Return the separation at which the true F1 is higher by `gain`."""

    def best_f1(separation: float) -> float:
        return true_f1(separation, optimal_threshold(separation, prevalence), prevalence)

    return (
        float(brentq(lambda s: best_f1(s) - best_f1(SEPARATION) - gain, SEPARATION, SEPARATION + 4))
        if gain
        else SEPARATION
    )


def compare_once(setting: Setting, seed: int, gain: float, chosen_here: bool) -> tuple[bool, bool]:
    """Return whether a retraining replaces the champion, before and now."""
    validation = ValidationSet(setting, seed)
    training = validation.train(SEPARATION)
    champion = validation.select(training) if chosen_here else training[0][:, 0, 0]
    better = separation_with_gain(gain, setting.positives / setting.images)
    probability, p_value = validation.compare(validation.train(better), champion)
    return probability >= OLD_PROBABILITY, p_value <= RATE


def compare_operating_points(setting: Setting, seed: int, sensitive: bool) -> tuple[bool, bool]:
    """Return whether candidates of the same F1 replace a more sensitive, or more specific, champion, before and now."""
    prevalence = setting.positives / setting.images
    positives = int(np.random.default_rng([seed, 1]).binomial(setting.images, prevalence))
    validation = ValidationSet(replace(setting, positives=positives), seed)
    low, high = thresholds_of_equal_f1(prevalence)
    champion = validation.train(SEPARATION, low if sensitive else high)[0][:, 0, 0]
    probability, p_value = validation.compare(validation.train(SEPARATION, high if sensitive else low), champion)
    return probability >= OLD_PROBABILITY, p_value <= RATE


def retrain(setting: Setting, seed: int, chosen_here: bool) -> tuple[bool, bool]:
    """Return whether any of 20 retrainings of an interchangeable model replaces the champion, before and now."""
    validation, promoted = ValidationSet(setting, seed), [False, False]
    training = validation.train(SEPARATION)
    champion = validation.select(training) if chosen_here else training[0][:, 0, 0]
    for number in range(1, RETRAININGS + 1):
        probability, p_value = validation.compare(validation.train(SEPARATION), champion)
        promoted[0] |= probability >= OLD_PROBABILITY
        promoted[1] |= p_value <= comparison_level(RATE, number)
    return promoted[0], promoted[1]


def print_row(promoted: str, setting: Setting, chosen_here: bool, outcomes: list[tuple[bool, bool]]) -> None:
    shares = np.mean(outcomes, axis=0)
    errors = np.sqrt(shares * (1 - shares) / len(outcomes))
    (before, now), (before_error, now_error) = shares.round(3).tolist(), errors.round(3).tolist()
    line = {"promoted": promoted, **asdict(setting), "champion_chosen": "here" if chosen_here else "elsewhere"}
    line |= {"before": before, "before_error": before_error, "now": now, "now_error": now_error}
    print(json.dumps(line), flush=True)


def main(count: int = 400) -> None:
    small, large = (175, 20), (1527, 157)
    for size, clustered, epochs in [
        (small, False, 1), (small, True, 1), (small, False, 8), (small, True, 8), (small, False, 30), (small, True, 30),
        (large, False, 1), (large, True, 8), (large, False, 30),
    ]:  # fmt: skip
        for chosen_here in (False, True):
            setting = Setting(*size, clustered, epochs)
            replicates = count if size == small else max(1, count // 2)
            outcomes = [compare_once(setting, seed, 0, chosen_here) for seed in range(replicates)]
            print_row("equal", setting, chosen_here, outcomes)
    for size, clustered, sensitive in product((small, large), (False, True), (True, False)):
        setting, replicates = Setting(*size, clustered, epochs=1), count if size == small else max(1, count // 2)
        outcomes = [compare_operating_points(setting, seed, sensitive) for seed in range(replicates)]
        print_row(f"equal F1, more {'specific' if sensitive else 'sensitive'}", setting, False, outcomes)
    for clustered, epochs in [(False, 1), (True, 8)]:
        for chosen_here in (False, True):
            setting = Setting(*small, clustered, epochs)
            outcomes = [retrain(setting, seed, chosen_here) for seed in range(max(1, count // 4))]
            print_row("equal, any of 20", setting, chosen_here, outcomes)
    for size, epochs in [(small, 1), (small, 8), (large, 1), (large, 8)]:
        for chosen_here in (False, True):
            for gain in (0.02, 0.05, 0.1):
                setting = Setting(*size, clustered=True, epochs=epochs)
                replicates = max(1, count // (2 if size == small else 4))
                outcomes = [compare_once(setting, seed, gain, chosen_here) for seed in range(replicates)]
                print_row(f"better by {gain}", setting, chosen_here, outcomes)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
