"""Optimizers by name, and the learning rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from pipeline.core.config import TrainParams

SGD_MOMENTUM = 0.9


def build_optimizer(weights: Iterable[nn.Parameter], params: TrainParams) -> Optimizer:
    decay, fused = params.weight_decay, params.fused or None  # None means torch's default
    match params.optimizer:
        case "adam":
            return torch.optim.Adam(weights, params.lr, eps=params.eps, weight_decay=decay, fused=fused)
        case "adamw":
            return torch.optim.AdamW(weights, params.lr, eps=params.eps, weight_decay=decay, fused=fused)
        case "sgd":
            return torch.optim.SGD(weights, params.lr, SGD_MOMENTUM, weight_decay=decay, fused=fused)


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
