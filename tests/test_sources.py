import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, jpeg, refusal

from pipeline.core import config
from pipeline.core.config import ColumnsParams, CovidChestXrayParams, CovidxParams, TableParams
from pipeline.data import layout
from pipeline.data.sources import archive_writer, fetch_source

SNIPPETS = [
    yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
]
NAMES = ColumnsParams(file="image", label="what", patient="who", source=None, view=None, license=None, set=None)


def images(folder: Path, *names: str) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(rng, 32))


def read(params: config.DownloadParams, folder: Path) -> pd.DataFrame:
    """Fetch twice to the same bytes, and return the layout's rows."""
    for name in ("one.zip", "two.zip"):
        fetch_source(params, folder / name)
    assert (folder / "one.zip").read_bytes() == (folder / "two.zip").read_bytes()
    rows = layout.read_layout(folder / "one.zip").images
    with zipfile.ZipFile(folder / "one.zip") as archive:
        assert all(archive.read(member).startswith(b"\xff\xd8") for member in filter(None, rows["member"]))
    return rows.set_index("file")


def test_every_source_of_the_documentation_is_accepted_and_a_misspelled_key_named(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert [snippet["download"]["source"] for snippet in SNIPPETS] == ["archive", "covidx", "cohen", "table"]
    path = tmp_path / "params.yaml"
    for snippet in SNIPPETS:
        path.write_text(yaml.safe_dump(params | {"local": params["local"] | snippet}))
        loaded = config.load_config(path).profiles["local"].download.model_dump(mode="json")
        assert loaded == snippet["download"]
        misspelled = {**snippet["download"], "pth": "x"}
        path.write_text(yaml.safe_dump(params | {"local": params["local"] | {"download": misspelled}}))
        assert f"{path}: local.download.pth: unknown key; did you mean 'path'?" == refusal(config.load_config, path)
    misspelled = SNIPPETS[3]["download"] | {"columns": SNIPPETS[3]["download"]["columns"] | {"pateint": "x"}}
    path.write_text(yaml.safe_dump(params | {"local": params["local"] | {"download": misspelled}}))
    assert "local.download.columns.pateint: unknown key; did you mean 'patient'?" in refusal(config.load_config, path)


# COVIDx


@pytest.fixture
def covidx(tmp_path) -> Path:
    folder = tmp_path / "COVIDx"
    images(folder, *(f"train/{name}" for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")), "test/e.jpg", "test/f.jpg")
    (folder / "train_COVIDx7B.txt").write_text(
        "SARS-10 1148rg a.jpg positive cohen\n"
        "p 2 of Hannover b.jpg positive ricord\n"
        "419 c.jpg negative rsna\n420 d.jpg negative rnsa\n"
    )
    (folder / "test.txt").write_text("419 e.jpg negative rsna\n\n7 f.jpg positive sirm\n")
    return folder


def test_covidx_has_spaces_in_patients_misspelled_sources_and_patients_in_both_sets(covidx, tmp_path):
    rows = read(CovidxParams(source="covidx", path=covidx), tmp_path)
    assert list(rows.index) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]
    assert list(rows["patient"]) == ["SARS-10 1148rg", "p 2 of Hannover", "419", "420", "419", "7"]
    assert list(rows["source"]) == ["cohen", "ricord", "rsna", "rsna", "rsna", "sirm"]
    assert list(rows["set"]) == ["train"] * 4 + ["test"] * 2
    assert list(rows["label"][:4]) == [1, 1, 0, 0]
    assert rows["label"][4:].isna().all()


def test_a_byte_order_mark_is_not_the_patients(covidx, tmp_path):
    path = covidx / "train_COVIDx7B.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    params = CovidxParams(source="covidx", path=covidx)
    assert read(params, tmp_path)["patient"].iloc[0] == "SARS-10 1148rg"
    path.write_bytes(path.read_bytes().decode("utf-8-sig").replace("SARS", "SÄRS").encode("latin-1"))
    assert f"{path}: not a text in UTF-8" in refusal(fetch_source, params, tmp_path / "raw.zip")


def test_three_classes_of_covidx_are_two_labels(covidx, tmp_path):
    (covidx / "train_COVIDx7B.txt").write_text("1 a.jpg COVID-19 x\n2 b.jpg pneumonia x\n3 c.jpg normal x\n")
    assert list(read(CovidxParams(source="covidx", path=covidx), tmp_path)["label"][:3]) == [1, 0, 0]


@pytest.mark.parametrize("line", ["419 c.jpg negative", "419 c.jpg maybe rsna", "one two"])
def test_a_line_of_covidx_that_is_not_understood_is_named(covidx, tmp_path, line):
    with (covidx / "test.txt").open("a") as out:
        out.write(line)
    said = refusal(fetch_source, CovidxParams(source="covidx", path=covidx), tmp_path / "raw.zip")
    assert said.startswith(f"{covidx / 'test.txt'} line 4: {line!r}; it must be patient, file, class and source")


def test_covidx_without_a_list_an_image_or_a_folder_is_refused(covidx, tmp_path, caplog):
    (covidx / "train/b.jpg").unlink()
    params = CovidxParams(source="covidx", path=covidx)
    rows = read(params, tmp_path)
    assert list(rows.index[rows["member"] == ""]) == ["b.jpg"]  # which prepare puts into quarantine
    assert f"{covidx / 'train/b.jpg'}: not found (1 labeled images in all)" in caplog.text
    (covidx / "test/e.jpg").unlink()
    assert refusal(fetch_source, params, tmp_path / "raw.zip").startswith(
        f"{covidx / 'test/e.jpg'}: not found (1 missing"
    )
    (covidx / "test.txt").unlink()
    assert "one list test*.txt is needed, but there is none" in refusal(fetch_source, params, tmp_path / "raw.zip")
    (covidx / "test_a.txt").touch()
    (covidx / "test_b.txt").touch()
    assert "but there is test_a.txt, test_b.txt" in refusal(fetch_source, params, tmp_path / "raw.zip")
    for path, reason in ((None, "no folder is named"), (tmp_path / "nowhere", "no such folder")):
        assert reason in refusal(fetch_source, CovidxParams(source="covidx", path=path), tmp_path / "raw.zip")


# ieee8023/covid-chestxray-dataset


def cohen(folder: Path, *, patients: int = 40) -> Path:
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
    images(folder, *(f"images/{name}.jpg" for name in (*range(patients), "q0", "q1", "later")))
    (folder / "metadata.csv").write_text("\n".join(["patientid,finding,view,folder,filename,license", *lines]))
    return folder


def test_cohen_gives_frontal_views_with_a_finding_and_holds_patients_out(tmp_path):
    rows = read(CovidChestXrayParams(source="cohen", path=cohen(tmp_path / "c"), test_share=0.3), tmp_path)
    assert set(rows.index) == {*(f"{index}.jpg" for index in range(40)), "q0.jpg", "q1.jpg", "later.jpg"}
    tests = rows["set"] == "test"
    assert 4 <= tests.sum() <= 20
    assert not set(rows.loc[tests, "patient"]) & set(rows.loc[~tests, "patient"])
    labels = rows.loc[~tests, "label"]
    assert all(labels[name] == int(name[0].isdigit()) for name in labels.index)
    assert set(rows["license"]) == {"CC0", ""}


def test_a_held_out_patient_stays_held_out_when_others_come(tmp_path):
    few = read(
        CovidChestXrayParams(source="cohen", path=cohen(tmp_path / "few", patients=30), test_share=0.3), tmp_path
    )
    many = read(
        CovidChestXrayParams(source="cohen", path=cohen(tmp_path / "many", patients=40), test_share=0.3), tmp_path
    )
    assert (many.loc[few.index, "set"] == few["set"]).all()


# Any folder with a CSV


def table(folder: Path, text: str, **changes: object) -> TableParams:
    (folder / "labels.csv").write_text(text)
    known = {"labels": "labels.csv", "columns": NAMES, "positive": ["1"], "negative": ["0"], "test_share": 0.5}
    return TableParams.model_validate({"source": "table", "path": folder, **known, **changes})


def test_a_table_names_its_columns_and_its_test_set(tmp_path):
    images(tmp_path, "a/1.jpg", "b/1.jpg", "2.jpg")
    columns = NAMES.model_copy(update={"set": "part", "source": "site"})
    text = (
        "who,what,image,part,site,more\n7,U07.1,./a/1.jpg,train,here,\nNA,none,b/1.jpg,train,there,\n,,2.jpg,test,,\n"
    )
    params = table(tmp_path, text, columns=columns, positive=["U07.1", "covid"], negative=["none"])
    rows = read(params, tmp_path)
    assert list(rows.index) == ["a_1.jpg", "b_1.jpg", "2.jpg"]
    assert list(rows["label"][:2]) == [1, 0]
    assert list(rows["patient"]) == ["7", "NA", ""]
    assert list(rows["source"]) == ["here", "there", ""]


def test_a_table_without_a_test_set_holds_some_patients_out(tmp_path):
    names = [f"{index}.jpg" for index in range(20)]
    images(tmp_path, *names)
    text = "image,what,who\n" + "".join(f"{name},{index % 2},p{index // 2}\n" for index, name in enumerate(names))
    rows = read(table(tmp_path, text), tmp_path)
    assert rows.groupby("patient")["set"].nunique().max() == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image,what\n1.jpg,1\n", "labels.csv: no column 'who'; its header is image,what"),
        (
            "image,what,who\n1.jpg,1,a\n2.jpg,maybe,b\n3.jpg,maybe,c\n4.jpg,maybe,a\n",
            "what is 'maybe', which is in neither",
        ),
        ("image,what,who\n1.jpg,1,a\n1.jpg,1,a\n", "1.jpg: 2 images of this name are listed"),
        ("image,what,who\n1.jpg,1,a\n,1,b\n", "labels.csv line 3: image is empty; name the image or delete"),
        ("image,what,who\n1.jpg,1,a\n9.jpg,1,b\n", "9.jpg: not found (1 missing in all)"),
        ("image,what,who\n1.jpg,1,a\n", "of 1 images, all would be on one side"),
        ("", "labels.csv is not a CSV table"),
        (
            "image,what,who\n1.jpg,1,a,\n2.jpg,0,b,\n",
            "labels.csv: the lines have more fields than the header",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, reason):
    images(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    assert reason in refusal(fetch_source, table(tmp_path, text), tmp_path / "raw.zip")


def test_the_share_that_is_held_out_is_about_as_asked():
    names = pd.Series([f"patient {index}" for index in range(4000)])
    for share in (0.05, 0.15, 0.5):
        assert archive_writer.draw_test_set(names, names, share).mean() == pytest.approx(share, abs=0.02)


def test_a_value_that_is_positive_and_negative_is_refused(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["local"]["download"] = SNIPPETS[3]["download"] | {"negative": ["normal", "covid"]}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    said = f"{path}: local.download: 'covid' is in positive and in negative; leave it in one"
    assert refusal(config.load_config, path) == said
