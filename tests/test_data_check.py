"""`cxr data check`: what is understood of data, what is not, and a contact sheet; nothing else is written."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import (
    ROOT,
    archive_members,
    edit_params,
    encode_jpeg,
    error_line_of,
    invoke,
    output_of,
    write_files,
    write_zip,
)
from PIL import Image

from pipeline.data import outliers
from pipeline.data.source_folder import LocalFolder
from pipeline.data.sources import covid_chestxray


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a params.yaml whose images are small."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["profile"] = "local"
    params["local"]["prepare"]["image_size"] = 64
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_download(folder: Path, section: dict) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["local"]["download"] = section
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def guessed_section(output: str) -> dict:
    """Return the section that the command printed."""
    return yaml.safe_load(output[output.index("download:") :].split("\n\n", maxsplit=1)[0])["download"]


def write_images(folder: Path, *names: str) -> None:
    rng = np.random.default_rng(0)
    write_files(folder, {name: encode_jpeg(rng) for name in names})


def test_an_archive_is_described_and_nothing_but_the_contact_sheet_is_written(folder):
    members = archive_members(train=24, test=4)
    members["train/train/a001.jpg"] = b"not an image"
    members["train/train/a002.jpg"] = b""
    del members["train/train/a003.jpg"]
    lines = ["File,patient,source,view,sex,age"]
    lines += [f"a{index:03}.jpg,p{index // 2},clinic,{'PA' if index % 2 else ''},F,{index + 20}" for index in range(24)]
    members["metadata.csv"] = "\n".join(lines).encode()
    write_zip(folder / "own.zip", members)
    output = output_of("cxr data check own.zip")
    assert guessed_section(output) == {"source": "archive", "path": "own.zip"}
    rows = dict(line.split(maxsplit=1) for line in output.splitlines() if line[:1].isalpha() and "  " in line)
    assert rows["labeled"] == "24 images: 16 negative, 8 positive"
    assert rows["test"] == "4 images"
    assert rows["missing"] == "1 labeled images, the first is a003.jpg"
    assert rows["patients"] == "12 known; 4 images of unknown ones"
    assert rows["view"] == "16 × not known, 12 × PA"
    assert rows["age"] == "24 known, 20 to 43 years"
    assert rows["decoded"] == "25 of 27"
    assert rows["unusable"].startswith("2: 1 × ")
    assert "not an image in a known format (first a001.jpg)" in rows["unusable"]
    assert "empty file (first a002.jpg)" in rows["unusable"]
    assert sorted(path.name for path in folder.iterdir()) == ["contact_sheet.jpg", "own.zip", "params.yaml"]
    assert Image.open(folder / "contact_sheet.jpg").width > 1000


def test_only_some_of_many_images_are_decoded(folder):
    write_zip(folder / "own.zip", archive_members(train=24, test=4))
    output = output_of("cxr data check own.zip --images 7 --sheet sheets/seven.jpg")
    assert "decoded            7 of 7, from all 28" in output
    assert (folder / "sheets/seven.jpg").is_file()


def test_the_path_of_the_profile_is_the_default(folder):
    write_zip(folder / "own.zip", archive_members(train=6, test=2))
    set_download(folder, {"source": "archive", "path": "own.zip"})
    for command in ("cxr data check", "cxr data check own.zip"):
        output = output_of(command)
        assert output.startswith("profile            local: own.zip\n")  # nothing was guessed
        assert "6 images: 4 negative, 2 positive" in output
    edit_params(folder, lambda params: params.update(profile="demo"))
    edit_params(folder, lambda params: params["demo"]["prepare"].update(excluded_files=["of-the-demo.jpg"]))
    edit_params(folder, lambda params: params["demo"]["download"].update(train=8, test=4))
    result = invoke("cxr data check")
    assert result.stdout.startswith("profile            demo: phantom\n")
    assert result.stderr.startswith("Error: params.yaml: prepare.excluded_files: no image is named")
    assert output_of("cxr data check own.zip").startswith("profile            local: own.zip\n")
    (folder / "own.zip").rename(folder / "other.zip")
    assert "6 images: 4 negative, 2 positive" in output_of("cxr data check other.zip")


def test_a_guessed_table_becomes_complete_by_its_labels(folder):
    names = [f"set/{number}.jpg" for number in range(8)]
    write_images(folder / "own", *names)
    lines = ["id;Image Name;Diagnosis;Patient ID;Projection;Gender"]
    lines += [f"{n + 100};{n}.JPG;{'flu' if n % 2 else 'none'};p{n};PA;F" for n in range(8)]
    (folder / "own/list.csv").write_text("\n".join(lines))
    result = invoke("cxr data check own")
    assert result.exit_code == 2
    error = "Error: own: list these values of Diagnosis in positive, negative or ignore: 'none' (4), 'flu' (4)"
    assert result.stderr.strip().splitlines()[-1] == error
    assert "decoded            8 of 8" in result.output
    section = guessed_section(result.output)
    columns = {
        "file": "Image Name",
        "label": "Diagnosis",
        "patient": "Patient ID",
        "view": "Projection",
        "sex": "Gender",
    }
    empty: dict = {"positive": [], "negative": []}
    assert section == {"source": "table", "path": "own", "labels": "list.csv", "columns": columns} | empty
    assert guessed_section(invoke("cxr data check own/list.csv").output) == section
    complete = section | {"positive": ["flu"], "negative": ["none"], "test_share": 0.5}
    set_download(folder, complete)
    output = output_of("cxr data check")
    assert "sex                8 × F" in output
    assert "8 known; 0 images of unknown ones" in output


def test_class_folders_are_recognized_also_in_a_zip(folder, caplog):
    write_images(folder / "own", "a/1.jpg", "a/2.jpg", "b/3.jpg")
    assert error_line_of("cxr data check own").startswith("Error: own: in no list of classes: 'a' (2 images), 'b' (1")
    write_zip(folder / "own.zip", {f"x/{name}.jpg": encode_jpeg(np.random.default_rng(0)) for name in ("a/1", "b/2")})
    result = invoke("cxr data check own.zip")
    assert "decoded            2 of 2" in result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: own.zip: in no list of classes: 'a' (1 images), ")
    (folder / "own/list.csv").write_text("study,finding\n1.2.3,flu\n")
    invoke("cxr data check own")
    assert "own: no column of its 1 tables, the first is list.csv, names images or folders; folders are" in caplog.text
    (folder / "own/list.csv").write_text("finding,finding\nflu,flu\n")
    invoke("cxr data check own")
    assert "own/list.csv: column 'finding' occurs 2 times; rename or delete one" in caplog.text
    (folder / "own/list.csv").rename(folder / "own/list.XLSX")
    invoke("cxr data check own")
    assert "own/list.XLSX: a spreadsheet, which is not read; save it as CSV in UTF-8" in caplog.text


CHEXPERT = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Pneumonia\n"


@pytest.mark.parametrize("around", ["", "CheXpert-v1.0-small/"])
def test_public_sets_have_the_section_of_their_page_with_the_tables_where_they_are(folder, around, caplog):
    names = [f"train/patient0000{number}/study1/view1_frontal.jpg" for number in range(4)]
    test = "valid/patient64541/study1/view1_frontal.jpg"
    write_images(folder / "own", *(around + name for name in (*names, test)))
    lines = [f"CheXpert-v1.0-small/{name},Male,50,Frontal,AP,,{n % 3 - 1}.0\n" for n, name in enumerate(names)]
    (folder / f"own/{around}train.csv").write_text(CHEXPERT + "".join(lines))
    (folder / f"own/{around}valid.csv").write_text(CHEXPERT + f"CheXpert-v1.0-small/{test},Female,60,Frontal,PA,,1.0\n")
    output = output_of("cxr data check own")
    assert "own: the data set of docs/data/chexpert.md, whose first section follows" in caplog.text
    assert "labeled            2 images: 1 negative, 1 positive" in output
    assert "ignored: 2 (Pneumonia is '-1.0' 2)" in caplog.text
    assert guessed_section(output)["labels"] == [f"{around}train.csv", f"{around}valid.csv"]
    assert yaml.safe_load(output[output.index("download:") :].split("\n\n")[0])["finding"]["name"] == "pneumonia"


def test_images_are_called_by_the_names_that_excluded_files_takes(folder, monkeypatch):
    names = [f"{subset}/{label}/{number}.jpg" for subset in ("train", "test") for label in "ab" for number in range(2)]
    write_images(folder / "own", *names)
    (folder / "own/train/a/0.jpg").write_bytes(b"")
    set_download(folder, {"source": "folders", "path": "own", "positive": ["a"], "negative": ["b"]})
    titles: list[str] = []
    monkeypatch.setattr(outliers, "write_contact_sheet", lambda _path, _images, names: titles.extend(names))
    assert "1 × empty file (first train_a_0.jpg)" in output_of("cxr data check")
    assert set(titles) == {name.replace("/", "_") for name in names} - {"train_a_0.jpg"}


def test_no_column_about_the_patient_but_the_one_that_names_it_is_guessed(folder):
    write_images(folder / "own", *(f"{number}.jpg" for number in range(4)))
    header = "image,patient_age,PatientBirthDate,case_control,patientSex,{},label"
    for name in ("Patient ID", "patientId", "SUBJECT_NO", "case", "pid", "study_patient"):
        lines = [header.format(name), *(f"{number}.jpg,50,1950,1,F,p{number},{number % 2}" for number in range(4))]
        (folder / "own/list.csv").write_text("\n".join(lines))
        columns = guessed_section(invoke("cxr data check own --images 1").output)["columns"]
        assert columns["patient"] == name
        assert columns["age"] == "patient_age"


@pytest.mark.parametrize("name", ["images_001.zip", "positive/part.tgz", "all.tar.gz"])
def test_a_folder_of_archives_says_to_unpack_them(folder, name):
    write_files(folder / "own", {name: b"x", "README.md": b"x"})
    error = f"Error: own: no images, but 1 archives, the first is {name}; unpack them"
    assert error_line_of("cxr data check own") == error


def test_a_section_whose_column_is_missing_is_shown_with_the_error(folder):
    write_images(folder / "nih", "images_001/images/00000001_000.png")
    (folder / "nih/Data_Entry_2017.csv").write_text("Image Index,Finding Labels\n00000001_000.png,Mass\n")
    error = "Error: nih/Data_Entry_2017.csv: no column 'Patient ID'; its header is Image Index,Finding Labels"
    assert error_line_of("cxr data check nih").startswith(error)
    header = "Image Index,Finding Labels,Patient ID,Patient Age,Patient Sex,View Position\n"
    (folder / "nih/Data_Entry_2017.csv").write_text(header + "00000001_000.png,Mass,1,58,M,PA\n")
    error = "Error: nih/Data_Entry_2017.csv: no column 'Patient Gender' (did you mean 'Patient Sex'?); its header is"
    assert error_line_of("cxr data check nih").startswith(error)
    assert guessed_section(invoke("cxr data check nih").output)["labels"] == "Data_Entry_2017.csv"


def test_a_table_may_name_folders_and_have_several_findings_in_a_field(folder):
    write_images(folder / "own", "a/s1/1.jpg", "a/s1/2.jpg", "a/s2/1.jpg")
    (folder / "own/list.csv").write_text("study,where,all,findings\ns1,a,x,flu|tb\ns2,a,x,none\n")
    result = invoke("cxr data check own")
    section = guessed_section(result.output)
    assert section["columns"] == {"file": "{study}/", "label": "findings"}
    assert section["separator"] == "|"
    assert "ignore: 'flu' (1), 'tb' (1), 'none' (1)" in result.stderr
    set_download(folder, section | {"positive": ["flu"], "negative": ["none"], "patterns": {"set": "/(s.)/"}}
                 | {"training_sets": ["s1"], "test_sets": ["s2"]})  # fmt: skip
    assert "labeled            2 images: 0 negative, 2 positive" in output_of("cxr data check own/")


def test_no_image_is_read_for_a_checksum_nor_copied(folder, monkeypatch):
    names = [f"{subset}/{subset}{number}.jpg" for subset in ("train", "test") for number in range(4)]
    write_images(folder / "own", *names)
    for table, subset in (("train_labels", "train"), ("sample_submission", "test")):
        lines = [f"{name.rpartition('/')[2]},0\n" for name in names if name.startswith(subset)]
        (folder / f"own/{table}.csv").write_text("File,Label\n" + "".join(lines))
    read: list[str] = []
    read_bytes = LocalFolder.read_bytes
    monkeypatch.setattr(LocalFolder, "read_bytes", lambda self, file: [read.append(file), read_bytes(self, file)][1])
    assert "decoded            2 of 2, from all 8" in output_of("cxr data check own --images 2")
    assert sorted(name for name in read if name.endswith(".jpg")) == ["test/test0.jpg", "train/train0.jpg"]


def test_every_public_set_has_its_page():
    from pipeline.data.sources.detection import PUBLIC_SETS

    assert [page for page in PUBLIC_SETS if not (ROOT / f"docs/data/{page}.md").is_file()] == []


def test_errors_name_the_path_of_the_user(folder):
    assert error_line_of("cxr data check nowhere") == "Error: nowhere: not found; correct the path"
    write_zip(folder / "other.zip", {"a.txt": b"a"})
    assert error_line_of("cxr data check other.zip").startswith("Error: other.zip: has no train_labels.csv;")
    (folder / "broken.zip").write_bytes(b"PK")
    assert error_line_of("cxr data check broken.zip").startswith("Error: broken.zip: ")
    write_zip(folder / "own.xlsx", {"sheet.xml": b""})
    error = "Error: own.xlsx: a spreadsheet; save it as CSV in UTF-8 and check that"
    assert error_line_of("cxr data check own.xlsx") == error
    (folder / "own.csv").write_text("finding,finding\nflu,flu\n")
    assert error_line_of("cxr data check own.csv").startswith("Error: ./own.csv: column 'finding' occurs 2 times;")
    (folder / "own.csv").write_text("finding\nflu\n")
    assert error_line_of("cxr data check own.csv").endswith(": no column of own.csv names images or folders")
    (folder / "own.csv").write_text(f"{','.join(covid_chestxray.COLUMNS)}\n")
    assert "no column of" not in error_line_of("cxr data check own.csv")
    assert not (folder / "contact_sheet.jpg").exists()


@pytest.mark.parametrize("command", ["cxr data check /data/radiographs", "cxr data check /data/radiographs.zip"])
def test_documented_commands_describe_the_same_data(folder, command):
    members = archive_members(train=6, test=2)
    write_zip(folder / "radiographs.zip", members)
    with zipfile.ZipFile(folder / "radiographs.zip") as archive:
        archive.extractall(folder / "radiographs")
    output = output_of(command.replace("/data/", f"{folder}/"))
    assert "6 images: 4 negative, 2 positive" in output
    assert "decoded            8 of 8" in output


def test_warnings_of_the_tables_are_shown(folder):
    members = archive_members(train=6, test=2)
    members["metadata.csv"] = b"File,patient,source,view\na000,p,s,PA\nzzz,p,s,PA\n"
    write_zip(folder / "own.zip", members)
    assert (
        "Warning: metadata.csv: 1 of 2 names are of no image, the first is 'zzz'"
        in invoke("cxr data check own.zip").stderr
    )
