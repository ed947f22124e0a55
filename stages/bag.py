"""Combine the models, and say what each of them and the bag is worth."""

from pathlib import Path

from stages.common import stage


@stage
def bag() -> None:
    """Write the bag, the rule of every candidate, their figures with intervals, and the table of all models."""
    from dataclasses import asdict

    import pandas as pd

    from pipeline.core.config import load_config
    from pipeline.core.files import read_csv, read_json, write_csv, write_json
    from pipeline.data import manifest
    from pipeline.evaluation import curves, ensemble, evaluate_models
    from pipeline.evaluation.metrics import score_predictions
    from pipeline.report import model_table

    config = load_config()
    params = config.active.bag
    seeds, members = config.model_names, config.bag_members
    subsets = {subset: read_csv(Path(f"predictions/{subset}.csv")) for subset in ("validation", "test")}
    validation = subsets["validation"]
    labels = validation["label"].to_numpy()

    rules = {
        seed: ensemble.fit_ensemble(labels, validation[[seed]], "mean", "mean", config.active.evaluate)
        for seed in seeds
    }
    bags = {
        way: ensemble.fit_ensemble(labels, validation[members], way, params.tie, config.active.evaluate)
        for way in ensemble.METHODS
    }
    chosen = bags[params.method]
    write_json(ensemble.CANDIDATES, {name: asdict(rule) for name, rule in {**rules, ensemble.BAG: chosen}.items()})

    combined = {}
    for subset, predictions in subsets.items():
        ways = ensemble.combine(predictions, chosen)
        ways["greedy"] = ensemble.combine(predictions, bags["greedy"])["greedy"]
        combined[subset] = pd.concat([predictions.filter(["file", "label"]), ways], axis="columns")
    write_csv(Path("predictions/bag.csv"), pd.concat(combined, names=["subset"]).reset_index("subset"))

    scores = {}
    for way, rule in bags.items():
        answer = ensemble.predict(validation, rule)
        scores[way] = score_predictions(labels, answer["probability"].to_numpy(), answer["label"].to_numpy())
    scores["vote"] |= {"loss": None, "auroc": None, "average_precision": None}
    write_json(Path("metrics/bag.json"), scores)
    singles = read_json(Path("metrics/evaluate.json"))
    shown = {f"bag ({way})": scores[way] for way in dict.fromkeys(["vote", "mean", params.method])}
    model_table.write_table(Path("report"), model_table.build_table({**singles, **shown}))

    answer = ensemble.predict(validation, chosen)
    probability = answer["probability"].to_numpy()
    write_csv(Path("plots/bag_roc.csv"), curves.roc_points(labels, probability))
    write_csv(Path("plots/bag_precision_recall.csv"), curves.precision_recall_points(labels, probability))
    confusion = pd.DataFrame({"actual": labels, "predicted": answer["label"]}).replace({0: "negative", 1: "positive"})
    write_csv(Path("plots/bag_confusion.csv"), confusion)

    facts = manifest.read_split(Path("data")).set_index("file")
    found = evaluate_models.evaluate_models(config, subsets, facts, Path("predictions"), Path("metrics"))
    for path, content in found.tables.items():
        write_csv(Path(path), content)
    write_json(Path("metrics/summary.json"), found.summary)


if __name__ == "__main__":
    bag()
