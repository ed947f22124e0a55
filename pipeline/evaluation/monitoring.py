"""Comparison of the images that came in with those that a model was trained and validated on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from pipeline.evaluation import dataset_shift
from pipeline.evaluation.calibration import log_odds
from pipeline.evaluation.dataset_shift import SIGNIFICANCE_LEVEL
from pipeline.evaluation.prevalence import AT_BORDER, RESAMPLES, PrevalenceEstimate, estimate_prevalence

NEIGHBORS = 5  # whose mean distance says how unusual an image is
# Of the distances, which then weigh the few far ones: a few photographs among radiographs are found far more often, but
# with a higher power, logs without a shift differ too often (by simulation).
TAIL_POWER = 6
OUTLIER_PERCENTILE = 99  # of the distances of validation images
CHUNK_SIZE = 1000  # images whose distances are in memory
MIN_IMAGES = 20  # that are compared; of fewer only the largest differences would be found
MAX_IMAGES = 5000  # from which the prevalence is estimated; the shift tests take fewer
MAX_SENTENCE_FEATURES = 4
LARGE_DIFFERENCE = 0.5  # standard deviations
MIN_SCALE = 1e-6  # of a figure, for one that is constant
FARTHEST = 10  # images that are listed
MAX_PERIODS = 45  # longer logs are shown by week, and then by month
PREVALENCE = "prevalence"  # the test of label shift, among those of the features


@dataclass(frozen=True)
class Feature:
    """A figure of an image: its label with the unit, what images with less and with more of it are, and its scale."""

    label: str
    less: str
    more: str
    convert: Callable[[float], float] = lambda value: value


def _exp_less_half(value: float) -> float:
    return float(np.exp(value)) - 0.5


ACQUISITION_FEATURES = {  # those of `acquisition.compute_features`, and brightness and contrast
    "brightness": Feature("mean gray level", "darker", "brighter"),
    "contrast": Feature("standard deviation of the gray levels", "lower in contrast", "higher in contrast"),
    "size": Feature("megapixels", "smaller", "larger", lambda value: float(np.exp(value)) / 1e6),
    "aspect": Feature("width / height", "narrower", "wider", np.exp),
    "bytes_per_pixel": Feature("bytes per pixel", "more compressed", "less compressed", np.exp),
    "quantization": Feature("JPEG quantization step", "JPEGs of higher quality", "JPEGs of lower quality", np.exp),
    "noise": Feature("noise, gray levels", "less noisy", "noisier", _exp_less_half),
    "detail": Feature("detail, gray levels", "blurrier", "sharper", _exp_less_half),
    "black_border": Feature("black share of the border", "less bordered in black", "more bordered in black"),
}
IS_JPEG = "jpeg"  # computed from `quantization`
COMPARED_FEATURES = ACQUISITION_FEATURES | {
    IS_JPEG: Feature("share of JPEG files", "less often JPEG files", "more often JPEG files")
}
CATEGORIES = ["view", "manufacturer"]  # known of DICOM files


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        tests: a row per test: `features`, `images` (of the log), `auroc`, `p`, `adjusted_p` (Holm, over all rows), and
            `reason`, why there is no test. The last row, `PREVALENCE`, is that of label shift, from `prevalence_p`.
        prevalence: the estimate under label shift.
        expected_prevalence: with which it is compared.
        acquisition: a row per `feature` of `COMPARED_FEATURES`: the means `reference` and `new` (geometric ones of
            what is a logarithm), and their `difference` in standard deviations; the reference is weighted to the
            prevalence of the new images.
        categories: a row per view and manufacturer: `field`, `value`, and the shares `reference` and `new`, NaN where
            none is known.
        farthest: the images with the largest distance: `sha256`, `time`, `probability` and `distance`, in multiples of
            that from which an image is an outlier.
        periods: a row per period: `period`, its first day; `images`, and the means `probability`, `positive`,
            `agreement`, `outliers` and `brightness`.
        unit: day, week or month.
        reference: the same means of the validation images.
    """

    tests: pd.DataFrame
    prevalence: PrevalenceEstimate
    expected_prevalence: float
    acquisition: pd.DataFrame
    categories: pd.DataFrame
    farthest: pd.DataFrame
    periods: pd.DataFrame
    unit: str
    reference: pd.Series

    @property
    def failed(self) -> pd.DataFrame:
        """The rows of `tests` whose adjusted p is below the significance level."""
        return self.tests[self.tests["adjusted_p"] < SIGNIFICANCE_LEVEL]

    @property
    def has_covariate_shift(self) -> bool:
        """Whether the images differ in more than the shares of the classes."""
        return bool((self.failed["features"] != PREVALENCE).any())

    @property
    def has_label_shift(self) -> bool:
        """Whether the share of positives differs."""
        return bool((self.failed["features"] == PREVALENCE).any())


def compare(reference: pd.DataFrame, new: pd.DataFrame, expected_prevalence: float | None = None) -> Comparison:
    """Test whether new images are distributed like the images of a model, except for the share of positives.

    Each set of features is tested by `dataset_shift.shift_table`, which allows for label shift, and the share of
    positives by `prevalence_p`. P-values are adjusted together, so that a log without any shift is found to differ with
    a probability of at most `SIGNIFICANCE_LEVEL`.

    Args:
        reference: a row per labeled image: `label`, `group`, `CATEGORIES`, `ACQUISITION_FEATURES`; and for validation
            images, NaN for others, `score`, `probability` and `predicted` of the model, and `embedding`, None where not
            computed.
        new: a row per image, each once: `time`, `sha256`, `score`, `probability`, `label` (predicted), `agreement`,
            `embedding`, `CATEGORIES` and `ACQUISITION_FEATURES`.
        expected_prevalence: the share of positives that is no shift; by default that of the validation images.
    """
    validation = reference[reference["score"].notna()]
    embedded = reference[reference["embedding"].notna()]
    features, new_features = (np.stack(table["embedding"].tolist()).astype(float) for table in (embedded, new))
    groups = embedded["group"].to_numpy()
    distances = nearest_distances(features, features, groups)
    new_distances = nearest_distances(features, new_features)
    threshold = float(np.percentile(distances, OUTLIER_PERCENTILE))
    tail, new_tail = ((values[:, None] / np.median(distances)) ** TAIL_POWER for values in (distances, new_distances))
    acquisition, new_acquisition = (_acquisition(table) for table in (reference, new))
    logits, new_logits = (log_odds(table["score"].to_numpy())[:, None] for table in (validation, new))
    feature_sets = {
        "score": (validation, logits, new_logits),
        "embedding": (embedded, features, new_features),
        "distance": (embedded, tail, new_tail),
        "acquisition": (reference, acquisition.to_numpy(), new_acquisition.to_numpy()),
    }
    tests = [_test(feature_sets), *(_test_category(reference, new, field) for field in CATEGORIES)]
    estimate = _estimate_prevalence(validation, new)
    expected = float(validation["label"].mean()) if expected_prevalence is None else expected_prevalence
    row = {
        "features": PREVALENCE, "images": min(len(new), MAX_IMAGES), "reason": estimate.reason,
        "p": np.nan if estimate.reason else prevalence_p(
            validation["label"].to_numpy(int), validation["score"].to_numpy(), validation["group"].to_numpy(),
            new["score"].to_numpy(), expected_prevalence,
        ),
    }  # fmt: skip
    table = pd.concat([*tests, pd.DataFrame([row])], ignore_index=True)
    table["adjusted_p"] = dataset_shift.adjust_for_multiplicity(table["p"].to_numpy())
    is_outlier = new_distances > threshold
    periods, unit = _aggregate(new.assign(outliers=is_outlier))
    farthest = new[["sha256", "time", "probability"]].assign(distance=new_distances / threshold)
    share = float(table.set_index("features")["prevalence"]["acquisition"])
    weights = _class_weights(reference["label"].to_numpy(int), share)
    return Comparison(
        tests=table,
        prevalence=estimate,
        expected_prevalence=expected,
        acquisition=_compare_acquisition(acquisition, new_acquisition, weights),
        categories=pd.concat([_compare_category(reference, new, field) for field in CATEGORIES], ignore_index=True),
        farthest=farthest.nlargest(FARTHEST, "distance"),
        periods=periods,
        unit=unit,
        reference=pd.Series({
            "probability": validation["probability"].mean(), "positive": validation["predicted"].mean(),
            "outliers": (distances > threshold).mean(), "brightness": validation["brightness"].mean(),
        }),
    )  # fmt: skip


def nearest_distances(reference: np.ndarray, points: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Return the mean distance of each point to its `NEIGHBORS` nearest reference points of other groups.

    Args:
        reference: (N, D).
        points: (M, D).
        groups: (N,), if the points are those of the reference; None if they are others.
    """
    chunks = []
    for start in range(0, len(points), CHUNK_SIZE):
        distances = cdist(points[start : start + CHUNK_SIZE], reference)
        if groups is not None:
            distances[groups[start : start + CHUNK_SIZE, None] == groups] = np.inf
        nearest = np.sort(np.partition(distances, min(NEIGHBORS, len(reference)) - 1)[:, :NEIGHBORS])
        chunks.append(nearest.mean(axis=1))
    return np.concatenate(chunks)


def describe(comparison: Comparison) -> list[str]:
    """Say in sentences what was found; the first says whether anything was."""
    tested = comparison.tests[comparison.tests["p"].notna()]
    sentences = []
    if comparison.has_covariate_shift:
        sentences.append("The images that came in are not like those that the model was trained and validated on.")
        sentences += [
            _describe_failure(comparison, row)
            for row in comparison.failed.to_dict("records")
            if row["features"] != PREVALENCE
        ]
    elif comparison.has_label_shift:
        sentences.append("The images that came in are like those of the model, but the share of positives differs.")
    else:
        sentences.append(
            f"No difference was found (lowest adjusted p = {tested['adjusted_p'].min():.3f}, level "
            f"{SIGNIFICANCE_LEVEL}). With few images only large differences are found."
        )
    if not comparison.prevalence.reason:
        sentences.append(_describe_prevalence(comparison))
    untested = comparison.tests[comparison.tests["p"].isna() & ~comparison.tests["features"].isin(CATEGORIES)]
    for reason, rows in untested.groupby("reason", sort=False):
        sentences.append(f"Not compared: {', '.join(rows['features'])} ({reason}).")
    return sentences


def _describe_failure(comparison: Comparison, test: dict[Any, Any]) -> str:
    name, auroc = test["features"], f"AUROC of telling them apart {test['auroc']:.2f}"
    if name == "score":
        return f"The model's scores fit no mixture of those of the two classes ({auroc})."
    if name == "embedding":
        return f"To a network of the model they look different ({auroc})."
    if name == "distance":
        share = np.average(comparison.periods["outliers"], weights=comparison.periods["images"])
        if share <= comparison.reference["outliers"]:
            return "They are closer to the validation images, or less varied, than these are to each other."
        return (
            f"{share:.1%} of them are farther from the validation images than {OUTLIER_PERCENTILE} % of these are from "
            "each other."
        )
    if name == "acquisition":
        return f"{describe_acquisition(comparison.acquisition)} ({auroc})."
    rows = comparison.categories[comparison.categories["field"] == name]
    change = rows.iloc[int((rows["new"] - rows["reference"]).abs().to_numpy().argmax())]
    return (
        f"The {name} differs: it is {change['value']} of {change['new']:.0%}, and of {change['reference']:.0%} of the "
        f"images of the model ({auroc})."
    )


def describe_acquisition(features: pd.DataFrame) -> str:
    """Say in which features, from `Comparison.acquisition`, the new images differ most, with both means."""
    large = features[features["difference"].abs() >= LARGE_DIFFERENCE]
    large = large.sort_values("difference", key=np.abs, ascending=False)[:MAX_SENTENCE_FEATURES]
    if large.empty:
        return (
            f"They differ in how they were acquired, but in no single figure by {LARGE_DIFFERENCE} standard deviations"
        )
    parts = []
    for row in large.to_dict("records"):
        feature = COMPARED_FEATURES[row["feature"]]
        word = feature.more if row["difference"] > 0 else feature.less
        means = " against ".join(f"{row[name]:.3g}" for name in ("new", "reference"))
        parts.append(f"{word} ({feature.label} {means})")
    return f"They are {', '.join(parts)}"


def _describe_prevalence(comparison: Comparison) -> str:
    estimate = comparison.prevalence
    text = (
        f"The estimated share of positives is {estimate.prevalence:.1%} (95 % interval {estimate.low:.1%} to "
        f"{estimate.high:.1%}), expected is {comparison.expected_prevalence:.1%}"
    )
    if comparison.has_covariate_shift:
        return f"{text}; but the estimate assumes that nothing else differs."
    if comparison.has_label_shift and AT_BORDER <= estimate.prevalence <= 1 - AT_BORDER:
        return f"{text}. For probabilities at the new share, use --prevalence of cxr predict."
    return f"{text}."


def _acquisition(table: pd.DataFrame) -> pd.DataFrame:
    features = table[list(ACQUISITION_FEATURES)].astype(float)
    return features.assign(**{IS_JPEG: features["quantization"].notna().astype(float)})


def _test(feature_sets: dict[str, tuple[pd.DataFrame, np.ndarray, np.ndarray]]) -> pd.DataFrame:
    """Apply `shift_table` to sets of features, each with its labeled images."""
    return dataset_shift.shift_table(
        {name: (old, new) for name, (_, old, new) in feature_sets.items()},
        {name: table["label"].to_numpy(int) for name, (table, _, _) in feature_sets.items()},
        {name: table["group"].to_numpy() for name, (table, _, _) in feature_sets.items()},
        None,
    )


def _test_category(reference: pd.DataFrame, new: pd.DataFrame, field: str) -> pd.DataFrame:
    """Test the values of a field, of the images of which it is known."""
    known, new_known = (table[table[field] != ""] for table in (reference, new))
    if known.empty or len(new_known) < 2:
        whose = "that the model was trained on" if known.empty else "in the log"
        return pd.DataFrame(
            [{"features": field, "images": len(new_known), "reason": f"not known of the images {whose}"}]
        )
    values = sorted({*known[field], *new_known[field]})
    indicators = ((table[field].to_numpy()[:, None] == np.array(values)).astype(float) for table in (known, new_known))
    return _test({field: (known, *indicators)})


def _estimate_prevalence(validation: pd.DataFrame, new: pd.DataFrame) -> PrevalenceEstimate:
    scores = new["score"].to_numpy()
    if len(scores) > MAX_IMAGES:
        scores = np.random.default_rng(0).choice(scores, MAX_IMAGES, replace=False)
    return estimate_prevalence(
        validation["label"].to_numpy(int), validation["score"].to_numpy(), validation["group"].to_numpy(), scores
    )


def prevalence_p(
    labels: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    new_scores: np.ndarray,
    expected: float | None = None,
    resamples: int = RESAMPLES,
) -> float:
    """Return p of the difference in mean score between new images and labeled ones of the expected prevalence.

    Under label shift the mean score is linear in the prevalence. Its distribution under the null hypothesis is a
    bootstrap by group, as in `dataset_shift.fit_mixture`: of few new images an interval of the prevalence, which is at
    the border if none is positive, excludes the truth too often.

    Args:
        labels: (N,), of the labeled images, 0 or 1.
        scores: (N,).
        groups: (N,), the name of each image's group.
        new_scores: (M,), of images that are grouped like the labeled ones.
        expected: the prevalence; by default that of the labeled images, which is then uncertain like their mean score.
        resamples: of the bootstrap.
    """
    rng = np.random.default_rng(0)
    everything = [(np.ones(len(labels), dtype=bool), 1.0)]
    strata = everything if expected is None else [(labels == 0, 1 - expected), (labels == 1, expected)]
    shares = np.array([share for _, share in strata])
    sizes, totals = [], []  # of the groups of each stratum
    for selected, _ in strata:
        _, index = np.unique(groups[selected], return_inverse=True)
        sizes.append(np.bincount(index))
        totals.append(np.bincount(index, scores[selected]))
    group_shares = shares / [size.mean() for size in sizes]
    group_count = max(round(len(new_scores) * group_shares.sum()), 1)
    counts = rng.multinomial(group_count, group_shares / group_shares.sum(), resamples)
    reference, drawn_total, drawn_size = np.zeros((3, resamples))
    observed = new_scores.mean()
    for share, size, total, count in zip(shares, sizes, totals, counts.T, strict=True):
        observed -= share * total.sum() / size.sum()
        equal = np.full(len(size), 1 / len(size))
        # As many groups as in `fit_mixture`, for the same reason.
        weights = rng.multinomial(max(round(size.sum() ** 2 / (size**2).sum()) - 2, 1), equal, resamples)
        reference += share * (weights @ total) / (weights @ size)
        drawn = rng.multinomial(count, equal)
        drawn_total += drawn @ total
        drawn_size += drawn @ size
    null = drawn_total / drawn_size - reference
    return float((1 + (np.abs(null) >= abs(observed)).sum()) / (1 + resamples))


def _class_weights(labels: np.ndarray, share: float) -> np.ndarray:
    """Return weights (N,) that give the images this share of positives; equal ones if it is NaN."""
    if np.isnan(share):
        return np.ones(len(labels))
    positives = labels.mean().clip(1e-9, 1 - 1e-9)
    return np.asarray(np.where(labels == 1, share / positives, (1 - share) / (1 - positives)))


def _compare_acquisition(reference: pd.DataFrame, new: pd.DataFrame, weights: np.ndarray) -> pd.DataFrame:
    rows = []
    for name, feature in COMPARED_FEATURES.items():
        row = {"feature": name, "reference": np.nan, "new": np.nan, "difference": np.nan}
        is_known, values = reference[name].notna().to_numpy(), new[name].dropna().to_numpy()
        old_values, old_weights = reference[name].to_numpy()[is_known], weights[is_known]
        mean = np.average(old_values, weights=old_weights) if old_weights.sum() > 0 else np.nan
        if np.isfinite(mean):
            row["reference"] = feature.convert(mean)
        if len(values):
            row["new"] = feature.convert(values.mean())
        if np.isfinite(mean) and len(values):
            variance = np.average((old_values - mean) ** 2, weights=old_weights)
            row["difference"] = (values.mean() - mean) / max(np.sqrt((variance + values.var()) / 2), MIN_SCALE)
        rows.append(row)
    return pd.DataFrame(rows)


def _compare_category(reference: pd.DataFrame, new: pd.DataFrame, field: str) -> pd.DataFrame:
    shares = [
        table.loc[table[field] != "", field].value_counts(normalize=True).rename(name)
        for name, table in (("reference", reference), ("new", new))
    ]
    joined = pd.concat(shares, axis="columns")
    for column in joined.columns[joined.notna().any()]:
        joined[column] = joined[column].fillna(0)
    return joined.sort_values("new", ascending=False).rename_axis("value").reset_index().assign(field=field)


def _aggregate(new: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Average over days, or over longer periods if there are more than `MAX_PERIODS` days."""
    times = new["time"].dt.tz_convert(None)
    days = (times.max() - times.min()).days
    unit, rule = next(
        (unit, rule)
        for unit, rule, length in (("day", "D", 1), ("week", "W-SUN", 7), ("month", "M", np.inf))
        if days / length <= MAX_PERIODS
    )
    grouped = new.groupby(times.dt.to_period(rule).dt.start_time.dt.date.rename("period"))
    means = grouped[["probability", "label", "agreement", "outliers", "brightness"]].mean()
    means.insert(0, "images", grouped.size())
    return means.rename(columns={"label": "positive"}).reset_index(), unit
