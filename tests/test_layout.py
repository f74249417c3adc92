"""The house rules that a tool can check: import direction, one name everywhere, file sizes, public names."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgan
from fastgan.recipes import RECIPES

ROOT = Path(__file__).parents[1]
CODE = [
    p
    for folder in ("fastgan", "kernels", "benchmarks", "tests")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if "egg-info" not in str(p)
]
OPS = [p.stem for p in sorted((ROOT / "kernels/fastgan_kernels").glob("[!_]*.py"))]

# module of fastgan -> modules of fastgan that it may import; an arrow never points back
LEAVES = {"checkpoint", "config", "data", "gallery", "losses", "metrics", "monitor"}
MAY_IMPORT = {
    "__init__": {"accelerate", "inference", "models", "recipes", "step"},
    **{leaf: set() for leaf in LEAVES},
    # its command line
    "data": {"config"},
    "metrics": {"config"},
    # a leaf but for the networks that it builds: no model imports it
    "checkpoint": {"config", "models"},
    "device": {"config"},
    "parallel": {"config"},
    "sync_norm": {"parallel"},
    "layers": set(),
    "optim": set(),
    "dataflow": set(),
    "runs": {"layers"},
    "accelerate": {"dataflow", "layers", "runs"},
    "stack": {"layers"},
    "models": {"layers", "losses", "stack"},
    "recipes": {"checkpoint", "config", "layers", "losses", "models", "stack"},
    "graph": set(),
    "schedule": {"config"},
    "step": {"config", "data", "graph", "layers", "optim", "recipes", "stack"},
    "memory": {"config", "models", "recipes", "stack", "step"},
    "measure": {"checkpoint", "config", "data", "generative", "metrics", "models", "recipes"},
    "trainer": {
        "",
        "measure",
        "device",
        *LEAVES,
        "memory",
        "parallel",
        "recipes",
        "samples",
        "schedule",
        "stack",
        "step",
        "sync_norm",
    },
    "train": {*LEAVES, "parallel", "recipes", "trainer"},
    "generative": {"recipes"},
    "samples": {"data", "generative", "models", "recipes"},
    "tiling": {"config", "layers", "stack"},
    "inference": {
        "checkpoint",
        "config",
        "data",
        "device",
        "layers",
        "memory",
        "models",
        "parallel",
        "tiling",
    },
    "files": {"config", "data", "inference", "tiling"},
    "translate": {*LEAVES, "files", "inference", "parallel"},
    "compare": {"config", "gallery"},
    "trained": {"checkpoint", "config", "recipes"},
    "evaluate": {"device", *LEAVES, "measure", "models", "recipes", "trained", "trainer"},
    "sample": {*LEAVES, "device", "generative", "trained"},
    "export": {*LEAVES, "models"},
    "demo": {*LEAVES, "files", "inference", "tiling"},
}


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # `from fastgan import losses` imports the module fastgan.losses
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "fastgan"
                else {node.module}
            )
    return names


def room(name: str) -> str:
    """fastgan.models.unet -> models; fastgan.__version__ -> the empty string."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in MAY_IMPORT else ""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "fastgan").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(ROOT / "fastgan").parts[0].removesuffix(".py")
    assert own in MAY_IMPORT, f"a new module: give it a place in MAY_IMPORT of {Path(__file__).name}"
    used = {room(n) for n in imported(path) if n.split(".")[0] == "fastgan"} - {own}
    assert used <= MAY_IMPORT[own], f"{own} must not import {used - MAY_IMPORT[own]}"


def test_kernels_do_not_import_fastgan_and_benchmarks_not_tests() -> None:
    for path in CODE:
        top = path.relative_to(ROOT).parts[0]
        forbidden = {
            "kernels": {"fastgan", "tests", "benchmarks"},
            "benchmarks": {"tests"},
            "fastgan": {"tests"},
        }
        used = {name.split(".")[0] for name in imported(path)}
        assert not used & forbidden.get(top, set()), path


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_everywhere(op: str) -> None:
    source = (ROOT / f"kernels/fastgan_kernels/{op}.py").read_text(encoding="utf-8")
    assert f"def {op}(" in source
    assert f'"fastgan::{op}"' in source
    # kernels that several ops share lie in files of their own
    kernels = re.findall(r"def (_\w+_kernel)\(", source)
    assert all(name.startswith(f"_{op}_") for name in kernels), "a profiler shows the name of the op"
    assert (ROOT / f"tests/kernels/test_{op}.py").is_file()
    assert (ROOT / f"benchmarks/bench_{op}.py").is_file()
    assert f"`{op}`" in (ROOT / "kernels/README.md").read_text(encoding="utf-8")


def test_there_are_ops() -> None:
    assert {"reflect_pad2d", "instance_norm_act"} <= set(OPS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_one_name_everywhere(name: str) -> None:
    assert RECIPES[name].name == name
    assert (
        len((ROOT / f"fastgan/recipes/{name.replace('-', '_')}.py").read_text(encoding="utf-8").splitlines())
        <= 200
    )
    assert f"`{name}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"default", "digits"} <= set(RECIPES[name].presets)


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small_and_documented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    if path.relative_to(ROOT).parts[0] != "tests":
        assert ast.get_docstring(ast.parse(text)), "a module starts with what it is"


def test_public_names() -> None:
    assert len(fastgan.__all__) <= 12
    assert all(hasattr(fastgan, name) for name in fastgan.__all__)


def test_no_top_level_package_called_kernels() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()


def test_readme_lists_every_flag() -> None:
    from dataclasses import fields

    from fastgan.config import flag

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = {
        flag(f.name) for cls in RECIPES.values() for f in fields(cls.config_class) if flag(f.name) not in text
    }
    assert not missing


def test_commands_start_without_torchs_compiler() -> None:
    commands = "fastgan.translate, fastgan.train, fastgan.sample"
    code = f"import sys, {commands}; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_the_mark_of_a_constant_is_torchs() -> None:
    from fastgan_kernels import _block_op

    def constant() -> None: ...

    marked = torch.compiler.assume_constant_result(constant)
    assert vars(marked) == vars(_block_op._plain)
