"""How often `cxr monitor` raises an alarm, without a shift and with one, by simulation.

python bench/monitor.py [REPLICATES [IMAGES [SHIFTED]]]    # in a project with trained models, such as that of the demo

IMAGES radiographs are drawn as in the demo and predicted by seed-0. A replicate divides their patients at random: some
are the model's own images, 700 for training and 175 for validation, others the log, in which a third of the lines are
repeated. Rates are followed by their Monte Carlo standard error. There are SHIFTED replicates of a log with a shift.
"""

import io
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images

from pipeline.core.config import load_config
from pipeline.data import images
from pipeline.data.sources import phantom
from pipeline.evaluation import dataset_shift
from pipeline.evaluation.monitoring import compare
from pipeline.inference import candidate
from pipeline.inference.candidate import Candidate
from pipeline.inference.prediction_log import PredictionLog, describe_image, read_log
from pipeline.tracking.model_folder import open_model_folder

TRAINING, VALIDATION = 700, 175  # images of the model
SIZES = (50, 200, 1000)
SHIFTED_SIZE = 200
REPEATED = 1 / 3  # of the lines
CHANGED = 400  # images of each kind of shift


def encode(image: Image.Image, quality: int = 75) -> bytes:
    stream = io.BytesIO()
    image.convert("L").convert("RGB").save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def change(data: bytes, quality: int = 75, blur: float = 0.0, gamma: float = 1.0) -> bytes:
    """Blur and darken a radiograph and compress it again."""
    image = Image.open(io.BytesIO(data)).convert("L").filter(ImageFilter.GaussianBlur(blur))
    return encode(image.point([round(255 * (level / 255) ** gamma) for level in range(256)]), quality)


def photographs(count: int) -> list[bytes]:
    """Cut photographs of a building and of a flower into gray squares of 512 pixels."""
    rng, pictures = np.random.default_rng(0), [Image.fromarray(array) for array in load_sample_images().images]
    squares = []
    for index in range(count):
        picture = pictures[index % 2]
        edge = int(rng.integers(150, 400))
        left, top = (int(rng.integers(0, length - edge)) for length in picture.size)
        squares.append(encode(picture.crop((left, top, left + edge, top + edge)).resize((512, 512))))
    return squares


def log_images(model: Candidate, contents: Sequence[bytes]) -> pd.DataFrame:
    """Predict images and return what the log has of them, in their order."""
    with TemporaryDirectory() as folder:
        log = PredictionLog(Path(folder, "log.jsonl"), model, "", "")
        for start in range(0, len(contents), model.batch_size):
            batch = contents[start : start + model.batch_size]
            decoded = [images.decode_radiograph(data, model.packed_size, model.resize) for data in batch]
            pixels = np.stack([square for square, _ in decoded])
            descriptions = [
                describe_image(data, size[::-1], square) for data, (square, size) in zip(batch, decoded, strict=True)
            ]
            log.append(descriptions, torch.from_numpy(pixels), model.predict(torch.from_numpy(pixels)))
        return read_log(Path(folder, "log.jsonl"))[0]


def draw_rows(rng: np.random.Generator, patients: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` of the rows: those of random patients."""
    rank = rng.permutation(patients.max() + 1)[patients[rows]]
    return rows[np.argsort(rank, kind="stable")[:count]]


def draw_replicate(
    rng: np.random.Generator, pool: pd.DataFrame, size: int, prevalence: float | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw the images of the model and, of other patients, a log of `size` images."""
    patients, everything = pool["patient"].to_numpy(), np.arange(len(pool))
    own = draw_rows(rng, patients, everything, TRAINING + VALIDATION)
    reference = pool.iloc[own].rename(columns={"label": "predicted"})
    reference = reference.assign(label=reference["truth"], group=reference["patient"].astype(str))
    training = reference.index[:TRAINING]
    reference.loc[training, ["score", "probability", "predicted"]] = np.nan
    reference["embedding"] = reference["embedding"].astype(object).mask(reference.index.isin(training))
    others = everything[~np.isin(patients, patients[own])]
    if prevalence is None:
        rows = draw_rows(rng, patients, others, size)
    else:
        is_positive = pool["truth"].to_numpy()[others] == 1
        positives = round(prevalence * size)
        parts = ((others[is_positive], positives), (others[~is_positive], size - positives))
        rows = np.concatenate([draw_rows(rng, patients, part, count) for part, count in parts])
    return reference, pool.iloc[rows]


def evaluate(
    count: int, pool: pd.DataFrame, size: int, shifted: pd.DataFrame | None = None, share: float = 1.0,
    prevalence: float | None = None,
) -> dict[str, object]:  # fmt: skip
    """Count alarms.

    Args:
        count: replicates.
        pool: the images without a shift.
        size: images of the log.
        shifted: images that replace a `share` of the log's.
        share: in [0, 1].
        prevalence: of the log; that of the pool by default.
    """
    rng, failed = np.random.default_rng(0), []
    for _ in range(count):
        reference, log = draw_replicate(rng, pool, size, prevalence)
        if shifted is not None:
            replaced = round(share * size)
            rows = draw_rows(rng, shifted["patient"].to_numpy(), np.arange(len(shifted)), replaced)
            log = pd.concat([log.iloc[replaced:], shifted.iloc[rows]])
        lines = pd.concat([log, log.sample(frac=REPEATED, random_state=int(rng.integers(1 << 31)))])
        comparison = compare(reference, lines.drop_duplicates("sha256").reset_index(drop=True))
        failed.append([comparison.has_covariate_shift, comparison.has_label_shift, *comparison.failed["features"]])
    kinds = {"covariate_shift": 0, "label_shift": 1}
    rates = {"alarm": rate([one[0] or one[1] for one in failed])}
    rates |= {name: rate([one[index] for one in failed]) for name, index in kinds.items()}
    tests = ("score", "embedding", "distance", "acquisition", "prevalence")
    return rates | {f"by_{name}": rate([name in one[2:] for one in failed])[0] for name in tests}


def rate(values: list[bool]) -> list[float]:
    """Return a rate and its standard error."""
    mean = float(np.mean(values))
    return [round(mean, 3), round(float(np.sqrt(mean * (1 - mean) / len(values))), 3)]


def main(replicates: int = 200, image_count: int = 6000, shifted_replicates: int = 50) -> None:
    dataset_shift.discrimination = lambda *_: np.nan  # which takes half of the time and decides nothing
    config = load_config()
    torch.set_num_threads(1)
    with open_model_folder(config, config.model_names[0]) as found:
        model = candidate.load_candidate(found.folder, torch.device("cpu"))
    params = config.profiles["demo"].download.model_copy(update={"train": image_count, "test": 1, "seed": 1000})
    cases = [case for case in phantom.draw_cases(params) if case.split == "train"]
    contents = [phantom._encode_jpeg(case) for case in cases]  # noqa: SLF001
    pool = log_images(model, contents)
    pool["truth"], pool["patient"] = ([getattr(case, name) for case in cases] for name in ("label", "patient"))

    def shift(function: Callable[[bytes], bytes]) -> pd.DataFrame:
        changed = log_images(model, [function(data) for data in contents[-CHANGED:]])
        return changed.assign(patient=pool["patient"].to_numpy()[-CHANGED:])

    own = pool.iloc[:-CHANGED]  # of other patients, up to the first
    own = own[~own["patient"].isin(pool["patient"].iloc[-CHANGED:])].reset_index(drop=True)
    strange = log_images(model, photographs(min(CHANGED, len(own))))
    strange["patient"] = np.arange(len(strange))
    cases_by_name: dict[str, Callable[[int], dict[str, object]]] = {
        **{f"no shift, {size} images": partial(evaluate, pool=own, size=size) for size in SIZES},
        "prevalence 0.5": partial(evaluate, pool=own, size=SHIFTED_SIZE, prevalence=0.5),
    }
    for name, options in {
        "scanner: JPEG quality 30, blur 1.5, gamma 1.4": {"quality": 30, "blur": 1.5, "gamma": 1.4},
        "compressed again": {},
        "JPEG quality 30": {"quality": 30},
        "blur of 1 pixel": {"blur": 1.0},
        "gamma 1.2": {"gamma": 1.2},
    }.items():
        changed = shift(partial(change, **options))
        cases_by_name[name] = partial(evaluate, pool=own, size=SHIFTED_SIZE, shifted=changed)
    for share in (0.02, 0.05, 0.1):
        cases_by_name[f"{share:.0%} photographs"] = partial(
            evaluate, pool=own, size=SHIFTED_SIZE, shifted=strange, share=share
        )
    for name, function in cases_by_name.items():
        count = replicates if name.startswith("no shift") else shifted_replicates
        print(json.dumps({"case": name, "replicates": count, **function(count)}), flush=True)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
