import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import crop_images
from fastgan_kernels._op import INTERPRET, runs_kernel
from torch import Tensor

# the package names the function like its module
module = importlib.import_module("fastgan_kernels.crop_images")

# (height, width), top, left, mirrored of each image of the batch; crop
CASES = [
    ([((1, 1), 0, 0, False)], (1, 1)),  # smallest legal
    ([((7, 9), 2, 3, True), ((6, 12), 1, 7, False), ((7, 9), 0, 0, True)], (5, 4)),  # unequal sizes
    ([((40, 33), 3, 1, True)], (34, 31)),  # more than one block
    ([], (3, 3)),  # empty batch
]
DTYPES = {torch.uint8: np.uint8, torch.int16: np.uint16, torch.float32: np.float32}
RANGES = {torch.uint8: (0.0, 255.0), torch.int16: (100.0, 40000.0), torch.float32: (-0.4, 1.1)}


def filled(
    images: list, channels: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """Store, records and the arrays that lie in the store, with a gap before each."""
    rng, parts, records, arrays = np.random.default_rng(0), [np.zeros(0)], [], []
    place = 0
    for (height, width), top, left, flip in images:
        array = rng.uniform(-0.5, 1.5, (height, width, channels))
        if dtype != torch.float32:
            array = rng.integers(0, np.iinfo(DTYPES[dtype]).max, array.shape, endpoint=True)
        arrays.append(array.astype(DTYPES[dtype]))
        place += 5
        records.append([place, height, width, top, left, int(flip)])
        place += array.size
        parts += [np.zeros(5), arrays[-1].ravel()]
    flat = np.concatenate(parts).astype(DTYPES[dtype])
    store = torch.from_numpy(flat.view(np.int16) if dtype == torch.int16 else flat)
    return store.to(device), torch.tensor(records, device=device, dtype=torch.int64).view(-1, 6), arrays


def expected(arrays: list, images: list, size: tuple[int, int], limits, tanh, clamp, halo) -> Tensor:
    """By slices and torch's own arithmetic, image by image."""
    done = []
    for array, (_, top, left, flip) in zip(arrays, images):
        crop = array[top : top + size[0], left : left + size[1]]
        x = torch.from_numpy((crop[:, ::-1] if flip else crop).astype(np.float32)).permute(2, 0, 1)
        x = (x - limits[0]) / (limits[1] - limits[0])
        x = x.clamp(0, 1) if clamp else x
        x = x * 2 - 1 if tanh else x
        done.append(F.pad(x[None], (halo,) * 4, mode="reflect"))
    return torch.cat(done)


@pytest.mark.parametrize("output_range, clamp, halo", [("tanh", False, 0), ("sigmoid", True, 2)])
@pytest.mark.parametrize("dtype, channels", [(torch.uint8, 3), (torch.int16, 1), (torch.float32, 5)])
@pytest.mark.parametrize("images, size", CASES)
def test_matches_reference(images, size, dtype, channels, output_range, clamp, halo, device):
    store, records, arrays = filled(images, channels, dtype, device)
    halo = min(halo, *(side - 1 for side in size))
    y = crop_images(
        store, records, channels, size, RANGES[dtype], output_range=output_range, clamp=clamp, halo=halo
    )
    shape = (len(images), channels, size[0] + 2 * halo, size[1] + 2 * halo)
    assert y.shape == shape and y.dtype == torch.float32
    assert y.stride()[1:] == (1, shape[3] * channels, channels)
    if images:
        # bit by bit
        tanh = output_range == "tanh"
        assert torch.equal(y.cpu(), expected(arrays, images, size, RANGES[dtype], tanh, clamp, halo))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device):
    store, records, _ = filled(CASES[1][0], 3, torch.uint8, device)
    exact = crop_images(store, records, 3, (5, 4), (0, 255), output_range="sigmoid")
    y = crop_images(store, records, 3, (5, 4), (0, 255), output_range="sigmoid", dtype=dtype)
    assert y.dtype == dtype
    if INTERPRET and dtype == torch.bfloat16:
        # the interpreter rounds towards zero
        torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=0)
    else:
        assert torch.equal(y, exact.to(dtype))


def test_a_nan_stays_a_nan(device):
    store = torch.tensor([float("nan"), 5.0, -5.0], device=device)
    record = torch.tensor([[0, 1, 3, 0, 0, 0]], device=device)
    y = crop_images(store, record, 1, (1, 3), (0, 1), clamp=True, output_range="sigmoid")
    assert y[..., 0].isnan() and y.flatten()[1:].tolist() == [1, 0]


def test_images_beyond_the_reach_of_32_bits(device):
    # only the end of the store is touched, so that on a CPU it takes no memory
    store = torch.from_numpy(np.zeros(2**31 + 64, np.uint8)).to(device)
    store[-27:] = torch.arange(27, dtype=torch.uint8, device=device)
    record = torch.tensor([[len(store) - 27, 3, 3, 1, 1, 0]], device=device)
    y = crop_images(store, record, 3, (2, 2), (0, 255), output_range="sigmoid")
    wanted = torch.arange(27.0, device=device).view(1, 3, 3, 3)[:, 1:, 1:] / 255
    assert torch.equal(y.permute(0, 2, 3, 1), wanted)


def test_registration(device):
    store, records, _ = filled(CASES[1][0], 3, torch.uint8, device)
    arguments = (store, records, 3, 5, 4, 0.0, 255.0, True, False, 1, torch.float32)
    torch.library.opcheck(torch.ops.fastgan.crop_images.default, arguments)


def test_runs_the_kernel(device, monkeypatch):
    store, records, _ = filled(CASES[1][0], 3, torch.uint8, device)
    if not runs_kernel(store):
        pytest.skip("the CPU outside the interpreter runs the reference")
    monkeypatch.delattr(module, "reference")
    assert crop_images(store, records, 3, (5, 4), (0, 255)).isfinite().all()


def test_no_graph_break(device):
    torch._dynamo.reset()
    store, records, _ = filled(CASES[1][0], 3, torch.uint8, device)

    def function(records: Tensor) -> Tensor:
        return crop_images(store, records, 3, (5, 4), (0, 255), halo=1)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(records), function(records))


def test_strided_store_and_records(device):
    store, records, _ = filled(CASES[1][0], 3, torch.uint8, device)
    y = crop_images(store, records, 3, (5, 4), (0, 255))
    twice, wide = store.repeat_interleave(2)[::2], torch.cat([records, records], 1)[:, :6]
    assert torch.equal(crop_images(twice, wide, 3, (5, 4), (0, 255)), y)


BAD = [
    ({"store": torch.zeros(3, 3)}, r"store must be 1-D, got shape \(3, 3\)"),
    ({"store": torch.zeros(3, dtype=torch.int32)}, "store must be uint8, int16 or float32, got torch.int32"),
    ({"records": torch.zeros(2, 5, dtype=torch.int64)}, r"records must be \(N, 6\) .*got \(2, 5\) of"),
    ({"records": torch.zeros(2, 6)}, r"records must be .*of torch.int64, got \(2, 6\) of torch.float32"),
    ({"channels": 0}, "channels must be at least 1, got 0"),
    ({"size": (0, 2)}, r"size must be at least 1x1, got \(0, 2\)"),
    ({"halo": 2}, "halo must be in 0 <= halo < size of 2x2, got 2"),
    ({"value_range": (1.0, 1.0)}, r"value_range must be two growing numbers, got \(1.0, 1.0\)"),
    ({"output_range": "relu"}, "output_range must be tanh or sigmoid, got relu"),
    ({"dtype": torch.int8}, "dtype must be float32, bfloat16 or float16, got torch.int8"),
]


@pytest.mark.parametrize("changed, message", BAD)
def test_bad_input(changed, message):
    given = {"store": torch.zeros(12), "records": torch.tensor([[0, 2, 2, 0, 0, 0]])}
    given |= {"channels": 3, "size": (2, 2), "value_range": (0.0, 1.0)}
    with pytest.raises(ValueError, match=f"crop_images: {message}"):
        crop_images(**given | changed)
