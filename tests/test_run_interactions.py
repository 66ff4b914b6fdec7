"""Players in a part of an experiment: what is refused, and before anything is trained."""

from pathlib import Path

import pytest
from test_experiments import own
from tinybase import tiny_base

from graftlens.configfile import ConfigError
from graftlens.experiment.plan import Store, plan

PLAYERS = {"FE": "sft @ first_entity", "LT": "sft @ last : attn"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def test_coalitions_are_grafts_of_the_parts_sweep(base, tmp_path):
    named = own(base, interactions={"players": PLAYERS, "metrics": ["top1"]}, grafts=None)
    planned = plan(named.config, Store(tmp_path))
    planned.check()
    checked = planned.checked("one", trained=False)
    grafts = {g.name: str(g.graft) for g in checked.grafts}
    assert grafts == {
        "none": "none",
        "FE": "sft @ first_entity",
        "LT": "sft @ last : attn",
        "FE + LT": "sft @ first_entity | sft @ last : attn",
        "sft @ all": "sft @ all",
    }


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"players": {"a": "sft @ last"}}, "interactions: 1 players. Give from 2 to 62"),
        ({"players": PLAYERS, "margin": 2}, "interactions.margin: "),
        ({"players": PLAYERS, "metrics": []}, "interactions.metrics: "),
        ({"players": PLAYERS, "metrics": ["recovery"]}, "recovery has no value in single prompts"),
        ({"players": PLAYERS, "metrics": ["entropy"]}, "entropy is not measured here. Add it to"),
        ({"players": PLAYERS, "metrics": ["tpo1"]}, "unknown metric 'tpo1'"),
        (
            {"players": {**PLAYERS, "x": "task @ bos"}},
            "interactions.players.x: no source 'task'. There are: pre sft.",
        ),
        ({"players": {**PLAYERS, "FE + LT": "sft @ bos"}}, "two coalitions would be called"),
        ({"players": PLAYERS, "player": 1}, "player"),
    ],
)
def test_players_that_a_config_cannot_have(base, asked, sentence):
    with pytest.raises(ConfigError) as caught:
        own(base, interactions=asked)
    assert sentence in str(caught.value)


def test_a_graft_with_a_coalitions_name(base):
    with pytest.raises(ConfigError, match=r"grafts\.FE \+ LT: a coalition of the players has this"):
        own(base, interactions={"players": PLAYERS}, grafts={"FE + LT": "sft @ bos"})


@pytest.mark.parametrize(
    ("players", "sentence"),
    [
        (
            {"LT": "sft @ last", "MLP": "sft @ all : mlp : 2"},
            r"parts\.one\.interactions\.players: players 'LT' and 'MLP' overlap in prompt 0: both "
            r"graft mlp_in of layer 2 at position \d+",
        ),
        (
            {"LT": "sft @ last", "M": "sft @ movie_title"},
            r"none of \d+ prompts can run",
        ),
    ],
)
def test_players_that_do_not_fit_are_told_before_training(base, tmp_path, players, sentence):
    planned = plan(own(base, interactions={"players": players}).config, Store(tmp_path))
    with pytest.raises(ConfigError, match=sentence):
        planned.check()
    assert not (tmp_path / "models").exists()
