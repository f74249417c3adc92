"""A batch of training images out of a store of decoded ones: crop, mirror, map the values, pad, in one pass.

    y[n, c, i, j] = f(store[offset + ((top + i') width + left + j') C + c])
    i' = m(i - halo, H),   j' = m(j - halo, W), or W - 1 - m(j - halo, W) where the image is mirrored
    f(x) = (x - low) / (high - low), cut off at 0 and 1 with `clamp`, and 2 f(x) - 1 for "tanh"

m is the reflection of reflect_pad2d. Each operation of f is rounded in float32 as torch rounds it on a CPU:
float32 results are the same bits. Images are no function of parameters: not differentiable.

The result is the plain image, with a halo if wanted, and not the unrolled rows (_layout.py) that the first
7x7 convolution reads: they are 11 times as many values as the image of 3x256x256, its discriminator reads
others, and the losses read the image itself. To write the rows here as well would save one read of 0.4 MB
(bfloat16), 0.1 us at 4.3 TB/s. With halo=3 a generator that begins with a reflection pad and a convolution
of torch saves the pass of the pad.

Bytes: those of the crop as stored, once, and those of y. An image of 3x256x256 stored as bytes and written in
float32: 0.98 MB, 0.23 us at 4.3 TB/s (prediction, not measured): less than a launch takes.
Layout: channels_last.
"""
# mypy: disable-error-code="no-untyped-def"
# (only the kernels: Triton reads their annotations)

import torch
from torch import Tensor

from ._op import require, runs_kernel, tl, triton
from ._tune import ceil_div

BLOCK = 1024
OUTPUT_RANGES = ("tanh", "sigmoid")
STORES = (torch.uint8, torch.int16, torch.float32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def crop_images(
    store: Tensor,
    records: Tensor,
    channels: int,
    size: tuple[int, int],
    value_range: tuple[float, float],
    *,
    output_range: str = "tanh",
    clamp: bool = False,
    halo: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cuts a batch of equal crops out of images that lie behind each other in one piece of memory.

    store: 1-D, images (height, width, channels), uint8, float32, or int16 that holds the bits of uint16.
    records: (N, 6) int64 on the device of store; per image: place of its first value in store, height, width,
    top and left of the crop, 1 to mirror it left-right or 0. Not checked: that would wait for the device.
    size: (H, W) of the crop. value_range: what becomes -1 and 1 ("tanh") or 0 and 1 ("sigmoid").
    clamp: cut off what lies outside. halo: pixels of reflection around the crop, less than H and W.
    Returns (N, channels, H + 2 halo, W + 2 halo) in dtype (float32, bfloat16 or float16), channels_last.
    Raises ValueError for other dtypes, shapes and sizes.
    """
    height, width = size
    require(store.dim() == 1, "crop_images", "store", "1-D", f"shape {tuple(store.shape)}")
    require(store.dtype in STORES, "crop_images", "store", "uint8, int16 or float32", store.dtype)
    right = records.dim() == 2 and records.shape[1] == 6 and records.dtype == torch.int64
    got = f"{tuple(records.shape)} of {records.dtype}"
    require(right, "crop_images", "records", "(N, 6) of torch.int64", got)
    require(channels > 0, "crop_images", "channels", "at least 1", channels)
    require(min(size) > 0, "crop_images", "size", "at least 1x1", size)
    require(0 <= halo < min(size), "crop_images", "halo", f"in 0 <= halo < size of {height}x{width}", halo)
    low, high = value_range
    require(low < high, "crop_images", "value_range", "two growing numbers", value_range)
    require(output_range in OUTPUT_RANGES, "crop_images", "output_range", "tanh or sigmoid", output_range)
    require(dtype in DTYPES, "crop_images", "dtype", "float32, bfloat16 or float16", dtype)
    function = torch.ops.fastgan.crop_images.default if runs_kernel(store) else reference
    return function(
        store.contiguous(), records.contiguous(), channels, height, width, low, high, output_range == "tanh",
        clamp, halo, dtype,
    )  # fmt: skip


def reference(
    store: Tensor,
    records: Tensor,
    channels: int,
    height: int,
    width: int,
    low: float,
    high: float,
    tanh: bool,
    clamp: bool,
    halo: int,
    dtype: torch.dtype,
) -> Tensor:
    offset, _, pitch, top, left, flip = records.view(-1, 6, 1, 1, 1).unbind(1)
    i, j = (torch.arange(-halo, side + halo, device=store.device).abs() for side in (height, width))
    i, j = (torch.where(x < side, x, 2 * (side - 1) - x) for x, side in ((i, height), (j, width)))
    j = torch.where(flip > 0, width - 1 - j.view(1, -1, 1), j.view(1, -1, 1))
    c = torch.arange(channels, device=store.device)
    x = store[offset + ((top + i.view(-1, 1, 1)) * pitch + left + j) * channels + c]
    x = x.int().bitwise_and_(0xFFFF).float() if store.dtype == torch.int16 else x.float()
    if low:
        x = x.sub_(low)
    # by a tensor: a GPU would multiply with the reciprocal of a number
    x = x.div_(x.new_full((), high - low))
    if clamp:
        x = x.clamp_(0, 1)
    if tanh:
        x = x.mul_(2).sub_(1)
    return x.to(dtype).permute(0, 3, 1, 2)


@triton.jit
def _crop_images_fwd_kernel(
    store_ptr, records_ptr, y_ptr, H, W, LOW: tl.constexpr, SPAN: tl.constexpr, TANH: tl.constexpr,
    CLAMP: tl.constexpr, HALO: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # program_id(1): image; a block of the values of its result
    image = tl.program_id(1).to(tl.int64)
    record_ptr = records_ptr + 6 * image
    pitch, top, left = tl.load(record_ptr + 2), tl.load(record_ptr + 3), tl.load(record_ptr + 4)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    Wo = W + 2 * HALO
    values = (H + 2 * HALO) * Wo * C
    mask = place < values
    i, j = tl.abs(place // C // Wo - HALO), tl.abs(place // C % Wo - HALO)
    i, j = tl.where(i < H, i, 2 * (H - 1) - i), tl.where(j < W, j, 2 * (W - 1) - j)
    j = tl.where(tl.load(record_ptr + 5) > 0, W - 1 - j, j)
    offset = tl.load(record_ptr) + ((top + i) * pitch + left + j) * C + place % C
    x = tl.load(store_ptr + offset, mask=mask, other=0)
    if store_ptr.dtype.element_ty == tl.int16:
        x = x.to(tl.int32) & 0xFFFF
    x = x.to(tl.float32) - LOW
    x = tl.div_rn(x, tl.full((BLOCK,), SPAN, tl.float32))
    if CLAMP:
        # a NaN stays a NaN
        x = tl.where(x < 0, 0.0, tl.where(x > 1, 1.0, x))
    if TANH:
        x = x * 2 - 1
    tl.store(y_ptr + image * values + place, x.to(y_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("fastgan::crop_images", mutates_args=())
def _forward(
    store: Tensor,
    records: Tensor,
    channels: int,
    height: int,
    width: int,
    low: float,
    high: float,
    tanh: bool,
    clamp: bool,
    halo: int,
    dtype: torch.dtype,
) -> Tensor:
    if not runs_kernel(store):
        return reference(store, records, channels, height, width, low, high, tanh, clamp, halo, dtype)
    y = _forward_fake(store, records, channels, height, width, low, high, tanh, clamp, halo, dtype)
    if y.numel() == 0:
        return y
    grid = (ceil_div(y[0].numel(), BLOCK), len(y))
    with torch.cuda.device_of(store):
        _crop_images_fwd_kernel[grid](
            store, records, y, height, width, LOW=low, SPAN=high - low, TANH=tanh, CLAMP=clamp, HALO=halo,
            C=channels, BLOCK=BLOCK,
        )  # fmt: skip
    return y


@_forward.register_fake
def _forward_fake(
    store: Tensor,
    records: Tensor,
    channels: int,
    height: int,
    width: int,
    low: float,
    high: float,
    tanh: bool,
    clamp: bool,
    halo: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = (len(records), height + 2 * halo, width + 2 * halo, channels)
    return store.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)
