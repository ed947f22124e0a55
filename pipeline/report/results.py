"""What the stages before left, read once, and the figures that the report asks it for."""

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
    """A figure in the interval from `low` to `high` (95 %); NaN is missing, and `reason` says why."""

    value: float
    low: float = np.nan
    high: float = np.nan
    reason: str = ""

    @property
    def missing(self) -> bool:
        return bool(np.isnan(self.value))


@dataclass(frozen=True)
class Results:
    config: Config

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The single numbers of `best` and `bag`."""
        return dict(read_json(Path("metrics/summary.json")))

    @property
    def best(self) -> str:
        """The model with the best validation F1."""
        return str(self.summary["best"]["model"])

    @property
    def bag(self) -> str:
        """The bag as it answers."""
        return str(self.summary["bag"]["model"])

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per image of the pack."""
        return read_split(Path("data"))

    @cached_property
    def images(self) -> np.ndarray:
        """The pack, uint8 (N, S, S)."""
        return np.asarray(np.load("data/images.npy", mmap_mode="r"))

    @cached_property
    def validation(self) -> pd.DataFrame:
        """`file`, `label` and P(positive) of every seed."""
        return read_csv(Path("predictions/validation.csv"))

    @cached_property
    def models(self) -> list[str]:
        """The seeds, every way to combine them, and the shortcuts."""
        return list(dict.fromkeys(model for model, _ in self._intervals))

    @cached_property
    def shortcuts(self) -> dict[str, str]:
        """What needs no radiology, by the name of its model: the name alone."""
        return {name: name[len("shortcut (") : -1] for name in self.models if name.startswith("shortcut")}

    @cached_property
    def spread(self) -> pd.DataFrame:
        """`mean`, `deviation`, `lowest`, `highest` and `reason` of the seeds, by metric."""
        return read_csv(Path("metrics/seeds.csv")).set_index("metric")

    @cached_property
    def slices(self) -> pd.DataFrame:
        """What the bag stage says of every source, view and size; texts that are missing are empty."""
        return read_csv(Path("metrics/slices.csv")).fillna({"slice": "", "reason": "", "model": ""})

    @cached_property
    def positives(self) -> int:
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
        """Say whether the images that measured the model also chose its operating point."""
        return str(self._intervals[model, "f1"]["estimate_type"])

    def difference(self, model: str, against: str, metric: str) -> Estimate:
        """Return by how much `model` has more of a figure than `against` on the same images."""
        if (model, against, metric) not in self._differences:
            return Estimate(np.nan, reason="one of the two has no such figure")
        return as_estimate(self._differences[model, against, metric])

    def added(self, shortcut: str, metric: str) -> Estimate:
        """Return by how much the best model surpasses a shortcut."""
        found = self.difference(shortcut, self.best, metric)
        reason = self.estimate(shortcut, metric).reason if found.missing else ""
        return Estimate(-found.value, -found.high, -found.low, reason or found.reason)


def as_estimate(row: pd.Series) -> Estimate:
    """Read `value` and, if they are there, `low`, `high` and `reason` of a row."""
    value, low, high = (float(row.get(key, np.nan)) for key in ("value", "low", "high"))
    reason = row.get("reason", "")
    return Estimate(value, low, high, "" if pd.isna(reason) else str(reason))
