"""Prediction of waiting images together, and heatmaps."""

import logging
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import cpu_count

from pipeline.inference import explain
from pipeline.inference.candidate import agreement
from pipeline.inference.decoding import DecodedImage
from pipeline.models.members import group_by_backbone
from pipeline.serving import metrics
from pipeline.serving.served_model import ServedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictJob:
    model: ServedModel
    image: DecodedImage
    row: "Future[dict[Any, Any]]" = field(default_factory=Future)


class Predictor:
    """A thread that classifies all images that wait when it is free: nothing waits for a batch to become full."""

    def __init__(self) -> None:
        self._is_logging = True
        self._jobs: queue.SimpleQueue[PredictJob | None] = queue.SimpleQueue()
        self._heatmaps = ThreadPoolExecutor(1)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    def predict(self, model: ServedModel, image: DecodedImage) -> "Future[dict[Any, Any]]":
        """Return a future with the image's row of `Candidate.predict`, by column."""
        job = PredictJob(model, image)
        self._jobs.put(job)
        return job.row

    def explain(self, model: ServedModel, image: DecodedImage, label: int) -> "Future[np.ndarray]":
        """Return a future with the heatmap of the image for a label, see `explain.explain`."""
        return self._heatmaps.submit(lambda: explain.explain(model.candidate, _stack([image]), [label])[0])

    def close(self) -> None:
        """End, after the images that wait."""
        self._jobs.put(None)
        self._thread.join()
        self._heatmaps.shutdown()

    def _run(self) -> None:
        is_open = True
        while is_open:
            waiting = [self._jobs.get()]
            while not self._jobs.empty():  # this thread is the only one that takes from it
                waiting.append(self._jobs.get())
            jobs = [job for job in waiting if job and job.row.set_running_or_notify_cancel()]
            is_open = None not in waiting
            for model in {id(job.model.candidate): job.model for job in jobs}.values():
                self._predict(model, [job for job in jobs if job.model.candidate is model.candidate])

    def _predict(self, model: ServedModel, jobs: list[PredictJob]) -> None:
        try:
            pixels = _stack([job.image for job in jobs])
            # A backbone works on a batch on one core, so fewer backbones than cores get more and smaller batches.
            backbones = len(group_by_backbone(model.candidate.members.values()))
            parts = ceil(cpu_count() / backbones) if model.candidate.device.type == "cpu" else 1
            size = min(ceil(len(jobs) / parts), model.candidate.batch_size)
            table = pd.concat(model.candidate.predict_batches(pixels.split(size)), ignore_index=True)
            self._log(model, jobs, pixels, table)
        except Exception as error:  # noqa: BLE001  # such as no memory: an error of these requests, not of the next
            for job in jobs:
                job.row.set_exception(error)
            return
        rows = table.assign(agreement=agreement(table, model.candidate.config)).to_dict("records")
        for job, row in zip(jobs, rows, strict=True):
            job.row.set_result(row)

    def _log(self, model: ServedModel, jobs: list[PredictJob], pixels: torch.Tensor, table: pd.DataFrame) -> None:
        if model.log is None:
            return
        try:
            model.log.append([job.image.description for job in jobs], pixels, table)
        except OSError as error:  # such as a full disk: clients get their answers
            if self._is_logging:
                log.warning("predictions are not logged: %s; /metrics counts them", error.strerror)
            self._is_logging = False
            metrics.UNLOGGED_IMAGES.inc(len(jobs))
        else:
            self._is_logging = True


def _stack(decoded: list[DecodedImage]) -> torch.Tensor:
    return torch.from_numpy(np.stack([image.pixels for image in decoded]))
