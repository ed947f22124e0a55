"""What a classifier does to images before the network sees them, on whole batches; exports copy this file.

Images are (B, 1, H, W), gray levels from 0 to 255. Nothing here depends on random numbers or on the other images.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

GRAY_MEAN, GRAY_STD = 114.5, 57.6  # of ImageNet's gray levels: the means of its channels
CENTER = 0.9  # edge of the crop of test-time augmentation, share of the image's edge
MARKER_EDGE = 0.08  # no letter of a marker is wider or higher, share of the edge
MARKER_CONTRAST, EDGE_CONTRAST = 40, 12  # gray levels by which a marker, and its blurred edge, is the brighter one
MARKER_ZONE = 0.25  # width of the border in which markers are looked for, share of the edge

# Where lungs are looked for: on a grid of cells, in boxes with edges of at least half of the image.
GRID, MIN_EDGE, MARGIN = 32, 0.5, 5 / 128  # cells; share of the image's edge; added on each side, share of the box's
# Both lungs in a box, from top to bottom: top and bottom of a part, in heights of the box, and distance of its inner
# and outer limits from the box's midline, in half widths.
LUNGS = (0.08, 0.25, 0.18, 0.65), (0.25, 0.55, 0.18, 0.82), (0.55, 0.82, 0.25, 0.92)
USUAL_BOX = (0.075, 0.925), (0.1, 0.86)  # left and right, top and bottom in the exposed part of the image
USUAL_SPREAD = (0.5, 0.5), (0.5, 0.7)  # ten standard deviations of these; so far away, a side costs a correlation of 1
MIN_CORRELATION = 0.1  # a box with less is no better than chance
BLACK = 20  # gray level of what was not exposed, or less
BLUR = 0.15  # standard deviation of the Gaussian that removes shading, share of the edge


class LungField(nn.Module):
    """A box around both lungs, by matching a pattern of dark lungs with the image.

    Of all boxes on a grid, the best has the highest point-biserial correlation between gray levels and the pattern of
    two lungs, which is the square root of Otsu's criterion (1979, doi:10.1109/TSMC.1979.4310076), less what it costs
    to deviate from the usual box. As in older methods for lung fields (reviewed by Candemir and Antani 2019,
    doi:10.1007/s11548-019-01917-1), the histogram is equalized, shading is removed and borders that were not exposed
    do not count. The constants fit 46 radiographs of covid-chestxray-dataset with lung masks, and phantoms.
    """

    whole: Tensor
    intervals: Tensor
    rows: Tensor
    columns: Tensor
    blur: Tensor
    usual: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        cells, shortest = torch.arange(GRID, dtype=torch.float64), round(MIN_EDGE * GRID)
        ends = [(start, end) for start in range(GRID) for end in range(start + shortest, GRID + 1)]
        intervals = torch.tensor(ends, dtype=torch.float64)
        start, length = intervals[:, :1], intervals.diff(dim=1)
        middle, half = start + length / 2, length / 2

        def cover(first: Tensor, last: Tensor) -> Tensor:
            return (torch.minimum(cells + 1, last) - torch.maximum(cells, first)).clamp(0, 1)

        buffers = {  # in float64, so that rounding decides on no box
            "whole": torch.tensor([[0, 0, 1, 1]], dtype=torch.float64),
            "intervals": intervals / GRID,  # (K, 2), the sides of boxes
            "rows": torch.stack([cover(start + top * length, start + bottom * length) for top, bottom, *_ in LUNGS]),
            "columns": torch.stack([
                cover(middle - high * half, middle - low * half) + cover(middle + low * half, middle + high * half)
                for *_, low, high in LUNGS
            ]),
            "blur": torch.exp(-0.5 * ((cells[:, None] - cells) / (BLUR * GRID)) ** 2),
            "usual": torch.tensor(USUAL_BOX, dtype=torch.float64)[:, None],
            "spread": torch.tensor(USUAL_SPREAD, dtype=torch.float64)[:, None],
        }  # fmt: skip
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the boxes: left, top, right and bottom, shares of the edges from the upper left corner.

        Returns:
            float64 (B, 4), with edges of at least `MIN_EDGE`; the whole image where no box looks like lungs.
        """
        gray = resample(images.double(), self.whole, GRID)[:, 0]
        exposed = _exposed(gray)
        correlation = self._correlation(self._contrast(gray, exposed), exposed)
        score = (1e6 * (correlation - self._cost(exposed))).round().flatten(1)
        best = score.argmax(dim=1, keepdim=True)  # of equal ones the first, however they are rounded
        down, across = self.intervals[best // len(self.intervals)], self.intervals[best % len(self.intervals)]
        box = torch.cat([across, down], dim=1).mT.flatten(1)
        margin = MARGIN * (box[:, 2:] - box[:, :2])
        box = torch.cat([box[:, :2] - margin, box[:, 2:] + margin], dim=1).clamp(0, 1)
        is_found = correlation.flatten(1).gather(1, best) >= MIN_CORRELATION
        return torch.where(is_found, box, self.whole)

    def _contrast(self, gray: Tensor, exposed: Tensor) -> Tensor:
        """Equalize the histogram, and subtract the mean of the exposed cells around each cell."""
        rank = equalize(_round(gray)).double() / 255
        blurred, weight = self.blur @ (rank * exposed) @ self.blur, self.blur @ exposed @ self.blur
        return rank - blurred / weight.clamp(min=1e-6)

    def _correlation(self, contrast: Tensor, exposed: Tensor) -> Tensor:
        """Correlate darkness with the lungs of every box, over the exposed cells: (B, K, K), top and bottom first."""

        def sum_over_lungs(values: Tensor) -> Tensor:
            return (self.rows @ values[:, None] @ self.columns.mT).sum(dim=1)

        count = exposed.sum(dim=(1, 2), keepdim=True).clamp(min=1)
        deviation = exposed * (contrast - (exposed * contrast).sum(dim=(1, 2), keepdim=True) / count)
        squares, inside = (deviation**2).sum(dim=(1, 2), keepdim=True), sum_over_lungs(exposed)
        return -sum_over_lungs(deviation) / (inside * (1 - inside / count) * squares).clamp(min=1e-6).sqrt()

    def _cost(self, exposed: Tensor) -> Tensor:
        """Return the squared deviations of the sides of every box from the usual one: (B, K, K).

        The exposed part consists of the columns and rows that are exposed for more than half as long as the longest
        one. It is the whole image where that is less than a quarter of an edge.
        """
        lengths = torch.stack([exposed.sum(dim=1), exposed.sum(dim=2)], dim=1)
        is_long = (2 * lengths > lengths.amax(dim=2, keepdim=True)).long()
        limits = torch.stack([is_long.argmax(dim=2), GRID - is_long.flip(2).argmax(dim=2)], dim=2).double() / GRID
        is_small = limits.diff(dim=2).amin(dim=1, keepdim=True) < 0.25
        limits = torch.where(is_small, self.whole.view(2, 2).mT, limits)[:, :, None]
        sides = (self.intervals - limits[..., :1]) / limits.diff(dim=3)
        across, down = (((sides - self.usual) / self.spread) ** 2).sum(dim=3).unbind(dim=1)
        return down[:, :, None] + across[:, None]


def _exposed(gray: Tensor) -> Tensor:
    """Return 1 for cells (B, GRID, GRID) with something brighter than `BLACK` on the way to each side, else 0."""
    bright = (gray > BLACK).long()
    counts = [count for side in (1, 2) for count in (bright.cumsum(side), bright.flip(side).cumsum(side).flip(side))]
    return (torch.stack(counts).amin(dim=0) > 0).double()


def resample(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Resize a part of each image, as `interpolate(mode="bilinear", antialias=True)` resizes the whole.

    Args:
        images: float (B, 1, H, W).
        boxes: float64 (B, 4), as from `LungField`, or (1, 4) for all; what is outside of the image becomes 0.
        size: edge of the result.

    Returns:
        (B, 1, size, size), in the type of the images.
    """
    rows, columns = (
        interpolation_matrices(boxes[:, axis], boxes[:, axis + 2], length, size).to(images.dtype)[:, None]
        for axis, length in ((1, images.shape[-2]), (0, images.shape[-1]))
    )
    return rows @ images @ columns.mT


def interpolation_matrices(start: Tensor, end: Tensor, length: int, size: int) -> Tensor:
    """Return the matrices (B, size, length) that interpolate `size` values from `start` to `end` (B,), shares."""
    step = ((end - start) * length / size)[:, None]  # no number that is exact in float64 only, see `_round`
    center = start[:, None] * length + (torch.arange(size, device=start.device) + 0.5) * step
    pixel = torch.arange(length, device=start.device) + 0.5
    weights = (1 - (center[..., None] - pixel).abs() / step.clamp(min=1)[..., None]).clamp(min=0)
    is_inside = (center >= 0) & (center <= length)
    return weights / torch.where(is_inside, weights.sum(dim=2).clamp(min=1e-6), torch.inf)[..., None]


def insert(images: Tensor, boxes: Tensor) -> Tensor:
    """Put images (B, 1, S, S) into the parts `boxes` of larger ones of which they are; elsewhere is 0: (B, 1, S, S)."""
    corner, edge = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    return resample(images, torch.cat([-corner / edge, (1 - corner) / edge], dim=1), images.shape[-1])


def adjust(images: Tensor, marker_mask: bool, border_mask: float, intensity_normalization: str) -> Tensor:
    """Mask markers and borders and normalize the gray levels of square images.

    Args:
        images: float64, so that rounding decides on no gray level.
        marker_mask: whether `mask_markers` changes them.
        border_mask: width of the border that gets the mean of the rest, share of the edge.
        intensity_normalization: none, standardize or equalize, of what is not in the border.

    Returns:
        float32.
    """
    images = _round(images)
    if marker_mask:
        images = mask_markers(images)
    border = round(border_mask * images.shape[-1])
    if border:
        images = images[..., border:-border, border:-border]
    if intensity_normalization == "standardize":
        images = standardize(images)
    elif intensity_normalization == "equalize":
        images = equalize(images)
    if border:
        mean = images.mean(dim=(2, 3), keepdim=True)
        images = pad(images - mean, [border] * 4) + mean
    return images


def _round(images: Tensor) -> Tensor:
    """Return whole gray levels, float32; 0.5, which is frequent, is rounded up however it was computed.

    Other programs give the same levels if they compute the images in float64. ONNX rounds constants to float32.
    """
    return (images + (0.5 + 2**-10)).floor().float()


def mask_markers(images: Tensor) -> Tensor:
    """Replace small bright marks near the border, such as letters, by gray levels that are next to them.

    A mark is what a white top-hat finds: what is brighter than the morphological opening (Serra 1982, Image Analysis
    and Mathematical Morphology). The opening is the larger one of those by a horizontal and by a vertical line, which
    leave ribs and other longer structures as they are.
    """
    size = images.shape[-1]
    zone, length = round(MARKER_ZONE * size), 2 * round(MARKER_EDGE / 2 * size) + 1  # pixels
    openings = [_dilate(-_dilate(-images, length, dimension), length, dimension) for dimension in (2, 3)]
    background = torch.maximum(*openings)
    place = torch.arange(size, device=images.device)
    is_outer = (place < zone) | (place >= size - zone)
    is_mark = (images - background > MARKER_CONTRAST) & (is_outer | is_outer[:, None])
    is_near = _dilate(_dilate(is_mark.float(), length, 2), length, 3) > 0
    return torch.where(is_near & (images - background > EDGE_CONTRAST), background, images)


def _dilate(images: Tensor, length: int, dimension: int) -> Tensor:
    """Return the maximum of the `length` pixels, an odd number, around each pixel along dimension 2 or 3.

    It is the maximum of overlapping shorter runs, each twice as long as the one before.
    """
    half, run = length // 2, 1
    images = pad(images, [half, half] if dimension == 3 else [0, 0, half, half], value=-torch.inf)
    while run < length:
        step = min(run, length - run)
        size = images.shape[dimension] - step
        images = torch.maximum(images.narrow(dimension, 0, size), images.narrow(dimension, step, size))
        run += step
    return images


def standardize(images: Tensor) -> Tensor:
    """Give each image the mean and standard deviation of ImageNet's gray levels, and clip it to 0 to 255."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    std = ((images - mean) ** 2).mean(dim=(2, 3), keepdim=True).sqrt()
    return ((images - mean) / std.clamp(min=1) * GRAY_STD + GRAY_MEAN).clamp(0, 255)


def equalize(images: Tensor) -> Tensor:
    """Equalize the histogram of each image, of whole gray levels.

    A level becomes the share of pixels below it, and of half of those that have it, from 0 to 255.
    """
    levels = images.flatten(1).long()
    counts = count_levels(levels)
    ranks = (2 * counts.cumsum(dim=1) - counts).float() * (255 / (2 * levels.shape[1]))
    return ranks.gather(1, levels).view_as(images)


def count_levels(levels: Tensor) -> Tensor:
    """Count the pixels of each gray level: int64 (B, 256), of whole gray levels, int64 (B, N)."""
    counts = torch.zeros(levels.shape[0], 256, dtype=torch.int64, device=levels.device)
    return counts.scatter_add_(1, levels, torch.ones_like(levels))  # whole numbers, whose sum has no order


def views(images: Tensor, test_time_augmentation: str) -> list[Tensor]:
    """Return the square images whose mean probability is predicted: the whole ones, and what augmentation adds.

    `flip` adds mirror images; `crops` adds the center, enlarged, and the mirror images of both.
    """
    found = [images]
    if test_time_augmentation == "crops":
        size = images.shape[-1]
        border = round((1 - CENTER) / 2 * size)
        center = images[..., border : size - border, border : size - border].float()
        found.append(interpolate(center, (size, size), mode="bilinear"))
    if test_time_augmentation != "none":
        found += [view.flip(-1) for view in found]
    return found
