"""Hidden sources: clusters of images by how they were acquired and stored, where no column names a source."""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.core.files import atomic_path, write_csv
from pipeline.evaluation.dataset_shift import standardize
from pipeline.evaluation.shortcuts import CHUNK_SIZE, make_thumbnails

MAX_CLUSTERS = 6
MIN_IMAGES = 50  # fewer are not clustered
DARK = 8  # gray levels below it are black borders and masks
NO_CLUSTERS = ""  # the name of the cluster of every image, if there is no structure


def write_acquisition(table: pd.DataFrame, images: np.ndarray) -> None:
    """Write `predictions/acquisition.csv`, `predictions/thumbnails.npy` and `metrics/acquisition.csv`.

    Args:
        table: a row per image of the pack, from `manifest.read_split`.
        images: the pack, uint8 (N, S, S).
    """
    features = compute_features(images, table)
    clusters = cluster_images(features)
    write_csv(
        Path("predictions/acquisition.csv"), features.assign(cluster=clusters).set_index(table["file"]).reset_index()
    )
    write_csv(Path("metrics/acquisition.csv"), describe_clusters(clusters, features, table))
    with atomic_path(Path("predictions/thumbnails.npy")) as temporary, temporary.open("wb") as out:
        np.save(out, make_thumbnails(images, np.arange(len(images))).round().astype(np.uint8))


def load_clusters(folder: Path) -> pd.Series:
    """Return the cluster of every image, indexed by file, from `acquisition.csv`; empty texts if there are none."""
    types = {"file": "str", "cluster": "str"}
    return pd.read_csv(folder / "acquisition.csv", dtype=types, keep_default_na=False).set_index("file")["cluster"]


def compute_features(images: np.ndarray, manifest: pd.DataFrame) -> pd.DataFrame:
    """Compute what the scanner, the software and the file format leave in an image, and little of the patient.

    Args:
        images: the pack, uint8 (N, S, S).
        manifest: (N rows), with `width`, `height`, `bytes` and `jpeg_quantization`.

    Returns:
        A row per image, with the index of the manifest: `size`, `aspect`, `bytes_per_pixel` and `quantization`, as
        logarithms (NaN where unknown), `noise` and `detail`, logarithms of the median and mean absolute Laplacian, and
        `black_border`, the share of the border that is black.
    """
    pixels = manifest["width"].to_numpy(float) * manifest["height"].to_numpy(float)
    quantization = manifest["jpeg_quantization"].to_numpy(float)
    ratios = {
        "size": pixels,
        "aspect": manifest["width"].to_numpy(float) / manifest["height"].to_numpy(float),
        "bytes_per_pixel": manifest["bytes"].to_numpy(float) / pixels,
        "quantization": np.where(quantization > 0, quantization, np.nan),
    }
    chunks = [_pixel_features(images[start : start + CHUNK_SIZE]) for start in range(0, len(images), CHUNK_SIZE)]
    noise, detail, black_border = np.concatenate(chunks).T if chunks else np.zeros((3, 0))
    columns = {name: np.log(values) for name, values in ratios.items()}
    return pd.DataFrame(
        columns | {"noise": noise, "detail": detail, "black_border": black_border}, index=manifest.index
    )


def cluster_images(features: pd.DataFrame) -> np.ndarray:
    """Cluster images with a mixture of normal distributions, whose number is that of the lowest BIC (Schwarz 1978).

    Args:
        features: a row per image, from `compute_features`.

    Returns:
        (N,), `1` to at most `MAX_CLUSTERS`, the largest cluster first; `NO_CLUSTERS` for all images if one normal
        distribution is the best model, or if there are fewer than `MIN_IMAGES` images.
    """
    from sklearn.mixture import GaussianMixture

    scaled = standardize(features.to_numpy())
    scaled = scaled[:, scaled.any(axis=0)]
    none = np.full(len(features), NO_CLUSTERS, dtype=object)
    if len(scaled) < MIN_IMAGES or not scaled.shape[1]:
        return none
    mixtures = [
        GaussianMixture(count, reg_covar=1e-2, n_init=2, random_state=0).fit(scaled)
        for count in range(1, MAX_CLUSTERS + 1)
    ]
    best = min(mixtures, key=lambda mixture: mixture.bic(scaled))
    if best.n_components == 1:
        return none
    index = best.predict(scaled)
    counts = np.bincount(index, minlength=best.n_components)
    rank = np.argsort(np.argsort(-counts, kind="stable"))
    return np.array([str(rank[cluster] + 1) for cluster in index], dtype=object)


def describe_clusters(clusters: np.ndarray, features: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Describe every cluster: where the label and the cluster coincide, a model may have learned the cluster.

    Args:
        clusters: (N,), from `cluster_images`.
        features: (N rows).
        table: (N rows), with `label`, missing in the test set, `group` and `subset`.

    Returns:
        A row per cluster, none if none was found: `cluster`, its `name`, such as `1 (low noise)`, numbers of `labeled`,
        `positive` and `test` images and of `positive_groups` and `negative_groups`, the share of `positives`, and
        `auroc`, that of the clusters' shares of positives as a score for the label: 0.5 if they tell nothing.
    """
    columns = ["cluster", "name", "labeled", "positive", "test", "positive_groups", "negative_groups", "positives"]
    if (clusters == NO_CLUSTERS).all():
        return pd.DataFrame(columns=[*columns, "auroc"])
    labels = table["label"].astype("Float64").to_numpy(float, na_value=np.nan)
    is_test, groups = table["subset"].eq("test").to_numpy(), table["group"].to_numpy()
    is_labeled = ~is_test & np.isfinite(labels)
    scaled, rows = standardize(features.to_numpy()), []
    for cluster in np.unique(clusters):
        inside = clusters == cluster
        labeled, means = inside & is_labeled, scaled[inside].mean(axis=0)
        feature = int(np.abs(means).argmax())
        level = "high" if means[feature] > 0 else "low"
        rows.append({
            "cluster": cluster, "name": f"{cluster} ({level} {features.columns[feature].replace('_', ' ')})",
            "labeled": int(labeled.sum()), "positive": int((labeled & (labels == 1)).sum()),
            "test": int((inside & is_test).sum()),
            "positive_groups": len(np.unique(groups[labeled & (labels == 1)])),
            "negative_groups": len(np.unique(groups[labeled & (labels == 0)])),
            "positives": float(labels[labeled].mean()) if labeled.any() else np.nan,
        })  # fmt: skip
    clusters_table = pd.DataFrame(rows)
    positive, negative = clusters_table["positive"], clusters_table["labeled"] - clusters_table["positive"]
    shares = clusters_table["positives"].to_numpy()
    wins = (shares[:, None] > shares[None]) + 0.5 * (shares[:, None] == shares[None])
    pairs = float(positive.sum() * negative.sum())
    auroc = float(positive.to_numpy() @ wins @ negative.to_numpy()) / pairs if pairs else np.nan
    return clusters_table.assign(auroc=auroc)


def _pixel_features(images: np.ndarray) -> np.ndarray:
    """Return noise, detail and black border of images (N, S, S), uint8: (N, 3)."""
    pixels = images.astype(np.int16)
    laplacian = np.abs(
        4 * pixels[:, 1:-1, 1:-1]
        - pixels[:, :-2, 1:-1]
        - pixels[:, 2:, 1:-1]
        - pixels[:, 1:-1, :-2]
        - pixels[:, 1:-1, 2:]
    )
    width = max(images.shape[-1] // 50, 1)
    border = np.ones(images.shape[1:], dtype=bool)
    border[width:-width, width:-width] = False
    noise, detail = (
        np.log(values + 0.5) for values in (np.median(laplacian, axis=(1, 2)), laplacian.mean(axis=(1, 2)))
    )
    return np.stack([noise, detail, (images[:, border] < DARK).mean(axis=1)], axis=1)
