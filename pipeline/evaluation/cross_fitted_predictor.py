"""A model or ensemble whose threshold, weights and recalibration are fitted on the validation set, and evaluated there.

Shortcut baselines are evaluated by the same class, so that they are cut by the same rule as the models.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from pipeline.core.config import Config, EvaluateParams, Method
from pipeline.evaluation import ensemble, metric_tables, operating_point
from pipeline.evaluation.cross_fitting import cross_fit
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.evaluation.metric_tables import Predictions, ValidationSet
from pipeline.evaluation.metrics import THRESHOLD_METRICS, compute_metrics


class CrossFittedPredictor:
    """Fits an `EnsembleConfig` on the validation set and predicts that set.

    Attributes:
        ensemble_config: fitted on all validation images.
        predictions: cross-fitted if anything was fitted and the folds allow it; see `Predictions.estimate_type`.
        apparent_predictions: of `ensemble_config`, on the images that it was fitted on.
        scores: (N,), in [0, 1], of `predictions`.
        thresholds: (N,), of these scores.
        probabilities: (N,), P(positive) of `predictions`: the recalibrated scores.
    """

    def __init__(
        self, config: Config, validation: ValidationSet, members: pd.DataFrame, method: Method = "mean"
    ) -> None:
        params, tie = config.active.evaluate, config.active.bag.tie

        def fit(rows: np.ndarray) -> EnsembleConfig:
            return ensemble.fit_ensemble(
                validation.labels[rows], members.iloc[rows], validation.groups[rows], method, tie, params
            )

        def predict(fitted: EnsembleConfig, rows: np.ndarray) -> np.ndarray:
            return ensemble.predict(members.iloc[rows], fitted).assign(threshold=fitted.threshold).to_numpy(float)

        all_rows = np.arange(len(members))
        self.ensemble_config = fit(all_rows)
        apparent = predict(self.ensemble_config, all_rows)
        has_weights = self.ensemble_config.method == "greedy"
        has_threshold = has_weights or params.operating_point != "half"
        is_recalibrated = has_weights or self.ensemble_config.prevalence is not None
        cross_fitted = cross_fit(validation.folds, fit, predict) if has_threshold or is_recalibrated else None
        estimate_type = "apparent" if cross_fitted is None else "cross-fitted"
        values = apparent if cross_fitted is None else cross_fitted
        self.scores, self.probabilities, self.thresholds = values[:, 0], values[:, 1], values[:, 3]
        self.predictions = _make_predictions(
            values, *(estimate_type if fitted else "fixed" for fitted in (has_threshold, has_weights, is_recalibrated))
        )
        self.apparent_predictions = _make_predictions(apparent, "apparent", "apparent", "apparent")
        self._params = params

    def bootstrap_metrics(self, validation: ValidationSet) -> pd.DataFrame:
        """Return the metrics on every resample, including the variation of a threshold that was fitted.

        With a fitted threshold, every resample is evaluated at the threshold that another, independent one chooses. If
        the resample chose its own, it would be evaluated on the images that made the choice.

        Args:
            validation: the set that the predictor was made with.

        Returns:
            The columns of `compute_metrics`; the first row has the metrics of `predictions`.
        """
        metrics = validation.bootstrap_metrics(self.predictions)
        if self._params.operating_point == "half" or len(metrics) == 1:
            return metrics
        labels, weights = validation.labels, validation.weights[1:]
        thresholds = operating_point.choose_thresholds(
            labels, self.scores, validation.groups, np.roll(weights, 1, axis=0), self._params
        )
        # Counts of true and false positives and negatives, as four images whose weights differ by resample
        cells = np.empty((len(weights), 4))
        for row, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True)):
            cells[row] = np.bincount(2 * labels + (self.scores >= threshold), weight, minlength=4)
        refitted = compute_metrics(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), None, cells)
        metrics.loc[1:, THRESHOLD_METRICS] = refitted[THRESHOLD_METRICS].to_numpy()
        return metrics


def with_fitted_threshold(config: Config) -> Config:
    """Return the configuration with the rule `best_f1` in place of `half`, by which shortcut baselines are cut.

    Scores mean different things at 0.5 where models were trained with different shares of positives, such as networks
    with oversampling and baselines without it.
    """
    if config.active.evaluate.operating_point != "half":
        return config
    evaluate = config.active.evaluate.model_copy(update={"operating_point": "best_f1"})
    sections = config.profiles[config.profile].model_copy(update={"evaluate": evaluate})
    return config.model_copy(update={"profiles": config.profiles | {config.profile: sections}})


def fair_threshold_comparison(
    config: Config,
    validation: ValidationSet,
    model: str,
    scores: np.ndarray,
    baselines: Mapping[str, Predictions],
    baseline_samples: Mapping[str, pd.DataFrame],
) -> pd.DataFrame:
    """Compare shortcut baselines with a model, at thresholds that the same rule chooses for each of them.

    The rule is that of `with_fitted_threshold`. All thresholds are cross-fitted where the folds allow it.

    Args:
        config: contains the rule.
        validation: the set.
        model: name of the model.
        scores: (N,), its scores in [0, 1], without any NaN.
        baselines: by name, at thresholds by this rule.
        baseline_samples: their metrics on every resample.

    Returns:
        The columns of `metric_tables.difference_table`, and `rule`; a row per baseline and metric.
    """
    config = with_fitted_threshold(config)
    predictor = CrossFittedPredictor(config, validation, pd.DataFrame({model: scores}))
    table = metric_tables.difference_table(
        validation,
        {**baselines, model: predictor.predictions},
        {**baseline_samples, model: predictor.bootstrap_metrics(validation)},
        [model],
    )
    return table.assign(rule=config.active.evaluate.operating_point)


def operating_point_table(
    validation: ValidationSet, predictors: Mapping[str, CrossFittedPredictor], params: EvaluateParams
) -> pd.DataFrame:
    """Tabulate the threshold of every predictor with its metrics, both cross-fitted and apparent where they differ.

    Returns:
        `model`; `chosen_by`, the rule; `threshold`, of the score, and `probability_threshold`, the same after the
        recalibration for a share of positives of `prevalence`; `estimate_type`; the counts `tp`, `fp`, `fn` and `tn`
        and the metrics of these predictions; and the `caveat` of the rule, if any.
    """
    rows, caveat = [], operating_point.sensitivity_caveat(validation.labels, validation.groups, params)
    for name, predictor in predictors.items():
        config = predictor.ensemble_config
        estimates = [predictor.predictions]
        if predictor.predictions.estimate_type == "cross-fitted":
            estimates.append(predictor.apparent_predictions)
        for estimate in estimates:
            row = {
                "model": name,
                "chosen_by": params.operating_point,
                "threshold": config.threshold,
                "probability_threshold": config.threshold_probability,
                "prevalence": config.prevalence,
                "estimate_type": estimate.estimate_type,
            }
            cells = confusion_matrix(validation.labels, estimate.predicted, labels=[0, 1]).ravel()
            row |= dict(zip(["tn", "fp", "fn", "tp"], map(int, cells), strict=True))
            metrics = compute_metrics(validation.labels, estimate.predicted, None, validation.weights[:1]).iloc[0]
            rows.append(row | metrics.to_dict() | {"caveat": caveat})
    return pd.DataFrame(rows)


def _make_predictions(values: np.ndarray, estimate_type: str, score_type: str, probability_type: str) -> Predictions:
    scores, probabilities, predicted, _ = values.T
    return Predictions(
        predicted,
        probabilities,
        estimate_type,
        scores=scores,
        score_type=score_type,
        probability_type=probability_type,
    )
