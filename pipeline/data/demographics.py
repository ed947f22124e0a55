"""Reading of the sex and age of patients from tables of their owners."""

import re

import pandas as pd

from pipeline.core.errors import UserError

SEXES = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}  # O as in DICOM
UNKNOWN = {"", "u", "unknown", "na", "n/a", "nan"}  # of sex and age, lower case
AGE = re.compile(r"([0-9]{1,4}(?:\.[0-9]+)?)([dwmy]?)")  # years, or with a unit as in DICOM: 063Y, 018M
UNITS_PER_YEAR = {"": 1.0, "y": 1.0, "m": 12.0, "w": 52.1775, "d": 365.2425}
MAX_AGE = 120.0  # years


def read_sex(values: pd.Series, table: str) -> pd.Series:
    """Return F, M, O (other) or, if unknown, an empty text.

    Args:
        values: text as it stands in the table; row 0 is on its second line.
        table: its name in error messages.

    Raises:
        UserError: a value is none of these, nor female, male or other; upper and lower case are equal.
    """
    known = {**SEXES, **dict.fromkeys(UNKNOWN, "")}
    sex = values.str.strip().str.lower().map(known)
    if sex.isna().any():
        row = sex.index[sex.isna()][0]
        raise UserError(
            f"{table} line {row + 2}: {values.name} is {values[row]!r} ({sex.isna().sum()} invalid in total); it "
            "must be F, M or O (other), or empty if it is not known"
        )
    return sex.astype("str")


def read_age(values: pd.Series, table: str) -> pd.Series:
    """Return ages in years, NaN if unknown.

    Args:
        values: text as it stands in the table, in years or as in DICOM (`063Y`, `018M`); row 0 is on its second line.
        table: its name in error messages.

    Raises:
        UserError: a value is no age from 0 to `MAX_AGE` years.
    """
    text = values.str.strip().str.lower()
    parts = text.str.extract(f"^{AGE.pattern}$")
    age = parts[0].astype(float) / parts[1].map(UNITS_PER_YEAR).astype(float)
    invalid = ~text.isin(UNKNOWN) & ~(age <= MAX_AGE)
    if invalid.any():
        row = values.index[invalid][0]
        raise UserError(
            f"{table} line {row + 2}: {values.name} is {values[row]!r} ({invalid.sum()} invalid in total); it must "
            f"be years from 0 to {MAX_AGE:g}, such as 63 or 063Y, or empty if it is not known"
        )
    return age
