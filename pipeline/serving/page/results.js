// Rows of the table of results.

import { changePrevalence, describeDistance, distanceToThreshold, formatPercent, logOdds } from "./probability.js";

export const STRIP_LOG_ODDS = Math.log(1000); // from the threshold to either end of a strip
const THUMBNAIL = 56; // CSS pixels
const MAX_THUMBNAIL_BYTES = 2 ** 25; // of files whose thumbnails are decoded here
const DECODED_HERE = /\.(?:jpe?g|png|gif|bmp|webp|avif)$/i;

/** Create an element with attributes, functions that handle its events, and children. */
export function create(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function createSvg(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** A file's name without the characters that reverse what follows: "gnp.exe" must not look like "exe.png". */
export function displayName(name) {
  return name.replaceAll(/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "");
}

/** What answered: a registered version, or a model in models/. */
export function describeModel({ model, version }) {
  return model === "models/" ? `${version}, from ${model}` : `${model}, version ${version}`;
}

/** Convert a prediction to a prevalence; null, or not calibrated: as the server sent it. */
export function atPrevalence(prediction, prevalence) {
  const prior = prediction.prevalence;
  if (prior === null || prevalence === null || prevalence === prior) return prediction;
  const convert = (probability) => changePrevalence(probability, prior, prevalence);
  const members = Object.entries(prediction.members).map(([name, probability]) => [name, convert(probability)]);
  return {
    ...prediction,
    prevalence,
    probability: convert(prediction.probability),
    threshold: convert(prediction.threshold),
    members: Object.fromEntries(members),
  };
}

export function describeAgreement(prediction) {
  const count = Object.keys(prediction.members).length;
  return count === 1 ? "one member" : `${Math.round(prediction.agreement * count)} of ${count} say ${prediction.class}`;
}

/**
 * A dot per member, filled if its label is positive. The axis is that of log odds, with the threshold in its middle, so
 * that dots are at the same places at every prevalence. It grows upward where dots would cover each other.
 */
export function createStrip({ members, threshold }, width, radius) {
  const middle = width / 2;
  const place = (value) => {
    const share = (logOdds(value) - logOdds(threshold)) / STRIP_LOG_ODDS;
    return middle + Math.max(-1, Math.min(1, share)) * (middle - radius - 1);
  };
  const values = Object.values(members).sort((a, b) => a - b);
  const ends = []; // where each level of dots ends
  const circles = values.map((value) => {
    const cx = place(value);
    const free = ends.findIndex((end) => end <= cx - radius);
    const level = free < 0 ? ends.length : free;
    ends[level] = cx + radius;
    const label = value >= threshold ? "positive" : "negative";
    return createSvg("circle", { class: label, cx, cy: -1 - (2 * level + 1) * radius, r: radius - 0.5 });
  });
  const height = 2 + 2 * radius * Math.max(ends.length, 4);
  const above = values.filter((value) => value >= threshold).length;
  const text =
    `Members’ probabilities from ${formatPercent(values[0])} to ${formatPercent(values.at(-1))}, ` +
    `${above} of ${values.length} at or above the threshold of ${formatPercent(threshold)}`;
  return createSvg(
    "svg",
    { class: "strip", viewBox: `0 ${-height} ${width} ${height + 1}`, role: "img", "aria-label": text },
    createSvg("line", { class: "axis", x1: 1, x2: width - 1, y1: 0, y2: 0 }),
    createSvg("line", { class: "threshold", x1: middle, x2: middle, y1: -height, y2: 0 }),
    ...circles,
  );
}

const ORDERS = {
  uncertain: (row) => distanceToThreshold(row.prediction),
  highest: (row) => -logOdds(row.prediction.probability),
  lowest: (row) => logOdds(row.prediction.probability),
};

const FILTERS = {
  all: () => true,
  positive: (row) => row.prediction?.label === 1,
  negative: (row) => row.prediction?.label === 0,
  disagreement: (row) => row.prediction?.agreement < 1,
  unusable: (row) => row.state === "unusable",
  pending: (row) => !["done", "unusable"].includes(row.state),
};

/** The rows of a kind in an order; those without a prediction come last. */
export function arrange(rows, order, filter) {
  const selected = rows.filter(FILTERS[filter]);
  if (order === "name") return selected.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  if (order === "added") return selected;
  const keys = new Map(selected.map((row) => [row, row.prediction ? ORDERS[order](row) : Infinity]));
  return selected.sort((a, b) => (keys.get(a) === keys.get(b) ? 0 : keys.get(a) - keys.get(b)));
}

const STATES = { waiting: "waiting", sending: "sent, no answer yet" };

/** Create or update the table row of `row`, which keeps it as `row.element`. */
export function render(row, model, prevalence, open) {
  const { element = createRow(row, open) } = row;
  row.element = element;
  const cells = [];
  if (row.state === "done") {
    const prediction = atPrevalence(row.prediction, prevalence);
    const { words, odds } = describeDistance(prediction);
    const members = Object.keys(prediction.members).length > 1 ? [createStrip(prediction, 200, 3)] : [];
    const version = prediction.version === model.version ? [] : [small(describeModel(prediction))];
    cells.push(
      cell("Probability", create("span", { class: "figure" }, formatPercent(prediction.probability)), ...version),
      cell("Label", createLabel(prediction)),
      cell("Distance to the threshold", words, small(odds)),
      cell("Members", ...members, small(describeAgreement(prediction))),
    );
  } else {
    const reason = STATES[row.state] ?? row.reason;
    const heading = { unusable: "Not usable: ", failed: "Not answered: " }[row.state];
    const text = heading ? [create("strong", {}, heading), reason] : [reason];
    cells.push(create("td", { role: "cell", colspan: 4, class: "reason" }, ...text));
  }
  element.className = row.state;
  element.firstChild.querySelector("button").disabled = row.state !== "done";
  while (element.children.length > 1) element.lastChild.remove(); // the first may have the focus
  element.append(...cells);
}

/** The name of the predicted class, with a filled mark for positive and a hollow one for negative. */
export function createLabel(prediction) {
  const mark = create("span", { class: "mark", "aria-hidden": "true" }, prediction.label ? "●" : "○");
  return create("span", { class: prediction.label ? "label positive" : "label negative" }, mark, ` ${prediction.class}`);
}

function createRow(row, open) {
  const format = row.name.match(/\.(\w{1,5})$/)?.[1] ?? "";
  const thumbnail = create("span", { class: "thumbnail", "aria-hidden": "true" }, format);
  const name = create("span", { class: "name" }, displayName(row.name));
  const button = create("button", { type: "button", class: "open", onclick: () => open(row) }, thumbnail, name);
  if (row.open && DECODED_HERE.test(row.name) && row.size <= MAX_THUMBNAIL_BYTES) drawThumbnail(row, thumbnail);
  return create("tr", { role: "row" }, create("th", { role: "rowheader", scope: "row" }, button));
}

let drawing = Promise.resolve(); // one after another: a radiograph takes some 40 MB while it is decoded

function drawThumbnail(row, place) {
  drawing = drawing.then(async () => {
    try {
      const image = await createImageBitmap(await row.open(), { resizeHeight: 2 * THUMBNAIL, resizeQuality: "medium" });
      const canvas = create("canvas", { width: image.width, height: image.height });
      canvas.getContext("2d").drawImage(image, 0, 0);
      image.close();
      place.replaceChildren(canvas);
    } catch {
      // The name of the format stays; what is wrong with the file is the server's to say.
    }
  });
}

function cell(name, ...children) {
  return create("td", { role: "cell", "data-name": name }, ...children);
}

function small(text) {
  return create("small", {}, text);
}
