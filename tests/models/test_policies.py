"""Policies on models: which weights they add, which tokens leave, and which pairs do not fit."""

import ast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import REPO

from masked_diffusion import choices
from masked_diffusion.choices import ignored_settings
from masked_diffusion.models import FAMILIES, create_model
from masked_diffusion.models.policies import FULL, MASKED, SPARSE
from masked_diffusion.models.tokens import Draw, KeptTokens

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


@pytest.mark.parametrize("policy", [name for name, traits in choices.POLICIES.items() if "SiT" in traits.families])
def test_a_sit_under_a_policy_is_the_dit_whose_time_and_velocity_run_the_other_way(policy):
    dit, sit = (make(name, policy=policy) for name in ("DiT_Ti_2", "SiT_Ti_2"))
    sit.load_state_dict(dit.state_dict())
    x, _, y = inputs()
    views = dit.policy.views_at(dit.mask_ratio)
    draw = dit.draw(torch.rand(2, L), 0.5, torch.rand(2)) if any(view.drops for view in views) else None
    t = (
        torch.tensor([[0.2, 0.6], [0.9, 0.1]])
        if draw is not None and draw.group is not None
        else torch.tensor([0.2, 0.9])
    )
    for chosen, time in ((None, t if t.dim() == 1 else t[:, 0]), (draw, t)):
        expected = -dit(x, time, y, draw=chosen)[:, :1]
        torch.testing.assert_close(sit(x, 1000 * (1 - time), y, draw=chosen), expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().max() > 1e-3


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
        (
            "MDT_Ti_2",
            "mdtv2",
            r"--policy mdtv2: is for MDTv2_\* models, and this one is MDT; choose one of none, mdt, ",
        ),
        ("DiT_Ti_2", "mdtv2", r"--policy mdtv2: is for MDTv2_\* models, and this one is DiT"),
        ("MDTv2_Ti_2", "mdt", r"--policy mdt: is for MDT_\*, DiT_\*, SiT_\* models, and this one is MDTv2"),
        ("MDT_Ti_2", "mtd", "--policy mtd: unknown; choose one of none, mdt, mdtv2"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_by_name(name, policy, message):
    for build in (create_model, lambda *args, **kwargs: ignored_settings(name, policy)):
        with pytest.raises(ValueError, match=message):
            build(name, **SIZE, policy=policy)


# -- routes: tread, and what it shares with others ---------------------------------------------------------------------


@st.composite
def routed(draw, policy):
    """A small model under a policy with a random depth, route and ratio, its inputs, and a draw."""
    depth, grid = draw(st.integers(2, 5)), draw(st.integers(2, 4))
    leave = draw(st.integers(0, depth - 2))
    route = f"{leave},{draw(st.integers(leave + 1, depth - 1))}"
    torch.manual_seed(draw(st.integers(0, 99)))
    family, count = FAMILIES[draw(st.sampled_from(["DiT", "MDT"]))], draw(st.integers(1, 3))
    sizes = {"input_size": 2 * grid, "in_channels": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
    sizes |= {"depth": depth, "decode_layer": 1}
    ratio = draw(st.sampled_from([0.0, 0.25, 0.5, 0.7]))
    model = family(**sizes, policy=policy, route=route, mask_ratio=ratio, choose="uniform").eval().double()
    model.built_with = sizes
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(count, 1, 2 * grid, 2 * grid, dtype=torch.float64)
    t, y = torch.randint(0, 999, (count,)), torch.randint(0, 3, (count,))
    return model, (x, t, y), torch.rand(count, grid**2)


def per_token(x):
    """(N, 1, 2w, 2w) -> (N, w * w): how much of each token's patch there is."""
    return x.abs().unfold(2, 2, 2).unfold(3, 2, 2).sum(dim=(1, 4, 5)).flatten(1)


few = settings(max_examples=15, deadline=None, derandomize=True)


@few
@given(routed("tread"))
def test_keeping_all_tokens_in_any_order_is_the_plain_pass(case):
    model, inputs, noise = case
    all_kept = Draw(KeptTokens.from_noise(noise, model.num_tokens))
    torch.testing.assert_close(model(*inputs, draw=all_kept), model(*inputs), rtol=1e-12, atol=1e-13)


@few
@given(routed("tread"))
def test_kept_and_dropped_tokens_are_all_tokens_once(case):
    model, _, noise = case
    kept = model.draw(noise).kept
    assume(kept is not None)
    assert kept.ids_keep.shape[1] == int(model.num_tokens * (1 - model.mask_ratio))
    for ids, dropped in zip(kept.ids_keep, kept.dropped, strict=True):
        assert sorted([*ids.tolist(), *dropped.nonzero().flatten().tolist()]) == list(range(model.num_tokens))


@few
@given(routed("tread"))
def test_a_route_of_identity_blocks_returns_what_entered_it(case):
    model, (x, t, y), noise = case
    for block in model.stack:  # gates of zero
        torch.nn.init.zeros_(block.adaLN_modulation[1].weight)
        torch.nn.init.zeros_(block.adaLN_modulation[1].bias)
    assert torch.equal(model(x, t, y, draw=model.draw(noise)), model(x, t, y))


@few
@given(routed("tread"))
def test_under_tread_every_token_reaches_the_output(case):
    model, (x, t, y), noise = case
    model(x.requires_grad_(), t, y, draw=model.draw(noise)).square().sum().backward()
    assert (per_token(x.grad) > 0).all()


@few
@given(routed("tread"))
def test_blocks_of_the_route_see_the_kept_tokens_and_the_others_all(case):
    model, inputs, noise = case
    seen = []
    for block in model.stack:
        block.register_forward_hook(lambda block, inputs, out: seen.append(out.shape[1]))
    draw = model.draw(noise)
    assume(draw.kept is not None)
    model(*inputs, draw=draw)
    num_keep = draw.kept.ids_keep.shape[1]
    inside = range(model.route.leave, model.route.back)
    assert seen == [num_keep if number in inside else model.num_tokens for number in range(len(seen))]


@few
@given(routed("tread"))
def test_the_bias_of_kept_tokens_is_that_of_full_attention_on_them(case):
    """A block over the kept tokens is the block over all of them in which these look at each other only."""
    model, (x, t, y), noise = case
    bias, kept = model.stack[0].attn.rel_pos_bias, model.draw(noise).kept
    assume(kept is not None and bias is not None)
    whole = bias(model.rel_index)[0]
    for part, ids in zip(bias(kept.relative_index(model.rel_index)), kept.ids_keep, strict=True):
        assert torch.equal(part, whole[:, ids][:, :, ids])


@pytest.mark.parametrize("size, route", [("S", (2, 9)), ("B", (2, 9)), ("L", (2, 21)), ("XL", (2, 25)), ("Ti", (1, 3))])
def test_the_route_of_tread_is_the_published_one(size, route):
    with torch.device("meta"):
        assert create_model(f"DiT_{size}_2", **SIZE, policy="tread").route == route


def test_an_mdt_under_tread_leaves_its_side_interpolater_frozen():
    model = create_model("MDT_Ti_2", **SIZE, policy="tread")
    assert model.views == (SPARSE,) and model.mask_ratio == 0.5
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"sideblocks", "mask_token"}


@pytest.mark.parametrize("route", ["3", "2,1", "1,4", "1,1", "-1,2", "a,b"])
def test_a_route_that_the_model_does_not_have_is_refused(route):
    with pytest.raises(ValueError, match=rf"--route {route}: expected LEAVE,BACK with 0 <= LEAVE < BACK < 4"):
        create_model("DiT_Ti_2", **SIZE, policy="tread", route=route)


# -- sprint ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid, ratio, side, kept", [(4, 0.75, 2, 1), (6, 0.5, 2, 2), (8, 0.625, 4, 6), (8, 0.875, 4, 2)]
)
def test_cells_keep_as_many_tokens_each_with_uniform_marginals(grid, ratio, side, kept):
    torch.manual_seed(0)
    count = 2000
    draw = KeptTokens.from_cells(torch.rand(count, grid**2), int(grid**2 * (1 - ratio)), side)
    stays = (~draw.dropped).view(count, grid // side, side, grid // side, side)
    assert (stays.sum(dim=(2, 4)) == kept).all()
    share = stays.double().mean(dim=0)
    spread = (ratio * (1 - ratio) / count) ** 0.5
    assert (share - (1 - ratio)).abs().max() < 5 * spread
    ids = torch.cat([draw.ids_keep, draw.dropped.nonzero()[:, 1].view(count, -1)], dim=1)
    assert (ids.sort(dim=1)[0] == torch.arange(grid**2)).all()


@few
@given(routed("sprint"))
def test_a_fusion_that_takes_what_came_through_is_the_plain_pass_where_nobody_left(case):
    model, inputs, _ = case
    width = model.fuse.out_features
    model.fuse.weight.data = torch.eye(width, 2 * width, dtype=torch.float64)
    model.fuse.bias.data.zero_()
    plain = type(model)(**model.built_with, policy="none").eval().double()
    plain.load_state_dict(
        {name: w for name, w in model.state_dict().items() if not name.startswith(("fuse", "route_"))}
    )
    torch.testing.assert_close(model(*inputs), plain(*inputs), rtol=1e-12, atol=1e-13)


@few
@given(routed("sprint"))
def test_a_fusion_that_takes_what_waited_is_the_net_without_the_blocks_of_the_route(case):
    model, inputs, noise = case
    assume(not model.HAS_DECODER)  # whose positions would be added where nobody heeds them
    width, inside = model.fuse.out_features, range(model.route.leave, model.route.back)
    model.fuse.weight.data = torch.eye(2 * width, dtype=torch.float64)[width:]
    model.fuse.bias.data.zero_()
    short = type(model)(**{**model.built_with, "depth": len(model.stack) - len(inside)}, policy="none").eval().double()
    state = {name: w for name, w in model.state_dict().items() if not name.startswith(("fuse", "route_"))}
    outside = [number for number in range(len(model.stack)) if number not in inside]
    for number in range(len(model.stack)):
        block = {name: state.pop(name) for name in list(state) if name.startswith(f"blocks.{number}.")}
        if number in outside:
            block = {f"blocks.{outside.index(number)}.{name.split('.', 2)[2]}": w for name, w in block.items()}
            state |= block
    short.load_state_dict(state)
    torch.testing.assert_close(model(*inputs, draw=model.draw(noise)), short(*inputs), rtol=1e-12, atol=1e-13)


@few
@given(routed("sprint"))
def test_a_dropped_path_gives_the_middle_no_gradient_and_is_the_net_without_it(case):
    model, (x, t, y), noise = case
    count = len(x)
    x = x.requires_grad_()
    dropped = Draw(model.draw(noise).kept, torch.ones(count, dtype=torch.bool))
    out = model(x, t, y, draw=dropped)
    out.square().sum().backward()
    for number, block in enumerate(model.stack):
        inside = model.route.leave <= number < model.route.back
        assert bool(block.mlp.fc1.weight.grad.any()) != inside
    assert (per_token(x.grad) > 0).all()
    torch.testing.assert_close(model(x, t, y, draw=Draw(None, dropped.path_drop)), out, rtol=1e-12, atol=1e-13)


def test_paths_are_dropped_by_sample():
    model = make("DiT_Ti_2", policy="sprint")
    draw = model.draw(torch.rand(2, L), path_noise=torch.tensor([0.05, 0.2]))
    assert draw.path_drop.tolist() == [True, False]
    arguments = inputs()
    some, none = (model(*arguments, draw=draw._replace(path_drop=drop)) for drop in (draw.path_drop, None))
    assert torch.equal(some[1], none[1]) and not torch.allclose(some[0], none[0])


def test_the_fixed_token_of_sprint_is_not_trained_and_its_linear_is():
    model = create_model("DiT_Ti_2", **SIZE, policy="sprint")
    assert not model.route_token.requires_grad and model.route_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.fuse.weight.requires_grad and not model.fuse.bias.any()
    assert (model.mask_ratio, model.policy.choose, model.policy.path_drop) == (0.75, "cells", 0.1)


@pytest.mark.parametrize("size, route", [("S", (2, 10)), ("XL", (2, 26))])
def test_the_route_of_sprint_is_the_published_one(size, route):
    with torch.device("meta"):
        assert create_model(f"DiT_{size}_2", **SIZE, policy="sprint").route == route


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            {"policy": "sprint", "mask_ratio": 0.3, "input_size": 12},
            "mask_ratio 0.3: --choose cells keeps as many tokens of each cell",
        ),
        ({"policy": "sprint", "input_size": 6}, "cannot be with this ratio on a grid of 3 x 3 tokens"),
        ({"policy": "tread", "choose": "rows"}, "--choose rows: unknown; choose one of uniform, cells"),
        ({"policy": "tread", "path_drop": 0.1}, "--path_drop 0.1: this policy has no path to drop; .* use sprint"),
        ({"policy": "sprint", "path_drop": 1.0}, r"--path_drop 1.0: must be in \[0, 1\)"),
        ({"policy": "tread", "mask_ratio": 0.99}, "keeps none of the 16 tokens"),
    ],
)
def test_options_that_a_policy_cannot_have_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_model("DiT_Ti_2", **{**SIZE, **kwargs})


# -- deferred ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MDT_Ti_2", "DiT_Ti_2"])
def test_deferred_predicts_kept_tokens_and_leaves_zeros_for_the_others(name):
    model = make(name, policy="deferred")
    x, t, y = inputs()
    draw = model.draw(torch.rand(2, L))
    out = model(x.requires_grad_(), t, y, draw=draw)[:, :1]
    kept = ~draw.kept.dropped
    assert kept.sum(dim=1).tolist() == [4, 4]
    assert ((per_token(out) > 0) == kept).all()
    out.square().sum().backward()
    assert (per_token(x.grad) > 0).all()  # the first blocks mix all of them


@pytest.mark.parametrize("name", ["MDT_Ti_2", "DiT_Ti_2"])
def test_deferred_that_keeps_all_tokens_is_the_plain_pass(name):
    model = make(name, policy="deferred").double()
    x, t, y = inputs()
    all_kept = Draw(KeptTokens.from_noise(torch.rand(2, L), L))
    torch.testing.assert_close(model(x.double(), t, y, draw=all_kept), model(x.double(), t, y))


@pytest.mark.parametrize("channels, patch", [(1, 2), (3, 1), (4, 4)])
def test_the_mean_over_kept_tokens_is_that_of_their_pixels_alone(channels, patch):
    kept = KeptTokens.from_noise(torch.rand(3, L), 5)
    values = torch.rand(3, channels, 4 * patch, 4 * patch)
    pixels = kept.dropped.view(3, 1, 4, 4).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    pixels = pixels.expand_as(values)
    expected = torch.stack([v[~p].mean() for v, p in zip(values, pixels, strict=True)])
    torch.testing.assert_close(kept.mean(values), expected)
    assert torch.equal(kept.mean(values.masked_fill(pixels, 1e9)), kept.mean(values))


@pytest.mark.parametrize("size, leave", [("S", 2), ("XL", 2), ("Ti", 1)])
def test_the_first_blocks_of_deferred_are_dense_and_all_others_sparse(size, leave):
    with torch.device("meta"):
        model = create_model(f"DiT_{size}_2", **SIZE, policy="deferred")
    assert model.route == (leave, len(model.stack))


def test_one_view_of_mdt_is_its_masked_view():
    one, both = make("MDT_Ti_2", policy="mdt_one_view"), make("MDT_Ti_2", mask_ratio=0.3)
    one.load_state_dict(both.state_dict())
    assert one.views == (SPARSE,) and one.mask_ratio == 0.3
    noise = torch.rand(2, L)
    arguments = inputs()
    assert torch.equal(one(*arguments, draw=one.draw(noise)), both(*arguments, draw=both.draw(noise)))


def test_every_family_has_a_policy_of_its_own_that_fits():
    for name, family in FAMILIES.items():
        assert name in choices.POLICIES[family.FAMILY_POLICY].families


VARIANTS = {"MDT", "MDTv2", "DiT"}


def asks_for_a_variant(node):
    if not (isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass")):
        return False
    return bool(VARIANTS & {getattr(part, "id", None) for part in ast.walk(node.args[1])})


def test_nothing_outside_of_the_models_asks_which_variant_a_model_is():
    files = [*REPO.glob("masked_diffusion/**/*.py"), *REPO.glob("scripts/**/*.py"), *REPO.glob("*.py")]
    outside = [path for path in files if path.parent.name != "models"]
    assert len(outside) > 50
    for path in outside:
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if asks_for_a_variant(node)]
        assert not found, (path, found)
    assert any(map(asks_for_a_variant, ast.walk(ast.parse("isinstance(model, MDT | DiT)"))))
