// The HTTP API of the server that sent the page.

/** The server is busy; `seconds` is when to ask again. */
export class Busy extends Error {
  constructor(seconds) {
    super("the server is busy");
    this.seconds = seconds;
  }
}

/** The server did not answer, or failed. */
export class Failed extends Error {}

export async function fetchModel() {
  return request("/v1/model", {});
}

/** Classify one image; with `heatmap`, the prediction has `image` and `heatmap` too. */
export async function predict(blob, signal, heatmap = false) {
  const options = { method: "POST", body: blob, signal, headers: { "Content-Type": "application/octet-stream" } };
  const { predictions, ...model } = await request(`/v1/predict${heatmap ? "?heatmap=true" : ""}`, options, blob);
  return { ...model, ...predictions[0] };
}

/** Return the body of the answer; an error of another class says why the image is not usable. */
async function request(url, options, blob) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    await blob?.slice(0, 1).arrayBuffer(); // throws if it is the file that cannot be read
    throw new Failed("no answer from the server");
  }
  if (response.ok) {
    try {
      return await response.json();
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new Failed("no answer from the server"); // cut off, or that of a proxy
    }
  }
  if (response.status === 503) throw new Busy(Math.min(Number(response.headers.get("Retry-After")) || 2, 60));
  const detail = await response.json().then((body) => body.detail, () => "");
  const reason = typeof detail === "string" && detail ? detail : `HTTP ${response.status}`;
  if (response.status === 413 || response.status === 422) throw new Error(reason);
  throw new Failed(`the server failed: ${reason}`);
}
