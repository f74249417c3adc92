"""History pool of generated images (Shrivastava et al. 2017, section 2.3), used by CycleGAN's discriminators.

Per image: until the pool is full, store the image and return it; afterwards, with probability 0.5 return a
random stored image and put the new one in its place, otherwise return the new one. The images of a batch are
handled one after the other, so a later one may receive an earlier one.

What goes where depends on numbers alone: `plan` decides it on the host, `exchange` moves images by that plan
without a look at its values, so that it can be part of a CUDA graph.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class ImagePool:
    """A store of at most `size` images on the device they come from; size 0 passes everything through.

    Args:
        size: images.
        fixed_size: all images have one size and lie in one tensor at one address; False: any sizes.

    Raises:
        ValueError: a negative size.
    """

    def __init__(self, size: int, *, fixed_size: bool = True) -> None:
        if size < 0:
            raise ValueError(f"ImagePool: size must be 0 or more, got {size}")
        self.size, self.fixed_size = size, fixed_size
        self._filled = 0
        # (rows, H, W, C): the stored images and, behind them, room for those of a batch
        self._store: Tensor | None = None
        self._images: list[Tensor] = []

    def __len__(self) -> int:
        return self._filled

    def plan(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Decide about the next `count` images; every plan must be carried out, in order.

        rng is used only once the pool is full: one draw per image and one more for each that is exchanged.
        Returns int64 (2, count): where each returned image comes from, and the place each new one goes to;
        the new images are size, size + 1, ... in both, so no two places are equal.
        """
        new = range(self.size, self.size + count)
        source, place = list(new), list(new)
        latest: dict[int, int] = {}  # place -> new image that lies there
        for i in range(count if self.size else 0):
            if self._filled < self.size:
                at = self._filled
                self._filled += 1
            elif rng.random() > 0.5:
                at = int(rng.integers(self.size))
                source[i] = self.size + latest[at] if at in latest else at
            else:
                continue
            if at in latest:
                place[latest[at]] = self.size + latest[at]
            latest[at], place[i] = i, at
        return np.array([source, place], np.int64).reshape(2, count)

    def exchange(self, images: Tensor, plan: Tensor) -> Tensor:
        """Carry out a `plan` for images (N, C, H, W); returns as many, detached, in memory of their own.

        plan: int64 (2, N), on the device of the images; on the host where images have any size. Raises
        ValueError for a batch of several images of another size than the stored ones.
        """
        images = images.detach()
        if self.size == 0 or len(images) == 0:
            return images.clone()
        if not self.fixed_size:
            return self._exchange_any(images, plan.tolist())
        self._reserve(images)
        assert self._store is not None
        rows = images.permute(0, 2, 3, 1).to(self._store.dtype)
        # staged first, so that a later image can receive an earlier one of its batch
        self._store[self.size : self.size + len(images)] = rows
        chosen = self._store.index_select(0, plan[0])
        self._store.index_copy_(0, plan[1], rows)
        return chosen.permute(0, 3, 1, 2)

    def _exchange_any(self, images: Tensor, plan: list[list[int]]) -> Tensor:
        staged = [*self._images, *[images[:0]] * (self.size - len(self._images)), *images.split(1)]
        chosen = []
        for i, (source, place) in enumerate(zip(*plan)):
            chosen.append(staged[source])
            if place < len(self._images):
                self._images[place] = images[i : i + 1].clone()
            elif place < self.size:
                self._images.append(images[i : i + 1].clone())
        if len({image.shape for image in chosen}) > 1:
            raise ValueError(
                "ImagePool: images of a batch must have the size of the stored ones; use batch size 1"
            )
        return torch.cat(chosen)

    def _reserve(self, images: Tensor) -> None:
        """Room for the pool and a batch; what is stored stays."""
        rows, old = self.size + len(images), self._store
        shape = (rows, images.shape[2], images.shape[3], images.shape[1])
        if old is not None and len(old) >= rows and old.device == images.device:
            if old.shape[1:] != shape[1:]:
                raise ValueError(
                    "ImagePool: images must have the height, width and channels of the stored ones, "
                    f"{tuple(old.shape[1:])}, got {shape[1:]}"
                )
            return
        dtype = images.dtype if old is None else old.dtype
        self._store = torch.zeros(shape, dtype=dtype, device=images.device)
        if old is not None:
            self._store[: self.size] = old[: self.size]

    def query(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Plan and exchange in one: a batch of new and stored images, detached, sharing no memory."""
        plan = torch.from_numpy(self.plan(len(images), rng))
        return self.exchange(images, plan.to(images.device) if self.fixed_size else plan)

    def state(self) -> dict[str, Tensor]:
        """Return copies of the stored images (1, C, H, W) by their place, for `load`."""
        images = self._images
        if self._store is not None:
            images = list(self._store[: self._filled].permute(0, 3, 1, 2).split(1))
        return {f"image_{place:04d}": image.clone() for place, image in enumerate(images)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the content by a `state`; raises ValueError if that holds more images than fit."""
        if len(state) > self.size:
            raise ValueError(f"ImagePool: state holds {len(state)} images, the pool only {self.size}")
        images = [state[key].detach().clone() for key in sorted(state)]
        self._filled, self._store, self._images = len(images), None, []
        if not self.fixed_size:
            self._images = images
        elif images:
            self._reserve(images[0])
            assert self._store is not None
            self._store[: len(images)] = torch.cat(images).permute(0, 2, 3, 1)
