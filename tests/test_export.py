"""Exports: weights come back bit for bit, functions compute what PyTorch does at sizes of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastgan import export
from fastgan.checkpoint import load_generator, write_weights
from fastgan.models import ResnetGenerator, UnetGenerator, translate_any_size


def random_net(kind: str = "resnet") -> nn.Module:
    torch.manual_seed(0)
    if kind == "unet":
        net: nn.Module = UnetGenerator(3, 1, ngf=2, levels=3)
    else:
        net = ResnetGenerator(1, 3, ngf=4, blocks=1)
    for value in net.parameters():
        nn.init.normal_(value, 0, 0.2)
    return net


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of ours with 12-bit input and float output."""
    about = {"network": "G", "ranges": [[0, 4095], [10, 20]], "dtypes": ["uint16", "float32"],
             "settings": {"output": "tanh", "direction": "AtoB"}}  # fmt: skip
    write_weights(tmp_path / "G.safetensors", random_net().state_dict(), about)
    return tmp_path / "G.safetensors"


def says(args: list[object], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    if code:
        with pytest.raises(SystemExit) as stop:
            export.main([str(a) for a in args])
        assert stop.value.code == code
    else:
        export.main([str(a) for a in args])
    said = capsys.readouterr()
    lines = (said.err if code else said.out).strip().splitlines()
    assert len(lines) == 1 and not (said.out if code else said.err)
    return lines[0]


def test_upstream_to_ours_to_upstream_is_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {k: v.half() if k == "model.26.weight" else v for k, v in random_net("unet").state_dict().items()}
    torch.save(first, tmp_path / "latest_net_G.pth")
    ours, back = tmp_path / "ours.safetensors", tmp_path / "again" / "back.pth"
    says([tmp_path / "latest_net_G.pth", ours, "--format", "safetensors"], capsys)
    assert f"{len(first)} tensors" in says([ours, back, "--format", "upstream"], capsys)
    second = torch.load(back, weights_only=True)
    assert list(second) == list(first)
    for key, value in first.items():
        assert second[key].dtype == value.dtype and second[key].shape == value.shape
        assert second[key].numpy().tobytes() == value.numpy().tobytes()


def test_ranges_stay_with_safetensors(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says([source, tmp_path / "copy.safetensors", "--format", "safetensors"], capsys)
    assert load_generator(tmp_path / "copy.safetensors").ranges == ((0, 4095), (10, 20))


@pytest.mark.parametrize("size", [(16, 24), (19, 30), (7, 9)])
@pytest.mark.parametrize("kind", ["resnet", "unet"])
def test_the_whole_function_is_the_translation_of_any_size(kind: str, size: tuple[int, int]) -> None:
    net = random_net(kind).eval()
    whole = export.Whole(net, ((0.0, 255.0), (10.0, 20.0)), "tanh")
    x = torch.rand(2, 1 if kind == "resnet" else 3, *size) * 255
    with torch.no_grad():
        expected = (translate_any_size(net, x / 127.5 - 1) + 1) / 2 * 10 + 10
        torch.testing.assert_close(whole(x), expected, rtol=0, atol=1e-4)


def expect(source: Path, x: Tensor) -> np.ndarray:
    net = load_generator(source).net
    with torch.no_grad():
        return ((translate_any_size(net, x / 4095 * 2 - 1) + 1) / 2 * 10 + 10).numpy()


def test_onnx(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    said = says([source, tmp_path / "g.onnx", "--format", "onnx"], capsys)
    assert "0..4095" in said and "10..20" in said
    session = runtime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1] == 1 and isinstance(session.get_inputs()[0].shape[2], str)
    about = json.loads(session.get_modelmeta().custom_metadata_map["fastgan"])
    assert about["ranges"] == [[0, 4095], [10, 20]]
    for size in ((5, 6), (32, 8), (29, 50)):
        x = torch.rand(1, 1, *size) * 4095
        (y,) = session.run(None, {"image": x.numpy()})
        # a unit is a fifth of the scale on which the limit is 1e-4
        np.testing.assert_allclose(y, expect(source, x), rtol=0, atol=5e-4)


def test_torch_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = random_net("unet").eval()
    torch.save(net.state_dict(), tmp_path / "latest_net_G.pth")
    says([tmp_path / "latest_net_G.pth", tmp_path / "g.pt2", "--format", "torch-export"], capsys)
    run = torch.export.load(tmp_path / "g.pt2").module()
    # 8 pixels are one pixel at the bottom of three levels
    for size in ((8, 8), (21, 35)):
        x = torch.rand(1, 3, *size) * 255
        with torch.no_grad():
            expected = (translate_any_size(net, x / 127.5 - 1) + 1) / 2 * 255
            torch.testing.assert_close(run(x), expected, rtol=0, atol=0.0128)  # 1e-4 in [-1, 1]


def test_a_file_that_computes_something_else_does_not_appear(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(whole: export.Whole, found: object, path: Path) -> object:
        path.write_bytes(b"x")
        return lambda x: whole(x) + 0.01

    monkeypatch.setattr(export, "_torch_export", wrong)
    assert "differs from PyTorch" in says([source, tmp_path / "g.pt2", "--format", "torch-export"], capsys, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["G.safetensors"]


def test_mistakes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "change the name" in says([source, tmp_path / "g.pth", "--format", "onnx"], capsys, 2)
    assert "overwrite" in says([source, source, "--format", "safetensors"], capsys, 2)
    assert "does not exist" in says([tmp_path / "no", tmp_path / "g.pth", "--format", "upstream"], capsys, 2)
    assert "coreml" in says([source, tmp_path / "g", "--format", "coreml"], capsys, 2)
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in says([source, tmp_path / "file/g.pth", "--format", "upstream"], capsys, 2)
    assert "cannot be written" in says(
        [source, tmp_path / "file/g.pt2", "--format", "torch-export"], capsys, 2
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["G.safetensors", "file"]
