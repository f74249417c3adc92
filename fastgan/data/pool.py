"""History pool of generated images (Shrivastava et al. 2017, section 2.3), used by CycleGAN's discriminators.

Per image: until the pool is full, store the image and return it; afterwards, with probability 0.5 return a
random stored image and put the new one in its place, otherwise return the new one. The images of a batch are
handled one after the other, so a later one may receive an earlier one.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class ImagePool:
    """A store of at most `size` images on the device they come from; size 0 passes everything through."""

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"ImagePool: size must be 0 or more, got {size}")
        self.size = size
        # a list, not one tensor: an evicted image is handed out without a copy, and sizes may differ
        self._images: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._images)

    def query(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Return a batch of new and stored images, detached, sharing no memory with the input or the pool.

        images: (N, C, H, W), any dtype and layout; the result is alike. rng: where the draws come from; it is
        used only once the pool is full, one draw per image and one more for each that is exchanged. Raises
        ValueError for a batch of several images of another size than the stored ones.
        """
        images = images.detach()
        if self.size == 0 or len(images) == 0:
            return images.clone()
        chosen = []
        for new in images.split(1):
            if len(self._images) < self.size:
                self._images.append(new.clone())
            elif rng.random() > 0.5:
                place = int(rng.integers(self.size))
                chosen.append(self._images[place])
                self._images[place] = new.clone()
                continue
            chosen.append(new)
        if len({image.shape for image in chosen}) > 1:
            raise ValueError(
                "ImagePool: images of a batch must have the size of the stored ones; use batch size 1"
            )
        return torch.cat(chosen)

    def state(self) -> dict[str, Tensor]:
        """Return copies of the stored images (1, C, H, W) by their place, for `load`."""
        return {f"image_{place:04d}": image.clone() for place, image in enumerate(self._images)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the content by a `state`; raises ValueError if that holds more images than fit."""
        if len(state) > self.size:
            raise ValueError(f"ImagePool: state holds {len(state)} images, the pool only {self.size}")
        self._images = [state[key].detach().clone() for key in sorted(state)]
