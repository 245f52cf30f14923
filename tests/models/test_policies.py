"""Policies on models: which weights they add, which tokens leave, and which pairs do not fit."""

import ast

import pytest
import torch
from support import REPO

from masked_diffusion.models import FAMILIES, create_model, ignored_settings
from masked_diffusion.models.policies import FULL, MASKED, POLICIES

SIZE = {"input_size": 8, "in_channels": 1, "num_classes": 5}
L = 16


def make(name, **kwargs):
    """A model without zeros, so that every weight shows in the output."""
    torch.manual_seed(0)
    model = create_model(name, **SIZE, **kwargs).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def inputs(count=2):
    return torch.randn(count, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 5])


def test_a_dit_under_mdt_has_its_own_weights_and_those_of_the_interpolater_named_as_mdts():
    plain, masked, mdt = (
        set(create_model(name, **SIZE, policy=policy).state_dict())
        for name, policy in (("DiT_Ti_2", "none"), ("DiT_Ti_2", "mdt"), ("MDT_Ti_2", "mdt"))
    )
    assert masked - plain == {name for name in mdt - plain if "rel_pos_bias" not in name}
    assert {"mask_token", "decoder_pos_embed", "sideblocks.0.attn.qkv.weight"} <= masked - plain < mdt


def test_an_mdt_under_none_has_the_published_weights_and_trains_one_full_view():
    model = create_model("MDT_Ti_2", **SIZE, policy="none", mask_ratio=0.3)
    assert model.views == (FULL,) and list(model.state_dict()) == list(create_model("MDT_Ti_2", **SIZE).state_dict())
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"sideblocks", "mask_token"}
    assert create_model("MDT_Ti_2", **SIZE, mask_ratio=0.3).views == (FULL, MASKED)


def test_an_mdt_computes_the_same_under_none_as_without_a_mask():
    masked, none = make("MDT_Ti_2", mask_ratio=0.3), make("MDT_Ti_2", policy="none")
    none.load_state_dict(masked.state_dict())
    x, t, y = inputs()
    assert torch.equal(none(x, t, y), masked(x, t, y))
    assert torch.equal(none(x, t, y, enable_mask=True), masked(x, t, y))


@pytest.mark.parametrize("name", ["MDT_Ti_2", "DiT_Ti_2"])
def test_dropped_tokens_reach_mdts_output_nowhere_and_kept_ones_do(name):
    model = make(name, policy="mdt", mask_ratio=0.3)
    x, t, y = inputs()
    draw = model.draw(torch.rand(2, L))
    model(x.requires_grad_(), t, y, draw=draw).square().sum().backward()
    squares = x.grad.abs().unfold(2, 2, 2).unfold(3, 2, 2).sum(dim=(1, 4, 5)).flatten(1)
    assert (squares[draw.kept.dropped] == 0).all() and (squares[~draw.kept.dropped] > 0).all()


def test_a_dit_under_mdt_that_masks_nothing_computes_its_full_view():
    model = make("DiT_Ti_2", policy="mdt", mask_ratio=0.0)
    x, t, y = inputs()
    torch.testing.assert_close(model(x, t, y, draw=model.draw(torch.rand(2, L))), model(x, t, y))


def test_every_trained_parameter_of_a_dit_under_mdt_gets_a_gradient_from_the_masked_view():
    model = make("DiT_Ti_2", policy="mdt")
    model(*inputs(), enable_mask=True).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_without_a_ratio_a_policy_that_is_not_the_familys_takes_its_own():
    assert create_model("DiT_Ti_2", **SIZE, policy="mdt").mask_ratio == 0.3
    assert create_model("DiT_Ti_2", **SIZE, policy="mdt", mask_ratio=0.5).mask_ratio == 0.5
    assert create_model("MDT_Ti_2", **SIZE, policy="mdt").mask_ratio is None  # trained without masking, as published


@pytest.mark.parametrize(
    "name, policy, message",
    [
        ("MDT_Ti_2", "mdtv2", r"--policy mdtv2: is for MDTv2_\* models, and this one is MDT; choose one of none, mdt"),
        ("DiT_Ti_2", "mdtv2", r"--policy mdtv2: is for MDTv2_\* models, and this one is DiT"),
        ("MDTv2_Ti_2", "mdt", r"--policy mdt: is for MDT_\* and DiT_\* models, and this one is MDTv2"),
        ("MDT_Ti_2", "mtd", "--policy mtd: unknown; choose one of none, mdt, mdtv2"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_by_name(name, policy, message):
    for build in (create_model, lambda *args, **kwargs: ignored_settings(name, policy)):
        with pytest.raises(ValueError, match=message):
            build(name, **SIZE, policy=policy)


def test_every_family_has_a_policy_of_its_own_that_fits():
    for name, family in FAMILIES.items():
        assert name in POLICIES[family.FAMILY_POLICY].families


VARIANTS = {"MDT", "MDTv2", "DiT"}


def asks_for_a_variant(node):
    if not (isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass")):
        return False
    return bool(VARIANTS & {getattr(part, "id", None) for part in ast.walk(node.args[1])})


def test_nothing_outside_of_the_models_asks_which_variant_a_model_is():
    files = [*REPO.glob("masked_diffusion/**/*.py"), *REPO.glob("scripts/*.py"), *REPO.glob("*.py")]
    outside = [path for path in files if path.parent.name != "models"]
    assert len(outside) > 50
    for path in outside:
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if asks_for_a_variant(node)]
        assert not found, (path, found)
    assert any(map(asks_for_a_variant, ast.walk(ast.parse("isinstance(model, MDT | DiT)"))))
