"""What every export says of a candidate, so that other programs compute what `Candidate.predict` does."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipeline.inference.candidate import Candidate

SQUARES = {  # antialiased, with Pillow
    "stretch": "image.resize(({0}, {0}), Image.Resampling.BILINEAR)",
    "pad": "ImageOps.pad(image, ({0}, {0}), Image.Resampling.BILINEAR, color=0)",
}


def describe_ensemble(candidate: Candidate, origin: Mapping[str, str]) -> dict[str, Any]:
    """Describe a candidate for JSON.

    Args:
        candidate: the model.
        origin: entries that say where it is from, such as the version.

    Returns:
        `origin`; the finding and the names of its classes; the fields of `EnsembleConfig`, except that `threshold` is
        the probability from which the label is 1, and that of the score is `score_threshold`; and `square`, Python code
        that makes the square of an upright gray `image` of Pillow, with its edge `image_size`, pixels.
    """
    return {
        **origin,
        "finding": candidate.finding.name,
        "classes": list(candidate.finding.class_names),
        **asdict(candidate.config),
        "threshold": candidate.config.threshold_probability,
        "score_threshold": candidate.config.threshold,
        "image_size": candidate.packed_size,
        "square": SQUARES[candidate.resize].format(candidate.packed_size),
    }
