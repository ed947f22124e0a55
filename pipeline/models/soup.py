"""Model soup: the uniform average of the weights of several classifiers (Wortsman et al. 2022, arXiv:2203.05482)."""

from collections.abc import Sequence

import torch

from pipeline.models.classifier import Classifier, place_for_inference


def average_weights(networks: Sequence[Classifier]) -> Classifier:
    """Return a classifier with the mean of the weights and of the batch norm statistics.

    See `ensemble.soup_unavailable_reason` for when averaging makes no sense.
    """
    states = [network.state_dict() for network in networks]
    soup = Classifier(networks[0].architecture)
    soup.load_state_dict(
        {
            name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(value.dtype)
            for name, value in states[0].items()
        }
    )
    return place_for_inference(soup, networks[0].scale.device)
