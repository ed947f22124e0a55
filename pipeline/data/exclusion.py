"""The images that `prepare.views` and `prepare.excluded_files` leave out."""

import logging
from collections.abc import Sequence

import pandas as pd

from pipeline.core.config import PrepareParams
from pipeline.core.errors import UserError
from pipeline.data.file_names import match_files, quote_nearest
from pipeline.data.views import is_known, is_view

log = logging.getLogger(__name__)

MAX_LISTED = 10  # values in a message
# Reasons in quarantine.csv
EXCLUDED_FILE = "listed in prepare.excluded_files"
EXCLUDED_VIEW = ": not in prepare.views"  # after the word view and the view as it is written


def exclusion_reasons(images: pd.DataFrame, params: PrepareParams) -> pd.Series:
    """Return why images are left out, as quarantine.csv lists it.

    A view that is not known stays in, and so does one that may be wanted: FRONTAL where PA is wanted.

    Args:
        images: N rows with the columns file and view.
        params: the views to keep, and the files to leave out.

    Returns:
        (N,) with the index of `images`: the reason, or an empty text.

    Raises:
        UserError: `excluded_files` has a name that is no image.
    """
    reasons, view = pd.Series("", index=images.index, dtype="str"), images["view"]
    if params.views is not None:
        is_excluded = is_known(view) & ~is_view(view, params.views)
        reasons = reasons.mask(is_excluded, "view " + view.str.strip() + EXCLUDED_VIEW)
    if params.excluded_files:
        files, names = images["file"].tolist(), pd.Series(params.excluded_files, dtype="str")
        found = match_files(names, files)
        if (found == "").any():
            nearest = quote_nearest(names[found == ""].iloc[0], files)
            raise UserError(f"params.yaml: prepare.excluded_files: no image is named {nearest}; correct or delete it")
        reasons = reasons.mask(images["file"].isin(found), EXCLUDED_FILE)
    return reasons


def excluded_views(reasons: pd.Series) -> pd.Series:
    """Take from the reasons in quarantine.csv, (Q,), the views of the images that `prepare.views` left out."""
    return reasons.str.extract(f"^view (.*){EXCLUDED_VIEW}$", expand=False).dropna()


def count_values(values: pd.Series) -> str:
    """Count the values of a text column in a line, the most frequent first; empty ones are not known."""
    counts = values.str.strip().replace("", "not known").value_counts()
    listed = [f"{count} × {name}" for name, count in counts.head(MAX_LISTED).items()]
    return ", ".join(listed) + (f" and {len(counts) - MAX_LISTED} more" if len(counts) > MAX_LISTED else "")


def report_exclusions(
    images: pd.DataFrame, reasons: pd.Series, wanted: Sequence[str] | None, *, needs_every_test_image: bool
) -> None:
    """Log how many images are left out, how many stay in because their view is not known, and views that none has.

    Args:
        images: N rows with the columns file, set (train or test) and view.
        reasons: (N,), from `exclusion_reasons`.
        wanted: the views to keep, or None for all.
        needs_every_test_image: whether a submission must have a row for each test image.

    Raises:
        UserError: no labeled image, or no test image, is left; or a test image that a submission needs is left out.
    """
    is_excluded, is_test = reasons != "", images["set"] == "test"
    excluded = images[is_excluded]
    if excluded.empty and wanted is None:
        return
    for name, rows in (("labeled", ~is_test), ("test", is_test)):
        if rows.any() and is_excluded[rows].all():
            raise UserError(
                f"prepare.views and prepare.excluded_files leave out every {name} image; their views: "
                f"{count_values(images['view'][rows])}; correct them in params.yaml"
            )
    test = images[is_excluded & is_test]
    if needs_every_test_image and len(test):
        raise UserError(
            f"prepare leaves out {len(test)} test images, the first is {test['file'].iloc[0]} "
            f"({reasons[test.index[0]]}), but a submission to Kaggle needs every test image; correct prepare.views and "
            "prepare.excluded_files in params.yaml"
        )
    for one in wanted or []:
        if not is_view(images["view"], [one]).any():
            log.warning("prepare.views: no image has the view %s; found: %s", one, count_values(images["view"]))
    if len(excluded):
        log.warning(
            "%s of %s images are left out, as prepare.views and prepare.excluded_files say (views: %s); %s of them are "
            "test images, which no prediction or submission will have; data/quarantine.csv lists them",
            len(excluded),
            len(images),
            count_values(excluded["view"]),
            len(test),
        )
    unknown = images[~is_known(images["view"]) & ~is_excluded]
    if wanted is not None and len(unknown):
        log.warning(
            "%s of %s images stay in because their view is not known, the first is %s",
            len(unknown),
            len(images),
            unknown["file"].iloc[0],
        )
