"""What every candidate predicts for the images of the validation set."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipeline.core.config import Config
from pipeline.core.errors import UserError
from pipeline.core.files import DamagedFileError, read_csv
from pipeline.data import images, layout
from pipeline.data.manifest import read_split
from pipeline.data.raw_images import RawImages
from pipeline.evaluation import ensemble, gate
from pipeline.evaluation.cross_fitted_predictor import CrossFittedPredictor
from pipeline.evaluation.metric_tables import ValidationSet
from pipeline.evaluation.metrics import Scores, score_predictions
from pipeline.inference.candidate import Candidate
from pipeline.tracking.runs import MANIFEST

RAW = Path("data/raw.zip")
DECODED_AT_ONCE = 256  # images


class ValidationPredictions:
    """Labels of the validation set and all candidates' predictions for it, cross-fitted where something is fitted.

    Attributes:
        files, labels, groups, checksums: (N,), of the validation images.
        probabilities, predicted: (N, candidates), P(positive) and the predicted labels.
        by_epoch: per candidate, the labels (N, E) predicted after each epoch that the kept one was chosen from; a
            single column if no epoch was chosen on these images.
        folds: (N,), the fold of each image in cross-validation, else None.
        scores: of every candidate, by name.
    """

    def __init__(self, config: Config) -> None:
        predictions, split, params = read_csv(Path("predictions/validation.csv")), config.active.split, config.active
        images = read_split(MANIFEST.parent, split.validation_folds).set_index("file")
        self._download = params.download
        self._labeled_checksums = self._read_checksums(images.index[images["subset"].isin(["train", "validation"])])
        table = images.loc[predictions["file"]]
        self.files, self.labels = predictions["file"], predictions["label"].to_numpy()
        self.checksums = self._labeled_checksums.loc[self.files].reset_index(drop=True)
        self.groups = table["group"].to_numpy()
        self.folds = table["fold"].to_numpy(int) if split.cross_validate else None
        validation = ValidationSet(self.labels, self.groups, 1)
        configs = ensemble.load_candidate_configs(config)
        fitted = {
            name: CrossFittedPredictor(config, validation, predictions[one.members], one.method)
            for name, one in configs.items()
        }
        self._registered = {name: ensemble.predict(predictions, one)["label"] for name, one in configs.items()}
        self.probabilities = pd.DataFrame({name: one.probabilities for name, one in fitted.items()})
        self.predicted = pd.DataFrame({name: one.predictions.predicted for name, one in fitted.items()}).astype(int)
        self.by_epoch = [self.predicted[[name]].to_numpy() for name in configs]
        if params.train.keep != "last":
            for name in config.model_names:
                epochs = read_csv(Path("models", name, "validation.csv")).set_index("file").loc[self.files]
                scores = epochs.filter(regex="^epoch-").to_numpy()
                self.by_epoch[list(configs).index(name)] = gate.predict_by_epoch(validation, scores, params.evaluate)
        self.scores: Mapping[str, Scores] = {
            name: score_predictions(self.labels, self.probabilities[name].to_numpy(), self.predicted[name].to_numpy())
            for name in configs
        }

    def labeled_images(self, name: str) -> pd.DataFrame:
        """List the labeled images for later comparisons with other splits, without file names or patients.

        Returns:
            `checksum` of each image's file, sorted, and `label`, which the candidate predicts for an image of the
            validation set and which is missing for one that it was trained on.
        """
        checksums = self._labeled_checksums
        labels = self._registered[name].set_axis(self.files).reindex(checksums.index).astype("Int64")
        table = pd.DataFrame({"checksum": checksums.to_numpy(), "label": labels.to_numpy()})
        return table.sort_values(["checksum", "label"])

    def predict_with(self, model: Candidate, rows: np.ndarray) -> np.ndarray:
        """Return a model's labels for rows of the validation set, decoding the images at the size that it needs."""
        members = layout.read_layout(RAW).images.set_index("file").loc[self.files.iloc[rows], "member"]
        labels = []
        with RawImages(RAW, self._download) as raw_images:
            for start in range(0, len(members), DECODED_AT_ONCE):
                try:
                    contents = [raw_images.read(name) for name in members[start : start + DECODED_AT_ONCE]]
                except DamagedFileError as error:
                    raise UserError(f"{RAW}: damaged ({error}); run: dvc repro -f download") from None
                pixels = [images.decode_radiograph(content, model.packed_size, model.resize)[0] for content in contents]
                labels.append(model.predict(torch.from_numpy(np.stack(pixels)))["label"])
        return np.concatenate(labels)

    def _read_checksums(self, files: pd.Index) -> pd.Series:
        """Return the CRC-32 and the size of each image's file, which the archive's tables have, by file."""
        members = layout.read_layout(RAW).images.set_index("file").loc[files, "member"]
        with RawImages(RAW, self._download) as raw_images:
            return pd.Series([raw_images.checksum(member) for member in members], files, dtype=str)
