import ast
import copy
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, refusal_of_file
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import config

refusal = partial(refusal_of_file, config.load_config)
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())
SECTIONS = {
    "phantom": config.PhantomParams, "archive": config.ArchiveParams, "kaggle": config.KaggleParams,
    "weights": config.WeightsParams, "prepare": config.PrepareParams, "split": config.SplitParams,
    "train": config.TrainParams, "evaluate": config.EvaluateParams, "bag": config.BagParams,
}  # fmt: skip
FIELDS = [
    (section, field) for section, model in SECTIONS.items() for field in model.model_fields
    if (section, field) not in {(source, "source") for source in ("phantom", "archive", "kaggle")}
]  # fmt: skip


def place(path: str) -> tuple[dict, dict, str]:
    """Return a copy of the shipped parameters, the section in it that the dotted path leads to, and the last key."""
    params = section = copy.deepcopy(SHIPPED)
    *parents, last = path.split(".")
    for parent in parents:
        section = section[parent]
    return params, section, last


def edited(path: str, value: object) -> dict:
    params, section, key = place(path)
    section[key] = value
    return params


def without(path: str) -> dict:
    params, section, key = place(path)
    del section[key]
    return params


def renamed(path: str, new: str) -> dict:
    params, section, key = place(path)
    section[new] = section.pop(key)
    return params


def write(folder: Path, params: dict) -> Path:
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return path


@pytest.mark.parametrize("profile", ["demo", "competition", "local"])
def test_the_shipped_file_loads_for_every_profile(tmp_path, profile):
    loaded = config.load_config(write(tmp_path, edited("profile", profile)))
    assert loaded.active == loaded.profiles[profile]
    assert loaded.active.train.lr == SHIPPED[profile]["train"]["lr"]
    assert loaded.bag_seeds == list(range(10))
    assert loaded.model_name == f"covid-xray-{profile}"


def test_named_members_are_the_bag(tmp_path):
    assert config.load_config(write(tmp_path, edited("demo.bag.members", [3, 1]))).bag_seeds == [3, 1]


def test_a_misspelled_choice_of_profile_is_named_with_the_nearest_known_one(tmp_path):
    message = refusal(write(tmp_path, edited("profile", "competiton")))
    assert message == "profile: there is no section 'competiton'; did you mean 'competition'?"


def test_a_profile_unlike_any_other_lists_those_there_are(tmp_path):
    message = refusal(write(tmp_path, edited("profile", "xyz")))
    assert message == "profile: there is no section 'xyz'; choose one of competition, demo, local"


def test_a_misspelled_profile_section_is_named_as_the_near_one(tmp_path):
    message = refusal(write(tmp_path, renamed("demo", "dmeo")))
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
        ("demo.evaluate.cpu_threads", "cpu_thread"),
        ("demo.bag.members", "member"),
    ],
)
def test_a_misspelled_key_is_named_with_the_nearest_known_one(tmp_path, path, misspelled):
    section, key = path.rsplit(".", 1)
    message = refusal(write(tmp_path, renamed(path, misspelled)))
    assert message == f"{section}.{misspelled}: unknown key; did you mean {key!r}?"


def test_a_key_that_is_added_is_unknown_and_like_none_lists_those_there_are(tmp_path):
    message = refusal(write(tmp_path, edited("demo.bag.xyz", 1)))
    assert message == "demo.bag.xyz: unknown key; choose one of members, method, tie"


def test_a_key_of_the_other_download_source_is_unknown(tmp_path):
    assert refusal(write(tmp_path, edited("demo.download.path", "x.zip"))).startswith("demo.download.path: unknown key")
    assert refusal(write(tmp_path, edited("local.download.seed", 1))).startswith("local.download.seed: unknown key")


@pytest.mark.parametrize("section", ["demo.download", "local.download"])
def test_a_download_without_a_known_source_says_which_there_are(tmp_path, section):
    for params in (renamed(f"{section}.source", "sorce"), edited(f"{section}.source", "phantm")):
        message = refusal(write(tmp_path, params))
        assert message.startswith(f"{section}")
        assert "source" in message
    assert "'phantom', 'archive', 'kaggle'" in message


@pytest.mark.parametrize(
    "path",
    ["profile", "seeds", "local.train", "demo.train.lr", "demo.download.seed", "local.download.path", "demo.bag.tie"],
)
def test_a_missing_key_is_named(tmp_path, path):
    assert refusal(write(tmp_path, without(path))) == f"{path}: missing; add it"


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
        ("demo.train.precision", "float8", "'float32', 'bfloat16' or 'float16'"),
        ("demo.train.channels_last", "perhaps", "valid boolean"),
        ("demo.train.size", 15, "greater than or equal to 16"),
        ("demo.download.train", 0, "greater than 0"),
        ("demo.download.confounding", 2, "less than or equal to 1"),
        ("demo.prepare.size", 2049, "less than or equal to 2048"),
        ("demo.prepare.max_quarantined", -0.1, "greater than or equal to 0"),
        ("demo.split.folds", 1, "greater than or equal to 2"),
        ("demo.split.seed", -1, "greater than or equal to 0"),
        ("demo.download.seed", 2**32, "less than 4294967296"),
        ("demo.evaluate.batch_size", -1, "greater than 0"),
        ("demo.evaluate.operating_point", "0.5", "'youden' or 'sensitivity'"),
        ("demo.evaluate.expected_prevalence", 1, "less than 1"),
        ("local.bag.method", "median", "'logits' or 'greedy'"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_named_with_what_is_allowed(tmp_path, path, value, reason):
    message = refusal(write(tmp_path, edited(path, value)))
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert message.endswith(f"but it is {value!r}")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [-1.0, 1.0], [0.0, 0.0], ["a", 1.0]])
def test_class_weights_are_two_positive_numbers(tmp_path, weights):
    assert refusal(write(tmp_path, edited("demo.train.class_weights", weights))).startswith("demo.train.class_weights")


@pytest.mark.parametrize("rate", [float("inf"), float("nan")])
def test_a_learning_rate_is_finite(tmp_path, rate):
    assert refusal(write(tmp_path, edited("demo.train.lr", rate))).startswith("demo.train.lr: ")


def test_the_section_that_is_not_in_use_is_checked_too(tmp_path):
    assert SHIPPED["profile"] == "demo"
    assert refusal(write(tmp_path, edited("competition.train.lr", -1))).startswith("competition.train.lr: ")


@pytest.mark.parametrize("key", ["competition", "dataset"])
def test_a_name_of_kaggles_may_not_hold_what_no_name_has(tmp_path, key):
    message = refusal(write(tmp_path, edited(f"competition.download.{key}", "https://www.kaggle.com/c/x")))
    assert message.startswith(f"competition.download.{key}: string should match pattern")


def test_kaggle_is_asked_for_a_competition_or_a_data_set_not_both(tmp_path):
    for key, value in (("competition", None), ("dataset", "owner/name")):
        assert refusal(write(tmp_path, edited(f"competition.download.{key}", value))) == (
            "competition.download.competition, competition.download.dataset: name one, and write null for the other"
        )


def test_a_seed_listed_twice_is_refused(tmp_path):
    message = refusal(write(tmp_path, edited("seeds", [*range(10), 0])))
    assert message == "seeds: a seed is listed twice; give each once"


def test_members_are_among_the_seeds(tmp_path):
    message = refusal(write(tmp_path, edited("local.bag.members", [0, 77])))
    assert message == "local.bag.members: [0, 77]; write all, or name some of the seeds, each once"


def test_an_empty_list_of_members_is_refused(tmp_path):
    message = refusal(write(tmp_path, edited("competition.bag.members", [])))
    assert message == "competition.bag.members: []; write all, or name some of the seeds, each once"


def test_a_member_listed_twice_is_refused(tmp_path):
    assert refusal(write(tmp_path, edited("demo.bag.members", [1, 1]))).startswith("demo.bag.members: ")


@pytest.mark.parametrize("members", ["al", 3, ["a"]])
def test_members_are_all_or_a_list_of_seeds(tmp_path, members):
    assert refusal(write(tmp_path, edited("demo.bag.members", members))).startswith("demo.bag.members")


def test_a_missing_file_is_named(tmp_path):
    assert refusal(tmp_path / "params.yaml") == "not found; run from the repository's root"


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\ta: 1", "a: &x *y"])
def test_broken_yaml_is_refused(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert refusal(path).startswith("not valid YAML: ")


def test_a_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes("profile: démo".encode("latin-1"))
    assert refusal(path)


@pytest.mark.parametrize("text", ["", "# nothing", "[]", "demo"])
def test_a_file_without_sections_is_refused(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert refusal(path) == "empty; it holds profile, seeds and one section per profile"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FIELDS), st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers())))
def test_any_value_either_loads_or_is_refused_in_one_line(field, value):
    section, name = field
    profile = {"archive": "local", "kaggle": "competition"}.get(section, "demo")
    folder = "download" if section in ("phantom", "archive", "kaggle") else section
    try:
        config.Config.model_validate(edited(f"{profile}.{folder}.{name}", value))
    except config.ValidationError as error:
        message = config._first(error)
        assert f"{profile}.{folder}.{name}" in message
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize("section", SECTIONS)
def test_every_parameter_is_read_by_some_module(section):
    modules = [path for folder in ("pipeline", "stages") for path in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(path.read_text()) for path in modules if path.name != "config.py"]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [field for name, field in FIELDS if name == section and field not in read] == []
