"""Checkpoints: whole or absent, foreign weights recognised, nothing unpickled."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastgan import checkpoint
from fastgan.checkpoint import CheckpointError, describe, load_into, read_weights, say
from fastgan.models import (
    DiscoGANGenerator,
    PANGenerator,
    PatchDiscriminator,
    ResnetGenerator,
    UnetGenerator,
    build,
)

NETS = {
    "resnet 9 instance": lambda: ResnetGenerator(3, 3, ngf=4),
    "resnet 6 batch dropout": lambda: ResnetGenerator(3, 1, ngf=4, blocks=6, norm="batch", dropout=True),
    "resnet instance dropout": lambda: ResnetGenerator(3, 3, ngf=4, blocks=1, dropout=True),
    "resnet zero padding": lambda: ResnetGenerator(4, 3, ngf=4, blocks=2, padding="zero"),
    "resnet zero dropout": lambda: ResnetGenerator(4, 3, ngf=4, blocks=2, padding="zero", dropout=True),
    "resnet none": lambda: ResnetGenerator(4, 3, ngf=4, blocks=2, norm="none"),
    "resnet no blocks": lambda: ResnetGenerator(3, 3, ngf=4, blocks=0),
    "unet_256": lambda: UnetGenerator(3, 2, ngf=2),
    "unet_128 instance": lambda: UnetGenerator(3, 2, ngf=2, levels=7, norm="instance"),
    "unet 2 none": lambda: UnetGenerator(1, 2, ngf=2, levels=2, norm="none"),
    "encdec": lambda: UnetGenerator(1, 2, ngf=2, levels=5, skips=False),
    **{
        f"discogan {norm} {width}": lambda norm=norm, width=width: DiscoGANGenerator(
            3, 2, levels=4, ngf=2, norm=norm, bottleneck=width
        )
        for norm in ("batch", "instance", "none")
        for width in (0, 7)
    },
    **{
        f"pan {norm}": lambda norm=norm: PANGenerator(3, 2, ngf=2, norm=norm)
        for norm in ("batch", "instance", "none")
    },
    **{
        f"patch {field} {norm}": lambda field=field, norm=norm: PatchDiscriminator(
            6, ndf=2, receptive_field=field, norm=norm
        )
        for field in (1, 16, 34, 70, 142, 286)
        for norm in ("instance", "batch")
    },
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_is_read_off_its_keys(name: str) -> None:
    net = NETS[name]()
    found = describe(net.state_dict())
    twin = build(found)
    load_into(twin, net.state_dict(), "here")
    side = 16 if "resnet" in name else 256
    x = torch.rand(1, found["in_channels"], side, side)
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(x), net.eval()(x), rtol=0, atol=0)


def test_unknown_keys_are_not_recognised() -> None:
    assert describe({"layer.weight": torch.zeros(3, 3)}) == {}
    assert "not known" in say({})


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_upstream_files_load_with_no_conversion(prefix: str, tmp_path: Path) -> None:
    net = ResnetGenerator(3, 3, ngf=4, blocks=2)
    torch.save({prefix + k: v for k, v in net.state_dict().items()}, tmp_path / "latest_net_G.pth")
    state, about = read_weights(tmp_path / "latest_net_G.pth")
    assert about == {}
    load_into(ResnetGenerator(3, 3, ngf=4, blocks=2), state, "file")


def test_old_instance_norm_statistics_are_dropped(tmp_path: Path) -> None:
    net = ResnetGenerator(3, 3, ngf=4, blocks=1)
    state = dict(net.state_dict())
    for place in ("model.2", "model.10.conv_block.2"):
        state |= {f"{place}.running_mean": torch.zeros(4), f"{place}.running_var": torch.ones(4)}
        state[f"{place}.num_batches_tracked"] = torch.tensor(3)
    torch.save(state, tmp_path / "old.pth")
    assert read_weights(tmp_path / "old.pth")[0].keys() == net.state_dict().keys()
    # those of batch norm stay
    batch = ResnetGenerator(3, 3, ngf=4, blocks=1, norm="batch")
    torch.save(batch.state_dict(), tmp_path / "batch.pth")
    assert read_weights(tmp_path / "batch.pth")[0].keys() == batch.state_dict().keys()


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("boom"),))  # type: ignore[return-value]


def test_pickled_objects_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"weight": Bomb()}))
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    for name in ("bomb.pth", "module.pth"):
        with pytest.raises(CheckpointError, match=f"{name} is not a plain file of weights"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_give_one_line(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    if suffix == ".safetensors" and content.endswith(b" "):
        assert read_weights(path) == ({}, {})  # an empty but valid file
        return
    with pytest.raises(CheckpointError) as error:
        read_weights(path)
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_file_says_what_it_looks_like(tmp_path: Path) -> None:
    torch.save(UnetGenerator(3, 3, ngf=2, levels=5).state_dict(), tmp_path / "u.pth")
    state, _ = read_weights(tmp_path / "u.pth")
    with pytest.raises(CheckpointError) as error:
        load_into(ResnetGenerator(3, 3, ngf=4), state, "u.pth")
    text = str(error.value)
    assert "unet" in text and "levels 5" in text and "resnet" in text and "model.1.weight" in text
    with pytest.raises(CheckpointError, match="of another shape"):
        load_into(ResnetGenerator(3, 3, ngf=8), ResnetGenerator(3, 3, ngf=4).state_dict(), "x")


def test_save_and_load_give_back_every_tensor(tmp_path: Path) -> None:
    net = UnetGenerator(3, 3, ngf=2, levels=3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state: dict[str, Tensor] = {
        "a": torch.rand(2, 3),
        "rng": torch.get_rng_state(),
        "empty": torch.zeros(0, 4),
    }
    path = checkpoint.save(tmp_path, 7, {"G": net.state_dict()}, state, {"step": 7, "note": "ä"})
    nets, back, about = checkpoint.load(path)
    assert path.name == "step_00000007" and about == {"step": 7, "note": "ä"}
    assert all(torch.equal(back[k], v) for k, v in state.items()) and back.keys() == state.keys()
    assert all(torch.equal(nets["G"][k], v) for k, v in net.state_dict().items())
    assert checkpoint.header(path / "G.safetensors")["network"] == "G"


def test_old_checkpoints_go_and_leftovers_of_a_kill_too(tmp_path: Path) -> None:
    (tmp_path / ".writing_00000001").mkdir()
    (tmp_path / ".writing_00000001/G.safetensors").write_bytes(b"half")
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, {}, {}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_0000000{k}" for k in (3, 4, 5)]
    with pytest.raises(CheckpointError, match="state.safetensors is missing"):
        checkpoint.load(tmp_path)


def test_a_kill_while_writing_leaves_only_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w": torch.zeros(3)}
    checkpoint.save(tmp_path, 1, {"G": tensors, "D": tensors}, tensors, {})
    real, written = checkpoint.save_file, []

    def killed_at_the_second(*args: object, **kwargs: object) -> None:
        written.append(args)
        if len(written) == 2:
            raise SystemExit  # nothing of ours runs after a kill
        real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "save_file", killed_at_the_second)
        checkpoint.save(tmp_path, 2, {"G": tensors, "D": tensors}, tensors, {})
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000001"]
    checkpoint.save(tmp_path, 2, {"G": tensors, "D": tensors}, tensors, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be saved"):
        checkpoint.save(tmp_path / "file", 1, {}, {}, {})
