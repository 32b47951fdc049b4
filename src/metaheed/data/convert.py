"""Convert the images of one data set to the shape that a network was built for."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metaheed.errors import DataError


def convert(images: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, str | None]:
    """Convert images to another shape.

    RGB becomes grey by its luminance (ITU-R 601); grey becomes RGB by repeating the channel. The images are then
    resized with a Lanczos filter, without keeping the aspect ratio.

    Args:
        images: (n, C, H, W) uint8.
        shape: the wanted (C', H', W').

    Returns:
        (n, C', H', W') uint8, and a description of what was done; the description is None if nothing was done.

    Raises:
        DataError: there is no customary conversion from C to C' channels.
    """
    n, channels, height, width = images.shape
    wanted, *sides = shape
    if (channels, height, width) == shape:
        return images, None
    if channels != wanted and {channels, wanted} != {1, 3}:
        raise DataError(
            f"images of {channels} channels cannot be made into images of {wanted}: only grey and RGB (1 and 3) can"
        )
    done = [] if channels == wanted else ["luminance" if wanted == 1 else "grey repeated as RGB"]
    if [height, width] != sides:
        done.append(f"Lanczos from {height}×{width} to {sides[0]}×{sides[1]}")
    result = np.empty((n, *shape), np.uint8)
    for index, image in enumerate(images.numpy()):
        picture = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
        if wanted == 1:
            picture = picture.convert("L")
        if [height, width] != sides:
            picture = picture.resize((sides[1], sides[0]), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
        result[index] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # a grey image fills every channel
    return torch.from_numpy(result), ", ".join(done)
