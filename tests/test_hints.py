"""Mistaken options: the message names what was probably meant."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metaheed.cli.hints import OTHER_WORDS, options
from metaheed.config import ALGORITHMS, EpisodeConfig, EvaluationConfig, default_config, from_dict, to_dict
from metaheed.errors import ConfigError, naming_options, option
from metaheed.learners import MAML
from tests.conftest import Run


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("train maml --lr 0.1", "here it is called --fast-lr (of the adaptation) or --meta-lr"),
        ("train maml --attention-lr 0.1", "it is an option of ta-anil, ta-boil, ta-maml"),
        ("train ta-maml --inner-lr 0.4", "here it is called --fast-lr"),
        ("train maml --n-way=5", "here it is called --ways"),
        ("train maml --k_shot 1", "here it is called --shots"),
        ("train maml --wayz 5", "did you mean --ways"),
        ("train custom --learner maml --rule attended --num-updates 3", "here it is called --adaptation-steps"),
        ("search maml --num-shots 5", "here it is called --shots"),
        ("evaluate run --thread 3", "did you mean --threads"),
        ("data prepare glyphs --form x", "did you mean --from"),
        (
            "train protonet --zzz 1",
            "'metaheed train protonet' has no option --zzz: see 'metaheed train protonet --help'",
        ),
        ("train maml --lr 0.1", "see 'metaheed train maml --help'"),
        ("train maml --update-lr 0.1", "here it is called --fast-lr; see 'metaheed train maml --help'"),
        ("train", "train needs the name of an algorithm first: metaheed train ALGORITHM"),
        ("train --lr 0.1", "metaheed train ALGORITHM --lr 0.1; 'metaheed train --help' lists them"),
        ("search --trials 3", "metaheed search ALGORITHM --trials 3"),
        ("ta-maml", "'ta-maml' is an algorithm, not a command: metaheed train ta-maml"),
        ("ta-maml --ways 5", "'ta-maml' is an algorithm, not a command: metaheed train ta-maml --ways 5"),
        ("compare", "metaheed compare RUN... --against RUN..."),
        ("compare a b", "metaheed compare RUN... --against RUN..."),
    ],
)
def test_a_mistaken_option_is_led_somewhere(arguments: str, hint: str, metaheed: Run, in_folder: Path) -> None:
    status, out, err = metaheed(*arguments.split())
    assert (status, out, hint in err, len(err.splitlines())) == (1, "", True, 1), err
    assert not [*in_folder.iterdir()]


def test_the_words_of_others_lead_to_options_that_are_there() -> None:
    known = {*options(EvaluationConfig)} | {name for a in ALGORITHMS for name in options(default_config(a))}
    assert {meant.split(" ")[0] for meant in OTHER_WORDS.values()} <= known
    assert not {*OTHER_WORDS} & known, "an option of ours needs no translation"


def test_help_names_this_algorithms_options_only(metaheed: Run) -> None:
    _, plain, _ = metaheed("train", "maml", "--help")
    _, attended, _ = metaheed("train", "ta-maml", "--help")
    assert "--fast-lr" in plain
    assert "--attention-lr" not in plain
    assert "--attention-lr" in attended


def test_a_setting_is_called_as_its_caller_knows_it(metaheed: Run, in_folder: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with pytest.raises(ConfigError, match=r"^fast_lr is -1"):
        MAML(network, fast_lr=-1)
    with pytest.raises(ConfigError, match=r"^test_ways is 6.*more ways"):
        replace(default_config("maml"), episodes=EpisodeConfig(test_ways=6))
    for arguments, said in (("--fast-lr -1", "--fast-lr is -1.0"), ("--test-ways 6", "train with more --ways")):
        status, _, err = metaheed("train", "maml", *arguments.split())
        assert (status, said in err) == (1, True), err
    values = to_dict(default_config("maml"))
    values["learner"]["fast_lr"] = -1.0
    with naming_options(), pytest.raises(ConfigError, match=r"^fast_lr is -1"):
        from_dict(values)  # a file has fields, whoever reads it
    with naming_options():
        assert option("first_order", True) == "--first-order"
        assert option("check_gradient", False) == "--no-check-gradient"
        assert option("execution", "looped") == "--execution looped"
    assert option("execution", "looped") == "execution='looped'"
