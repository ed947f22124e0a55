"""Chest radiographs drawn from scratch, packed like a Kaggle competition, so that the demo downloads nothing.

The pictures are schematic: attenuation of tissue, air and bone is summed along the beam and passed through a
film curve. They serve to exercise the pipeline; nothing measured on them says anything about patients.
"""

import io
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from joblib import cpu_count
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.core.progress import track_progress
from pipeline.data.sources import archive_writer

if TYPE_CHECKING:
    from pipeline.core.config import PhantomParams

Field = NDArray[np.floating[Any]]

SIZE = 512  # edge of a radiograph, pixels
ANATOMY_SIZE = 256  # edge of the grid that anatomy is computed on; none of it is finer than these pixels
VISIBILITY = 0.7  # attenuation of the densest opacity at strength 1; the air of a lung takes off 1.2
MARKERS = {"PA": ("L", "R", ""), "AP": ("AP", "PORTABLE", "SUPINE", "L", "R", "")}
MIMICS = ("consolidation", "edema", "effusion", "nodule")


@dataclass(frozen=True)
class PhantomCase:
    """All that decides one image: equal cases give equal pixels."""

    seed: int
    number: int  # of the image, from 1 over training and test; pose, findings and noise follow from it
    patient: int  # from 1; anatomy follows from it
    split: str  # train or test
    label: int  # 1 is COVID-19 positive
    source: str = "A"  # or B
    view: str = "PA"  # or AP
    marker: str = ""  # letters in a corner, or none
    opacity: float = 0.0  # attenuation of the ground-glass opacities; 0 draws none
    look_alike: str = ""  # one of LOOK_ALIKES, or none
    breasts: bool = False

    @property
    def file(self) -> str:
        return f"cxr-{self.number:05d}.jpg"


def write(params: "PhantomParams", target: Path) -> None:
    """Write the zip: images in `train/train` and `test/test`, labels, sample submission and metadata.

    The bytes depend on `params` alone, not on the clock or on how many processors draw. Labels of test images
    are nowhere in it.
    """
    planned = draw_cases(params)
    rows = pd.DataFrame({
        "file": [case.file for case in planned],
        "label": pd.array([case.label if case.split == "train" else None for case in planned], dtype="Int64"),
        "patient": [f"p{case.patient:05d}" for case in planned],
        "source": [case.source for case in planned],
        "view": [case.view for case in planned],
    })  # fmt: skip
    # A forked worker could inherit a lock that the progress bar's thread holds; a spawned one cannot.
    with ProcessPoolExecutor(cpu_count(), multiprocessing.get_context("spawn")) as pool:
        drawn = pool.map(_jpeg, planned, chunksize=8)
        archive_writer.write_zip(rows, track_progress(drawn, "drawing radiographs", len(planned)), target)


def draw_cases(params: "PhantomParams") -> list[PhantomCase]:
    """Plan every image, training before test, each in an order that tells nothing.

    Each split has exactly round(prevalence · images) positives. A patient has one to four images, all of one
    label, source and split. With c = `confounding`, P(source A | positive) = (1 + c) / 2 and
    P(source A | negative) = (1 − c) / 2 in training; in the test set both are 1/2, so that a model which
    learned the source instead of the disease is found out (Zech et al. 2018, doi:10.1371/journal.pmed.1002683;
    DeGrave et al. 2021, doi:10.1038/s42256-021-00338-7).
    """
    rng = np.random.default_rng([params.seed, 0])
    planned: list[PhantomCase] = []
    numbers: dict[tuple[str, int, int], int] = {}
    for split, images, prevalence, confounding in (
        ("train", params.train, params.prevalence, params.confounding),
        ("test", params.test, params.test_prevalence, 0.0),
    ):
        positives = round(prevalence * images)
        ill, well = (PhantomCase(params.seed, number=0, patient=0, split=split, label=label) for label in (1, 0))
        drawn = _patients(rng, ill, positives, (1 + confounding) / 2, params.strength)
        drawn += _patients(rng, well, images - positives, (1 - confounding) / 2, params.strength)
        for position in rng.permutation(images):
            case = drawn[position]
            # Patients are numbered as they turn up: numbers given before the shuffle would tell the label.
            patient = numbers.setdefault((split, case.label, case.patient), len(numbers) + 1)
            planned.append(replace(case, patient=patient, number=len(planned) + 1))
    return planned


def _patients(
    rng: np.random.Generator, blank: PhantomCase, images: int, chance_of_a: float, strength: float
) -> list[PhantomCase]:
    drawn: list[PhantomCase] = []
    patient = 0
    while len(drawn) < images:
        patient += 1
        source = "A" if rng.random() < chance_of_a else "B"
        breasts = bool(rng.random() < 0.3)
        look_alike = str(rng.choice(MIMICS)) if not blank.label and rng.random() < 0.4 else ""
        person = replace(blank, patient=patient, source=source, breasts=breasts, look_alike=look_alike)
        for _ in range(min(int(rng.integers(1, 5)), images - len(drawn))):
            view = "AP" if rng.random() < (0.65 if source == "A" else 0.35) else "PA"
            # Some films show nothing: the first was normal in a third of patients (Wong et al. 2020).
            shows = blank.label and rng.random() > 0.08
            opacity = strength * VISIBILITY * rng.uniform(0.45, 1) if shows else 0.0
            drawn.append(replace(person, view=view, marker=str(rng.choice(MARKERS[view])), opacity=opacity))
    return drawn


def draw_radiograph(case: PhantomCase) -> NDArray[np.uint8]:
    """Draw a radiograph: 512 × 512 gray values from 0 (air) to 255 (bone), the patient's right on the left.

    COVID-19 opacities are bilateral, peripheral, mostly in the lower zones, patchy and ground-glass-like, as
    in Wong et al. 2020 (doi:10.1148/radiol.2020201160). Look-alikes are one-sided and lobar (consolidation),
    central (edema), basal with a meniscus (effusion) or round (nodule).
    """
    # Each has its own stream, so that leaving one finding out leaves everything else as it was.
    patient, pose_rng, finding, film = (
        np.random.default_rng([case.seed, purpose, number])
        for purpose, number in ((1, case.patient), (2, case.number), (3, case.number), (4, case.number))
    )
    body = _body(patient, case)
    pose = _pose(pose_rng, case.view)
    at = _places(pose, body)
    lung, attenuation = _anatomy(at, body)
    inside = _vessels(patient, pose, body)
    if case.opacity:
        inside += case.opacity * _opacities(finding, at, body)
    if case.look_alike:
        inside += _look_alike(finding, case.look_alike, at, body)
    attenuation += lung * inside
    if case.breasts:
        attenuation += _breasts(patient, at)
    return _film(film, case, attenuation)


class _Body(NamedTuple):
    """Measures in half edges of the image; x runs from the spine to the patient's left, y to the feet."""

    width: float  # of a lung at its widest, from the midline
    top: float  # y of the apices
    domes: tuple[float, float]  # y of the right and the left dome of the diaphragm
    heart: float  # relative to the usual
    fat: float  # relative thickness of the chest wall
    skin: float  # from ribs to skin
    rib_gap: float
    rib_start: float
    rib_density: float
    clavicle: float  # y of its inner end
    blade: float  # |x| of the shoulder blades


def _body(rng: np.random.Generator, case: PhantomCase) -> _Body:
    supine = case.view == "AP"
    width, top, breath = rng.uniform(0.68, 0.78), rng.uniform(-0.8, -0.72), rng.normal(0, 0.04)
    right = 0.46 - breath - 0.07 * supine
    # The heart lies in front: a beam from the front finds it far from the detector and shows it larger.
    heart = rng.uniform(0.88, 1.08) * (1.14 if supine else 1) * (1.12 if case.look_alike == "edema" else 1)
    return _Body(
        width=width, top=top, domes=(right, right + rng.uniform(0.03, 0.08)), heart=heart,
        fat=rng.uniform(0.85, 1.2), skin=rng.uniform(0.08, 0.2), rib_gap=rng.uniform(0.135, 0.155),
        rib_start=top + rng.uniform(0, 0.06), rib_density=rng.uniform(0.11, 0.2),
        clavicle=top + rng.uniform(0.14, 0.22) - 0.06 * supine, blade=0.62 if supine else 0.74,
    )  # fmt: skip


class _Pose(NamedTuple):
    cos: float  # of the turn, times the scale
    sin: float
    right: float  # shift, half edges of the image
    down: float

    def to_pixels(self, x: Field, y: Field) -> tuple[Field, Field]:
        across, down = self.cos * x - self.sin * y + self.right, self.sin * x + self.cos * y + self.down
        return (across + 1) * (SIZE / 2), (down + 1) * (SIZE / 2)

    def to_body(self, across: Field, down: Field) -> tuple[Field, Field]:
        square = self.cos**2 + self.sin**2
        cos, sin, u, v = self.cos / square, self.sin / square, across - self.right, down - self.down
        return cos * u + sin * v, cos * v - sin * u


def _pose(rng: np.random.Generator, view: str) -> _Pose:
    loose = 0.04 if view == "AP" else 0.025  # a bed is harder to center on than a wall stand
    angle, right, down = rng.normal(0, loose, 3).tolist()
    scale = rng.uniform(0.93, 1.1)
    return _Pose(scale * math.cos(angle), scale * math.sin(angle), right, down + 0.04)


class _Places(NamedTuple):
    """Where the pixels of the coarse grid lie in the body; single precision, 256 × 256."""

    x: Field
    y: Field
    r: Field  # |x|
    outer: Field  # |x| of the inside of the ribs at this height
    floor: Field  # y of the diaphragm above or below


def _places(pose: _Pose, body: _Body) -> _Places:
    x, y = pose.to_body(*_grid())
    r = np.abs(x)
    depth = np.clip(y - body.top, 0, 1)
    outer = body.width * (0.3 + 0.7 * np.sqrt(1 - (1 - depth) ** 2.4))
    dome = np.where(x > 0, np.float32(body.domes[1]), np.float32(body.domes[0]))
    return _Places(x, y, r, outer, dome + 1.25 * (r - 0.33) ** 2)


@cache
def _grid() -> tuple[Field, Field]:
    line = (np.arange(ANATOMY_SIZE, dtype=np.float32) + 0.5) * (2 / ANATOMY_SIZE) - 1
    across, down = np.meshgrid(line, line)
    return across, down


def _soft(inside: Field, width: float) -> Field:
    """Go from 0 to 1 smoothly while `inside` goes from -`width` to `width`."""
    t = np.clip(inside * (0.5 / width) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def _blob(x: Field, y: Field, shape: tuple[float, float, float, float]) -> Field:
    return np.exp(-(((x - shape[0]) / shape[2]) ** 2) - ((y - shape[1]) / shape[3]) ** 2)


def _oval(x: Field, y: Field, shape: tuple[float, float, float, float], tilt: float, edge: float) -> Field:
    cos, sin = math.cos(tilt), math.sin(tilt)
    u, v = x - shape[0], y - shape[1]
    along, off = (u * cos + v * sin) / shape[2], (v * cos - u * sin) / shape[3]
    return _soft(1 - np.sqrt(along * along + off * off), edge)  # hypot is several times slower


def _cloud(rng: np.random.Generator, cells: int) -> Field:
    """Smooth noise about 0 with a standard deviation near 1, `cells` lumps along the edge."""
    coarse = Image.fromarray(1.3 * rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((ANATOMY_SIZE, ANATOMY_SIZE), Image.Resampling.BICUBIC))


def _anatomy(at: _Places, body: _Body) -> tuple[Field, Field]:
    """Return how far the beam crosses lung (0 to 1), and the attenuation of a healthy chest."""
    x, y, r, outer, floor = at
    inner = 0.09 + 0.15 * np.exp(-np.clip(y - body.top, 0, 2) / 0.08)
    lung = _soft(np.minimum(outer - r, np.minimum(r - inner, floor - y)), 0.018)
    # The neck widens into the shoulders; below them the skin follows the ribs.
    shoulder = _soft(y + 0.86 + 0.1 * (r - 0.3), 0.22)
    skin = 0.26 + (body.width + body.skin - 0.26 + 0.35 * _soft(-y - 0.15, 0.5)) * shoulder
    total = 1.9 * body.fat * np.sqrt(np.clip(1 - (r / skin) ** 2, 0, 1)) * (1 + 0.12 * y)

    size = body.heart
    heart = np.maximum(
        _oval(x, y, (0.13, 0.29, 0.38 * size, 0.27 * size), 0.45, 0.06),
        _oval(x, y, (-0.06, 0.25, 0.16 * size, 0.29 * size), -0.1, 0.1),
    )
    great = np.maximum(  # vessels: aortic arch, pulmonary trunk, superior vena cava
        np.maximum(_oval(x, y, (0.06, -0.3, 0.1, 0.1), 0, 0.15), _oval(x, y, (0.08, -0.06, 0.12, 0.22), -0.25, 0.2)),
        _oval(x, y, (-0.05, -0.2, 0.1, 0.4), 0, 0.2),
    )
    middle = _soft(0.11 + 0.06 * y * y - r, 0.05)
    lung = lung * (1 - 0.68 * heart) * (1 - 0.6 * great) * (1 - 0.4 * middle)
    total -= 1.22 * lung * (0.78 + 0.22 * np.sqrt(np.clip(1 - (r / (outer + 0.02)) ** 2, 0, 1)))
    total += 0.12 * heart + 0.08 * great - 0.25 * _soft(0.2 - r, 0.12) * _soft(0.3 - y, 0.4)
    total -= 0.25 * _soft(0.045 - np.abs(x + 0.01), 0.025) * _soft(-0.2 - y, 0.08)  # trachea
    # The left hilum is the higher one.
    hila = _blob(x, y, (-0.16, 0.03, 0.07, 0.14)) + _blob(x, y, (0.16, -0.02, 0.07, 0.14))
    return lung, total + 0.25 * lung * hila + _bones(at, body)


def _bones(at: _Places, body: _Body) -> Field:
    y, r = at.y, at.r
    across = np.minimum(r / at.outer, 1.08)
    # All ribs of a kind are one periodic profile of a smooth field that counts them, far cheaper than one by one.
    # Behind they fall outwards; in front they fall inwards and end in cartilage, which does not show.
    behind = _ribs((y - body.rib_start - 0.07 * r - 0.17 * across**3) / body.rib_gap, 10)
    front = _ribs((y - body.rib_start - 0.27 - 0.62 * (at.outer - r)) / (1.1 * body.rib_gap), 7)
    ribs = behind * (0.75 + 0.6 * across**4) + 0.62 * front * _soft(across - 0.5, 0.14)
    bones = body.rib_density * ribs * _soft(1.03 - across, 0.03) * _soft(r - 0.05, 0.03)

    disc = np.cos(y * (2 * math.pi / 0.135))
    bones += _soft(0.085 - 0.008 * disc - r, 0.015) * (0.24 + 0.07 * disc)

    shaft = r - 0.05
    line = body.clavicle - 0.2 * shaft - 0.045 * np.sin(8.5 * shaft)
    off = np.abs(y - line) / (0.036 - 0.012 * np.sin(4.2 * shaft))
    clavicle = _soft(1 - off, 0.2) * (0.75 + 0.35 * np.minimum(off, 1) ** 2)
    bones += 0.3 * clavicle * _soft(shaft, 0.015) * _soft(0.75 - r, 0.02)

    bones += 0.25 * _oval(r, y, (0.96, body.clavicle + 0.02, 0.13, 0.19), -0.5, 0.2)  # upper arms
    return bones + 0.14 * _oval(r, y, (body.blade, body.clavicle + 0.24, 0.13, 0.34), -0.25, 0.3)


def _ribs(count: Field, last: int) -> Field:
    off = np.abs(count - np.round(count)) / 0.28
    margin = 0.7 + 0.5 * np.minimum(off, 1) ** 2  # cortical bone is densest where the beam grazes it
    return _soft(1 - off, 0.3) * margin * _soft(count + 0.5, 0.1) * _soft(last - count, 0.3)


def _vessels(rng: np.random.Generator, pose: _Pose, body: _Body) -> Field:
    """Grow arteries out of both hila; they fork, thin out and fade."""
    canvas = Image.new("L", (SIZE, SIZE))
    pen = ImageDraw.Draw(canvas)
    # Turns are from straight outwards, downwards positive. All branches of a generation grow at once.
    side = np.repeat((-1.0, 1.0), 8)
    x, y = 0.13 * side, np.where(side < 0, 0.03, -0.02)
    turn, width = np.tile(np.linspace(-1.3, 1.35, 8), 2) + rng.normal(0, 0.1, 16), np.full(16, 5.5)
    while len(x):
        step = rng.uniform(0.07, 0.12, len(x))
        x2, y2 = x + side * step * np.cos(turn), y + step * np.sin(turn)
        ends = np.stack([*pose.to_pixels(x, y), *pose.to_pixels(x2, y2)], axis=1)
        for end, thick in zip(ends.tolist(), width.tolist(), strict=True):
            pen.line(end, int(30 + 26 * thick), max(1, round(thick)))
        width = width * rng.uniform(0.6, 0.85, len(x))
        onward = np.flatnonzero((width > 0.8) & (np.abs(x2) < body.width))
        forks = onward[rng.random(len(onward)) < 0.5]
        kept = np.concatenate([onward, forks])
        bend = np.concatenate([rng.normal(0, 0.15, len(onward)), rng.choice((-0.5, 0.5), len(forks))])
        x, y, side, turn = x2[kept], y2[kept], side[kept], turn[kept] + bend
        width = np.concatenate([width[onward], 0.8 * width[forks]])
    drawn = np.asarray(canvas.reduce(SIZE // ANATOMY_SIZE), dtype=np.float32)
    texture = 0.012 * (_cloud(rng, 64) + _cloud(rng, 24))
    return drawn * (0.3 / 255) + texture


def _breasts(rng: np.random.Generator, at: _Places) -> Field:
    size, height, weight = rng.uniform(0.26, 0.36), rng.uniform(0.15, 0.3), rng.uniform(0.15, 0.4)
    # A breast is thickest at its lower fold and fades out upwards.
    fold = np.clip((at.y - height) / (2 * size) + 0.6, 0, 1)
    return np.asarray(weight * fold * _oval(at.r, at.y, (0.43, height, size, size), 0, 0.1))


def _opacities(rng: np.random.Generator, at: _Places, body: _Body) -> Field:
    """Cover 0 to about 1 of places in both lungs, mostly near the ribs and above the diaphragm."""
    cover = np.zeros_like(at.x)
    for side, dome in zip((-1, 1), body.domes, strict=True):
        for _ in range(rng.integers(2, 6)):
            x = side * body.width * rng.uniform(0.6, 0.95)
            y = dome + 0.1 - (dome - body.top) * rng.beta(1.6, 3.2)
            size = rng.uniform(0.1, 0.22), rng.uniform(0.1, 0.28)
            cover += rng.uniform(0.7, 1.1) * _blob(at.x, at.y, (x, y, *size))
    ragged = cover + 0.13 * _cloud(rng, 14) + 0.06 * _cloud(rng, 32)
    texture = 1 + 0.07 * _cloud(rng, 48) + 0.05 * _cloud(rng, 110)
    return np.asarray(_soft(ragged - 0.5, 0.5) * texture * np.minimum(4 * cover, 1))


def _look_alike(rng: np.random.Generator, kind: str, at: _Places, body: _Body) -> Field:
    # Scalars of numpy would turn the grid to double precision.
    side, way = rng.choice((-1, 1), 2).tolist()
    one = _soft(side * at.x, 0.01)
    weight = rng.uniform(0.25, 0.7) * (1 + 0.1 * _cloud(rng, 48))
    if kind == "consolidation":  # fills a lobe up to its fissure and fades the other way
        off = way * (at.y - 0.15 * at.r - rng.uniform(-0.2, 0.15))
        return np.asarray(weight * one * _soft(off, 0.03) * np.exp(-np.abs(off) / rng.uniform(0.15, 0.35)))
    if kind == "edema":  # from both hila like the wings of a bat, clear of the periphery
        return weight * _blob(at.r, at.y, (0.27, 0.02, rng.uniform(0.13, 0.2), rng.uniform(0.22, 0.35)))
    if kind == "effusion":  # fluid rises along the ribs
        meniscus = 0.3 * np.clip(at.r / at.outer - 0.55, 0, 1) ** 2
        return one * _soft(at.y - at.floor + rng.uniform(0, 0.25) + meniscus, 0.06)
    x, y, size = side * rng.uniform(0.3, 0.6), rng.uniform(body.top + 0.3, 0.3), rng.uniform(0.04, 0.08)
    return weight * _oval(at.x, at.y, (x, y, size, size), 0, 0.25)


def _film(rng: np.random.Generator, case: PhantomCase, attenuation: Field) -> NDArray[np.uint8]:
    """Expose, develop and label, in the source's manner: A sharp and of steep contrast, B soft and grainy."""
    a = case.source == "A"
    gamma, middle = rng.normal(2.9 if a else 2.35, 0.25), rng.normal(1.06 if a else 0.98, 0.1)
    # The curve of film after Hurter and Driffield: a logistic in the log of the exposure.
    clear = 1 / (1 + math.exp(gamma * middle))
    value = (1 / (1 + np.exp(gamma * (middle - attenuation))) - clear) / (0.97 - clear)
    picture = Image.fromarray(value)
    if a:
        blurred = picture.reduce(4).resize(picture.size, Image.Resampling.BICUBIC)
        picture = Image.fromarray(value + 0.5 * (value - np.asarray(blurred)))
    else:
        picture = picture.resize((round(ANATOMY_SIZE * rng.uniform(0.55, 0.9)),) * 2, Image.Resampling.BICUBIC)
    grain = Image.fromarray(rng.standard_normal((SIZE if a else ANATOMY_SIZE,) * 2, dtype=np.float32))
    noise = rng.uniform(0.006, 0.016) if a else rng.uniform(0.012, 0.03)
    value, rough = (np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for part in (picture, grain))
    exposed = value + noise * rough * (0.4 + value)
    gray = Image.fromarray((np.clip(exposed, 0, 1) * 255 + 0.5).astype(np.uint8))
    if case.view == "AP":
        _leads(rng, gray)
    if rng.random() < (0.5 if a else 0.15):  # collimated
        left, top, right, bottom = rng.integers(0, 30, 4).tolist()
        gray = ImageOps.expand(gray.crop((left, top, SIZE - right, SIZE - bottom)), (left, top, right, bottom))
    if case.marker:
        _mark(rng, gray, case)
    return np.asarray(gray)


def _leads(rng: np.random.Generator, gray: Image.Image) -> None:
    """Lay the leads of an electrocardiogram over some."""
    pen = ImageDraw.Draw(gray)
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(100, 410), rng.uniform(120, 380)
        pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=225)
        t = np.linspace(0, 1, 16)
        across = x + rng.normal(0, 60) * t + rng.normal(0, 60) * t * t
        down = y + (rng.choice((0, SIZE)) - y) * t
        pen.line(np.stack([across, down], axis=1).ravel().tolist(), fill=205, width=2)


def _mark(rng: np.random.Generator, gray: Image.Image, case: PhantomCase) -> None:
    """Write the marker in a corner, lead letters at the top in A and small type at the bottom in B."""
    x, y = rng.uniform(34, 60), rng.uniform(34, 90)
    on_left = case.marker == "R" or (case.marker != "L" and rng.random() < 0.5)
    at = (x if on_left else SIZE - x, y if case.source == "A" else SIZE - y)
    size, anchor = (30, "a") if case.source == "A" else (20, "d")
    ImageDraw.Draw(gray).text(at, case.marker, 235, _font(size), anchor=("l" if on_left else "r") + anchor)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _jpeg(case: PhantomCase) -> bytes:
    """Encode as the competition does: three equal channels, quality 75, 4:2:0."""
    stream = io.BytesIO()
    Image.fromarray(draw_radiograph(case)).convert("RGB").save(stream, "JPEG", quality=75, subsampling="4:2:0")
    return stream.getvalue()
