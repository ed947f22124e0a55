"""Combine the models."""

from pathlib import Path

from stages.common import stage


@stage
def bag() -> None:
    """Write predictions/bag.csv, metrics/bag.json, the bag's curves and the table of all models."""
    import pandas as pd

    from pipeline import ensemble
    from pipeline.config import load
    from pipeline.evaluation import curves
    from pipeline.evaluation.metrics import Scores, score
    from pipeline.files import read_json, write_csv, write_json
    from pipeline.report import table

    config = load()
    params = config.active.bag
    members = [f"seed-{seed}" for seed in config.members]
    subsets = {}
    for subset in ("validation", "test"):
        predictions = pd.read_csv(f"predictions/{subset}.csv")
        combined = ensemble.combine(predictions[members], params.tie)
        subsets[subset] = pd.concat([predictions.filter(["file", "label"]), combined], axis="columns")
    write_csv(Path("predictions/bag.csv"), pd.concat(subsets, names=["subset"]).reset_index("subset"))

    judged = subsets["validation"]
    labels, mean = judged["label"].to_numpy(), judged["mean"].to_numpy()
    vote: Scores = {
        **score(labels, mean, judged["vote"].to_numpy()),
        "loss": None,
        "auroc": None,
        "average_precision": None,
    }
    scores = {"vote": vote, "mean": score(labels, mean)}
    write_json(Path("metrics/bag.json"), scores)
    write_csv(Path("plots/bag_roc.csv"), curves.roc_table(labels, mean))
    write_csv(Path("plots/bag_precision_recall.csv"), curves.precision_recall_table(labels, mean))
    called = ensemble.labels(judged, params.method)
    confusion = pd.DataFrame({"actual": judged["label"], "predicted": called}).replace({0: "negative", 1: "positive"})
    write_csv(Path("plots/bag_confusion.csv"), confusion)
    table.write(
        Path("report"),
        table.tabulate({**read_json(Path("metrics/evaluate.json")), "bag (vote)": vote, "bag (mean)": scores["mean"]}),
    )


if __name__ == "__main__":
    bag()
