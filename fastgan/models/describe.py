"""Which network a state dict is of, read off its keys and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def describe(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Network and its arguments, read off the keys and shapes of a state dict.

    Returns:
        "network" (resnet, unet, encdec, stargan, stargan-d, discogan, pan, munit, srresnet, srcnn, picture,
        patchgan) and the keyword arguments of its class; {} where nothing fits. Dropout of a U-Net, reflect
        against replicate padding and the scale of srcnn leave no trace.
    """
    conv = {k.removesuffix(".weight"): v for k, v in state.items() if k.endswith(".weight") and v.ndim == 4}
    has_batch = any(k.endswith("running_mean") for k in state)

    def norm(inner: str) -> str:
        return "batch" if has_batch else "instance" if f"{inner}.bias" in state else "none"

    if "model.model.0" in conv and "model.model.3" in conv:
        inner, outer = conv["model.model.0"], conv["model.model.3"]
        levels = max(k.count(".model.") for k in conv)
        skips = outer.shape[0] == 2 * inner.shape[0]
        return {
            "network": "unet" if skips else "encdec", "in_channels": inner.shape[1],
            "out_channels": outer.shape[1], "levels": levels, "ngf": inner.shape[0],
            "norm": norm("model.model.0"),
        }  # fmt: skip
    blocks = sorted({int(k.split(".")[1]) for k in conv if ".conv_block." in k})
    top = sorted(int(k.split(".")[1]) for k in conv if re.fullmatch(r"model\.\d+", k))
    if top and top[0] == 1:
        first, last = "model.1", f"model.{top[-1]}"
        # zero padding has no layer of its own, so the block's first convolution is its first layer
        start = f"model.{blocks[0]}.conv_block." if blocks else ""
        inside = [int(k.removeprefix(start)) for k in conv if blocks and k.startswith(start)]
        zero = inside[:1] == [0]
        blurs = {"blur_down": 7, "blur_up": top[-1] - 5}
        return {
            "network": "resnet", "in_channels": conv[first].shape[1], "out_channels": conv[last].shape[0],
            "ngf": conv[first].shape[0], "blocks": len(blocks), "norm": norm(first),
            "padding": "zero" if zero else "reflect",
            "dropout": bool(blocks) and inside[-1] - inside[0] == (4 if zero else 5),
        } | {name: True for name, at in blurs.items() if f"model.{at}.filt" in state}  # fmt: skip
    # a 7x7 entry: the networks of DCGAN have the same names
    if "main.0" in conv and "main.1.weight" in state and conv["main.0"].shape[-1] == 7:
        entry = conv["main.0"]
        channels = conv[f"main.{max(int(k[5:]) for k in conv if re.fullmatch(r'main.[0-9]+', k))}"].shape[0]
        return {
            "network": "stargan", "channels": channels, "labels": entry.shape[1] - channels,
            "ngf": entry.shape[0], "blocks": sum(k.endswith(".main.0") for k in conv),
        }  # fmt: skip
    if {"main.0", "conv1", "conv2"} <= conv.keys():
        entry, reader = conv["main.0"], conv["conv2"]
        levels = sum(k.startswith("main.") for k in conv)
        return {
            "network": "stargan-d", "channels": entry.shape[1], "labels": reader.shape[0],
            "size": reader.shape[2] * 2**levels, "ndf": entry.shape[0], "levels": levels,
        }  # fmt: skip
    # a run of layers, or blocks of them
    ups = sorted((k for k in conv if k.startswith("decoder.")), key=lambda k: int(k.split(".")[1]))
    for network, first, second in (
        ("discogan", "encoder.0", "encoder.2"),
        ("pan", "encoder.0.0", "encoder.1.0"),
    ):
        if ups and first in conv and second in conv:
            entry, biased = conv[first], f"{second}.bias" in state
            narrow = {"bottleneck": len(conv["bottleneck.0"])} if "bottleneck.0" in conv else {}
            return {
                "network": network, "in_channels": entry.shape[1], "out_channels": conv[ups[-1]].shape[1],
                "levels": len(ups), "ngf": entry.shape[0],
                "norm": "batch" if has_batch else "none" if biased else "instance", **narrow,
            }  # fmt: skip
    content = [k for k in conv if k.startswith("a.enc_content.model.")]
    style, mlp = (f"a.{k}" for k in ("enc_style.model.6", "mlp.model.0.fc.weight"))
    if "b.enc_content.model.0.conv" in conv and "a.enc_content.model.0.conv" in conv and style in conv:
        levels = sum(k.count(".") == 4 for k in content) - 1
        return {
            "network": "munit", "ngf": len(conv["a.enc_content.model.0.conv"]), "levels": levels,
            **{f"channels_{k}": conv[f"{k}.enc_content.model.0.conv"].shape[1] for k in "ab"},
            "blocks": sum(k.endswith(".model.0.conv") and k.count(".") > 4 for k in content),
            "style_size": len(conv[style]), "mlp_size": len(state[mlp]) if mlp in state else 0,
        }  # fmt: skip
    if "a.cnns.0.0.conv" in conv:
        return {"network": "discriminators of munit", "ndf": len(conv["a.cnns.0.0.conv"])}
    if "head.0" in conv and "join.0" in conv:
        entry, doublings = conv["head.0"], [k for k in conv if k.startswith("up.")]
        return {
            "network": "srresnet", "channels": entry.shape[1], "scale": 2 ** len(doublings),
            "ngf": entry.shape[0], "blocks": len({k.split(".")[1] for k in conv if k.startswith("blocks.")}),
            "norm": "batch" if has_batch else "none" if "join.0.bias" in state else "instance",
        }  # fmt: skip
    if list(conv) == ["layers.1", "layers.4", "layers.7"] and conv["layers.1"].shape[1:] == (1, 9, 9):
        return {"network": "srcnn", "width": conv["layers.4"].shape[-1]}
    if list(state) == ["image"]:
        return {"network": "picture", "height": state["image"].shape[1], "width": state["image"].shape[2]}
    if "net.0" in conv or "model.0" in conv:
        head = "net" if "net.0" in conv else "model"
        fields = {("net", 3): 1, ("model", 3): 16, ("model", 4): 34, ("model", 5): 70, ("model", 6): 142,
                   ("model", 7): 286}  # fmt: skip
        entry = conv[f"{head}.0"]
        return {
            "network": "patchgan", "in_channels": entry.shape[1], "ndf": entry.shape[0],
            "receptive_field": fields.get((head, len(conv)), 0), "norm": norm(f"{head}.2"),
        }  # fmt: skip
    return {}


def say(description: Mapping[str, Any]) -> str:
    """A description as words for a person."""
    if not description:
        return "a network that is not known here"
    if description["network"] == "picture":
        return "the picture of a run of style, {width}x{height} pixels".format_map(description)
    rest = ", ".join(f"{k} {v}" for k, v in description.items() if k != "network")
    return f"{description['network']} ({rest})"
