"""The MLflow pyfunc model: from the bytes of an image file to a probability and a label.

MLflow executes this file when it loads the model (models from code), so no pickle is involved.
"""

import base64
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline.core.config import Resize
from pipeline.data import image_checks, images
from pipeline.inference import candidate


class ServedModel(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["candidate"])
        self._candidate = candidate.load_candidate(folder, torch.device("cpu"))
        # MLflow writes this file beside a model that it loads from the registry.
        registered = folder.parents[1] / "registered_model_meta"
        self._version = str(yaml.safe_load(registered.read_text())["model_version"]) if registered.is_file() else ""

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """Classify radiographs.

        Args:
            context: unused.
            model_input: a column `image`, each value an encoded image (bytes or base64), the path of one, or gray
                pixels (H, W) from 0 to 255.
            params: unused.

        Returns:
            A row per image: `probability` of the finding, which the model's metadata name; `label` (0 or 1) at the
            operating point; `prevalence`, the share of positives for which the probability is calibrated, or None if it
            is not; and `version`, the registered version, or empty if the model was not loaded from the registry.

        Raises:
            MlflowException: an image is not usable; a server answers with HTTP 400.
        """
        size, resize = self._candidate.packed_size, self._candidate.resize
        pixels = torch.from_numpy(np.stack([_decode(image, size, resize) for image in model_input["image"]]))
        predictions = self._candidate.predict(pixels)[["probability", "label"]]
        return predictions.assign(prevalence=self._candidate.config.prevalence, version=self._version)


def _decode(image: Any, size: int, resize: Resize) -> np.ndarray:
    try:
        if isinstance(image, np.ndarray | list):
            return images.resize_to_square(np.asarray(image), size, resize)
        return images.decode_radiograph(image if isinstance(image, bytes) else _read_bytes(image), size, resize)[0]
    except (image_checks.UnusableError, OSError, TypeError, ValueError) as reason:
        raise MlflowException(f"not a usable radiograph: {reason}", INVALID_PARAMETER_VALUE) from None


def _read_bytes(path_or_base64: str) -> bytes:
    if os.path.isfile(path_or_base64):  # noqa: PTH113 - Path.is_file raises when base64 is too long for a file name
        return Path(path_or_base64).read_bytes()
    try:
        return base64.b64decode("".join(path_or_base64.split()), validate=True)
    except (ValueError, AttributeError):
        raise image_checks.UnusableError("neither base64 nor the path of a file") from None


set_model(ServedModel())
