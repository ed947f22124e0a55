"""`dvc repro` without changes: this pipeline with N radiographs in one file, compared with N files and ten trainings.

Nothing is trained: placeholder outs are committed to DVC.

python bench/noop.py [N] [PROJECT]    # the competition has 15264 + 400
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from common import ROOT, UNIQUE_IMAGES, alternate, radiographs, seconds
from seeds import run

# Baseline: the images as a tracked folder that every training depends on.
TRAIN = {"matrix": {"seed": list(range(10))}, "deps": ["images"], "outs": ["count-${item.seed}"]}
PLAIN = {"stages": {"train": {"cmd": "ls images | wc -l > count-${item.seed}", **TRAIN}}}


def main(count: int = 15664, project: str = str(ROOT)) -> None:
    images = radiographs()
    with tempfile.TemporaryDirectory() as name:
        ours, plain = Path(name, "ours"), Path(name, "plain")
        run(Path(project), "git", "clone", "--quiet", ".", str(ours))
        folder = Path(name, "archive")
        write_layout(folder, images, count)
        params = yaml.safe_load((ours / "params.yaml").read_text())
        params["profile"] = "local"
        params["local"]["download"] = {"source": "archive", "path": str(folder)}
        params["local"]["prepare"]["image_size"] = 512
        (ours / "params.yaml").write_text(yaml.safe_dump(params))
        run(ours, "dvc", "repro", "split")
        commit_placeholders(ours, params["seeds"])

        plain.mkdir()
        run(plain, "git", "init", "--quiet")
        run(plain, "dvc", "init", "--quiet")
        (plain / "images").mkdir()
        for number in range(count):
            (plain / "images" / f"{number}.jpg").write_bytes(make_unique(images[number % UNIQUE_IMAGES], number))
        (plain / "dvc.yaml").write_text(yaml.safe_dump(PLAIN))
        run(plain, "dvc", "add", "--quiet", "images")
        run(plain, "dvc", "repro")
        shutil.rmtree(folder)
        medians = alternate(
            lambda: seconds(lambda: run(ours, "dvc", "repro")),
            lambda: seconds(lambda: run(plain, "dvc", "repro")),
            rounds=3,
        )
    our_time, plain_time = (round(median, 2) for median in medians)
    times = {"seconds": our_time, "plain_seconds": plain_time}
    print(json.dumps({"images": count, **times, "ratio": round(plain_time / our_time, 2)}))


def commit_placeholders(project: Path, seeds: list[int]) -> None:
    """Write a placeholder to every missing out, and commit all outs to dvc.lock."""
    stages = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        for out in (out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])):
            for seed in seeds:
                path = project / (out if isinstance(out, str) else next(iter(out))).replace("${item.seed}", str(seed))
                if path.suffix and not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text("1")
    for folder in ("data/weights", "submissions"):
        (project / folder).mkdir(exist_ok=True)
        (project / folder / "1").write_text("1")
    run(project, "dvc", "commit", "--force", "--quiet")
    run(project, "dvc", "status", "--quiet")  # fails if a stage is out of date


def write_layout(folder: Path, images: list[bytes], count: int) -> None:
    """Write a folder in the layout of the competition, with one test image."""
    for subset in ("train/train", "test/test"):
        (folder / subset).mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(count - 1)]
    for number, name in enumerate(names):
        (folder / "train/train" / name).write_bytes(make_unique(images[number % UNIQUE_IMAGES], number))
    (folder / "test/test/t.jpg").write_bytes(images[-1])
    labels = "".join(f"{name},{number % 2}\n" for number, name in enumerate(names))
    (folder / "train_labels.csv").write_text("File,Label\n" + labels)
    (folder / "sample_submission.csv").write_text("File,Label\nt.jpg,0\n")


def make_unique(image: bytes, number: int) -> bytes:
    """Return the same image with different bytes, so that DVC stores every copy."""
    return image + str(number).encode()


if __name__ == "__main__":
    main(*(int(argument) if argument.isdigit() else argument for argument in sys.argv[1:]))
