import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import ROOT, error_message, write_files

from pipeline.core import config
from pipeline.core.config import (
    ArchiveParams,
    ColumnsParams,
    CovidChestXrayParams,
    CovidxParams,
    FoldersParams,
    TableParams,
)
from pipeline.core.files import sha256_of_file
from pipeline.data import layout
from pipeline.data.sources import archive_writer, fetch_source
from pipeline.data.test_labels import read_archived_labels

PAGES = [
    "data",
    *(f"data/{name}" for name in ("covidx", "covid-chestxray", "folders", "kermany", "radiography-database")),
]
SECTIONS = [
    (page, yaml.safe_load(text))
    for page in PAGES
    for text in re.findall(r"```yaml\n(download:.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
]
COLUMNS = ColumnsParams(file="image", label="diagnosis", patient="case")


def write_images(folder: Path, *names: str) -> None:
    """Write files that start as JPEGs do; no source decodes images."""
    write_files(folder, {name: b"\xff\xd8" + name.encode(errors="surrogateescape") for name in names})


def fetch_rows(params: config.DownloadParams, folder: Path) -> pd.DataFrame:
    """Fetch twice, check that both zips have the same bytes, and return the rows of the layout."""
    for name in ("one.zip", "two.zip"):
        fetch_source(params, folder / name)
    assert (folder / "one.zip").read_bytes() == (folder / "two.zip").read_bytes()
    rows = layout.read_layout(folder / "one.zip").images
    with zipfile.ZipFile(folder / "one.zip") as archive:
        assert all(archive.read(member).startswith(b"\xff\xd8") for member in filter(None, rows["member"]))
    return rows.set_index("file")


def labels_kept_apart(path: Path) -> dict[str, int]:
    """Return the labels of the test images, which the archive keeps apart."""
    return read_archived_labels(path).to_dict()


def documented_params(page: str, path: Path, index: int = 0) -> Any:
    """Return the parameters of a source as a page has them, with data at `path`."""
    section = [section["download"] for name, section in SECTIONS if name == f"data/{page}"][index]
    return config.SOURCES[section["source"]].model_validate(section | {"path": path})


def error_in_params(path: Path, download: dict[str, Any]) -> str:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    path.write_text(yaml.safe_dump(params | {"local": params["local"] | {"download": download}}))
    return error_message(config.load_config, path).removeprefix(f"{path}: local.download")


@pytest.mark.parametrize("section", [section for _, section in SECTIONS], ids=[page for page, _ in SECTIONS])
def test_a_documented_source_is_valid_and_its_misspelled_keys_are_named(tmp_path, section):
    params, path = yaml.safe_load((ROOT / "params.yaml").read_text()), tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params | {"local": params["local"] | section}))
    loaded = config.load_config(path).profiles["local"].download.model_dump(mode="json", exclude_unset=True)
    assert loaded == section["download"]
    message = error_in_params(path, section["download"] | {"pth": "x"})
    assert message == ".pth: unknown key; did you mean 'path'?"


def test_misspelled_columns_and_values_in_two_lists_are_named(tmp_path):
    table = {"source": "table", "columns": {"pateint": "x"}}
    message = error_in_params(tmp_path / "params.yaml", table)
    assert message == ".columns.pateint: unknown key; did you mean 'patient'?"
    for source, negative in (("table", ["0", "covid"]), ("folders", ["Covid"])):
        both = {"source": source, "positive": ["covid"], "negative": negative}
        message = error_in_params(tmp_path / "params.yaml", both)
        assert message == f": {negative[-1]!r} is in positive and in negative; keep it in one"


# COVIDx


@pytest.fixture
def covidx(tmp_path) -> Path:
    return write_covidx(tmp_path / "COVIDx")


def write_covidx(folder: Path) -> Path:
    train = (f"train/{name}" for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"))
    write_images(folder, *train, "test/e.jpg", "test/f.jpg")
    (folder / "train_COVIDx7B.txt").write_text(
        "SARS-10 1148rg a.jpg positive cohen\n"
        "p 2 of Hannover b.jpg positive ricord\n"
        "419 c.jpg negative rsna\n420 d.jpg negative rnsa\n"
    )
    (folder / "test.txt").write_text("419 e.jpg negative rsna\n\n7 f.jpg positive sirm\n")
    return folder


def covidx_params(folder: Path) -> CovidxParams:
    return CovidxParams(source="covidx", path=write_covidx(folder))


def test_covidx_may_have_spaces_in_patients_misspelled_sources_and_patients_in_both_sets(covidx, tmp_path):
    rows = fetch_rows(CovidxParams(source="covidx", path=covidx), tmp_path)
    assert list(rows.index) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]
    assert list(rows["patient"]) == ["SARS-10 1148rg", "p 2 of Hannover", "419", "420", "419", "7"]
    assert list(rows["source"]) == ["cohen", "ricord", "rsna", "rsna", "rsna", "sirm"]
    assert list(rows["set"]) == ["train"] * 4 + ["test"] * 2
    assert list(rows["label"][:4]) == [1, 1, 0, 0]
    assert rows["label"][4:].isna().all()
    assert labels_kept_apart(tmp_path / "one.zip") == {"e.jpg": 0, "f.jpg": 1}


def test_a_byte_order_mark_is_not_part_of_the_patient(covidx, tmp_path):
    path = covidx / "train_COVIDx7B.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    params = CovidxParams(source="covidx", path=covidx)
    assert fetch_rows(params, tmp_path)["patient"].iloc[0] == "SARS-10 1148rg"
    path.write_bytes(path.read_bytes().decode("utf-8-sig").replace("SARS", "SÄRS").encode("latin-1"))
    assert f"{path}: not encoded in UTF-8" in error_message(fetch_source, params, tmp_path / "raw.zip")


def test_the_three_classes_of_covidx_become_two_labels(covidx, tmp_path):
    (covidx / "train_COVIDx7B.txt").write_text("1 a.jpg COVID-19 x\n2 b.jpg pneumonia x\n3 c.jpg normal x\n")
    assert list(fetch_rows(CovidxParams(source="covidx", path=covidx), tmp_path)["label"][:3]) == [1, 0, 0]


@pytest.mark.parametrize("line", ["419 c.jpg level2 ricord", "419 c.jpg maybe rsna", "one two"])
def test_a_malformed_line_of_covidx_is_named(covidx, tmp_path, line):
    with (covidx / "test.txt").open("a") as out:
        out.write(line)
    message = error_message(fetch_source, CovidxParams(source="covidx", path=covidx), tmp_path / "raw.zip")
    assert message.startswith(f"{covidx / 'test.txt'} line 4: {line!r}; it must be patient, file, class and source")


def test_covidx_without_a_list_a_test_image_or_a_folder_is_an_error(covidx, tmp_path, caplog):
    (covidx / "train/b.jpg").unlink()
    params = CovidxParams(source="covidx", path=covidx)
    rows = fetch_rows(params, tmp_path)
    assert list(rows.index[rows["member"] == ""]) == ["b.jpg"]  # prepare quarantines it
    assert f"{covidx}: 'b.jpg' not found (1 labeled images in total)" in caplog.text
    (covidx / "test/e.jpg").unlink()
    assert error_message(fetch_source, params, tmp_path / "raw.zip").startswith(
        f"{covidx}: 'e.jpg' not found (1 missing"
    )
    (covidx / "test/E1.jpeg").touch()
    (covidx / "test.txt").write_text("419 E1.jpg negative rsna\n7 f.jpg positive sirm\n")
    (covidx / "test/e1.png").touch()
    message = error_message(fetch_source, params, tmp_path / "raw.zip")
    assert message.startswith(f"{covidx}: 'E1.jpg' (is it 'test/E1.jpeg' or 'test/e1.png'?) not found (1 missing")
    (covidx / "test.txt").unlink()
    assert "expected one list test*.txt, found none" in error_message(fetch_source, params, tmp_path / "raw.zip")
    for path, reason in ((None, "download.path: not set"), (tmp_path / "nowhere", "no such folder")):
        assert reason in error_message(fetch_source, CovidxParams(source="covidx", path=path), tmp_path / "raw.zip")


# The published versions of the lists: a train and a test line of the kind that each has
COVIDX_LISTS = [
    ("train_split_v1.txt", "test_split_v1.txt", "7 b.jpg viral", "8 e.jpg bacteria"),
    ("train_split_v3.txt", "test_split_v3.txt", "7 b.jpg pneumonia", "8 e.jpg COVID-19"),
    ("train_COVIDx.txt", "test_COVIDx.txt", "7 b.jpg COVID-19", "8 e.jpg normal"),
    ("train_COVIDx4.txt", "test_COVIDx4.txt", "7 b.jpg pneumonia cohen", "8 e.jpg normal"),
    ("train_COVIDx6.txt", "test_COVIDx6.txt", "7 b.jpg negative cohen", "8 e.jpg positive sirm"),
    ("train_COVIDx9A.txt", "test_COVIDx9A.txt", "COVID 1 b.jpg COVID-19 sirm", "8 e.jpg pneumonia rsna"),
    ("train_COVIDx_CXR-3B.txt", "test_COVIDx_CXR-3B.txt", "7 b.jpg positive stonybrook", "8 e.jpg negative ricord"),
    ("labels/train_COVIDx8B.txt", "labels/test_COVIDx8B.txt", "7 b.jpg positive ricord", "8 e.jpg negative rsna"),
]


@pytest.mark.parametrize(("train", "test", "train_line", "test_line"), COVIDX_LISTS)
def test_every_published_list_of_covidx_is_read(tmp_path, train, test, train_line, test_line):
    folder = tmp_path / "COVIDx"
    write_images(folder, "train/a.jpg", "train/b.jpg", "test/e.jpg")
    (folder / train).parent.mkdir(exist_ok=True)
    (folder / train).write_text(f"1 a.jpg {'negative' if 'B' in train else 'normal'} rsna\n{train_line}\n")
    (folder / test).write_text(f"{test_line}\n")
    rows = fetch_rows(documented_params("covidx", folder), tmp_path)
    assert list(rows["label"][:2]) == [0, int("COVID-19" in train_line or "positive" in train_line)]
    assert labels_kept_apart(tmp_path / "one.zip") == {"e.jpg": int("COVID-19" in test_line or "positive" in test_line)}
    assert rows.loc["b.jpg", "patient"] == train_line.split(" b.jpg")[0]
    for name, line in (("b.jpg", train_line), ("e.jpg", test_line)):
        class_and_source = line.split(f"{name} ")[1].split()
        assert rows.loc[name, "source"] == " ".join(class_and_source[1:])


def test_covidx_cxr_4_has_a_validation_list_which_counts_as_training(covidx, tmp_path):
    write_images(covidx, "val/v.jpg")
    (covidx / "val.txt").write_text("9 v.jpg positive bimcv\n")
    rows = fetch_rows(documented_params("covidx", covidx), tmp_path)
    assert list(rows.loc["v.jpg", ["set", "label", "patient"]]) == ["train", 1, "9"]


def test_of_several_versions_of_covidx_lists_one_is_chosen(covidx, tmp_path):
    (covidx / "test.txt").rename(covidx / "test_COVIDx7B.txt")
    for subset in ("train", "test"):
        (covidx / f"{subset}_COVIDx8A.txt").write_text(f"1 {'a' if subset == 'train' else 'e'}.jpg normal rsna\n")
    message = error_message(fetch_source, documented_params("covidx", covidx), tmp_path / "raw.zip")
    assert message == (
        f"{covidx}: expected one list train*.txt, found train_COVIDx7B.txt, train_COVIDx8A.txt; write in "
        "download.version which, such as 9B"
    )
    sizes = {"7B": 6, "8a": 2}
    for version, size in sizes.items():
        params = documented_params("covidx", covidx).model_copy(update={"version": version})
        assert len(fetch_rows(params, tmp_path)) == size


def test_repeated_lines_of_covidx_count_once_if_they_agree(covidx, tmp_path, caplog):
    path = covidx / "train_COVIDx7B.txt"
    path.write_text(path.read_text() + "419 c.jpg negative rsna\n421 d.jpg negative rsna\n")
    rows = fetch_rows(documented_params("covidx", covidx), tmp_path)
    assert len(rows) == 6
    assert rows.loc["d.jpg", "patient"] == "420"
    assert f"{path}: 2 lines repeat an image, the first c.jpg; each counts once" in caplog.text
    assert f"{path}: 1 images have two patients, the first is d.jpg; its first line counts" in caplog.text
    path.write_text(path.read_text() + "419 c.jpg positive rsna\n")
    message = error_message(fetch_source, documented_params("covidx", covidx), tmp_path / "raw.zip")
    assert message == f"{path}: 1 images have two classes, the first is c.jpg; keep the right line of each"


# ieee8023/covid-chestxray-dataset


def write_covid_chestxray(folder: Path, *, patients: int = 40) -> Path:
    lines = [f"p{index},Pneumonia/Viral/COVID-19,PA,images,{index}.jpg,CC0" for index in range(patients)]
    lines += [
        f"q{index},{finding},AP Supine,images,q{index}.jpg," for index, finding in enumerate(["No Finding", "SARS"])
    ]
    lines += ["p0,Pneumonia/Viral/COVID-19,L,images,side.jpg,", "p0,Pneumonia/Viral/COVID-19,Axial,volumes,ct.nii.gz,"]
    lines += [
        "r1,todo,PA,images,todo.jpg,",
        "r2,Unknown,PA,images,unknown.jpg,",
        "p1,No Finding,pa,images,later.jpg,CC0",
    ]
    write_images(folder, *(f"images/{name}.jpg" for name in (*range(patients), "q0", "q1", "later")))
    (folder / "metadata.csv").write_text("\n".join(["patientid,finding,view,folder,filename,license", *lines]))
    return folder


def test_covid_chestxray_has_frontal_views_with_a_finding_and_a_test_set_of_separate_patients(tmp_path, caplog):
    rows = fetch_rows(covid_chestxray_params(tmp_path / "checkout"), tmp_path)
    assert set(rows.index) == {*(f"{index}.jpg" for index in range(40)), "q0.jpg", "q1.jpg", "later.jpg"}
    tests = rows["set"] == "test"
    assert 4 <= tests.sum() <= 20
    assert not set(rows.loc[tests, "patient"]) & set(rows.loc[~tests, "patient"])
    labels = rows.loc[~tests, "label"]
    assert all(labels[name] == int(name[0].isdigit()) for name in labels.index)
    assert set(rows["license"]) == {"CC0", ""}
    assert "2 of 47 images are not frontal and are left out, the first is side.jpg" in caplog.text
    assert "2 of 47 images have no finding and are left out, the first is todo.jpg" in caplog.text


def test_covid_chestxray_passes_on_sex_age_and_the_labels_of_test_images(tmp_path):
    params = covid_chestxray_params(tmp_path / "checkout")
    path = tmp_path / "checkout/metadata.csv"
    header, *lines = path.read_text().splitlines()
    traits = ["M,65", "F,", ",28.0", *["female,070Y"] * (len(lines) - 3)]
    path.write_text("\n".join([f"{header},sex,age", *(f"{a},{b}" for a, b in zip(lines, traits, strict=True))]))
    rows = fetch_rows(params, tmp_path)
    assert list(rows.loc[["0.jpg", "1.jpg", "2.jpg", "3.jpg"], "sex"]) == ["M", "F", "", "F"]
    assert list(rows.loc[["0.jpg", "1.jpg", "2.jpg", "3.jpg"], "age"].fillna(-1)) == [65, -1, 28, 70]
    apart = labels_kept_apart(tmp_path / "one.zip")
    assert set(apart) == set(rows.index[rows["set"] == "test"])
    assert all(label == int(name[0].isdigit()) for name, label in apart.items() if name != "later.jpg")
    path.write_text(path.read_text().replace("M,65", "M,sixty"))
    message = f"{path} line 2: age is 'sixty' (1 invalid in total); it must be years from 0 to 120"
    assert error_message(fetch_source, params, tmp_path / "raw.zip").startswith(message)


def covid_chestxray_params(folder: Path, *, patients: int = 40) -> CovidChestXrayParams:
    path = write_covid_chestxray(folder, patients=patients)
    return CovidChestXrayParams(source="covid_chestxray", path=path, test_share=0.3)


def test_test_patients_remain_in_the_test_set_when_patients_are_added(tmp_path):
    few = fetch_rows(covid_chestxray_params(tmp_path / "few", patients=30), tmp_path)
    many = fetch_rows(covid_chestxray_params(tmp_path / "many", patients=40), tmp_path)
    assert (many.loc[few.index, "set"] == few["set"]).all()


# A folder per class

KERMANY = [
    "train/NORMAL/IM-0115-0001.jpeg", "train/NORMAL/IM-0115-0002.jpeg", "train/NORMAL/NORMAL2-IM-0383-0001.jpeg",
    "train/PNEUMONIA/person1_bacteria_1.jpeg", "train/PNEUMONIA/person1_virus_6.jpeg",
    "val/NORMAL/NORMAL2-IM-1427-0001.jpeg", "val/PNEUMONIA/person1946_bacteria_4874.jpeg",
    "test/NORMAL/IM-0001-0001.jpeg", "test/PNEUMONIA/person2_virus_9.jpeg",
]  # fmt: skip
TWO_CLASSES = {"positive": ["PNEUMONIA"], "negative": ["normal"]}


def folders_params(folder: Path, **params: object) -> FoldersParams:
    return FoldersParams.model_validate({"source": "folders", "path": folder, **params})


@pytest.mark.parametrize("around", ["", "chest_xray/", "archive/chest_xray/"])
def test_the_kermany_set_is_read_with_whatever_folders_are_around_it_and_inside(tmp_path, caplog, around):
    folder = tmp_path / "data"
    write_images(folder, *(around + name for name in KERMANY))
    alone = fetch_rows(documented_params("kermany", folder), tmp_path)
    assert "left out" not in caplog.text
    for name in KERMANY:  # as in the zip of Kaggle
        copy = folder / f"{around}chest_xray/{name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((folder / f"{around}{name}").read_bytes())
    write_images(folder, f"{around}__MACOSX/chest_xray/._train", f"{around}__MACOSX/train/NORMAL/a.jpeg")
    rows = fetch_rows(documented_params("kermany", folder), tmp_path)
    pd.testing.assert_frame_equal(rows, alone)
    assert list(rows.index[:2]) == ["train_NORMAL_IM-0115-0001.jpeg", "train_NORMAL_IM-0115-0002.jpeg"]
    assert list(rows["patient"][:5]) == ["IM-0115", "IM-0115", "NORMAL2-IM-0383", "person1_bacteria", "person1_virus"]
    assert list(rows["set"]) == ["train"] * 7 + ["test"] * 2
    assert list(rows["label"][:7]) == [0, 0, 0, 1, 1, 0, 1]
    assert labels_kept_apart(tmp_path / "one.zip") == {name: int("PNEU" in name) for name in rows.index[7:]}
    assert f"left out 9 copies, with the same content as images one folder above, the first is {around}" in caplog.text
    assert f"2 images of the validation set count as training (the first is {around}val/NORMAL" in caplog.text


def test_the_zip_of_kaggle_need_not_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        for name in KERMANY:
            for around in ("chest_xray/", "chest_xray/chest_xray/"):
                archive.writestr(around + name, b"\xff\xd8" + name.encode())
            archive.writestr(f"__MACOSX/chest_xray/{name}", b"resource fork")
    rows = fetch_rows(documented_params("kermany", tmp_path / "archive.zip"), tmp_path)
    assert sorted(rows.index) == sorted(name.replace("/", "_") for name in KERMANY)


def test_an_inner_folder_with_other_images_is_no_copy(tmp_path):
    write_images(tmp_path / "data", *KERMANY, *(f"chest_xray/{name}" for name in KERMANY))  # the content is the path
    assert len(fetch_rows(documented_params("kermany", tmp_path / "data"), tmp_path)) == 18


def test_the_kermany_set_of_mendeley_data_has_patients_too(tmp_path):
    names = ["train/NORMAL/NORMAL-28501-0001.jpeg", "train/PNEUMONIA/BACTERIA-7422-0001.jpeg"]
    write_images(tmp_path / "data", *names, "test/PNEUMONIA/VIRUS-7422-0001.jpeg")
    rows = fetch_rows(documented_params("kermany", tmp_path / "data"), tmp_path)
    assert list(rows["patient"]) == ["NORMAL-28501", "BACTERIA-7422", "VIRUS-7422"]


def write_radiography_database(folder: Path) -> Path:
    classes = ["COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]
    for name in classes:
        kinds = ("images", "masks")
        write_images(folder, *(f"{name}/{kind}/{name}-{index}.png" for kind in kinds for index in range(1, 11)))
        write_images(folder, f"{name}.metadata.xlsx")
    write_images(folder, "README.md.txt")
    return folder


def test_the_radiography_database_is_read_without_masks_and_metadata(tmp_path, caplog):
    folder = write_radiography_database(tmp_path / "COVID-19_Radiography_Dataset")
    rows = fetch_rows(documented_params("radiography-database", folder), tmp_path)
    assert len(rows) == 40
    assert 1 <= (rows["set"] == "test").sum() <= 20
    labels = pd.concat([rows["label"].dropna(), pd.Series(labels_kept_apart(tmp_path / "one.zip"))])
    assert all(label == int(name.startswith("COVID_images_COVID-")) for name, label in labels.items())
    assert "left out 40 masks, the first is COVID/masks/COVID-1.png" in caplog.text
    assert "left out 5 other files, the first is COVID.metadata.xlsx" in caplog.text


def test_covid_qu_ex_is_read_without_its_second_part(tmp_path, caplog):
    folder, parts = tmp_path / "COVID-QU-Ex Dataset", ("Lung Segmentation Data", "Infection Segmentation Data")
    for part in parts:
        for subset in ("Train", "Val", "Test"):
            for name in ("COVID-19", "Non-COVID", "Normal"):
                parent = f"{part}/{part}/{subset}/{name}"
                write_images(folder, f"{parent}/images/{name}_1.png", f"{parent}/lung masks/{name}_1.png")
    rows = fetch_rows(documented_params("folders", folder, index=1), tmp_path)
    assert sorted(rows.index) == sorted(
        f"{subset}_{name}_images_{name}_1.png"
        for subset in ("Train", "Val", "Test")
        for name in ("COVID-19", "Non-COVID", "Normal")
    )
    assert list(rows.loc["Train_COVID-19_images_COVID-19_1.png", ["set", "label"]]) == ["train", 1]
    assert list(rows.loc["Val_Non-COVID_images_Non-COVID_1.png", ["set", "label"]]) == ["train", 0]
    assert rows.loc["Test_Normal_images_Normal_1.png", "set"] == "test"
    assert "left out 9 images of the ignored folder Infection Segmentation Data" in caplog.text


@pytest.mark.parametrize(
    "layout_of_folders",
    [
        "{subset}/{name}/{file}", "{name}/{subset}/{file}", "{subset}/images/{name}/{file}",
        "{name}/{subset}/images/{file}", "{subset}/{name}/patient {file}/study/{file}", "Data/{subset}/{name}/{file}",
        "Test/pneumonia/{subset}/{name}/{file}",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "subsets", [("train", "val", "test"), ("Training", "Validation", "TESTING"), ("train_set", "valid", "Test Set")]
)
def test_sets_and_classes_are_found_at_any_depth(tmp_path, layout_of_folders, subsets):
    names = [(subset, name) for subset in subsets for name in ("Normal", "pneumonia")]
    folder = tmp_path / "data"
    write_images(folder, *(layout_of_folders.format(subset=subset, name=name, file="1.png") for subset, name in names))
    message = error_message(fetch_source, folders_params(folder), tmp_path / "raw.zip")
    assert message == (
        f"{folder}: in no list of classes: 'Normal' (3 images), 'pneumonia' (3 images); write in params.yaml, under "
        "download, positive: [Normal] and negative: [pneumonia], or positive: [pneumonia] and negative: [Normal]"
    )
    rows = fetch_rows(folders_params(folder, **TWO_CLASSES), tmp_path)
    assert sorted(rows["set"]) == ["test"] * 2 + ["train"] * 4
    assert all(rows.loc[name, "label"] == int("pneumonia" in name) for name in rows.index[rows["set"] == "train"])


@pytest.mark.parametrize("names", [("COVID-19", "Non: COVID"), ("No", "yes"), ("0", "1"), ("ü" * 90, 'x "a" ' * 20)])
def test_the_section_that_an_unconfigured_folder_gets_is_valid(tmp_path, names):
    write_images(tmp_path / "data", *(f"{name}/{number}.png" for number, name in enumerate(names)))
    message = error_message(fetch_source, folders_params(tmp_path / "data"), tmp_path / "raw.zip")
    positive, negative = re.search(r"or (positive: .*) and (negative: .*)", message).groups()
    section = yaml.safe_load(f"{positive}\n{negative}")
    assert sorted([section["positive"], section["negative"]]) == sorted([name] for name in names)


def test_a_folder_in_no_list_is_named_with_its_number_of_images(tmp_path):
    folder = write_radiography_database(tmp_path / "data")
    params = folders_params(folder, positive=["COVID"], negative=["NORMAL"])
    assert error_message(fetch_source, params, tmp_path / "raw.zip") == (
        f"{folder}: in no list of classes: 'Lung_Opacity' (10 images), 'Viral Pneumonia' (10 images); list each in "
        "download.positive, download.negative or download.ignore"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no images; set download.path to the folder with a folder per class"),
        (["a.png", "NORMAL/b.png", "PNEUMONIA/c.png"], "a.png is in no folder of a class (1 in total); move it into"),
        (["x/NORMAL/b.png"], "no image is positive; download.positive lists 'PNEUMONIA'"),
        (["train/NORMAL/PNEUMONIA/b.png", "c/d.png"], "train/NORMAL/PNEUMONIA has the positive folder 'pneumonia' and"),
        (["train/NORMAL/test/b.png", "c/d.png"], "train/NORMAL/test is in the test set and in another; rename one of"),
        (["train/NORMAL/a/b_1.png", "train/NORMAL/a_b/1.png", "test/PNEUMONIA/c.png"], "train_NORMAL_a_b_1.png: 2 ima"),
        (["NORMAL/b.png", "PNEUMONIA/c.png"], "download.test_share: 0.1 puts none of 2 patients (or images, of"),
    ],
)  # fmt: skip
def test_unusable_folders_are_an_error_of_one_line(tmp_path, names, message):
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data", *names)
    params = folders_params(tmp_path / "data", **TWO_CLASSES)
    assert (
        error_message(fetch_source, params, tmp_path / "raw.zip")
        .removeprefix(f"{tmp_path / 'data'}: ")
        .startswith(message)
    )


def test_test_images_in_no_folder_of_a_class_have_no_label(tmp_path):
    write_images(tmp_path / "data", "train/NORMAL/a.png", "train/PNEUMONIA/b.png", "test/c.png", "test/d.png")
    rows = fetch_rows(folders_params(tmp_path / "data", **TWO_CLASSES), tmp_path)
    assert list(rows.index[rows["set"] == "test"]) == ["test_c.png", "test_d.png"]
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert "test_labels.csv" not in archive.namelist()


def test_patterns_take_patient_source_and_view_from_the_path(tmp_path, caplog):
    names = [f"site {site}/{name}/p{index}_{view}.png" for index, (site, name, view) in enumerate(
        [("A", "NORMAL", "PA"), ("A", "PNEUMONIA", "AP"), ("B", "NORMAL", "PA"), ("B", "PNEUMONIA", "AP")]
    )]  # fmt: skip
    write_images(tmp_path / "data", *names, "site B/NORMAL/unknown.png")
    patterns = {"patient": r"/(p\d+)_", "source": "^site ([A-Z])/", "view": r"_([A-Z]+)\.png"}
    params = folders_params(tmp_path / "data", **TWO_CLASSES, patterns=patterns, test_share=0.5)
    rows = fetch_rows(params, tmp_path).sort_index()
    assert list(rows["patient"]) == ["p0", "p1", "p2", "", "p3"]
    assert list(rows["source"]) == ["A", "A", "B", "B", "B"]
    assert list(rows["view"]) == ["PA", "AP", "PA", "", "AP"]
    text = "download.patterns finds no patient in the path in 1 of 5, the first is 'site B/NORMAL/unknown.png'"
    assert text in caplog.text


@pytest.mark.parametrize("name", ["a %41 #b?c d", "Ünïcode", "e\u0301"])
def test_paths_may_have_characters_that_mean_something_in_a_url(tmp_path, name):
    folder = tmp_path / name
    write_images(
        folder, f"{name}/train/NORMAL/{name}.png", f"{name}/train/PNEUMONIA/b.png", f"{name}/test/NORMAL/c.png"
    )
    rows = fetch_rows(folders_params(folder, **TWO_CLASSES), tmp_path)
    assert (rows["member"] != "").all()
    assert len(rows) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are no UTF-8")
def test_a_file_name_that_is_no_utf_8_is_escaped(tmp_path):
    write_images(tmp_path / "data", "NORMAL/M\udcfcller.png", "PNEUMONIA/b.png", "test/c.png")
    rows = fetch_rows(folders_params(tmp_path / "data", **TWO_CLASSES), tmp_path)
    assert list(rows.index) == ["NORMAL_M_xfcller.png", "PNEUMONIA_b.png", "test_c.png"]


# Any folder with a CSV


def table_params(folder: Path, text: str, **changes: object) -> TableParams:
    (folder / "labels.csv").write_text(text)
    params = {"labels": "labels.csv", "columns": COLUMNS, "positive": ["1"], "negative": ["0"], "test_share": 0.5}
    return TableParams.model_validate({"source": "table", "path": folder, **params, **changes})


def table_with_all_columns(folder: Path) -> TableParams:
    write_images(folder, "a/1.jpg", "b/1.jpg", "2.jpg")
    text = (
        "case,diagnosis,image,subset,site,comment\n"
        "7,U07.1,./a/1.jpg,train,A,\nNA,none,b/1.jpg,train,B,\n,,2.jpg,test,,\n"
    )
    columns = COLUMNS.model_copy(update={"set": "subset", "source": "site"})
    return table_params(folder, text, columns=columns, positive=["U07.1", "covid"], negative=["none"])


def test_a_table_may_have_columns_for_the_source_and_the_set(tmp_path):
    rows = fetch_rows(table_with_all_columns(tmp_path), tmp_path)
    assert list(rows.index) == ["a_1.jpg", "b_1.jpg", "2.jpg"]
    assert list(rows["label"][:2]) == [1, 0]
    assert list(rows["patient"]) == ["7", "NA", ""]
    assert list(rows["source"]) == ["A", "B", ""]


def test_a_table_may_have_columns_for_sex_and_age_and_labels_of_test_images(tmp_path):
    write_images(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    columns = COLUMNS.model_copy(update={"set": "set", "sex": "Patient Gender", "age": "Patient Age"})
    header = "image,diagnosis,case,set,Patient Gender,Patient Age\n"
    text = "1.jpg,1,a,train,F,058Y\n2.jpg,0,b,train,M,009M\n3.jpg,1,c,test,,\n4.jpg,secret,d,test,F,40\n"
    rows = fetch_rows(table_params(tmp_path, header + text, columns=columns), tmp_path)
    assert list(rows["sex"]) == ["F", "M", "", "F"]
    assert list(rows["age"].fillna(-1)) == [58, 0.75, -1, 40]
    assert labels_kept_apart(tmp_path / "one.zip") == {"3.jpg": 1}
    for wrong, column, value in (("411", "Patient Age", "40"), ("?", "Patient Gender", "F")):
        params = table_params(tmp_path, header + text.replace(value, wrong), columns=columns)
        assert f"labels.csv line {'2' if value == 'F' else '5'}: {column} is '{wrong}'" in error_message(
            fetch_source, params, tmp_path / "raw.zip"
        )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image,diagnosis\n1.jpg,1\n", "labels.csv: no column 'case'; its header is image,diagnosis"),
        ("image,diagnosis,case\n1.jpg,0,a\n9.jpg,1,b\n", "'9.jpg' not found (1 missing in total)"),
        ("image,diagnosis,case\n1.jpg,1,a\n2.jpg,0,a\n", "download.test_share: 0.5 puts none of 1 patients"),
        ("image,diagnosis,case\n1.jpg,1,a\n", "no image is negative; download.negative is '0'; diagnosis is '1' 1"),
        ("", "labels.csv is not a CSV table"),
        ("image,diagnosis,case\n1.jpg,1,a,\n2.jpg,0,b,\n", "labels.csv: the lines have more fields than the header"),
    ],
)
def test_an_unusable_table_is_an_error_of_one_line(tmp_path, text, reason):
    write_images(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    assert reason in error_message(fetch_source, table_params(tmp_path, text), tmp_path / "raw.zip")


def test_the_share_of_test_patients_is_close_to_test_share():
    names = pd.Series([f"patient {index}" for index in range(4000)])
    for share in (0.05, 0.15, 0.5):
        assert archive_writer.draw_test_set(names, names, share).mean() == pytest.approx(share, abs=0.02)


# Bytes


def folder_params(folder: Path) -> ArchiveParams:
    write_images(folder, "train/train/1.jpg", "train/train/2.jpg", "test/test/3.jpg")
    return ArchiveParams(source="archive", path=folder)


@pytest.mark.parametrize(
    ("write_input", "sha256"),
    [
        (covidx_params, "5c3c095879af9932a0eea19043299670ef3aa54ade579fc3097453c3a04d4f7a"),
        (covid_chestxray_params, "25bec3b11a46c6b27b151f53a17e57a2df2044503ee49fa853e6031e72af4e60"),
        (table_with_all_columns, "bd3a1685694ec941ee40c4cdd9b3e42b623935075c0d78510bb2e9ebeff9c9ad"),
        (folder_params, "b1b7c99c38fb3ccff5f1662358dec799449c7562aaf845a31ed6be926bae0790"),
    ],
    ids=["covidx", "covid_chestxray", "table", "archive"],
)
def test_sources_write_the_same_bytes_as_before(tmp_path, write_input, sha256):
    (tmp_path / "input").mkdir()
    fetch_source(write_input(tmp_path / "input"), tmp_path / "raw.zip")
    message = "what the source writes changed: say in CHANGELOG.md that `dvc repro -f download` is needed"
    assert sha256_of_file(tmp_path / "raw.zip") == sha256, message
