import argparse
import contextlib
import io
import shlex
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masked_diffusion import script_util
from masked_diffusion.processes import launchers
from masked_diffusion.script_util import (
    add_dict_to_argparser,
    add_launcher_flags,
    args_to_dict,
    explicit_flags,
    finite_float,
    main_of,
    optional,
    place_from_args,
    run_script,
    str2bool,
    usage_error,
)

DEFAULTS = {"lr": 3e-4, "batch_size": 1, "use_fp16": False, "random_flip": True, "model": "MDT_S_2", "mask_ratio": None}


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, DEFAULTS, {"mask_ratio": optional(finite_float)}, {"lr": "learning rate"})
    add_launcher_flags(parser)
    return parser


@pytest.fixture(autouse=True)
def _a_program_without_a_launcher(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/image_train.py"])
    for variables in launchers.LAUNCHERS.values():
        for name in variables:
            monkeypatch.delenv(name, raising=False)


# -- flags -------------------------------------------------------------------------------------------------------------


TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


@pytest.mark.parametrize("words, expected", [(TRUE, True), (FALSE, False)])
def test_booleans_are_words_in_any_case(words, expected):
    for word in words:
        for text in (word, word.upper(), word.capitalize()):
            assert str2bool(text) is expected
    assert str2bool(expected) is expected


@given(st.text().filter(lambda text: text.lower() not in TRUE + FALSE))
def test_other_words_are_no_booleans(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected True or False"):
        str2bool(text)


def test_flags_have_the_defaults_and_their_types(parser):
    assert args_to_dict(parser.parse_args([]), DEFAULTS) == DEFAULTS
    line = "--lr 1e-4 --batch_size 8 --use_fp16 yes --random_flip 0 --model DiT_S_2 --mask_ratio 0.3"
    assert args_to_dict(parser.parse_args(shlex.split(line)), DEFAULTS) == {
        "lr": 1e-4,
        "batch_size": 8,
        "use_fp16": True,
        "random_flip": False,
        "model": "DiT_S_2",
        "mask_ratio": 0.3,
    }


def test_values_are_given_back_in_the_order_of_the_keys(parser):
    args = parser.parse_args([])
    assert list(args_to_dict(args, ["model", "lr"])) == ["model", "lr"]


@pytest.mark.parametrize("text", ["None", "none", "NONE"])
def test_an_optional_flag_may_be_given_as_none(parser, text):
    assert parser.parse_args(["--mask_ratio", text]).mask_ratio is None


@pytest.mark.parametrize("argv", ["--use_fp16 maybe", "--batch_size 1.5", "--mask_ratio third", "--no_such_flag 1"])
def test_a_bad_value_is_refused_naming_the_flag(parser, argv, capsys):
    with pytest.raises(SystemExit) as raised:
        parser.parse_args(argv.split())
    assert raised.value.code == 2
    assert argv.split()[0] in capsys.readouterr().err


def test_help_says_the_default(parser):
    text = " ".join(parser.format_help().split())
    assert "learning rate (default: 0.0003)" in text
    assert "(default: 'MDT_S_2')" in text


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("", set()),
        ("--lr 3e-4", {"lr"}),
        ("--use_fp16 False --mask_ratio None", {"use_fp16", "mask_ratio"}),
        ("--lr=1e-4 --local_rank 0 --dist_on_itp", {"lr", "local_rank", "dist_on_itp"}),
    ],
)
def test_explicit_flags_are_those_on_the_command_line_also_at_their_default_values(parser, argv, expected):
    before = parser.parse_args(argv.split())
    assert explicit_flags(parser, argv.split()) == expected
    assert parser.parse_args(argv.split()) == before
    assert explicit_flags(parser, argv.split()) == expected


def test_explicit_flags_reads_the_command_line_when_no_arguments_are_given(parser, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["image_train.py", "--lr", "1"])
    assert explicit_flags(parser, None) == {"lr"}


@pytest.mark.parametrize("flag", ["lr", "mask_ratio"])
@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf", "Infinity", "1e999", "x", ""])
def test_a_float_flag_that_is_no_finite_number_is_a_usage_error(parser, capsys, flag, text):
    with pytest.raises(SystemExit) as refused:
        parser.parse_args([f"--{flag}={text}"])
    assert refused.value.code == 2
    assert f"argument --{flag}: expected a finite number, got {text!r}" in capsys.readouterr().err


@given(names=st.sets(st.sampled_from(sorted(DEFAULTS))))
def test_exactly_the_given_flags_are_explicit(names):
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, DEFAULTS, {"mask_ratio": optional(finite_float)})
    argv = [f"--{name}={DEFAULTS[name]}" for name in sorted(names)]
    assert explicit_flags(parser, argv) == names
    assert args_to_dict(parser.parse_args(argv), DEFAULTS) == DEFAULTS


# -- launchers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", ["--local-rank=1", "--local_rank=1", "--local-rank 1", "--local_rank 1"])
def test_the_local_rank_is_accepted_in_both_spellings(parser, argv):
    assert parser.parse_args(argv.split()).local_rank == 1


def test_launcher_flags_win_over_the_environment(parser, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert place_from_args(parser.parse_args([])) == launchers.Place(1, 4, 1)
    line = "--rank 2 --world_size 3 --local_rank 0 --dist_url tcp://host:1 --dist_on_itp"
    args = parser.parse_args(shlex.split(line))
    assert place_from_args(args) == launchers.Place(2, 3, 0)
    assert args.dist_url == "tcp://host:1"


def test_a_bare_process_is_alone(parser):
    assert place_from_args(parser.parse_args([])) == launchers.Place()
    assert parser.parse_args([]).dist_url == "env://"


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_usage_error_is_one_line_on_stderr_and_status_2(capsys):
    assert usage_error(ValueError("--lr 0:\n  must be\tpositive\n")) == 2
    captured = capsys.readouterr()
    assert captured.err == "image_train.py: error: --lr 0: must be positive\n"
    assert captured.out == ""


def test_other_ranks_name_themselves(capsys):
    usage_error(ValueError("bad"), rank=3)
    assert capsys.readouterr().err == "image_train.py: rank 3: error: bad\n"


@pytest.mark.parametrize(
    "error", [ValueError("--lr 0: bad"), FileNotFoundError("--lr 0: bad"), PermissionError("--lr 0: bad")]
)
def test_bad_input_found_while_preparing_is_one_line_and_status_2(capsys, error):
    def prepare(stack):
        raise error

    assert run_script(prepare) == 2
    assert capsys.readouterr().err == "image_train.py: error: --lr 0: bad\n"


def test_the_rank_of_a_launcher_is_named_in_the_line(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def prepare(stack):
        raise ValueError("bad")

    assert run_script(prepare) == 2
    assert "rank 1" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError, TypeError, RuntimeError, AssertionError, KeyboardInterrupt])
def test_our_own_mistakes_while_preparing_keep_their_traceback(error):
    def prepare(stack):
        raise error("ours")

    with pytest.raises(error, match="ours"):
        run_script(prepare)


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])
def test_errors_of_the_work_keep_their_traceback(capsys, error):
    def work():
        raise error("on day three")

    with pytest.raises(error, match="on day three"):
        run_script(lambda stack: work)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("failing", ["nothing", "prepare", "work"])
def test_what_was_opened_is_closed_at_the_end_whatever_happens(failing):
    events = []

    def prepare(stack):
        stack.callback(events.append, "closed")
        if failing == "prepare":
            raise ValueError("bad")
        return work

    def work():
        events.append("work")
        if failing == "work":
            raise RuntimeError("broken")

    with contextlib.suppress(RuntimeError):
        status = run_script(prepare)
        assert status == (2 if failing == "prepare" else 0)
    assert events == (["closed"] if failing == "prepare" else ["work", "closed"])


def new_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="none")
    return parser


def test_a_scripts_main_gives_prepare_what_it_names():
    seen = []

    def with_all(args, explicit, argv, stack):
        stack.callback(seen.append, "closed")
        return lambda: seen.append((args.name, explicit, argv))

    def with_the_unknown(args, of_sampler, other="usual"):
        return lambda: seen.append((args.name, of_sampler, other))

    assert main_of(new_parser, with_all)(["--name", "a"]) == 0
    assert main_of(new_parser, with_the_unknown)(["--seed", "1"]) == 0
    assert seen == [("a", {"name"}, ["--name", "a"]), "closed", ("none", ["--seed", "1"], "usual")]


def test_a_scripts_main_refuses_flags_that_nobody_asks_for():
    with pytest.raises(SystemExit):
        main_of(new_parser, lambda args: None)(["--seed", "1"])


def test_the_status_of_usage_errors_is_that_of_argparse():
    with pytest.raises(SystemExit) as raised:
        argparse.ArgumentParser().error("bad")
    assert raised.value.code == script_util.USAGE_ERROR


def test_what_the_terminals_encoding_lacks_is_written_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run_script(lambda stack: lambda: sys.stdout.write("ü \udce9.png\n") and None) == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"\\xfc \\udce9.png\n"
