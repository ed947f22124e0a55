"""Run every model over every image."""

from pathlib import Path

from stages.common import stage

SOUP = "soup"  # the average of the members' weights


@stage
def evaluate() -> None:
    """Write predictions/ of the models, their average and what needs no radiology, scores and pictures of curves."""
    import numpy as np
    import pandas as pd

    from pipeline.core import memory
    from pipeline.core.config import load_config
    from pipeline.core.errors import UserError
    from pipeline.core.files import write_csv, write_json
    from pipeline.data.dataset import PackedImages
    from pipeline.data.manifest import read_split
    from pipeline.evaluation import curves, ensemble, operating_point, shortcuts
    from pipeline.evaluation.metrics import best_model, score_predictions
    from pipeline.inference.dataset import probability_table
    from pipeline.models import classifier, soup
    from pipeline.training import determinism

    config = load_config()
    params = config.active.evaluate
    if config.active.split.cross_validate:
        raise UserError(
            f"{config.profile}.split.cross_validate: no image validates all seeds, so that they cannot be compared or "
            "combined; their scores are in dvc metrics show. Set it to false to go on"
        )
    determinism.make_deterministic(params.cpu_threads)
    memory.retain_freed_memory()
    device = determinism.select_device()
    folders = {name: Path("models", name) for name in config.model_names}
    networks = {name: classifier.load_classifier(folder, device) for name, folder in folders.items()}
    averaged = [networks[name] for name in config.bag_members]
    no_soup = ensemble.soup_unavailable_reason(
        config.active.weights.source, config.active.train.head_hidden, len(averaged)
    )
    judges = networks if no_soup else {**networks, SOUP: soup.average_weights(averaged)}
    table = read_split(Path("data"))
    used = table[table["subset"].isin(["validation", "test"])]
    pack = PackedImages(Path("data/images.npy"), device)
    found = probability_table(judges, pack, list(used.index), params.batch_size).set_index(used.index)

    judged = used["subset"] == "validation"
    average = used[["subset", "file", "label"]].assign(**{SOUP: np.nan if no_soup else found[SOUP]})
    write_csv(Path("predictions/soup.csv"), average)
    found = found[list(networks)]
    validation = pd.concat([used.loc[judged, ["file", "label"]], found[judged]], axis="columns")
    write_csv(Path("predictions/validation.csv"), validation)
    write_csv(Path("predictions/test.csv"), pd.concat([used.loc[~judged, ["file"]], found[~judged]], axis="columns"))
    shortcut, facts = shortcuts.fit_baselines(table, np.load("data/images.npy", mmap_mode="r"))
    write_csv(Path("predictions/shortcuts.csv"), pd.concat([validation[["file", "label"]], shortcut], axis="columns"))
    write_json(Path("metrics/shortcuts.json"), facts)

    labels, models = validation["label"].to_numpy(dtype=int), found[judged]
    calls = (models >= operating_point.choose_thresholds(labels, models, params)).astype(int)
    scores = {name: score_predictions(labels, models[name].to_numpy(), calls[name].to_numpy()) for name in networks}
    write_json(Path("metrics/evaluate.json"), scores)
    plots, best = Path("plots"), best_model(scores)
    curves.draw_roc(plots / "roc.png", labels, models)
    curves.draw_precision_recall(plots / "precision_recall.png", labels, models)
    curves.draw_confusion_matrix(plots / "confusion.png", labels, calls[best].to_numpy(), f"{best}, validation set")
    curves.draw_learning_curves(
        plots / "training.png", {name: pd.read_csv(folder / "history.csv") for name, folder in folders.items()}
    )


if __name__ == "__main__":
    evaluate()
