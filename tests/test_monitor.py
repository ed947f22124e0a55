"""The log of predictions, and `cxr monitor`: what differs between what came in and what the model was trained on."""

import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from browser import OPTIONS
from conftest import ROOT, edit_params, error_line_of, error_message, invoke, make_tiny, output_of, use_project
from PIL import Image
from scipy.special import expit

from pipeline.core.config import FindingParams
from pipeline.core.files import write_csv, write_json
from pipeline.data import images
from pipeline.evaluation import monitoring
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import prediction_log
from pipeline.inference.candidate import Candidate, agreement
from pipeline.inference.prediction_log import PredictionLog, describe_image, read_log
from pipeline.inference.reference import find_candidate, hash_of_candidate
from pipeline.models import classifier
from pipeline.models.classifier import Architecture, Classifier
from pipeline.report import monitor_page

SIZE = 32
CPU = torch.device("cpu")
LOG = Path("predictions.jsonl")
LABELED, POSITIVE = 240, 48
VIEWS = ["PA", "POSTEROANTERIOR", "AP SUPINE", "LATERAL", "LLAT", "AP SECRET"]
MANUFACTURERS = ["GE Healthcare", "GE MEDICAL SYSTEMS", "FUJIFILM Corporation", "", "Maker " * 10, "Secret Name"]


def encode_chest(rng: np.random.Generator, label: int, *, gamma: float = 1.0, quality: int = 75) -> bytes:
    """Encode a smooth random image of 64 pixels, brighter in the middle if positive."""
    coarse = Image.fromarray(rng.integers(40, 160, (8, 8)).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse, float) + rng.normal(0, 6, (64, 64))
    pixels[20:44, 20:44] += 40 * label
    stream = io.BytesIO()
    gray = 255 * (np.clip(pixels, 0, 255) / 255) ** gamma
    Image.fromarray(gray.astype(np.uint8)).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def encode_dicom(pixels: np.ndarray, view: str, manufacturer: str) -> bytes:
    """Encode a radiograph, uint8 (H, W), of a patient with a name."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    file = Dataset()
    file.PatientName, file.PatientID, file.PatientBirthDate = "Secret^Name", "secret-id", "19600101"
    file.ViewPosition, file.Manufacturer, file.Modality = view, manufacturer, "DX"
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit = 1, 8, 8, 7
    file.PixelRepresentation, file.PhotometricInterpretation = 0, "MONOCHROME2"
    file.PixelData = pixels.tobytes()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def draw_scores(rng: np.random.Generator, labels: np.ndarray) -> pd.DataFrame:
    """Draw what a model predicts: scores of AUROC 0.92, by label."""
    score = expit(rng.normal(2 * labels - 1.5, 1.0))
    return pd.DataFrame({"score": score, "probability": score, "label": (score >= 0.5).astype(int), "seed-0": score})


@pytest.fixture(scope="module")
def network() -> Classifier:
    torch.manual_seed(0)
    return classifier.place_for_inference(
        Classifier(Architecture("squeezenet1_1", [], 0.0, SIZE, "imagenet", SIZE, "stretch")), CPU
    )


@pytest.fixture(scope="module")
def model(network) -> Candidate:
    config = EnsembleConfig(["seed-0"], "mean", "mean", [1.0], 0.5)
    return Candidate({"seed-0": [network]}, config, FindingParams())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, network) -> Path:
    """A project of two images per patient, half of them validation images, with an untrained model."""
    folder, rng = tmp_path_factory.mktemp("workspace"), np.random.default_rng(0)
    shutil.copy(ROOT / "params.yaml", folder)
    edit_params(folder, make_tiny)
    edit_params(folder, lambda params: params.update(seeds=[0]))
    labels = np.repeat([1, 0], [POSITIVE, LABELED - POSITIVE])
    contents = [encode_chest(rng, label) for label in labels]
    pixels = np.stack([images.decode_radiograph(data, SIZE, "stretch")[0] for data in contents])
    described = pd.DataFrame([describe_image(data, (64, 64), one) for data, one in zip(contents, pixels, strict=True)])
    files, patients = [f"{index}.jpg" for index in range(LABELED)], np.arange(LABELED) // 2
    texts = dict.fromkeys(["source", "sex", "license", "modality", "phash"], "")
    devices = {"view": VIEWS * (LABELED // 6), "manufacturer": MANUFACTURERS * (LABELED // 6)}
    manifest = pd.DataFrame({"file": files, "set": "train", "label": labels, "patient": patients, **devices, **texts})
    sizes = ["width", "height", "bytes", "jpeg_quantization"]
    write_csv(folder / "data/manifest.csv", manifest.assign(age=np.nan, xxh128=files, **described[sizes]))
    split = pd.DataFrame({"file": files, "group": patients, "subset": "train", "fold": patients % 2})
    write_csv(folder / "data/split.csv", split)
    np.save(folder / "data/images.npy", pixels)
    write_json(folder / "data/images.json", {"resize": "stretch"})
    validation = split["fold"] == 0
    scores = draw_scores(rng, labels[validation])["seed-0"].to_numpy()
    predictions = pd.DataFrame({"file": split["file"][validation], "label": labels[validation], "seed-0": scores})
    write_csv(folder / "predictions/validation.csv", predictions)
    classifier.save_weights([network], folder / "models/seed-0")
    classifier.save_description(network, folder / "models/seed-0", {})
    fields = {"method": "mean", "tie": "mean", "weights": [1.0], "threshold": 0.5, "prevalence": 0.2}
    candidate = {"members": ["seed-0"], **fields}
    write_json(folder / "metrics/candidates.json", {"seed-0": candidate, "bag": candidate})
    return folder


@pytest.fixture
def project(workspace, tmp_path, monkeypatch, one_thread) -> Path:
    """The workspace as the working directory; what tests write is elsewhere."""
    for path in workspace.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_log(
    model: Candidate, positive: int, negative: int, content_hash: str, version: str = "3", seed: int = 1, **change
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([1, 0], [positive, negative]))
    contents = [encode_chest(rng, label, **change) for label in labels]
    pixels = np.stack([images.decode_radiograph(data, SIZE, "stretch")[0] for data in contents])
    descriptions = [describe_image(data, (64, 64), one) for data, one in zip(contents, pixels, strict=True)]
    PredictionLog(LOG, model, content_hash, version).append(
        descriptions, torch.from_numpy(pixels), draw_scores(rng, labels)
    )


def spread_over_days(days: int) -> None:
    """Change the times in the log to those of as many days."""
    lines = [json.loads(line) for line in LOG.read_text().splitlines()]
    for index, line in enumerate(lines):
        line["time"] = f"2026-11-{1 + index * days // len(lines):02}T10:00:00+00:00"
    LOG.write_text("".join(json.dumps(line) + "\n" for line in lines))


def own_hash() -> str:
    from pipeline.core.config import load_config

    return hash_of_candidate(load_config(), "bag")


def test_a_log_like_the_images_of_the_model_is_no_alarm(project, model):
    write_log(model, 5, 20, "of another model", "2")
    write_log(model, 16, 64, own_hash())
    lines = LOG.read_text().splitlines(keepends=True)
    LOG.write_text("".join([*lines, *lines[-7:], lines[0][:200]]))
    result = invoke("cxr monitor predictions.jsonl")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("No difference was found (lowest adjusted p = ")
    for text in (
        "images: 80", "repeated images, counted once: 7", "predictions of other versions, left out: 25",
        "unreadable lines, left out: 1", "version 3 (candidate seed-0",
    ):  # fmt: skip
        assert text in result.stderr
        assert text.split(": ")[0] in Path("monitor.html").read_text()
    assert "The estimated share of positives is " in result.stdout
    assert "--prevalence" not in result.stdout
    LOG.write_text("".join(lines[25:]))
    assert invoke("cxr monitor predictions.jsonl").stderr.count(": ") == 3  # model, time, images; no counts of 0


def test_another_scanner_is_an_alarm_in_plain_words(project, model):
    write_log(model, 10, 40, own_hash(), gamma=1.6, quality=20)
    result = invoke("cxr monitor predictions.jsonl")
    assert result.exit_code == 1, result.output
    assert result.stdout.startswith("The images that came in are not like those that the model was trained")
    assert "darker (mean gray level" in result.stdout
    assert "JPEGs of lower quality (JPEG quantization step" in result.stdout


def test_another_prevalence_is_told_apart_and_is_none_where_it_is_expected(project, model):
    write_log(model, 60, 40, own_hash())
    result = invoke("cxr monitor predictions.jsonl")
    assert result.exit_code == 1, result.output
    assert "are like those of the model, but the share of positives differs" in result.stdout
    assert "expected is 20.0%" in result.stdout
    assert "No difference was found" in output_of("cxr monitor predictions.jsonl --prevalence 0.6")


def test_errors_are_one_line_and_leave_no_page(project, model):
    assert error_line_of("cxr monitor predictions.jsonl").startswith("Error: predictions.jsonl: No such file")
    for content, reason in (
        (b"", "empty"),
        (b"\x89PNG\r\n" + bytes(9000), "no log of predictions"),
        (b"{}\n", "no log"),
        (b"[" * 4000, "no log"),
    ):
        LOG.write_bytes(content)
        assert f"predictions.jsonl: {reason}" in error_line_of("cxr monitor predictions.jsonl")
    LOG.unlink()
    line = error_line_of("cxr monitor predictions.jsonl --prevalence nan")
    assert line == "Error: Invalid value for '--prevalence': nan is not a number."
    write_log(model, 4, 16, "0" * 64, "2")
    assert "model 000000000000 is none of those in models/" in error_line_of("cxr monitor predictions.jsonl")
    line = error_line_of("cxr monitor predictions.jsonl --model seed-0")
    assert (
        f"too few to tell: 0 images of model {own_hash()[:12]}, of at least 20; predictions of other versions" in line
    )
    line = error_line_of("cxr monitor predictions.jsonl --since 2999-01-01")
    assert "0 images since 2999-01-01 00:00:00, of at least 20; earlier predictions, left out: 20" in line
    lines = LOG.read_text().splitlines(keepends=True)
    LOG.write_text(lines[0].replace('"score":0', f'"score":1{"0" * 400}') + 3 * lines[1])
    line = error_line_of("cxr monitor predictions.jsonl")
    assert "1 images, of at least 20; repeated images, counted once: 2; unreadable lines, left out: 1" in line
    before = LOG.read_bytes()
    assert "is no page of this command" in error_line_of("cxr monitor predictions.jsonl --out predictions.jsonl")
    assert LOG.read_bytes() == before
    for out in ("/dev/stdout", "-"):
        assert f"{out}: a page needs a file" in error_line_of(f"cxr monitor predictions.jsonl --out {out}")
    for folder in ("predictions.jsonl", "none/at/all"):
        line = error_line_of(f"cxr monitor predictions.jsonl --out {folder}/page.html")
        assert line.startswith(f"Error: {folder}: no folder; create it")
    assert not Path("none").exists()
    assert list(Path.cwd().glob("*.html*")) + list(Path.cwd().glob(".*.part")) == []


def test_a_crash_is_not_taken_for_a_difference(project, model, monkeypatch):
    write_log(model, 4, 16, own_hash())
    monkeypatch.setattr(monitoring, "compare", lambda *_: 1 / 0)
    assert error_line_of("cxr monitor predictions.jsonl") == "ZeroDivisionError: division by zero"
    assert not Path("monitor.html").exists()


def test_a_log_is_not_compared_with_too_few_patients(project, model, monkeypatch):
    monkeypatch.setattr(monitoring.dataset_shift, "MIN_CLASS_GROUPS", 1000)
    monkeypatch.setattr(
        monitoring, "estimate_prevalence", lambda *_: monitoring.PrevalenceEstimate(np.zeros(1), reason="x")
    )
    write_log(model, 4, 16, own_hash())
    assert "nothing can be compared: fewer than 1000 positive patients" in error_line_of(
        "cxr monitor predictions.jsonl"
    )


def test_a_share_of_positives_of_too_few_patients_has_no_interval(monkeypatch):
    estimate = monitoring.PrevalenceEstimate(np.ones(3), 1.0, reason="x")
    monkeypatch.setattr(monitoring, "estimate_prevalence", lambda *_: estimate)
    table = pd.DataFrame({"label": [0, 1, 1], "score": [0.1, 0.8, 0.9], "group": [0, 1, 2]})
    assert np.isnan(monitoring._estimate_prevalence(table, table).low)


def test_the_page_shows_when_it_began_and_is_accessible(project, model):
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("Chromium is not installed")
    write_log(model, 8, 32, own_hash())
    write_log(model, 8, 32, own_hash(), seed=2, gamma=2.0)
    spread_over_days(8)
    assert invoke("cxr monitor predictions.jsonl --since 2026-11-03 --out page.html").exit_code == 1
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        for width, scheme in ((1300, "light"), (390, "dark")):
            tab = browser.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
            requested: list[str] = []
            tab.on("request", lambda request: requested.append(request.url))  # noqa: B023
            tab.goto(f"file://{project / 'page.html'}")
            assert len(requested) == 1
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert [(one["id"], one["nodes"][0]["html"]) for one in Axe().run(tab).response["violations"]] == []
            rows = tab.locator("section#time tbody tr").all_inner_texts()
            assert [row.split()[0] for row in rows[:-1]] == [f"2026-11-0{day}" for day in range(3, 9)]
            charts = tab.locator("section#time svg")
            assert charts.count() == 3
            ticks = [chart.locator("[id$='matplotlib.axis_1'] text").all_text_contents() for chart in charts.all()]
            assert ticks[0] == ticks[1] == ticks[2] != []
            differs = tab.locator("section#tests thead th").nth(1)
            assert differs.inner_text().strip() == "differs"
            assert differs.bounding_box()["x"] + differs.bounding_box()["width"] <= width
            assert "20" in tab.locator("section#log").inner_text()  # left out by --since
            tab.close()
        browser.close()


def test_logs_without_a_shift_are_rarely_found_to_differ(project, model):
    from pipeline.core.config import load_config
    from pipeline.inference.reference import load_reference

    write_log(model, 120, 480, own_hash())
    pool, reference = read_log(LOG)[0], load_reference(load_config(), "bag")
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(6):
        log = pool.iloc[rng.choice(len(pool), 60, replace=False)].reset_index(drop=True)
        comparison = monitoring.compare(reference, log)
        alarms += comparison.has_covariate_shift or comparison.has_label_shift
    assert alarms <= 2  # with a level of 0.05, more have a probability of 0.002


def test_the_reference_is_described_as_the_log_describes_images(project, model):
    from pipeline.core.config import load_config
    from pipeline.inference.reference import load_reference

    reference = load_reference(load_config(), find_candidate(load_config(), own_hash()))
    pixels = np.load("data/images.npy")
    rng = np.random.default_rng(0)
    contents = [encode_chest(rng, label) for label in np.repeat([1, 0], [POSITIVE, LABELED - POSITIVE])]
    for view, manufacturer, (_, row) in zip(VIEWS, MANUFACTURERS, reference.iterrows(), strict=False):
        description = describe_image(encode_dicom(pixels[0], view, manufacturer), (SIZE, SIZE), pixels[0])
        assert [description[name] for name in monitoring.CATEGORIES] == [row[name] for name in monitoring.CATEGORIES]
    assert list(reference["view"][:6]) == ["PA", "PA", "AP", "", "LL", "other"]
    assert list(reference["manufacturer"][:6]) == ["GE", "GE", "FUJI", "", "other", "other"]
    descriptions = [describe_image(data, (64, 64), one) for data, one in zip(contents, pixels, strict=True)]
    PredictionLog(LOG, model, "", "").append(
        descriptions, torch.from_numpy(pixels), draw_scores(rng, np.zeros(LABELED))
    )
    log = read_log(LOG)[0]
    features = list(monitoring.ACQUISITION_FEATURES)
    pd.testing.assert_frame_equal(log[features], reference[features].astype(float), check_exact=True)
    embedded = reference["embedding"].notna()
    assert embedded.sum() == LABELED / 2
    assert np.allclose(
        np.stack(log["embedding"][embedded]), np.stack(reference["embedding"][embedded]), rtol=1e-4, atol=1e-4
    )


def test_a_line_has_figures_and_hashes_and_no_names(model, tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (64, 80)).astype(np.uint8)
    data = encode_dicom(stored, "AP SECRET", "Secret Maker")
    pixels, (width, height) = images.decode_radiograph(data, SIZE, "stretch")
    description = describe_image(data, (height, width), pixels)
    log = PredictionLog(tmp_path / "new/log.jsonl", model, "0" * 64, "12")
    log.append([description], torch.tensor(pixels[None]), model.predict(torch.tensor(pixels[None])))
    (line,) = (tmp_path / "new/log.jsonl").read_bytes().splitlines()
    assert len(line) < 1024
    assert b"secret" not in line.lower()
    assert b"1960" not in line
    record = json.loads(line)
    assert (record["width"], record["height"], record["view"], record["manufacturer"]) == (80, 64, "other", "other")
    assert record["quantization"] is None  # no JPEG
    assert record["brightness"] == pytest.approx(pixels.mean(), rel=1e-5)
    assert record["agreement"] == 1
    assert len(record["embedding"]) == prediction_log.EMBEDDING_SIZE
    command = "import sys, pipeline.inference.prediction_log; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)  # what decodes images needs no torch


def test_a_cross_validated_member_embeds_with_the_network_of_the_first_fold(network, model):
    torch.manual_seed(1)
    other = classifier.place_for_inference(Classifier(network.architecture), CPU)
    pixels = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    of_folds = Candidate({"seed-0": [network, other]}, model.config, FindingParams())
    embedding = prediction_log.embed(model, pixels)
    assert (prediction_log.embed(of_folds, pixels) == embedding).all()
    # As the content hash, it is the same in any order of the members.
    members = {"a": [network], "b": [other]}
    both, turned = (Candidate({key: members[key] for key in order}, replace(model.config, members=list(order)),
                              FindingParams()) for order in ("ab", "ba"))  # fmt: skip
    assert (prediction_log.embed(both, pixels) == prediction_log.embed(turned, pixels)).all()
    predictions = pd.DataFrame({"a": [0.9, 0.1], "b": [0.9, 0.6], "label": [1, 0]})
    assert list(agreement(predictions, both.config)) == [1, 0.5]


def append_many(path: Path, model: Candidate, worker: int, *, is_killed: bool) -> None:
    """Append 20 batches of 16 images; a process that is killed dies in the middle of the write of the tenth."""
    log = PredictionLog(path, model, str(worker), "1")
    rng, pixels = np.random.default_rng(worker), np.zeros((16, SIZE, SIZE), np.uint8)
    description = describe_image(encode_chest(rng, 0), (64, 64), pixels[0])
    write = os.write

    def write_half(descriptor: int, data: memoryview) -> int:
        write(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    for batch in range(20):
        if is_killed and batch == 10:
            os.write = write_half
        log.append([description] * 16, torch.from_numpy(pixels), draw_scores(rng, np.zeros(16)))


def test_processes_share_a_log_and_one_that_is_killed_spoils_no_line_of_another(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        prediction_log, "embed", lambda _, pixels: np.zeros((len(pixels), prediction_log.EMBEDDING_SIZE))
    )
    context = multiprocessing.get_context("fork")  # which needs no import
    path = tmp_path / "log.jsonl"
    workers = [
        context.Process(target=append_many, args=(path, model, worker), kwargs={"is_killed": worker == 0})
        for worker in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0]
    for worker, lines in enumerate((167, 320, 320)):
        table, left_out = read_log(path, str(worker))
        assert len(table) == 1
        assert list(left_out.values()) == [lines - 1, 0, 807 - lines, 1]


def test_a_log_that_cannot_be_written_is_refused_at_once(model, tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        (".", "Is a directory"), ("image.png/log", "File exists"), ("image.png", "no log"), ("pipe", "no log"),
    ):  # fmt: skip
        assert reason in error_message(PredictionLog, tmp_path / name, model, "", "")
    assert (tmp_path / "image.png").read_bytes() == b"\x89PNG"


def test_the_views_and_manufacturers_of_dicoms_are_compared():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [40, 80])
    table = pd.DataFrame({"label": labels, "group": np.arange(120) // 2, "view": "PA", "manufacturer": ""})
    new = pd.DataFrame({"view": np.where(rng.random(60) < 0.5, "AP", "PA"), "manufacturer": "A"})
    tested = pd.concat([monitoring._test_category(table, new, field) for field in monitoring.CATEGORIES])
    assert tested["p"].iloc[0] < 0.05
    assert list(tested["reason"]) == ["", "not known of the images that the model was trained on"]
    shares = monitoring._compare_category(table, new.assign(view=["AP"] * 15 + ["PA"] * 45), "view")
    rows = monitor_page._category_table(SimpleNamespace(categories=shares)).rows
    assert [(row[0].text, row[-1].text) for row in rows] == [("view PA", "−25.0 points"), ("view AP", "+25.0 points")]
    new["view"] = ["PA"] * 59 + [""]
    assert "same" in monitoring._test_category(table, new, "view")["reason"].iloc[0]


def test_the_interval_of_a_log_without_positives_is_not_empty(project, model):
    from pipeline.core.config import load_config
    from pipeline.inference.reference import load_reference

    write_log(model, 0, 63, own_hash())
    log = read_log(LOG)[0].assign(score=0.01, probability=0.01)
    comparison = monitoring.compare(load_reference(load_config(), "bag"), log)
    assert comparison.prevalence.prevalence < monitoring.AT_BORDER
    assert comparison.prevalence.high == pytest.approx(1 - 0.025 ** (1 / 32), abs=1e-6)  # of 32 patients
    assert comparison.has_label_shift
    assert "95 % interval 0.0% to 10.9%" in monitoring.describe(comparison)[-1]
    assert "--prevalence" not in monitoring.describe(comparison)[-1]
    unlike = replace(comparison, tests=comparison.tests.assign(adjusted_p=0.01, auroc=np.nan))
    assert [text for _, text in monitor_page._test_table(unlike).notes] == [
        "too few images of different patients", "not known of the images in the log", "tested by the mean score",
    ]  # fmt: skip
    assert "each other" in " ".join(monitoring.describe(unlike))
    closer = replace(unlike, periods=comparison.periods.assign(outliers=0.0))
    assert "They are closer to the validation images, or less varied," in " ".join(monitoring.describe(closer))


def test_the_share_of_positives_is_compared_with_the_expected_one():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [30, 120])
    groups = np.arange(150) // 3
    scores = draw_scores(rng, labels)["score"].to_numpy()
    p = {"same": [], "other": [], "expected": []}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        same, other = (draw_scores(rng, np.repeat([1, 0], [n, 60 - n]))["score"].to_numpy() for n in (12, 40))
        p["same"].append(monitoring.prevalence_p(labels, scores, groups, same))
        p["other"].append(monitoring.prevalence_p(labels, scores, groups, other))
        p["expected"].append(monitoring.prevalence_p(labels, scores, groups, other, 2 / 3))
    assert np.less(p["same"], 0.05).sum() <= 6  # with a level of 0.05, more have a probability of 0.003
    assert np.less(p["expected"], 0.05).sum() <= 6
    assert np.less(p["other"], 0.01).all()


@pytest.mark.slow
def test_the_log_of_predict_is_of_the_champion_of_the_workspace(demo_project, tmp_path, monkeypatch):
    use_project(demo_project, monkeypatch)
    monkeypatch.setattr(monitoring.dataset_shift, "MIN_CLASS_GROUPS", 1)  # the demo of the tests has few patients
    with zipfile.ZipFile("data/raw.zip") as archive:
        names = [name for name in archive.namelist() if name.startswith("test/test/")]
        for index in range(monitoring.MIN_IMAGES):
            image = Image.open(archive.open(names[index % len(names)])).convert("L")
            image.resize((100 + index, 100 + index)).save(tmp_path / f"{index}.png")
    log = tmp_path / "predictions.jsonl"
    assert invoke(f"cxr predict {tmp_path} --log {log} --csv {tmp_path / 'table.csv'}").exit_code == 0
    result = invoke(f"cxr monitor {log} --model champion --out {tmp_path / 'page.html'}")
    assert result.exit_code == 1, result.output
    assert "images: 20" in result.stderr
    assert "smaller (megapixels 0.0" in result.stdout


@pytest.mark.slow
def test_the_simulation_prints_rates(demo_project, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("bench_monitor", ROOT / "bench/monitor.py")
    simulation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulation)
    monkeypatch.chdir(demo_project)
    for name, value in {"TRAINING": 20, "VALIDATION": 50, "SIZES": (8,), "SHIFTED_SIZE": 8, "CHANGED": 10}.items():
        monkeypatch.setattr(simulation, name, value)
    monkeypatch.setattr(monitoring.dataset_shift, "discrimination", monitoring.dataset_shift.discrimination)
    simulation.main(1, 150, 1)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 10
    alarms = {line["case"]: line["alarm"] for line in lines}
    assert alarms["scanner: JPEG quality 30, blur 1.5, gamma 1.4"] == [1, 0]
