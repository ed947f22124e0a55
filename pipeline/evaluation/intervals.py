"""95 % confidence intervals over patients: of metrics, of differences between two models, and by a bootstrap.

The interval of each metric is one that covered in `bench/coverage.py`; docs/evaluation.md has its table. Images of one
group (patient) are dependent, and every interval allows for that. The numbers of positive and negative images count as
fixed: metrics that depend on the prevalence are those at the prevalence of the set. Only the interval of the
calibration intercept, which says whether that prevalence is the predicted one, allows for their variation.
"""

from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, gammaincinv, logit, ndtr, ndtri, owens_t, stdtr, stdtrit

from pipeline.evaluation import influence
from pipeline.evaluation.calibration_regression import fit_calibration
from pipeline.evaluation.metrics import (
    CALIBRATION_METRICS,
    CONFIDENCE_LEVEL,
    DEFAULT_THRESHOLD,
    THRESHOLD_METRICS,
    UNDEFINED_REASONS,
    compute_metrics,
    has_single_class,
    mean_group_size,
    metrics_of_counts,
)

QUANTILES = [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2]
NORMAL_QUANTILE = float(ndtri(QUANTILES[1]))
LOG2_DRAWS = 12  # of sensitivity and specificity
MAX_POISSON_COUNT = 3  # errors, or correct images
MIN_ERRORS = 3  # groups with an image whose P(positive) is on the wrong side of one half
DISAGREEMENT = 0.5  # of a group per class, added to the standard errors of differences between two models
EPS = 1e-12  # smallest difference between values, and of roots from 0, 1 and the estimate
ONE_GROUP = "one patient only"
ONE_GROUP_IN_CLASS = "images of one class are from one patient only"
NO_DIFFERENCE = "the two do not differ on these images, which are too few for an interval"
NO_VARIATION = "it does not vary between patients: too few images for an interval"
FEW_ERRORS = f"fewer than {MIN_ERRORS} patients with a probability on the wrong side of 0.5: too few for an interval"
NO_VALID_INTERVAL = "it is biased upwards, so no interval covers; see intercept and slope"


def design_effect(values: np.ndarray, groups: np.ndarray) -> float:
    """Return the variance of a mean over that of as many independent images.

    It is estimated by a jackknife over groups, and limited to the range that intraclass correlations from 0 to 1 allow
    (Kish 1965); where all values are equal, the latter is assumed.

    Args:
        values: (N,), such as 1 for a correctly classified image and 0 for another.
        groups: (N,), the name of each image's group; at least two groups.
    """
    values = np.asarray(values, dtype=float)
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    count, group_count = len(values), len(sizes)
    highest = mean_group_size(index)
    deviations = values - values.mean()
    if np.ptp(values) < EPS:
        return highest
    independent = (deviations**2).mean() / (count - 1)
    # Without a group, the mean changes by its deviation / (1 - leverage).
    changes = np.bincount(index, deviations) / (count - sizes)
    variance = (group_count - 1) / group_count * ((changes - changes.mean()) ** 2).sum()
    return min(max(float(variance / independent), 1.0), highest)


def effective_size(values: np.ndarray, groups: np.ndarray) -> float:
    """Return how many independent images carry as much information on a mean as these (Korn and Graubard 1998).

    Args:
        values: (N,), such as 1 for a correctly classified image and 0 for another.
        groups: (N,), the name of each image's group.

    Returns:
        N if every image is its own group; NaN for fewer than two groups.
    """
    group_count = len(np.unique(groups))
    if group_count < 2:
        return np.nan
    return len(values) / design_effect(values, groups) * t_correction(len(values), group_count)


def t_correction(count: float, group_count: int) -> float:
    """Return the factor by which few groups reduce an effective size, from quantiles of t."""
    quantiles = stdtrit(np.array([count, group_count]) - 1, QUANTILES[1])
    return float((quantiles[0] / quantiles[1]) ** 2)


def wilson_quantiles(proportion: float, size: float, quantiles: np.ndarray) -> np.ndarray:
    """Return the confidence distribution of a proportion that has Wilson's limits (1927) as its quantiles.

    Where at most `MAX_POISSON_COUNT` images are on one side, the limit on that side is the Poisson one of Brown, Cai
    and DasGupta (2001, section 4.1.1), because Wilson's covers too rarely for true proportions close to 0 and 1.

    Args:
        proportion: observed, in [0, 1].
        size: the (effective) number of images.
        quantiles: (D,), of the standard normal distribution; ∓1.96 give the ends of the 95 % interval.
    """
    center = proportion + quantiles**2 / (2 * size)
    spread = quantiles * np.sqrt(proportion * (1 - proportion) / size + quantiles**2 / (4 * size**2))
    values = (center + spread) / (1 + quantiles**2 / size)
    tails = 2 * ndtr(-np.abs(quantiles))
    if 0 < size * (1 - proportion) <= MAX_POISSON_COUNT:
        poisson = 1 - gammaincinv(size * (1 - proportion), tails) / size
        values = np.where(quantiles > 0, np.maximum(values, poisson), values)
    if 0 < size * proportion <= MAX_POISSON_COUNT:
        poisson = gammaincinv(size * proportion, tails) / size
        values = np.where(quantiles < 0, np.minimum(values, poisson), values)
    return np.asarray(np.clip(values, 0, 1))


def draw_rates(
    labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, bias: tuple[float, float] = (0.0, 0.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Draw sensitivity and specificity from their confidence distributions, `wilson_quantiles` at the effective sizes.

    The quantiles of a function of the two, such as `prevalence.metrics_at_prevalence`, are its interval, as in Mossman
    and Berger (2001), who draw from Jeffreys' posteriors. Patients with images of both classes make the two dependent,
    by a normal copula. The draws are the same at every call.

    Args:
        labels: (N,), 0 or 1.
        predicted: (N,), the predicted labels, 0 or 1.
        groups: (N,), the name of each image's group.
        bias: of the observed sensitivity and specificity, which is subtracted from them.

    Returns:
        Sensitivity (D,) and specificity (D,); NaN where the class has fewer than two groups.
    """
    labels, hits = np.asarray(labels, dtype=int), np.asarray(predicted, dtype=int) == labels
    normal = _normal_draws().copy()
    correlation = _class_correlation(labels, hits, groups)
    normal[:, 1] = correlation * normal[:, 0] + np.sqrt(1 - correlation**2) * normal[:, 1]
    rates = []
    for label, column in ((1, 0), (0, 1)):
        rows = labels == label
        size = effective_size(hits[rows], groups[rows]) if rows.any() else np.nan
        rate = np.clip(hits[rows].mean() - bias[column], 0, 1) if rows.any() else np.nan
        rates.append(wilson_quantiles(rate, size, normal[:, column]))
    return rates[0], rates[1]


def confidence_intervals(
    labels: np.ndarray,
    predicted: np.ndarray,
    groups: np.ndarray,
    probabilities: np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> pd.DataFrame:
    """Compute the 95 % confidence interval of every metric of one model.

    Args:
        labels: (N,), 0 or 1.
        predicted: (N,), the predicted labels, 0 or 1.
        groups: (N,), the name of each image's group.
        probabilities: (N,), P(positive), if the model has any.
        scores: (N,), by which images are ranked; by default, the probabilities.

    Returns:
        A row per metric of `compute_metrics` and, given probabilities, of `CALIBRATION_METRICS`: `metric`, `value`,
        `low`, `high`, `method` and, where the value or its interval is missing, the `reason`.
    """
    labels, predicted, groups = np.asarray(labels, dtype=int), np.asarray(predicted, dtype=int), np.asarray(groups)
    values = dict(compute_metrics(labels, predicted, probabilities, np.ones((1, len(labels))), scores).iloc[0])
    intervals = _threshold_intervals(labels, predicted, groups)
    group_count = smaller_group_count(labels, groups)
    if probabilities is not None:
        probabilities = np.asarray(probabilities, dtype=float)
        ranking = probabilities if scores is None else np.asarray(scores, dtype=float)
        estimates, deviations = fit_calibration(labels, probabilities)
        values |= dict(zip(CALIBRATION_METRICS, estimates, strict=True))
        if group_count > 1:
            intervals |= _loss_intervals(labels, probabilities, groups)
            intervals |= _calibration_intervals(labels, groups, estimates, deviations)
            if not has_single_class(labels):
                intervals |= _ranking_intervals(labels, ranking, groups, values)
        if _has_few_errors(labels, groups, probabilities):
            intervals |= dict.fromkeys(("loss", "brier", *CALIBRATION_METRICS), Interval(reason=FEW_ERRORS))
        intervals["calibration_error"] = Interval(reason=NO_VALID_INTERVAL)
    rows, one_group = [], Interval(reason=ONE_GROUP if len(np.unique(groups)) == 1 else ONE_GROUP_IN_CLASS)
    for metric, value in values.items():
        interval = intervals.get(str(metric), one_group)
        if np.isnan(value):
            interval = Interval(reason=UNDEFINED_REASONS[str(metric)])
        elif len(np.unique(groups)) == 1 and metric != "calibration_error":
            interval = one_group
        elif interval.high - interval.low < EPS:
            interval = Interval(reason=NO_VARIATION)
        low, high = min(interval.low, value), max(interval.high, value)  # rounding can put the value outside
        if interval.reason:
            low = high = np.nan
        rows.append(
            {"metric": metric, "value": value, "low": low, "high": high, "method": interval.method}
            | {"reason": interval.reason}
        )
    return pd.DataFrame(rows)


def auroc_variance(auroc: float, positives: float, negatives: float) -> float:
    """Return the variance of the AUROC of independent, normally distributed scores with equal variances.

    It has the form of Hanley and McNeil's (1982), who assume exponentially distributed scores.

    Args:
        auroc: true, in (0, 1).
        positives: the number of positive images.
        negatives: the number of negative images.
    """
    # The probability that one image ranks above each of two images of the other class.
    above_two = auroc - 2 * owens_t(ndtri(auroc), np.sqrt(1 / 3))
    shared = max(positives + negatives - 2, 0) * (above_two - auroc**2)
    return float(auroc * (1 - auroc) + shared) / (positives * negatives)


def auroc_interval(auroc: float, positives: float, negatives: float, inflation: float = 1) -> tuple[float, float]:
    """Return the ends of a score interval of the AUROC: all values that the observed one does not contradict.

    As in Newcombe (2006, doi:10.1002/sim.2324, method 5), the variance is that at the hypothesized value, so that it is
    not underestimated where the observed AUROC is close to 1.

    Args:
        auroc: observed, in [0, 1].
        positives: the (effective) number of positive images.
        negatives: the (effective) number of negative images.
        inflation: factor of `auroc_variance`.
    """

    def deviation(hypothesis: float, sign: int) -> float:
        variance = max(inflation * auroc_variance(hypothesis, positives, negatives), 0)
        return float(sign * (hypothesis - auroc) - NORMAL_QUANTILE * np.sqrt(variance))

    low, high = 0.0, 1.0
    if auroc > 2 * EPS:
        low = brentq(lambda hypothesis: deviation(hypothesis, -1), EPS, auroc - EPS)
    if auroc < 1 - 2 * EPS:
        high = brentq(lambda hypothesis: deviation(hypothesis, 1), auroc + EPS, 1 - EPS)
    return low, high


def metrics_of_rates(positives: int, negatives: int, sensitivity: np.ndarray, specificity: np.ndarray) -> np.ndarray:
    """Return `THRESHOLD_METRICS`, (D, metrics), of a set with these numbers of images at the rates (D,)."""
    return metrics_of_counts(
        positives * sensitivity, negatives * (1 - specificity), positives * (1 - sensitivity), negatives * specificity
    )


class Interval(NamedTuple):
    low: float = np.nan
    high: float = np.nan
    method: str = ""
    reason: str = ""


@cache
def _normal_draws() -> np.ndarray:
    """Return evenly spread draws (D, 2) of two independent standard normal variables (Sobol 1967)."""
    from scipy.stats import qmc

    return np.asarray(ndtri(qmc.Sobol(2, rng=0).random_base2(LOG2_DRAWS)))


def _class_correlation(labels: np.ndarray, hits: np.ndarray, groups: np.ndarray) -> float:
    """Return the correlation of sensitivity and specificity; 0 if no patient has images of both classes."""
    _, index = np.unique(groups, return_inverse=True)
    sums = []
    for label in (0, 1):
        rows = labels == label
        deviations = hits[rows] - (hits[rows].mean() if rows.any() else 0)
        sums.append(np.bincount(index[rows], deviations, index.max() + 1))
    scale = np.sqrt((sums[0] ** 2).sum() * (sums[1] ** 2).sum())
    return float(np.clip((sums[0] * sums[1]).sum() / scale, -1, 1)) if scale > 0 else 0.0  # rounding


def _threshold_intervals(labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray) -> dict[str, Interval]:
    positives, negatives = labels.sum(), (1 - labels).sum()
    rates = draw_rates(labels, predicted, groups)
    # A class without images contributes nothing.
    sensitivity, specificity = (
        draws if count else np.zeros_like(draws) for draws, count in zip(rates, (positives, negatives), strict=True)
    )
    draws = metrics_of_rates(positives, negatives, sensitivity, specificity)
    intervals = {}
    for metric, draw in zip(THRESHOLD_METRICS, draws.T, strict=True):
        if np.isnan(draw).all():
            intervals[metric] = Interval(reason=ONE_GROUP_IN_CLASS)
        else:
            low, high = np.nanquantile(draw, QUANTILES)
            intervals[metric] = Interval(float(low), float(high), "Wilson, combined")
    for metric, label in (("recall", 1), ("specificity", 0)):
        rows = labels == label
        size = effective_size(predicted[rows] == label, groups[rows]) if rows.any() else np.nan
        if not np.isnan(size):
            limits = np.array([-NORMAL_QUANTILE, NORMAL_QUANTILE])
            low, high = wilson_quantiles((predicted[rows] == label).mean(), size, limits)
            intervals[metric] = Interval(float(low), float(high), "Wilson")
    return intervals


def _loss_intervals(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray) -> dict[str, Interval]:
    """Compute intervals of the mean losses on a log scale, with the quantile of t."""
    losses = influence.image_losses(labels, probabilities)
    means = losses.mean(axis=0)
    deviations = influence.center_by_class(losses, labels) / len(labels)
    half_widths = _half_widths(deviations, labels, groups)
    factors = np.exp(half_widths / np.maximum(means, EPS))
    return {
        metric: Interval(mean / factor, mean * factor, "log-scale t")
        for metric, mean, factor in zip(("loss", "brier"), means, factors, strict=True)
    }


def _ranking_intervals(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, values: dict[str, float]
) -> dict[str, Interval]:
    """Compute intervals of AUROC and average precision; both classes must occur."""
    deviations = np.column_stack(
        [influence.auroc_influence(labels, scores), influence.average_precision_influence(labels, scores)]
    )
    variance = influence.clustered_covariance(deviations, labels, groups)[0, 0]
    rows = [labels == label for label in (1, 0)]
    placements = [(deviations[of_class, 0], groups[of_class]) for of_class in rows]
    value, inflation = values["auroc"], 1.0
    if 0 < value < 1:
        # Unequal variances of the scores make the true variance larger than that of the model.
        sizes = [len(placement) / design_effect(placement, of_groups) for placement, of_groups in placements]
        inflation = max(inflation, variance / auroc_variance(value, sizes[0], sizes[1]))
    positives, negatives = (effective_size(*placement) for placement in placements)
    auroc = Interval(*auroc_interval(value, positives, negatives, inflation), "score")
    value = values["average_precision"]
    if value < 1 - EPS:
        half_width = _half_widths(deviations, labels, groups)[1] / (value * (1 - value))
        low, high = expit(logit(value) + np.array([-half_width, half_width]))
        return {"auroc": auroc, "average_precision": Interval(float(low), float(high), "logit t")}
    low = wilson_quantiles(1, effective_size(labels[rows[0]], groups[rows[0]]), np.array([-NORMAL_QUANTILE]))[0]
    return {"auroc": auroc, "average_precision": Interval(float(low), 1, "Wilson")}


def _calibration_intervals(
    labels: np.ndarray, groups: np.ndarray, estimates: np.ndarray, deviations: np.ndarray
) -> dict[str, Interval]:
    """Compute intervals of intercept and slope.

    The intercept compares the mean probability with the share of positives, so that its variance includes that of the
    share: the class sizes are not taken as fixed, as they are for all other metrics.
    """
    one_stratum = np.zeros_like(labels)
    variances = [
        influence.clustered_covariance(influence.center_by_class(column[:, None], strata), strata, groups)[0, 0]
        for column, strata in zip(deviations.T, (one_stratum, labels), strict=True)
    ]
    half_widths = stdtrit(smaller_group_count(labels, groups) - 1, QUANTILES[1]) * np.sqrt(variances)
    return {
        metric: Interval(estimate - half_width, estimate + half_width, "robust t")
        for metric, estimate, half_width in zip(CALIBRATION_METRICS, estimates, half_widths, strict=True)
    }


def _has_few_errors(labels: np.ndarray, groups: np.ndarray, *models: np.ndarray | None) -> bool:
    """Return whether in too few groups P(positive), by any of the models, is on the wrong side of the threshold."""
    wrong = [(model >= DEFAULT_THRESHOLD) != (labels == 1) for model in models if model is not None]
    return len(np.unique(groups[np.any(wrong, axis=0)])) < MIN_ERRORS


def _half_widths(deviations: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the quantile of t times the standard errors, (K,), from influences (N, K)."""
    errors = np.sqrt(np.diag(influence.clustered_covariance(deviations, labels, groups)))
    return np.asarray(stdtrit(smaller_group_count(labels, groups) - 1, QUANTILES[1]) * errors)


def smaller_group_count(labels: np.ndarray, groups: np.ndarray) -> int:
    """Return the number of groups of the class that has fewer of them, among the classes that occur."""
    return min(len(np.unique(groups[labels == label])) for label in np.unique(labels))


class HasPredictions(Protocol):
    """Predicted labels (N,), and P(positive) and the scores that images are ranked by (N,), if there are any."""

    @property
    def predicted(self) -> np.ndarray: ...
    @property
    def probabilities(self) -> np.ndarray | None: ...
    @property
    def scores(self) -> np.ndarray | None: ...


def compare_predictions(
    labels: np.ndarray, groups: np.ndarray, ours: HasPredictions, theirs: HasPredictions, margin: float = 0
) -> pd.DataFrame:
    """Compare two models on the same images, with 95 % confidence intervals from the jackknife over groups.

    To metrics of predicted labels, the disagreement of half a group per class is added, because two models that agree
    on few images are not equal on all others (as Agresti and Min 2005 add half an image to every cell).

    Args:
        labels: (N,), 0 or 1.
        groups: (N,), the name of each image's group.
        ours: predictions of one model.
        theirs: those of the other.
        margin: difference above which ours counts as greater.

    Returns:
        A row per metric that both have, calibration apart: `metric`, `difference` (ours minus theirs), `low`, `high`,
        `probability`, the confidence in a difference above the margin, and, where anything is missing, the `reason`.
    """
    labels, groups = np.asarray(labels, dtype=int), np.asarray(groups)
    (our_values, our_deviations), (their_values, their_deviations) = (
        _metrics_and_influence(labels, model) for model in (ours, theirs)
    )
    metrics = [metric for metric in our_values if metric in their_values]
    deviations = np.column_stack([our_deviations[metric] - their_deviations[metric] for metric in metrics])
    variances = np.diag(influence.clustered_covariance(deviations, labels, groups)).copy()
    variances[: len(THRESHOLD_METRICS)] += DISAGREEMENT**2 * _disagreement_variances(labels, groups, ours, theirs)
    group_count = smaller_group_count(labels, groups)
    rows = []
    for metric, variance in zip(metrics, variances, strict=True):
        difference, low, high, probability, reason = our_values[metric] - their_values[metric], *(np.nan,) * 3, ""
        if np.isnan(difference):
            reason = UNDEFINED_REASONS[metric]
        elif np.isnan(variance) or group_count == 1:
            reason = ONE_GROUP if len(np.unique(groups)) == 1 else ONE_GROUP_IN_CLASS
        elif variance == 0:
            reason = NO_DIFFERENCE
        elif metric in ("loss", "brier") and _has_few_errors(labels, groups, ours.probabilities, theirs.probabilities):
            reason = FEW_ERRORS
        else:
            error = float(np.sqrt(variance))
            half_width = float(stdtrit(group_count - 1, QUANTILES[1])) * error
            low, high = difference - half_width, difference + half_width
            probability = float(stdtr(group_count - 1, (difference - margin) / error))
        rows.append((metric, difference, low, high, probability, reason))
    return pd.DataFrame(rows, columns=["metric", "difference", "low", "high", "probability", "reason"])


def _metrics_and_influence(labels: np.ndarray, model: HasPredictions) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return metrics, and the influence of every image on each (N,); no influence on a metric that is undefined."""
    predicted, probabilities = np.asarray(model.predicted, dtype=int), model.probabilities
    unit = np.ones((1, len(labels)))
    table = compute_metrics(labels, predicted, probabilities, unit, model.scores)
    values = {str(metric): float(value) for metric, value in table.iloc[0].items() if metric != "calibration_error"}
    deviations = dict(zip(THRESHOLD_METRICS, influence.threshold_influence(labels, predicted).T, strict=True))
    if probabilities is not None:
        probabilities = np.asarray(probabilities, dtype=float)
        scores = probabilities if model.scores is None else np.asarray(model.scores, dtype=float)
        losses = influence.image_losses(labels, probabilities)
        deviations |= dict(
            zip(("loss", "brier"), influence.center_by_class(losses, labels).T / len(labels), strict=True)
        )
        if not has_single_class(labels):
            deviations["auroc"] = influence.auroc_influence(labels, scores)
            deviations["average_precision"] = influence.average_precision_influence(labels, scores)
    nothing = np.full(len(labels), np.nan)
    return values, {metric: deviations.get(metric, nothing) for metric in values}


def _disagreement_variances(
    labels: np.ndarray, groups: np.ndarray, ours: HasPredictions, theirs: HasPredictions
) -> np.ndarray:
    """Return the squared change of each difference if one group of each class were classified otherwise, (metrics,)."""
    our_gradient, their_gradient = (influence.threshold_gradient(labels, model.predicted) for model in (ours, theirs))
    tp, fp, fn, tn = (our_gradient + their_gradient) / 2
    variances = np.zeros(len(THRESHOLD_METRICS))
    for label, change in ((1, tp - fn), (0, tn - fp)):
        selected = labels == label
        if selected.any():
            variances += (change * mean_group_size(groups[selected])) ** 2
    return variances


def bootstrap_weights(groups: np.ndarray, count: int) -> np.ndarray:
    """Draw whole groups with replacement (Efron and Tibshirani 1993): images of one patient are not independent.

    Args:
        groups: (N,), the name of each image's group.
        count: number of resamples.

    Returns:
        (1 + count, N), how often each resample contains each image. The first row is the original set, all ones. It is
        the only row if there is only one group, because resampling one group has no variation.
    """
    _, index = np.unique(groups, return_inverse=True)
    size = index.max() + 1
    drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=count if size > 1 else 0)
    return np.concatenate([np.ones((1, len(index)), np.int32), drawn.astype(np.int32)[:, index]])


def percentile_interval(sample: pd.Series) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of a metric.

    Args:
        sample: (1 + resamples,), the value on the original set, then those on the resamples.

    Returns:
        NaN where the original value or every resampled value is missing.
    """
    resampled = sample.to_numpy()[1:]
    resampled = resampled[~np.isnan(resampled)]
    if not len(resampled) or np.isnan(sample[0]):
        return np.nan, np.nan
    return percentile_ends(resampled)


def percentile_ends(sample: np.ndarray) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile of (R,)."""
    low, high = np.quantile(sample, QUANTILES)
    return float(low), float(high)
