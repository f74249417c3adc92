"""Settings: one frozen dataclass per recipe, filled from presets and the command line, kept as JSON in the
run folder."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_type_hints

Preprocess = Literal[
    "resize_and_crop",
    "crop",
    "scale_width",
    "scale_width_and_crop",
    "scale_shortside_and_crop",
    "square_and_crop",
    "none",
]
# settings that may differ between two starts of one run: they change nothing that is computed at a given step
FREE_ON_RESUME = {
    *("device", "compile", "capture", "memory", "data_on", "threads", "runs", "name", "preset"),
    *("epochs", "epochs_decay", "steps"),
    *("log_every", "sample_every", "save_every", "keep", "tensorboard"),
    *("evaluate_every", "keep_best", "measures", "weights", "palette"),
    # files that may have been moved
    *("vgg", "start"),
}
AT_LEAST_ONE = (
    *("load_size", "crop_size", "ngf", "ndf", "n_critic", "n_gen", "batch_size", "accumulate"),
    *(
        "steps",
        "lr_decay_epochs",
        "log_every",
        "sample_every",
        "save_every",
        "keep",
        "threads",
        "channels",
        "channels_b",
        "max_images",
    ),
)
AT_LEAST_ZERO = (
    *("blocks", "pool_size", "epochs", "epochs_decay", "lr", "lr_d", "clip", "lambda_gp", "init_gain"),
    *("d_real_weight", "d_fake_weight", "seed", "evaluate_every"),
)


class UsageError(ValueError):
    """A mistake at the keyboard: one line that names the flag or file and says what to do (exit code 2)."""


@dataclass(frozen=True)
class Config:
    """Settings that every recipe shares; a recipe's own class changes defaults and adds its loss weights."""

    data: Path | None = None  # folder with the images (see README); default: the embedded digits
    name: str = ""  # run name; default: recipe and data folder
    runs: Path = Path("runs")  # folder of all runs
    direction: Literal["AtoB", "BtoA"] = "AtoB"  # BtoA swaps the two domains
    channels: int | None = None  # channels of the images; default: those of the files
    channels_b: int | None = None  # channels of domain B where they differ from A
    preprocess: Preprocess = "resize_and_crop"  # what happens to an image before the random crop
    load_size: int = 286  # size in pixels an image is resized to
    crop_size: int = 256  # size in pixels of the random crop
    flip: bool = True  # mirror left-right at random
    serial: bool = False  # no shuffling; B index is A index modulo
    pages: Literal["images", "channels"] = "images"  # pages of a multi-page TIFF are images or channels
    range_a: tuple[float, float] | None = None  # values of A shown as black and white; default: of the type
    range_b: tuple[float, float] | None = None  # the same for B
    max_images: int | None = None  # use only the first images of each domain
    skip_bad: bool = False  # go on without files that cannot be read

    generator: Literal["resnet", "unet", "encdec"] = "resnet"  # network of the generators
    blocks: int = 9  # residual blocks of the ResNet
    levels: int = 8  # halvings of the U-Net or encoder-decoder: 8 is unet_256, 7 is unet_128
    patch: Literal[1, 16, 34, 70, 142, 286] = 70  # receptive field of the discriminator in pixels
    ngf: int = 64  # width of the generators
    ndf: int = 64  # width of the discriminators
    norm: Literal["instance", "batch", "none"] = "instance"  # normalisation of all networks
    padding: Literal["reflect", "replicate", "zero"] = "reflect"  # border of the ResNet
    dropout: bool = False  # dropout in the generators
    output: Literal["tanh", "sigmoid"] = "tanh"  # last activation; images are in [-1, 1] or [0, 1] with it
    init: Literal["normal", "xavier", "kaiming", "orthogonal", "torch"] = "normal"  # initial weights
    init_gain: float = 0.02  # standard deviation or gain of the initial weights

    gan_mode: Literal["lsgan", "vanilla", "hinge", "wgan", "wgan-gp"] = "lsgan"  # adversarial loss
    real_label: float = 1.0  # D's target for real images; 0.9 is one-sided label smoothing
    d_real_weight: float = 0.5  # weight of the real half of D's loss
    d_fake_weight: float = 0.5  # weight of the fake half of D's loss
    lambda_gp: float = 10.0  # weight of the gradient penalty (wgan-gp)
    gp_at: Literal["mixed", "real", "fake"] = "mixed"  # images at which the penalty is taken
    clip: float = 0.01  # bound of D's weights (wgan)
    n_critic: int = 1  # updates of D in a step, each on a batch of its own
    n_gen: int = 1  # updates of G in a step; one shares its batch with D, the others have their own
    pool_size: int = 50  # history of generated images that D is shown
    ema: float = 0.0  # decay of the averaged generator, e.g. 0.999; 0 is off

    optimizer: Literal["adam", "rmsprop"] = "adam"  # rmsprop suits wgan
    lr: float = 2e-4  # learning rate of G
    lr_d: float | None = None  # learning rate of D; default: that of G
    beta1: float = 0.5  # Adam
    beta2: float = 0.999  # Adam
    batch_size: int = 1  # images per domain, update and process
    accumulate: int = 1  # batches whose gradients are added up for one update
    epochs: int = 100  # epochs at the full learning rate
    epochs_decay: int = 100  # epochs of decay after that (linear)
    steps: int | None = None  # train this many steps in all; the schedule is spread over them
    lr_policy: Literal["linear", "cosine", "step", "constant"] = "linear"  # learning-rate schedule
    lr_decay_epochs: int = 50  # epochs between two falls (step)
    lr_decay_factor: float = 0.1  # of each of these falls

    seed: int = 0  # of weights, order, crops and dropout
    deterministic: bool = False  # only reproducible algorithms (slower on a GPU)
    device: str = "auto"  # cuda, cuda:1, mps, cpu
    precision: Literal["auto", "bf16", "fp32", "tf32"] = "auto"  # auto: bf16 where the hardware has it
    compile: bool = False  # torch.compile the networks
    capture: bool = True  # whole step as one CUDA graph where possible
    memory: Literal["auto", "fast", "low", "least"] = "auto"  # activations kept or computed again: see README
    data_on: Literal["auto", "device", "host"] = "auto"  # where the decoded images lie
    threads: int | None = None  # CPU threads; default: torch's own choice
    log_every: int = 50  # steps between two log lines
    sample_every: int = 500  # steps between two sample pictures
    save_every: int = 500  # steps between two checkpoints
    keep: int = 1  # checkpoints kept besides the one being written
    tensorboard: bool = False  # also write TensorBoard events
    evaluate_every: int = 0  # epochs between two evaluations on the test images; 0 is off
    keep_best: str = ""  # a measure: the checkpoint that is best by it stays in checkpoints/best
    measures: tuple[str, ...] = ()  # what is measured; default: what is quick and needs no further file
    weights: tuple[str, ...] = ()  # files of the networks behind fid ... and lpips, see evaluate
    palette: str = ""  # colours of classes, for label maps, see evaluate
    preset: str = ""  # named settings that the other flags change; see --help of the recipe

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the flag.

        Raises:
            UsageError: one line, the first rule that is broken.
        """
        least = dict.fromkeys(AT_LEAST_ONE, 1) | dict.fromkeys(AT_LEAST_ZERO, 0)
        for key, low in least.items():
            value = getattr(self, key)
            if value is not None and not value >= low:
                raise UsageError(f"{flag(key)} must be at least {low}, got {value}")
        for key in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, key) < 1:
                raise UsageError(f"{flag(key)} must be in [0, 1), got {getattr(self, key)}")
        for key in ("range_a", "range_b"):
            pair = getattr(self, key)
            if pair is not None and not pair[0] < pair[1]:
                raise UsageError(f"{flag(key)} must be two growing numbers, got {pair[0]} {pair[1]}")
        if self.levels < 2:
            raise UsageError(f"--levels must be at least 2, got {self.levels}")
        if self.epochs + self.epochs_decay == 0:
            raise UsageError("--epochs and --epochs-decay are both 0: nothing to train")
        squares = self.preprocess in ("resize_and_crop", "square_and_crop")
        if squares and self.crop_size > self.load_size:
            raise UsageError(f"--crop-size {self.crop_size} is larger than --load-size {self.load_size}")
        if self.keep_best and not self.evaluate_every:
            raise UsageError("--keep-best needs --evaluate-every N")
        if self.name and (Path(self.name).name != self.name or self.name in (".", "..") or "\\" in self.name):
            raise UsageError(f"--name must be a plain folder name, got {self.name!r}")

    @property
    def batches(self) -> int:
        """Batches that one step takes."""
        return (self.n_critic + self.n_gen - 1) * self.accumulate


C = TypeVar("C", bound=Config)
T = TypeVar("T")


def flag(key: str) -> str:
    """The command-line spelling of a field."""
    return "--" + key.replace("_", "-")


def to_json(config: Config) -> dict[str, Any]:
    """The settings as plain JSON values."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
        for k, v in values.items()
    }


def from_json(cls: type[C], values: Mapping[str, Any]) -> C:
    """Settings back from `to_json`; unknown keys are dropped so that a run of a newer version can still be
    read."""
    known, kinds = {f.name for f in fields(cls)}, get_type_hints(cls)
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key in known:
            if isinstance(value, str) and "Path" in str(kinds[key]):
                value = Path(value)
            out[key] = tuple(value) if isinstance(value, list) else value
    return cls(**out)


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields that differ between two `to_json` results and that decide what a run computes."""
    return [k for k, v in new.items() if k not in FREE_ON_RESUME and old.get(k, v) != v]


def parse(cls: type[T], args: Sequence[str], prog: str, default: T | None = None, description: str = "") -> T:
    """A dataclass from command-line words, `default` for what they leave out.

    Raises:
        UsageError: an unknown flag or a value of the wrong kind, in one line.
    """
    # imported here: the rest of the package works without the command line's parser
    import tyro

    said = io.StringIO()
    wants_help = any(a in ("-h", "--help") for a in args)
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(said):
            start: dict[str, Any] = {} if default is None else {"default": default}
            found, unknown = tyro.cli(
                cls, args=list(args), prog=prog, description=description, return_unknown_args=True, **start
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro answers in a box over several lines: keep its sentence
        text = " ".join(re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]", "", said.getvalue()).split())
        text = re.split(r" Argument helptext:| For full helptext", text)[0]
        text = re.sub(r"^(Value error|Invalid choice|Parsing error|Missing value) ", "", text)
        raise UsageError(
            re.sub(r"^Error parsing \w*: ", "", text) or f"bad arguments: {' '.join(args)}"
        ) from None
    if unknown:
        names = [flag(f.name) for f in fields(cls)]  # type: ignore[arg-type]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the flags"
        raise UsageError(f"unknown argument {unknown[0]}{hint}")
    return found


def fail(error: BaseException | str, code: int = 2) -> NoReturn:
    """End the program with one line on stderr."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(code)


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        UsageError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file that appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
