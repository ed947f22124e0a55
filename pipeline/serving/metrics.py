"""What Prometheus reads at /metrics, with what its client adds of the process."""

from prometheus_client import Counter, Gauge, Histogram, Info

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # bounds of the histogram

REQUESTS = Counter("cxr_requests", "Requests answered, by route and HTTP status.", ["route", "status"])
REQUEST_SECONDS = Histogram("cxr_request_seconds", "Seconds until an answer began.", ["route"], buckets=SECONDS)
IMAGES = Counter(
    "cxr_images",
    "Images by outcome: classified, unusable, timeout (decoding took too long) or crash (of the decoder).",
    ["outcome"],
)
for outcome in ("classified", "unusable", "timeout", "crash"):
    IMAGES.labels(outcome)  # or it would be absent until the first one
UNLOGGED_IMAGES = Counter("cxr_unlogged_images", "Images that could not be logged.")
IMAGES_TO_DECODE = Gauge("cxr_images_to_decode", "Images that wait for a decoder.")
IMAGES_TO_PREDICT = Gauge("cxr_images_to_predict", "Decoded images that wait for the model.")
IMAGES_IN_FLIGHT = Gauge("cxr_images_in_flight", "Images not yet answered; one with a heatmap counts as several.")
BYTES_IN_FLIGHT = Gauge("cxr_bytes_in_flight", "Bytes of request bodies in memory.")
MODEL = Info("cxr_model", "The model that answers.")
MODEL_CHANGES = Counter("cxr_model_changes", "How often another version took over.")
POLL_FAILURES = Counter("cxr_poll_failures", "Failed attempts to follow the registry; the old model answers.")
