"""How many patients the intervals rest on, and how many more a narrower one would take."""

from bisect import bisect_left

import numpy as np
import pandas as pd

from pipeline.evaluation.intervals import NORMAL_QUANTILE, design_effect, t_correction, wilson_quantiles

HALF_WIDTH = 0.05  # of a 95 % interval
MAX_PATIENTS = 1_000_000  # more


def patients_for_half_width(hits: np.ndarray, groups: np.ndarray, half_width: float = HALF_WIDTH) -> int | None:
    """Return how many more patients a 95 % interval of a proportion takes to become as narrow as this.

    Proportion, images per patient and design effect are assumed to stay as observed.

    Args:
        hits: (N,), 1 for a correctly classified image of the class, 0 for another.
        groups: (N,), the name of each image's group (patient).
        half_width: half of the width of the interval, in (0, 0.5).

    Returns:
        0 if it is already; None for fewer than two patients, from which no design effect can be estimated, and if
        `MAX_PATIENTS` are too few.
    """
    patients = len(np.unique(groups))
    if patients < 2:
        return None
    images_per_patient, proportion = len(hits) / patients, float(np.mean(hits))
    size_per_patient = images_per_patient / design_effect(hits, groups)

    def is_enough(count: int) -> bool:
        size = count * size_per_patient * t_correction(count * images_per_patient, count)
        low, high = wilson_quantiles(proportion, size, np.array([-NORMAL_QUANTILE, NORMAL_QUANTILE]))
        return bool(high - low <= 2 * half_width)

    more = bisect_left(range(MAX_PATIENTS), True, key=lambda count: is_enough(patients + count))
    return more if more < MAX_PATIENTS else None


def sample_size_table(labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray) -> pd.DataFrame:
    """Count images and patients of each class.

    Args:
        labels: (N,), 0 or 1.
        predicted: (N,), the predicted labels, 0 or 1.
        groups: (N,), the name of each image's group (patient).

    Returns:
        A row for `recall` (positive images) and one for `specificity` (negative ones): `metric`, `images`, `patients`,
        `effective_images` (independent images that would carry as much information) and `more_patients`, see
        `patients_for_half_width`; the last two are missing for fewer than two patients.
    """
    rows = []
    for metric, label in (("recall", 1), ("specificity", 0)):
        of_class = np.asarray(labels) == label
        hits, of_groups = np.asarray(predicted)[of_class] == label, np.asarray(groups)[of_class]
        patients = len(np.unique(of_groups))
        rows.append(
            {
                "metric": metric,
                "images": int(of_class.sum()),
                "patients": patients,
                "effective_images": len(hits) / design_effect(hits, of_groups) if patients > 1 else np.nan,
                "more_patients": patients_for_half_width(hits, of_groups),
            }
        )
    return pd.DataFrame(rows).astype({"more_patients": "Int64"})
