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
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline.core.config import Resize
from pipeline.data import images
from pipeline.inference import candidate


class ServedModel(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["candidate"])
        self._candidate = candidate.load_candidate(folder, torch.device("cpu"))
        # MLflow leaves this beside a model that it loads as a version of the registry.
        registered = folder.parents[1] / "registered_model_meta"
        self._version = str(yaml.safe_load(registered.read_text())["model_version"]) if registered.is_file() else ""

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """Judge radiographs.

        Args:
            context: unused.
            model_input: a column `image`; each an encoded image as bytes or base64, a path to one, or its pixels,
                gray (H, W) with values of 0 to 255.
            params: unused.

        Returns:
            A row per image: `probability` of COVID-19, `label`, 0 or 1, at the operating point, and the `version`
            of the model, empty where it was not loaded from the registry.

        Raises:
            MlflowException: an image is not usable (HTTP 400 where served).
        """
        form = self._candidate.packed_size, self._candidate.resize
        pixels = torch.from_numpy(np.stack([_pixels(image, *form) for image in model_input["image"]]))
        return self._candidate.predict(pixels).assign(version=self._version)


def _pixels(image: Any, size: int, resize: Resize) -> np.ndarray:
    try:
        if isinstance(image, np.ndarray | list):
            return images.resize_to_square(np.asarray(image), size, resize)
        return images.decode_radiograph(image if isinstance(image, bytes) else _read(image), size, resize)[0]
    except (images.UnusableError, OSError, TypeError, ValueError) as reason:
        raise MlflowException(f"not a usable radiograph: {reason}", INVALID_PARAMETER_VALUE) from None


def _read(text: str) -> bytes:
    if os.path.isfile(text):  # noqa: PTH113 - a Path raises where base64 is too long for a name
        return Path(text).read_bytes()
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, AttributeError):
        raise images.UnusableError("neither base64 nor the path of a file") from None


set_model(ServedModel())
