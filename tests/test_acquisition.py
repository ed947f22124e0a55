"""Hidden sources: clusters of images by how they were acquired and stored."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from pipeline.evaluation.acquisition import cluster_images, compute_features, describe_clusters


def make_images(rng, count, noise, black):
    images = rng.normal(128, noise, (count, 32, 32)).clip(20, 255).astype(np.uint8)
    images[:, :black] = 0
    return images


@pytest.fixture
def two_scanners():
    rng = np.random.default_rng(0)
    images = np.concatenate([make_images(rng, 60, 4, 0), make_images(rng, 40, 25, 2)])
    size = np.repeat([20000, 40000], [60, 40]) + rng.integers(0, 3000, 100)
    manifest = pd.DataFrame({"width": 512, "height": 512, "bytes": size, "jpeg_quantization": np.nan})
    return images, manifest


def test_two_scanners_are_two_clusters_with_their_label_purity(two_scanners):
    features = compute_features(*two_scanners)
    clusters = cluster_images(features)
    assert adjusted_rand_score(np.repeat([0, 1], [60, 40]), clusters) == 1
    assert list(clusters) == ["1"] * 60 + ["2"] * 40
    labels = pd.array([0] * 60 + [1] * 20 + [None] * 20, dtype="Int64")
    table = pd.DataFrame({"label": labels, "group": np.arange(100) // 2, "subset": ["train"] * 80 + ["test"] * 20})
    described = describe_clusters(clusters, features, table).set_index("cluster")
    assert list(described["labeled"]) == [60, 20]
    assert list(described["test"]) == [0, 20]
    assert list(described["positives"]) == [0, 1]
    assert list(described["positive_groups"]) == [0, 10]
    assert list(described["auroc"]) == [1, 1]
    assert described["name"].str.match(r"[12] \((low|high) [a-z ]+\)").all()


def test_clusters_that_one_feature_sets_apart_have_names_of_their_own():
    clusters, features = np.repeat(["1", "2", "3"], 20), pd.DataFrame({"noise": np.repeat([0.0, 1, 10], 20)})
    table = pd.DataFrame({"label": pd.array([0, 1] * 30, dtype="Int64"), "group": range(60), "subset": "train"})
    names = describe_clusters(clusters, features, table)["name"]
    assert list(names) == ["1 (low noise)", "2 (low noise)", "3 (high noise)"]


def test_features_are_what_they_say(two_scanners):
    images, manifest = two_scanners
    features = compute_features(images, manifest)
    assert features.loc[0, "bytes_per_pixel"] == pytest.approx(np.log(manifest.loc[0, "bytes"] / 512**2))
    assert features["quantization"].isna().all()
    assert (features["aspect"] == 0).all()
    assert (features["noise"][60:].min()) > features["noise"][:60].max()
    assert features.loc[0, "black_border"] == 0
    assert features.loc[60, "black_border"] == pytest.approx(34 / 124)  # of a border one pixel wide
    np.testing.assert_array_equal(compute_features(images[50:], manifest[50:]), features[50:])


def test_without_structure_no_cluster_is_found():
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 4)), columns=list("abcd"))
    clusters = cluster_images(features)
    assert set(clusters) == {""}
    table = pd.DataFrame({"label": pd.array([0, 1] * 100, dtype="Int64"), "group": 0, "subset": "train"})
    assert describe_clusters(clusters, features, table).empty
    assert set(cluster_images(features * 0)) == {""}
    assert set(cluster_images(features[:20])) == {""}
