"""Initial weights of all networks (pix2pix, section 6.2: N(0, 0.02))."""

from __future__ import annotations

from torch import nn


def init_weights(net: nn.Module, kind: str = "normal", gain: float = 0.02) -> None:
    """Fill convolutions and linear layers in place; biases 0; batch-norm weights N(1, gain).

    Args:
        net: the network.
        kind: "normal" (std = gain), "xavier" (normal, gain), "kaiming" (normal, fan in) or "orthogonal"
            (gain); "torch" leaves what torch has drawn. gain: see kind.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "torch":
        return
    if kind not in ("normal", "xavier", "kaiming", "orthogonal"):
        raise ValueError(
            f"init_weights: kind must be normal, xavier, kaiming, orthogonal or torch, got {kind}"
        )
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            if kind == "normal":
                nn.init.normal_(module.weight, 0.0, gain)
            elif kind == "xavier":
                nn.init.xavier_normal_(module.weight, gain)
            elif kind == "kaiming":
                nn.init.kaiming_normal_(module.weight, a=0, mode="fan_in")
            else:
                nn.init.orthogonal_(module.weight, gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, gain)
            nn.init.zeros_(module.bias)
