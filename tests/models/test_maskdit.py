"""``--policy maskdit``: kept tokens alone go through the blocks, a decoder sees all, and the loss has two terms."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from masked_diffusion.diffusion.objectives import OBJECTIVES, ObjectiveConfig
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.models import FAMILIES, create_model
from masked_diffusion.models.policies import POLICIES, usual_decoder
from masked_diffusion.models.tokens import Draw, KeptTokens, pixels_by_token

few = settings(max_examples=10, deadline=None, derandomize=True)
FORMS = ["64x2", "32x1", "blocks"]


@st.composite
def masked(draw):
    """A small model under maskdit with either decoder, its inputs, and a draw that drops a part of the tokens."""
    depth, grid, channels = draw(st.integers(2, 4)), draw(st.integers(2, 4)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 99)))
    family, count = FAMILIES[draw(st.sampled_from(["DiT", "MDT", "SiT"]))], draw(st.integers(1, 3))
    model = family(
        2 * grid, 2, channels, 16, depth, 2, num_classes=3, learn_sigma=False, decode_layer=1, policy="maskdit",
        decoder=draw(st.sampled_from(FORMS)), mask_ratio=draw(st.sampled_from([0.25, 0.5, 0.7])),
    ).eval().double()  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(count, channels, 2 * grid, 2 * grid, dtype=torch.float64)
    inputs = (x, torch.randint(0, 999, (count,)), torch.randint(0, 3, (count,)))
    return model, inputs, torch.rand(count, grid**2)


def per_token(x, num_tokens):
    return pixels_by_token(x.abs(), num_tokens).sum(dim=2)


@few
@given(masked())
def test_where_all_tokens_stay_in_any_order_the_pass_is_that_of_the_inference(case):
    model, inputs, noise = case
    all_kept = Draw(KeptTokens.from_noise(noise, model.num_tokens))
    torch.testing.assert_close(model(*inputs, draw=all_kept), model(*inputs), rtol=1e-11, atol=1e-12)
    assert model.draw(noise, share=0.0).kept is not None  # the mask token takes part, with a gradient of zero


@few
@given(masked())
def test_every_token_is_predicted_and_dropped_ones_are_not_seen(case):
    model, (x, t, y), noise = case
    draw = model.draw(noise)
    out = model(x.requires_grad_(), t, y, draw=draw)
    assert (per_token(out, model.num_tokens) > 0).all()
    out.square().sum().backward()
    assert torch.equal(per_token(x.grad, model.num_tokens) == 0, draw.kept.dropped)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name


@few
@given(masked())
def test_the_decoder_tells_dropped_tokens_apart_by_their_positions_alone(case):
    model, inputs, noise = case
    patches = pixels_by_token(model(*inputs, draw=model.draw(noise)), model.num_tokens)
    [first, second] = model.draw(noise).kept.dropped[0].nonzero().flatten()[[0, -1]].tolist()
    assume(first != second)
    assert not torch.allclose(patches[0, first], patches[0, second])
    positions = model.decoder_pos_embed if model.decoder_form == "blocks" else model.decoder.pos_embed
    positions.data[:, second] = positions[:, first]
    if model.HAS_RELATIVE_BIAS and model.decoder_form == "blocks":
        return  # whose blocks have relative positions, too
    patches = pixels_by_token(model(*inputs, draw=model.draw(noise)), model.num_tokens)
    torch.testing.assert_close(patches[0, first], patches[0, second])


def losses(model, objective, x_start, noise, level, y, draw):
    config = ObjectiveConfig(objective=objective, sigma_data=0.5)
    made = OBJECTIVES[objective](config, lambda **changes: DiffusionConfig(**{"learn_sigma": False, **changes}).build())
    how = model.policy.counts(draw), model.policy.extra(draw)
    return made.training_losses(model.float(), x_start, level, {"y": y, "draw": draw}, noise, *how)


LEVELS = {"flow": 0.4, "edm": 0.7, "v": 400, "x0": 400}


@few
@given(masked(), st.sampled_from(list(LEVELS)))
def test_the_loss_of_kept_tokens_is_blind_to_what_was_dropped(case, objective):
    model, (x, _, y), token_noise = case
    if type(model).__name__ == "SiT":
        objective = "flow"
    x, noise, draw = x.float(), torch.randn_like(x, dtype=torch.float32), model.draw(token_noise)
    level = torch.full((len(x),), LEVELS[objective])
    terms = losses(model, objective, x, noise, level, y, draw)
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["mae"])
    away = draw.kept.dropped.view(len(x), 1, *[int(model.num_tokens**0.5)] * 2)
    away = away.repeat_interleave(2, 2).repeat_interleave(2, 3).expand_as(x)
    other = losses(model, objective, torch.where(away, 9.0, x), torch.where(away, -5.0, noise), level, y, draw)
    torch.testing.assert_close(other["mse"], terms["mse"])
    assert not torch.allclose(other["mae"], terms["mae"])


@few
@given(masked())
def test_the_term_of_dropped_tokens_knows_the_noisy_patch_alone(case):
    model, (x, _, y), token_noise = case
    level = torch.full((len(x),), 0.5)
    x, noise, draw = x.float(), torch.randn_like(x, dtype=torch.float32), model.draw(token_noise)
    # At t = 0.5 data and noise can change places, and the state stays.
    here, swapped = (losses(model, "flow", a, b, level, y, draw) for a, b in ((x, noise), (noise, x)))
    torch.testing.assert_close(here["mae"], swapped["mae"])
    assert not torch.allclose(here["mse"], swapped["mse"])
    # It is a tenth of the mean squared difference to patches of mean 0 and variance 1.
    state, num_tokens = (x + noise) / 2, model.num_tokens
    out = model(state, 1000 * level, y, draw=draw)
    patches = pixels_by_token(state, num_tokens)
    target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    error = (pixels_by_token(state - 0.5 * out, num_tokens) - target).square().mean(2)
    expected = [e[away].mean() for e, away in zip(error, draw.kept.dropped, strict=True)]
    torch.testing.assert_close(here["mae"], 0.1 * torch.stack(expected))


def test_where_all_stay_the_term_of_dropped_tokens_is_zero():
    model = create_model("DiT_Ti_2", input_size=8, in_channels=1, learn_sigma=False, policy="maskdit")
    draw, x = model.draw(torch.rand(2, 16), share=0.0), torch.randn(2, 1, 8, 8)
    terms = losses(model, "flow", x, torch.randn_like(x), torch.tensor([0.1, 0.9]), torch.zeros(2).long(), draw)
    assert not terms["mae"].any() and torch.equal(terms["loss"], terms["mse"])


def test_a_fresh_decoder_is_as_published():
    with torch.device("meta"):
        assert create_model("DiT_S_2", policy="maskdit").decoder_form == "512x8"
        assert len(create_model("DiT_XL_2", policy="maskdit").decoder.blocks) == 8
    assert usual_decoder(1152, 28) == "512x8" and usual_decoder(64, 12) == "96x8" and usual_decoder(128, 4) == "192x2"
    model = create_model("MDT_Ti_2", input_size=8, policy="maskdit", decoder="512x1")
    decoder, block = model.decoder, model.decoder.blocks[0]
    assert not decoder.embed.linear.weight.any() and not decoder.embed.adaLN_modulation[1].weight.any()
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert (block.attn.num_heads, block.attn.rel_pos_bias, model.route) == (16, None, (0, 4))
    assert "decoder.pos_embed" not in model.state_dict()


@pytest.mark.parametrize("text", ["512", "512x", "x8", "500x8", "512x0", "axb", "512x8x2", "last"])
def test_a_decoder_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=f"--decoder {text}: expected WIDTHxBLOCKS with a width divisible by 32"):
        create_model("DiT_Ti_2", input_size=8, policy="maskdit", decoder=text)


def test_patches_of_one_value_and_objectives_without_an_estimate_are_refused():
    policy = POLICIES["maskdit"]
    with pytest.raises(ValueError, match="standardises patches, which have one value each here"):
        policy.check_objective("flow", 1)
    with pytest.raises(ValueError, match="--objective ddpm: not with this policy, which is for x0, v, flow, edm"):
        policy.check_objective("ddpm", 4)
