"""The model that is served: loaded by name, and replaced when its alias in the registry moves."""

import logging
import re
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from markdown_it import MarkdownIt

from pipeline.core.config import Config
from pipeline.core.errors import UserError, first_line
from pipeline.inference import candidate
from pipeline.inference.candidate import Candidate
from pipeline.inference.prediction_log import PredictionLog
from pipeline.serving import metrics
from pipeline.tracking.model_folder import NO_CARD, is_in_models, open_model_folder

log = logging.getLogger(__name__)

RETRY_SECONDS = 60  # until a version that could not be loaded is downloaded again


@dataclass(frozen=True)
class ServedModel:
    """A candidate with what names it in answers; `card_html` says what it is and what it is not for."""

    candidate: Candidate
    model: str
    version: str
    card_html: str
    log: PredictionLog | None


def load_model(config: Config, name: str, device: torch.device, log_file: Path | None) -> ServedModel:
    """Load a model by the name that people type, see `open_model_folder`.

    Raises:
        UserError: there is no such model, or its files are damaged.
    """
    with open_model_folder(config, name) as found:
        try:
            loaded = candidate.load_candidate(found.folder, device)
        except UserError as error:
            reason = str(error).partition(";")[0].removeprefix(f"{found.folder}/")
            raise UserError(
                f"version {found.version} of {found.model} is damaged: {reason}; choose another, or see: cxr verify"
            ) from None
    predictions = PredictionLog(log_file, loaded, found.content_hash, found.version) if log_file else None
    return ServedModel(loaded, found.model, found.version, render_card(found.card), predictions)


def render_card(markdown: str) -> str:
    """Render Markdown as HTML in which nothing is loaded and nothing runs: no HTML, no images, and links to http(s).

    Headings begin at h3, below those of the page; wide tables scroll; inline styles, which the page forbids, are none.
    """
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    renderer.validateLink = lambda url: url.lower().startswith(("http://", "https://"))  # type: ignore[method-assign]
    tokens = renderer.parse(markdown)
    levels = sorted({token.tag for token in tokens if token.type == "heading_open"})
    for token in tokens:
        if token.type.startswith("heading_"):
            token.tag = f"h{min(levels.index(token.tag) + 3, 6)}"
        if style := token.attrs.pop("style", None):
            token.attrs["align"] = str(style).removeprefix("text-align:")
    html = re.sub("<th([^>]*)></th>", r"<td\1></td>", str(renderer.renderer.render(tokens, renderer.options, {})))
    scroll = '<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>'
    return html.replace("<table>", scroll).replace("</table>", "</table></div>")


class ModelFollower:
    """Holds the served model; if it was named by an alias, a thread asks the registry where the alias points.

    `current` is replaced as a whole: a request that has begun with one model ends with it.
    """

    def __init__(
        self, config: Config, name: str, device: torch.device, log_file: Path | None, poll_seconds: float
    ) -> None:
        """Load the model, and start to follow its alias; `poll_seconds` are between two looks at it.

        Raises:
            UserError: see `load_model`.
        """
        self._load = partial(load_model, config, name, device, log_file)
        self.poll_seconds, self.error = poll_seconds, ""
        self.current = self._load()
        self.alias = None if name.isdecimal() or is_in_models(config, name) else name
        self._failed_version, self._retry_at = "", 0.0
        self._stopped = threading.Event()
        if self.alias:
            from pipeline.tracking.store import connect

            self._store = connect(config.model_name)
            threading.Thread(target=self._follow, args=[self.alias], daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _follow(self, alias: str) -> None:
        while not self._stopped.wait(self.poll_seconds):
            self._update(alias)

    def _update(self, alias: str) -> None:
        """Ask the registry once, and load the version to which the alias points now; on failure keep the model."""
        from pipeline.tracking import registry

        version = ""
        try:
            found = registry.get_version(self._store, self.current.model, alias)
            version = str(found.version)
            if version == self.current.version:
                card = render_card(found.description or NO_CARD)  # it changes when the champion does
                self.current = replace(self.current, card_html=card)
            elif version != self._failed_version or time.monotonic() > self._retry_at:
                self.current = self._load()
                metrics.MODEL_CHANGES.inc()
                log.warning("version %s of %s answers now", self.current.version, self.current.model)
            else:
                return
        except Exception as error:  # noqa: BLE001  # of MLflow, its database or network, or torch; the model stays
            metrics.POLL_FAILURES.inc()
            self._failed_version, self._retry_at = version, time.monotonic() + RETRY_SECONDS
            message = first_line(error)
            if message != self.error:
                log.warning("version %s still answers: %s", self.current.version, message)
            self.error = message
        else:
            self.error = self._failed_version = ""
