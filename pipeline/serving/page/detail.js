// The dialog with one radiograph: its heatmap, and what each member says.

import { Busy, predict } from "./api.js";
import { describeError, formatBytes } from "./files.js";
import { describeDistance, formatPercent, fromLogOdds, logOdds } from "./probability.js";
import * as results from "./results.js";

const { create, displayName } = results;

const byId = (id) => document.getElementById(id);

export class Detail {
  #rows = [];
  #row = null;
  #finding = "";
  #prevalence = null;
  #loading = new AbortController();

  /** `onAnswer` is called with each answer of the server. */
  constructor(onAnswer) {
    this.onAnswer = onAnswer;
    byId("close").onclick = () => byId("detail").close();
    byId("previous").onclick = () => this.#move(-1);
    byId("next").onclick = () => this.#move(1);
    byId("image-retry").onclick = () => this.#load();
    byId("opacity").oninput = () => this.#setOpacity();
    byId("detail").onclose = () => {
      this.#loading.abort();
      byId("image").replaceChildren();
      const button = this.#row.element?.querySelector("button"); // none while the row is beyond those shown
      (button?.isConnected ? button : byId("results-heading")).focus();
    };
    byId("detail").onkeydown = (event) => {
      if (event.target === byId("opacity") || event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "ArrowLeft") this.#move(-1);
      if (event.key === "ArrowRight") this.#move(1);
    };
  }

  /** Open on a row; `rows` are those that Previous and Next go through; see `atPrevalence`. */
  open(row, rows, finding, prevalence) {
    [this.#rows, this.#finding, this.#prevalence] = [rows, finding, prevalence];
    byId("detail").showModal();
    this.#show(row);
    byId("detail-heading").focus();
  }

  #move(step) {
    const row = this.#rows[this.#rows.indexOf(this.#row) + step];
    if (!row) return;
    this.#show(row);
    byId("detail-heading").focus();
    byId("detail").scrollTop = 0;
  }

  #show(row) {
    this.#row = row;
    const prediction = results.atPrevalence(row.prediction, this.#prevalence);
    const index = this.#rows.indexOf(row);
    const { words, odds } = describeDistance(prediction);
    byId("previous").disabled = index <= 0;
    byId("next").disabled = index === this.#rows.length - 1;
    byId("detail-heading").textContent = displayName(row.name);
    byId("detail-probability").textContent = formatPercent(prediction.probability);
    byId("detail-label").replaceChildren(results.createLabel(prediction));
    const sentence = `${words[0].toUpperCase()}${words.slice(1)} of ${formatPercent(prediction.threshold)} (${odds})`;
    byId("detail-certainty").textContent = `${sentence}; ${results.describeAgreement(prediction)}.`;
    byId("detail-members").replaceChildren(...this.#createMembers(prediction));
    const facts = [
      ["probability of", this.#finding],
      ["prevalence", prediction.prevalence === null ? "not calibrated" : formatPercent(prediction.prevalence)],
      ["model", results.describeModel(prediction)],
      ["image", `${prediction.width} × ${prediction.height} pixels, ${formatBytes(row.size)}`],
    ];
    byId("detail-facts").replaceChildren(...createFacts(facts));
    this.#load();
  }

  #createMembers(prediction) {
    const members = Object.entries(prediction.members).sort((a, b) => b[1] - a[1]);
    if (members.length === 1) return [];
    const rows = members.map(([name, probability]) =>
      create(
        "tr",
        {},
        create("th", { scope: "row" }, name),
        create("td", {}, formatPercent(probability)),
        create("td", {}, probability >= prediction.threshold ? "● positive" : "○ negative"),
      ),
    );
    const headings = ["member", "probability", "label"].map((text) => create("th", { scope: "col" }, text));
    const table = create("table", {}, create("thead", {}, create("tr", {}, ...headings)), create("tbody", {}, ...rows));
    const ticks = [-1, 0, 1].map((end) => {
      const value = fromLogOdds(logOdds(prediction.threshold) + end * results.STRIP_LOG_ODDS);
      return create("span", {}, formatPercent(value));
    });
    const scale = create("p", { class: "scale", "aria-hidden": "true" }, ...ticks);
    const key =
      "A dot per member: ● label positive, ○ label negative; the line is the threshold. " +
      "The axis is in log odds, from 1/1000 of the threshold’s odds to 1000 times as high.";
    return [
      create("h3", {}, "Members"),
      results.createStrip(prediction, 320, 5),
      scale,
      create("p", { class: "muted" }, key),
      create("details", {}, create("summary", {}, "Probability of each member"), table),
    ];
  }

  /** Fetch the heatmap: the file is sent again, because the server keeps none. */
  async #load() {
    this.#loading.abort();
    this.#loading = new AbortController();
    const [row, signal] = [this.#row, this.#loading.signal];
    byId("image").replaceChildren();
    byId("image-retry").hidden = byId("opacity-field").hidden = true;
    byId("image-status").textContent = "Computing the heatmap …";
    try {
      const answer = await predict(await row.open(), signal, true);
      if (signal.aborted) return;
      const png = (data) => `data:image/png;base64,${data}`;
      const image = create("img", { alt: `Radiograph ${displayName(row.name)}`, src: png(answer.image) });
      const alt = "Heat map, laid over the radiograph";
      const heatmap = create("img", { id: "heatmap", alt, src: png(answer.heatmap) });
      byId("image").replaceChildren(image, heatmap);
      byId("opacity-field").hidden = false;
      this.#setOpacity();
      byId("image-status").textContent =
        answer.version === row.prediction.version
          ? ""
          : `The heatmap is of version ${answer.version}; the prediction is of version ${row.prediction.version}.`;
      this.onAnswer(answer);
    } catch (error) {
      if (signal.aborted) return;
      const reason = error instanceof Busy ? `${error.message}; try again later` : describeError(error);
      byId("image-status").textContent = `No heatmap: ${reason}`;
      byId("image-retry").hidden = false;
    }
  }

  #setOpacity() {
    const value = byId("opacity").value;
    byId("opacity-value").textContent = `${value} %`;
    byId("opacity").setAttribute("aria-valuetext", `${value} %`);
    const heatmap = byId("heatmap");
    if (heatmap) heatmap.style.opacity = value / 100;
  }
}

/** Terms and descriptions for a `dl`. */
export function createFacts(facts) {
  return facts.map(([term, text]) => create("div", {}, create("dt", {}, term), create("dd", {}, text)));
}
