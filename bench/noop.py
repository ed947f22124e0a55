"""`dvc repro` with nothing to do: the whole pipeline with N radiographs in one file, against N files and ten trainings.

Nothing is trained: DVC is told that what training would leave is there.

python bench/noop.py [N] [PROJECT]    # the competition has 15264 + 400
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from common import DRAWN, ROOT, alternate, radiographs, seconds
from seeds import run

# The plain way: the images as a tracked folder that every training depends on.
TRAIN = {"matrix": {"seed": list(range(10))}, "deps": ["images"], "outs": ["count-${item.seed}"]}
PLAIN = {"stages": {"train": {"cmd": "ls images | wc -l > count-${item.seed}", **TRAIN}}}


def main(count: int = 15664, project: str = str(ROOT)) -> None:
    images = radiographs()
    with tempfile.TemporaryDirectory() as name:
        ours, plain = Path(name, "ours"), Path(name, "plain")
        run(Path(project), "git", "clone", "--quiet", ".", str(ours))
        folder = Path(name, "archive")
        write(folder, images, count)
        params = yaml.safe_load((ours / "params.yaml").read_text())
        params["profile"] = "local"
        params["local"]["download"] = {"source": "archive", "path": str(folder)}
        params["local"]["prepare"]["size"] = 512
        (ours / "params.yaml").write_text(yaml.safe_dump(params))
        run(ours, "dvc", "repro", "split")
        pretend(ours, params["seeds"])

        plain.mkdir()
        run(plain, "git", "init", "--quiet")
        run(plain, "dvc", "init", "--quiet")
        (plain / "images").mkdir()
        for number in range(count):
            (plain / "images" / f"{number}.jpg").write_bytes(varied(images[number % DRAWN], number))
        (plain / "dvc.yaml").write_text(yaml.safe_dump(PLAIN))
        run(plain, "dvc", "add", "--quiet", "images")
        run(plain, "dvc", "repro")
        shutil.rmtree(folder)
        figures = alternate(
            lambda: seconds(lambda: run(ours, "dvc", "repro")),
            lambda: seconds(lambda: run(plain, "dvc", "repro")),
            rounds=3,
        )
    one, many = (round(figure, 2) for figure in figures)
    print(json.dumps({"images": count, "seconds": one, "plain_seconds": many, "ratio": round(many / one, 2)}))


def pretend(project: Path, seeds: list[int]) -> None:
    """Write something to every out that is not there, and tell DVC that it is as it should be."""
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
    run(project, "dvc", "status", "--quiet")  # fails if anything were to be done


def write(folder: Path, images: list[bytes], count: int) -> None:
    """Write the competition's layout, with one test image."""
    for part in ("train/train", "test/test"):
        (folder / part).mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(count - 1)]
    for number, name in enumerate(names):
        (folder / "train/train" / name).write_bytes(varied(images[number % DRAWN], number))
    (folder / "test/test/t.jpg").write_bytes(images[-1])
    labels = "".join(f"{name},{number % 2}\n" for number, name in enumerate(names))
    (folder / "train_labels.csv").write_text("File,Label\n" + labels)
    (folder / "sample_submission.csv").write_text("File,Label\nt.jpg,0\n")


def varied(image: bytes, number: int) -> bytes:
    """Return the same picture in other bytes, so that DVC keeps each."""
    return image + str(number).encode()


if __name__ == "__main__":
    main(*(int(argument) if argument.isdigit() else argument for argument in sys.argv[1:]))
