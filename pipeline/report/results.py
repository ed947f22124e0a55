"""Results of the earlier stages, read from their outs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.config import Config
from pipeline.core.files import read_csv, read_json
from pipeline.data.manifest import read_split


@dataclass(frozen=True)
class Estimate:
    """A metric with the limits of its 95 % interval; NaN where undefined, with the `reason`."""

    value: float
    low: float = np.nan
    high: float = np.nan
    reason: str = ""

    @property
    def missing(self) -> bool:
        return bool(np.isnan(self.value))


@dataclass(frozen=True)
class Results:
    """Metrics and predictions of the project in the working directory; each file is read at its first use."""

    config: Config

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Headline numbers of `best` and `bag`."""
        return dict(read_json(Path("metrics/summary.json")))

    @property
    def best(self) -> str:
        """The seed with the highest validation F1."""
        return str(self.summary["best"]["model"])

    @property
    def bag(self) -> str:
        """The bag with the method of `bag.method`."""
        return str(self.summary["bag"]["model"])

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per packed image, in the order of `images`."""
        return read_split(Path("data"))

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
        return list(dict.fromkeys(model for model, _ in self._intervals))

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
        """Metrics by source, view and size; missing texts are empty."""
        return read_csv(Path("metrics/slices.csv")).fillna({"slice": "", "reason": "", "model": ""})

    @cached_property
    def positive_count(self) -> int:
        """Number of positive validation images."""
        return int(self.validation["label"].sum())

    @cached_property
    def _intervals(self) -> dict[tuple[str, str], pd.Series]:
        rows = pd.read_csv("metrics/intervals.csv").iterrows()
        return {(row["model"], row["metric"]): row for _, row in rows}

    @cached_property
    def _differences(self) -> dict[tuple[str, str, str], pd.Series]:
        rows = pd.read_csv("metrics/differences.csv").rename(columns={"difference": "value"}).iterrows()
        return {(row["model"], row["against"], row["metric"]): row for _, row in rows}

    def estimate(self, model: str, metric: str) -> Estimate:
        return as_estimate(self._intervals[model, metric])

    def estimate_type(self, model: str) -> str:
        """Return `fixed`, `cross-fitted` or `apparent`: how the operating point of the model was evaluated."""
        return str(self._intervals[model, "f1"]["estimate_type"])

    def difference(self, model: str, against: str, metric: str) -> Estimate:
        """Return the metric of `model` minus that of `against` on the same images, with its paired interval."""
        if (model, against, metric) not in self._differences:
            return Estimate(np.nan, reason="undefined for one of the two models")
        return as_estimate(self._differences[model, against, metric])

    def gain_over_baseline(self, baseline: str, metric: str) -> Estimate:
        """Return the metric of the best seed minus that of a shortcut baseline."""
        difference = self.difference(baseline, self.best, metric)
        reason = self.estimate(baseline, metric).reason if difference.missing else ""
        return Estimate(-difference.value, -difference.high, -difference.low, reason or difference.reason)


def as_estimate(row: pd.Series) -> Estimate:
    """Convert a row with `value` and, optionally, `low`, `high` and `reason`."""
    value, low, high = (float(row.get(key, np.nan)) for key in ("value", "low", "high"))
    reason = row.get("reason", "")
    return Estimate(value, low, high, "" if pd.isna(reason) else str(reason))
