"""Source: synthetic chest radiographs in the competition's layout, with which the demo needs no download.

The images are schematic: the attenuation of tissue, air and bone is summed along the beam and mapped to gray levels
with a film curve. They exercise the pipeline; results on them say nothing about patients.
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

from pipeline.core import memory
from pipeline.core.progress import track_progress
from pipeline.data.sources import archive_writer

if TYPE_CHECKING:
    from pipeline.core.config import PhantomParams

FloatImage = NDArray[np.floating[Any]]

SIZE = 512  # edge of a radiograph, pixels
ANATOMY_SIZE = 256  # edge of the grid on which anatomy is computed, pixels; the anatomy has no finer detail
VISIBILITY = 0.7  # attenuation of the densest opacity at strength 1; air in the lung subtracts 1.2
MARKERS = {"PA": ("L", "R", ""), "AP": ("AP", "PORTABLE", "SUPINE", "L", "R", "")}
BREASTS_SHARE = 0.3  # of the patients
MIMICS = ("consolidation", "edema", "effusion", "nodule")


@dataclass(frozen=True)
class PhantomCase:
    """Everything that determines one image: equal cases give equal pixels."""

    seed: int
    number: int  # of the image, from 1, over training and test; seeds pose, findings and noise
    patient: int  # from 1; seeds the anatomy
    split: str  # train or test
    label: int  # 1 is COVID-19 positive
    source: str = "A"  # or B
    view: str = "PA"  # or AP
    marker: str = ""  # text in a corner; empty for none
    opacity: float = 0.0  # attenuation of the ground-glass opacities; 0 for none
    mimic: str = ""  # another disease, one of MIMICS; empty for none
    breasts: bool = False

    @property
    def sex(self) -> str:
        """F or M: half of the patients each, of whom only women have breasts; not in the image otherwise."""
        return "F" if self.breasts or self._demographics[0] < (0.5 - BREASTS_SHARE) / (1 - BREASTS_SHARE) else "M"

    @property
    def age(self) -> int:
        """Years; not in the image, nor related to the label."""
        return int(np.clip(round(55 + 20 * self._demographics[1]), 1, 95))

    @property
    def _demographics(self) -> tuple[float, float]:
        rng = np.random.default_rng([self.seed, 5, self.patient])  # draw_radiograph has the purposes 1 to 4
        return rng.random(), rng.standard_normal()

    @property
    def file(self) -> str:
        return f"cxr-{self.number:05d}.jpg"


def write_source(params: "PhantomParams", target: Path) -> None:
    """Write the zip: images in `train/train` and `test/test`, labels, sample submission, metadata and test labels.

    The bytes depend only on `params`, not on the time or the number of processors.
    """
    cases = draw_cases(params)
    rows = pd.DataFrame({
        "file": [case.file for case in cases],
        **{
            column: pd.array([case.label if case.split == split else None for case in cases], dtype="Int64")
            for column, split in (("label", "train"), ("test_label", "test"))
        },
        "patient": [f"p{case.patient:05d}" for case in cases],
        "source": [case.source for case in cases],
        "view": [case.view for case in cases],
        "sex": [case.sex for case in cases],
        "age": [case.age for case in cases],
    })  # fmt: skip
    # Spawned, because a forked worker could inherit a lock that the thread of the progress bar holds.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cpu_count(), context, memory.retain_freed_memory) as pool:
        images = pool.map(_encode_jpeg, cases, chunksize=8)
        archive_writer.write_zip(rows, track_progress(images, "drawing radiographs", len(cases)), target)


def draw_cases(params: "PhantomParams") -> list[PhantomCase]:
    """Draw all cases, training before test, each in random order.

    Each split has exactly round(prevalence · images) positives. A patient has one to four images, all of one
    label, source and split. With c = `confounding`, P(source A | positive) = (1 + c) / 2 and
    P(source A | negative) = (1 − c) / 2 in training; in the test set both are 1/2, so that a model which
    learned the source instead of the disease fails there (Zech et al. 2018, doi:10.1371/journal.pmed.1002683;
    DeGrave et al. 2021, doi:10.1038/s42256-021-00338-7).
    """
    rng = np.random.default_rng([params.seed, 0])
    cases: list[PhantomCase] = []
    patient_numbers: dict[tuple[str, int, int], int] = {}
    for split, count, prevalence, confounding in (
        ("train", params.train, params.prevalence, params.confounding),
        ("test", params.test, params.test_prevalence, 0.0),
    ):
        positives = round(prevalence * count)
        positive, negative = (PhantomCase(params.seed, number=0, patient=0, split=split, label=k) for k in (1, 0))
        unordered = _draw_patients(rng, positive, positives, (1 + confounding) / 2, params.strength)
        unordered += _draw_patients(rng, negative, count - positives, (1 - confounding) / 2, params.strength)
        for position in rng.permutation(count):
            case = unordered[position]
            # Patients are numbered after the shuffle, because earlier numbers would reveal the label.
            patient = patient_numbers.setdefault((split, case.label, case.patient), len(patient_numbers) + 1)
            cases.append(replace(case, patient=patient, number=len(cases) + 1))
    return cases


def _draw_patients(
    rng: np.random.Generator, template: PhantomCase, count: int, source_a_probability: float, strength: float
) -> list[PhantomCase]:
    """Draw patients until they have `count` images; split and label are the template's."""
    cases: list[PhantomCase] = []
    patient = 0
    while len(cases) < count:
        patient += 1
        source = "A" if rng.random() < source_a_probability else "B"
        breasts = bool(rng.random() < BREASTS_SHARE)
        mimic = str(rng.choice(MIMICS)) if not template.label and rng.random() < 0.4 else ""
        patient_case = replace(template, patient=patient, source=source, breasts=breasts, mimic=mimic)
        for _ in range(min(int(rng.integers(1, 5)), count - len(cases))):
            view = "AP" if rng.random() < (0.65 if source == "A" else 0.35) else "PA"
            # Some positives have no opacity: the first radiograph was normal in a third of patients (Wong et al. 2020).
            has_opacity = template.label and rng.random() > 0.08
            opacity = strength * VISIBILITY * rng.uniform(0.45, 1) if has_opacity else 0.0
            cases.append(replace(patient_case, view=view, marker=str(rng.choice(MARKERS[view])), opacity=opacity))
    return cases


def draw_radiograph(case: PhantomCase) -> NDArray[np.uint8]:
    """Draw a radiograph: 512 × 512 gray levels from 0 (air) to 255 (bone), with the patient's right on the left.

    COVID-19 opacities are bilateral, peripheral, mostly in the lower zones, patchy and ground-glass-like, as
    in Wong et al. 2020 (doi:10.1148/radiol.2020201160). Mimics are unilateral and lobar (consolidation), central
    (edema), basal with a meniscus (effusion) or round (nodule).
    """
    # One generator for each, so that drawing without a finding changes nothing else.
    patient_rng, pose_rng, finding_rng, film_rng = (
        np.random.default_rng([case.seed, purpose, number])
        for purpose, number in ((1, case.patient), (2, case.number), (3, case.number), (4, case.number))
    )
    body = _draw_body(patient_rng, case)
    pose = _draw_pose(pose_rng, case.view)
    grid = _body_coordinates(pose, body)
    lung, attenuation = _anatomy(grid, body)
    lung_attenuation = _vessels(patient_rng, pose, body)
    if case.opacity:
        lung_attenuation += case.opacity * _opacities(finding_rng, grid, body)
    if case.mimic:
        lung_attenuation += _mimic(finding_rng, case.mimic, grid, body)
    attenuation += lung * lung_attenuation
    if case.breasts:
        attenuation += _breasts(patient_rng, grid)
    return _film(film_rng, case, attenuation)


class _Body(NamedTuple):
    """Dimensions in half edges of the image; x increases from the spine to the patient's left, y to the feet."""

    width: float  # of the chest cavity, from the midline
    top: float  # y of the lung apices
    domes: tuple[float, float]  # y of the right and the left dome of the diaphragm
    heart: float  # size relative to the mean
    fat: float  # relative thickness of the chest wall
    skin: float  # distance from ribs to skin
    rib_gap: float
    rib_start: float
    rib_density: float
    clavicle: float  # y of its medial end
    scapula: float  # |x|


def _draw_body(rng: np.random.Generator, case: PhantomCase) -> _Body:
    supine = case.view == "AP"
    width, top, breath = rng.uniform(0.68, 0.78), rng.uniform(-0.8, -0.72), rng.normal(0, 0.04)
    right = 0.46 - breath - 0.07 * supine
    # In the AP view, the anterior heart is farther from the detector and therefore magnified.
    heart = rng.uniform(0.88, 1.08) * (1.14 if supine else 1) * (1.12 if case.mimic == "edema" else 1)
    return _Body(
        width=width, top=top, domes=(right, right + rng.uniform(0.03, 0.08)), heart=heart,
        fat=rng.uniform(0.85, 1.2), skin=rng.uniform(0.08, 0.2), rib_gap=rng.uniform(0.135, 0.155),
        rib_start=top + rng.uniform(0, 0.06), rib_density=rng.uniform(0.11, 0.2),
        clavicle=top + rng.uniform(0.14, 0.22) - 0.06 * supine, scapula=0.62 if supine else 0.74,
    )  # fmt: skip


class _Pose(NamedTuple):
    """Similarity transform from body coordinates to image coordinates."""

    cos: float  # of the rotation, times the scale
    sin: float
    right: float  # translation, half edges of the image
    down: float

    def to_pixels(self, x: FloatImage, y: FloatImage) -> tuple[FloatImage, FloatImage]:
        across, down = self.cos * x - self.sin * y + self.right, self.sin * x + self.cos * y + self.down
        return (across + 1) * (SIZE / 2), (down + 1) * (SIZE / 2)

    def to_body(self, across: FloatImage, down: FloatImage) -> tuple[FloatImage, FloatImage]:
        square = self.cos**2 + self.sin**2
        cos, sin, u, v = self.cos / square, self.sin / square, across - self.right, down - self.down
        return cos * u + sin * v, cos * v - sin * u


def _draw_pose(rng: np.random.Generator, view: str) -> _Pose:
    sd = 0.04 if view == "AP" else 0.025  # patients in bed are harder to position than at a wall stand
    angle, right, down = rng.normal(0, sd, 3).tolist()
    scale = rng.uniform(0.93, 1.1)
    return _Pose(scale * math.cos(angle), scale * math.sin(angle), right, down + 0.04)


class _Grid(NamedTuple):
    """Body coordinates of the pixels of the anatomy grid; float32, 256 × 256."""

    x: FloatImage
    y: FloatImage
    r: FloatImage  # |x|
    outer: FloatImage  # |x| of the inner surface of the ribs at this y
    floor: FloatImage  # y of the diaphragm at this x


def _body_coordinates(pose: _Pose, body: _Body) -> _Grid:
    x, y = pose.to_body(*_image_coordinates())
    r = np.abs(x)
    depth = np.clip(y - body.top, 0, 1)
    outer = body.width * (0.3 + 0.7 * np.sqrt(1 - (1 - depth) ** 2.4))
    dome = np.where(x > 0, np.float32(body.domes[1]), np.float32(body.domes[0]))
    return _Grid(x, y, r, outer, dome + 1.25 * (r - 0.33) ** 2)


@cache
def _image_coordinates() -> tuple[FloatImage, FloatImage]:
    line = (np.arange(ANATOMY_SIZE, dtype=np.float32) + 0.5) * (2 / ANATOMY_SIZE) - 1
    across, down = np.meshgrid(line, line)
    return across, down


def _smoothstep(value: FloatImage, width: float) -> FloatImage:
    """Interpolate smoothly from 0 to 1 as `value` goes from -`width` to `width`."""
    t = np.clip(value * (0.5 / width) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def _gaussian(x: FloatImage, y: FloatImage, shape: tuple[float, float, float, float]) -> FloatImage:
    return np.exp(-(((x - shape[0]) / shape[2]) ** 2) - ((y - shape[1]) / shape[3]) ** 2)


def _ellipse(
    x: FloatImage, y: FloatImage, shape: tuple[float, float, float, float], tilt: float, edge: float
) -> FloatImage:
    cos, sin = math.cos(tilt), math.sin(tilt)
    u, v = x - shape[0], y - shape[1]
    first, second = (u * cos + v * sin) / shape[2], (v * cos - u * sin) / shape[3]
    return _smoothstep(1 - np.sqrt(first * first + second * second), edge)  # hypot is several times slower


def _smooth_noise(rng: np.random.Generator, cells: int) -> FloatImage:
    """Draw noise with mean 0, a standard deviation near 1, and `cells` independent values along the edge."""
    coarse = Image.fromarray(1.3 * rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((ANATOMY_SIZE, ANATOMY_SIZE), Image.Resampling.BICUBIC))


def _anatomy(grid: _Grid, body: _Body) -> tuple[FloatImage, FloatImage]:
    """Return the share of lung along the beam (0 to 1), and the attenuation of a healthy chest."""
    x, y, r, outer, floor = grid
    inner = 0.09 + 0.15 * np.exp(-np.clip(y - body.top, 0, 2) / 0.08)
    lung = _smoothstep(np.minimum(outer - r, np.minimum(r - inner, floor - y)), 0.018)
    # The neck widens to the shoulders; below them, the skin is parallel to the ribs.
    shoulder = _smoothstep(y + 0.86 + 0.1 * (r - 0.3), 0.22)
    skin = 0.26 + (body.width + body.skin - 0.26 + 0.35 * _smoothstep(-y - 0.15, 0.5)) * shoulder
    total = 1.9 * body.fat * np.sqrt(np.clip(1 - (r / skin) ** 2, 0, 1)) * (1 + 0.12 * y)

    size = body.heart
    heart = np.maximum(
        _ellipse(x, y, (0.13, 0.29, 0.38 * size, 0.27 * size), 0.45, 0.06),
        _ellipse(x, y, (-0.06, 0.25, 0.16 * size, 0.29 * size), -0.1, 0.1),
    )
    great_vessels = np.maximum(  # aortic arch, pulmonary trunk, superior vena cava
        np.maximum(
            _ellipse(x, y, (0.06, -0.3, 0.1, 0.1), 0, 0.15), _ellipse(x, y, (0.08, -0.06, 0.12, 0.22), -0.25, 0.2)
        ),
        _ellipse(x, y, (-0.05, -0.2, 0.1, 0.4), 0, 0.2),
    )
    mediastinum = _smoothstep(0.11 + 0.06 * y * y - r, 0.05)
    lung = lung * (1 - 0.68 * heart) * (1 - 0.6 * great_vessels) * (1 - 0.4 * mediastinum)
    total -= 1.22 * lung * (0.78 + 0.22 * np.sqrt(np.clip(1 - (r / (outer + 0.02)) ** 2, 0, 1)))
    total += 0.12 * heart + 0.08 * great_vessels - 0.25 * _smoothstep(0.2 - r, 0.12) * _smoothstep(0.3 - y, 0.4)
    total -= 0.25 * _smoothstep(0.045 - np.abs(x + 0.01), 0.025) * _smoothstep(-0.2 - y, 0.08)  # trachea
    # The left hilum is higher than the right.
    hila = _gaussian(x, y, (-0.16, 0.03, 0.07, 0.14)) + _gaussian(x, y, (0.16, -0.02, 0.07, 0.14))
    return lung, total + 0.25 * lung * hila + _bones(grid, body)


def _bones(grid: _Grid, body: _Body) -> FloatImage:
    y, r = grid.y, grid.r
    across = np.minimum(r / grid.outer, 1.08)
    # All ribs are one periodic profile of a smooth rib number, which is much faster than drawing each rib.
    # Posterior ribs descend laterally; anterior ribs descend medially and end in cartilage, which is not visible.
    posterior = _ribs((y - body.rib_start - 0.07 * r - 0.17 * across**3) / body.rib_gap, 10)
    anterior = _ribs((y - body.rib_start - 0.27 - 0.62 * (grid.outer - r)) / (1.1 * body.rib_gap), 7)
    ribs = posterior * (0.75 + 0.6 * across**4) + 0.62 * anterior * _smoothstep(across - 0.5, 0.14)
    bones = body.rib_density * ribs * _smoothstep(1.03 - across, 0.03) * _smoothstep(r - 0.05, 0.03)

    disc = np.cos(y * (2 * math.pi / 0.135))
    bones += _smoothstep(0.085 - 0.008 * disc - r, 0.015) * (0.24 + 0.07 * disc)

    shaft = r - 0.05
    line = body.clavicle - 0.2 * shaft - 0.045 * np.sin(8.5 * shaft)
    off = np.abs(y - line) / (0.036 - 0.012 * np.sin(4.2 * shaft))
    clavicle = _smoothstep(1 - off, 0.2) * (0.75 + 0.35 * np.minimum(off, 1) ** 2)
    bones += 0.3 * clavicle * _smoothstep(shaft, 0.015) * _smoothstep(0.75 - r, 0.02)

    bones += 0.25 * _ellipse(r, y, (0.96, body.clavicle + 0.02, 0.13, 0.19), -0.5, 0.2)  # upper arms
    return bones + 0.14 * _ellipse(r, y, (body.scapula, body.clavicle + 0.24, 0.13, 0.34), -0.25, 0.3)


def _ribs(number: FloatImage, last: int) -> FloatImage:
    distance = np.abs(number - np.round(number)) / 0.28
    cortex = 0.7 + 0.5 * np.minimum(distance, 1) ** 2  # attenuates most where the beam is tangential
    return _smoothstep(1 - distance, 0.3) * cortex * _smoothstep(number + 0.5, 0.1) * _smoothstep(last - number, 0.3)


def _vessels(rng: np.random.Generator, pose: _Pose, body: _Body) -> FloatImage:
    """Draw arteries that start at both hila, branch, and become thinner and fainter."""
    canvas = Image.new("L", (SIZE, SIZE))
    pen = ImageDraw.Draw(canvas)
    # Angles are relative to the lateral direction, positive downwards. Each pass draws one generation of branches.
    side = np.repeat((-1.0, 1.0), 8)
    x, y = 0.13 * side, np.where(side < 0, 0.03, -0.02)
    angle, width = np.tile(np.linspace(-1.3, 1.35, 8), 2) + rng.normal(0, 0.1, 16), np.full(16, 5.5)
    while len(x):
        step = rng.uniform(0.07, 0.12, len(x))
        x2, y2 = x + side * step * np.cos(angle), y + step * np.sin(angle)
        segments = np.stack([*pose.to_pixels(x, y), *pose.to_pixels(x2, y2)], axis=1)
        for segment, thickness in zip(segments.tolist(), width.tolist(), strict=True):
            pen.line(segment, int(30 + 26 * thickness), max(1, round(thickness)))
        width = width * rng.uniform(0.6, 0.85, len(x))
        continuing = np.flatnonzero((width > 0.8) & (np.abs(x2) < body.width))
        branching = continuing[rng.random(len(continuing)) < 0.5]
        children = np.concatenate([continuing, branching])
        bend = np.concatenate([rng.normal(0, 0.15, len(continuing)), rng.choice((-0.5, 0.5), len(branching))])
        x, y, side, angle = x2[children], y2[children], side[children], angle[children] + bend
        width = np.concatenate([width[continuing], 0.8 * width[branching]])
    vessels = np.asarray(canvas.reduce(SIZE // ANATOMY_SIZE), dtype=np.float32)
    texture = 0.012 * (_smooth_noise(rng, 64) + _smooth_noise(rng, 24))
    return vessels * (0.3 / 255) + texture


def _breasts(rng: np.random.Generator, grid: _Grid) -> FloatImage:
    size, height, weight = rng.uniform(0.26, 0.36), rng.uniform(0.15, 0.3), rng.uniform(0.15, 0.4)
    # Thickest at the inframammary fold, thinner upwards.
    thickness = np.clip((grid.y - height) / (2 * size) + 0.6, 0, 1)
    return np.asarray(weight * thickness * _ellipse(grid.r, grid.y, (0.43, height, size, size), 0, 0.1))


def _opacities(rng: np.random.Generator, grid: _Grid, body: _Body) -> FloatImage:
    """Draw patches of density 0 to about 1 in both lungs, mostly near the ribs and above the diaphragm."""
    cover = np.zeros_like(grid.x)
    for side, dome in zip((-1, 1), body.domes, strict=True):
        for _ in range(rng.integers(2, 6)):
            x = side * body.width * rng.uniform(0.6, 0.95)
            y = dome + 0.1 - (dome - body.top) * rng.beta(1.6, 3.2)
            size = rng.uniform(0.1, 0.22), rng.uniform(0.1, 0.28)
            cover += rng.uniform(0.7, 1.1) * _gaussian(grid.x, grid.y, (x, y, *size))
    ragged = cover + 0.13 * _smooth_noise(rng, 14) + 0.06 * _smooth_noise(rng, 32)
    texture = 1 + 0.07 * _smooth_noise(rng, 48) + 0.05 * _smooth_noise(rng, 110)
    return np.asarray(_smoothstep(ragged - 0.5, 0.5) * texture * np.minimum(4 * cover, 1))


def _mimic(rng: np.random.Generator, kind: str, grid: _Grid, body: _Body) -> FloatImage:
    # tolist(), because NumPy scalars would promote the grid to float64.
    side, direction = rng.choice((-1, 1), 2).tolist()
    one_side = _smoothstep(side * grid.x, 0.01)
    weight = rng.uniform(0.25, 0.7) * (1 + 0.1 * _smooth_noise(rng, 48))
    if kind == "consolidation":  # sharp at the fissure of the lobe, fading away from it
        distance = direction * (grid.y - 0.15 * grid.r - rng.uniform(-0.2, 0.15))
        fading = np.exp(-np.abs(distance) / rng.uniform(0.15, 0.35))
        return np.asarray(weight * one_side * _smoothstep(distance, 0.03) * fading)
    if kind == "edema":  # bat-wing: around both hila, without the periphery
        return weight * _gaussian(grid.r, grid.y, (0.27, 0.02, rng.uniform(0.13, 0.2), rng.uniform(0.22, 0.35)))
    if kind == "effusion":  # with a meniscus along the ribs
        meniscus = 0.3 * np.clip(grid.r / grid.outer - 0.55, 0, 1) ** 2
        return one_side * _smoothstep(grid.y - grid.floor + rng.uniform(0, 0.25) + meniscus, 0.06)
    x, y, size = side * rng.uniform(0.3, 0.6), rng.uniform(body.top + 0.3, 0.3), rng.uniform(0.04, 0.08)
    return weight * _ellipse(grid.x, grid.y, (x, y, size, size), 0, 0.25)


def _film(rng: np.random.Generator, case: PhantomCase, attenuation: FloatImage) -> NDArray[np.uint8]:
    """Convert attenuation to gray levels in the style of the source: A sharp with high contrast, B soft and noisy."""
    is_a = case.source == "A"
    gamma, midpoint = rng.normal(2.9 if is_a else 2.35, 0.25), rng.normal(1.06 if is_a else 0.98, 0.1)
    # The characteristic curve of film (Hurter and Driffield): logistic in the log exposure.
    minimum = 1 / (1 + math.exp(gamma * midpoint))
    value = (1 / (1 + np.exp(gamma * (midpoint - attenuation))) - minimum) / (0.97 - minimum)
    image = Image.fromarray(value)
    if is_a:
        blurred = image.reduce(4).resize(image.size, Image.Resampling.BICUBIC)
        image = Image.fromarray(value + 0.5 * (value - np.asarray(blurred)))
    else:
        image = image.resize((round(ANATOMY_SIZE * rng.uniform(0.55, 0.9)),) * 2, Image.Resampling.BICUBIC)
    noise = Image.fromarray(rng.standard_normal((SIZE if is_a else ANATOMY_SIZE,) * 2, dtype=np.float32))
    noise_sd = rng.uniform(0.006, 0.016) if is_a else rng.uniform(0.012, 0.03)
    value, grain = (np.asarray(layer.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for layer in (image, noise))
    noisy = value + noise_sd * grain * (0.4 + value)
    gray = Image.fromarray((np.clip(noisy, 0, 1) * 255 + 0.5).astype(np.uint8))
    if case.view == "AP":
        _draw_ecg_leads(rng, gray)
    if rng.random() < (0.5 if is_a else 0.15):  # collimated
        left, top, right, bottom = rng.integers(0, 30, 4).tolist()
        gray = ImageOps.expand(gray.crop((left, top, SIZE - right, SIZE - bottom)), (left, top, right, bottom))
    if case.marker:
        _draw_marker(rng, gray, case)
    return np.asarray(gray)


def _draw_ecg_leads(rng: np.random.Generator, gray: Image.Image) -> None:
    """Draw zero to three ECG leads."""
    pen = ImageDraw.Draw(gray)
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(100, 410), rng.uniform(120, 380)
        pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=225)
        t = np.linspace(0, 1, 16)
        across = x + rng.normal(0, 60) * t + rng.normal(0, 60) * t * t
        down = y + (rng.choice((0, SIZE)) - y) * t
        pen.line(np.stack([across, down], axis=1).ravel().tolist(), fill=205, width=2)


def _draw_marker(rng: np.random.Generator, gray: Image.Image, case: PhantomCase) -> None:
    """Write the marker in a corner: large letters at the top for source A, small letters at the bottom for B."""
    x, y = rng.uniform(34, 60), rng.uniform(34, 90)
    on_left = case.marker == "R" or (case.marker != "L" and rng.random() < 0.5)
    position = (x if on_left else SIZE - x, y if case.source == "A" else SIZE - y)
    size, anchor = (30, "a") if case.source == "A" else (20, "d")
    ImageDraw.Draw(gray).text(position, case.marker, 235, _font(size), anchor=("l" if on_left else "r") + anchor)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _encode_jpeg(case: PhantomCase) -> bytes:
    """Draw a radiograph and encode it as in the competition: three equal channels, quality 75, 4:2:0."""
    stream = io.BytesIO()
    Image.fromarray(draw_radiograph(case)).convert("RGB").save(stream, "JPEG", quality=75, subsampling="4:2:0")
    return stream.getvalue()
