"""Comparison of two recipes, each trained with the same seeds and evaluated on the same images.

The figures are paired by seed and by patient. With seeds as readers, patients as cases and recipes as modalities, it is
a multi-reader multi-case study.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from pipeline.core.config import BAG, Config, load_config
from pipeline.core.errors import UserError
from pipeline.core.files import read_csv
from pipeline.evaluation import ensemble
from pipeline.evaluation.calibration import fit_platt
from pipeline.evaluation.cross_fitted_predictor import CrossFittedPredictor
from pipeline.evaluation.intervals import ONE_GROUP, compare_predictions
from pipeline.evaluation.metric_tables import (
    Predictions,
    ValidationSet,
    cross_fit_recalibration,
    unavailable_predictions,
)
from pipeline.evaluation.metrics import (
    CONFIDENCE_LEVEL,
    LOWER_IS_BETTER,
    METRIC_LABELS,
    THRESHOLD_METRICS,
    apply_threshold,
)

FILES = [
    "params.yaml", "data/manifest.csv", "data/split.csv", "predictions/validation.csv", "predictions/external.csv",
]  # fmt: skip
SEED_MEAN = "mean of the seeds"
RECALIBRATED_LOSS = "recalibrated_loss"  # cross-fitted with temperature and bias
LABELS = METRIC_LABELS | {RECALIBRATED_LOSS: "log loss, recalibrated"}
METRICS = ["f1", "recall", "specificity", "auroc", "average_precision", "loss", RECALIBRATED_LOSS, "brier"]
LOSSES = [*LOWER_IS_BETTER, RECALIBRATED_LOSS]
COLUMNS = ["images", "model", "metric", "a", "b", "difference", "low", "high", "seeds_better", "reason"]


@dataclass(frozen=True)
class Recipe:
    """One side of a comparison.

    `predictions` has a table for `validation`, and one for `external` if a source is held out: a row per image, indexed
    and sorted by file, with `label`, `group`, `bytes` (size of the file), `xxh128` (of the stored pixels) and a column
    of P(positive) per seed. `commit` is that of a Git revision, None for a folder.
    """

    name: str
    config: Config
    predictions: Mapping[str, pd.DataFrame]
    commit: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_recipes`.

    Attributes:
        seeds: names of the models of the seeds that both have.
        left_out: for `a` and `b`, the names of those that only this one has.
        image_sets: the images that both were evaluated on: `validation`, and `external` if a source is held out.
        parameters: a row per parameter that differs: `parameter`, `a`, `b`.
        metrics: a row per image set (`images`), model (`SEED_MEAN` or `BAG`) and metric: its value for `a` and `b`, the
            `difference` b minus a with the ends of its 95 % interval, the number of `seeds_better` with b, and the
            `reason` where there is no interval.
        caveats: what to know before believing the figures.
    """

    seeds: list[str]
    left_out: dict[str, list[str]]
    image_sets: dict[str, ValidationSet]
    parameters: pd.DataFrame
    metrics: pd.DataFrame
    caveats: list[str]


def load_recipe(folder: Path, name: str, commit: str | None = None) -> Recipe:
    """Read the `FILES` of a project from a folder."""
    manifest, split = (
        pd.read_csv(folder / "data" / table, dtype=str, keep_default_na=False).set_index("file")
        for table in ("manifest.csv", "split.csv")
    )
    predictions = {
        image_set: read_csv(folder / "predictions" / f"{image_set}.csv")
        .set_index("file")
        .join(manifest[["bytes", "xxh128"]])
        .join(split["group"])
        .sort_index()
        for image_set in ("validation", "external")
    }
    if predictions["external"].empty:
        del predictions["external"]
    return Recipe(name, load_config(folder / "params.yaml"), predictions, commit)


def compare_recipes(a: Recipe, b: Recipe) -> Comparison:
    """Compare two recipes on every metric of `METRICS`, as the mean over the seeds and for the bag.

    Every model predicts at the operating point that its own recipe chooses, cross-fitted where that is fitted; on the
    source that both held out, it and the recalibration are those of all validation images.

    Raises:
        UserError: they were not evaluated on the same images, or have no seed in common.
    """
    check_same_images(a, b)
    seeds = [name for name in a.config.model_names if name in b.config.model_names]
    if not seeds:
        raise UserError(
            f"{a.name} and {b.name} have no seed in common ({', '.join(a.config.model_names)}; "
            f"{', '.join(b.config.model_names)}); train both with the same seeds"
        )
    resamples = max(recipe.config.active.evaluate.resamples for recipe in (a, b))
    image_sets = {
        name: ValidationSet(table["label"].to_numpy(), table["group"].to_numpy(), resamples)
        for name, table in a.predictions.items()
    }
    ours, theirs = (_predict_models(image_sets["validation"], recipe, seeds) for recipe in (b, a))
    tables = [_compare_models(image_sets[name], ours[name], theirs[name]).assign(images=name) for name in image_sets]
    left_out = {
        side: [name for name in recipe.config.model_names if name not in seeds] for side, recipe in (("a", a), ("b", b))
    }
    metrics = _give_reasons(_withhold_intervals(pd.concat(tables).reset_index(drop=True), a, b))
    return Comparison(seeds, left_out, image_sets, differing_parameters(a, b), metrics, _caveats(a, b))


def check_same_images(a: Recipe, b: Recipe) -> None:
    """Raise a UserError unless both were evaluated on the same images, with the same labels and groups."""
    names, (one, other) = f"{a.name} and {b.name}", [pd.concat(side.predictions, names=["images"]) for side in (a, b)]
    ours, theirs = set(one.index), set(other.index)
    if ours != theirs:
        raise UserError(
            f"{names} were evaluated on different images ({len(ours)} and {len(theirs)}, {len(ours & theirs)} of them "
            "in both): one of them may have been trained on what the other is evaluated on; give both the same data "
            "and split parameters, then run: dvc repro"
        )
    other = other.loc[one.index]
    # Other parameters of `prepare`, such as the image size, give other pixels of the same image.
    content = "xxh128" if a.config.active.prepare == b.config.active.prepare else "bytes"
    for column, meaning in ((content, "contents"), ("label", "labels"), ("group", "patient groups")):
        differs = one[column].ne(other[column]).droplevel("images")
        if differs.any():
            raise UserError(
                f"{names} have different {meaning} for {differs.sum()} of the {len(ours)} images, such as "
                f"{differs.idxmax()}; give both the same data, then run: dvc repro"
            )


def differing_parameters(a: Recipe, b: Recipe) -> pd.DataFrame:
    """Return a row per parameter of the active profiles that differs: its dotted key as `parameter`, `a` and `b`.

    A key that one of the files does not have counts as its default; None where there is no such parameter.
    """
    ours, theirs = (
        {"profile": recipe.config.profile, "seeds": recipe.config.seeds}
        | dict(_flatten(recipe.config.active.model_dump(mode="json")))
        for recipe in (a, b)
    )
    rows = [[key, ours.get(key), theirs.get(key)] for key in ours | theirs if ours.get(key) != theirs.get(key)]
    return pd.DataFrame(rows, columns=["parameter", "a", "b"], dtype=object)


def compare_seeds(
    ours: Sequence[pd.DataFrame], theirs: Sequence[pd.DataFrame], metrics: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Compare the means over the seeds of two recipes.

    Args:
        ours: for each seed of one recipe, its metrics on every resample.
        theirs: for the same seeds of the other recipe, the same.
        metrics: names of the metrics to compare.

    Returns:
        A row per metric: `metric`, the means `a` (theirs) and `b` (ours), their `difference`, `low` and
        `high` from `seed_mean_interval`, and `seeds_better`, the number of seeds for which ours is better, missing
        where that is undefined.
    """
    rows = []
    for metric in metrics:
        our_values, their_values = (
            np.column_stack([sample[metric].to_numpy(dtype=float) for sample in samples]) for samples in (ours, theirs)
        )
        differences = our_values - their_values
        better = int(((differences[0] < 0) if metric in LOSSES else (differences[0] > 0)).sum())
        low, high = seed_mean_interval(differences)
        rows.append(
            {
                "metric": metric,
                "a": their_values[0].mean(),
                "b": our_values[0].mean(),
                "difference": differences[0].mean(),
                "low": low,
                "high": high,
                "seeds_better": pd.NA if np.isnan(differences[0]).any() else better,
            }
        )
    return pd.DataFrame(rows).astype({"seeds_better": "Int64"})


def seed_mean_interval(
    differences: np.ndarray, seed_variance: tuple[float, int] | None = None, confidence: float = CONFIDENCE_LEVEL
) -> tuple[float, float]:
    """Return the ends of the interval of the mean difference, for new patients and new seeds.

    The variance is that of Obuchowski and Rockette (1995) for random readers and cases, with the covariance between
    seeds taken from the bootstrap over patients, and t has the degrees of freedom of Hillis (2007). With one seed,
    nothing is known of other seeds, and the interval is for new patients only, unless their variance is given.

    Args:
        differences: (1 + resamples, S), of each seed, on the original set and on each resample.
        seed_variance: the variance of the differences between seeds, and its degrees of freedom; by default that of
            these differences.
        confidence: level of the interval.

    Returns:
        NaN where the difference or its variance is undefined, or where nothing varies.
    """
    resampled = differences[1:][~np.isnan(differences[1:]).any(axis=1)]
    count = differences.shape[1]
    if np.isnan(differences[0]).any() or len(resampled) < 2:
        return np.nan, np.nan
    covariances = np.atleast_2d(np.cov(resampled, rowvar=False))
    shared = float(covariances[0, 0])
    if count > 1:
        shared = max(float(covariances.sum() - np.trace(covariances)) / (count * (count - 1)), 0.0)
    variance, seed_degrees = seed_variance or (differences[0].var(ddof=1) if count > 1 else 0.0, count - 1)
    between_seeds, degrees = float(variance) / count, np.inf
    if between_seeds:
        degrees = seed_degrees * (1 + shared / between_seeds) ** 2
    half_width = float(stats.t.ppf((1 + confidence) / 2, degrees)) * np.sqrt(between_seeds + shared)
    mean = float(differences[0].mean())
    return (mean - half_width, mean + half_width) if half_width > 0 else (np.nan, np.nan)


def _predict_models(
    validation: ValidationSet, recipe: Recipe, seeds: Sequence[str]
) -> dict[str, dict[str, tuple[Predictions, Predictions]]]:
    """Return the predictions of each seed and, if any of its members is among the seeds, the bag: raw, recalibrated.

    They are by the name of the image set, then of the model.
    """
    tables, bag = recipe.predictions, recipe.config.active.bag
    members = {seed: [seed] for seed in seeds}
    if bag_members := [name for name in recipe.config.bag_members if name in seeds]:
        members[BAG] = bag_members
    models: dict[str, dict[str, tuple[Predictions, Predictions]]] = {name: {} for name in tables}
    for name, columns in members.items():
        predictor = CrossFittedPredictor(recipe.config, validation, tables["validation"][columns], bag.method)
        recalibrated, recalibrate = cross_fit_recalibration(validation, predictor.scores, fit_platt)
        raw = Predictions(predictor.predictions.predicted, predictor.scores)
        models["validation"][name] = raw, _recalibrated_predictions(recalibrated)
        if "external" in tables:
            predicted = ensemble.predict(tables["external"], predictor.ensemble_config)
            scores = predicted["score"].to_numpy()
            recalibrated = recalibrate(scores) if recalibrate else None
            raw = Predictions(predicted["label"].to_numpy(), scores)
            models["external"][name] = raw, _recalibrated_predictions(recalibrated)
    return models


def _recalibrated_predictions(probabilities: np.ndarray | None) -> Predictions:
    if probabilities is None:
        return unavailable_predictions("not recalibrated")
    return Predictions(apply_threshold(probabilities), probabilities)


def _compare_models(
    images: ValidationSet,
    our_models: Mapping[str, tuple[Predictions, Predictions]],
    their_models: Mapping[str, tuple[Predictions, Predictions]],
) -> pd.DataFrame:
    """Compare the means over the seeds, and the bags if both have one: a row per model and metric."""
    ours, theirs = (
        {name: _bootstrap_metrics(images, *model) for name, model in models.items()}
        for models in (our_models, their_models)
    )
    seeds = [name for name in ours if name != BAG]
    means = compare_seeds([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    tables = [means.assign(model=SEED_MEAN, reason=ONE_GROUP if len(images.weights) == 1 else "")]
    if BAG in ours and BAG in theirs:
        raw, recalibrated = (
            compare_predictions(images.labels, images.groups, *pair).set_index("metric")
            if not any(model.reason for model in pair)
            else pd.DataFrame(columns=["difference", "low", "high", "probability"])
            for pair in zip(our_models[BAG], their_models[BAG], strict=True)
        )
        recalibrated = recalibrated.filter(["loss"], axis="index").rename(index={"loss": RECALIBRATED_LOSS})
        table = pd.concat([raw, recalibrated]).reindex(METRICS).rename_axis("metric")
        values = pd.DataFrame({"a": theirs[BAG].iloc[0], "b": ours[BAG].iloc[0]})
        tables.append(table.join(values).reset_index().assign(model=BAG))
    return pd.concat(tables)


def _bootstrap_metrics(images: ValidationSet, raw: Predictions, recalibrated: Predictions) -> pd.DataFrame:
    """Return `METRICS` on every resample."""
    loss: Any = np.nan if recalibrated.reason else images.bootstrap_metrics(recalibrated)["loss"]
    return images.bootstrap_metrics(raw).assign(**{RECALIBRATED_LOSS: loss})[METRICS]


def _withhold_intervals(metrics: pd.DataFrame, a: Recipe, b: Recipe) -> pd.DataFrame:
    """Replace the intervals of what depends on a fit on the validation set by a `reason`, on the held-out source.

    All seeds share that validation set, whose variation neither they nor the patients of the source show.
    """
    sections = [recipe.config.active for recipe in (a, b)]
    fitted = [RECALIBRATED_LOSS]
    if any(section.evaluate.operating_point != "half" for section in sections):
        fitted += THRESHOLD_METRICS
    is_fitted = metrics["metric"].isin(fitted)
    if any(section.bag.method == "greedy" for section in sections):
        is_fitted |= metrics["model"] == BAG
    is_fitted &= metrics["images"] == "external"
    reason = metrics["reason"].mask(is_fitted, "none: it also varies with the validation set, on which it is fitted")
    return metrics.assign(reason=reason, **{end: metrics[end].mask(is_fitted) for end in ("low", "high")})


def _give_reasons(metrics: pd.DataFrame) -> pd.DataFrame:
    """Add the `reason` where a difference or its interval is missing."""
    undefined = (
        "undefined: images of one class only, too few patients of a class to cross-fit, or higher probabilities do not "
        "mean more positives"
    )
    constant = "none: the same in every resample"
    has_interval = metrics["low"] < metrics["high"]
    missing = metrics["reason"].replace("", constant)
    reason = np.where(metrics["difference"].isna(), undefined, np.where(has_interval, "", missing))
    ends = metrics[["low", "high"]].where(has_interval)
    return metrics.assign(low=ends["low"], high=ends["high"], reason=reason)[COLUMNS]


def _caveats(a: Recipe, b: Recipe) -> list[str]:
    return [
        f"{recipe.name} chose its epochs on the validation images (train.keep: {recipe.config.active.train.keep}), so "
        "its figures there are too good, the more so the more epochs it chose from"
        for recipe in {a.name: a, b.name: b}.values()
        if recipe.config.active.train.keep != "last"
    ]


def _flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
