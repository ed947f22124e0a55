"""External validation: metrics on a source that was held out, and the summary over several such sources."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import norm, t

from pipeline.core.config import BAG, Config
from pipeline.core.errors import UserError
from pipeline.core.files import md5_of_file, read_csv, write_csv
from pipeline.evaluation import ensemble
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.evaluation.intervals import percentile_ends
from pipeline.evaluation.metric_tables import Predictions, ValidationSet, interval_table
from pipeline.evaluation.metrics import CONFIDENCE_LEVEL
from pipeline.evaluation.slices import COUNTS, count_patients, too_few_patients

COLUMNS = ["source", *COUNTS, "role", "model", "metric", "value", "low", "high", "method", "reason"]
SUMMARY, NEW_SOURCE = "summary", "a new source"  # in the column `source`
DRAWS = 10_000  # for the prediction interval


@dataclass(frozen=True)
class PooledEffect:
    """Mean of the distribution of effects, with the ends of its 95 % interval, and its standard deviation."""

    mean: float
    low: float
    high: float
    tau: float


def write_external(config: Config, groups: pd.Series, roles: Mapping[str, str]) -> None:
    """Write `metrics/external.csv` from `predictions/external.csv` and the candidates' configurations.

    Args:
        config: names the held-out source.
        groups: the group of every image, indexed by file.
        roles: names of the `best` seed and the `bag`.
    """
    candidates = ensemble.load_candidate_configs(config)
    configs = {roles["best"]: candidates[roles["best"]], roles["bag"]: candidates[BAG]}
    external = read_csv(Path("predictions/external.csv"))
    write_csv(Path("metrics/external.csv"), external_table(config, external, groups, configs, roles))


def external_table(
    config: Config,
    external: pd.DataFrame,
    groups: pd.Series,
    configs: Mapping[str, EnsembleConfig],
    roles: Mapping[str, str],
) -> pd.DataFrame:
    """Evaluate models on the images of the held-out source, on which nothing was chosen.

    Args:
        config: names the source.
        external: a row per image of the source, with a column of P(positive) per seed; no rows if none is held out.
        groups: the group of every image, indexed by file; groups count as patients.
        configs: how each model combines the seeds, with its threshold and recalibration, by name.
        roles: names of the `best` seed and the `bag`.

    Returns:
        `COLUMNS`, with a row per role and metric; intervals are over patients.
    """
    if external.empty:
        return pd.DataFrame(columns=COLUMNS)
    labels = external["label"].to_numpy(dtype=int)
    images = ValidationSet(labels, groups.loc[external["file"]].to_numpy(), resamples=0)
    table = evaluate_fixed(images, external, {role: configs[name] for role, name in roles.items()})
    table = table.rename(columns={"model": "role"})
    return table.assign(source=config.active.split.held_out_source, model=table["role"].map(roles))[COLUMNS]


def evaluate_fixed(
    images: ValidationSet, predictions: pd.DataFrame, configs: Mapping[str, EnsembleConfig]
) -> pd.DataFrame:
    """Evaluate ensembles on images on which nothing was chosen.

    Args:
        images: labels and groups, (N,).
        predictions: (N rows), with a column of P(positive) per seed.
        configs: how each model combines the seeds, with its threshold and recalibration, by name.

    Returns:
        The columns of `interval_table`, and `COUNTS`; a row per model and metric.
    """
    models = {}
    for name, config in configs.items():
        predicted = ensemble.predict(predictions, config)
        label, score, probability = (predicted[column].to_numpy() for column in ("label", "score", "probability"))
        models[name] = Predictions(label, probability, scores=score)
    return interval_table(images, models, {}).assign(**count_patients(images))


def recipe_hash(config: Config) -> str:
    """Hash the parameters of the models but for the source that is held out, and `data/manifest.csv`.

    Parameters at their defaults are left out, so that a new parameter changes no hash, and so is `loader_threads`,
    which changes no result.
    """
    active, left_out = config.active, {"held_out_source", "loader_threads"}
    sections = (active.weights, active.split, active.train, active.evaluate, active.bag)
    params = [section.model_dump(mode="json", exclude=left_out, exclude_defaults=True) for section in sections]
    content = {"params": params, "seeds": config.seeds, "data_md5": md5_of_file(Path("data/manifest.csv"))}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def list_sources(table: pd.DataFrame) -> pd.DataFrame:
    """List the sources of the labeled images, and which of them external validation is possible for.

    Args:
        table: from `manifest.read_split`; groups with an image of a source leave training together.

    Returns:
        A row per source: `source`, `COUNTS` of the images that would be external, and the `reason` why it cannot be
        held out, or an empty text.

    Raises:
        UserError: no source is known.
    """
    labeled = table[table["set"] == "train"]
    images = ValidationSet(labeled["label"].to_numpy(dtype=int), labeled["group"].to_numpy(), resamples=0)
    rows = []
    for source in sorted(set(labeled["source"]) - {""}):
        external = np.isin(images.groups, images.groups[labeled["source"] == source])
        counts, rest = (count_patients(images, np.flatnonzero(mask)) for mask in (external, ~external))
        reason = too_few_patients(counts)
        if not reason and (left := too_few_patients(rest)):
            reason = f"leaves for training: {left}"
        rows.append({"source": source, **counts, "reason": reason})
    if not rows:
        raise UserError(
            "no source of the labeled images is known; give the archive a metadata.csv with it (docs/data.md)"
        )
    return pd.DataFrame(rows)


def summarize_sources(table: pd.DataFrame) -> pd.DataFrame:
    """Pool the AUROC over the sources, for each role; see `pool_effects` and `prediction_interval`.

    It is pooled as a logit, whose standard error is that of its 95 % interval (Debray et al. 2017,
    doi:10.1136/bmj.i6460).

    Args:
        table: rows of `external_table` for every source.

    Returns:
        For each role, a row with the mean `auroc` of sources, one with the interval in which that of a new source is
        predicted, and one with the standard deviation of its logit between sources, `tau`. With fewer than two sources
        there is a `reason` instead.
    """
    rows = []
    for role, of_role in table[table["metric"] == "auroc"].groupby("role"):
        # Without an interval that ends below 1, an AUROC has no standard error on the scale of the logit.
        usable = of_role[of_role["low"].gt(0) & of_role["high"].lt(1)]
        left_out = sorted(set(of_role["source"]) - set(usable["source"]))
        reason = f"without {', '.join(left_out)}: no standard error" if left_out else ""
        row = {"source": SUMMARY, "role": role, "metric": "auroc", "method": "random effects", "reason": reason}
        row |= {count: usable[count].sum() for count in COUNTS}
        names = set(usable["model"])
        row["model"] = names.pop() if len(names) == 1 else ""
        if len(usable) < 2:
            needs = f"{len(usable)} source(s) with a standard error; a summary needs two"
            rows += [row | {"method": "", "reason": needs}]
            continue
        values, low, high = (logit(usable[column].to_numpy(float)) for column in ("value", "low", "high"))
        standard_errors = (high - low) / (2 * norm.ppf((1 + CONFIDENCE_LEVEL) / 2))
        pooled = pool_effects(values, standard_errors**2)
        rows.append(row | {"value": expit(pooled.mean), "low": expit(pooled.low), "high": expit(pooled.high)})
        low_new, high_new = expit(prediction_interval(values, standard_errors**2))
        rows.append(row | {"source": NEW_SOURCE, "method": "prediction interval", "low": low_new, "high": high_new})
        rows.append(row | {"metric": "tau", "value": pooled.tau})
    return pd.DataFrame(rows, columns=COLUMNS)


def pool_effects(effects: np.ndarray, variances: np.ndarray) -> PooledEffect:
    """Pool the effects of studies by a random-effects model.

    The variance between studies is DerSimonian and Laird's (1986, doi:10.1016/0197-2456(86)90046-2), the interval of
    the mean Hartung and Knapp's (2001, doi:10.1002/sim.1009).

    Args:
        effects: (K,), one per study, at least two.
        variances: (K,), the squared standard error of each.
    """
    degrees, weights = len(effects) - 1, 1 / variances
    heterogeneity = (weights * (effects - np.average(effects, weights=weights)) ** 2).sum()  # Cochran's Q
    excess = (heterogeneity - degrees) / (weights.sum() - (weights**2).sum() / weights.sum())
    between = max(0.0, float(excess))
    weights = 1 / (variances + between)
    mean = float(np.average(effects, weights=weights))
    variance = (weights * (effects - mean) ** 2).sum() / (degrees * weights.sum())
    half_width = float(t.ppf((1 + CONFIDENCE_LEVEL) / 2, degrees) * np.sqrt(variance))
    return PooledEffect(mean, mean - half_width, mean + half_width, float(np.sqrt(between)))


def prediction_interval(effects: np.ndarray, variances: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95 % interval for the effect in a new study (Nagashima, Noma and Furukawa 2019).

    It keeps its level with few studies (doi:10.1177/0962280218773520), unlike that of Higgins, Thompson and
    Spiegelhalter: the variance between studies is drawn from its confidence distribution instead of being plugged in.

    Args:
        effects: (K,), one per study, at least two.
        variances: (K,), the squared standard error of each.
    """
    rng, count = np.random.default_rng(0), len(effects)
    weights, errors = 1 / variances, rng.standard_normal((DRAWS, count))

    def cochran_q(values: np.ndarray) -> np.ndarray:
        centered = values - np.average(values, axis=1, weights=weights)[:, None]
        return np.asarray((weights * centered**2).sum(axis=1))

    # The confidence distribution: how probable a Q above the observed one is, by the variance between studies.
    candidates = (variances.mean() + effects.var()) * np.append(0, np.geomspace(1e-4, 1e4, 100))
    observed = cochran_q(effects[None])
    probabilities = [(cochran_q(errors * np.sqrt(variances + between)) >= observed).mean() for between in candidates]
    draws = np.interp(rng.uniform(size=DRAWS), np.maximum.accumulate(probabilities), candidates)

    weights = 1 / (variances + draws[:, None])
    means = (weights * effects).sum(axis=1) / weights.sum(axis=1)
    residuals = (weights * (effects - means[:, None]) ** 2).sum(axis=1)
    standard_errors = np.sqrt(residuals / ((count - 1) * weights.sum(axis=1)))
    new = means + np.sqrt(draws) * rng.standard_normal(DRAWS) - rng.standard_t(count - 1, DRAWS) * standard_errors
    return percentile_ends(new)
