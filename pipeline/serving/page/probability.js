// Probabilities at other prevalences, their distance to the threshold, and both in words.

const EPS = 1e-7; // as in pipeline/evaluation/calibration.py: keeps log odds finite

/** As `change_prevalence` in pipeline/evaluation/prevalence.py: Bayes' rule under label shift. */
export function changePrevalence(probability, prior, prevalence) {
  const positive = (probability * prevalence) / prior;
  const negative = ((1 - probability) * (1 - prevalence)) / (1 - prior);
  return positive / (positive + negative);
}

export function fromLogOdds(value) {
  return 1 / (1 + Math.exp(-value));
}

export function logOdds(probability) {
  const clipped = Math.min(Math.max(probability, EPS), 1 - EPS);
  return Math.log(clipped / (1 - clipped));
}

/** Distance of a prediction to its threshold in log odds, which no prevalence changes. */
export function distanceToThreshold({ probability, threshold }) {
  return Math.abs(logOdds(probability) - logOdds(threshold));
}

export function describeDistance(prediction) {
  const ratio = Math.exp(distanceToThreshold(prediction));
  const side = prediction.label ? "above" : "below";
  const words = ratio < 2 ? `just ${side}` : ratio < 10 ? side : `far ${side}`;
  if (ratio < 1.05) return { words: `${words} the threshold`, odds: "odds about the threshold’s" };
  const times = ratio > 1000 ? "1000" : ratio.toFixed(ratio < 10 ? 1 : 0);
  const beyond = ratio <= 1000 ? "" : prediction.label ? "over " : "under ";
  const odds = prediction.label ? `${times} times the threshold’s` : `1/${times} of the threshold’s`;
  return { words: `${words} the threshold`, odds: `odds ${beyond}${odds}` };
}

export function formatPercent(value) {
  if (value > 0 && value < 0.001) return "< 0.1 %";
  if (value < 1 && value > 0.999) return "> 99.9 %";
  return `${(100 * value).toFixed(1)} %`;
}

/** A prevalence in percent, to three significant digits from either end. */
export function roundPercent(prevalence) {
  const percent = 100 * Math.min(prevalence, 1 - prevalence);
  const rounded = Number(percent.toPrecision(3));
  return prevalence <= 0.5 ? rounded : Number((100 - rounded).toFixed(6));
}
