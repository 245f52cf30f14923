"""What a state dict says of its model, and how it is made to fit another one: other classes, another resolution."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masked_diffusion.choices import LAST_BLOCKS
from masked_diffusion.data.class_names import IMAGENET_CLASSES, ClassNames
from masked_diffusion.models import MODELS, SIZES
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.runs.checkpoint import LABEL_TABLE, PATCH_EMBEDDING

POSITIONS = ("pos_embed", "decoder_pos_embed")
RELATIVE_TABLE = "attn.rel_pos_bias.relative_position_bias_table"
RELATIVE_INDEX = "attn.rel_pos_bias.relative_position_index"
DECODER_TOKEN = "decoder.mask_token"
OUTPUT_BIAS = "final_layer.linear.bias"
OUTPUT = ("final_layer.linear.weight", OUTPUT_BIAS)
MOST_NAMES = 8  # of weights, in a message
# Family -> another one whose weights have the same names and shapes, of a network that means something else.
TWINS = {"DiT": "SiT"}


@dataclass(frozen=True)
class Recognised:
    """What weights show of their model.

    decode_layer: None where they cannot tell (MDT), or there is none (DiT). policy: None is the family's. decoder: of
    the policy, where it has one to choose.
    """

    model: str
    input_size: int
    in_channels: int
    num_classes: int
    learn_sigma: bool
    decode_layer: int | None
    policy: str | None = None
    decoder: str | None = None

    @property
    def twin(self) -> str | None:
        """Another model that the weights may be of, as well: nothing in them tells a SiT from a DiT."""
        family, rest = self.model.split("_", 1)
        name = f"{TWINS.get(family)}_{rest}"
        return name if self.learn_sigma and name in MODELS else None

    def named(self, model: str | None) -> "Recognised":
        """These as the weights of ``model``, where that is their twin; else as they are."""
        return self if model is None or model != self.twin else replace(self, model=model, learn_sigma=False)


def recognise(state: dict[str, Tensor], source: object) -> Recognised:
    """Name the model of a state dict; of two that it may be of, the one that is no :attr:`Recognised.twin`.

    Raises ValueError, naming ``source``, for weights of no model of MODELS.
    """
    if not {LABEL_TABLE, PATCH_EMBEDDING, "pos_embed", OUTPUT_BIAS} <= set(state):
        raise ValueError(f"{source}: not a checkpoint of MDT, MDTv2, DiT or SiT, it has no {LABEL_TABLE}")
    _, in_channels, patch_size, _ = state[PATCH_EMBEDDING].shape
    _, num_tokens, hidden_size = state["pos_embed"].shape
    decode_layer = policy = decoder = None
    if "en_inblocks.0.attn.qkv.weight" in state:
        family, decode_layer = "MDTv2", _count(state, "de_blocks")
        depth = _count(state, "en_inblocks") + _count(state, "en_outblocks") + decode_layer
    else:
        biased = f"blocks.0.{RELATIVE_TABLE}" in state
        family, depth = "MDT" if biased else "DiT", _count(state, "blocks")
        policy, decoder = _policy_of(state, biased)
    names = (f"{family}_{size}_{patch_size}" for size, known in SIZES.items()
             if (known["depth"], known["hidden_size"]) == (depth, hidden_size))  # fmt: skip
    model = next((name for name in names if name in MODELS), None)
    if model is None:
        sizes = ", ".join(name for name in MODELS if name.startswith(f"{family}_"))
        raise ValueError(
            f"{source}: {depth} blocks of width {hidden_size} on patches of {patch_size} are no size of {family}; "
            f"known are {sizes}"
        )
    return Recognised(
        model=model,
        input_size=math.isqrt(num_tokens) * patch_size,
        in_channels=in_channels,
        num_classes=state[LABEL_TABLE].shape[0] - 1,
        learn_sigma=state[OUTPUT_BIAS].shape[0] == 2 * in_channels * patch_size**2,
        decode_layer=decode_layer,
        policy=policy,
        decoder=decoder,
    )


def _policy_of(state: dict[str, Tensor], biased: bool) -> tuple[str | None, str | None]:
    """The policy that the weights beside a family's own show, and its decoder. biased: as MDT's are."""
    if "fuse.weight" in state:
        return "sprint", None
    if DECODER_TOKEN in state:
        blocks = {name.split(".")[2] for name in state if name.startswith("decoder.blocks.")}
        return "maskdit", f"{state[DECODER_TOKEN].shape[-1]}x{len(blocks)}"
    if biased or "mask_token" not in state:  # an MDT has a mask token under every policy
        return None, None
    return ("mdt", None) if any(name.startswith("sideblocks.") for name in state) else ("maskdit", LAST_BLOCKS)


def _count(state: dict[str, Tensor], blocks: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})


# -- grey or colour ----------------------------------------------------------------------------------------------------

GREY, COLOUR = 1, 3


def fit_channels(
    state: dict[str, Tensor], model: nn.Module, source: object, warn: Callable[[str], None]
) -> dict[str, Tensor]:
    """Weights of grey images for a ``model`` of colour images, or the other way round, in pixel space.

    The patch embedding of grey is spread over three channels, or that of the three is added up: an image without colour
    is embedded as before. The rows of the output are repeated, or averaged. Raises ValueError for other channels.
    """
    expected = model.state_dict()
    channels, new_channels = (weights[PATCH_EMBEDDING].shape[1] for weights in (state, expected))
    if channels == new_channels:
        return state
    former, new = what_has(channels), what_has(new_channels)
    if {channels, new_channels} != {GREY, COLOUR}:
        raise ValueError(
            f"--init_from {source}: its weights are of {former}, the training is of {new}; give weights and --data_dir "
            "(or --vae_path) of one kind"
        )
    how = "repeated" if channels == GREY else "averaged"
    warn(
        f"{source}: its weights are of {former}, the training is of {new}: its input and output channels are {how}; "
        "train such a model on"
    )
    return {name: _in_channels(name, value, expected.get(name, value), new_channels) for name, value in state.items()}


def _in_channels(name: str, value: Tensor, expected: Tensor, channels: int) -> Tensor:
    if value.shape == expected.shape:
        return value
    if name == PATCH_EMBEDDING:  # (D, C, p, p)
        return value.sum(1, keepdim=True) if channels == GREY else value.repeat(1, COLOUR, 1, 1) / COLOUR
    if name in OUTPUT:  # a row for each place of the patch, prediction and variance, and channel, in this order
        rows = value.unflatten(0, (-1, COLOUR if channels == GREY else GREY))
        rows = rows.mean(1, keepdim=True) if channels == GREY else rows.repeat_interleave(COLOUR, dim=1)
        return rows.flatten(0, 1)
    return value


def what_has(channels: int) -> str:
    """What a model of so many channels is of, in words."""
    kinds = {GREY: "grey images (1 channel)", COLOUR: "colour images (3 channels)"}
    return kinds.get(channels, f"latents of {channels} channels")


# -- another resolution ------------------------------------------------------------------------------------------------


def fit_positions(
    state: dict[str, Tensor], model: nn.Module, source: object, interpolate: bool, warn: Callable[[str], None]
) -> dict[str, Tensor]:
    """Weights of another resolution for ``model``: position and relative tables resized to its token grid.

    Raises ValueError where the grids differ and ``interpolate`` is False.
    """
    expected = model.state_dict()
    sides = [math.isqrt(weights["pos_embed"].shape[1]) for weights in (state, expected)]
    if sides[0] == sides[1]:
        return state
    between = f"its positions are of {sides[0]} x {sides[0]} tokens, this model has {sides[1]} x {sides[1]}"
    if not interpolate:
        raise ValueError(f"{source}: {between}; give the --image_size it was trained at, or --interpolate_pos True")
    warn(f"{source}: {between}: they are resized, and such a model has to be trained on")
    return {name: _resized(name, value, expected.get(name, value)) for name, value in state.items()}


def _resized(name: str, value: Tensor, expected: Tensor) -> Tensor:
    if value.shape == expected.shape:
        return value
    if name in POSITIONS:  # (1, L, D), a grid of points in the middle of patches
        return _resize_grid(value[0], expected.shape[1], align_corners=False)[None]
    if name.endswith(RELATIVE_TABLE):  # (offsets + 3, heads): the middle, offset 0, stays the middle
        offsets = _resize_grid(value[:-3], expected.shape[0] - 3, align_corners=True)
        return torch.cat([offsets, value[-3:]])
    return expected if name.endswith(RELATIVE_INDEX) else value


def _resize_grid(rows: Tensor, num_rows: int, align_corners: bool) -> Tensor:
    """(side**2, D) -> (num_rows, D), bicubic; num_rows is a square, too."""
    side, new_side = math.isqrt(len(rows)), math.isqrt(num_rows)
    grid = rows.T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=align_corners)
    return grid.reshape(rows.shape[1], num_rows).T.contiguous()


# -- other classes -----------------------------------------------------------------------------------------------------


def fit_labels(
    state: dict[str, Tensor],
    model: nn.Module,
    source: object,
    former_names: Sequence[str],
    names: Sequence[str],
    warn: Callable[[str], None],
) -> dict[str, Tensor]:
    """Weights for a model of other classes: rows of the label table follow their class names, the null row stays.

    former_names: the classes of ``state``, in the order of their labels; empty when unknown, which for 1000 classes
    means ImageNet's. names: those of ``model``. Classes that ``state`` does not know start with fresh rows. Without
    names on both sides the table is taken as it is where the numbers of rows agree.
    """
    loaded, table = state[LABEL_TABLE], model.state_dict()[LABEL_TABLE].clone()
    known = ClassNames(len(loaded) - 1, former_names)
    named = bool(names) and (bool(former_names) or len(loaded) - 1 == IMAGENET_CLASSES)
    if len(loaded) == len(table) and (not named or list(names) == list(former_names)):
        return state
    found = {i: row for i, name in enumerate(names) if named and (row := known.row(name)) is not None}
    for i, row in found.items():
        table[i] = loaded[row]
    table[-1] = loaded[-1]
    kept = ", ".join(names[i] for i in list(found)[:5]) + (", ..." if len(found) > 5 else "")
    warn(
        f"label table: {len(found)} of {len(table) - 1} classes are known to {source} by name"
        + (f" ({kept})" if found else "")
        + "; the others start anew, the null class is kept"
    )
    return {**state, LABEL_TABLE: table}


# -- another policy ----------------------------------------------------------------------------------------------------


def fit_policy(
    state: dict[str, Tensor], model: LatentTransformer, source: object, policy: str, warn: Callable[[str], None]
) -> dict[str, Tensor]:
    """Weights for a model under a policy: what the policy adds to the model, and they lack, stays fresh.

    Where the model predicts no variance and they do, its channels are left out.
    """
    expected = model.state_dict()
    own = [name for name in expected if name.split(".")[0] in model.rejoin.weights]
    unlike = [name for name in own if name not in state or state[name].shape != expected[name].shape]
    layers = {name.rpartition(".")[0] or name for name in unlike}  # whole ones: a bias goes with its weights
    fresh = [name for name in own if (name.rpartition(".")[0] or name) in layers]
    if fresh:
        warn(f"weights of --policy {policy} that {source} lacks start anew: {_in_short(fresh)}")
        state = {**state, **{name: expected[name] for name in fresh}}
    if len(state[OUTPUT_BIAS]) == 2 * len(expected[OUTPUT_BIAS]):
        warn(f"{source}: the channels of its variance are left out, because this training predicts none")
        mean = {name: _without_variance(state[name], model.out_channels) for name in OUTPUT}
        state = {**state, **mean}
    return state


def _in_short(names: Sequence[str]) -> str:
    """Names of weights; those of many as the parts of the model that they are in, and how many there are in each."""
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    parts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(part if count == 1 else f"{part} ({count})" for part, count in parts.items())


def _without_variance(rows: Tensor, channels: int) -> Tensor:
    """Rows of the output layer, (p p 2 channels, ...), without those of the variance."""
    return rows.view(-1, 2 * channels, *rows.shape[1:])[:, :channels].flatten(0, 1)


# -- what is trained ---------------------------------------------------------------------------------------------------


def freeze(model: nn.Module, pattern: str) -> int:
    """Leave the parameters untrained whose names have a part that matches the regular expression ``pattern``.

    Returns how many numbers those are. Raises ValueError for a pattern that is none, matches none, or matches all.
    """
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"--freeze {pattern}: not a regular expression ({error})") from None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = [p for name, p in trained.items() if matches(name)]
    if not frozen:
        raise ValueError(
            f"--freeze {pattern}: matches no parameter; their names are such as {', '.join(trained)[:200]}"
        )
    if len(frozen) == len(trained):
        raise ValueError(f"--freeze {pattern}: matches every parameter, so nothing would be trained")
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(p.numel() for p in frozen)
