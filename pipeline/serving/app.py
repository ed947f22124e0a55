"""The HTTP API: the page, what the model is, and predictions of radiographs."""

import asyncio
import base64
import io
from collections.abc import Awaitable, Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from pipeline.core.config import Resize
from pipeline.data import image_checks
from pipeline.data.dicom import NO_IMAGE
from pipeline.data.image_checks import UnusableError
from pipeline.inference import explain
from pipeline.inference.decoding import DecodedImage
from pipeline.inference.files import convert_to_prevalence, is_text
from pipeline.serving import metrics
from pipeline.serving.decoders import DecoderError, DecoderPool
from pipeline.serving.guard import VERSION_HEADER, Guard
from pipeline.serving.limits import (
    HEATMAP_COST,
    JSON_COPIES,
    Hold,
    InFlight,
    Limits,
    busy_error,
    parse_images,
    read_body,
)
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
        metrics.IMAGES_TO_DECODE.set_function(lambda: decoders.waiting)
        metrics.IMAGES_TO_PREDICT.set_function(lambda: predictor.waiting)
        metrics.IMAGES_IN_FLIGHT.set_function(lambda: self.in_flight.images)
        metrics.BYTES_IN_FLIGHT.set_function(lambda: self.in_flight.bytes)

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
        served, is_json = self.follower.current, _is_json(request)
        config = served.candidate.config
        if query.prevalence is not None and config.prevalence is None:
            raise HTTPException(400, "prevalence: the probabilities of this model are not calibrated")
        if is_json and query.heatmap:
            raise HTTPException(400, "heatmap: only for one image that is sent as it is, not in JSON")
        with self.in_flight.hold() as hold:
            images = await _read_images(request, self.limits, hold, is_json=is_json)
            hold(0, HEATMAP_COST if query.heatmap else len(images))
            predictions = await _while_connected(request, self._classify_all(served, images, query))
        if not is_json and isinstance(predictions[0], UnusableImage):
            reason = predictions[0].model_dump(exclude_unset=True)
            return JSONResponse({"detail": reason.pop("error"), **reason}, 422)
        (threshold,) = convert_to_prevalence(np.array([config.threshold_probability]), config, query.prevalence)
        answer = Predictions(
            model=served.model,
            version=served.version,
            threshold=threshold,
            prevalence=config.prevalence if query.prevalence is None else query.prevalence,
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
        served = self.follower.current
        metrics.MODEL.info({"model": served.model, "version": served.version})
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def _classify_all(
        self, model: ServedModel, images: Sequence[bytes | bytearray | UnusableError], query: PredictQuery
    ) -> list[Prediction | UnusableImage]:
        return await asyncio.gather(*(self._classify(model, image, query) for image in images))

    async def _classify(
        self, model: ServedModel, data: bytes | bytearray | UnusableError, query: PredictQuery
    ) -> Prediction | UnusableImage:
        if isinstance(data, UnusableError):
            metrics.IMAGES.labels("unusable").inc()
            return UnusableImage(error=str(data))
        candidate = model.candidate
        try:
            image = await asyncio.wrap_future(
                self.decoders.decode(data, candidate.packed_size, candidate.resize, with_preview=query.heatmap)
            )
        except UnusableError as error:
            metrics.IMAGES.labels(error.outcome if isinstance(error, DecoderError) else "unusable").inc()
            return _unusable_image(str(error), data)
        row = await asyncio.wrap_future(self.predictor.predict(model, image))
        metrics.IMAGES.labels("classified").inc()
        prediction = _prediction(model, image, row, query.prevalence)
        if query.heatmap:
            heatmap = await asyncio.wrap_future(self.predictor.explain(model, image, prediction.label))
            pictures = await asyncio.to_thread(_encode_pictures, image.preview, heatmap, candidate.resize)
            prediction.image, prediction.heatmap = pictures
        return prediction


def create_app(service: Service, hosts: Collection[str]) -> Guard:
    """Make the ASGI app; `hosts` are the names under which it is served."""
    app = FastAPI(
        title="cxr serve",
        version=metadata.version("covid-xray"),
        description="Classifies chest radiographs. For research, not for diagnosis. Nothing that is sent is kept.",
        docs_url=None,  # those pages load scripts from another server
        redoc_url=None,
        exception_handlers={RequestValidationError: _answer_wrong_parameter, ClientDisconnect: _answer_nobody},
    )
    app.add_api_route("/v1/model", service.describe_model, summary="What the model is")
    app.add_api_route(
        "/v1/predict",
        service.predict,
        methods=["POST"],
        summary="Classify a radiograph, or several",
        response_model=Predictions,
        responses={status: {"description": text, "model": ErrorAnswer} for status, text in ERRORS.items()},
        openapi_extra={"requestBody": BODY},
    )
    app.add_api_route("/health", service.health, summary="Whether the process answers")
    not_ready = {"description": "No decoder runs, or nothing predicts.", "model": ReadyAnswer}
    app.add_api_route("/ready", service.ready, summary="Whether images are classified", responses={503: not_ready})
    app.add_api_route(
        "/metrics", service.read_metrics, summary="Metrics for Prometheus", response_class=PlainTextResponse
    )
    app.add_api_route("/", _page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=PAGE))
    return Guard(app, hosts, service.follower)


async def _page() -> FileResponse:
    return FileResponse(PAGE / "index.html")


async def _answer_wrong_parameter(_request: Request, error: RequestValidationError) -> Response:
    wrong = [f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()]
    return JSONResponse({"detail": "; ".join(wrong)}, 400)


async def _answer_nobody(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # the client has gone


def _is_json(request: Request) -> bool:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.startswith("multipart/") or request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "send the file itself as the body, as in: curl --data-binary @x.dcm")
    return media_type == "application/json"


async def _read_images(
    request: Request, limits: Limits, hold: Hold, *, is_json: bool
) -> Sequence[bytes | bytearray | UnusableError]:
    body = await read_body(request, limits.json_bytes if is_json else limits.body_bytes, limits.timeout, hold)
    if not is_json:
        return [body]
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
    *members, probability = convert_to_prevalence(probabilities, config, prevalence).tolist()
    return Prediction(
        probability=probability,
        label=label,
        class_name=model.candidate.finding.class_names[label],
        agreement=row["agreement"],
        members=dict(zip(config.members, members, strict=True)),
        width=image.width,
        height=image.height,
    )


def _encode_pictures(preview: np.ndarray, heatmap: np.ndarray, resize: Resize) -> tuple[str, str]:
    """Encode the radiograph and the heatmap as PNGs of the same size in base64."""
    image, stream = Image.fromarray(preview), io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    pngs = stream.getvalue(), explain.heatmap_png(heatmap, image.size, resize)
    return base64.b64encode(pngs[0]).decode(), base64.b64encode(pngs[1]).decode()
