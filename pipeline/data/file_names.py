"""Matching of the names of images as tables write them with the files that exist."""

import bisect
import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cached_property

import pandas as pd

from pipeline.core.files import BLANKS

# Endings of pictures; in names such as 1.2.840.113619.2.5 the last dot starts none.
IMAGE_ENDING = re.compile(
    r"(?<=.)\.(?:jpe?g|jpe|jfif|png|dcm|dicom|ima|tiff?|bmp|gif|webp|jp2|j2k|jpx|jls|hei[cf]|avif|p[gnp]m)$"
)
NUMBER = re.compile(r"0*(\d+?)(?:\.0+)?")
SPELLED, FOLDED, STEM = range(3)  # forms of a path
NEIGHBORS = 50  # names before and after, in alphabetical order, that a suggestion is chosen from


def match_files(names: pd.Series, files: Collection[str]) -> pd.Series:
    r"""Find the file that each name means.

    A name that is a file means that file. Blanks at the ends (also non-breaking and invisible ones), the Unicode form,
    `\` for `/`, `./` and a leading `/` never count. Any other name means the file that agrees in most of the last parts
    of the path; of several, in this order, in spelling, but for upper and lower case, or with an ending such as `.png`
    that the name lacks. Only where there is none, it means a file with another ending. The folders before these parts
    may differ only if one path ends with the other, or if these parts alone tell all names and all files apart.

    A name means none if several files fit equally well, or if another path among the names fits the file as well or
    better. The order of names and files changes nothing.

    Args:
        names: as they stand in a table, (N,); equal ones mean the same file.
        files: paths with `/` between folders.

    Returns:
        (N,) with the index of `names`: the file, or an empty text where none or more than one fits.
    """
    unique, known = [name for name in names.unique() if isinstance(name, str)], set(files)
    matches = {name: name for name in unique if name in known and _split(name)}
    others = [name for name in unique if name not in matches]
    if others:
        matches |= _Matching(unique, known).match(others, set(matches))
    return names.map(matches).astype("object").fillna("").astype("str")


def quote_nearest(name: str, files: Collection[str]) -> str:
    """Quote a name that means no file, with the files that it may mean, for an error message.

    Returns:
        Such as `'im4.jpg' (did you mean 'Im4.JPG'?)`; in ASCII escapes where both look alike.
    """
    known, stem = sorted(set(files)), _stem(name)
    fits = [file for file in known if stem and _stem(file) == stem]
    if not fits and (number := NUMBER.fullmatch(stem)):  # a spreadsheet may have taken 0012 for 12 or 12.0
        fits = [file for file in known if _stem(file).lstrip("0") == number[1]]
    if len(fits) > 1:
        return f"{name!r} (is it {fits[0]!r} or {fits[1]!r}?)"
    nearest = fits[0] if fits else _find_similar(stem, known)
    if not nearest:
        return repr(name)
    is_composed = unicodedata.is_normalized("NFC", name) and unicodedata.is_normalized("NFC", nearest)
    quote = repr if is_composed and not _look_alike(name, nearest) else ascii
    return f"{quote(name)} (did you mean {quote(nearest)}?)"


def _find_similar(stem: str, files: list[str]) -> str:
    """Return the file with the most similar name among those near to it in alphabetical order, or an empty text."""
    by_stem = sorted((_stem(file), file) for file in files)
    position = bisect.bisect(by_stem, (stem, ""))
    near = dict(by_stem[max(position - NEIGHBORS, 0) : position + NEIGHBORS])
    similar = difflib.get_close_matches(stem, near, n=1, cutoff=0.75)
    return near[similar[0]] if similar else ""


def _look_alike(first: str, second: str) -> bool:
    """Tell whether two texts differ only in letters such as a Cyrillic one for a Latin one."""
    pairs = [pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]]
    return bool(pairs) and len(first) == len(second) and all(one.isascii() != other.isascii() for one, other in pairs)


class _Path:
    """A path as a table or a disk writes it.

    Attributes:
        text: the path.
        length: number of its parts, which are folders and the name.
        forms: the parts as spelled, in lower case, and without the ending of an image; first an empty one for the root.
    """

    __slots__ = ("forms", "length", "text")

    def __init__(self, text: str) -> None:
        spelled = ("", *_split(text))
        folded = tuple(map(_fold, spelled))
        self.text, self.length = text, len(spelled) - 1
        self.forms = spelled, folded, (*folded[:-1], IMAGE_ENDING.sub("", folded[-1]))


def _split(path: str) -> tuple[str, ...]:
    """Split a path into folders and name, in Unicode's composed form and without blanks at the ends."""
    parts = unicodedata.normalize("NFC", path).replace("\\", "/").split("/")
    return tuple(part for part in (part.strip(BLANKS) for part in parts) if part not in ("", "."))


def _fold(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text.casefold())


def _stem(path: str) -> str:
    """Return the last part of the path in lower case without the ending of an image."""
    return IMAGE_ENDING.sub("", _fold("".join(_split(path)[-1:])))


class _Matching:
    """Names that are no files, and files that may be meant by them."""

    def __init__(self, names: list[str], files: set[str]) -> None:
        """Take all names of the table, and all files."""
        self._names, self._files = [_Path(name) for name in names], [_Path(file) for file in files if _split(file)]
        self._matches: dict[_Path, str] = {}
        self._left: set[_Path] = set()  # names that no file fits so far
        self._taken: set[str] = set()  # files that fit a name by a stronger rule

    def match(self, names: list[str], taken: set[str]) -> dict[str, str]:
        """Match these of the names; no file of `taken` has another spelling."""
        unmatched, by_parts = set(names), _group(self._files, SPELLED)
        groups = _group((path for path in self._names if path.text in unmatched), SPELLED)
        groups.pop(("",), None)
        self._taken = taken
        for parts, (path, *_) in groups.items():
            fits = by_parts.get(parts, [])
            if len(fits) == 1:
                self._matches[path] = fits[0].text
            elif not fits:
                self._left.add(path)
            self._taken.update(file.text for file in fits)
        self._match_parts()
        return {
            path.text: self._matches[group[0]]
            for group in groups.values()
            for path in group
            if group[0] in self._matches
        }

    def _match_parts(self) -> None:
        stems = {path.forms[STEM][-1] for path in self._left}
        files = [path for path in self._files if path.forms[STEM][-1] in stems]
        depth = 1 + max((path.length for path in [*self._left, *files]), default=0)
        for rules in (((SPELLED, SPELLED), (FOLDED, FOLDED), (FOLDED, STEM)), ((STEM, STEM),)):
            for k in range(depth, 0, -1):
                for names, fits in _pair(self._left, files, (STEM, STEM), k):
                    for forms in rules:
                        for equal_names, equal_files in _pair(self._left.intersection(names), fits, forms, k):
                            self._match(equal_names, equal_files, k)

    def _match(self, names: list[_Path], files: list[_Path], k: int) -> None:
        """Match names with files of which the last `k` parts are equal, and leave neither for a weaker rule."""
        # One of the two paths must end with the other, unless these parts alone tell all images apart.
        ends = [file for file in files if file.length <= k]
        if len(ends) < len(files) and any(name.length > k for name in names) and k >= self._distinguishing_parts:
            ends = files
        fitting = {name: files if name.length <= k else ends for name in names}
        for name, fits in fitting.items():
            if len(names) == len(fits) == 1 and fits[0].text not in self._taken:
                self._matches[name] = fits[0].text
        self._left -= {name for name, fits in fitting.items() if fits}
        self._taken.update(file.text for file in max(fitting.values(), key=len))

    @cached_property
    def _distinguishing_parts(self) -> int:
        """How many of the last parts tell all names apart, and all files."""
        counts = [len(_group(paths, SPELLED)) for paths in (self._names, self._files)]
        depth = 1 + max(path.length for path in [*self._names, *self._files])
        for k in range(1, depth):
            if [len(_group(paths, FOLDED, k)) for paths in (self._names, self._files)] == counts:
                return k
        return depth


def _group(paths: Iterable[_Path], form: int, k: int = 0) -> dict[tuple[str, ...], list[_Path]]:
    """Group paths by the last `k` parts of a form, or by all."""
    groups: dict[tuple[str, ...], list[_Path]] = defaultdict(list)
    for path in paths:
        groups[path.forms[form][-k:]].append(path)
    return groups


def _pair(
    names: Collection[_Path], files: list[_Path], forms: tuple[int, int], k: int
) -> list[tuple[list[_Path], list[_Path]]]:
    """Return names and files whose last `k` parts are equal in the form of the names and that of the files."""
    if len(names) == len(files) == 1:  # nearly all
        name, file = *names, *files
        return [([name], files)] if name.forms[forms[0]][-k:] == file.forms[forms[1]][-k:] else []
    names_by_key = _group(names, forms[0], k)
    files_by_key = _group(files, forms[1], k) if names_by_key else {}
    return [(group, files_by_key[key]) for key, group in names_by_key.items() if key in files_by_key]
