"""The accuracy to expect on the test images, without their labels, and whether it can be estimated at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from pipeline.evaluation.intervals import percentile_ends
from pipeline.evaluation.metrics import mean_group_size

DRAWS = 4000
PRIOR = 0.5  # Jeffreys' prior of a proportion (Brown, Cai and DasGupta 2001): half a success and half a failure
MIN_PATIENTS = 5  # of each class; a source is divided by view only where every view has them
CLASSES = ("negative", "positive")  # by label
STRATA_COLUMNS = [
    "stratum", "images", "predicted_positive_images", "prevalence", "positive_images", "positive_patients",
    "sensitivity", "negative_images", "negative_patients", "specificity",
]  # fmt: skip
WITHOUT_STRATA = ""  # the name of the only stratum, where nothing is known by which to stratify


@dataclass(frozen=True)
class ExpectedAccuracy:
    """The accuracy to expect on the test images.

    Attributes:
        value: the median, or by Bayes' rule at the expected prevalence; NaN where it cannot be estimated.
        low: lower end of the range in which the accuracy on these images lies with 95 % probability; where a part is
            unknown, that part may be anything that the predictions allow. NaN without a range.
        high: its upper end.
        method: `post-stratification by …` or `Bayes' rule`, and what the expected prevalence has to do with it; empty
            without a range.
        reason: why there is no value or no range, `cannot be estimated: …`, else empty.
        strata: a row per stratum of the test images; see `estimate_accuracy`.
    """

    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    method: str = ""
    reason: str = ""
    strata: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=STRATA_COLUMNS))


@dataclass(frozen=True)
class Strata:
    """The stratum of every validation and test image, and `by`, what it is made of: empty, source, view, or both."""

    validation: np.ndarray
    test: np.ndarray
    by: str


def choose_strata(
    labels: np.ndarray, groups: np.ndarray, metadata: pd.DataFrame, test_metadata: pd.DataFrame
) -> Strata:
    """Stratify by what is known of the test images: by source, or else by view.

    A source is divided by view if at each of its views among the test images the validation set has `MIN_PATIENTS`
    patients of each class. Without columns that tell images apart, there is one stratum, `WITHOUT_STRATA`.

    Args:
        labels: (N,), of the validation images, 0 or 1.
        groups: (N,), the name of each image's group.
        metadata: (N rows), with `source` and `view`, empty where unknown.
        test_metadata: (M rows), likewise.
    """
    for column in ("source", "view"):
        values, test_values = (table[column].to_numpy(str) for table in (metadata, test_metadata))
        if (test_values != "").any() and len(np.unique(np.concatenate([values, test_values]))) > 1:
            break
    else:
        return Strata(np.full(len(metadata), WITHOUT_STRATA), np.full(len(test_metadata), WITHOUT_STRATA), by="")
    strata, test_strata = (np.where(names == "", f"unknown {column}", names) for names in (values, test_values))
    if column == "view":
        return Strata(strata, test_strata, "view")
    views, test_views = (table["view"].to_numpy(str) for table in (metadata, test_metadata))
    finer, test_finer = (
        np.char.add(np.char.add(names, " "), by) for names, by in ((strata, views), (test_strata, test_views))
    )
    by = "source"
    for source in np.unique(test_strata):
        rows, test_rows = strata == source, test_strata == source
        needed = np.unique(test_views[test_rows])
        smallest = min(
            len(np.unique(groups[rows & (views == view) & (labels == label)])) for view in needed for label in (0, 1)
        )
        if len(needed) > 1 and smallest >= MIN_PATIENTS:
            strata = np.where(rows, finer, strata)
            test_strata = np.where(test_rows, test_finer, test_strata)
            by = "source and view"
    return Strata(strata, test_strata, by)


def estimate_accuracy(
    labels: np.ndarray,
    predicted: np.ndarray,
    groups: np.ndarray,
    test_predicted: np.ndarray,
    strata: Strata,
    expected_prevalence: float | None = None,
    shift: str = "",
    test_groups: np.ndarray | None = None,
) -> ExpectedAccuracy:
    """Estimate the accuracy on the test images by post-stratification.

    Within a stratum, sensitivity and specificity are those of the validation images, and the prevalence is what makes
    the share of predicted positives (Rogan and Gladen 1978). All three are drawn from their posterior distribution
    (compare Lew and Levy 1989), with Jeffreys' prior and a flat one for the prevalence; images of a group with
    errors in common count as fewer. Then the number of right predictions in the test set is drawn.

    A class without validation images in a stratum has an unknown rate. Then there is no value, and the range reaches
    from the low end if the rate may be anything that the predictions allow to the high end if that class is absent from
    the stratum in the test set too (compare the bounds of Manski 2003).

    Args:
        labels: (N,), of the validation images, 0 or 1.
        predicted: (N,), their predicted labels; not of a model that was selected by them.
        groups: (N,), the name of each image's group.
        test_predicted: (M,).
        strata: from `choose_strata`.
        expected_prevalence: of the test set; None if unknown. It is not used where the predictions exclude it.
        shift: how the test images differ, from `dataset_shift.describe_shift`. If they do and no source is known, no
            accuracy is estimated.
        test_groups: (M,); None if unknown: then the test images are assumed to be grouped like the validation images.

    Returns:
        With `strata`: `stratum`, the numbers of test `images` and of `predicted_positive_images`, their estimated
        `prevalence`, and of the validation images `positive_images`, `positive_patients`, `sensitivity`,
        `negative_images`, `negative_patients` and `specificity`, NaN if unknown.
    """
    labels, predicted, groups = np.asarray(labels, int), np.asarray(predicted, int), np.asarray(groups)
    test_predicted = np.asarray(test_predicted, int)
    total = len(test_predicted)
    if not total:
        return ExpectedAccuracy(reason="cannot be estimated: no test images")
    if "source" not in strata.by and shift:
        return ExpectedAccuracy(reason=f"cannot be estimated: {shift}")
    table = _tabulate_strata(labels, predicted, groups, test_predicted, strata)
    correct, rng = labels == predicted, np.random.default_rng(0)
    effects = {label: _design_effect(correct, labels == label, groups, strata.validation) for label in (0, 1)}
    effect = _test_design_effect(effects, labels, groups, test_groups)
    # What a stratum lacks in the validation set, it lacks or has in the test set.
    if_absent, if_present = _Draws(), _Draws()
    prevalences = []
    for row in table.to_dict("records"):
        count, positive = row["images"], row["predicted_positive_images"]
        known = [label for label, name in enumerate(CLASSES) if row[f"{name}_images"]]
        sensitivity, specificity = (
            _draw_rate(rng, row[f"{name}_images"], row[metric], effects[label])
            for label, name, metric in ((1, "positive", "sensitivity"), (0, "negative", "specificity"))
        )
        prevalence, right = _draw_stratum(rng, positive, count, sensitivity, specificity, effect)
        if_present.add(count * prevalence, right)
        prevalences.append(float(prevalence.mean()) if len(known) == 2 else np.nan)
        if len(known) == 1:
            # All images are of the known class, so the right predictions can be counted.
            right = np.full(DRAWS, float(positive if known == [1] else count - positive))
            if_absent.add(np.full(DRAWS, float(count * known[0])), right)
        else:
            if_absent.add(count * prevalence, right)

    table.insert(3, "prevalence", prevalences)
    method = f"post-stratification by {strata.by}" if strata.by else "Bayes' rule"
    value, low, high = if_absent.summarize(rng, total, expected_prevalence, effect)
    if expected_prevalence is not None and if_absent.allows(total, expected_prevalence):
        method += f", at the expected prevalence {expected_prevalence:g}"
        if not strata.by:
            value = expected_prevalence * table["sensitivity"][0] + (1 - expected_prevalence) * table["specificity"][0]
    elif expected_prevalence is not None:
        method += f" (the expected prevalence {expected_prevalence:g} is excluded by the predictions)"
    low, high = min(low, value), max(high, value)
    reason = _unknown_reason(table, total)
    if not reason:
        return ExpectedAccuracy(value, low, high, method, "", table)
    if table[[f"{name}_images" for name in CLASSES]].any(axis="columns").all():
        reason += f"; if the test set has none either, {value:.3f} ({low:.3f} to {high:.3f})"
    _, other_low, other_high = if_present.summarize(rng, total, expected_prevalence, effect)
    return ExpectedAccuracy(np.nan, min(low, other_low), max(high, other_high), method, reason, table)


class _Draws:
    """Sums over the strata, (DRAWS,): positive images and right predictions."""

    def __init__(self) -> None:
        self.positives, self.right = np.zeros((2, DRAWS))

    def add(self, positives: np.ndarray, right: np.ndarray) -> None:
        self.positives += positives
        self.right += right

    def allows(self, total: int, prevalence: float) -> bool:
        """Return whether the predictions on `total` images do not exclude a prevalence."""
        low, high = percentile_ends(self.positives / total)
        return low <= prevalence <= high

    def summarize(
        self, rng: np.random.Generator, total: int, expected_prevalence: float | None, design_effect: float
    ) -> tuple[float, float, float]:
        """Return the median and the ends of the 95 % range of the accuracy of `total` images."""
        chosen = np.arange(DRAWS)
        if expected_prevalence is not None and self.allows(total, expected_prevalence):
            variance = expected_prevalence * (1 - expected_prevalence) * design_effect / total
            weights = np.exp(-((self.positives / total - expected_prevalence) ** 2) / (2 * variance))
            chosen = rng.choice(DRAWS, DRAWS, p=weights / weights.sum())
        accuracy = self.right[chosen] / total
        return float(np.median(accuracy)), *percentile_ends(accuracy)


def _tabulate_strata(
    labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, test_predicted: np.ndarray, strata: Strata
) -> pd.DataFrame:
    rows = []
    for stratum in np.unique(strata.test):
        in_test, in_validation = strata.test == stratum, strata.validation == stratum
        row = {
            "stratum": stratum, "images": int(in_test.sum()),
            "predicted_positive_images": int(test_predicted[in_test].sum()),
        }  # fmt: skip
        for label, metric in ((1, "sensitivity"), (0, "specificity")):
            cell = in_validation & (labels == label)
            row[f"{CLASSES[label]}_images"] = int(cell.sum())
            row[f"{CLASSES[label]}_patients"] = len(np.unique(groups[cell]))
            row[metric] = float((predicted[cell] == label).mean()) if cell.any() else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _draw_rate(rng: np.random.Generator, size: int, rate: float, design_effect: float) -> np.ndarray:
    """Draw sensitivities or specificities, (DRAWS,), from the posterior distribution; from the prior for size 0."""
    effective = size / design_effect
    successes = rate * effective if size else 0.0
    return np.asarray(rng.beta(successes + PRIOR, effective - successes + PRIOR, DRAWS))


def _draw_stratum(
    rng: np.random.Generator,
    positive: int,
    count: int,
    sensitivity: np.ndarray,
    specificity: np.ndarray,
    design_effect: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the prevalence and the number of right predictions among `count` images, `positive` of them predicted so.

    Sensitivity and specificity, (DRAWS,), are drawn again with the likelihood of the number of predicted positives as
    the weight (sampling importance resampling, Rubin 1988).
    """
    prevalence = (rng.permutation(DRAWS) + 0.5) / DRAWS
    true, false = prevalence * sensitivity, (1 - prevalence) * (1 - specificity)
    share = np.clip(true + false, 1e-12, 1 - 1e-12)
    log_likelihood = (positive * np.log(share) + (count - positive) * np.log1p(-share)) / design_effect
    weights = np.exp(log_likelihood - log_likelihood.max())
    chosen = rng.choice(DRAWS, DRAWS, p=weights / weights.sum())
    ppv = (true / share)[chosen]
    npv = ((1 - prevalence) * specificity / (1 - share))[chosen]
    right = _draw_count(rng, positive, ppv, design_effect) + _draw_count(rng, count - positive, npv, design_effect)
    return prevalence[chosen], right


def _draw_count(rng: np.random.Generator, size: int, probability: np.ndarray, design_effect: float) -> np.ndarray:
    """Draw a binomial number whose variance is `design_effect` times as large."""
    effective = max(round(size / design_effect), 1) if size else 0
    return np.asarray(rng.binomial(effective, np.clip(probability, 0, 1)) * (size / effective if size else 0.0))


def _design_effect(correct: np.ndarray, selected: np.ndarray, groups: np.ndarray, strata: np.ndarray) -> float:
    """Return the variance of the share of right predictions over that of independent images (Kish 1965).

    It lies between 1 and that of groups whose images are all right or all wrong, which it is without a wrong one.
    """
    if not selected.any():
        return 1.0
    _, index = np.unique(groups[selected], return_inverse=True)
    largest, count = mean_group_size(index), index.max() + 1
    values = pd.Series(correct[selected].astype(float))
    residuals = (values - values.groupby(strata[selected]).transform("mean")).to_numpy()
    if count < 2 or not residuals.any():
        return largest
    by_group = np.bincount(index, residuals)
    ratio = (by_group**2).sum() / (residuals**2).sum() * count / (count - 1)
    return float(np.clip(ratio, 1, largest))


def _test_design_effect(
    effects: Mapping[int, float], labels: np.ndarray, groups: np.ndarray, test_groups: np.ndarray | None
) -> float:
    """Return the design effect of the test images: that of the class whose errors have more in common.

    Of known groups, it follows from the intraclass correlation (Kish 1965) of the validation images, or from 1, the
    largest that there can be, where no group has two of a class.
    """
    if test_groups is None:
        return max(effects.values())
    sizes = {label: mean_group_size(groups[labels == label]) for label in np.unique(labels)}
    correlations = ((effects[label] - 1) / (size - 1) for label, size in sizes.items() if size > 1)
    return 1 + max(correlations, default=1.0) * (mean_group_size(test_groups) - 1)


def _unknown_reason(table: pd.DataFrame, total: int) -> str:
    """Say which strata of the test images lack which class in the validation set; empty if none does."""
    parts = []
    for row in table.to_dict("records"):
        missing = [name for name in CLASSES if not row[f"{name}_images"]]
        kind = f"{missing[0]} " if len(missing) == 1 else ""
        of = (
            f"is of {row['stratum']}, as {100 * row['images'] / total:.0f} % of the test images are"
            if row["stratum"]
            else "exists"
        )
        if missing:
            parts.append(f"no {kind}validation image {of}")
    return f"cannot be estimated: {'; '.join(parts)}" if parts else ""
