"""Sampling and augmentation on whole batches: the order of an epoch, style, geometry, acquisition, mixup and CutMix.

The `draw_` functions draw the random numbers of a batch on the CPU; the others use them on the device of the images.
"""

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, one_hot, pad

from pipeline.core.config import TrainParams
from pipeline.models.preprocessing import count_levels, interpolation_matrices

# Up to this frequency, in cycles per edge, amplitudes are style: 0.01 of an edge of 512 pixels (Yang and Soatto 2020).
STYLE_FREQUENCY = 5
JPEG_BLOCK = 8  # pixels per edge
# Table K.1 of ITU-T T.81, by row: steps between the quantized amplitudes of a block's luminance.
JPEG_LUMINANCE_STEPS = torch.tensor(
    [
        16, 11, 10, 16, 24, 40, 51, 61,
        12, 12, 14, 19, 26, 58, 60, 55,
        14, 13, 16, 24, 40, 57, 69, 56,
        14, 17, 22, 29, 51, 87, 80, 62,
        18, 22, 37, 56, 68, 109, 103, 77,
        24, 35, 55, 64, 81, 104, 113, 92,
        49, 64, 78, 87, 103, 121, 120, 101,
        72, 92, 95, 98, 112, 100, 103, 99,
    ]
)  # fmt: skip


def draw_epoch_order(labels: Tensor, sources: Tensor, params: TrainParams, generator: Generator) -> Tensor:
    """Draw the order of one epoch as indices (N,) into `labels` and `sources`, the numbers of the sources.

    `shuffle` uses every image once. The others draw N with replacement: `weighted` each positive with
    `positive_oversampling` times the probability of a negative; `source_balanced` each source equally often, and
    `group_balanced` each combination of source and label (Idrissi et al. 2022, arXiv:2110.14503).
    """
    if params.sampling == "shuffle":
        return torch.randperm(len(labels), generator=generator)
    if params.sampling == "weighted":
        weights = torch.where(labels == 1, params.positive_oversampling, 1.0)
    else:
        groups = sources if params.sampling == "source_balanced" else 2 * sources + labels
        weights = 1 / groups.bincount()[groups]
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)


def draw_augmentation(count: int, params: TrainParams, generator: Generator) -> dict[str, Tensor]:
    """Draw how `augment` changes each of `count` images of `params.image_size` pixels.

    Returns:
        `flip_index`, int64 (count,), into the images followed by their mirror images; `affine`, float32 (count, 2, 3),
        as `affine_grid` takes it; `gamma`, float32 (count,); `histogram_index` and `fourier_index`, int64 (count,), the
        image whose style each one gets, which may be itself; `contrast`, `resolution`, `noise_std`, float32 (count,);
        `noise`, float32 (count, 1, S, S), standard normal; `jpeg_steps`, float32 (count, 64), see `draw_jpeg_steps`.
        What the parameters turn off is missing.
    """
    drawn = {}
    if params.flip:
        flipped = torch.rand(count, generator=generator) < params.flip
        drawn["flip_index"] = torch.arange(count) + count * flipped
    if params.rotation or params.zoom or params.shift:
        angle = torch.deg2rad(params.rotation * _draw_uniform(count, generator))
        zoom = (1 + params.zoom) ** _draw_uniform(count, generator)
        # In the coordinates of affine_grid an edge is 2 long.
        shift_x, shift_y = (2 * params.shift * _draw_uniform(count, generator) for _ in "xy")
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        drawn["affine"] = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    if params.gamma_jitter:
        drawn["gamma"] = (1 + params.gamma_jitter) ** _draw_uniform(count, generator)
    if params.histogram_exchange:
        drawn["histogram_index"] = _draw_style_index(count, params.histogram_exchange, generator)
    if params.fourier_exchange:
        drawn["fourier_index"] = _draw_style_index(count, params.fourier_exchange, generator)
    if params.contrast_jitter:
        drawn["contrast"] = (1 + params.contrast_jitter) ** _draw_uniform(count, generator)
    if params.min_resolution < 1:
        drawn["resolution"] = 1 - (1 - params.min_resolution) * torch.rand(count, generator=generator)
    if params.noise:
        drawn["noise_std"] = params.noise * torch.rand(count, generator=generator)
        drawn["noise"] = torch.randn(count, 1, params.image_size, params.image_size, generator=generator)
    if params.min_jpeg_quality is not None:
        drawn["jpeg_steps"] = draw_jpeg_steps(count, params.min_jpeg_quality, generator)
    return drawn


def augment(images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
    """Change the style, geometry and acquisition of each image of (B, C, S, S), 0 to 255, independently.

    After the style comes what a radiograph goes through, in this order: the patient's position, the exposure, the
    detector's resolution and noise, the file. The result is 0 to 255; flips alone keep the dtype.

    Args:
        images: the batch.
        drawn: from `draw_augmentation`, on the device of the images.
    """
    if "flip_index" in drawn:
        # Selecting whole images is twenty times as fast on a CPU as torch.where, which selects single pixels.
        images = torch.cat([images, images.flip(-1)]).index_select(0, drawn["flip_index"])
    if "histogram_index" in drawn:
        images = match_histograms(images, drawn["histogram_index"])
    if "fourier_index" in drawn:
        images = exchange_low_frequencies(images, drawn["fourier_index"])
    if "affine" in drawn:
        grid = affine_grid(drawn["affine"], list(images.shape), align_corners=False)
        images = grid_sample(images.float(), grid, align_corners=False, padding_mode="border")
    if "contrast" in drawn:
        mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
        images = (mean + (images - mean) * drawn["contrast"].view(-1, 1, 1, 1)).clamp_(0, 255)
    if "gamma" in drawn:
        images = 255 * (images / 255) ** drawn["gamma"].view(-1, 1, 1, 1)
    if "resolution" in drawn:
        images = coarsen(images, drawn["resolution"])
    if "noise" in drawn:
        images = (drawn["noise"] * drawn["noise_std"].view(-1, 1, 1, 1) + images).clamp_(0, 255)
    if "jpeg_steps" in drawn:
        images = compress_jpeg(images, drawn["jpeg_steps"])
    return images


def _draw_uniform(count: int, generator: Generator) -> Tensor:
    """Draw `count` numbers from [-1, 1): (count,)."""
    return 2 * torch.rand(count, generator=generator) - 1


def _draw_style_index(count: int, probability: float, generator: Generator) -> Tensor:
    """Draw for each image another one of the batch, with the given probability, else itself: int64 (count,)."""
    itself = torch.arange(count)
    another = (itself + 1 + torch.randint(max(count - 1, 1), (count,), generator=generator)) % count
    return torch.where(torch.rand(count, generator=generator) < probability, another, itself)


def match_histograms(images: Tensor, index: Tensor) -> Tensor:
    """Give each image the histogram of another one, as far as a function of the gray level can.

    This is histogram specification (Gonzalez and Woods, Digital Image Processing, section 3.3): a gray level becomes
    the one of the same rank. The rank of a level is the middle of its pixels' ranks, so that an image that is matched
    to itself does not change.

    Args:
        images: (B, C, S, S), 0 to 255, rounded to whole levels.
        index: int64 (B,), whose histogram each image gets.

    Returns:
        float32 (B, C, S, S).
    """
    levels = images.flatten(1).round().long()
    counts = count_levels(levels)
    ranks = counts.cumsum(1)
    matched = torch.searchsorted(2 * ranks.index_select(0, index), 2 * ranks - counts).float()
    return matched.gather(1, levels).view(images.shape)


def exchange_low_frequencies(images: Tensor, index: Tensor) -> Tensor:
    """Give each image the amplitudes of another one's low frequencies, and keep the phases.

    This is Fourier domain adaptation (Yang and Soatto 2020, arXiv:2004.05498). An image with its own amplitudes does
    not change.

    Args:
        images: (B, C, S, S), 0 to 255.
        index: int64 (B,), whose amplitudes each image gets.

    Returns:
        float32 (B, C, S, S).
    """
    images, (height, width) = images.float(), images.shape[-2:]
    spectrum = torch.fft.rfft2(images)
    rows = torch.fft.fftfreq(height, 1 / height, device=images.device).abs() < STYLE_FREQUENCY + 0.5
    columns = torch.fft.rfftfreq(width, 1 / width, device=images.device) < STYLE_FREQUENCY + 0.5
    amplitude = spectrum.abs() * (rows[:, None] & columns)
    change = torch.polar(amplitude.index_select(0, index) - amplitude, spectrum.angle())
    changed: Tensor = images + torch.fft.irfft2(change, s=(height, width))
    return changed.clamp_(0, 255)


def coarsen(images: Tensor, scale: Tensor) -> Tensor:
    """Resize each image to its own scale and back, both bilinear, the first with antialiasing.

    Both are linear, so that their product is one matrix per image for the rows and for the columns.

    Args:
        images: (B, C, S, S), 0 to 255.
        scale: float32 (B,), above 0, up to 1; rounded so that the smaller image has a whole number of pixels.

    Returns:
        float32 (B, C, S, S).
    """
    size = images.shape[-1]
    scale = (size * scale).round().clamp(min=1) / size
    # The coarse image lies at the start of one of `size`, whose rest is 0.
    down, up = (interpolation_matrices(torch.zeros_like(end), end, size, size) for end in (1 / scale, scale))
    matrix = (up @ down)[:, None]
    matrix /= matrix.sum(dim=-1, keepdim=True)  # without what `up` takes from the rest
    return (matrix @ images.float() @ matrix.mT).clamp_(0, 255)


def draw_jpeg_steps(count: int, min_quality: int, generator: Generator) -> Tensor:
    """Draw the qualities of JPEG compression, `min_quality` to 100, and return the steps of their quantization.

    Returns:
        float32 (count, 64), 1 to 255, by row and column of the frequency, scaled by the quality as libjpeg does.
    """
    quality = torch.randint(min_quality, 101, (count, 1), generator=generator)
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return ((JPEG_LUMINANCE_STEPS * percent + 50) // 100).clamp(1, 255).float()


def compress_jpeg(images: Tensor, steps: Tensor) -> Tensor:
    """Compress and decompress each image as a gray JPEG (ITU-T T.81): what its loss changes, without the file.

    Args:
        images: (B, C, H, W), 0 to 255.
        steps: float32 (B, 64), of the quantization, by row and column of the frequency.

    Returns:
        float32 (B, C, H, W), whole gray levels.
    """
    height, width = images.shape[-2:]
    padded = pad(images.float(), (0, -width % JPEG_BLOCK, 0, -height % JPEG_BLOCK), mode="replicate")
    blocks = padded.unflatten(-2, (-1, JPEG_BLOCK)).unflatten(-1, (-1, JPEG_BLOCK)).transpose(-3, -2).flatten(-2)
    # The cosine transform of a block is one product with an orthogonal matrix (64, 64).
    pixel = torch.arange(JPEG_BLOCK, device=images.device)
    cosines = 0.5 * torch.cos(math.pi / (2 * JPEG_BLOCK) * pixel[:, None] * (2 * pixel + 1))
    cosines[0] *= math.sqrt(0.5)
    basis, steps = torch.kron(cosines, cosines), steps.view(-1, 1, 1, 1, JPEG_BLOCK**2)
    amplitudes = ((blocks - 128) @ basis.T).div_(steps).round_().mul_(steps)
    blocks = (amplitudes @ basis).add_(128).round_().clamp_(0, 255).unflatten(-1, (JPEG_BLOCK, JPEG_BLOCK))
    decompressed: Tensor = blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)
    return decompressed[..., :height, :width]


def draw_mixup(labels: Tensor, sources: Tensor, params: TrainParams, generator: Generator) -> dict[str, Tensor]:
    """Draw how `mix` mixes the images, mix the labels in the same way, and smooth them.

    Mixup (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899) draw one lambda per batch
    from Beta(alpha, alpha): the share of an image that is its own; with both, each batch gets one of them. The partner
    of an image is its neighbor in the batch, or, with `mixup_pairing: same_label`, see `_draw_same_label_index`. Label
    smoothing gives a share of every target to both classes equally (Szegedy et al. 2016, arXiv:1512.00567).

    Args:
        labels: int64 (B,), 0 or 1.
        sources: int64 (B,), numbers of the sources.
        params: the hyperparameters.
        generator: the source of the random numbers.

    Returns:
        `targets`, float32 (B, 2), and, unless both are off, `mix_index`, int64 (B,), the partners; `mix_weights`,
        float32 (2,), of the partner and of the image itself; with CutMix also `mix_box`, int64 (4,), the box that is
        mixed: top, bottom, left, right.
    """
    targets, drawn = one_hot(labels, 2).float(), {}
    if params.mixup_alpha or params.cutmix_alpha:
        is_cut = not params.mixup_alpha
        if params.mixup_alpha and params.cutmix_alpha:
            is_cut = bool(torch.rand((), generator=generator) < 0.5)
        alpha = params.cutmix_alpha if is_cut else params.mixup_alpha
        # A beta distribution is a Dirichlet distribution of two; torch.distributions takes no generator.
        weight = torch._sample_dirichlet(torch.tensor([alpha, alpha]), generator=generator)[0]  # noqa: SLF001
        weights = torch.stack([1 - weight, weight])
        if params.mixup_pairing == "same_label":
            index = _draw_same_label_index(labels, sources, generator)
        else:
            index = torch.arange(len(labels)).roll(1)
        drawn = {"mix_index": index, "mix_weights": weights}
        if params.cutmix_alpha:
            size = params.image_size
            drawn["mix_box"] = torch.tensor([0, size, 0, size])
            if is_cut:
                drawn["mix_box"] = box = _draw_box(1 - weight.item(), size, generator)
                drawn["mix_weights"] = torch.tensor([1.0, 0.0])
                share = (box[1] - box[0]) * (box[3] - box[2]) / size**2
                weights = torch.stack([share, 1 - share])
        targets = _mix_pairs(targets, index, weights)
    if params.label_smoothing:
        targets = (1 - params.label_smoothing) * targets + params.label_smoothing / 2
    return {"targets": targets, **drawn}


def mix(images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
    """Mix the images (B, ...), with CutMix (B, C, S, S), as `draw_mixup` has drawn, on the device of the images.

    With `feature_views` they are features, which is manifold mixup (Verma et al. 2019, arXiv:1806.05236).
    """
    if "mix_index" not in drawn:
        return images
    weights = drawn["mix_weights"]
    if "mix_box" in drawn:
        top, bottom, left, right = drawn["mix_box"]
        pixel = torch.arange(images.shape[-1], device=images.device)
        is_mixed = ((pixel >= top) & (pixel < bottom))[:, None] & (pixel >= left) & (pixel < right)
        weights = torch.stack([weights[0] * is_mixed, 1 - weights[0] * is_mixed])
    return _mix_pairs(images.float(), drawn["mix_index"], weights)


def _mix_pairs(values: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Mix each of (B, ...) with its partner, with the weights (2, ...) of the partner and of itself."""
    return values.index_select(0, index).mul_(weights[0]).add_(values * weights[1])


def _draw_same_label_index(labels: Tensor, sources: Tensor, generator: Generator) -> Tensor:
    """Draw for each image one with the same label from another source: int64 (B,).

    Then a mixture has its label, and looks like no source (LISA, Yao et al. 2022, arXiv:2201.00299). Where the batch
    has no such image, it is another one with the same label, and without one the image itself.
    """
    count = len(labels)
    scores = torch.rand(count, count, generator=generator) + ~torch.eye(count, dtype=torch.bool)
    scores += sources[:, None] != sources
    return scores.masked_fill(labels[:, None] != labels, -1).argmax(1)


def _draw_box(share: float, size: int, generator: Generator) -> Tensor:
    """Draw the box of CutMix, of about a share of a square: top, bottom, left, right, int64 (4,).

    As in its paper, the center is anywhere, and what is outside of the image is cut off.
    """
    x, y = (torch.randint(size, (), generator=generator) for _ in "xy")
    half = int(0.5 * math.sqrt(share) * size)
    return torch.stack([y - half, y + half, x - half, x + half]).clamp(0, size)
