"""How `cxr tune` prunes, in simulated searches whose best recipe is known: ours against two rules without pairing.

Scores of both classes are normal (binormal model). A score is the sum of what is difficult in an image for every
recipe, for one recipe, and for one seed of it; the separation of the classes varies between recipes and between seeds.

python bench/tuning.py [SEARCHES] [PROCESSES]

Rules: `none` trains every seed; `paired` is the project's; `unpooled` is the same with the variance between seeds of
the trial alone; `first seed` stops a trial that is behind the best one after a seed, or after any later one, as
pruners of training curves do. Prints a table per situation: trainings saved; how often the truly best recipe was
pruned; of the pruned trials, the share that is truly no worse than the trial that they were compared with; and the loss
of AUROC of the recipe that is chosen, against the best of the search.
"""

import sys
from multiprocessing import Pool

import numpy as np
import pandas as pd
from scipy.stats import norm

from pipeline.core.markdown import markdown_table
from pipeline.evaluation.compare_recipes import seed_mean_interval
from pipeline.evaluation.metric_tables import Predictions, ValidationSet
from pipeline.evaluation.metrics import apply_threshold
from pipeline.evaluation.paired_pruning import is_worse

SIZES = [(208, 26), (1527, 157)]  # images and positive images
TRIALS, SEEDS, RESAMPLES = 20, 3, 100
BEST_AUROC = 0.955
SPREADS = {"all equal": 0.0, "close": 0.15, "far apart": 0.6}  # mean by which the separation of a recipe is lower
SEED_DEVIATION = 0.1  # of the separation
IMAGE, RECIPE, SEED = 0.6, 0.2, 0.2  # shares of the variance of a score
RULES = ["none", "paired", "unpooled", "first seed"]


def search(task: tuple[int, int, float, int]) -> list[dict[str, float | str]]:
    """Simulate one search with every rule."""
    images, positives, spread, number = task
    rng = np.random.default_rng(number)
    labels = np.arange(images) < positives
    validation = ValidationSet(labels, np.arange(images), RESAMPLES)
    separations = np.sqrt(2) * norm.ppf(BEST_AUROC) - spread * rng.exponential(size=TRIALS)
    true_auroc = norm.cdf(separations / np.sqrt(2))
    difficulty = rng.normal(size=images) * np.sqrt(IMAGE)
    trials = []
    for separation in separations:
        own = difficulty + rng.normal(size=images) * np.sqrt(RECIPE)
        resampled = {}
        for seed in range(SEEDS):
            shift = separation + rng.normal() * SEED_DEVIATION
            scores = norm.cdf(own + rng.normal(size=images) * np.sqrt(SEED) + labels * shift - 1)
            predictions = Predictions(apply_threshold(scores), scores)
            resampled[f"seed-{seed}"] = validation.bootstrap_metrics(predictions)["auroc"]
        trials.append(pd.DataFrame(resampled))
    rows: list[dict[str, float | str]] = []
    for rule in RULES:
        trainings, pruned, no_worse, complete, seed_metrics = 0, list[int](), 0, dict[int, float](), list[pd.Series]()
        for index, trial in enumerate(trials):
            best = max(complete, key=complete.__getitem__) if complete else None
            for count in range(1, SEEDS + 1):
                trainings += 1
                done = trial.iloc[:, :count]
                if best is None or count == SEEDS or rule == "none":
                    continue
                differences = (done - trials[best].iloc[:, :count]).to_numpy()
                if rule == "paired":
                    table = pd.DataFrame([*seed_metrics, done.iloc[0]])
                    worse = is_worse(done, trials[best], table, len(complete))
                elif rule == "unpooled":
                    worse = count > 1 and seed_mean_interval(differences)[1] < 0
                else:
                    worse = differences[0].mean() < 0
                if worse:
                    pruned.append(index)
                    no_worse += bool(true_auroc[index] >= true_auroc[best])
                    break
            else:
                complete[index] = float(trial.iloc[0].mean())
            seed_metrics.append(done.iloc[0])
        chosen = max(complete, key=complete.__getitem__)
        rows.append(
            {
                "rule": rule, "saved": 1 - trainings / (TRIALS * SEEDS),
                "best_pruned": float(int(true_auroc.argmax()) in pruned), "no_worse": no_worse, "count": len(pruned),
                "loss": float(true_auroc.max() - true_auroc[chosen]),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    searches, processes = (int(value) for value in [*sys.argv[1:], *("200", "2")[len(sys.argv) - 1 :]])
    with Pool(processes) as pool:
        for images, positives in SIZES:
            for name, spread in SPREADS.items():
                tasks = [(images, positives, spread, number) for number in range(searches)]
                table = pd.DataFrame([row for rows in pool.imap(search, tasks, 4) for row in rows])
                means = table.groupby("rule", sort=False).mean()
                rows = [
                    [str(rule), f"{row['saved']:.0%}", f"{row['best_pruned']:.1%}",
                     f"{row['no_worse'] / max(row['count'], 1e-9):.1%}", f"{row['loss']:.4f}"]
                    for rule, row in means.iterrows()
                ]  # fmt: skip
                print(f"\n{images} images, {positives} positive, recipes {name}\n")
                headers = ["rule", "trainings saved", "best recipe pruned", "of the pruned, no worse", "loss of AUROC"]
                print(markdown_table(headers, rows), flush=True)


if __name__ == "__main__":
    main()
