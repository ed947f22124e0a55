"""The members of an ensemble: a model each, with one network or, cross-validated, one per fold."""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from pipeline.models.classifier import Classifier


def share_backbones(members: Iterable[Sequence[Classifier]]) -> None:
    """Give networks whose backbones are equal one and the same.

    Backbones that training leaves frozen are equal. One of them in memory computes the features for all heads.
    """
    distinct = list[Classifier]()
    for network in chain.from_iterable(members):
        for other in distinct:
            if _have_equal_backbones(network, other):
                network.backbone = other.backbone
                break
        else:
            distinct.append(network)


def _have_equal_backbones(one: Classifier, other: Classifier) -> bool:
    states = (network.backbone.state_dict().values() for network in (one, other))
    return one.architecture == other.architecture and all(map(torch.equal, *states))


def group_by_backbone(members: Iterable[Sequence[Classifier]]) -> list[list[Classifier]]:
    """Return the networks of the members, those that share a backbone in one list."""
    groups = dict[nn.Module, list[Classifier]]()
    for network in chain.from_iterable(members):
        groups.setdefault(network.backbone, []).append(network)
    return list(groups.values())


def average_folds(
    members: Iterable[Sequence[Classifier]], groups: Iterable[Sequence[Classifier]], of_groups: Sequence[Tensor]
) -> Tensor:
    """Return P(positive) of members, (B, members), the mean of the networks of each.

    Args:
        members: the networks of each member.
        groups: the same networks, from `group_by_backbone`.
        of_groups: P(positive) of the networks of each group, (B, networks).
    """
    of_network = dict(zip(chain.from_iterable(groups), torch.cat(list(of_groups), dim=1).unbind(1), strict=True))
    means = [torch.stack([of_network[network] for network in networks]).mean(dim=0) for networks in members]
    return torch.stack(means, dim=1)
