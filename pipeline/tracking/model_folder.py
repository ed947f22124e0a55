"""Models by the name that people type: a version of the registry, or a candidate from `models/`."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.config import BAG, Config
from pipeline.evaluation import ensemble
from pipeline.inference import candidate

MODEL_CARD = Path("report/model-card.md")
NO_CARD = "No evaluation is known for this model."


@dataclass(frozen=True)
class ModelFolder:
    """A candidate's folder, for `candidate.load_candidate`, and what names the model in outputs.

    `model` is the registered model, or `models/` for one that is not from the registry; `version` is the number of the
    registered version, or the name of the candidate. `card` is Markdown: the description of the version, or the model
    card of the report if that evaluates this candidate, or `NO_CARD`.
    """

    folder: Path
    model: str
    version: str
    content_hash: str
    card: str

    @property
    def title(self) -> str:
        """The model in messages: `models/seed-0`, or `NAME version 3`."""
        return f"{self.model}{self.version}" if self.model == "models/" else f"{self.model} version {self.version}"


def is_in_models(config: Config, name: str) -> bool:
    """Return whether a name is that of a candidate from `models/`, not of a version or alias of the registry."""
    return name in (*config.model_names, BAG)


@contextmanager
def open_model_folder(config: Config, name: str) -> Iterator[ModelFolder]:
    """Yield the folder of a model, which is deleted afterwards.

    Args:
        config: names the seeds and the registered model.
        name: an alias or number of a registered version, or `seed-K` or `bag` from `models/`.

    Raises:
        UserError: there is no such model, its files are damaged, or it was trained again since stage `bag`.
    """
    if is_in_models(config, name):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            ensemble_config = ensemble.load_candidate_configs(config)[name]
            ensemble.check_weights(ensemble_config.members)
            candidate.assemble_candidate(folder, Path("models"), ensemble_config, config.active.finding)
            yield ModelFolder(folder, "models/", name, candidate.content_hash(folder), _read_card(name))
    else:
        from pipeline.tracking import registry
        from pipeline.tracking.store import connect

        version = registry.get_version(connect(config.model_name), config.model_name, name)
        with registry.download_version(version) as folder:
            content_hash = version.tags[registry.CONTENT_HASH_TAG]
            yield ModelFolder(folder, version.name, str(version.version), content_hash, version.description or NO_CARD)


def _read_card(name: str) -> str:
    """Return the report's model card if its table of metrics is of this candidate."""
    card = MODEL_CARD.read_text(encoding="utf-8") if MODEL_CARD.is_file() else ""
    return card if re.search(rf"^\| \| {name} ", card, re.MULTILINE) else NO_CARD
