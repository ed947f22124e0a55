"""Reading of the patients, their sex and age from tables of their owners."""

import re

import pandas as pd

from pipeline.core.errors import UserError

SEXES = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}  # O as in DICOM
UNKNOWN = {"", "u", "unknown", "na", "n/a", "nan", "none", "null", "<na>"}  # of sex and age, lower case
UNKNOWN_PATIENTS = UNKNOWN - {"", "u", "na"}  # NA is a possible name
AGE = re.compile(r"([0-9]{1,4}(?:\.[0-9]+)?)([dwmy]?)")  # years, or with a unit as in DICOM: 063Y, 018M
UNITS_PER_YEAR = {"": 1.0, "y": 1.0, "m": 12.0, "w": 52.1775, "d": 365.2425}
OLDEST = re.compile(r"(>|>=|≥)\s*([0-9]{2,3})|([0-9]{2,3})\+")  # ages that a de-identifier grouped, such as >89
MAX_AGE = 120.0  # years


def read_patient(values: pd.Series) -> pd.Series:
    """Return names in Unicode's composed form, 12 for 12.0, and an empty text for words such as nan and unknown."""
    return drop_decimals(values.where(~values.str.lower().isin(UNKNOWN_PATIENTS), "").str.normalize("NFC"))


def drop_decimals(identifiers: pd.Series) -> pd.Series:
    """Write 12.0 as 12: tables with empty fields are often saved with identifiers as floats."""
    return identifiers.str.replace(r"^(\d+)\.0+$", r"\1", regex=True).astype("str")


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
    _refuse(values, sex.isna(), table, "F, M or O (other)")
    return sex.astype("str")


def read_age(values: pd.Series, table: str) -> pd.Series:
    """Return ages in years, NaN if unknown.

    Args:
        values: text as it stands in the table, in years or as in DICOM (`063Y`, `018M`), or of the oldest together
            (`>89`, `90+`), of which the least age is returned; row 0 is on its second line.
        table: its name in error messages.

    Raises:
        UserError: a value is no age from 0 to `MAX_AGE` years.
    """
    text = values.str.strip().str.lower().str.strip("'").str.replace(OLDEST, _least_age, regex=True)
    parts = text.str.extract(f"^{AGE.pattern}$")
    age = parts[0].astype(float) / parts[1].map(UNITS_PER_YEAR).astype(float)
    invalid = ~text.isin(UNKNOWN) & ~(age <= MAX_AGE)
    _refuse(values, invalid, table, f"years from 0 to {MAX_AGE:g}, such as 63 or 063Y")
    return age


def _refuse(values: pd.Series, invalid: pd.Series, table: str, allowed: str) -> None:
    if invalid.any():
        row = values.index[invalid][0]
        raise UserError(
            f"{table} line {row + 2}: {values.name} is {values[row]!r} ({invalid.sum()} invalid in total); it must be "
            f"{allowed}, or empty if it is not known"
        )


def _least_age(group: re.Match[str]) -> str:
    """Return the least age, whole years, of such as `>89`; nothing else may stand in the text."""
    if group.group() != group.string:
        return group.group()
    return str(int(group[2]) + (group[1] == ">")) if group[2] else group[3]
