// The table as `cxr predict --csv` writes it.

import { changePrevalence } from "./probability.js";

const COLUMNS = ["file", "probability", "label", "reason", "agreement", "model", "version", "threshold", "prevalence"];

/** Write the rows as CSV at a prevalence, see `atPrevalence`. `model` stands in rows without an answer. */
export function toCsv(rows, prevalence, model) {
  const lines = rows.map((row) => {
    const { probability = null, label = null, agreement = null, ...answer } = row.prediction ?? {};
    const by = row.prediction ? answer : model;
    const chosen = by.prevalence === null ? null : (prevalence ?? by.prevalence);
    const convert = (value) =>
      value === null || chosen === by.prevalence ? value : changePrevalence(value, by.prevalence, chosen);
    const reason = ["waiting", "sending"].includes(row.state) ? "not answered" : row.reason;
    const figures = [convert(probability), label, reason, agreement];
    const answered = [by.model, by.version, convert(by.threshold), chosen];
    return [safeName(row.name), ...figures, ...answered].map(format).join(",");
  });
  return [COLUMNS.join(","), ...lines, ""].join("\n");
}

function format(value) {
  if (value === null) return "";
  return typeof value === "number" ? String(Number(value.toPrecision(9))) : quote(value);
}

function quote(text) {
  return /[",;\t\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/**
 * A spreadsheet takes a cell that starts with = + - @ or a tab for a formula, which may send data elsewhere, and quotes
 * do not help. An apostrophe in front would be another name; "./" in front is the same path of the same file. A carriage
 * return, which readers take for the end of a row, is escaped as `cxr predict` does.
 */
function safeName(name) {
  const escaped = name.replaceAll("\r", "\\r");
  return /^[=+\-@\t]/.test(escaped) ? `./${escaped}` : escaped;
}
