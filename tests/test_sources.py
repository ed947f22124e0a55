import re
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT, error_message

from pipeline.core import config
from pipeline.core.config import ArchiveParams, ColumnsParams, CovidChestXrayParams, CovidxParams, TableParams
from pipeline.core.files import sha256_of_file
from pipeline.data import layout
from pipeline.data.sources import archive_writer, fetch_source
from pipeline.data.test_labels import read_archived_labels

SNIPPETS = [
    yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
]
COLUMNS = ColumnsParams(file="image", label="diagnosis", patient="case")


def write_images(folder: Path, *names: str) -> None:
    """Write files that start as JPEGs do; no source decodes images."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\xff\xd8" + name.encode())


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


def test_documented_sources_are_valid_and_their_misspelled_keys_are_named(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert [snippet["download"]["source"] for snippet in SNIPPETS] == ["archive", "covidx", "covid_chestxray", "table"]
    path = tmp_path / "params.yaml"
    for snippet in SNIPPETS:
        path.write_text(yaml.safe_dump(params | {"local": params["local"] | snippet}))
        loaded = config.load_config(path).profiles["local"].download.model_dump(mode="json")
        assert loaded == snippet["download"]
        misspelled = {**snippet["download"], "pth": "x"}
        path.write_text(yaml.safe_dump(params | {"local": params["local"] | {"download": misspelled}}))
        message = f"{path}: local.download.pth: unknown key; did you mean 'path'?"
        assert error_message(config.load_config, path) == message
    misspelled = SNIPPETS[3]["download"] | {"columns": SNIPPETS[3]["download"]["columns"] | {"pateint": "x"}}
    path.write_text(yaml.safe_dump(params | {"local": params["local"] | {"download": misspelled}}))
    message = f"{path}: local.download.columns.pateint: unknown key; did you mean 'patient'?"
    assert error_message(config.load_config, path) == message


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


@pytest.mark.parametrize("line", ["419 c.jpg negative", "419 c.jpg maybe rsna", "one two"])
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
    assert f"{covidx / 'train/b.jpg'}: not found (1 labeled images in total)" in caplog.text
    (covidx / "test/e.jpg").unlink()
    assert error_message(fetch_source, params, tmp_path / "raw.zip").startswith(
        f"{covidx / 'test/e.jpg'}: not found (1 missing"
    )
    (covidx / "test.txt").unlink()
    assert "expected one list test*.txt, found none" in error_message(fetch_source, params, tmp_path / "raw.zip")
    (covidx / "test_a.txt").touch()
    (covidx / "test_b.txt").touch()
    assert "found test_a.txt, test_b.txt; keep exactly one" in error_message(fetch_source, params, tmp_path / "raw.zip")
    for path, reason in ((None, "download.path: not set"), (tmp_path / "nowhere", "no such folder")):
        assert reason in error_message(fetch_source, CovidxParams(source="covidx", path=path), tmp_path / "raw.zip")


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


def test_covid_chestxray_has_frontal_views_with_a_finding_and_a_test_set_of_separate_patients(tmp_path):
    rows = fetch_rows(covid_chestxray_params(tmp_path / "checkout"), tmp_path)
    assert set(rows.index) == {*(f"{index}.jpg" for index in range(40)), "q0.jpg", "q1.jpg", "later.jpg"}
    tests = rows["set"] == "test"
    assert 4 <= tests.sum() <= 20
    assert not set(rows.loc[tests, "patient"]) & set(rows.loc[~tests, "patient"])
    labels = rows.loc[~tests, "label"]
    assert all(labels[name] == int(name[0].isdigit()) for name in labels.index)
    assert set(rows["license"]) == {"CC0", ""}


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


def test_without_a_column_for_the_set_the_test_set_has_separate_patients(tmp_path):
    names = [f"{index}.jpg" for index in range(20)]
    write_images(tmp_path, *names)
    lines = "".join(f"{name},{index % 2},p{index // 2}\n" for index, name in enumerate(names))
    rows = fetch_rows(table_params(tmp_path, f"image,diagnosis,case\n{lines}"), tmp_path)
    assert rows.groupby("patient")["set"].nunique().max() == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image,diagnosis\n1.jpg,1\n", "labels.csv: no column 'case'; its header is image,diagnosis"),
        (
            "image,diagnosis,case\n1.jpg,1,a\n2.jpg,maybe,b\n3.jpg,maybe,c\n4.jpg,maybe,a\n",
            "diagnosis is 'maybe', which is in neither",
        ),
        ("image,diagnosis,case\n1.jpg,1,a\n1.jpg,1,a\n", "1.jpg: 2 images have this name"),
        ("image,diagnosis,case\n1.jpg,1,a\n,1,b\n", "labels.csv line 3: image is empty; name the image or delete"),
        ("image,diagnosis,case\n1.jpg,1,a\n9.jpg,1,b\n", "9.jpg: not found (1 missing in total)"),
        ("image,diagnosis,case\n1.jpg,1,a\n", "all 1 images are in the training set"),
        ("", "labels.csv is not a CSV table"),
        (
            "image,diagnosis,case\n1.jpg,1,a,\n2.jpg,0,b,\n",
            "labels.csv: the lines have more fields than the header",
        ),
    ],
)
def test_an_unusable_table_is_an_error_of_one_line(tmp_path, text, reason):
    write_images(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    assert reason in error_message(fetch_source, table_params(tmp_path, text), tmp_path / "raw.zip")


def test_the_share_of_test_patients_is_close_to_test_share():
    names = pd.Series([f"patient {index}" for index in range(4000)])
    for share in (0.05, 0.15, 0.5):
        assert archive_writer.draw_test_set(names, names, share).mean() == pytest.approx(share, abs=0.02)


def test_a_value_that_is_positive_and_negative_is_an_error(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["local"]["download"] = SNIPPETS[3]["download"] | {"negative": ["normal", "covid"]}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    message = f"{path}: local.download: 'covid' is in positive and in negative; keep it in one"
    assert error_message(config.load_config, path) == message


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
