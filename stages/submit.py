"""Write the competition's submission files."""

from pathlib import Path

from stages.common import stage


@stage
def submit() -> None:
    """Write submissions/best.csv, bag.csv and one file per seed."""
    import pandas as pd

    from pipeline import ensemble, layout, submission
    from pipeline.config import load
    from pipeline.evaluation.metrics import best_model, called
    from pipeline.files import read_json

    sample = layout.read(Path("data/raw.zip")).sample
    test = pd.read_csv("predictions/test.csv", index_col="file")
    bag = pd.read_csv("predictions/bag.csv", index_col="file").query("subset == 'test'")
    labels = {name: called(test[name]) for name in test}
    labels["best"] = labels[best_model(read_json(Path("metrics/evaluate.json")))]
    labels["bag"] = ensemble.labels(bag, load().active.bag.method)
    for name, column in labels.items():
        submission.write(Path(f"submissions/{name}.csv"), column, sample)


if __name__ == "__main__":
    submit()
