// The page: takes files, sends them to the server that sent the page, and shows the answers.

import { fetchModel } from "./api.js";
import { toCsv } from "./csv.js";
import { createFacts, Detail } from "./detail.js";
import { chosen, collect, dropped, formatBytes } from "./files.js";
import { changePrevalence, formatPercent, fromLogOdds, logOdds, roundPercent } from "./probability.js";
import { Queue } from "./queue.js";
import { arrange, create, describeModel, render } from "./results.js";

const PAGE_SIZE = 100; // rows of the table at first
const ANNOUNCE_EVERY = 10_000; // milliseconds between announcements of progress
const byId = (id) => document.getElementById(id);

let model = null;
let prevalence = null; // chosen, or null: as calibrated
let isReloading = false; // what the model is
let rows = [];
let shown = PAGE_SIZE;
let skipped = 0; // files that are no images
let collecting = 0; // drops and choices that are still read
let reading = new AbortController(); // which ends that
let drawing = 0; // the timer after which the results are drawn
let run = null; // since when the queue runs, and how many answers there were then
let announced = 0; // when progress was announced last

const queue = new Queue((row) => {
  if (row.prediction) followVersion(row.prediction);
  row.isStale = true;
  draw();
});
const detail = new Detail(followVersion);

async function loadModel() {
  try {
    model = await fetchModel();
  } catch {
    const reload = { type: "button", onclick: () => location.reload() };
    notify("The server does not answer. ", create("button", reload, "Load the page again"));
    return;
  }
  byId("card").innerHTML = model.card_html;
  byId("card-details").hidden = !model.card_html;
  show();
}

/** That for which probabilities are shown; null: as calibrated, if at all. */
function shownPrevalence() {
  return model.prevalence === null ? null : (prevalence ?? model.prevalence);
}

/** Show what the model is, and all rows, at the prevalence. */
function show() {
  const { finding, classes, members, limits } = model;
  const [negative, positive] = classes;
  const shownAt = shownPrevalence();
  const isCalibrated = shownAt !== null;
  const threshold = isCalibrated ? changePrevalence(model.threshold, model.prevalence, shownAt) : model.threshold;
  const operatingPoint =
    `${positive} from a probability of ${formatPercent(threshold)}` +
    (isCalibrated ? ` at a prevalence of ${roundPercent(shownAt)} %` : "");
  byId("model-name").textContent = describeModel(model);
  byId("title").textContent = document.title = `${finding} on chest radiographs`;
  const networks = members.length === 1 ? "A network estimates" : `An ensemble of ${members.length} networks estimates`;
  byId("lead").textContent = `${networks} the probability of ${finding}. The label is ${operatingPoint}, else ${negative}.`;
  byId("privacy").textContent =
    `Files go only to ${location.host}, which keeps no image after its answer. At most ${formatBytes(limits.bytes)} each.`;
  byId("filter").querySelector("[value=positive]").textContent = positive;
  byId("filter").querySelector("[value=negative]").textContent = negative;
  showPrevalence(shownAt);
  const follows = model.follows ? ` (${model.follows}; a new one answers within ${Math.ceil(model.poll_seconds)} s)` : "";
  const facts = [
    ["model", model.model],
    ["version", model.version + follows],
    ["finding", finding],
    ["members", members.length === 1 ? members[0] : `${members.length}: ${members.join(", ")}`],
    ["operating point", operatingPoint],
    ["calibrated for a prevalence of", isCalibrated ? formatPercent(model.prevalence) : "not calibrated"],
    ["input", `resized to ${model.image_size} × ${model.image_size} pixels`],
  ];
  byId("facts").replaceChildren(...createFacts(facts));
  for (const row of rows) row.isStale = true;
  draw();
}

function showPrevalence(value) {
  const isCalibrated = value !== null;
  for (const id of ["prevalence-slider", "prevalence-number", "prevalence-reset"]) byId(id).disabled = !isCalibrated;
  byId("prevalence-text").hidden = !isCalibrated;
  byId("not-calibrated").hidden = isCalibrated;
  if (!isCalibrated) return;
  byId("prevalence-number").value = roundPercent(value);
  byId("prevalence-slider").value = logOdds(value);
  byId("prevalence-slider").setAttribute("aria-valuetext", `${roundPercent(value)} %`);
  byId("prevalence-reset").textContent = `Reset to ${formatPercent(model.prevalence)}`;
}

function setPrevalence(value) {
  prevalence = value;
  show();
}

/** If another version answered than the page was loaded with, load what it is, and say so. */
async function followVersion({ version }) {
  if (!model || version === model.version || isReloading) return;
  const before = model.version;
  isReloading = true;
  await loadModel();
  isReloading = false;
  if (model.version === before) return; // the answer had been on its way
  notify(
    `Version ${model.version} of the model answers now; before, it was version ${before}. ` +
      "Each row is of the version that answered it.",
  );
}

function notify(...content) {
  byId("notice").replaceChildren(create("p", {}, ...content));
  byId("notice").hidden = false;
}

/** Add what was chosen or dropped, file by file as it is read, and send it. */
async function add(items) {
  if (!items.length) return;
  if (!model) await loadModel();
  if (!model) return;
  const { signal } = reading;
  queue.isStopped = false;
  collecting++;
  try {
    for await (const source of collect(items, model.limits.bytes)) {
      if (signal.aborted) break;
      if (source) addRow(source);
      else skipped++;
      draw();
    }
  } finally {
    collecting--;
    draw();
  }
}

function addRow(source) {
  const row = { ...source, state: source.reason ? "unusable" : "waiting", prediction: null, isStale: true };
  rows.push(row);
  if (row.state === "waiting") queue.add([row]);
}

/** Read and send no more. */
function stop() {
  queue.stop();
  reading.abort();
  reading = new AbortController();
}

function draw() {
  drawing ||= setTimeout(() => {
    drawing = 0;
    drawResults();
  }, 100);
}

function openDetail(row) {
  const arranged = arrange(rows, byId("sort").value, byId("filter").value);
  detail.open(row, arranged.filter((one) => one.state === "done"), model.finding, shownPrevalence());
}

function drawResults() {
  byId("results").hidden = !rows.length && !skipped && !collecting;
  if (!model) return;
  const arranged = arrange(rows, byId("sort").value, byId("filter").value);
  const visible = arranged.slice(0, shown);
  for (const row of visible) {
    if (!row.isStale) continue;
    render(row, model, shownPrevalence(), openDetail);
    row.isStale = false;
  }
  const [body, focused] = [byId("rows"), document.activeElement];
  if (visible.length !== body.children.length || visible.some((row, index) => row.element !== body.children[index])) {
    body.replaceChildren(...visible.map((row) => row.element));
    if (body.contains(focused)) focused.focus({ preventScroll: true });
  }
  byId("empty").hidden = visible.length > 0 || !rows.length;
  byId("more").hidden = arranged.length <= shown;
  byId("more").textContent = `Show ${Math.min(PAGE_SIZE, arranged.length - shown)} more of ${arranged.length}`;
  drawProgress(focused);
}

function drawProgress(focused) {
  const count = (state) => rows.reduce((sum, row) => sum + (row.state === state), 0);
  const [done, unusable, failed] = ["done", "unusable", "failed"].map(count);
  const finished = done + unusable;
  const left = rows.length - finished;
  const isRunning = queue.isRunning || collecting > 0;
  byId("progress").max = Math.max(rows.length, 1);
  byId("progress").value = finished;
  byId("progress").hidden = !isRunning && !left;
  byId("stop").hidden = !isRunning;
  byId("retry").hidden = isRunning || !left;
  if (focused.hidden) [byId("stop"), byId("retry"), byId("results-heading")].find((element) => !element.hidden).focus();
  byId("retry").textContent = `Send the remaining ${left}`;
  byId("csv").disabled = !rows.length;
  if (isRunning && !run) {
    run = { since: Date.now(), finished };
    announced = run.since;
  }
  let text = `${finished} of ${rows.length} answered`;
  if (collecting) text += "; reading files …";
  else if (isRunning && queue.busyUntil > Date.now()) text += "; the server is busy, waiting";
  else if (isRunning && finished - run.finished > 5)
    text += `; ${formatDuration((Date.now() - run.since) * (left / (finished - run.finished)))} left`;
  else if (!isRunning && failed) text += `; ${failed} failed: ${rows.find((row) => row.state === "failed").reason}`;
  else if (!isRunning && left) text += "; stopped";
  byId("progress-text").textContent = text;
  const positive = rows.reduce((sum, row) => sum + (row.prediction?.label === 1), 0);
  const counts = [`${positive} ${model.classes[1]}`, `${done - positive} ${model.classes[0]}`];
  if (unusable) counts.push(`${unusable} not usable`);
  if (skipped) counts.push(`${skipped} skipped, no image${skipped === 1 ? "" : "s"}`);
  byId("counts").textContent = counts.join(" · ");
  if (!isRunning && run) announce(`${text}: ${counts.join(", ")}`);
  else if (isRunning && Date.now() - announced > ANNOUNCE_EVERY) announce(text);
  if (!isRunning) run = null;
}

function announce(text) {
  byId("announcement").textContent = text;
  announced = Date.now();
}

function formatDuration(milliseconds) {
  const seconds = Math.ceil(milliseconds / 1000);
  if (seconds < 60) return `${seconds} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function clear() {
  if (rows.length && !confirm(`Clear ${rows.length} files and their predictions from this page?`)) return;
  stop();
  [rows, skipped, shown, run] = [[], 0, PAGE_SIZE, null];
  for (const id of ["rows", "announcement", "notice"]) byId(id).replaceChildren();
  byId("notice").hidden = true;
  draw();
  byId("choose-files").focus();
}

for (const [button, input] of [["choose-files", "files"], ["choose-folder", "folder"]]) {
  byId(button).onclick = () => byId(input).click();
  byId(input).onchange = () => {
    add(chosen(byId(input).files));
    byId(input).value = ""; // so that the same file can be chosen again
  };
}
// Files may be dropped anywhere: beside the field the browser would leave the page.
addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
addEventListener("dragleave", (event) => event.relatedTarget ?? byId("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (!byId("detail").open) add(dropped(event.dataTransfer));
});
byId("prevalence-number").onchange = () => {
  const percent = byId("prevalence-number");
  if (percent.validity.valid && percent.value) setPrevalence(Number(percent.value) / 100);
  else showPrevalence(shownPrevalence());
};
byId("prevalence-slider").oninput = () => {
  setPrevalence(roundPercent(fromLogOdds(byId("prevalence-slider").value)) / 100);
};
byId("prevalence-reset").onclick = () => setPrevalence(null);
byId("stop").onclick = () => {
  if (collecting) notify("The reading was stopped: files that had not been read are not in the table.");
  stop();
  draw();
};
byId("retry").onclick = () => {
  const left = rows.filter((row) => ["waiting", "failed"].includes(row.state));
  for (const row of left) [row.state, row.reason, row.isStale] = ["waiting", "", true];
  queue.isStopped = false;
  queue.add(left);
  draw();
};
byId("csv").onclick = () => {
  const url = URL.createObjectURL(new Blob([toCsv(rows, shownPrevalence(), model)], { type: "text/csv" }));
  create("a", { href: url, download: "predictions.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
};
byId("clear").onclick = clear;
byId("more").onclick = () => {
  const added = shown;
  shown += PAGE_SIZE;
  drawResults();
  const buttons = [...byId("rows").children].slice(added).map((element) => element.querySelector("button"));
  (buttons.find((button) => !button.disabled) ?? byId("results-heading")).focus();
};
for (const id of ["sort", "filter"])
  byId(id).onchange = () => {
    shown = PAGE_SIZE;
    draw();
  };
loadModel();
