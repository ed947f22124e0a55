"""The MLflow pyfunc model: from the bytes of an image file to a probability and a label.

MLflow executes this file when it loads the model (models from code), so no pickle is involved.
"""

import base64
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline.data import image_checks, images
from pipeline.data.image_checks import UnusableError
from pipeline.inference import candidate

log = logging.getLogger(__name__)

MAX_IMAGES = 256  # per call


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
            model_input: a column `image`, each value an encoded image as bytes or base64, gray pixels (H, W) from 0 to
                255, or the `pathlib.Path` of a file, which no client of a server can send; at most `MAX_IMAGES`.
            params: unused.

        Returns:
            A row per image: `probability` of the finding, which the model's metadata name; `label` (0 or 1) at the
            operating point; `prevalence`, the share of positives for which the probability is calibrated, or None if it
            is not; and `version`, the registered version, or empty if the model was not loaded from the registry.

        Raises:
            MlflowException: an image is not usable, or there are too many; a server answers with HTTP 400.
        """
        values = list(model_input["image"])
        if len(values) > MAX_IMAGES:
            raise _bad_request(f"{len(values)} images: more than the {MAX_IMAGES} of a call; split them")
        try:
            pixels = [self._decode(value, f"image {number}") for number, value in enumerate(values, start=1)]
            size = self._candidate.packed_size
            stacked = np.stack(pixels) if pixels else np.empty((0, size, size), np.uint8)
            predictions = self._candidate.predict(torch.from_numpy(stacked))[["probability", "label"]]
        except MlflowException:
            raise
        except Exception as error:
            log.exception("unexpected error")
            # MLflow would send the trace to the client.
            raise MlflowException("unexpected error, which is in the server's log", INTERNAL_ERROR) from error
        return predictions.assign(prevalence=self._candidate.config.prevalence, version=self._version)

    def _decode(self, value: Any, name: str) -> np.ndarray:
        size, resize = self._candidate.packed_size, self._candidate.resize
        try:
            if isinstance(value, np.ndarray | list):
                return images.resize_to_square(_gray_pixels(value), size, resize)
            return images.decode_radiograph(_encoded_image(value), size, resize)[0]
        except (UnusableError, OSError) as reason:
            raise _bad_request(f"{name}: not a usable radiograph: {reason}") from None


def _bad_request(message: str) -> MlflowException:
    return MlflowException(message, INVALID_PARAMETER_VALUE)


def _gray_pixels(value: np.ndarray | list[Any]) -> np.ndarray:
    """Return pixels as an array (H, W); the lists of JSON are checked before they are converted."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value
    rows = [row.tolist() if isinstance(row, np.ndarray) else row for row in value]
    if not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        return np.empty(0)  # no gray image
    image_checks.check_shape(len(rows[0]), len(rows))
    try:
        return np.frombuffer(b"".join(map(bytes, rows)), np.uint8).reshape(len(rows), -1)
    except (TypeError, ValueError):  # not integers from 0 to 255
        return np.empty(0)


def _encoded_image(value: Any) -> bytes:
    if isinstance(value, Path):
        with value.open("rb") as stream:
            value = stream.read(image_checks.MAX_BYTES + 1)
    if isinstance(value, str):
        image_checks.check_bytes(len(value) * 3 // 4)
        try:
            value = base64.b64decode("".join(value.split()), validate=True)
        except ValueError:
            raise UnusableError("text that is not base64; send a file's content (in Python, a pathlib.Path)") from None
    if not isinstance(value, bytes | bytearray | memoryview):
        raise UnusableError("neither bytes, base64 nor gray pixels")
    data = bytes(value)
    image_checks.check_bytes(len(data))
    return data


set_model(ServedModel())
