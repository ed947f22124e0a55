"""`params.yaml`, typed: one model per section, every key required, and a misspelled one named."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Resize = Literal["stretch", "pad"]
Method = Literal["vote", "mean", "logits", "greedy"]
Tie = Literal["positive", "negative", "mean"]
Held = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PhantomParams(Section):
    """Radiographs drawn by the pipeline itself."""

    source: Literal["phantom"]
    train: Positive  # labeled images
    test: Positive
    prevalence: Share  # share of positives among the labeled images
    test_prevalence: Share
    strength: Annotated[float, Field(gt=0)]  # how visible opacities are; at 1 some are very faint
    confounding: Share  # how far the source tells the label: 0 not at all, 1 wholly
    seed: Seed


class ArchiveParams(Section):
    """A zip or a folder in the competition's layout."""

    source: Literal["archive"]
    path: Path | None


class KaggleParams(Section):
    """A competition of Kaggle, or a data set in the same layout; the other is None."""

    source: Literal["kaggle"]
    competition: Annotated[str, Field(pattern=r"^[\w-]+$")] | None
    dataset: Annotated[str, Field(pattern=r"^[\w-]+/[\w-]+(/versions/[1-9]\d*)?$")] | None


class CovidxParams(Section):
    """The folder of COVIDx, with its lists of training and test images."""

    source: Literal["covidx"]
    path: Path | None


class CovidChestXrayParams(Section):
    """A checkout of github.com/ieee8023/covid-chestxray-dataset."""

    source: Literal["cohen"]
    path: Path | None
    test_share: Held  # of the patients


class ColumnsParams(Section):
    """What the columns of a CSV are called; None is not there."""

    file: str  # path of the image, from the folder
    label: str
    patient: str | None
    source: str | None
    view: str | None
    license: str | None
    set: str | None  # whose values are train and test


class TableParams(Section):
    """A folder of images and a CSV."""

    source: Literal["table"]
    path: Path | None
    labels: Path  # of the CSV, from the folder
    columns: ColumnsParams
    positive: Annotated[list[str], Field(min_length=1)]  # values of the column `label`
    negative: Annotated[list[str], Field(min_length=1)]
    test_share: Held  # of the patients, if no column says it

    @model_validator(mode="after")
    def _check_labels(self) -> "TableParams":
        both = set(self.positive) & set(self.negative)
        if both:
            raise ValueError(f"{min(both)!r} is in positive and in negative; leave it in one")
        return self


class WeightsParams(Section):
    """Where the backbone's first weights come from: ImageNet, nowhere (random), or a file or URL."""

    source: str


class PrepareParams(Section):
    size: Annotated[int, Field(ge=16, le=2048)]  # edge of the square images in the pack, pixels
    resize: Resize  # how an image becomes square
    max_quarantined: Share  # share of the labeled images that may be unusable


class SplitParams(Section):
    folds: Annotated[int, Field(ge=2)]  # equal parts, of which one validates
    seed: Seed
    cross_validate: bool  # each seed on a fold of its own
    held_out_source: str | None  # the source that validates, and is not trained on, in place of a fold

    @model_validator(mode="after")
    def _check_one_way(self) -> "SplitParams":
        if self.cross_validate and self.held_out_source is not None:
            raise ValueError("cross_validate and held_out_source are two ways to validate; set one to false or null")
        return self

    def validation_fold(self, seed: int) -> int:
        """Return the fold on which a training seed validates."""
        return seed % self.folds if self.cross_validate else 0


class TrainParams(Section):
    backbone: str  # a torchvision classifier, or timm/<name>
    head_hidden: list[Positive]  # widths of the head's hidden layers
    dropout: Annotated[float, Field(ge=0, lt=1)]
    size: Annotated[int, Field(ge=16, le=2048)]  # edge of the images the backbone sees, pixels
    normalization: Literal["none", "imagenet"]
    epochs: Positive
    frozen_epochs: Annotated[int, Field(ge=0)]  # the first epochs, in which only the head is trained
    early_stopping_patience: Positive | None  # epochs without a better F1 before training stops early
    batch_size: Positive
    gradient_accumulation_steps: Positive  # parts a batch is computed in, one after another, to save memory
    sampling: Literal["shuffle", "weighted"]
    positive_oversampling: Weight  # weighted sampling draws a positive this much more often
    class_weights: tuple[Weight, Weight]  # of negative and positive in the loss
    flip: Share  # probability of a horizontal flip
    rotation: Annotated[float, Field(ge=0, le=180)]  # degrees, at most, to either side
    zoom: Annotated[float, Field(ge=0, le=1)]  # at most: 0.2 shows from 1 / 1.2 of the image to 1.2 of it
    shift: Annotated[float, Field(ge=0, le=0.5)]  # of the edge, at most, to any side
    gamma_jitter: Annotated[float, Field(ge=0, le=3)]  # at most: 0.5 raises brightness to a power from 1 / 1.5 to 1.5
    mixup_alpha: Annotated[float, Field(ge=0)]  # 0 is no mixup
    optimizer: Literal["adam", "adamw", "sgd"]
    reset_optimizer_each_epoch: bool  # made anew every epoch, which forgets its moments
    lr: Annotated[float, Field(gt=0)]
    eps: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)]  # share of the average that each step keeps; 0 is none
    schedule: Literal["constant", "cosine"]
    warmup_epochs: Annotated[float, Field(ge=0)]
    precision: Literal["float32", "bfloat16", "float16"]
    channels_last: bool
    fused: bool  # the optimizer's step as one kernel
    compile: bool  # the network by torch.compile
    loader_threads: Positive  # threads that gather the next batches from disk
    cpu_threads: Positive  # part of the result: it sets the order in which floats are summed


class EvaluateParams(Section):
    batch_size: Positive
    cpu_threads: Positive
    operating_point: Literal["half", "best_f1", "youden", "sensitivity"]  # the rule that chooses the threshold
    min_sensitivity: Share  # that the rule `sensitivity` keeps on the validation set
    expected_prevalence: Annotated[float, Field(gt=0, lt=1)] | None  # where the models will be used
    resamples: Positive  # of the bootstrap behind the intervals


class BagParams(Section):
    method: Method  # how the bag that is submitted answers
    tie: Tie  # who wins a vote with no majority
    members: Literal["all"] | list[int]  # seeds


class PromoteParams(Section):
    margin: Share  # of validation F1 by which a challenger must be better than the champion
    min_probability: Share  # that it is, by a paired bootstrap
    resamples: Positive  # of the bootstrap
    min_sensitivity: Share  # required of every champion on the validation set, as are the next two
    min_specificity: Share
    max_calibration_error: Share


DownloadParams = PhantomParams | ArchiveParams | KaggleParams | CovidxParams | CovidChestXrayParams | TableParams
SOURCES = ["phantom", "archive", "kaggle", "covidx", "cohen", "table"]


class Profile(Section):
    download: Annotated[DownloadParams, Field(discriminator="source")]
    weights: WeightsParams
    prepare: PrepareParams
    split: SplitParams
    train: TrainParams
    evaluate: EvaluateParams
    bag: BagParams
    promote: PromoteParams


class Config(Section):
    profile: str
    seeds: Annotated[list[Seed], Field(min_length=1)]
    profiles: dict[str, Profile]

    @model_validator(mode="before")
    @classmethod
    def _gather_profiles(cls, content: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = {key: content[key] for key in ("profile", "seeds") if key in content}
        return own | {"profiles": {key: content[key] for key in content if key not in own}}

    @model_validator(mode="after")
    def _check_names(self) -> "Config":
        if self.profile not in self.profiles:
            raise ValueError(f"profile: there is no section {self.profile!r}; {_near(self.profile, self.profiles)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is listed twice; give each once")
        for name, profile in self.profiles.items():
            members = profile.bag.members
            if members != "all" and (not members or len(set(members)) < len(members) or set(members) - set(self.seeds)):
                raise ValueError(f"{name}.bag.members: {members}; write all, or name some of the seeds, each once")
            source, section = profile.download, f"{name}.download"
            if isinstance(source, KaggleParams) and (source.competition is None) == (source.dataset is None):
                raise ValueError(f"{section}.competition, {section}.dataset: name one, and write null for the other")
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
        """The seeds in the bag."""
        return self.seeds if self.active.bag.members == "all" else self.active.bag.members

    @property
    def bag_members(self) -> list[str]:
        """The names of the models in the bag."""
        return [f"seed-{seed}" for seed in self.bag_seeds]

    @property
    def model_name(self) -> str:
        """The name of the MLflow experiment and of the registered model."""
        return f"covid-xray-{self.profile}"


def load_config(path: Path = Path("params.yaml")) -> Config:
    """Read and check the whole file, not only the section in use.

    Raises:
        UserError: the file is missing, is not YAML, or has a key that is unknown, missing or out of range.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run from the repository's root") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: empty; it holds profile, seeds and one section per profile")
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    # An unknown key comes before the key that is missing because of the misspelling.
    found = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    where = [str(part) for part in found["loc"] if part not in ("profiles", *SOURCES, "list[int]")]
    name = ".".join(where)
    if found["type"] == "extra_forbidden":
        return f"{name}: unknown key; {_near(where[-1], _keys(found['loc']))}"
    if found["type"] == "missing":
        return f"{name}: missing; add it"
    if found["type"] == "value_error":
        return f"{name}: {found['ctx']['error']}" if name else str(found["ctx"]["error"])
    return f"{name}: {found['msg'][0].lower()}{found['msg'][1:]}, but it is {found['input']!r}"


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the section at `loc` may have."""
    models: dict[str, type[Section]] = {
        "phantom": PhantomParams, "archive": ArchiveParams, "kaggle": KaggleParams, "covidx": CovidxParams,
        "cohen": CovidChestXrayParams, "table": TableParams, "columns": ColumnsParams, "weights": WeightsParams,
        "prepare": PrepareParams, "split": SplitParams, "train": TrainParams, "evaluate": EvaluateParams,
        "bag": BagParams, "promote": PromoteParams,
    }  # fmt: skip
    return list(models.get(str(loc[-2]), Profile).model_fields)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known := list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(sorted(known))}"
