"""Members of an ensemble: networks with the same backbone compute its features once, and predict the same bytes."""

from dataclasses import replace

import pytest
import torch

from pipeline.evaluation.ensemble import EnsembleConfig
from pipeline.inference import candidate
from pipeline.inference.apply_networks import predict_members
from pipeline.models import classifier
from pipeline.models.classifier import Architecture, Classifier
from pipeline.models.members import group_by_backbone, share_backbones

CPU = torch.device("cpu")
SMALL = Architecture("timm/test_efficientnet", [8], 0.0, 32, "imagenet", 40, "stretch")
PIXELS = torch.randint(0, 256, (9, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_network(architecture: Architecture, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return classifier.place_for_inference(Classifier(architecture), CPU)


def fit_head(network: Classifier, seed: int) -> Classifier:
    """Return a network with an equal backbone and another head."""
    other = make_network(network.architecture, seed)
    other.backbone.load_state_dict(network.backbone.state_dict())
    return other


@pytest.mark.parametrize(
    "architecture",
    [
        SMALL,
        replace(SMALL, test_time_augmentation="crops"),
        replace(SMALL, feature_maps=2),
        Architecture("alexnet", [], 0.0, 64, "none", 40, "stretch"),
    ],
    ids=["plain", "views", "feature maps", "alexnet"],
)
def test_a_shared_backbone_changes_no_byte(architecture):
    first, tuned, other = (make_network(architecture, seed) for seed in range(3))
    same, also_same = (fit_head(first, seed) for seed in (3, 4))
    members, batches = [[first], [same, tuned, also_same], [other]], PIXELS.split(5)
    torch.set_num_threads(1)  # as `apply_networks` does in its threads
    expected = [
        torch.stack(
            [torch.stack([one.predict_proba(batch) for one in networks]).mean(dim=0) for networks in members], dim=1
        )
        for batch in batches
    ]
    for _ in range(2):  # with backbones of their own, and with shared ones
        predicted = list(predict_members(members, batches, CPU))
        assert all(map(torch.equal, predicted, expected))
        share_backbones(members)
    assert first.backbone is same.backbone is also_same.backbone
    assert group_by_backbone(members) == [[first, same, also_same], [tuned], [other]]


def test_a_shared_backbone_computes_the_features_once():
    first = make_network(SMALL)
    members = [[first], *([fit_head(first, seed)] for seed in (1, 2, 3))]
    share_backbones(members)
    passes = []
    members[2][0].backbone.register_forward_hook(lambda _, inputs, output: passes.append(len(output)))
    list(predict_members(members, PIXELS.split(5), CPU))
    assert sorted(passes) == [4, 5]


def test_networks_that_prepare_images_differently_share_no_backbone():
    first = make_network(SMALL)
    other = make_network(replace(SMALL, normalization="none"))
    share_backbones([[first], [other]])
    assert first.backbone is not other.backbone


def test_a_loaded_candidate_has_a_frozen_backbone_once(tmp_path):
    first = make_network(SMALL)
    for seed in range(3):
        folder = tmp_path / f"seed-{seed}"
        classifier.save_weights([fit_head(first, seed)], folder)
        classifier.save_description(first, folder, {})
    config = EnsembleConfig([f"seed-{seed}" for seed in range(3)], "mean", "mean", [1 / 3] * 3, 0.5)
    candidate.assemble_candidate(tmp_path / "bag", tmp_path, config)
    loaded = candidate.load_candidate(tmp_path / "bag", CPU)
    assert len(group_by_backbone(loaded.members.values())) == 1
    assert loaded.predict(PIXELS)[config.members].nunique(axis="columns").gt(1).all()
