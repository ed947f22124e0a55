"""What a step minimizes: cross-entropy, and two means against shortcuts, group DRO and an adversary."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import cross_entropy

from pipeline.core.config import TrainParams
from pipeline.models.classifier import Classifier
from pipeline.training.distributed import ProcessGroup

log = logging.getLogger(__name__)

ADVERSARY_WIDTH = 64  # of its hidden layer
PER_IMAGE = ("images", "targets", "group", "dropout_mask")  # what the inputs with a row per image begin with


class Objective(nn.Module):
    """The loss of a batch, computed in parts, and what changes with it: its state.

    A group is a combination of label and source that the training set has; G are the groups. Images whose source is not
    known count as one source. An image that is mixed with another one keeps its group.

    With `group_dro` (Sagawa et al. 2020, arXiv:1911.08731), the loss is the sum of q L over the groups, where L is the
    mean cross-entropy of the group's images in the batch, 0 if there are none. All weights q are 1 / G at first; after
    each step, every q is multiplied by exp(group_dro L), and all are divided by their sum. In the paper, the step's own
    L counts already; here, it is known only when all parts and processes have computed theirs.

    With `domain_adversarial`, an adversary learns to tell the source of an image from the backbone's features and the
    label, and the backbone learns to prevent that, by the reversed gradient (Ganin et al. 2016, arXiv:1505.07818; given
    the label, so that the label itself is not unlearned: Li et al. 2018, doi:10.1007/978-3-030-01267-0_38). Images of a
    label that has one source do not count. In the course of the training, the reversed gradient grows from 0 to
    `domain_adversarial` times the adversary's, as in Ganin et al. The adversary's cross-entropy is part of the loss
    that is reported.
    """

    class_weights: Tensor
    log_weights: Tensor
    group_losses: Tensor
    one_hot: Tensor
    other_label: Tensor

    def __init__(
        self, network: Classifier, params: TrainParams, labels: Tensor, sources: Tensor, train_rows: Tensor
    ) -> None:
        """Find the groups, and draw the adversary's weights.

        Args:
            network: whose features the adversary gets.
            params: the hyperparameters.
            labels: of all images of the pack, int64 (N,), 0 or 1.
            sources: the numbers of their sources, int64 (N,).
            train_rows: the images that are trained on, int64.
        """
        super().__init__()
        self._dro_step, self._adversarial_weight = params.group_dro, params.domain_adversarial
        self.adversary: nn.Module | None = None
        self.register_buffer("class_weights", torch.tensor(params.class_weights), persistent=False)
        (group_labels, _), numbers = torch.stack([labels, sources])[:, train_rows].unique(dim=1, return_inverse=True)
        self._groups, count = torch.zeros_like(labels).index_copy_(0, train_rows, numbers), len(group_labels)
        if self._dro_step:
            self.register_buffer("log_weights", torch.full((count,), -math.log(count)))
            self.register_buffer("group_losses", torch.zeros(count), persistent=False)  # sums, within a step
            self.register_buffer("one_hot", torch.eye(count), persistent=False)
        has_single_sources = count == len(group_labels.unique())
        if has_single_sources and (levers := _levers_by_source(params)):
            log.warning(
                "train.%s cannot tell source from label: every label has a single source in the training set",
                ", train.".join(levers),
            )
        if self._adversarial_weight and not has_single_sources:
            width = next(network.head.parameters()).shape[1]
            # Normalized, because else the backbone would raise the adversary's loss by ever larger features.
            layers = nn.LayerNorm(width), nn.Linear(width, ADVERSARY_WIDTH), nn.ReLU()
            self.adversary = nn.Sequential(*layers, nn.Linear(ADVERSARY_WIDTH, count))
            other_label = torch.where(group_labels == group_labels.unsqueeze(1), 0, -math.inf)
            self.register_buffer("other_label", other_label, persistent=False)

    def trained_network(self, network: Classifier) -> nn.Module:
        """Return the network with the adversary, if there is one."""
        return _WithAdversary(network, self.adversary) if self.adversary else network

    def draw_inputs(self, rows: Tensor, progress: float) -> dict[str, Tensor]:
        """Return what the loss needs to know of a batch, on the CPU.

        Args:
            rows: of the batch in the pack, int64 (B,).
            progress: share of the training that is done, 0 to 1.

        Returns:
            `groups`, int64 (B,); `group_shares`, float32 (B,), of the images' groups in the batch; `reversal`, float32
            (), the factor of the adversary's gradient. What is not needed is missing.
        """
        groups, inputs = self._groups[rows], {}
        if self._dro_step or self.adversary:
            inputs["groups"] = groups
        if self._dro_step:
            inputs["group_shares"] = groups.bincount()[groups] / len(groups)
        if self.adversary:
            inputs["reversal"] = torch.tensor(self._adversarial_weight * math.tanh(5 * progress))
        return inputs

    def forward(self, network: nn.Module, part: Mapping[str, Tensor], reversal: Tensor | None) -> Tensor:
        """Compute the loss of a part of a batch, summed over its images.

        Args:
            network: from `trained_network`, data parallel or compiled.
            part: the inputs with a row per image, see `PER_IMAGE`.
            reversal: from `draw_inputs`.
        """
        masks = [mask for name, mask in part.items() if name.startswith("dropout_mask")]
        if self.adversary:
            logits, group_logits = network(part["images"], masks, reversal)
        else:
            logits = network(part["images"], masks)
        reduction = "none" if self._dro_step else "sum"
        loss = cross_entropy(logits.float(), part["targets"], self.class_weights, reduction=reduction)
        if self._dro_step:
            losses, groups = loss / part["group_shares"], part["groups"]
            self.group_losses += (losses.detach().unsqueeze(1) * self.one_hot.index_select(0, groups)).sum(0)
            loss = (losses * self.log_weights.exp().index_select(0, groups)).sum()
        if self.adversary:
            possible = group_logits.float() + self.other_label.index_select(0, part["groups"])
            loss = loss + cross_entropy(possible, part["groups"], reduction="sum")
        return loss

    def update_weights(self, count: int, group: ProcessGroup) -> None:
        """Update the weights of group DRO, in place, after all parts of a batch of `count` images."""
        if self._dro_step:
            means = group.all_reduce_sum(self.group_losses) / count
            self.log_weights.copy_((self.log_weights + self._dro_step * means).log_softmax(0))
            self.group_losses.zero_()


def _levers_by_source(params: TrainParams) -> list[str]:
    """Return the names of what is on and needs a label with several sources."""
    levers = {
        "sampling": params.sampling in ("source_balanced", "group_balanced"),
        "mixup_pairing": params.mixup_pairing == "same_label",
        "group_dro": params.group_dro,
        "domain_adversarial": params.domain_adversarial,
    }
    return [name for name, is_on in levers.items() if is_on]


class _WithAdversary(nn.Module):
    def __init__(self, network: Classifier, adversary: nn.Module) -> None:
        super().__init__()
        self.network, self.adversary = network, adversary

    def forward(self, images: Tensor, masks: Sequence[Tensor], reversal: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of the labels (B, 2) and of the groups (B, G)."""
        features = self.network.extract_features(images)
        return self.network.head(features, masks), self.adversary(_ReverseGradient.apply(features, reversal))


class _ReverseGradient(Function):
    """The identity, whose gradient is multiplied by the negative of a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return -factor * gradient, None
