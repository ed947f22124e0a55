"""Optimizers by name, and the learning rate schedule."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from pipeline.core.config import TrainParams

SGD_MOMENTUM = 0.9


def build_optimizer(weights: Sequence[nn.Parameter], params: TrainParams) -> Optimizer:
    """Build the optimizer; on CUDA it is fused, and its step can be captured in a CUDA graph."""
    cuda, decay = weights[0].device.type == "cuda", params.weight_decay
    fused = params.fused or cuda or None  # None means torch's default
    adam = {"eps": params.eps, "weight_decay": decay, "fused": fused, "capturable": cuda}
    match params.optimizer:
        case "adam":
            return torch.optim.Adam(weights, params.lr, **adam)  # type: ignore[arg-type]
        case "adamw":
            return torch.optim.AdamW(weights, params.lr, **adam)  # type: ignore[arg-type]
        case "sgd":
            sgd = torch.optim.SGD(weights, params.lr, SGD_MOMENTUM, weight_decay=decay, fused=fused)
            # The fused kernel refuses weights without momentum beside others, as a backbone has when it is unfrozen.
            for weight in weights:
                sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            return sgd


def learning_rate_at(epochs_done: float, params: TrainParams) -> float:
    """Return the learning rate after `epochs_done` epochs, which may be fractional.

    It rises linearly from 0 during `warmup_epochs`; then it is constant at `lr`, or decays to 0 along a half cosine
    (Loshchilov and Hutter 2017).
    """
    if epochs_done < params.warmup_epochs:
        return params.lr * epochs_done / params.warmup_epochs
    if params.schedule == "constant":
        return params.lr
    progress = (epochs_done - params.warmup_epochs) / (params.epochs - params.warmup_epochs)
    return params.lr * (1 + math.cos(math.pi * progress)) / 2
