"""Source: frontal radiographs of github.com/ieee8023/covid-chestxray-dataset (Cohen et al. 2020, arXiv:2006.11988)."""

import logging
from pathlib import Path

from pipeline.core.config import CovidChestXrayParams
from pipeline.data.demographics import read_age, read_sex
from pipeline.data.file_names import match_files
from pipeline.data.source_folder import open_source_folder
from pipeline.data.sources import archive_writer
from pipeline.data.views import is_view

log = logging.getLogger(__name__)

UNLABELED = ["", "todo", "unknown"]  # values of the column finding, lower case
COLUMNS = ["patientid", "finding", "view", "folder", "filename"]


def write_source(params: CovidChestXrayParams, target: Path) -> None:
    """Write the zip from a checkout of the repository; every finding that contains COVID-19 is positive.

    Lateral views, CT and images without a finding are excluded; `test_share` of the patients are the test set.

    Raises:
        UserError: metadata.csv or an image is missing, or a sex or age is invalid.
    """
    folder = open_source_folder(params.path, "a checkout of ieee8023/covid-chestxray-dataset")
    table = archive_writer.read_source_table(folder, "metadata.csv", COLUMNS)
    frontal = is_view(table["view"], ["PA", "AP"])
    unlabeled = table["finding"].str.strip().str.lower().isin(UNLABELED)
    for reason, left_out in (("are not frontal", ~frontal), ("have no finding", frontal & unlabeled)):
        if left_out.any():
            log.warning(
                "%s/metadata.csv: %s of %s images %s and are left out, the first is %s",
                folder.root, left_out.sum(), len(table), reason, table["filename"][left_out].iloc[0],
            )  # fmt: skip
    table = table[frontal & ~unlabeled]
    repeated = table["filename"][table["filename"].duplicated()]
    if len(repeated):
        log.warning(
            "%s/metadata.csv: %s lines repeat an image, the first %s; the first line of each counts",
            folder.root, len(repeated), repeated.iloc[0],
        )  # fmt: skip
    table = table.drop_duplicates("filename")
    optional = table.reindex(columns=["sex", "age", "license"], fill_value="")
    rows = table[["view"]].assign(
        file=table["filename"],
        label=table["finding"].str.contains("COVID-19", regex=False).astype("Int64"),
        is_test=archive_writer.draw_test_set(table["patientid"], table["filename"], params.test_share),
        patient=table["patientid"],
        source="cohen",
        sex=read_sex(optional["sex"], f"{folder.root}/metadata.csv"),
        age=read_age(optional["age"], f"{folder.root}/metadata.csv"),
        license=optional["license"],
        path=match_files(table["folder"] + "/" + table["filename"], folder.files),
    )
    archive_writer.write_zip_of_files(rows, folder, target, copy_images=params.copy_images)
