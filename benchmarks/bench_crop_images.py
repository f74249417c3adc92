"""crop_images on batches of both domains' size of CycleGAN: 256x256 crops of 286x286 images stored as bytes.

Bytes that must move: those of the crop, once, and those of the result, 4 or 2 per value. The peers read crops
that a host has cut out already and mirror all of them; the copy to the device is not counted. Predictions at
4.3 TB/s, of one image, not measured: 0.23 us in float32, 0.14 us in bfloat16; a launch takes longer.
"""

import pytest
import torch
from fastgan_kernels import crop_images
from torch import Tensor

SIDE, CROP, CHANNELS, IMAGES = 286, 256, 3, 64
CASES = [
    pytest.param(batch, dtype, marks=[pytest.mark.quick] if (batch, dtype) == (1, "float32") else [])
    for batch in (1, 16)
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("implementation", ["triton", "torch", "compile"])
@pytest.mark.parametrize("batch, dtype", CASES)
def bench_crop_images(measure, batch, dtype, implementation):
    kind, size = getattr(torch, dtype), SIDE * SIDE * CHANNELS
    store = torch.randint(256, (IMAGES * size,), dtype=torch.uint8, device="cuda")
    rows = [[i % IMAGES * size, SIDE, SIDE, 7 + i, 30 - i, 1] for i in range(batch)]
    records = torch.tensor(rows, device="cuda")
    images = store.view(IMAGES, SIDE, SIDE, CHANNELS)
    crops = torch.stack([images[i, 7 + i : 263 + i, 30 - i : 286 - i] for i in range(batch)])

    def ours() -> Tensor:
        return crop_images(store, records, CHANNELS, (CROP, CROP), (0, 255), dtype=kind)

    def theirs(x: Tensor) -> Tensor:
        return (x.flip(2).float() / 255 * 2 - 1).to(kind).permute(0, 3, 1, 2)

    function = torch.compile(theirs, dynamic=False) if implementation == "compile" else theirs
    values = batch * CROP * CROP * CHANNELS
    measure(
        ours if implementation == "triton" else lambda: function(crops),
        op="crop_images",
        case=f"{batch}x{CHANNELS}x{CROP}x{CROP} of bytes to {dtype}",
        direction="fwd",
        implementation=implementation,
        bytes_moved=values * (1 + kind.itemsize),
    )
