"""A candidate as one ONNX graph, from the square gray image to the label, for programs without this package."""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.core.errors import UserError
from pipeline.core.files import atomic_path, is_regular, make_folder, resolve_target
from pipeline.evaluation import ensemble
from pipeline.evaluation.calibration import PROBABILITY_EPS
from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference.candidate import Candidate
from pipeline.inference.export_metadata import describe_ensemble
from pipeline.models import preprocessing
from pipeline.models.classifier import predict_resized
from pipeline.models.members import average_folds, group_by_backbone

PRODUCER = "covid-xray"
MAX_WEIGHTS = 2_000_000_000  # bytes; a file in ONNX's format holds 2 GiB
TOLERANCE = 1e-5  # between the probabilities of ONNX Runtime and of torch, which round differently
NOISE_EDGES = 2, 8, 32  # of the test images' random squares, from coarse to fine
INPUT = "images", "Gray images (N, S, S) from 0 to 255, see the metadata for S and how a file becomes one"
OUTPUTS = {
    "score": "The members' probabilities, combined",
    "probability": "P(positive), the recalibrated score",
    "label": "1 where the probability is at least `threshold` of the metadata, else 0",
    "members": "P(positive) of each member (N, M), in the order of `members` of the metadata",
}
PREPROCESSING = (
    "1. Decode the file to an upright gray image from 0 to 255 in which bone is bright: color becomes luma "
    "(ITU-R 601-2), more than 8 bits are scaled to 8, a DICOM is shown as its VOI LUT or window says "
    "(pipeline.data.images.decode_gray). 2. Make it a square as Pillow does by the code in `square`, which is "
    "antialiased. 3. All that follows is in the graph."
)


def check_target(path: Path) -> Path:
    """Return the file to write, behind symbolic links.

    Raises:
        UserError: packages are not installed, or there is something else than an earlier export.
    """
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped]  # noqa: F401
        import onnxscript  # noqa: F401  # torch needs it
    except ImportError as error:
        raise UserError(
            f"--onnx needs {error.name}, which is not installed; run: pip install -c constraints.txt -e '.[onnx]'"
        ) from None
    target = resolve_target(path)
    if not is_regular(target):
        raise UserError(f"{path}: not a file, and is not replaced; give another name")
    if target.exists() and target.stat().st_size > 0:
        with target.open("rb") as file:  # which begins with the number of the format and the producer
            is_export = onnx.ModelProto(producer_name=PRODUCER).SerializeToString() in file.read(32)
        if not is_export:
            raise UserError(f"{path}: not written by cxr export, and is not replaced; give another name")
    return target


def write_onnx(candidate: Candidate, path: Path, origin: Mapping[str, str]) -> None:
    """Write a candidate with its preprocessing and its operating point as an ONNX file.

    Args:
        candidate: on the CPU.
        path: from `check_target`.
        origin: entries of the metadata that say where the candidate is from, such as the version.

    Raises:
        UserError: the weights are too large for the format, or ONNX Runtime does not predict the same.
    """
    import onnx

    graph = CandidateGraph(candidate).eval()
    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    if size > MAX_WEIGHTS:
        raise UserError(
            f"{path}: the weights have {size / 1e9:.1f} GB, and an ONNX file holds {MAX_WEIGHTS / 1e9:.0f} GB; export "
            "single members, such as seed-0"
        )
    with make_folder(path.parent), atomic_path(path) as temporary:  # first, since the export takes minutes
        with warnings.catch_warnings(), default_convolution_precision():
            warnings.simplefilter("ignore")  # of torch about its own code
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            program = torch.onnx.export(
                graph,
                (torch.zeros(2, candidate.packed_size, candidate.packed_size, dtype=torch.uint8),),
                input_names=[INPUT[0]],
                output_names=list(OUTPUTS),
                dynamic_shapes=({0: torch.export.Dim("N")},),
                verbose=False,
            )
        model: onnx.ModelProto = program.model_proto  # type: ignore[union-attr]  # only the old exporter returns None
        model.producer_name, model.producer_version = PRODUCER, metadata.version("covid-xray")
        model.doc_string = f"{ensemble.describe_output(candidate.config, candidate.finding)}. Not for diagnosis."
        model.graph.input[0].doc_string = INPUT[1]
        for output in model.graph.output:
            output.doc_string = OUTPUTS[output.name]
        fields = describe_ensemble(candidate, origin) | {
            "preprocessing": PREPROCESSING,
            "intended_use": "For research, not for diagnosis.",
        }
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
        onnx.helper.set_model_props(model, texts)
        onnx.checker.check_model(model)
        content = model.SerializeToString()
        _check_predictions(candidate, content, path)
        temporary.write_bytes(content)


def _check_predictions(candidate: Candidate, content: bytes, path: Path) -> None:
    """Check that ONNX Runtime predicts what torch does, for noise."""
    import onnxruntime

    generator, size = torch.Generator().manual_seed(0), (candidate.packed_size,) * 2
    noise = [torch.rand(2, 1, edge, edge, generator=generator) for edge in NOISE_EDGES]
    images = torch.cat([interpolate(255 * one, size, mode="bilinear") for one in noise])[:, 0].byte()
    expected = candidate.predict(images)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    score, probability, label, members = session.run(None, {INPUT[0]: images.numpy()})
    values = expected[["score", "probability", *candidate.config.members]].to_numpy()
    difference = np.abs(np.column_stack([score, probability, members]) - values).max()
    is_near = np.abs(expected["score"] - candidate.config.threshold) < TOLERANCE
    if not (difference < TOLERANCE and ((label == expected["label"]) | is_near).all()):
        raise UserError(
            f"{path}: ONNX Runtime predicts otherwise (probabilities differ by up to {difference:.1g}); nothing is "
            "written; try other versions of torch and onnxscript"
        )


@contextmanager
def default_convolution_precision() -> Iterator[None]:
    """Set cuDNN's precision to torch's default in the block: torch.export fails with any other, also on a CPU."""
    cudnn: Any = torch.backends.cudnn
    precision, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "tf32"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = precision


class CandidateGraph(nn.Module):
    """What `Candidate.predict` computes, as one module."""

    resize: Tensor

    def __init__(self, candidate: Candidate) -> None:
        super().__init__()
        self._members = list(candidate.members.values())
        self._groups = group_by_backbone(self._members)
        self.networks = nn.ModuleList(network for group in self._groups for network in group)
        self._combination = Combination(candidate.config)
        # All members have the same preprocessing, which `params.yaml` gives.
        self._first = self._members[0][0]
        edges = torch.zeros(1).double(), torch.ones(1).double()  # of the whole image
        matrix = preprocessing.interpolation_matrices(*edges, candidate.packed_size, self._first.architecture.size)[0]
        self.register_buffer("resize", matrix if self._first.adjusts else matrix.float())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Classify gray images (N, packed_size, packed_size), uint8.

        Returns:
            Score and probability, float32 (N,), label, int64 (N,), and P(positive) of the members, float32 (N, M).
        """
        gray = self._resize(images.unsqueeze(1))
        members = average_folds(self._members, self._groups, [predict_resized(group, gray) for group in self._groups])
        return (*self._combination(members), members)

    def _resize(self, images: Tensor) -> Tensor:
        """Compute what `Classifier.resize` does, without the operator that ONNX lacks."""
        network, resize = self._first, self.resize
        gray = images.to(resize.dtype)
        if network.lung_field:
            gray = preprocessing.resample(gray, network.lung_field(images), network.architecture.size)
        elif resize.shape[0] != resize.shape[1]:
            gray = resize @ gray @ resize.T
        return network.adjust(gray) if network.adjusts else gray


class Combination(nn.Module):
    """What `ensemble.predict` computes, in float64 as there."""

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__()
        self._config = config

    def forward(self, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Combine the members' P(positive), float32 (N, M), to score, probability and label, (N,)."""
        score, config = self._score(members.double()), self._config
        probability = score
        if (config.temperature, config.bias) != (1, 0):
            probability = (_log_odds(score) / _float64(config.temperature) + _float64(config.bias)).sigmoid()
        return score.float(), probability.float(), (score >= _float64(config.threshold)).long()

    def _score(self, members: Tensor) -> Tensor:
        match self._config.method:
            case "mean":
                return members.mean(dim=1)
            case "logits":
                return _log_odds(members).mean(dim=1).sigmoid()
            case "greedy":
                return members @ _float64(self._config.weights)
            case "vote":
                count, ordered = members.shape[1], members.sort(dim=1).values
                lower, upper = ordered[:, (count - 1) // 2], ordered[:, count // 2]
                mean = torch.minimum(torch.maximum(members.mean(dim=1), lower), upper)
                return {"positive": upper, "negative": lower, "mean": mean}[self._config.tie]


def _float64(value: float | list[float]) -> Tensor:
    """Return a constant as a tensor: the export rounds Python's numbers to float32."""
    return torch.tensor(value, dtype=torch.float64)


def _log_odds(probabilities: Tensor) -> Tensor:
    clipped = probabilities.clamp(_float64(PROBABILITY_EPS), _float64(1 - PROBABILITY_EPS))
    return (clipped / (1 - clipped)).log()
