"""The HTTP API: the page, what the model is, and predictions of radiographs."""

import asyncio
import base64
from collections.abc import Awaitable, Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from pipeline.data import image_checks
from pipeline.data.dicom import NO_IMAGE
from pipeline.data.image_checks import UnusableError
from pipeline.evaluation.prevalence import change_prevalence
from pipeline.inference import explain
from pipeline.inference.files import is_text
from pipeline.serving.decoders import DecodedImage, DecoderError, DecoderPool
from pipeline.serving.guard import VERSION_HEADER, Guard
from pipeline.serving.limits import (
    HEATMAP_COST,
    JSON_COPIES,
    Hold,
    InFlight,
    Limits,
    RequestError,
    busy_error,
    parse_images,
    read_body,
)
from pipeline.serving.metrics import Metrics
from pipeline.serving.predictor import Predictor
from pipeline.serving.served_model import ModelFollower, ServedModel

PAGE = Path(__file__).with_name("page")
REQUEST_SECONDS = 120  # from the body to the answer; longer only if much more waits than these cores can do
Result = TypeVar("Result")


CONTENT = Field(
    None,
    description="Of what has no known image format: text, or unknown. Whether it is an image after all, such as a "
    "damaged one, its name tells, which is not sent.",
)


class ErrorAnswer(BaseModel):
    detail: str = Field(description="What is wrong.")
    content: Literal["text", "unknown"] | None = CONTENT


class UnusableImage(BaseModel):
    error: str = Field(description="Why the image is not a usable radiograph, as in the column reason of cxr predict.")
    content: Literal["text", "unknown"] | None = CONTENT


class Prediction(BaseModel):
    probability: float = Field(description="P(finding) of the ensemble, recalibrated, at the prevalence of the answer.")
    label: int = Field(description="1 if the probability is at least the threshold, else 0.")
    class_name: str = Field(serialization_alias="class", description="Name of the class of the label.")
    agreement: float = Field(description="Share of the members whose own label is the ensemble's label.")
    members: dict[str, float] = Field(
        description="P(finding) of each member by name, on the scale of `probability` and `threshold`."
    )
    width: int = Field(description="Of the upright radiograph, pixels.")
    height: int = Field(description="Of the upright radiograph, pixels.")
    image: str = Field(
        "",
        description="With heatmap=true: the upright radiograph, its longer edge at most 1024 pixels, as PNG in base64.",
    )
    heatmap: str = Field(
        "",
        description="With heatmap=true: Grad-CAM, the regions that contributed to the label, as a transparent PNG in "
        "base64, to be laid over `image`.",
    )


class ModelVersion(BaseModel):
    model: str = Field(description="Name of the registered model, or models/.")
    version: str = Field(description="Number of the registered version, or name of the model in models/.")
    threshold: float = Field(description="Probability from which the label is 1, the operating point at `prevalence`.")
    prevalence: float | None = Field(
        description="Share of positives for which the probabilities are calibrated; null if they are not calibrated."
    )


class Predictions(ModelVersion):
    predictions: list[Prediction | UnusableImage] = Field(description="In the order of the images.")


class ModelLimits(BaseModel):
    bytes: int = Field(description="Of the body of a request; JSON may have a quarter.")
    pixels: int = Field(description="Of a radiograph.")
    images: int = Field(description="Of a request.")
    seconds: float = Field(description="For decoding a radiograph, and until the body of a request begins to come.")


class ModelAnswer(ModelVersion):
    finding: str = Field(description="What the probability is of.")
    classes: list[str] = Field(description="Names of the labels 0 and 1.")
    members: list[str] = Field(description="Names of the ensemble's members.")
    image_size: int = Field(description="Edge of the square that the networks get, pixels.")
    limits: ModelLimits
    card_html: str = Field(description="Model card with limitations and intended use, as HTML.")
    follows: str | None = Field(description="Alias in the registry that is followed; null if the version is fixed.")
    poll_seconds: float | None = Field(description="Seconds between two looks at the alias.")


class ReadyAnswer(BaseModel):
    status: str = Field(description="ready or not ready.")
    version: str = Field(description="Of the model that answers.")
    registry: str = Field(description="ok, or failing: then the last model that could be loaded answers.")


class PredictQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prevalence: float | None = Field(
        None,
        ge=0.0001,
        le=0.9999,
        description="Share of positives for which the answer is to be calibrated; the threshold moves with it.",
    )
    heatmap: bool = Field(False, description="Whether to explain the label with a heatmap; for one image only.")


ERRORS = {
    400: "A wrong parameter, or a body that is not as described.",
    403: "Sent by another web site.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    415: "A body of another kind, such as a form.",
    421: "The header Host has a name under which this server is not known.",
    422: "Not a usable radiograph, with the reason.",
    503: "Too much is waiting; Retry-After says when to send it again.",
}
BINARY = {"type": "string", "format": "binary"}
BODY = {
    "required": True,
    "description": "One image file as it is (DICOM, PNG, JPEG, TIFF, …), or JSON with several in base64.",
    "content": {
        "application/octet-stream": {"schema": BINARY},
        "application/dicom": {"schema": BINARY},
        "image/*": {"schema": BINARY},
        "application/json": {
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "required": ["images"],
                "properties": {
                    "images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "byte"}}
                },
            }
        },
    },
}  # fmt: skip


class Service:
    """What answers requests: the model, the decoders and the thread that predicts."""

    def __init__(self, follower: ModelFollower, decoders: DecoderPool, predictor: Predictor, limits: Limits) -> None:
        self.follower, self.decoders, self.predictor, self.limits = follower, decoders, predictor, limits
        self.in_flight = InFlight(limits)
        self.metrics = Metrics(
            {
                "images_to_decode": ("Images that wait for a decoder.", lambda: decoders.waiting),
                "images_to_predict": ("Decoded images that wait for the model.", lambda: predictor.waiting),
                "images_in_flight": (
                    "Images that are not yet answered; one with a heatmap counts as several.",
                    lambda: self.in_flight.images,
                ),
                "bytes_in_flight": ("Bytes of request bodies in memory.", lambda: self.in_flight.bytes),
            },
            [follower.changes, follower.failures, predictor.unlogged],
        )

    async def describe_model(self) -> ModelAnswer:
        served, candidate = self.follower.current, self.follower.current.candidate
        return ModelAnswer(
            model=served.model,
            version=served.version,
            finding=candidate.finding.name,
            classes=list(candidate.finding.class_names),
            members=list(candidate.members),
            threshold=candidate.config.threshold_probability,
            prevalence=candidate.config.prevalence,
            image_size=candidate.packed_size,
            limits=ModelLimits(
                bytes=self.limits.body_bytes,
                pixels=image_checks.MAX_PIXELS,
                images=self.limits.images,
                seconds=self.limits.timeout,
            ),
            card_html=served.card_html,
            follows=self.follower.alias,
            poll_seconds=self.follower.poll_seconds if self.follower.alias else None,
        )

    async def predict(self, request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
        """Send one image file as the body, or JSON with several in base64: each has a prediction or an error then."""
        served = self.follower.current
        prior, threshold = served.candidate.config.prevalence, served.candidate.config.threshold_probability
        if query.prevalence is not None:
            if prior is None:
                raise RequestError(400, "prevalence: the probabilities of this model are not calibrated")
            threshold = float(change_prevalence(np.array([threshold]), prior, query.prevalence)[0])
        is_json = _is_json(request)
        if is_json and query.heatmap:
            raise RequestError(400, "heatmap: only for one image that is sent as it is, not in JSON")
        with self.in_flight.hold() as hold:
            images = await _read_images(request, self.limits, hold, is_json=is_json)
            hold(0, HEATMAP_COST if query.heatmap else len(images))
            predictions = await _while_connected(request, self._classify_all(served, images, query))
        if not is_json and isinstance(predictions[0], UnusableImage):
            reason = predictions[0].model_dump(exclude_unset=True)
            return JSONResponse({"detail": reason.pop("error"), **reason}, 422)
        answer = Predictions(
            model=served.model,
            version=served.version,
            threshold=threshold,
            prevalence=prior if query.prevalence is None else query.prevalence,
            predictions=predictions,
        )
        text = answer.model_dump_json(by_alias=True, exclude_unset=True)
        return Response(text, media_type="application/json", headers={VERSION_HEADER: served.version})

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def ready(self, response: Response) -> ReadyAnswer:
        is_ready = self.decoders.is_ready and self.predictor.is_alive
        response.status_code = 200 if is_ready else 503
        return ReadyAnswer(
            status="ready" if is_ready else "not ready",
            version=self.follower.current.version,
            registry="failing" if self.follower.error else "ok",
        )

    async def read_metrics(self) -> Response:
        return Response(self.metrics.format(self.follower.current), media_type=CONTENT_TYPE_LATEST)

    async def _classify_all(
        self, model: ServedModel, images: Sequence[bytes | bytearray | UnusableError], query: PredictQuery
    ) -> list[Prediction | UnusableImage]:
        return await asyncio.gather(*(self._classify(model, image, query) for image in images))

    async def _classify(
        self, model: ServedModel, data: bytes | bytearray | UnusableError, query: PredictQuery
    ) -> Prediction | UnusableImage:
        if isinstance(data, UnusableError):
            return UnusableImage(error=str(data))
        candidate = model.candidate
        try:
            image = await asyncio.wrap_future(
                self.decoders.decode(data, candidate.packed_size, candidate.resize, with_preview=query.heatmap)
            )
        except UnusableError as error:
            self.metrics.images.labels(error.outcome if isinstance(error, DecoderError) else "unusable").inc()
            return _unusable_image(str(error), data)
        row = await asyncio.wrap_future(self.predictor.predict(model, image))
        self.metrics.images.labels("classified").inc()
        prediction = _prediction(model, image, row, query.prevalence)
        if query.heatmap:
            heatmap = await asyncio.wrap_future(self.predictor.explain(model, image, prediction.label))
            prediction.image = base64.b64encode(image.preview).decode()
            png = await asyncio.to_thread(explain.heatmap_png, heatmap, _size(image.preview), candidate.resize)
            prediction.heatmap = base64.b64encode(png).decode()
        return prediction


def create_app(service: Service, hosts: Collection[str]) -> Guard:
    """Make the ASGI app; `hosts` are the names under which it is served."""
    app = FastAPI(
        title="cxr serve",
        version=metadata.version("covid-xray"),
        description="Classifies chest radiographs. For research, not for diagnosis. Nothing that is sent is kept.",
        docs_url=None,  # those pages load scripts from another server
        redoc_url=None,
    )
    for error, handler in ERROR_HANDLERS.items():
        app.add_exception_handler(error, handler)
    app.add_api_route("/v1/model", service.describe_model, tags=["model"], summary="What the model is")
    app.add_api_route(
        "/v1/predict",
        service.predict,
        methods=["POST"],
        tags=["predictions"],
        summary="Classify a radiograph, or several",
        response_model=Predictions,
        responses={status: {"description": text, "model": ErrorAnswer} for status, text in ERRORS.items()},
        openapi_extra={"requestBody": BODY},
    )
    app.add_api_route("/health", service.health, tags=["operation"], summary="Whether the process answers")
    app.add_api_route(
        "/ready",
        service.ready,
        tags=["operation"],
        summary="Whether images are classified",
        responses={503: {"description": "No decoder runs, or nothing predicts.", "model": ReadyAnswer}},
    )
    app.add_api_route(
        "/metrics",
        service.read_metrics,
        tags=["operation"],
        summary="Metrics for Prometheus",
        response_class=PlainTextResponse,
    )
    app.add_api_route("/", _page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=PAGE))
    return Guard(app, hosts, service.follower, service.metrics)


async def _page() -> FileResponse:
    return FileResponse(PAGE / "index.html")


async def _answer_error(_request: Request, error: Exception) -> Response:
    """Answer an error that a client can cause; it tells nothing about this machine."""
    match error:
        case RequestError():
            headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
            return JSONResponse({"detail": error.detail}, error.status, headers)
        case RequestValidationError():
            wrong = [f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()]
            return JSONResponse({"detail": "; ".join(wrong)}, 400)
        case _:  # the client has gone, and reads no answer
            return Response(status_code=499)


ERROR_HANDLERS = dict.fromkeys([RequestError, RequestValidationError, ClientDisconnect], _answer_error)


def _is_json(request: Request) -> bool:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.startswith("multipart/") or request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(415, "send the file itself as the body, as in: curl --data-binary @x.dcm")
    return media_type == "application/json"


async def _read_images(
    request: Request, limits: Limits, hold: Hold, *, is_json: bool
) -> Sequence[bytes | bytearray | UnusableError]:
    if not is_json:
        return [await read_body(request, limits.body_bytes, limits.timeout, hold)]
    body = await read_body(request, limits.json_bytes, limits.timeout, hold)
    hold(JSON_COPIES * len(body), 0)
    return await asyncio.to_thread(parse_images, body, limits.images)


async def _while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for the work, and cancel it if the client goes away or it takes too long."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait([task, disconnect], timeout=REQUEST_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect if disconnect.done() else busy_error()
    finally:
        task.cancel()
        disconnect.cancel()
        del task  # or its exception would keep it, and the body, until the next garbage collection


def _unusable_image(reason: str, data: bytes | bytearray) -> UnusableImage:
    if data and not reason.startswith(NO_IMAGE):
        return UnusableImage(error=reason)
    return UnusableImage(error=reason, content="text" if is_text(data, reason) else "unknown")


def _prediction(model: ServedModel, image: DecodedImage, row: dict[Any, Any], prevalence: float | None) -> Prediction:
    config, label = model.candidate.config, int(row["label"])
    scores = np.array([row[name] for name in config.members])
    probabilities = np.append(config.recalibrate(scores), row["probability"])
    if prevalence is not None and config.prevalence is not None:
        probabilities = change_prevalence(probabilities, config.prevalence, prevalence)
    *members, probability = probabilities.tolist()
    return Prediction(
        probability=probability,
        label=label,
        class_name=model.candidate.finding.class_names[label],
        agreement=row["agreement"],
        members=dict(zip(config.members, members, strict=True)),
        width=image.width,
        height=image.height,
    )


def _size(png: bytes) -> tuple[int, int]:
    """Return width and height of a PNG, which are at a fixed place."""
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
