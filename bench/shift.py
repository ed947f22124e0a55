"""What is estimated for a test set without its labels, against the truth, by simulation.

python bench/shift.py [REPLICATES]

175 validation images, 20 of them positive, and 100 test images; a patient has one to four images with correlated
scores, where nothing else is said. Rates are followed by their Monte Carlo standard error. `before` is the rule without
the method: a fixed difference of 0.1 for the prevalence, and Bayes' rule with a percentile bootstrap for the accuracy.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import norm

from pipeline.evaluation.dataset_shift import SIGNIFICANCE_LEVEL, fit_mixture
from pipeline.evaluation.expected_accuracy import choose_strata, estimate_accuracy
from pipeline.evaluation.intervals import bootstrap_weights, percentile_ends
from pipeline.evaluation.metrics import compute_metrics
from pipeline.evaluation.prevalence import estimate_prevalence

POSITIVES, NEGATIVES, TEST_IMAGES, FEATURES = 20, 155, 100, 64
# As many patients have each number of images, by label.
PATIENT_IMAGES = {0: (1, 2, 3, 4), 1: (1, 2, 3, 4)}
SINGLE, MANY, SERIES = {0: (1,), 1: (1,)}, {0: (1, 1, 1, 20), 1: (1, 1, 1, 20)}, {0: (1,), 1: (4,)}
CORRELATION = 0.5  # of the scores of one patient
SHORTCUT = 1.5  # by how much source A raises the log odds, in standard deviations
OLD_DIFFERENCE = 0.1
RESAMPLES = 199


@dataclass(frozen=True)
class Images:
    labels: np.ndarray
    logits: np.ndarray
    groups: np.ndarray
    sources: np.ndarray
    features: np.ndarray

    @property
    def metadata(self) -> pd.DataFrame:
        return pd.DataFrame({"source": self.sources, "view": ""})


def draw(
    rng: np.random.Generator,
    counts: dict[int, int],
    source_a: dict[int, float],
    auroc: float = 0.95,
    features_shift: float = 0.0,
    new_negatives: float = 0.0,
    patient_images: Mapping[int, tuple[int, ...]] = PATIENT_IMAGES,
) -> Images:
    """Draw images with `counts` of each label, and P(source A) by label.

    A share `new_negatives` of the negatives comes from a population between the classes; `features_shift` is added to
    four of the features. Both leave label shift.
    """
    parts, patients = [], 0
    for label, count in counts.items():
        sizes = rng.choice(patient_images[label], count)
        patient = np.repeat(np.arange(len(sizes)), sizes)[:count]
        size = patient.max(initial=-1) + 1
        is_a = (rng.random(size) < source_a[label])[patient]
        is_new = (rng.random(size) < new_negatives)[patient] & (label == 0)
        shared, own = rng.normal(size=size)[patient], rng.normal(size=count)
        noise = np.sqrt(CORRELATION) * shared + np.sqrt(1 - CORRELATION) * own
        separation = np.sqrt(2) * norm.ppf(auroc)
        logits = separation * label + SHORTCUT * is_a + np.where(is_new, separation / 2 + 0.1 * noise, noise)
        features = rng.normal(size=(size, FEATURES))[patient] + rng.normal(size=(count, FEATURES))
        features[:, :3] += np.stack([logits, is_a, label + 2.0 * is_a], axis=1)
        features[:, 3:7] += features_shift
        sources = np.where(is_a, "A", "B")
        parts.append((np.full(count, label), logits, patient + patients, sources, features))
        patients += size
    labels, logits, groups, sources, features = (np.concatenate(part) for part in zip(*parts, strict=True))
    threshold = np.sqrt(2) * norm.ppf(auroc) * 0.75  # between the classes: fewer false positives than misses
    return Images(labels, logits - threshold, groups, sources, features)


def share(values: list[bool]) -> list[float]:
    """Return a rate and its standard error."""
    rate = float(np.mean(values))
    return [round(rate, 3), round(float(np.sqrt(rate * (1 - rate) / len(values))), 3)]


# What is known of the patients of the test images.
TestGroups = Callable[[Images], np.ndarray | None]
TEST_GROUPS: dict[str, TestGroups] = {
    "": lambda images: images.groups,
    ", test patients unknown": lambda _: None,
    ", each test image taken for a patient": lambda images: np.arange(len(images.labels)),
}


def draw_pair(
    rng: np.random.Generator,
    prevalence: float,
    patient_images: Mapping[int, tuple[int, ...]] = PATIENT_IMAGES,
    **shift: float,
) -> tuple[Images, Images]:
    """Draw a validation and a test set of one population, except for the prevalence and `shift`."""
    no_source = {0: 0.0, 1: 0.0}
    positives = int(rng.binomial(TEST_IMAGES, prevalence))
    auroc = {"auroc": shift.pop("auroc", 0.95)}
    validation = draw(rng, {1: POSITIVES, 0: NEGATIVES}, no_source, **auroc, patient_images=patient_images)
    counts = {1: positives, 0: TEST_IMAGES - positives}
    return validation, draw(rng, counts, no_source, **auroc, **shift, patient_images=patient_images)


def evaluate_prevalence(count: int, auroc: float, prevalence: float, test_groups: TestGroups) -> dict[str, object]:
    """Coverage and width of the interval of the prevalence, and how often it is said to differ."""
    rng = np.random.default_rng(0)
    covered, widths, differs, differed_before = [], [], [], []
    for _ in range(count):
        validation, test = draw_pair(rng, prevalence, auroc=auroc)
        estimate = estimate_prevalence(
            validation.labels, expit(validation.logits), validation.groups, expit(test.logits),
            test_groups(test), RESAMPLES,
        )  # fmt: skip
        covered.append(estimate.low <= prevalence <= estimate.high)
        widths.append(estimate.high - estimate.low)
        differs.append(estimate.differs)
        differed_before.append(abs(estimate.difference) > OLD_DIFFERENCE)
    width = round(float(np.median(widths)), 2)
    return {
        "coverage": share(covered), "width": width, "differs": share(differs), "differs_before": share(differed_before),
    }  # fmt: skip


def evaluate_tests(
    count: int,
    prevalence: float,
    test_groups: TestGroups = TEST_GROUPS[""],
    patient_images: Mapping[int, tuple[int, ...]] = PATIENT_IMAGES,
    **shift: float,
) -> dict[str, object]:
    """How often the two tests reject, and at least one of them after adjustment."""
    rng = np.random.default_rng(0)
    p = np.zeros((count, 2))
    for index in range(count):
        validation, test = draw_pair(rng, prevalence, patient_images, **shift)
        groups = test_groups(test)
        for column, name in enumerate(("logits", "features")):
            sets = [getattr(images, name).reshape(len(images.labels), -1) for images in (validation, test)]
            fit = fit_mixture(sets[0], validation.labels, validation.groups, sets[1], groups, RESAMPLES)
            p[index, column] = fit.p
    either = list(2 * p.min(axis=1) <= SIGNIFICANCE_LEVEL)
    score, features = (share(list(column <= SIGNIFICANCE_LEVEL)) for column in p.T)
    return {"score": score, "features": features, "either": share(either)}


def evaluate_few_positives(count: int, positives: int) -> dict[str, object]:
    """How often the test of features rejects label shift to 0.5, where every patient has one image.

    One of 32 features tells the classes apart.
    """
    rng = np.random.default_rng(0)
    labels, new_labels = (np.repeat([1, 0], numbers) for numbers in ((positives, 175 - positives), (100, 100)))
    rejected, shares = [], []
    for _ in range(count):
        features, new = (rng.normal(size=(len(one), 32)) for one in (labels, new_labels))
        features[:, 0] += 2.3 * labels
        new[:, 0] += 2.3 * new_labels
        fit = fit_mixture(features, labels, np.arange(175), new, np.arange(200), RESAMPLES)
        rejected.append(fit.p <= SIGNIFICANCE_LEVEL)
        shares.append(fit.prevalence)
    return {"features": share(rejected), "prevalence": round(float(np.mean(shares)), 3)}


def evaluate_accuracy(
    count: int,
    validation_a: dict[int, float],
    test_a: dict[int, float],
    expected: float | None = 0.5,
    patient_images: Mapping[int, tuple[int, ...]] = PATIENT_IMAGES,
    test_patient_images: Mapping[int, tuple[int, ...]] = PATIENT_IMAGES,
) -> dict[str, object]:
    """How often the accuracy on the test images lies in the range, and how often there is a value."""
    rng = np.random.default_rng(0)
    covered, covered_before, widths, values, errors = [], [], [], [], []
    for _ in range(count):
        validation = draw(rng, {1: POSITIVES, 0: NEGATIVES}, validation_a, patient_images=patient_images)
        positives = int(rng.binomial(TEST_IMAGES, 0.5))
        counts = {1: positives, 0: TEST_IMAGES - positives}
        test = draw(rng, counts, test_a, patient_images=test_patient_images)
        truth = float(((test.logits >= 0) == test.labels).mean())
        strata = choose_strata(validation.labels, validation.groups, validation.metadata, test.metadata)
        estimated = estimate_accuracy(
            validation.labels, validation.logits >= 0, validation.groups, test.logits >= 0, strata, expected,
            test_groups=test.groups,
        )  # fmt: skip
        covered.append(estimated.low <= truth <= estimated.high)
        widths.append(estimated.high - estimated.low)
        values.append(not np.isnan(estimated.value))
        errors.append(estimated.value - truth)
        weights = bootstrap_weights(validation.groups, RESAMPLES)
        metrics = compute_metrics(validation.labels, validation.logits >= 0, None, weights)
        low, high = percentile_ends(metrics[["recall", "specificity"]].mean(axis="columns").dropna().to_numpy()[1:])
        covered_before.append(low <= truth <= high)
    bias = round(float(np.nanmean(errors)), 3) if any(values) else None
    return {
        "coverage": share(covered), "coverage_before": share(covered_before),
        "width": round(float(np.median(widths)), 2), "value_estimated": share(values), "bias": bias,
    }  # fmt: skip


def main(count: int = 400) -> None:
    no_source = {0: 0.0, 1: 0.0}
    cases = {
        **{
            f"prevalence {prevalence:.2f}, AUROC {auroc}{known}": partial(
                evaluate_prevalence, auroc=auroc, prevalence=prevalence, test_groups=test_groups
            )
            for known, test_groups in TEST_GROUPS.items()
            for auroc in (0.85, 0.95)
            for prevalence in (POSITIVES / (POSITIVES + NEGATIVES), 0.5)
        },
        **{
            f"tests, label shift to 0.5{images}{known}": partial(
                evaluate_tests, prevalence=0.5, test_groups=test_groups, patient_images=patient_images
            )
            for images, patient_images in {"": PATIENT_IMAGES, ", four images per positive patient": SERIES}.items()
            for known, test_groups in TEST_GROUPS.items()
        },
        "tests, label shift to 0.9, four images per positive patient, test patients unknown": partial(
            evaluate_tests,
            prevalence=0.9,
            test_groups=TEST_GROUPS[", test patients unknown"],
            patient_images=SERIES,
        ),
        **{
            f"tests, label shift to 0.5, {positives} positive patients": partial(
                evaluate_few_positives, positives=positives
            )
            for positives in (6, 10, 20)
        },
        "tests, no shift": partial(evaluate_tests, prevalence=0.11),
        "tests, half of the negatives new": partial(evaluate_tests, prevalence=0.3, new_negatives=0.5),
        "tests, features 0.5 SD": partial(evaluate_tests, prevalence=0.5, features_shift=0.7),
        "tests, features 1 SD": partial(evaluate_tests, prevalence=0.5, features_shift=1.4),
        "accuracy (i) label shift only": partial(evaluate_accuracy, validation_a=no_source, test_a=no_source),
        "accuracy (i) the same, single validation images, many of some test patients": partial(
            evaluate_accuracy,
            validation_a=no_source,
            test_a=no_source,
            patient_images=SINGLE,
            test_patient_images=MANY,
        ),
        "accuracy (i) the same, single test images, many of some validation patients": partial(
            evaluate_accuracy,
            validation_a=no_source,
            test_a=no_source,
            patient_images=MANY,
            test_patient_images=SINGLE,
        ),
        "accuracy (ii) other mix of sources": partial(
            evaluate_accuracy, validation_a={1: 0.8, 0: 0.2}, test_a={1: 0.5, 0: 0.5}
        ),
        "accuracy (ii) other mix, prevalence unknown": partial(
            evaluate_accuracy, validation_a={1: 0.8, 0: 0.2}, test_a={1: 0.5, 0: 0.5}, expected=None
        ),
        "accuracy (iii) a source without positives": partial(
            evaluate_accuracy, validation_a={1: 1.0, 0: 0.2}, test_a={1: 1.0, 0: 0.5}
        ),
        "accuracy (iii) the same, with positives in the test set": partial(
            evaluate_accuracy, validation_a={1: 1.0, 0: 0.2}, test_a={1: 0.7, 0: 0.5}
        ),
        "accuracy (iii) source and label coincide": partial(
            evaluate_accuracy, validation_a={1: 1.0, 0: 0.0}, test_a={1: 0.5, 0: 0.5}
        ),
    }
    for name, evaluate in cases.items():
        print(json.dumps({"case": name, "replicates": count, **evaluate(count)}), flush=True)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
