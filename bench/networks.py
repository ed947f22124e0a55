"""Untrained networks for the benchmarks; imports nothing but the core of training."""

from pipeline.core.config import TrainParams
from pipeline.models.classifier import Architecture, Classifier


def build_classifier(params: TrainParams) -> Classifier:
    """Build the network of a recipe, without dropout, for images that the pack has in its size."""
    size = params.image_size
    return Classifier(Architecture(params.backbone, params.head_hidden, 0, size, params.normalization, size, "stretch"))
