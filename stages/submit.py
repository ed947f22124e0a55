"""Write the competition's submission files."""

from pathlib import Path

from stages.common import stage


@stage
def submit() -> None:
    """Write submissions/best.csv, bag.csv, both adapted to the test set's prevalence, and one file per seed."""
    import pandas as pd

    from pipeline import ensemble, layout, submission
    from pipeline.config import load
    from pipeline.evaluation.metrics import best_model, called
    from pipeline.files import read_json

    sample = layout.read(Path("data/raw.zip")).sample
    test, adapted = (pd.read_csv(f"predictions/{name}.csv", index_col="file") for name in ("test", "adapted"))
    config, rules = load(), ensemble.read_rules()
    seeds, members = ([f"seed-{seed}" for seed in numbers] for numbers in (config.seeds, config.members))
    labels = {seed: ensemble.judge(test[[seed]], rules[seed])["label"] for seed in seeds}
    labels["best"] = labels[best_model(read_json(Path("metrics/evaluate.json")))]
    labels["bag"] = ensemble.judge(test[members], rules["bag"])["label"]
    for role in adapted.dropna(axis="columns"):
        labels[f"{role}-adapted"] = called(adapted[role])
    for name, column in labels.items():
        submission.write(Path(f"submissions/{name}.csv"), column, sample)


if __name__ == "__main__":
    submit()
