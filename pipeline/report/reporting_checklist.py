"""The reporting checklist of the model card: what CLAIM 2024 and TRIPOD+AI ask for, as far as the pipeline knows it.

CLAIM 2024: Tejani et al., Radiology: Artificial Intelligence 2024 (doi:10.1148/ryai.240300). TRIPOD+AI: Collins et al.,
BMJ 2024 (doi:10.1136/bmj-2023-078378). Items are named in short; the checklists say what each of them means.
"""

from typing import NamedTuple

from pipeline.report import summary_text
from pipeline.report.results import Estimate, Results
from pipeline.report.tables import format_estimate, format_percent

NOT_IN_DATA = "not known, because the archive does not say it"
NO_STUDY = "not known, because there is no study protocol; a study that uses the pipeline must say it"
PAGE = "report/index.html"


class Item(NamedTuple):
    """Numbers of the item in the two checklists, empty where one has none; its short name; and the entry."""

    claim: str
    tripod: str
    name: str
    entry: str


def fill_checklist(results: Results, border: Estimate) -> list[Item]:
    """Fill in every item.

    Args:
        results: of the earlier stages.
        border: the mean share of the Grad-CAM heatmaps in the border.
    """
    params, counts = results.config.active, results.counts
    negative, positive = params.finding.class_names
    source, train, split = params.download.source, params.train, params.split
    members, table = len(results.config.bag_members), results.table
    f1 = format_estimate(results.estimate(results.bag, "f1"))
    slope = format_estimate(results.estimate(results.bag, "calibration_slope"))
    known = {name: bool((table[name] != "").any()) for name in ("source", "view", "sex", "license")}
    known["age"] = bool(table["age"].notna().any())
    columns = ", ".join(name for name in ("source", "view", "sex", "age") if known[name])
    epochs = "the last epoch is kept, so none was selected" if train.keep == "last" else f"epoch kept: {train.keep}"
    external = f"see {PAGE}, External validation" if results.is_externally_validated else "none"
    held_out = f"; source {split.held_out_source} held out" if split.held_out_source else ""
    patients = "no two of them share a patient" if results.patients_known else "patients are not known"
    partition = f"grouped, stratified, {split.folds} folds, seed {split.seed}{held_out}"
    license_known = "in the data card" if known["license"] else NOT_IN_DATA
    validation = "internal and external validation" if results.is_externally_validated else "internal validation"
    recalibration = params.evaluate.recalibration
    output = (
        "P(positive), not recalibrated" if recalibration == "none" else f"P(positive), recalibrated: {recalibration}"
    )
    unit = "patients" if results.patients_known else "images (with duplicates as one; patients are not known)"
    design = "synthetic images" if source == "phantom" else "retrospective"
    more = summary_text.describe_sample_size(results)
    return [
        Item("1", "1", "title", f"{results.config.model_name}: deep learning classifier of chest radiographs"),
        Item("2", "2", "summary", "the first paragraphs of this card"),
        Item("3", "3a", "background", f"{params.finding.name} on chest radiographs; for research and teaching"),
        Item("", "3b", "target population and users", "Intended use, above"),
        Item("", "3c", "health inequalities", NO_STUDY),
        Item("4", "4", "aim", "develop and evaluate classifiers with one recipe and several random seeds"),
        Item("5", "5b", "prospective or retrospective; dates", f"{design}; dates: {NOT_IN_DATA}"),
        Item("6", "", "goal of the study", f"development and {validation}; no comparison with readers"),
        Item("7", "5a", "source of the data", f"download.source: {source}"),
        Item("8", "6a, 6b", "setting and eligibility", NOT_IN_DATA),
        Item("", "6c", "treatments", NOT_IN_DATA),
        Item("9", "7", "preparation of images", f"gray, {params.prepare.image_size} pixels, {params.prepare.resize}"),
        Item(
            "10", "", "subsets of the data", "all usable images; the others are in data/quarantine.csv with the reason"
        ),
        Item("11", "", "de-identification", NOT_IN_DATA),
        Item("12", "11", "missing data", "a missing patient, source, view, sex or age is counted as not known"),
        Item("13", "", "acquisition of the images", f"{NOT_IN_DATA}; acquisition clusters are in {PAGE}"),
        Item("14", "8a", "reference standard", f"the label of the archive, {negative} or {positive}"),
        Item("15", "8a", "why this reference standard", NOT_IN_DATA),
        Item("16", "8b", "who labeled, with which qualification", NOT_IN_DATA),
        Item("17", "8c", "labels of the test set; blinding", "not read by the pipeline; who made them is not known"),
        Item("18", "", "variability between readers", "not known, because each image has one label"),
        Item("", "9a, 9b", "predictors", "the pixels of one radiograph"),
        Item("", "9c", "who assesses the predictors", "nobody: pixels need no reader"),
        Item("19", "12a", "partitions", partition),
        Item("20", "12a", "level at which partitions are disjoint", f"patients and duplicates; {patients}"),
        Item("21", "10", "sample size", f"not calculated in advance. {more}"),
        Item("22", "12b, 12c, 22", "model", f"{train.backbone} at {train.image_size} pixels; models/ has the weights"),
        Item("23", "", "software", f"versions in {PAGE}, Versions and runs"),
        Item("24", "", "initial weights", f"weights.source: {params.weights.source}; the head is random"),
        Item("25", "12c", "training", f"{train.epochs} epochs, {train.optimizer}; all parameters in {PAGE}"),
        Item("26", "12c", "selection of the model", f"{epochs}; the bag is specified in advance"),
        Item("27", "12c", "ensemble", f"{members} seeds, bag.method: {params.bag.method}"),
        Item("", "12d", "differences between hospitals", "slices by source and acquisition; no model of them"),
        Item("28", "12e", "metrics", "discrimination, calibration, net benefit, and metrics at the threshold"),
        Item("29", "12e", "uncertainty", "95 % intervals over patients; their coverage is in docs/evaluation.md"),
        Item("30", "", "robustness", "shortcut baselines, slices, prevalence and distribution shift"),
        Item("31", "", "explainability", f"Grad-CAM; share in the border {format_percent(border.value)}"),
        Item("", "12f", "updating", "no model was updated"),
        Item("", "12g", "how predictions are computed", "cxr predict, or the registered model in MLflow"),
        Item("", "13", "class imbalance", f"train.sampling: {train.sampling}; evaluate.recalibration: {recalibration}"),
        Item("", "14", "fairness", "slices by sex and age where they are known; no method for fairness"),
        Item("", "15", "output", f"{output}; label by the rule {params.evaluate.operating_point}"),
        Item("", "16", "training against evaluation data", "Data, in the report"),
        Item("32", "", "internal evaluation", summary_text.describe_images(results)),
        Item("33", "", "external evaluation", external),
        Item("34", "18d", "registration", NO_STUDY),
        Item("", "17", "ethics approval", NO_STUDY),
        Item("", "18b", "conflicts of interest", NO_STUDY),
        Item("", "19", "patient and public involvement", NO_STUDY),
        Item("35", "20a, 21", "included and excluded images and patients", "Training data, above; data/quarantine.csv"),
        Item("36", "20b, 20c", "characteristics by partition", f"known: {columns}" if columns else NOT_IN_DATA),
        Item("37", "23a", "performance", f"{results.bag}: F1 {f1}; calibration slope {slope}"),
        Item(
            "38",
            "23a",
            "precision of the estimates",
            f"95 % intervals; {counts['positive_patients']} positive {unit}",
        ),
        Item("", "23b", "heterogeneity of performance", f"Slices and External validation in {PAGE}"),
        Item("", "24", "results of updating", "no model was updated"),
        Item("39", "", "analysis of errors", f"most confident wrong images in {PAGE}, Grad-CAM"),
        Item("40", "25, 26", "limitations", "Limitations, above"),
        Item("41", "27a, 27b, 27c", "use in practice", "none: not for patient care; unusable images are refused"),
        Item("42", "18c", "protocol", "params.yaml and dvc.yaml; no other protocol"),
        Item("43", "18e, 18f", "availability", f"code: Apache-2.0; license of the data: {license_known}"),
        Item("44", "18a", "funding", NO_STUDY),
    ]
