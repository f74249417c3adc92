"""A forward is read as a graph only where the graph does the same at every later call."""

from __future__ import annotations

import math
import random
import textwrap
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from fastgan import dataflow

SCALE = 2.0


def _helper(x: Tensor) -> Tensor:
    return x * SCALE


class Base(nn.Module):
    """Attributes of every kind that a forward may read."""

    limit, label, missing = 3, "a", None

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 3, 1), nn.Parameter(torch.ones(1))
        self.many = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Tanh()])
        self.settings, self.count = {"on": True}, 0
        self.conv.scale = 2.0

    def helper(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Fine(Base):
    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """Everything that a graph keeps."""
        if self.missing:
            x = self.missing(x)
        elif self.label == "a" and not isinstance(self.conv, nn.Linear):
            y = self.conv(x) if self.limit > 2 else x
        for layer in self.many:
            y = layer(y)
        for i in range(len(self.many)):
            y = self.many[i](y)
        y += x
        y *= self.gain
        y = F.relu(y / math.sqrt(2)).view(x.size(0), -1)
        return torch.cat([y, torch.flatten(x, 1) * self.gain.view(1)], 1)


def test_a_graph_computes_what_the_forward_does():
    module, x = Fine().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    code = dataflow.read(module).python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    assert_close(names["forward"](module, x), module(x), rtol=0, atol=0)
    assert " += " in code.src
    assert dataflow.facts(module) == {"label": "a", "limit": 3, "missing": None}
    assert dataflow.facts(nn.Sequential(module)) == {}


def test_a_child_is_a_node():
    graph = dataflow.read(nn.Sequential(Fine(), nn.Sequential(nn.ReLU())))
    assert [str(n.target) for n in graph.nodes if n.op == "call_module"] == ["0", "1"]


def test_modes_are_left_as_they_were():
    net = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.ReLU())
    before = [m.training for m in net.modules()]
    dataflow.read(net)
    assert [m.training for m in net.modules()] == before == [True, False, True]


# what the forward does -> why it is not read
REFUSED = {
    "with torch.no_grad(): y = self.conv(x)\nreturn y": "has a statement of kind With",
    "try: return self.conv(x)\nexcept ValueError: return x": "has a statement of kind Try",
    "assert x.dim() == 4\nreturn self.conv(x)": "has a statement of kind Assert",
    "f = lambda t: t\nreturn f(x)": "has an expression of kind Lambda",
    "self.count = 1\nreturn self.conv(x)": "stores an attribute, .count",
    "self.count += 1\nreturn self.conv(x)": "stores an attribute, .count",
    "y = self.conv(x)\ny[0] = 0\nreturn y": "stores an item",
    "y = self.conv(x)\ny //= 2\nreturn y": "has an in-place FloorDiv",
    "print(x)\nreturn self.conv(x)": "calls print",
    "return self.helper(x)": "calls self.helper",
    "return _helper(self.conv(x))": "calls _helper",
    "return self.conv(x) * random.gauss(0, 1)": "calls random.gauss",
    "return self.conv(x) * SCALE": "reads the global SCALE",
    "return self.conv(x) if self.settings['on'] else x": "reads self.settings",
    "return self.conv(x) * self.conv.scale": "reads self.conv.scale",
    "return self.conv(x) if random.random() < 0.5 else x": "calls random.random",
    "return self.conv(x) + torch.randn(1, 3, 4, 4)": "calls torch.randn",
    "return self.conv(x) * torch.ones(1).item()": "calls torch.ones(1).item",
    "return self.conv(x) + torch.ones(1, 3, 1, 1)": "makes a tensor that does not depend on its input",
    "return (self.conv if self.limit else F.relu)(x)": "calls self.conv if self.limit else F.relu",
    "return self.conv(x) if self.training else x": "differs between training and evaluation mode",
    "return F.dropout(self.conv(x), 0.5, self.training)": "differs between training and evaluation mode",
    "return self.conv(x) if x.sum() > 0 else x": "tracing its forward failed: symbolically traced variables",
    "return torch.utils.checkpoint.checkpoint(self.conv, x)": "calls torch.utils.checkpoint.checkpoint",
    "return super().forward(x)": "calls super",
}


def _with_forward(body: str, tmp_path, arguments: str = "self, x", decorator: str = "") -> nn.Module:
    """A module whose forward has its source in a file, as inspect wants it."""
    path = tmp_path / "network.py"
    lines = [decorator, f"def forward({arguments}):", textwrap.indent(body, "    ")]
    path.write_text("\n".join(line for line in lines if line))
    names = {**globals()}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return types.new_class("Net", (Base,), exec_body=lambda space: space.update(forward=names["forward"]))()


@pytest.mark.parametrize("body", REFUSED)
def test_refusals(body, tmp_path):
    net = _with_forward(body, tmp_path)
    before = set(vars(net))
    with pytest.raises(dataflow.Unreadable) as error:
        dataflow.read(net)
    assert REFUSED[body] in str(error.value)
    assert set(vars(net)) == before


@pytest.mark.parametrize("arguments", ["self, x, *rest", "self, x, **rest", "self, x, *, flag=False"])
def test_signatures(arguments, tmp_path):
    with pytest.raises(dataflow.Unreadable, match="takes \\*args or keyword-only"):
        dataflow.read(_with_forward("return self.conv(x)", tmp_path, arguments))


def test_decorators_and_replaced_forwards(tmp_path):
    with pytest.raises(dataflow.Unreadable, match="not a plain function"):
        dataflow.read(_with_forward("return self.conv(x)", tmp_path, decorator="@torch.no_grad()"))
    net = _with_forward("return self.conv(x)", tmp_path)
    assert dataflow.read(net)
    net.forward = lambda x: x
    with pytest.raises(dataflow.Unreadable, match="was replaced"):
        dataflow.read(net)
    names = {"random": random}
    exec("def forward(self, x):\n    return self.conv(x)", names)
    hidden = type("Hidden", (Base,), {"forward": names["forward"]})
    with pytest.raises(dataflow.Unreadable, match="source of its forward is not available"):
        dataflow.read(hidden())
