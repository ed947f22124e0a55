import time
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.files import read_text_table
from pipeline.data.demographics import read_patient
from pipeline.data.file_names import match_files, quote_nearest


def match(names: list[str], files: list[str]) -> list[str]:
    return match_files(pd.Series(names, dtype="str"), files).tolist()


@pytest.mark.parametrize(
    "name",
    [
        "a00.png", " a00.png", "a00.png\u00a0", "\ufeffa00.png\u200b", "./a00.png", "/a00.png", "images/a00.png",
        "D:\\images\\a00.png", "a00", "A00.PNG", "A00", "a00.jpg", "a00.dcm", "images//a00.png",
    ],
)  # fmt: skip
def test_a_name_means_a_file_however_it_is_written(name):
    assert match([name], ["a00.png", "a01.png", "b/a000.png"]) == ["a00.png"]


@pytest.mark.parametrize(
    ("names", "files", "expected"),
    [
        (["a"], ["a.png", "a.jpg"], [""]),
        (["A.png"], ["a.png", "a.PNG"], [""]),
        (["1.png"], ["x/1.png", "y/1.png"], [""]),
        (["a.png", "A.png"], ["a.png"], ["a.png", ""]),
        (["a.PNG", "A.png"], ["a.png"], ["", ""]),
        (["x/1.png", "y/1.png"], ["1.png"], ["", ""]),
        (["a", "a.jpg"], ["a.png"], ["a.png", ""]),
        (["a.png", "a.png ", "./a.png"], ["a.png"], ["a.png"] * 3),
        (["a.png ", "A.png"], ["a.png"], ["a.png", ""]),
        (["", " ", "."], ["a.png"], [""] * 3),
        (["p1/1.png", "p2/2.png"], ["p2/1.png", "p2/2.png", "p3/1.png"], ["", "p2/2.png"]),
        (["a.png.png", "a.png"], ["a.png"], ["", "a.png"]),
        (["mask.png"], ["images/a.png"], [""]),
    ],
)
def test_what_is_ambiguous_means_nothing(names, files, expected):
    assert match(names, files) == expected


def test_names_of_numbers_and_dots_have_no_ending():
    files = ["1.2.840.113619.2.5.dcm", "1.2.840.113619.2.6", "1.2.840.113619.2.7.DCM"]
    assert match(["1.2.840.113619.2.5", "1.2.840.113619.2.6.dcm", "1.2.840.113619.2"], files) == [*files[:2], ""]


def test_most_of_the_last_parts_of_a_path_decide():
    files = [f"{root}/{patient}/study1/view1.jpg" for root in ("train", "valid") for patient in ("p1", "p2")]
    assert match([f"CheXpert-v1.0-small/{file}" for file in files], files) == files
    assert match(["p1/study1/view1.jpg"], files) == [""]
    assert match(["TRAIN/p1/study1/view1"], files) == [files[0]]
    assert match(["other/p1/study1/view1.jpg"], files[::2]) == [""]  # that of train or of valid


def test_other_folders_are_overlooked_only_where_names_are_unique():
    assert match(["/home/me/a.png", "/home/me/b.png"], ["images/a.png", "images/b.png"]) == [
        "images/a.png",
        "images/b.png",
    ]
    assert match(["p1/1.png", "p1/2.png"], ["p2/1.png", "p3/2.png", "p3/1.png"]) == ["", ""]
    assert match(["x/a.png", "x/sub/a.png"], ["a.png", "sub/a.png"]) == ["a.png", "sub/a.png"]


def test_spelling_decides_between_files_that_differ_in_case():
    assert match(["images/A.png", "images/a.png"], ["A.png", "a.png"]) == ["A.png", "a.png"]


def test_unicode_forms_are_equal_and_two_files_that_differ_in_it_are_told_apart():
    composed, decomposed = "R\u00f6ntgen.png", "Ro\u0308ntgen.png"
    assert match([composed], [decomposed]) == [decomposed]
    assert match([decomposed, "r\u00d6NTGEN"], [composed])[0] == composed
    assert match([composed, decomposed], [composed, decomposed]) == [composed, decomposed]
    assert match(["STRASSE.png"], ["stra\u00dfe.png"]) == ["stra\u00dfe.png"]


ALPHABET = ["a", "A", "b", ".png", ".jpg", "/", "\\", " ", "\u00e4", "a\u0308", "1.2"]
PATHS = st.lists(st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=6).map("".join), max_size=8)


@given(PATHS, PATHS, st.randoms(use_true_random=False))
def test_the_order_of_names_and_files_changes_nothing(names, files, random):
    matches = dict(zip(names, match(names, files), strict=True))
    shuffled_names, shuffled_files = random.sample(names, len(names)), random.sample(files, len(files))
    assert dict(zip(shuffled_names, match(shuffled_names, shuffled_files), strict=True)) == matches


def plain(path: str) -> list[str]:
    parts = unicodedata.normalize("NFC", path).replace("\\", "/").split("/")
    return [part.strip() for part in parts if part.strip()]


@given(PATHS, PATHS)
def test_files_match_themselves_and_no_two_names_share_a_file_by_a_weak_rule(names, files):
    found = match([*names, *files], files)
    assert found[len(names) :] == [file if plain(file) else "" for file in files]
    meant: dict[str, list[str]] = {}
    for name, file in zip([*names, *files], found, strict=True):
        assert not file or plain(name) == meant.setdefault(file, plain(name))


@given(PATHS, PATHS)
def test_every_match_is_equal_without_case_folder_and_ending(names, files):
    def stem(path: str) -> str:
        name = "".join(plain(path)[-1:]).lower()
        return name.removesuffix(".png").removesuffix(".jpg")

    for name, file in zip(names, match(names, files), strict=True):
        assert not file or (file in files and stem(stem(name)) == stem(stem(file)))


def test_many_names_are_matched_in_linear_time():
    files = [f"files/p{index % 10}/p{index // 8:06}/{index * 7919 % 100003:05}-{index}.jpg" for index in range(8_000)]
    names = [file.rpartition("/")[2].removesuffix(".jpg") for file in files]
    start = time.process_time()
    assert match(names, files) == files
    assert match([*files[:-1], "missing.png"], files) == [*files[:-1], ""]
    assert time.process_time() - start < 5


def test_the_nearest_name_is_shown():
    files = ["Im4.JPG", "R\u00f6ntgen.png", "image_0001.png", "x/1.png", "y/1.png", "pat\u0430.png", "0070.png"]
    assert quote_nearest("im4.jpg", files) == "'im4.jpg' (did you mean 'Im4.JPG'?)"
    assert quote_nearest("Ro\u0308ntgen", files) == "'Ro\\u0308ntgen' (did you mean 'R\\xf6ntgen.png'?)"
    assert quote_nearest("imge_0001.png", files) == "'imge_0001.png' (did you mean 'image_0001.png'?)"
    assert quote_nearest("1.png", files) == "'1.png' (is it 'x/1.png' or 'y/1.png'?)"
    assert quote_nearest("pata.png", files) == "'pata.png' (did you mean 'pat\\u0430.png'?)"
    for name in ("70", "70.0", "70.png"):  # as a spreadsheet writes it
        assert quote_nearest(name, files) == f"'{name}' (did you mean '0070.png'?)"
    assert quote_nearest("other", files) == "'other'"
    assert quote_nearest("", []) == "''"


CASES = Path(ROOT.parent, "shared/data/cases/19-table-csv-quirks")


@pytest.mark.skipif(not CASES.exists(), reason="needs files beside the project")
def test_the_tables_beside_the_project_are_read():
    images = sorted(f"images/{path.name}" for path in (CASES / "images").iterdir())
    for path in sorted(CASES.glob("*.csv")):
        table = read_text_table(path, str(path), ["image", "diagnosis", "case"])
        assert sorted(match_files(table["image"], images)) == images
        if path.stem not in ("na", "latin1"):
            assert read_patient(table["case"]).nunique() == 4
