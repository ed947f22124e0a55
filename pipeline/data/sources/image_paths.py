"""What the path of a file says: whether it may be an image, its folders and name, and by a pattern its patient."""

import re

import pandas as pd

# Files that describe images. All others are taken for images, also those without an ending, as DICOM may be.
DESCRIPTION = re.compile(
    r"(?:.*\.(?:csv|tsv|txt|md|rst|json|xml|ya?ml|xlsx?|docx?|pdf|html?|ini|log|py|ipynb|npy|npz|zip|gz|tar|tgz|bz2|xz|7z|rar|md5|exe|dll|inf)"
    r"|readme|licen[cs]e|dicomdir|\..*)"
)


def is_image(path: str) -> bool:
    """Return whether a file may be an image, which all are but those whose names are of tables and texts."""
    return not DESCRIPTION.fullmatch(path.rpartition("/")[2].lower())


def split_path(path: str) -> list[str]:
    r"""Return the folders and the name in a path, with `/` or `\` between them.

    Joined by `_`, they are the name in the zip. Two paths such as `a/b_1.png` and `a_b/1.png` get the same name, which
    `archive_writer.write_zip_of_files` refuses.
    """
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]


def extract(values: pd.Series, pattern: str, name: str, notes: list[str]) -> pd.Series:
    """Take the group of a regular expression, which may match anywhere in a text, such as the patient in a path.

    Args:
        values: texts, (N,).
        pattern: with one group.
        name: of what is taken, such as "patient in the path".
        notes: to which the number of texts that have none is added, and the first of them.

    Returns:
        (N,) with the index of `values`: the group, or an empty text.
    """
    found = values.str.extract(re.compile(pattern), expand=False).fillna("").astype("str").str.strip()
    without = values[(found == "") & (values != "")]
    if len(without):
        notes.append(
            f"download.patterns finds no {name} in {len(without)} of {len(values)}, the first is {without.iloc[0]!r}"
        )
    return found
