"""Download the pretrained weights of the backbone."""

from pathlib import Path

from stages.common import stage


@stage
def weights() -> None:
    """Write the pretrained weights of the backbone to data/weights/."""
    from pipeline.core.config import load_config
    from pipeline.models import pretrained

    profile = load_config().active
    pretrained.write_pretrained_weights(profile.train.backbone, profile.weights.source, Path("data/weights"))


if __name__ == "__main__":
    weights()
