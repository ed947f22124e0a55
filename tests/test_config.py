import ast
import copy
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, file_error_message
from dvc.stage import cache as stage_cache
from dvc.utils.hydra import apply_overrides
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import config

config_error = partial(file_error_message, config.load_config)
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())
PROFILES = ["demo", "competition", "competition-strong", "local"]
DOWNLOADS = {"phantom": "demo", "kaggle": "competition", "archive": "local"}  # the profile that has each source
SECTIONS = {name: field.annotation for name, field in config.Profile.model_fields.items() if name != "download"}
SECTIONS |= {source: config.SOURCES[source] for source in DOWNLOADS}
# `source` chooses the section, and `version` is there for DVC: no code reads them.
FIELDS = [
    (section, field) for section, model in SECTIONS.items() for field in model.model_fields
    if section not in DOWNLOADS or field not in ("source", "version")
]  # fmt: skip
DEFAULTS = {
    "finding": {"name": "COVID-19", "positive": None, "negative": "negative", "model_name": None},
    "seeds": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    "archive": {"path": None, "copy_images": True},
    "kaggle": {"competition": None, "dataset": None},
    "covidx": {"path": None, "copy_images": True, "version": None},
    "covid_chestxray": {"path": None, "copy_images": True, "test_share": 0.1},
    "folders": {
        "path": None, "copy_images": True, "positive": [], "negative": [], "ignore": [], "patterns": {},
        "test_share": 0.1,
    },
    "table": {
        "path": None, "copy_images": True, "labels": Path("labels.csv"), "positive": ["1"], "negative": ["0"],
        "test_share": 0.1, "join": [], "patterns": {}, "keep": {}, "separator": None, "ignore": [], "repeated": "error",
        "training_sets": ["train"], "test_sets": ["test"], "test_list": None, "drop_missing": False,
        "columns": {
            "file": "file", "label": "label", "patient": None, "source": None, "view": None, "sex": None,
            "age": None, "license": None, "manufacturer": None, "modality": None, "set": None,
        },
    },
    "phantom": {
        "version": 1, "train": 832, "test": 100, "prevalence": 0.125, "test_prevalence": 0.5, "strength": 2.0,
        "confounding": 0.6, "seed": 1,
    },
    "weights": {"source": "imagenet"},
    "prepare": {"image_size": 160, "resize": "stretch", "max_quarantined": 0.05, "views": None, "excluded_files": []},
    "split": {"folds": 5, "seed": 1, "cross_validate": False, "held_out_source": None},
    "train": {
        "backbone": "timm/tf_efficientnet_lite0", "head_hidden": [], "dropout": 0.2, "image_size": 160,
        "normalization": "imagenet", "intensity_normalization": "none", "lung_crop": False, "border_mask": 0.0,
        "marker_mask": False, "epochs": 8, "frozen_epochs": 1, "keep": "best_f1",
        "early_stopping_patience": None,
        "batch_size": 32, "gradient_accumulation_steps": 1, "sampling": "shuffle", "positive_oversampling": 1.0,
        "class_weights": (1.0, 1.0), "flip": 0.5, "rotation": 0.0, "zoom": 0.0, "shift": 0.0, "gamma_jitter": 0.0,
        "contrast_jitter": 0.0, "noise": 0.0, "min_resolution": 1.0, "min_jpeg_quality": None, "fourier_exchange": 0.0,
        "histogram_exchange": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "mixup_pairing": "any",
        "label_smoothing": 0.0, "group_dro": 0.0, "domain_adversarial": 0.0,
        "optimizer": "adamw", "reset_optimizer_each_epoch": False, "lr": 1e-3, "eps": 1e-8,
        "weight_decay": 0.01, "ema_decay": 0.0, "swa_epochs": 0, "schedule": "cosine", "warmup_epochs": 0.0,
        "feature_views": 0, "feature_maps": 0, "test_time_augmentation": "none", "precision": "float32",
        "channels_last": True, "fused": False, "compile": False, "loader_threads": 1, "cpu_threads": 2,
    },
    "evaluate": {
        "operating_point": "half", "min_sensitivity": 0.9,
        "recalibration": "platt", "expected_prevalence": None, "resamples": 2000,
    },
    "bag": {"method": "mean", "tie": "mean", "members": "all"},
    "promote": {
        "margin": 0.0, "false_promotion_rate": 0.05, "resamples": 2000, "min_sensitivity": 0.5, "min_specificity": 0.5,
        "max_calibration_error": 0.2,
    },
}  # fmt: skip


def locate(path: str) -> tuple[dict, dict, str]:
    """Return a copy of the shipped parameters, the section in it that the dotted path leads to, and the last key."""
    params = section = copy.deepcopy(SHIPPED)
    *parents, last = path.split(".")
    for parent in parents:
        section = section[parent]
    return params, section, last


def set_value(path: str, value: object) -> dict:
    params, section, key = locate(path)
    section[key] = value
    return params


def remove_key(path: str) -> dict:
    params, section, key = locate(path)
    del section[key]
    return params


def rename_key(path: str, new: str) -> dict:
    params, section, key = locate(path)
    section[new] = section.pop(key)
    return params


def write(folder: Path, params: dict) -> Path:
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return path


@pytest.mark.parametrize("profile", PROFILES)
def test_the_shipped_file_loads_for_every_profile(tmp_path, profile):
    loaded = config.load_config(write(tmp_path, set_value("profile", profile)))
    assert loaded.active == loaded.profiles[profile]
    assert loaded.active.train.lr == SHIPPED[profile]["train"]["lr"]
    assert loaded.bag_seeds == list(range(10))
    assert loaded.model_name == f"covid-xray-{profile}"


def test_the_bag_has_the_members_that_are_listed(tmp_path):
    assert config.load_config(write(tmp_path, set_value("demo.bag.members", [3, 1]))).bag_seeds == [3, 1]


def test_a_misspelled_profile_gets_a_suggestion(tmp_path):
    message = config_error(write(tmp_path, set_value("profile", "competiton")))
    assert message == "profile: there is no section 'competiton'; did you mean 'competition'?"


def test_an_unknown_profile_lists_the_known_profiles(tmp_path):
    message = config_error(write(tmp_path, set_value("profile", "xyz")))
    assert message == "profile: there is no section 'xyz'; choose one of competition, competition-strong, demo, local"


def test_a_misspelled_profile_section_is_suggested(tmp_path):
    message = config_error(write(tmp_path, rename_key("demo", "dmeo")))
    assert message == "profile: there is no section 'demo'; did you mean 'dmeo'?"


@pytest.mark.parametrize(
    ("path", "misspelled"),
    [
        ("demo.train", "trian"),
        ("local.evaluate", "evalute"),
        ("demo.download", "downlaod"),
        ("demo.download.prevalence", "prevalance"),
        ("local.download.path", "pth"),
        ("competition.download.competition", "competiton"),
        ("demo.weights.source", "sorce"),
        ("demo.prepare.max_quarantined", "max_quarantine"),
        ("demo.split.folds", "flods"),
        ("demo.train.batch_size", "batchsize"),
        ("local.train.class_weights", "class_weight"),
        ("demo.evaluate.resamples", "resample"),
        ("demo.bag.members", "member"),
    ],
)
def test_a_misspelled_key_gets_a_suggestion(tmp_path, path, misspelled):
    section, key = path.rsplit(".", 1)
    message = config_error(write(tmp_path, rename_key(path, misspelled)))
    assert message == f"{section}.{misspelled}: unknown key; did you mean {key!r}?"


def test_an_unknown_key_lists_the_known_keys(tmp_path):
    message = config_error(write(tmp_path, set_value("demo.bag.xyz", 1)))
    assert message == "demo.bag.xyz: unknown key; choose one of members, method, tie"


def test_a_key_of_the_other_download_source_is_unknown(tmp_path):
    assert config_error(write(tmp_path, set_value("demo.download.path", "x.zip"))).startswith(
        "demo.download.path: unknown key"
    )
    assert config_error(write(tmp_path, set_value("local.download.seed", 1))).startswith(
        "local.download.seed: unknown key"
    )


@pytest.mark.parametrize("section", ["demo.download", "local.download"])
def test_an_unknown_source_gets_a_suggestion_or_the_list_of_sources(tmp_path, section):
    message = config_error(write(tmp_path, rename_key(f"{section}.source", "sorce")))
    assert message == f"{section}.sorce: unknown key; did you mean 'source'?"
    message = config_error(write(tmp_path, set_value(f"{section}.source", "phantm")))
    assert message == f"{section}.source: unknown source 'phantm'; did you mean 'phantom'?"
    message = config_error(write(tmp_path, set_value(f"{section}.source", "xyz")))
    assert message.endswith("choose one of archive, covid_chestxray, covidx, folders, kaggle, phantom, table")


@pytest.mark.parametrize("section", DEFAULTS)
def test_the_defaults_never_change(section):
    assert set(DEFAULTS) == {"seeds", *config.SOURCES, *config.Profile.model_fields} - {"download"}
    loaded = config.Config.model_validate(
        {"demo": {}, "competition": {"download": {"source": "kaggle", "dataset": "a/b"}}}
    )
    if section == "seeds":
        assert loaded.seeds == DEFAULTS["seeds"]
    elif section in config.SOURCES:
        assert config.SOURCES[section]().model_dump(exclude={"source"}) == DEFAULTS[section]
    else:
        assert getattr(loaded.active, section).model_dump() == DEFAULTS[section]


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_a_file_without_a_key_loads(tmp_path, section, field):
    profile = DOWNLOADS.get(section, "demo")
    params = remove_key(f"{profile}.{'download' if section in DOWNLOADS else section}.{field}")
    if (section, field) == ("kaggle", "competition"):
        params["competition"]["download"]["dataset"] = "owner/name"
    assert config.load_config(write(tmp_path, params)).profiles[profile]


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_dvc_tells_two_values_of_a_parameter_apart_in_its_run_cache(section, field):
    def key(value: int) -> str:
        return stage_cache._get_cache_hash({"cmd": "x", "params": {"params.yaml": {section: {field: value}}}}, key=True)

    assert key(1) != key(2)


@pytest.mark.parametrize(
    ("old", "new"), [pair for pair in config.RENAMED.items() if pair[0] not in ("cohen", "licence")]
)
def test_a_key_under_its_old_name_is_refused_with_the_new_one(tmp_path, old, new):
    message = config_error(write(tmp_path, rename_key(f"competition.train.{new}", old)))
    assert message == f"competition.train.{old}: {old} is called {new} now; rename it"


def test_other_old_names_are_refused_with_the_new_ones(tmp_path):
    params = set_value("local.download", {"source": "cohen", "path": "x"})
    assert config_error(write(tmp_path, params)) == "local.download: cohen is called covid_chestxray now; rename it"
    params = set_value("local.download", {"source": "table", "path": "x", "columns": {"licence": "x"}})
    assert (
        config_error(write(tmp_path, params))
        == "local.download.columns.licence: licence is called license now; rename it"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain_adversarial": 0.5}, "domain_adversarial: the backbone stays frozen; lower frozen_epochs below "),
        ({"swa_epochs": 4}, "swa_epochs: more than the epochs, 3; lower it"),
        (
            {"swa_epochs": 2, "ema_decay": 0.9},
            "swa_epochs: the mean of the last epochs; set keep to last and ema_decay",
        ),
        ({"swa_epochs": 2, "keep": "best_f1"}, "swa_epochs: the mean of the last epochs; set keep to last and "),
        ({"group_dro": 0.1}, "group_dro: set sampling to group_balanced and class_weights to 1 and 1, or this to 0"),
        ({"mixup_pairing": "same_label"}, "mixup_pairing: no images are mixed; set mixup_alpha or cutmix_alpha, or "),
        (
            {"feature_views": 2, "cutmix_alpha": 1.0},
            "feature_views: features are computed once, and cutmix_alpha joins",
        ),
        ({"feature_maps": 3}, "feature_maps: these features are computed once; set feature_views to 1 or more, or "),
        (
            {"feature_maps": 3, "feature_views": 1, "backbone": "alexnet"},
            "feature_maps: only networks of timm give their feature maps; set backbone to timm/<name>, or this to 0",
        ),
    ],
)
def test_parameters_of_training_that_do_not_go_together_are_refused(tmp_path, changes, message):
    params = copy.deepcopy(SHIPPED)
    params["demo"]["train"].update(changes)
    assert config_error(write(tmp_path, params)).startswith(f"demo.train.{message}")


def test_a_removed_key_is_refused_with_what_replaces_it(tmp_path):
    message = config_error(write(tmp_path, set_value("demo.promote.min_probability", 0.8)))
    assert message.startswith("demo.promote.min_probability: removed; false_promotion_rate, ")
    assert message.endswith("write false_promotion_rate: 0.05")
    message = config_error(write(tmp_path, set_value("demo.evaluate.cpu_threads", 2)))
    assert message.startswith("demo.evaluate.cpu_threads: removed; ")


def test_all_old_names_are_listed_at_once(tmp_path):
    params = rename_key("demo.train.optimizer", "optimiser")
    for profile in ("competition", "local"):
        params[profile]["train"]["hidden"] = params[profile]["train"].pop("head_hidden")
    message = config_error(write(tmp_path, params))
    assert message == (
        "competition.train.hidden: hidden is called head_hidden now, optimiser is called optimizer now; rename them"
    )


def test_a_profile_may_have_the_name_of_a_source(tmp_path):
    params = set_value("demo.train.lr", -1)
    params["kaggle"] = params.pop("demo")
    assert config_error(write(tmp_path, params | {"profile": "kaggle"})).startswith("kaggle.train.lr: ")


def test_a_misspelled_key_at_the_top_gets_a_suggestion(tmp_path):
    params = {"profil": "demo", **{key: SHIPPED[key] for key in SHIPPED if key != "profile"}}
    assert config_error(write(tmp_path, params)) == "profil: unknown key; did you mean 'profile'?"


def test_a_file_without_a_profile_is_refused(tmp_path):
    assert config_error(write(tmp_path, {"profile": "demo"})) == "there is no profile; add a section such as demo"


def test_the_keys_that_dvc_needs_one_by_one_are_those_of_the_first_release():
    """DVC refuses a file without a key that dvc.yaml names, so that a later key must be part of a section there."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    named = {path.removeprefix("${profile}.") for stage in stages for path in stage["params"] if path.count(".") > 1}
    assert named == {
        "bag.members", "evaluate.min_sensitivity", "evaluate.operating_point", "train.backbone",
        "train.head_hidden", "weights.source",
    }  # fmt: skip


@pytest.mark.parametrize("profile", PROFILES)
def test_the_shipped_file_lists_every_key_with_its_description(profile):
    download = SHIPPED[profile]["download"]
    sections = SECTIONS | {"download": config.SOURCES[download["source"]]}
    text = (ROOT / "params.yaml").read_text()
    lines = [line for line in text[text.index(f"\n{profile}:\n") :].splitlines() if not line.startswith("    - ")]
    for section in config.Profile.model_fields:
        start = lines.index(f"  {section}:") + 1
        fields = sections[section].model_fields
        assert list(SHIPPED[profile][section]) == list(fields)
        for line, (name, field) in zip(lines[start:], fields.items(), strict=False):
            assert line.startswith(f"    {name}: ")
            assert line.endswith(f" # {field.description}")


@pytest.mark.parametrize(
    "override",
    [
        "profile=local",
        "profile=competition-strong",
        "competition-strong.train.lr=3e-4",
        "demo.train.lr=3e-4",
        "local.download.path=/data/images.zip",
    ],
)
def test_setting_a_parameter_with_dvc_leaves_all_other_lines_of_the_shipped_file_as_they_are(tmp_path, override):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    before = path.read_text().splitlines()
    apply_overrides(path, [override])  # what `dvc exp run -S` calls
    ((old, new),) = [pair for pair in zip(before, path.read_text().splitlines(), strict=True) if pair[0] != pair[1]]
    assert old.partition(":")[0] == new.partition(":")[0]
    assert old.partition(" #")[2].strip() == new.partition(" #")[2].strip() != ""


def test_the_schema_for_editors_is_that_of_the_model():
    assert (ROOT / "params.yaml").read_text().startswith("# yaml-language-server: $schema=params.schema.json\n")
    assert json.loads((ROOT / "params.schema.json").read_text()) == config.json_schema(), (
        "write it again: python -c 'import json; from pipeline.core.config import json_schema; "
        "print(json.dumps(json_schema(), indent=2))' > params.schema.json"
    )


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("profile", 3, "valid string"),
        ("seeds", 3, "valid list"),
        ("seeds", [], "at least 1 item"),
        ("demo", None, "valid dictionary"),
        ("demo.train", [1], "valid dictionary"),
        ("demo.train.lr", "fast", "valid number"),
        ("demo.train.lr", 0, "greater than 0"),
        ("demo.train.eps", 0, "greater than 0"),
        ("demo.train.epochs", 1.5, "valid integer"),
        ("demo.train.epochs", 0, "greater than 0"),
        ("demo.train.dropout", 1, "less than 1"),
        ("demo.train.flip", 1.01, "less than or equal to 1"),
        ("demo.train.rotation", 181, "less than or equal to 180"),
        ("demo.train.mixup_alpha", -0.1, "greater than or equal to 0"),
        ("demo.train.early_stopping_patience", 0, "greater than 0"),
        ("demo.train.optimizer", "adm", "'adam', 'adamw' or 'sgd'"),
        ("demo.train.precision", "float8", "'float32', 'tf32', 'bfloat16' or 'float16'"),
        ("demo.train.channels_last", "perhaps", "valid boolean"),
        ("demo.train.image_size", 15, "greater than or equal to 16"),
        ("demo.download.train", 0, "greater than 0"),
        ("demo.download.confounding", 2, "less than or equal to 1"),
        ("demo.prepare.image_size", 2049, "less than or equal to 2048"),
        ("demo.prepare.max_quarantined", -0.1, "greater than or equal to 0"),
        ("demo.split.folds", 1, "greater than or equal to 2"),
        ("demo.split.seed", -1, "greater than or equal to 0"),
        ("demo.download.seed", 2**32, "less than 4294967296"),
        ("demo.evaluate.resamples", -1, "greater than 0"),
        ("demo.evaluate.operating_point", "0.5", "'youden' or 'sensitivity'"),
        ("demo.evaluate.expected_prevalence", 1, "less than 1"),
        ("local.bag.method", "median", "'logits' or 'greedy'"),
    ],
)
def test_an_invalid_value_is_reported_with_its_key_and_the_allowed_values(tmp_path, path, value, reason):
    message = config_error(write(tmp_path, set_value(path, value)))
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert message.endswith(f"but it is {value!r}")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [-1.0, 1.0], [0.0, 0.0], ["a", 1.0]])
def test_class_weights_are_two_positive_numbers(tmp_path, weights):
    assert config_error(write(tmp_path, set_value("demo.train.class_weights", weights))).startswith(
        "demo.train.class_weights"
    )


@pytest.mark.parametrize("rate", [float("inf"), float("nan")])
def test_a_learning_rate_is_finite(tmp_path, rate):
    assert config_error(write(tmp_path, set_value("demo.train.lr", rate))).startswith("demo.train.lr: ")


def test_profiles_that_are_not_in_use_are_checked_too(tmp_path):
    assert SHIPPED["profile"] == "demo"
    assert config_error(write(tmp_path, set_value("competition.train.lr", -1))).startswith("competition.train.lr: ")


@pytest.mark.parametrize("key", ["competition", "dataset"])
def test_a_kaggle_name_with_invalid_characters_is_an_error(tmp_path, key):
    message = config_error(write(tmp_path, set_value(f"competition.download.{key}", "https://www.kaggle.com/c/x")))
    assert message.startswith(f"competition.download.{key}: string should match pattern")


def test_kaggle_needs_either_a_competition_or_a_data_set(tmp_path):
    for key, value in (("competition", None), ("dataset", "owner/name")):
        assert config_error(write(tmp_path, set_value(f"competition.download.{key}", value))) == (
            "competition.download.competition, competition.download.dataset: set one and write null for the other"
        )


def test_a_seed_listed_twice_is_refused(tmp_path):
    message = config_error(write(tmp_path, set_value("seeds", [*range(10), 0])))
    assert message == "seeds: a seed is listed twice; list each once"


def test_members_are_among_the_seeds(tmp_path):
    message = config_error(write(tmp_path, set_value("local.bag.members", [0, 77])))
    assert message == "local.bag.members: [0, 77]; write all, or list some of the seeds, each once"


def test_an_empty_list_of_members_is_refused(tmp_path):
    message = config_error(write(tmp_path, set_value("competition.bag.members", [])))
    assert message == "competition.bag.members: []; write all, or list some of the seeds, each once"


def test_a_member_listed_twice_is_refused(tmp_path):
    assert config_error(write(tmp_path, set_value("demo.bag.members", [1, 1]))).startswith("demo.bag.members: ")


@pytest.mark.parametrize("members", ["al", 3, ["a"]])
def test_members_are_all_or_a_list_of_seeds(tmp_path, members):
    assert config_error(write(tmp_path, set_value("demo.bag.members", members))).startswith("demo.bag.members")


def test_a_missing_file_is_named(tmp_path):
    assert config_error(tmp_path / "params.yaml") == "not found; run from the repository's root"


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\ta: 1", "a: &x *y"])
def test_broken_yaml_is_refused(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert config_error(path).startswith("not valid YAML: ")


def test_a_key_that_a_section_has_twice_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(
        "profile: local\nlocal:\n  download: {source: archive}\n  finding: {}\n  download: {source: phantom}\n"
    )
    error = "not valid YAML: duplicate key 'download' in \"<unicode string>\", line 5, column 3"
    assert config_error(path).startswith(error)


def test_a_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes("profile: démo".encode("latin-1"))
    assert config_error(path)


@pytest.mark.parametrize("text", ["", "# nothing", "[]", "demo"])
def test_a_file_without_sections_is_refused(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert config_error(path) == "empty; it holds profile, seeds and one section per profile"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FIELDS), st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers())))
def test_any_value_loads_or_is_an_error_of_one_line(field, value):
    section, name = field
    profile = DOWNLOADS.get(section, "demo")
    folder = "download" if section in DOWNLOADS else section
    try:
        config.Config.model_validate(set_value(f"{profile}.{folder}.{name}", value))
    except config.ValidationError as error:
        message = config._describe(error)
        assert f"{profile}.{folder}.{name}" in message
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize("section", SECTIONS)
def test_every_parameter_is_read_by_some_module(section):
    modules = [path for folder in ("pipeline", "stages") for path in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(path.read_text()) for path in modules if path.name != "config.py"]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [field for name, field in FIELDS if name == section and field not in read] == []
