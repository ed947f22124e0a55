"""Results of the earlier stages, read from their outs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.config import BAG, Config
from pipeline.core.files import read_csv, read_json
from pipeline.data.manifest import read_split
from pipeline.evaluation.external_validation import recipe_hash
from pipeline.evaluation.sample_size import sample_size_table
from pipeline.evaluation.slices import all_patients_known

RECALIBRATIONS = {"none": "none", "temperature": "temperature", "platt": "temperature and bias"}


@dataclass(frozen=True)
class Estimate:
    """A metric with the limits of its 95 % interval; NaN where undefined, with the `reason`.

    `estimate_type` is `fixed`, `cross-fitted`, `corrected` or `apparent`; empty where the metric is of nothing fitted.
    """

    value: float
    low: float = np.nan
    high: float = np.nan
    reason: str = ""
    estimate_type: str = ""

    @property
    def missing(self) -> bool:
        return bool(np.isnan(self.value))

    @property
    def has_interval(self) -> bool:
        return not np.isnan(self.low)


@dataclass(frozen=True)
class Results:
    """Metrics and predictions of the project in the working directory; each file is read at its first use."""

    config: Config

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Headline numbers of `best` and `bag`, and counts of `validation` images and patients."""
        return dict(read_json(Path("metrics/summary.json")))

    @property
    def bag(self) -> str:
        """The bag with the method of `bag.method`, which no validation image selects: the model of the headline."""
        return str(self.summary["bag"]["model"])

    @property
    def best(self) -> str:
        """The seed with the highest validation F1."""
        return str(self.summary["best"]["model"])

    @property
    def candidates(self) -> list[str]:
        """The bag and all seeds."""
        return [self.bag, *self.config.model_names]

    @property
    def patients_known(self) -> bool:
        """Whether the patient of any image is known; else every image, with its duplicates, counts as one."""
        return bool(self.table["patient"].any())

    @property
    def test_patients_known(self) -> bool:
        """Whether the patient of every test image is known."""
        return all_patients_known(self.table[self.table["subset"] == "test"])

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of validation images and patients, from `slices.count_patients`."""
        return dict(self.summary["validation"])

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per packed image, in the order of `images`."""
        return read_split(Path("data"), self.config.active.split.validation_folds)

    @cached_property
    def images(self) -> np.ndarray:
        """The packed images, uint8 (N, S, S)."""
        return np.asarray(np.load("data/images.npy", mmap_mode="r"))

    @cached_property
    def validation(self) -> pd.DataFrame:
        """`file`, `label` and P(positive) of every seed."""
        return read_csv(Path("predictions/validation.csv"))

    @cached_property
    def models(self) -> list[str]:
        """Names of the seeds, of the ensembles by combination method, and of the shortcut baselines."""
        return list(dict.fromkeys(model for model, _ in self._interval_rows))

    @cached_property
    def baselines(self) -> dict[str, str]:
        """Shortcut baselines: the feature by the name of the model, such as `source` by `shortcut (source)`."""
        return {name: name[len("shortcut (") : -1] for name in self.models if name.startswith("shortcut")}

    @cached_property
    def seed_statistics(self) -> pd.DataFrame:
        """`mean`, `deviation`, `lowest`, `highest` and `reason` over the seeds, by metric."""
        return read_csv(Path("metrics/seeds.csv")).set_index("metric")

    @cached_property
    def slices(self) -> pd.DataFrame:
        """Metrics by source, view, size, sex, age and acquisition cluster; missing texts are empty."""
        return fill_texts(read_csv(Path("metrics/slices.csv")), "slice", "reason", "model")

    @cached_property
    def groups(self) -> np.ndarray:
        """The name of the group (patient) of each validation image, (N,)."""
        return self.table.set_index("file")["group"].loc[self.validation["file"]].to_numpy()

    @cached_property
    def bag_predictions(self) -> pd.DataFrame:
        """`score`, `probability` and `predicted` of the bag for the validation images, at its threshold."""
        return read_csv(Path("predictions/bag.csv")).query("subset == 'validation'").reset_index(drop=True)

    @cached_property
    def more_patients(self) -> dict[str, int | None]:
        """How many more patients `sample_size.sample_size_table` asks for, by metric of the bag; None if unknown."""
        labels, predicted = self.validation["label"].to_numpy(int), self.bag_predictions["predicted"].to_numpy(int)
        table = sample_size_table(labels, predicted, self.groups)
        counts = zip(table["metric"], table["more_patients"], strict=True)
        return {metric: None if pd.isna(count) else int(count) for metric, count in counts}

    @cached_property
    def ranks(self) -> pd.Series:
        """How often each candidate has the highest F1 in a resample, the most frequent winner first."""
        ranks = read_csv(Path("metrics/ranks.csv")).set_index("model")["probability"]
        return ranks.sort_values(ascending=False, kind="stable")

    @cached_property
    def operating_points(self) -> pd.DataFrame:
        return fill_texts(read_csv(Path("metrics/operating_points.csv")), "caveat")

    @property
    def operating_point(self) -> pd.Series:
        """The first row of the bag in `operating_points`, that of the confusion matrix."""
        return self.operating_points[self.operating_points["model"] == self.bag].iloc[0]

    @cached_property
    def reliability(self) -> pd.DataFrame:
        """The reliability curves of the bag, from `calibration.reliability_curve`, by `calibration`."""
        return pd.read_csv("metrics/reliability.csv").query("model == @self.bag")

    @property
    def recalibration(self) -> str:
        """The name of the recalibration in use, as `calibration` in metrics/calibration.csv."""
        return RECALIBRATIONS[self.config.active.evaluate.recalibration]

    @cached_property
    def prevalence(self) -> pd.DataFrame:
        """Metrics of the bag by prevalence, from `metric_tables.prevalence_table`."""
        return read_csv(Path("metrics/prevalence.csv")).query("model == @self.bag")

    @cached_property
    def disagreements(self) -> pd.DataFrame:
        """The validation and test images on which the members disagree, from `ensemble.images_with_disagreement`."""
        return read_csv(Path("predictions/disagreements.csv"))

    @cached_property
    def shift(self) -> pd.DataFrame:
        """From `dataset_shift.shift_table`."""
        return fill_texts(read_csv(Path("metrics/shift.csv")), "reason")

    @cached_property
    def external(self) -> pd.DataFrame:
        """External validation, of every source or of the one that is held out here; no rows if there was none.

        `recipe` is what `external_validation.recipe_hash` was then.
        """
        here = read_optional(Path("metrics/external.csv")).assign(recipe=recipe_hash(self.config))
        table = read_optional(Path("scores/external_validation.csv"))
        return here if table.empty or (len(here) and not self._is_current(table)) else table

    @property
    def external_is_current(self) -> bool:
        """Whether neither the recipe nor the data have changed since the external validation."""
        return self._is_current(self.external)

    def _is_current(self, table: pd.DataFrame) -> bool:
        return "recipe" in table and bool((table["recipe"] == recipe_hash(self.config)).all())

    @property
    def is_externally_validated(self) -> bool:
        """Whether a source was held out and evaluated with this recipe; one that could not be has a reason only."""
        return self.external_is_current and "value" in self.external and bool(self.external["value"].notna().any())

    @cached_property
    def test_scores(self) -> pd.DataFrame:
        """From `test_scores.score_candidates`, for the bag and the best seed; no rows if they were not scored."""
        table = read_optional(Path("scores/test.csv"))
        return table if table.empty else table[table["model"].isin([BAG, self.best])]

    @property
    def test_scores_are_current(self) -> bool:
        """Whether what was expected when the test set was scored is what is expected now."""
        of_bag = self.test_scores.query("model == @BAG and metric == 'accuracy'").iloc[0]
        rows, keys = (of_bag, self.summary["bag"]), ("expected_accuracy", "estimated_test_prevalence")
        then, now = ([as_estimate(row, key) for key in keys] for row in rows)
        values = [[estimate.value for estimate in estimates] for estimates in (then, now)]
        return bool(np.isclose(values[0], values[1], equal_nan=True).all()) and then[0].reason == now[0].reason

    @cached_property
    def source_probe(self) -> dict[str, pd.Series]:
        """Rows of `source_probe.probe_sources`, by `features`."""
        return {row["features"]: row for _, row in read_csv(Path("metrics/source_probe.csv")).iterrows()}

    @property
    def probed_property(self) -> str:
        """What the source probe tells: the source, or the acquisition cluster where no source allows that."""
        return "acquisition cluster" if self.source_probe["network"]["by"] == "acquisition" else "source"

    @cached_property
    def clusters(self) -> pd.DataFrame:
        """From `acquisition.describe_clusters`."""
        return read_csv(Path("metrics/acquisition.csv"))

    @cached_property
    def _interval_rows(self) -> dict[tuple[str, str], list[pd.Series]]:
        rows: dict[tuple[str, str], list[pd.Series]] = {}
        for _, row in pd.read_csv("metrics/intervals.csv").iterrows():
            rows.setdefault((row["model"], row["metric"]), []).append(row)
        return rows

    @cached_property
    def _differences(self) -> dict[tuple[str, str, str], pd.Series]:
        rows = pd.read_csv("metrics/differences.csv").rename(columns={"difference": "value"}).iterrows()
        return {(row["model"], row["against"], row["metric"]): row for _, row in rows}

    @cached_property
    def baseline_rule(self) -> str:
        """The rule that chooses the thresholds at which models and baselines are compared."""
        rows = [row for (model, *_), row in self._differences.items() if model in self.baselines]
        return str(rows[0]["rule"]) if rows else ""

    def estimate(self, model: str, metric: str) -> Estimate:
        """Return the corrected metric where there is one, else the only one."""
        return as_estimate(self._interval_rows[model, metric][-1])

    def apparent(self, model: str, metric: str) -> Estimate:
        """Return the metric on the images that selected the model, or the only one where nothing was corrected."""
        return as_estimate(self._interval_rows[model, metric][0])

    def difference(self, model: str, against: str, metric: str) -> Estimate:
        """Return the metric of `model` minus that of `against` on the same images, with its paired interval."""
        if (model, against, metric) not in self._differences:
            return Estimate(np.nan, reason="undefined for one of the two models")
        return as_estimate(self._differences[model, against, metric])

    def gain_over_baseline(self, baseline: str, metric: str) -> Estimate:
        """Return the metric of the bag minus that of a shortcut baseline, both cut by `baseline_rule`."""
        difference = self.difference(baseline, self.bag, metric)
        reason = self.estimate(baseline, metric).reason if difference.missing else ""
        return Estimate(-difference.value, -difference.high, -difference.low, reason or difference.reason)


def read_optional(path: Path) -> pd.DataFrame:
    """Read a table that a command typed by hand writes; no rows if it has not run."""
    return read_csv(path) if path.exists() else pd.DataFrame()


def fill_texts(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the table with missing texts of these columns as empty ones."""
    return table.assign(**{column: table[column].astype(object).fillna("") for column in columns if column in table})


def as_estimate(row: "pd.Series | Mapping[str, Any]", key: str = "value") -> Estimate:
    """Convert a row with a value, and optionally `low`, `high`, `reason` and `estimate_type`.

    Args:
        row: with the columns; those of another `key`, such as `accuracy`, are `accuracy_low` and `accuracy_high`.
        key: the column of the value.
    """
    prefix = "" if key == "value" else f"{key}_"
    value, low, high = (_float(row.get(name)) for name in (key, f"{prefix}low", f"{prefix}high"))
    texts = row.get(f"{prefix}reason", row.get("reason")), row.get("estimate_type")
    reason, estimate_type = ("" if pd.isna(text) else str(text) for text in texts)
    return Estimate(value, low, high, reason, estimate_type)


def _float(value: Any) -> float:
    return np.nan if value is None else float(value)
