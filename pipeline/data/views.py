"""What the written view of a radiograph means."""

import re
import unicodedata
from collections.abc import Collection

import pandas as pd

BASIC_PROJECTIONS = ("PA", "AP", "LL", "RL")
# Texts without blanks, with the projections that they may mean: the values of DICOM's View Position (0018,5101), the
# meanings of its view codes (PS3.16, CID 4010), and what CheXpert, MIMIC-CXR, PadChest and others write.
PROJECTIONS = {
    "PA": "PA",
    "POSTEROANTERIOR": "PA",
    "POSTERIORANTERIOR": "PA",
    "AP": "AP",
    "ANTEROPOSTERIOR": "AP",
    "ANTERIORPOSTERIOR": "AP",
    "FRONTAL": "PA AP",
    "LL": "LL",
    "LEFTLATERAL": "LL",
    "LLAT": "LL",
    "RL": "RL",
    "RIGHTLATERAL": "RL",
    "RLAT": "RL",
    "LATERAL": "LL RL",
    "LAT": "LL RL",
    "L": "LL RL",
}
# Words that say how the patient was positioned; the projection is the same.
POSITION_WORDS = {"SEMI", "ERECT", "SEMIERECT", "UPRIGHT", "STANDING", "SITTING", "SUPINE", "HORIZONTAL", "PORTABLE"}
FILLER_WORDS = {"VIEW", "PROJECTION", "CHEST"}
UNKNOWN = {"", "NA", "NAN", "NONE", "NULL", "UNK", "UNKNOWN", "NOT KNOWN", "N A"}


def possible_projections(view: str) -> frozenset[str]:
    """Return what a written view may mean; case, blanks and punctuation do not count.

    The projections are PA, AP, LL (left lateral) and RL (right lateral): FRONTAL may be PA or AP, and LATERAL or L may
    be LL or RL. A view that also says the position of the patient, such as AP Supine, means its projection and its own
    text; any other view, such as COSTAL or SWIMMERS, its own text only. The set is empty if the view is not known.
    """
    text = unicodedata.normalize("NFKC", view).upper()
    words = [word for word in re.split(r"[\W_]+", text) if word and word not in FILLER_WORDS]
    whole = " ".join(words)
    if whole in UNKNOWN:
        return frozenset()
    projections = PROJECTIONS.get("".join(word for word in words if word not in POSITION_WORDS), "").split()
    is_basic = projections and POSITION_WORDS.isdisjoint(words)
    return frozenset(projections if is_basic else [*projections, whole])


def is_known(view: pd.Series) -> pd.Series:
    """Return for each written view, (N,), whether it says anything."""
    return view.map({one: bool(possible_projections(one)) for one in view.unique()}).astype(bool)


def is_view(view: pd.Series, wanted: Collection[str]) -> pd.Series:
    """Return for each written view, (N,), whether it may be one of the wanted ones; an unknown view never is.

    FRONTAL may be PA. AP is wanted in any position of the patient, AP Supine only as such.
    """
    accepted = set[str]()
    for meaning in map(possible_projections, wanted):
        accepted |= meaning - set(BASIC_PROJECTIONS) or meaning
    return view.map({one: not accepted.isdisjoint(possible_projections(one)) for one in view.unique()}).astype(bool)
