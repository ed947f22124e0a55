"""The typed model of `params.yaml`: a section per stage, a default for every key, and errors that name the key."""

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from pipeline.core.errors import UserError

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Resize = Literal["stretch", "pad"]
Method = Literal["vote", "mean", "logits", "greedy"]
Tie = Literal["positive", "negative", "mean"]
Recalibration = Literal["none", "temperature", "platt"]
Keep = Literal["best_f1", "best_loss", "last"]
BAG = "bag"  # name of the candidate that combines the models

# Keys and sources of earlier releases, by what they are called now.
RENAMED = {
    "optimiser": "optimizer",
    "normalisation": "normalization",
    "fresh_optimiser": "reset_optimizer_each_epoch",
    "weight_average": "ema_decay",
    "accumulate": "gradient_accumulation_steps",
    "hidden": "head_hidden",
    "positive_weight": "positive_oversampling",
    "patience": "early_stopping_patience",
    "gamma": "gamma_jitter",
    "size": "image_size",  # the run cache of DVC takes no account of a parameter called size
    "licence": "license",
    "cohen": "covid_chestxray",
}
REMOVED = {
    "promote.min_probability": "removed; false_promotion_rate, the probability that an interchangeable model is "
    "promoted, decides instead; write false_promotion_rate: 0.05",
    "evaluate.batch_size": "removed; probabilities are computed in batches of a fixed size; delete it",
    "evaluate.cpu_threads": "removed; no probability depends on the number of threads; delete it",
}


def _check_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"{pattern!r} has {groups} groups; put parentheses around what to take alone, (?:…) elsewhere")
    return pattern


def normalize_value(text: str) -> str:
    """Return the form in which values of tables are compared: `1.0`, `True` and `Yes` are `1`; case does not count."""
    text = text.strip().casefold()
    text = {"true": "1", "yes": "1", "false": "0", "no": "0"}.get(text, text)
    number = re.fullmatch(r"([+-]?)0*(\d+)(?:\.(\d*?)0*)?", text)
    if number is None:
        return text
    sign, whole, decimals = number.groups()
    absolute = f"{whole}.{decimals}" if decimals else whole
    return f"-{absolute}" if sign == "-" and absolute != "0" else absolute


def _check_disjoint(normalize: Callable[[str], str], **lists: list[str]) -> None:
    key_of: dict[str, str] = {}
    for key, values in lists.items():
        for value in values:
            other = key_of.setdefault(normalize(value), key)
            if other != key:
                raise ValueError(f"{value!r} is in {other} and in {key}; keep it in one")


Pattern = Annotated[str, AfterValidator(_check_pattern)]
Files = Path | Annotated[list[Path], Field(min_length=1)]
# YAML reads 1, 1.0 and yes as numbers and booleans; a table has text.
TableValue = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, (int, float)) else value),
    WithJsonSchema({"type": ["string", "number", "boolean"]}),
]


class Section(BaseModel):
    """A section of the file.

    A default stands for a key that an older file does not have, and gives what the release before the key gave: it
    never changes, because DVC sees a change of `params.yaml` but not one of a default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _check_words(words: str) -> str:
    if not words or words != words.strip() or not words.isprintable():
        raise ValueError(f"{words!r}; write one line of text without blanks at its ends")
    return words


def _check_model_name(name: str) -> str:
    if name.casefold() == "default":
        raise ValueError(f"{name!r} is the name of MLflow's own experiment; choose another")
    return name


Words = Annotated[str, Field(max_length=60), AfterValidator(_check_words)]
# A subset of what MLflow allows: it goes into addresses (`models:/NAME/1`) and into filters, where quotes would end it.
ModelName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=250), AfterValidator(_check_model_name)
]


class FindingParams(Section):
    """What the labels mean: the words of the report, the cards and MLflow; no model or metric depends on them."""

    name: Words = Field("COVID-19", description="What positive images show, as in: probability of COVID-19.")
    positive: Words | None = Field(None, description="Name of the positive class, or null: NAME positive.")
    negative: Words = Field("negative", validate_default=True, description="Name of the negative class.")
    model_name: ModelName | None = Field(
        None, description="Name of the registered model and experiment, or null: covid-xray-PROFILE."
    )

    @field_validator("negative")
    @classmethod
    def _check_difference(cls, negative: str, info: ValidationInfo) -> str:
        positive = info.data.get("positive") or f"{info.data.get('name')} positive"
        if positive.casefold() == negative.casefold():
            raise ValueError(f"{negative!r} is the name of the positive class too; give the classes different names")
        return negative

    @property
    def class_names(self) -> tuple[str, str]:
        """The names of the negative and the positive class."""
        return self.negative, self.positive or f"{self.name} positive"


# A path, or a URL such as s3://bucket/images.zip; or the paths of several archives.
DataPath = Annotated[str, BeforeValidator(lambda path: str(path) if isinstance(path, Path) else path)]
DataPaths = DataPath | list[DataPath] | None
COPY_IMAGES = "Whether data/raw.zip has the images, or references to them, which need path as long as prepare runs."


class PhantomParams(Section):
    """Synthetic radiographs, drawn by the pipeline itself."""

    source: Literal["phantom"] = Field("phantom", description="Data source: synthetic images.")
    version: Literal[1, 2] = Field(1, description="Version of the drawings; a change makes DVC draw them anew.")
    train: int = Field(832, gt=0, description="Number of labeled images.")
    test: int = Field(100, gt=0, description="Number of test images.")
    prevalence: float = Field(0.125, ge=0, le=1, description="Share of positives among the labeled images.")
    test_prevalence: float = Field(0.5, ge=0, le=1, description="Share of positives among the test images.")
    strength: float = Field(2.0, gt=0, description="Visibility of opacities; at 1 some are very faint.")
    confounding: float = Field(0.6, ge=0, le=1, description="How strongly the source predicts the label, 0 to 1.")
    seed: Seed = Field(1, description="Seed of the drawing.")


class ArchiveParams(Section):
    """Zips, tars or a folder in the competition's layout."""

    source: Literal["archive"] = Field("archive", description="Data source: zips, tars or a folder.")
    path: DataPaths = Field(
        None, description="Zip, tar or folder, or a list of archives; after a change in it: dvc repro -f download."
    )
    copy_images: bool = Field(True, description=COPY_IMAGES)


class KaggleParams(Section):
    """A Kaggle competition, or a Kaggle data set in the same layout; the other is null."""

    source: Literal["kaggle"] = Field("kaggle", description="Data source: Kaggle.")
    competition: Annotated[str, Field(pattern=r"^[\w-]+$")] | None = Field(
        None, description="Name of the competition; accept its rules first (docs/kaggle.md)."
    )
    dataset: Annotated[str, Field(pattern=r"^[\w-]+/[\w-]+(/versions/[1-9]\d*)?$")] | None = Field(
        None, description="Or owner/name of a data set, with competition: null."
    )


class CovidxParams(Section):
    """The COVIDx folder with its lists of training and test images."""

    source: Literal["covidx"] = Field("covidx", description="Data source: COVIDx.")
    path: DataPaths = Field(None, description="The folder with train/, test/, train*.txt and test*.txt.")
    copy_images: bool = Field(True, description=COPY_IMAGES)
    version: str | None = Field(None, description="Version of the lists, such as 9B, if the folder has several.")


class CovidChestXrayParams(Section):
    """A checkout of github.com/ieee8023/covid-chestxray-dataset."""

    source: Literal["covid_chestxray"] = Field("covid_chestxray", description="Data source: covid-chestxray-dataset.")
    path: DataPaths = Field(None, description="The checkout of the repository.")
    copy_images: bool = Field(True, description=COPY_IMAGES)
    test_share: float = Field(0.1, gt=0, lt=1, description="Share of the patients in the test set.")


class ColumnsParams(Section):
    """Names of the columns of a table, or texts such as `{folder}/{image}.png` with their names in braces.

    null where there is none.
    """

    file: str = Field("file", description="Name or path of the image; with / at its end, the folder of the images.")
    label: str = Field("label", description="The label.")
    patient: str | None = Field(None, description="Identifier of the patient.")
    source: str | None = Field(None, description="Where the image comes from.")
    view: str | None = Field(None, description="View, such as PA or AP.")
    sex: str | None = Field(None, description="Sex of the patient: F, M, O, female, male, other.")
    age: str | None = Field(None, description="Age of the patient, years.")
    license: str | None = Field(None, description="License of the image.")
    manufacturer: str | None = Field(None, description="Manufacturer of the scanner.")
    modality: str | None = Field(None, description="Modality as in DICOM, such as CR or DX.")
    set: str | None = Field(None, description="Column that tells the training from the test set.")


class JoinParams(Section):
    """A second table, whose columns are added to the rows of the first."""

    table: Files = Field(description="The CSV, relative to the folder, or several.")
    by: list[str] | dict[str, str] = Field(
        min_length=1, description="Columns that both tables have; where names differ, first: second."
    )

    @property
    def keys(self) -> dict[str, str]:
        """Columns of the first table, and those of the second that equal them."""
        return self.by if isinstance(self.by, dict) else dict(zip(self.by, self.by, strict=True))


class TableParams(Section):
    """A folder of images with a CSV, or several."""

    source: Literal["table"] = Field("table", description="Data source: a folder with a CSV.")
    path: DataPaths = Field(None, description="The folder of images.")
    copy_images: bool = Field(True, description=COPY_IMAGES)
    labels: Files = Field(Path("labels.csv"), description="The CSV, relative to the folder, or several.")
    join: list[JoinParams] = Field([], description="Further tables, with columns to add to these rows.")
    columns: ColumnsParams = Field(ColumnsParams(), description="Names of the columns.")
    patterns: dict[str, Pattern] = Field(
        {},
        description="Key of columns: regular expression, whose group is taken from the column, or else from the path.",
    )
    keep: dict[str, list[TableValue]] = Field({}, description="Column: its values; all other rows are left out.")
    separator: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Between findings in the column label, such as '|', or null: a field is one finding."
    )
    positive: list[TableValue] = Field(["1"], min_length=1, description="Positive values of the column label.")
    negative: list[TableValue] | Literal["others"] = Field(
        ["0"], min_length=1, description="Negative values; others: all others but empty ones and NA."
    )
    ignore: list[TableValue] = Field([], description="Values of the column label whose rows are left out.")
    repeated: Literal["error", "majority", "any"] = Field(
        "error", description="Label of an image whose rows disagree: error, majority, or any (positive if any row is)."
    )
    training_sets: list[TableValue] = Field(["train"], description="Values of the column set: the training set.")
    test_sets: list[TableValue] = Field(["test"], min_length=1, description="Values of the column set: the test set.")
    test_list: Path | None = Field(None, description="File with a test image per line, without column set, or null.")
    test_share: float = Field(0.1, gt=0, lt=1, description="Share of patients in the test set, without column or list.")
    drop_missing: bool = Field(False, description="Leave out rows whose image is missing, as of a partial download.")

    @model_validator(mode="after")
    def _check_values(self) -> "TableParams":
        negative = [] if self.negative == "others" else self.negative
        _check_disjoint(normalize_value, positive=self.positive, negative=negative, ignore=self.ignore)
        _check_disjoint(normalize_value, training_sets=self.training_sets, test_sets=self.test_sets)
        return self

    @model_validator(mode="after")
    def _check_columns(self) -> "TableParams":
        columns = self.columns.model_dump()
        for key in self.patterns:
            if key not in columns:
                raise ValueError(f"patterns.{key}: no key of columns; {_suggest(key, columns)}")
            if key in ("sex", "age") and columns[key] is None:
                raise ValueError(f"patterns.{key}: set columns.{key} to the column that the pattern reads")
        if self.test_list and (self.columns.set or "set" in self.patterns):
            raise ValueError("test_list and the column set both tell the test set; delete one")
        return self


class FoldersParams(Section):
    """A folder per class, with or without train and test around them."""

    source: Literal["folders"] = Field("folders", description="Data source: a folder per class.")
    path: DataPaths = Field(None, description="The folder with the folders of the classes.")
    copy_images: bool = Field(True, description=COPY_IMAGES)
    positive: list[str] = Field([], description="Folders of the positive class; upper and lower case are equal.")
    negative: list[str] = Field([], description="Folders of the negative class.")
    ignore: list[str] = Field([], description="Folders that are left out, such as a third class.")
    patterns: dict[Literal["patient", "source", "view"], Pattern] = Field(
        {}, description="Regular expressions, whose group is taken from the path of an image."
    )
    test_share: float = Field(0.1, gt=0, lt=1, description="Share of the patients in the test set, if no folder is.")

    @model_validator(mode="after")
    def _check_classes(self) -> "FoldersParams":
        _check_disjoint(str.casefold, positive=self.positive, negative=self.negative, ignore=self.ignore)
        return self


def _check_hash(source: str) -> str:
    if "#sha256=" in source and not re.search(r"[^#]#sha256=[0-9a-f]{64}$", source):
        raise ValueError(f"{source!r}: after #sha256= come 64 digits from 0 to f, in small letters")
    return source


class WeightsParams(Section):
    """The initial weights of the backbone."""

    source: Annotated[str, AfterValidator(_check_hash)] = Field(
        "imagenet", description="imagenet, none, name of torchxrayvision's, or path or URL of a file (#sha256=…)."
    )


class PrepareParams(Section):
    """Decoding of the images."""

    image_size: int = Field(160, ge=16, le=2048, description="Edge of the stored square images, pixels.")
    resize: Resize = Field("stretch", description="How images become square: stretch, or pad with black bars.")
    max_quarantined: float = Field(0.05, ge=0, le=1, description="Largest unusable share of the labeled images.")
    views: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Views to keep, such as [PA, AP], or null for all; an image whose view is not known stays in."
    )
    excluded_files: list[str] = Field([], description="Images to leave out, by file name.")


class SplitParams(Section):
    """Training and validation sets."""

    folds: int = Field(5, ge=2, description="Number of folds; one validates.")
    seed: Seed = Field(1, description="Seed of the split.")
    cross_validate: bool = Field(False, description="Train each seed once per fold, which validates; else fold 0 does.")
    held_out_source: str | None = Field(None, description="Source for external validation only, or null.")

    @property
    def validation_folds(self) -> list[int]:
        """The folds that validate in turn."""
        return list(range(self.folds)) if self.cross_validate else [0]


class TrainParams(Section):
    """The training recipe."""

    backbone: str = Field(
        "timm/tf_efficientnet_lite0", description="Torchvision classifier, timm/<name>, or torchxrayvision/<name>."
    )
    head_hidden: list[Annotated[int, Field(gt=0)]] = Field([], description="Widths of the head's hidden layers.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout probability in the head.")
    image_size: int = Field(160, ge=16, le=2048, description="Edge of the images the backbone sees, pixels.")
    normalization: Literal["none", "imagenet", "torchxrayvision"] = Field(
        "imagenet", validate_default=True, description="none (0 to 1), imagenet, or torchxrayvision (-1024 to 1024)."
    )
    intensity_normalization: Literal["none", "standardize", "equalize"] = Field(
        "none", description="Of the gray levels of each image: none, standardize or equalize (its histogram)."
    )
    lung_crop: bool = Field(False, description="Crop every image to the lung fields.")
    border_mask: float = Field(0.0, ge=0, le=0.4, description="Width of the border that is blanked, share of the edge.")
    marker_mask: bool = Field(False, description="Blank bright letters and marks near the border.")
    epochs: int = Field(8, gt=0, description="Number of epochs.")
    frozen_epochs: int = Field(1, ge=0, description="First epochs that train the head only.")
    keep: Keep = Field("best_f1", description="Epoch whose weights are kept: best_f1, best_loss or last.")
    early_stopping_patience: Annotated[int, Field(gt=0)] | None = Field(
        None, description="Epochs without a better one before training stops, or null."
    )
    batch_size: int = Field(32, gt=0, description="Images per optimizer step.")
    gradient_accumulation_steps: int = Field(1, gt=0, description="Micro-batches per optimizer step, to save memory.")
    sampling: Literal["shuffle", "weighted", "source_balanced", "group_balanced"] = Field(
        "shuffle", description="shuffle, weighted (oversamples positives), source_balanced or group_balanced."
    )
    positive_oversampling: float = Field(1.0, gt=0, description="Relative rate of positives with sampling: weighted.")
    class_weights: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (1.0, 1.0), description="Loss weights of negative and positive."
    )
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    rotation: float = Field(0.0, ge=0, le=180, description="Largest rotation to either side, degrees.")
    zoom: float = Field(0.0, ge=0, le=1, description="Largest zoom: 0.2 scales by 1 / 1.2 to 1.2.")
    shift: float = Field(0.0, ge=0, le=0.5, description="Largest shift to any side, as a share of the edge.")
    gamma_jitter: float = Field(0.0, ge=0, le=3, description="Largest gamma change: 0.5 is 1 / 1.5 to 1.5.")
    contrast_jitter: float = Field(0.0, ge=0, le=3, description="Largest contrast change: 0.5 is 1 / 1.5 to 1.5.")
    noise: float = Field(0.0, ge=0, le=100, description="Largest standard deviation of added noise, gray levels.")
    min_resolution: float = Field(
        1.0, gt=0, le=1, description="Smallest scale to which images are coarsened; 1 is off."
    )
    min_jpeg_quality: Annotated[int, Field(ge=1, le=100)] | None = Field(
        None, description="Lowest quality of random JPEG compression, or null."
    )
    fourier_exchange: float = Field(
        0.0, ge=0, le=1, description="Probability of taking over another image's low frequencies."
    )
    histogram_exchange: float = Field(0.0, ge=0, le=1, description="Probability of taking over another's histogram.")
    mixup_alpha: float = Field(0.0, ge=0, description="Alpha of mixup's Beta distribution; 0 is off.")
    cutmix_alpha: float = Field(0.0, ge=0, description="Alpha of CutMix's Beta distribution; 0 is off.")
    mixup_pairing: Literal["any", "same_label"] = Field(
        "any", description="any, or same_label: mixes images of one label from different sources."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over both classes.")
    group_dro: float = Field(0.0, ge=0, description="Step size of group DRO's weights of source and label; 0 is off.")
    domain_adversarial: float = Field(0.0, ge=0, description="Weight of the loss that hides the source; 0 is off.")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adamw", description="adam, adamw or sgd.")
    reset_optimizer_each_epoch: bool = Field(False, description="Start every epoch with a new optimizer state.")
    lr: float = Field(1e-3, gt=0, description="Learning rate.")
    eps: float = Field(1e-8, gt=0, description="Epsilon of Adam.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay.")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="Decay of the weights' moving average; 0 is off.")
    swa_epochs: int = Field(0, ge=0, description="Last epochs whose weights are averaged; 0 is off.")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="constant or cosine.")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs of linear warmup.")
    feature_views: int = Field(
        0,
        ge=0,
        description="Views per image, the first not augmented, of which a frozen backbone computes features once.",
    )
    feature_maps: int = Field(
        0, ge=0, le=4, description="The backbone's last feature maps whose means are its features; 0 is off."
    )
    test_time_augmentation: Literal["none", "flip", "crops"] = Field(
        "none", description="Views whose mean is the prediction: none, flip, or crops (and flip)."
    )
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = Field(
        "float32", description="float32, tf32 (on CUDA), or autocast to bfloat16 or float16."
    )
    channels_last: bool = Field(True, description="Memory format of the network.")
    fused: bool = Field(False, description="Fused kernel for the optimizer's step; on CUDA always.")
    compile: bool = Field(False, description="Use torch.compile.")
    loader_threads: int = Field(1, gt=0, description="Threads that read the next batches; no result depends on them.")
    cpu_threads: int = Field(2, gt=0, description="CPU threads; they set the order of float sums, and so the result.")

    @field_validator("normalization")
    @classmethod
    def _check_normalization(cls, normalization: str, info: ValidationInfo) -> str:
        if (normalization == "torchxrayvision") != info.data.get("backbone", "").startswith("torchxrayvision/"):
            raise ValueError(
                "torchxrayvision and a backbone of torchxrayvision/ need each other; change one of the two"
            )
        return normalization

    @field_validator("feature_views")
    @classmethod
    def _check_feature_views(cls, views: int, info: ValidationInfo) -> int:
        if views and info.data.get("frozen_epochs", 0) < info.data.get("epochs", 0):
            raise ValueError("the backbone must stay frozen; set frozen_epochs to epochs, or this to 0")
        for name in ("cutmix_alpha", "fourier_exchange", "histogram_exchange"):
            if views and info.data.get(name):
                raise ValueError(f"features are computed once, and {name} joins images anew; set one of them to 0")
        return views

    @field_validator("feature_maps")
    @classmethod
    def _check_feature_maps(cls, maps: int, info: ValidationInfo) -> int:
        if maps and info.data.get("feature_views") == 0:
            raise ValueError("these features are computed once; set feature_views to 1 or more, or this to 0")
        if maps and not info.data.get("backbone", "timm/").startswith("timm/"):
            raise ValueError("only networks of timm give their feature maps; set backbone to timm/<name>, or this to 0")
        return maps

    @field_validator("mixup_pairing")
    @classmethod
    def _check_mixup_pairing(cls, pairing: str, info: ValidationInfo) -> str:
        if pairing != "any" and not info.data.get("mixup_alpha") and not info.data.get("cutmix_alpha"):
            raise ValueError("no images are mixed; set mixup_alpha or cutmix_alpha, or this to any")
        return pairing

    @field_validator("group_dro")
    @classmethod
    def _check_group_dro(cls, step: float, info: ValidationInfo) -> float:
        # A group that most batches lack would lose its weight.
        if step and (info.data.get("sampling") != "group_balanced" or info.data.get("class_weights") != (1, 1)):
            raise ValueError("set sampling to group_balanced and class_weights to 1 and 1, or this to 0")
        return step

    @field_validator("domain_adversarial")
    @classmethod
    def _check_domain_adversarial(cls, weight: float, info: ValidationInfo) -> float:
        if weight and info.data.get("frozen_epochs", 0) >= info.data.get("epochs", 1):
            raise ValueError("the backbone stays frozen; lower frozen_epochs below epochs, or set this to 0")
        return weight

    @field_validator("swa_epochs")
    @classmethod
    def _check_swa_epochs(cls, count: int, info: ValidationInfo) -> int:
        if count > info.data.get("epochs", count):
            raise ValueError(f"more than the epochs, {info.data['epochs']}; lower it")
        if count and (info.data.get("ema_decay") or info.data.get("keep") != "last"):
            raise ValueError("the mean of the last epochs; set keep to last and ema_decay to 0, or this to 0")
        return count

    @field_validator("early_stopping_patience")
    @classmethod
    def _check_early_stopping(cls, patience: int | None, info: ValidationInfo) -> int | None:
        if patience is not None and info.data.get("keep") == "last":
            raise ValueError("keep: last watches no metric; set this to null, or keep to best_f1 or best_loss")
        return patience


class EvaluateParams(Section):
    """Predictions and their evaluation."""

    operating_point: Literal["half", "best_f1", "youden", "sensitivity"] = Field(
        "half", description="half (0.5), best_f1, youden or sensitivity."
    )
    min_sensitivity: float = Field(
        0.9, ge=0, le=1, description="Sensitivity that operating_point: sensitivity keeps with 95 % confidence."
    )
    recalibration: Recalibration = Field(
        "platt", description="Of the probabilities: none, temperature, or platt (temperature and bias)."
    )
    expected_prevalence: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Prevalence where the model will be used, assumed of the test set too; or null."
    )
    resamples: int = Field(2000, gt=0, description="Bootstrap resamples for the intervals.")


class BagParams(Section):
    """The bag, a seed ensemble: all models are trained on the same data."""

    method: Method = Field("mean", description="vote, mean, logits or greedy.")
    tie: Tie = Field("mean", description="Label of a tied vote: positive, negative, or by the mean probability.")
    members: Literal["all"] | list[int] = Field("all", description="all, or a list of seeds.")


class PromoteParams(Section):
    """The gate in front of the champion alias."""

    margin: float = Field(0.0, ge=0, le=1, description="F1 by which a challenger must beat the champion.")
    false_promotion_rate: float = Field(
        0.05, gt=0, le=1, description="Largest probability that an interchangeable model is promoted."
    )
    resamples: int = Field(2000, gt=0, description="Resamples of the comparison.")
    min_sensitivity: float = Field(0.5, ge=0, le=1, description="Minimum sensitivity to pass the gate.")
    min_specificity: float = Field(0.5, ge=0, le=1, description="Minimum specificity to pass the gate.")
    max_calibration_error: float = Field(0.2, ge=0, le=1, description="Maximum calibration error to pass.")


DownloadParams = (
    PhantomParams | ArchiveParams | KaggleParams | CovidxParams | CovidChestXrayParams | FoldersParams | TableParams
)
SOURCES: dict[str, type[Section]] = {
    params.model_fields["source"].default: params for params in get_args(DownloadParams)
}


class Profile(Section):
    """What the labels mean, and one section per stage."""

    finding: FindingParams = FindingParams()
    download: DownloadParams = Field(ArchiveParams(), discriminator="source")
    weights: WeightsParams = WeightsParams()
    prepare: PrepareParams = PrepareParams()
    split: SplitParams = SplitParams()
    train: TrainParams = TrainParams()
    evaluate: EvaluateParams = EvaluateParams()
    bag: BagParams = BagParams()
    promote: PromoteParams = PromoteParams()

    @field_validator("download", mode="before")
    @classmethod
    def _default_source(cls, value: Any) -> Any:
        return {"source": "archive", **value} if isinstance(value, dict) else value


class Config(Section):
    """The whole file: which profile is active, the seeds, and the profiles by name."""

    profile: str = Field("demo", description="The profile in use.")
    seeds: list[Seed] = Field(list(range(10)), min_length=1, description="One model is trained per seed.")
    profiles: dict[str, Profile]

    @model_validator(mode="before")
    @classmethod
    def _gather_profiles(cls, content: dict[str, Any]) -> dict[str, Any]:
        top = {key: content[key] for key in ("profile", "seeds") if key in content}
        return top | {"profiles": {key: content[key] for key in content if key not in top}}

    @model_validator(mode="after")
    def _check_names(self) -> "Config":
        if not self.profiles:
            raise ValueError("there is no profile; add a section such as demo")
        if self.profile not in self.profiles:
            raise ValueError(f"profile: there is no section {self.profile!r}; {_suggest(self.profile, self.profiles)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is listed twice; list each once")
        for name, profile in self.profiles.items():
            members = profile.bag.members
            if members != "all" and (not members or len(set(members)) < len(members) or set(members) - set(self.seeds)):
                raise ValueError(f"{name}.bag.members: {members}; write all, or list some of the seeds, each once")
            source, section = profile.download, f"{name}.download"
            if isinstance(source, KaggleParams) and (source.competition is None) == (source.dataset is None):
                raise ValueError(f"{section}.competition, {section}.dataset: set one and write null for the other")
        return self

    @property
    def active(self) -> Profile:
        return self.profiles[self.profile]

    @property
    def model_names(self) -> list[str]:
        """The names of the models, one per seed."""
        return [f"seed-{seed}" for seed in self.seeds]

    @property
    def bag_seeds(self) -> list[int]:
        return self.seeds if self.active.bag.members == "all" else self.active.bag.members

    @property
    def bag_members(self) -> list[str]:
        """The names of the models in the bag."""
        return [f"seed-{seed}" for seed in self.bag_seeds]

    @property
    def model_name(self) -> str:
        """The name of the MLflow experiment and of the registered model."""
        return self.active.finding.model_name or f"covid-xray-{self.profile}"


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that a section has twice, as DVC does; PyYAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: Path = Path("params.yaml")) -> Config:
    """Read and check the whole file, not only the profile in use.

    Raises:
        UserError: the file is missing or not YAML, or a key is unknown, renamed or out of range.
    """
    try:
        content = StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run from the repository's root") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: empty; it holds profile, seeds and one section per profile")
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_describe(error)}") from None


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of `params.yaml`, by which editors complete and check it."""
    schema = Config.model_json_schema()
    schema["additionalProperties"] = schema["properties"].pop("profiles")["additionalProperties"]
    schema["required"].remove("profiles")
    for params in SOURCES.values():
        schema["$defs"][params.__name__]["required"] = ["source"]  # tells the sources apart
    return schema


def _describe(error: ValidationError) -> str:
    """Describe the first error in one line (the key, what is wrong, what to do), or all old names at once."""
    errors = error.errors()
    old_names = {name: item["loc"] for item in reversed(errors) if (name := _old_name(item))}  # the first place of each
    if old_names:
        changes = ", ".join(f"{old} is called {RENAMED[old]} now" for old in old_names)
        return f"{_dotted(next(iter(old_names.values())))}: {changes}; rename {'it' if len(old_names) == 1 else 'them'}"
    misspelled = [
        item for item in errors
        if item["type"] == "extra_forbidden" and difflib.get_close_matches(str(item["loc"][-1]), _keys(item["loc"]))
    ]  # fmt: skip
    first = (misspelled or errors)[0]
    name, loc = _dotted(first["loc"]), first["loc"]
    match first["type"]:
        case "extra_forbidden":
            removed = REMOVED.get(".".join(map(str, loc[-2:])))
            return f"{name}: {removed or f'unknown key; {_suggest(str(loc[-1]), _keys(loc))}'}"
        case "union_tag_invalid":
            return f"{name}.source: unknown source {first['ctx']['tag']!r}; {_suggest(first['ctx']['tag'], SOURCES)}"
        case "value_error":
            return f"{name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    near = difflib.get_close_matches(name, ["profile", "seeds"], n=1)
    if near and loc[0] == "profiles":
        return f"{name}: unknown key; did you mean {near[0]!r}?"
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, but it is {first['input']!r}"


def _old_name(item: Any) -> str:
    """Return the name of an earlier release that caused an error, or an empty text."""
    name = item["ctx"]["tag"] if item["type"] == "union_tag_invalid" else str(item["loc"][-1]) if item["loc"] else ""
    return name if item["type"] in ("extra_forbidden", "union_tag_invalid") and name in RENAMED else ""


def _dotted(loc: tuple[int | str, ...]) -> str:
    """Write the place of an error as a dotted key, without what pydantic adds to it."""
    keys = [str(part) for part in loc if "[" not in str(part)]
    if keys[:1] == ["profiles"]:
        keys = keys[1:]
        if keys[1:2] == ["download"]:
            del keys[2:3]  # the source
    return ".".join(keys)


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the section at `loc` may have."""
    sections = {name: field.annotation for name, field in Profile.model_fields.items()}
    parent = [part for part in loc[:-1] if isinstance(part, str)][-1]  # without the index in a list
    section = (sections | SOURCES | {"columns": ColumnsParams, "join": JoinParams}).get(parent, Profile)
    return list(section.model_fields)  # type: ignore[union-attr]


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known := list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(sorted(known))}"
