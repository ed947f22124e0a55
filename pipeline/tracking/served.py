"""The model that MLflow serves: this project's own code and safetensors, from the bytes of a file to a label.

MLflow runs this file when it loads the model, so loading executes no pickle.
"""

import base64
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline import images
from pipeline.evaluation.metrics import called
from pipeline.models import classifier

BATCH = 32


class ServedModel(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        weights, description = (Path(context.artifacts[name]) for name in ("weights", "description"))
        self.network = classifier.load(weights, description, torch.device("cpu"))

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """Judge radiographs.

        Args:
            context: unused.
            model_input: a column `image`; each an encoded image as bytes or base64, or a path to one.
            params: unused.

        Returns:
            A row per image: `probability` of COVID-19 and `label`, 0 or 1, at the operating point.

        Raises:
            MlflowException: an image is not usable (HTTP 400 where served).
        """
        size = self.network.architecture.packed_size
        pixels = torch.from_numpy(np.stack([_decode(image, size) for image in model_input["image"]]))
        found = torch.cat([self.network.probabilities(part) for part in pixels.split(BATCH)]).numpy()
        return pd.DataFrame({"probability": found.astype(float), "label": called(found)})


def _decode(image: bytes | str, size: int) -> np.ndarray:
    try:
        data = image if isinstance(image, bytes) else _read(image)
        return images.decode(data, size)[0]
    except (images.UnusableError, OSError) as reason:
        raise MlflowException(f"not a usable radiograph: {reason}", INVALID_PARAMETER_VALUE) from None


def _read(text: str) -> bytes:
    if os.path.isfile(text):  # noqa: PTH113 - a Path raises where base64 is too long for a name
        return Path(text).read_bytes()
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise images.UnusableError("neither base64 nor the path of a file") from None


set_model(ServedModel())
