// The HTTP API of the server that sent the page.

/** The server is busy; `seconds` is when to ask again. */
export class Busy extends Error {
  constructor(seconds) {
    super("the server is busy");
    this.seconds = seconds;
  }
}

/** The image is not usable; the message is the reason. */
export class Unusable extends Error {}

/** The server did not answer, or failed. */
export class Failed extends Error {}

export async function fetchModel() {
  return (await request("/v1/model", {})).json();
}

/** Classify one image; with `heatmap`, the prediction has `image` and `heatmap` too. */
export async function predict(blob, signal, heatmap = false) {
  const options = { method: "POST", body: blob, signal, headers: { "Content-Type": "application/octet-stream" } };
  const answer = await (await request(`/v1/predict${heatmap ? "?heatmap=true" : ""}`, options, blob)).json();
  const { predictions, ...model } = answer;
  return { ...model, ...predictions[0] };
}

async function request(url, options, blob) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    await blob?.slice(0, 1).arrayBuffer(); // throws if it is the file that cannot be read
    throw new Failed("no answer from the server");
  }
  if (response.ok) return response;
  if (response.status === 503) throw new Busy(Math.min(Number(response.headers.get("Retry-After")) || 2, 60));
  const detail = await response.json().then((body) => body.detail, () => "");
  const reason = typeof detail === "string" && detail ? detail : `HTTP ${response.status}`;
  if (response.status === 413 || response.status === 422) throw new Unusable(reason);
  throw new Failed(`the server failed: ${reason}`);
}
