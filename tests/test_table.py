"""The source `table`: miniatures of public data sets, read with the section of their page in docs/data."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, error_message, write_files
from hypothesis import given
from hypothesis import strategies as st
from odd_files import dicom

from pipeline.core.config import TableParams, load_config, normalize_value
from pipeline.data import layout
from pipeline.data.sources import archive_writer, fetch_source
from pipeline.data.test_labels import read_archived_labels

CASES = ROOT.parent / "shared/data/cases"
SECTIONS = {  # of every page about a data set with tables
    f"{page.stem}-{index}": section
    for page in sorted((ROOT / "docs/data").glob("*.md"))
    for index, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL))
    if (section := yaml.safe_load(text))["download"]["source"] == "table"
}
Row = tuple[str, int, str, str, str, float | None]  # set, label, patient, view, sex, age


def write(root: Path, files: dict[str, str]) -> None:
    contents = {name: text.encode() for name, text in files.items()}
    zipped = {name: gzip.compress(data, mtime=0) for name, data in contents.items() if name.endswith(".gz")}
    write_files(root, contents | zipped)


def fetch(params: TableParams, folder: Path) -> dict[str, Row]:
    """Fetch, and return what is known of each image; the labels of the test set are those kept apart."""
    fetch_source(params, folder / "raw.zip")
    rows = layout.read_layout(folder / "raw.zip").images.set_index("file")
    apart = read_archived_labels(folder / "raw.zip") if (rows["set"] == "test").any() else pd.Series(dtype="Int64")
    label = rows["label"].fillna(apart.astype("Int64")).fillna(-9).astype(int)
    columns = zip(rows["set"], label, rows["patient"], rows["view"], rows["sex"], rows["age"], strict=True)
    return {
        file: (*known, None if pd.isna(age) else float(age))
        for file, (*known, age) in zip(rows.index, columns, strict=True)
    }


# Miniatures of public data sets


def nih(root: Path) -> None:
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
    )
    lines = [
        ("00000001_000.png", "Cardiomegaly", 1, "058Y", "M", "PA"),
        ("00000001_001.png", "Cardiomegaly|Pneumonia", 1, "58", "M", "PA"),
        ("00000002_000.png", "No Finding", 2, "411", "M", "AP"),
        ("00000003_000.png", "Pneumonia|Infiltration", 3, "74", "F", "PA"),
        ("00000003_001.png", "Pleural_Thickening", 3, "75", "F", "PA"),
        ("00000004_000.png", "Pneumonia", 4, "82", "M", "AP"),  # in an archive that was not downloaded
    ]
    table = "".join(f"{i},{f},0,{p},{a},{g},{v},2682,2749,0.143,0.143,\n" for i, f, p, a, g, v in lines)
    write(root, {
        "Data_Entry_2017.csv": header + table,
        "train_val_list.txt": "00000001_000.png\n00000001_001.png\n00000002_000.png\n",
        "test_list.txt": "00000003_000.png\n00000003_001.png\n00000004_000.png",  # without a line end, as published
        "images_001/images/00000001_000.png": "a", "images_001/images/00000001_001.png": "b",
        "images_002/images/00000002_000.png": "c", "images_012/images/00000003_000.png": "d",
        "images_012/images/00000003_001.png": "e",
    })  # fmt: skip


CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices\n"
)


def chexpert(root: Path) -> None:
    def line(path: str, sex: str, age: int, view: str, projection: str, pneumonia: str) -> str:
        return f"CheXpert-v1.0-small/{path},{sex},{age},{view},{projection},,,,1.0,,,,{pneumonia},,0.0,,,,-1.0\n"

    write(root, {
        "CheXpert-v1.0-small/train.csv": CHEXPERT
        + line("train/patient00001/study1/view1_frontal.jpg", "Female", 68, "Frontal", "AP", "")
        + line("train/patient00002/study2/view1_frontal.jpg", "Female", 87, "Frontal", "AP", "-1.0")
        + line("train/patient00002/study1/view1_frontal.jpg", "Female", 83, "Frontal", "AP", "1.0")
        + line("train/patient00002/study1/view2_lateral.jpg", "Female", 83, "Lateral", "", "1.0")
        + line("train/patient00003/study1/view1_frontal.jpg", "Unknown", 0, "Frontal", "PA", "0.0"),
        "CheXpert-v1.0-small/valid.csv": CHEXPERT
        + line("valid/patient64541/study1/view1_frontal.jpg", "Male", 73, "Frontal", "AP", "0.0")
        + line("valid/patient64542/study1/view1_frontal.jpg", "Male", 70, "Frontal", "PA", "1.0")
        + line("valid/patient64542/study1/view2_lateral.jpg", "Male", 70, "Lateral", "", "1.0"),
    } | {f"CheXpert-v1.0-small/{name}.jpg": name for name in (
        "train/patient00001/study1/view1_frontal", "train/patient00002/study2/view1_frontal",
        "train/patient00002/study1/view1_frontal", "train/patient00002/study1/view2_lateral",
        "train/patient00003/study1/view1_frontal", "valid/patient64541/study1/view1_frontal",
        "valid/patient64542/study1/view1_frontal", "valid/patient64542/study1/view2_lateral",
    )})  # fmt: skip


MIMIC = [  # dicom_id, subject_id, study_id, ViewPosition, split
    ("02aa804e-bde0afdd", 10000032, 50414267, "PA", "train"),
    ("174413ec-4ec4c1f7", 10000032, 50414267, "LATERAL", "train"),
    ("2a2277a9-b0ded155", 10000032, 53189527, "PA", "train"),
    ("68b5c4b1-227d0485", 10000764, 57375967, "AP", "validate"),
    ("096052b7-d256dc40", 10000898, 50771383, "", "test"),
    ("8959e402-2175d68d", 10000935, 50578979, "AP", "test"),
    ("d0b71acc-b5a62046", 10000935, 51178377, "AP", "test"),
    ("2b5f7a4c-0d0e7a4b", 10000980, 50985099, "PA", "train"),
]


def mimic(root: Path) -> None:
    images = {
        f"files/p{str(subject)[:2]}/p{subject}/s{study}/{dicom}.jpg": dicom for dicom, subject, study, *_ in MIMIC
    }
    metadata = "".join(
        f"{dicom},{subject},{study},CHEST (PA AND LAT),{view},3056,2544,21800506,213014.531,CHEST (PA AND LAT),,Erect\n"
        for dicom, subject, study, view, _ in MIMIC
    )
    write(root, {
        "mimic-cxr-2.0.0-metadata.csv.gz":
            "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
            "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning\n"
            + metadata,
        "mimic-cxr-2.0.0-split.csv.gz": "dicom_id,study_id,subject_id,split\n"
            + "".join(f"{dicom},{study},{subject},{split}\n" for dicom, subject, study, _, split in MIMIC),
        "mimic-cxr-2.0.0-chexpert.csv.gz":  # study 57375967 is not labeled
            "subject_id,study_id,Atelectasis,Pneumonia,Support Devices\n10000032,50414267,,1.0,\n"
            "10000032,53189527,0.0,,\n10000935,50578979,,0.0,\n10000935,51178377,,1.0,\n10000980,50985099,,-1.0,\n10000898,50771383,,1.0,\n",
    } | images)  # fmt: skip


RSNA = {"0004cfab": ("Lung Opacity", 2), "00313ee0": ("Normal", 0), "00322d4d": ("No Lung Opacity / Not Normal", 0),
        "00436515": ("Lung Opacity", 1), "00569f44": ("Normal", 0), "006cec2e": ("Normal", 0)}  # fmt: skip


def rsna(root: Path) -> None:
    labels = "".join(
        f"{patient},264.0,{box}52.0,213.0,379.0,1\n" for patient, (_, boxes) in RSNA.items() for box in range(boxes)
    ) + "".join(f"{patient},,,,,0\n" for patient, (_, boxes) in RSNA.items() if not boxes)
    classes = "".join(f"{patient},{name}\n" * max(boxes, 1) for patient, (name, boxes) in RSNA.items())
    write(root, {
        "stage_2_train_labels.csv": f"patientId,x,y,width,height,Target\n{labels}",
        "stage_2_detailed_class_info.csv": f"patientId,class\n{classes}",
        "stage_2_sample_submission.csv": "patientId,PredictionString\n0000a175,0.5 0 0 100 100\n",
        "stage_2_test_images/0000a175.dcm": "test",
    } | {f"stage_2_train_images/{patient}.dcm": patient for patient in RSNA})  # fmt: skip


SIIM = {"000a312787f2": ("5776db0cec75", 1), "000c3a3f293f": ("ff0879eb20ed", 0), "0012ff7358bc": ("9d514ce429a7", 1),
        "001398f4ff4f": ("28dddc8559b2", 0), "001bd15d1891": ("9d514ce429a7", 0)}  # fmt: skip


def siim(root: Path) -> None:
    box = "\"[{'x': 789.28, 'y': 582.43, 'width': 1026.65, 'height': 1917.3}]\",opacity 1 789.28 582.43 1815.9 2499"
    images = "".join(
        f"{image}_image,{box if has_box else ',none 1 0 0 1 1'},{study}\n" for image, (study, has_box) in SIIM.items()
    )
    studies = {
        "5776db0cec75": "0,1,0,0",
        "ff0879eb20ed": "1,0,0,0",
        "9d514ce429a7": "0,0,0,1",
        "28dddc8559b2": "1,0,0,0",
    }
    header = "id,Negative for Pneumonia,Typical Appearance,Indeterminate Appearance,Atypical Appearance\n"
    write(root, {
        "train_study_level.csv": header + "".join(f"{study}_study,{labels}\n" for study, labels in studies.items()),
        "train_image_level.csv": f"id,boxes,label,StudyInstanceUID\n{images}",
        "sample_submission.csv": "id,PredictionString\n00188a671292_study,negative 1 0 0 1 1\n",
        "test/00188a671292/3eb5a506ccf3/3dcdfc352a06.dcm": "test",
    } | {f"train/{study}/81456c9c5423/{image}.dcm": image for image, (study, _) in SIIM.items()})  # fmt: skip


def vindr(root: Path) -> None:
    train = {"0004": "110", "0005": "001", "0006": "000", "0007": "111"}  # Pneumonia, as three radiologists see it
    rows = [
        f"{image},R{8 + rad},0,{label},0,0\n" for image, labels in train.items() for rad, label in enumerate(labels)
    ]
    write(root, {
        "annotations/image_labels_train.csv": "image_id,rad_id,Lung Opacity,Pneumonia,Other diseases,No finding\n"
        + "".join(reversed(rows)),
        "annotations/image_labels_test.csv": "image_id,Lung Opacity,Pneumonia,Other disease,No finding\n"
        "002a,1,1,0,0\n004f,0,0,0,1\n",
        "test/002a.dicom": "a", "test/004f.dicom": "f",
    } | {f"train/{image}.dicom": image for image in train})  # fmt: skip


def padchest(root: Path) -> None:
    header = ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,"
    header += (
        "Projection,MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,ReportID,Report,MethodLabel,Labels,"
    )
    header += "Localizations\n"
    lines = [
        ("20536686_k6ga29", 0, 839860488, "M", "PA", "No", "\"['pulmonary fibrosis', 'chronic changes']\""),
        ("20536687_hpbn4x", 0, 839860488, "M", "L", "No", "\"['pneumonia']\""),
        ("13587_8vlkl6", 3, 313572750, "F", "AP_horizontal", "No", "\"['consolidation', ' pneumonia']\""),
        ("13588_6anklv", 3, 50783093, "O", "PA", "PED", "['pneumonia']"),
        ("20597_l73f8k", 12, 93681764, "", "AP", "No", "\"['suboptimal study', 'pneumonia']\""),
        ("20598_05w7c5", 12, 93681764, "", "PA", "No", "[]"),
        ("20599_qmm9e1", 12, 105092120, "F", "PA", "No", "['normal']"),
        ("20600_a3v0w8", 50, 105092120, "F", "PA", "No", "['pneumonia']"),  # in an archive that was not downloaded
    ]
    table = "".join(
        f"{number},{image}.png,{parent},20140915,{number}8,{patient},1938.0,{sex},POSTEROANTERIOR,{view},Manual,{child},CR,"
        f"ImagingDynamicsCompanyLtd,476{number},sin hallazgos,Physician,{labels},\"['loc basal']\"\n"
        for number, (image, parent, patient, sex, view, child, labels) in enumerate(lines)
    )
    images = {f"{parent}/{image}.png": image for image, parent, *_ in lines[:-1]}
    write(root, {"PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv": header + table} | images)


def bimcv(root: Path) -> None:
    sessions = [
        ("sub-S03047", "ses-E07985", "['COVID 19', 'pneumonia']"),
        ("sub-S03047", "ses-E08001", "['COVID 19 uncertain']"),
        ("sub-S03050", "ses-E06693", "['COVID 19']"), ("sub-S03066", "ses-E07113", "['normal']"),
        ("sub-S03082", "ses-E07936", "['infiltrates', 'COVID 19']"), ("sub-S03349", "ses-E06615", "['pneumonia']"),
    ]  # fmt: skip
    labels = "".join(
        f"{number}\t{patient}\t{session}\tno se observan\t{found}\t['loc basal']\n"
        for number, (patient, session, found) in enumerate(sessions)
    )
    people = [("sub-S03047", "[65]", "M"), ("sub-S03050", "[71]", "F"), ("sub-S03066", "[45, 46]", "F"),
              ("sub-S03082", "[]", "None"), ("sub-S03349", "[80]", "M"), ("derivatives", "", "")]  # fmt: skip
    participants = "".join(f"{who}\t['CR', 'DX']\t[['CHEST']]\t1955\t{age}\t{sex}\n" for who, age, sex in people)
    images = [
        f"{patient}/{session}/mod-rx/{patient}_{session}_run-{run}_bp-chest_vp-{view}"
        for patient, session, run, view in (
            ("sub-S03047", "ses-E07985", 1, "ap_cr"), ("sub-S03047", "ses-E07985", 2, "ll_cr"),
            ("sub-S03047", "ses-E08001", 1, "pa_dx"), ("sub-S03066", "ses-E07113", 1, "pa_dx"),
            ("sub-S03082", "ses-E07936", 1, "ap_dx"), ("sub-S03349", "ses-E06615", 1, "pa_cr"),
        )
    ]  # fmt: skip
    write(root, {
        "participants.tsv": f"participant\tmodality_dicom\tbody_parts\tpatient_birth\tage\tgender\n{participants}",
        "derivatives/labels/labels_covid_posi.tsv": f"\tPatientID\tReportID\tReport\tLabels\tLocalizations\n{labels}",
        "sub-S03047/sub-S03047_sessions.tsv": "session_id\tstudy_date\nses-E07985\t20200326\n",
        "sub-S03050/ses-E06693/mod-ct/sub-S03050_ses-E06693_run-1_bp-chest_ct.nii.gz": "ct",
    } | {f"{name}.png": name for name in images} | {f"{name}.json": "{}" for name in images})  # fmt: skip


def hospital(root: Path) -> None:
    lines = ("A;1;covid;7;PA;train", "A;2;Normal;8;AP;validation", "A;3;covid;8;L;train", "B;1;U07.1;9;PA;test",
             "B;2;pneumonia;9;PA;test", "B;3;unclear;10;PA;train")  # fmt: skip
    write(root, {
        "examinations.csv": "\ufeffsite;image;diagnosis;case;view;split\r\n" + "\r\n".join(lines),
        "patients.csv": "id,sex,age\n07,f,60\n8,m,\n9,F,81\n10,,\n",
    } | {f"{site}/{image}.dcm": "image" for site in "AB" for image in range(1, 4)})  # fmt: skip


def bimcv_name(patient: str, session: str, rest: str) -> str:
    return f"{patient}_{session}_mod-rx_{patient}_{session}_{rest}.png"


U = "CheXpert-v1.0-small_"
MINIATURES: dict[str, tuple[Callable[[Path], None], dict[str, Row], list[str]]] = {
    "nih-chestxray14-0": (nih, {
        "00000001_000.png": ("train", 0, "1", "PA", "M", 58), "00000001_001.png": ("train", 1, "1", "PA", "M", 58),
        "00000002_000.png": ("train", 0, "2", "AP", "M", None), "00000003_000.png": ("test", 1, "3", "PA", "F", 74),
        "00000003_001.png": ("test", 0, "3", "PA", "F", 75),
    }, ["6 rows", "download.patterns finds no age in Patient Age in 1 of 6, the first is '411'",
        "rows without an image left out: 1, the first is '00000004_000.png'"]),
    "chexpert-0": (chexpert, {
        f"{U}train_patient00001_study1_view1_frontal.jpg": ("train", 0, "00001", "AP", "F", 68),
        f"{U}train_patient00002_study1_view1_frontal.jpg": ("train", 1, "00002", "AP", "F", 83),
        f"{U}train_patient00003_study1_view1_frontal.jpg": ("train", 0, "00003", "PA", "", 0),
        f"{U}valid_patient64541_study1_view1_frontal.jpg": ("test", 0, "64541", "AP", "M", 73),
        f"{U}valid_patient64542_study1_view1_frontal.jpg": ("test", 1, "64542", "PA", "M", 70),
    }, ["8 rows", "left out by download.keep: 2 (Frontal/Lateral is 'Lateral' 2)",
        "ignored: 1 (Pneumonia is '-1.0' 1)"]),
    "table-0": (hospital, {
        "A_1.dcm": ("train", 1, "7", "PA", "F", 60), "A_2.dcm": ("train", 0, "8", "AP", "M", None),
        "B_1.dcm": ("test", 1, "9", "PA", "F", 81), "B_2.dcm": ("test", 0, "9", "PA", "F", 81),
    }, ["6 rows", "(view is 'L' 1)", "ignored: 1 (diagnosis is 'unclear' 1)"]),
    "mimic-cxr-jpg-0": (mimic, {
        "02aa804e-bde0afdd.jpg": ("train", 1, "10000032", "PA", "", None),
        "2a2277a9-b0ded155.jpg": ("train", 0, "10000032", "PA", "", None),
        "68b5c4b1-227d0485.jpg": ("train", 0, "10000764", "AP", "", None),
        "8959e402-2175d68d.jpg": ("test", 0, "10000935", "AP", "", None),
        "d0b71acc-b5a62046.jpg": ("test", 1, "10000935", "AP", "", None),
    }, ["8 rows", "rows without one in", "mimic-cxr-2.0.0-chexpert.csv.gz: 1, the first is '10000764 57375967'",
        "left out by download.keep: 2 (ViewPosition is empty 1, 'LATERAL' 1)", "ignored: 1 (Pneumonia is '-1.0' 1)"]),
    "rsna-pneumonia-0": (rsna, {
        "0004cfab.dcm": ("", 1, "", "", "", None), "00313ee0.dcm": ("", 0, "", "", "", None),
        "00322d4d.dcm": ("", 0, "", "", "", None), "00436515.dcm": ("", 1, "", "", "", None),
        "00569f44.dcm": ("", 0, "", "", "", None), "006cec2e.dcm": ("", 0, "", "", "", None),
    }, ["7 rows", "images without a row: 1, the first is 'stage_2_test_images/0000a175.dcm'",
        "merged with another row of their image: 1"]),
    "rsna-pneumonia-1": (rsna, {
        "0004cfab.dcm": ("", 1, "", "", "", None), "00313ee0.dcm": ("", 0, "", "", "", None),
        "00436515.dcm": ("", 1, "", "", "", None), "00569f44.dcm": ("", 0, "", "", "", None),
        "006cec2e.dcm": ("", 0, "", "", "", None),
    }, ["left out by download.keep: 1 (class is 'No Lung Opacity / Not Normal' 1)"]),
    "siim-covid-19-0": (siim, {
        f"{study}_81456c9c5423_{image}.dcm": ("", int(study in ("5776db0cec75", "9d514ce429a7")), study, "", "", None)
        for image, (study, _) in SIIM.items()
    }, ["4 rows", "images without a row: 1, the first is 'test/00188a671292/3eb5a506ccf3/3dcdfc352a06.dcm'"]),
    "siim-covid-19-1": (siim, {
        f"{image}.dcm": ("", label, study, "", "", None) for image, (study, label) in SIIM.items()
    }, ["5 rows", "images without a row: 1"]),
    "vindr-cxr-0": (vindr, {
        "0004.dicom": ("train", 1, "", "", "", None), "0005.dicom": ("train", 0, "", "", "", None),
        "0006.dicom": ("train", 0, "", "", "", None), "0007.dicom": ("train", 1, "", "", "", None),
        "002a.dicom": ("test", 1, "", "", "", None), "004f.dicom": ("test", 0, "", "", "", None),
    }, ["14 rows", "merged with another row of their image: 8"]),
    "padchest-0": (padchest, {
        "20536686_k6ga29.png": ("", 0, "839860488", "PA", "M", None),
        "13587_8vlkl6.png": ("", 1, "313572750", "AP_horizontal", "F", None),
        "20599_qmm9e1.png": ("", 0, "105092120", "PA", "F", None),
    }, ["8 rows", "left out by download.keep: 1 (Projection is 'L' 1)", "by download.keep: 1 (Pediatric is 'PED' 1)",
        "rows without an image left out: 1, the first is '20600_a3v0w8.png'", "ignored: 2"]),
    "bimcv-covid-19-0": (bimcv, {
        bimcv_name("sub-S03047", "ses-E07985", "run-1_bp-chest_vp-ap_cr"): ("", 1, "sub-S03047", "ap", "M", 65),
        bimcv_name("sub-S03047", "ses-E07985", "run-2_bp-chest_vp-ll_cr"): ("", 1, "sub-S03047", "ll", "M", 65),
        bimcv_name("sub-S03066", "ses-E07113", "run-1_bp-chest_vp-pa_dx"): ("", 0, "sub-S03066", "pa", "F", 45),
        bimcv_name("sub-S03082", "ses-E07936", "run-1_bp-chest_vp-ap_dx"): ("", 1, "sub-S03082", "ap", "", None),
        bimcv_name("sub-S03349", "ses-E06615", "run-1_bp-chest_vp-pa_cr"): ("", 0, "sub-S03349", "pa", "M", 80),
    }, ["6 rows", "rows of", "participants.tsv without one here: 1, the first is 'derivatives'",
        "ignored: 1 (Labels is \"['COVID 19 uncertain']\" 1)",
        "rows without an image left out: 1, the first is 'sub-S03050/ses-E06693/mod-rx/'"]),
}  # fmt: skip


def test_every_section_of_a_page_has_a_miniature():
    assert set(SECTIONS) == set(MINIATURES)


@pytest.mark.parametrize("name", MINIATURES)
def test_the_section_of_a_page_reads_the_layout_of_its_data_set(tmp_path, name, caplog):
    write_miniature, expected, notes = MINIATURES[name]
    write_miniature(tmp_path / "data")
    path = tmp_path / "params.yaml"
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    section = SECTIONS[name] | {"download": SECTIONS[name]["download"] | {"path": str(tmp_path / "data")}}
    if "test_share" in section["download"] or not any("test" in row for row in expected.values()):
        section["download"]["test_share"] = 0.5  # of so few patients
    path.write_text(yaml.safe_dump(params | {"profile": "local", "local": params["local"] | section}))
    loaded = load_config(path).active.download
    assert isinstance(loaded, TableParams)
    rows = fetch(loaded, tmp_path)
    assert all(row[0] in ("train", "test") for row in rows.values())
    assert {file: (expected[file][0] and row[0], *row[1:]) for file, row in rows.items()} == expected
    assert [note for note in notes if note not in caplog.text] == []


def test_patients_and_studies_of_a_miniature_are_not_divided_between_the_sets(tmp_path):
    siim(tmp_path / "data")
    params = SECTIONS["siim-covid-19-1"]["download"] | {"path": tmp_path / "data", "test_share": 0.5}
    rows = pd.DataFrame(fetch(TableParams.model_validate(params), tmp_path).values())
    assert rows.groupby(2)[0].nunique().max() == 1


@pytest.mark.parametrize("rule", ["U-Ones", "U-Zeros"])
def test_uncertain_labels_of_chexpert_can_be_either(tmp_path, rule):
    chexpert(tmp_path / "data")
    changes = {"ignore": [], "positive": [1], "negative": [0, "", -1]} if rule == "U-Zeros" else {
        "ignore": [], "positive": [1, -1]}  # fmt: skip
    params = SECTIONS["chexpert-0"]["download"] | {"path": tmp_path / "data"} | changes
    rows = fetch(TableParams.model_validate(params), tmp_path)
    assert rows[f"{U}train_patient00002_study2_view1_frontal.jpg"][1] == int(rule == "U-Ones")


def test_the_tables_of_chexpert_may_stand_beside_train_and_valid_as_on_kaggle(tmp_path):
    chexpert(tmp_path / "data")
    root = tmp_path / "data/CheXpert-v1.0-small"
    params = SECTIONS["chexpert-0"]["download"] | {"path": root, "labels": ["train.csv", "valid.csv"]}
    rows = fetch(TableParams.model_validate(params), tmp_path)
    assert rows["valid_patient64542_study1_view1_frontal.jpg"] == ("test", 1, "64542", "PA", "M", 70)
    assert len(rows) == 5


def test_radiologists_who_disagree_are_an_error_unless_a_rule_is_given(tmp_path):
    vindr(tmp_path / "data")
    params = SECTIONS["vindr-cxr-0"]["download"] | {"path": tmp_path / "data"}
    rows = fetch(TableParams.model_validate(params | {"repeated": "any"}), tmp_path)
    assert [rows[f"{name}.dicom"][1] for name in ("0004", "0005", "0006", "0007")] == [1, 1, 0, 1]
    message = error_message(
        fetch_source, TableParams.model_validate(params | {"repeated": "error"}), tmp_path / "raw.zip"
    )
    assert re.search(
        r"image_labels_train.csv line \d+: label of train/0005.dicom is '1', but '0' in line \d+ \(2 such", message
    )
    assert message.endswith("correct the table or set download.repeated to majority or any")


# Any hospital


def table(root: Path, text: str, images: str = "1.png 2.png 3.png 4.png", **changes: object) -> TableParams:
    """Write labels.csv and images; the first of them are training images, those from 3.png on test images."""
    write(root, {"labels.csv": text} | dict.fromkeys(images.split(), "image"))
    params = {"columns": {"file": "image", "label": "label", "set": "set"}, "path": root}
    return TableParams.model_validate({"source": "table", **params, **changes})


SETS = "image,label,set\n1.png,1,train\n2.png,0,train\n3.png,1,test\n4.png,0,test\n"


@pytest.mark.parametrize("listed", [[1], [1.0], [True], ["1"], ["True"], ["yes"]], ids=repr)
@pytest.mark.parametrize("written", ["1", "1.0", "True", "TRUE", " 1 ", "Yes"])
def test_labels_are_compared_by_value(tmp_path, listed, written):
    rows = fetch(table(tmp_path, SETS.replace(",1,", f",{written},"), positive=listed), tmp_path)
    assert [row[1] for row in rows.values()] == [1, 0, 1, 0]


@given(st.integers(-(10**12), 10**12), st.integers(0, 3), st.sampled_from(["", " ", "\t"]))
def test_numbers_are_equal_however_they_are_written(number, decimals, blank):
    assert normalize_value(f"{blank}{number:.{decimals}f}{blank}") == str(number)


@given(st.text())
def test_the_normal_form_of_a_value_is_normal(text):
    assert normalize_value(normalize_value(text)) == normalize_value(text)


@pytest.mark.parametrize(
    "text", ["12345678901234567", "1.2.840.113619", "2021-03-04", "1e5", "0x1", "NA", "U07.1", "½"]
)
def test_identifiers_are_not_taken_for_numbers(text):
    assert normalize_value(text) == text.casefold()


def test_a_name_may_be_put_together_from_columns(tmp_path):
    text = "site,image,label,set\nA,1.0,1,train\nB,1.0,0,train\nA,2.0,1,test\nB,2.0,0,test\n"
    columns = {"file": "{site}/x{image}.png", "label": "label", "set": "set", "patient": "{site}-{image}"}
    rows = fetch(table(tmp_path, text, "A/x1.png B/x1.png A/x2.png B/x2.png", columns=columns), tmp_path)
    assert {file: row[:3] for file, row in rows.items()} == {
        "A_x1.png": ("train", 1, "A-1"), "B_x1.png": ("train", 0, "B-1"),
        "A_x2.png": ("test", 1, "A-2"), "B_x2.png": ("test", 0, "B-2"),
    }  # fmt: skip


def test_patients_are_not_split_by_decimals_nor_lumped_together_as_nan(tmp_path, caplog):
    text = "image,label,set,case\n1.png,1,train,7.0\n2.png,0,train,7\n3.png,1,test,nan\n4.png,0,test,NA\n"
    columns = {"file": "image", "label": "label", "set": "set", "patient": "case"}
    rows = fetch(table(tmp_path, text, columns=columns), tmp_path)
    assert [row[2] for row in rows.values()] == ["7", "7", "", "NA"]
    assert "rows without a known patient: 1 ('nan' 1)" in caplog.text


def test_rows_of_an_image_are_merged_and_known_values_win(tmp_path, caplog):
    text = SETS.replace("set", "set,view,case,age").replace("train", "train,,a,").replace("test", "test,PA,b,50")
    text += "1.png,1,train,AP,a,60\n"
    columns = {"file": "image", "label": "label", "set": "set", "view": "view", "patient": "case", "age": "age"}
    rows = fetch(table(tmp_path, text, columns=columns), tmp_path)
    assert rows["1.png"] == ("train", 1, "a", "AP", "", 60)
    assert rows["2.png"] == ("train", 0, "a", "", "", None)
    assert list(rows) == ["1.png", "2.png", "3.png", "4.png"]
    assert "5 rows; merged with another row of their image: 1" in caplog.text


def test_a_tie_of_the_majority_is_an_error(tmp_path):
    params = table(tmp_path, SETS + "1.png,0,train\n", repeated="majority")
    assert "labels.csv line 2: label of 1.png is '1', but '0' in line 6 (1 such" in fails(params, tmp_path)


def fails(params: TableParams, folder: Path) -> str:
    return error_message(fetch_source, params, folder / "raw.zip")


def test_no_name_that_means_an_image_is_an_error_and_some_are_named_with_the_nearest(tmp_path, caplog):
    images, text = (
        "image-1.png image-2.png image-3.png image-4.png",
        SETS.replace("\n", "\nimage-").removesuffix("image-"),
    )
    rows = fetch(table(tmp_path, text.replace("image-2", "imgae-2"), images), tmp_path)
    assert "imgae-2.png" in rows  # as its label is known; prepare lists it in quarantine.csv
    assert layout.read_layout(tmp_path / "raw.zip").images["member"].eq("").sum() == 1
    assert "images not found: 1, the first is 'imgae-2.png' (did you mean 'image-2.png'?)" in caplog.text
    assert "images without a row: 1, the first is 'image-2.png'" in caplog.text
    message = fails(table(tmp_path, text.replace("image-", "imgae-"), images), tmp_path)
    assert "labels.csv line 2: image is 'imgae-1.png' (did you mean 'image-1.png'?); neither it nor any of 3" in message


LISTS = {"positive": ["a"], "negative": ["b", "b2"], "ignore": ["x"]}


@pytest.mark.parametrize(
    ("cell", "label"), [("a", 1), ("b|a", 1), ("b", 0), ("b|b2", 0), ("a|x", None), ("x|b", None), (" B | A ", 1)]
)
def test_a_field_is_positive_if_one_finding_is_and_left_out_if_one_is_to_be_ignored(tmp_path, cell, label):
    text = f"image,label,set\n1.png,{cell},train\n2.png,b,train\n3.png,a,test\n"
    rows = fetch(table(tmp_path, text, separator="|", **LISTS), tmp_path)
    assert rows.get("1.png", (None, None))[1] == label


def test_a_list_of_python_is_several_findings_with_a_separator_and_one_without(tmp_path):
    text = "image,label,set\n1.png,\"['b', ' a ']\",train\n2.png,b,train\n3.png,a,test\n"
    assert fetch(table(tmp_path, text, separator=",", **LISTS), tmp_path)["1.png"][1] == 1
    assert "label is \"['b', ' a ']\", which is in neither" in fails(table(tmp_path, text, **LISTS), tmp_path)


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        (SETS.replace("png,0", "png,2"), {}, "neither download.positive nor download.negative (1 rows: '2' 1); add it"),
        (SETS.replace("png,0", "png,2"), {}, "labels.csv line 3: label is '2', which is in neither"),
        (SETS.replace("png,0", "png,"), {"negative": "others"}, "line 3: label is '', which is in neither"),
        (SETS.replace("png,0", "png,NA"), {"negative": "others"}, "line 3: label is 'NA', which is in neither"),
        (SETS.replace("test", "dev"), {}, "line 4: set is 'dev'; it must be train or test (2 rows: 'dev' 2); add"),
        (SETS, {"keep": {"set": ["validation"]}}, "no row is left; left out by download.keep: 4 (set is 'test' 2"),
        (SETS, {"keep": {"view": ["PA"]}}, "labels.csv: no column 'view'"),
        (SETS.replace("label", "lable"), {}, "labels.csv: no column 'label' (did you mean 'lable'?)"),
        (SETS, {"labels": "label.csv"}, "'label.csv' (did you mean 'labels.csv'?)"),
        (SETS, {"labels": "label.csv"}, "label.csv: not found; add this table, which describes the images"),
        (SETS, {"columns": {"file": "image", "label": "label"}, "test_list": "tests.txt"}, "'tests.txt' not found"),
        (SETS + "1.png,0,train\n", {}, "line 2: label of 1.png is '1', but '0' in line 6 (1 such images)"),
        (SETS + "1.png,1,test\n", {"repeated": "any"}, "line 2: set of 1.png is 'train', but 'test' in line 6"),
        (SETS + ",1,train\n", {}, "labels.csv line 6: image is empty; name the image or delete the line"),
        (SETS, {"labels": ["labels.csv", "more.csv"]}, "more.csv line 3: label is 'x', which is in neither"),
        ("image,label,set\n", {}, "labels.csv: no row is left; images without a row: 4, the first is '1.png'"),
    ],
)  # fmt: skip
def test_a_table_that_is_understood_in_part_is_an_error_of_one_line(tmp_path, text, changes, reason):
    write(tmp_path, {"more.csv": "image,label,set\n5.png,1,train\n6.png,x,train\n"})
    message = fails(table(tmp_path, text, **changes), tmp_path)
    assert reason in message
    assert "\n" not in message


def test_names_in_the_list_of_test_images_are_matched_and_those_without_a_row_are_counted(tmp_path, caplog):
    write(tmp_path, {"lists/test.txt": "\ufeff3\r\n./4.PNG\r\n9.png\r\n\r\n"})
    columns = {"file": "image", "label": "label"}
    rows = fetch(table(tmp_path, SETS, columns=columns, test_list="lists/test.txt"), tmp_path)
    assert [row[0] for row in rows.values()] == ["train", "train", "test", "test"]
    assert "lists/test.txt that are none of these images: 1, the first is '9.png'" in caplog.text


# Joined tables


JOIN = {"labels": "images.csv", "join": [{"table": "labels.csv", "by": {"name": "image"}}],
        "columns": {"file": "name", "label": "label", "set": "set"}}  # fmt: skip


def test_tables_are_joined_by_names_that_differ_in_spelling(tmp_path, caplog):
    write(tmp_path, {"images.csv": "name\n1\n2\n3\n4\n5\n"})
    rows = fetch(
        table(
            tmp_path, SETS + "6.png,1,train\n", "1.png 2.png 3.png 4.png 5.png", **JOIN, keep={"set": ["train", "test"]}
        ),
        tmp_path,
    )
    assert [row[:2] for row in rows.values()] == [("train", 1), ("train", 0), ("test", 1), ("test", 0)]
    assert "rows without one in" in caplog.text
    assert "labels.csv without one here: 1, the first is '6.png'" in caplog.text
    assert "left out by download.keep: 1 (set is empty 1)" in caplog.text


def test_rows_without_a_match_are_named_as_the_table_writes_them(tmp_path, caplog):
    write(tmp_path, {"images.csv": "name\n1\n2\n3\n4\n007.PNG\n"})
    fetch(
        table(
            tmp_path,
            SETS + "Sub-S09.PNG,1,train\n",
            "1.png 2.png 3.png 4.png 007.png",
            **JOIN,
            keep={"set": ["train", "test"]},
        ),
        tmp_path,
    )
    assert "labels.csv: 1, the first is '007.PNG'" in caplog.text
    assert "labels.csv without one here: 1, the first is 'Sub-S09.PNG'" in caplog.text


def test_tables_are_joined_by_texts_put_together_from_columns(tmp_path):
    write(tmp_path, {"studies.csv": "id,negative\na_study,0\nb_study,1\n"})
    images = "id,study\n1_image,a\n2_image,a\n3_image,b\n"
    changes: dict = {"join": [{"table": "studies.csv", "by": {"{study}_study": "id"}}]}
    changes["columns"] = {"file": "id", "label": "negative", "patient": "study"}
    changes |= {"patterns": {"file": "^(.+)_image"}, "positive": [0], "negative": [1], "test_share": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive_writer, "draw_test_set", lambda patient, file, share: patient == "b")
        rows = fetch(table(tmp_path, images, "1.png 2.png 3.png", **changes), tmp_path)
    assert [row[:3] for row in rows.values()] == [("train", 1, "a"), ("train", 1, "a"), ("test", 0, "b")]


def test_values_that_no_row_has_and_unknown_labels_of_test_images_are_named(tmp_path, caplog):
    listed = {"positive": [1, "covdi"], "ignore": ["unclaer", ""], "negative": "others"}
    fetch(table(tmp_path, SETS, **listed), tmp_path)
    assert "values of download.positive that no row has: 1, the first is 'covdi'" in caplog.text
    assert "values of download.ignore that no row has: 1, the first is 'unclaer'" in caplog.text
    fetch(table(tmp_path, SETS.replace("3.png,1", "3.png,maybe")), tmp_path)
    assert "test images whose label is in no list: 1 ('maybe' 1)" in caplog.text
    rows = fetch(table(tmp_path, SETS.replace("png,0", "png,none"), **listed), tmp_path)  # no finding
    assert [row[1] for row in rows.values()] == [1, 0, 1, 0]
    message = fails(table(tmp_path, SETS, positive=[2], negative=[0, 1]), tmp_path)
    assert message.endswith("labels.csv: no image is positive; download.positive is '2'; label is '0' 2, '1' 2")


def test_images_of_a_patient_whom_only_dicom_files_name_are_in_one_set(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(40):
        content = dicom(np.uint16([[0]]), PatientID=f"p{number % 4}")
        (tmp_path / f"data/{number}{'.dcm' if number % 3 else ''}").write_bytes(content)
    text = "file,label\n" + "".join(f"{number},{number // 4 % 2}\n" for number in range(40))
    (tmp_path / "data/labels.csv").write_text(text)
    rows = fetch(TableParams(source="table", path=str(tmp_path / "data"), test_share=0.5), tmp_path)
    sets = pd.Series({int(Path(name).stem): row[0] for name, row in rows.items()})
    assert sets.groupby(sets.index % 4).nunique().eq(1).all()
    assert sets.nunique() == 2


@pytest.mark.parametrize(
    ("images", "labels", "changes", "reason"),
    [
        ("name\nx\ny\n", SETS, {}, "labels.csv: no row has the name of a row of"),
        ("name\n1.png\n", SETS + "1.png,0,test\n", {}, "labels.csv line 6: the second row of '1.png' that"),
        ("name,set\n1.png,train\n", SETS, {}, "column 'set' is also in the other table; add it to download.join"),
        ("nam\n1.png\n", SETS, {}, "images.csv: no column 'name' (did you mean 'nam'?)"),
        ("name\n1.png\n", SETS, {"keep": {"sets": ["x"]}}, "images.csv: no column 'sets' (did you mean 'set'?); its"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_joined_are_an_error_of_one_line(tmp_path, images, labels, changes, reason):
    write(tmp_path, {"images.csv": images})
    assert reason in fails(table(tmp_path, labels, **JOIN, **changes), tmp_path)


# Parameters


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"positive": ["1"], "negative": ["0", True]},
            "download: 'True' is in positive and in negative; keep it in one",
        ),
        ({"ignore": ["1.0"]}, "download: '1.0' is in positive and in ignore; keep it in one"),
        ({"training_sets": ["test"]}, "download: 'test' is in training_sets and in test_sets; keep it in one"),
        ({"patterns": {"pateint": "(a)"}}, "download: patterns.pateint: no key of columns; did you mean 'patient'?"),
        ({"patterns": {"age": "(a)"}}, "download: patterns.age: set columns.age to the column that the pattern reads"),
        ({"patterns": {"patient": "a"}}, "download.patterns.patient: 'a' has 0 groups; put parentheses around"),
        ({"patterns": {"patient": "(a"}}, "download.patterns.patient: '(a' is no regular expression: missing )"),
        ({"join": [{"tabel": "a.csv", "by": ["x"]}]}, "download.join.0.tabel: unknown key; did you mean 'table'?"),
        (
            {"test_list": "a.txt", "columns": {"set": "s"}},
            "download: test_list and the column set both tell the test set",
        ),
        ({"repeated": "mean"}, "download.repeated: input should be 'error', 'majority' or 'any', but it is 'mean'"),
    ],
)
def test_parameters_of_tables_that_make_no_sense_are_named(tmp_path, changes, reason):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["local"]["download"] = {"source": "table", "path": "/data"} | changes
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    assert reason in error_message(load_config, tmp_path / "params.yaml")


# Other people's files


@pytest.mark.skipif(not CASES.is_dir(), reason="needs the shared examples")
@pytest.mark.parametrize(
    ("case", "labels", "columns", "changes", "known"),
    [
        ("15-chexpert", "train.csv", {"file": "Path", "label": "Pneumonia"},
         {"patterns": {"patient": r"(patient\d+)"}, "keep": {"Frontal/Lateral": ["Frontal"]}, "ignore": [-1, ""]},
         {"patient00001": 1, "patient00002": 0, "patient00005": 1, "patient00006": 0}),
        ("16-nih-chestxray14", "Data_Entry_2017.csv",
         {"file": "Image Index", "label": "Finding Labels", "patient": "Patient ID"},
         {"separator": "|", "positive": ["Pneumonia"], "negative": "others"}, None),
        ("17-rsna-duplicate-rows", "stage_2_train_labels.csv", {"file": "patientId", "label": "Target"}, {}, None),
        *(("19-table-csv-quirks", path.name, {"file": "image", "label": "diagnosis", "patient": "case"},
           {"positive": ["covid"], "negative": ["normal"]}, None)
          for path in sorted((CASES / "19-table-csv-quirks").glob("*.csv"))),
    ],
)  # fmt: skip
def test_the_shared_examples_are_read(tmp_path, monkeypatch, case, labels, columns, changes, known):
    monkeypatch.setattr(archive_writer, "draw_test_set", lambda patient, file, share: file == file.iloc[-1])
    params = {"source": "table", "path": CASES / case, "labels": labels, "columns": columns} | changes
    rows = fetch(TableParams.model_validate(params), tmp_path)
    assert len(rows) == {"15": 4, "16": 16, "17": 10, "19": 12}[case[:2]]
    if known is not None:
        assert {row[2]: row[1] for row in rows.values()} == known
    else:
        share = {"16": 8 / 16, "17": 5 / 10, "19": 6 / 12}[case[:2]]
        assert sum(row[1] for row in rows.values()) / len(rows) == share
    if labels == "patient-float.csv":
        assert {row[2] for row in rows.values()} == {"0", "1", "2", "3"}
