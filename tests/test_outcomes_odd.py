"""Odd inputs: what a model may write, what a user may ask, and what measures may do."""

import json
import re
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import MakeTiny, Tiny
from sweeps import checkpoints
from test_outcomes import agree, noise
from test_outcomes_measures import texts_table, values
from test_report import Page
from test_sweep_texts import held, quiet, unanswered

from graftlens import Prompt, outcomes, read_texts, sweep_report
from graftlens.configfile import ConfigError
from graftlens.metrics import Measure
from graftlens.model.sampling import StopStrings
from graftlens.sweep.config import SweepConfig, check
from graftlens.viz.tables import read_table

EVIL = "<img src=x onerror=alert(1)>|\n\"'&</script>"


@pytest.fixture(scope="module")
def pair(tiny: MakeTiny) -> Tiny:
    return tiny("llama", tokenizer="llama3")


def ask(pair: Tiny, prompts: Any, grafts: Any = "sft @ generated", **options: Any) -> pd.DataFrame:
    settings = {"max_new_tokens": 4, "progress": False} | options
    return outcomes.sample(pair.model, prompts, grafts, **settings)


# -- what is generated -----------------------------------------------------------------------------


def test_prompts_that_repeat_have_equal_texts_and_rows_of_their_own(pair: Tiny) -> None:
    """Also an empty one (its token is the one that begins every text), and end tokens alone."""
    assert pair.tokenizer is not None
    end = str(pair.tokenizer.eos_token)
    given = ["Zoë 🎬 and", "", f"{end}{end}", "Zoë 🎬 and", "\u200b \N{COMBINING ACUTE ACCENT}"]
    table = ask(pair, given, n=2)
    assert table["prompt_text"].tolist() == [text for text in given for _ in range(6)]
    assert table["reason"].isna().all()
    first, again = (table[table["prompt"] == n].drop(columns="prompt") for n in (0, 3))
    pd.testing.assert_frame_equal(first.reset_index(drop=True), again.reset_index(drop=True))
    for row in table[table["graft"] == "SFT"].to_dict("records"):
        (tokens,) = pair.model.tokenized(row["prompt_text"])
        ids, new = list(tokens.ids), [int(t) for t in row["tokens"]]
        logits = pair.logits("sft", [*ids, *new[:-1]])[len(ids) - 1 :].double()
        drawn = [noise(0, ids, row["sample"], s, logits.shape[1]) for s in range(len(new))]
        assert agree(logits + torch.stack(drawn), new) == len(new)


def test_a_text_that_ends_at_once_is_empty_and_measured(
    pair: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = ask(pair, ["Ann and"], temperature=0)
    first = {row["graft"]: int(row["tokens"][0]) for row in greedy.to_dict("records")}
    ends = [*set(first.values())]
    monkeypatch.setattr(
        type(pair.model), "ends_of", lambda self, rows: [ends for _ in rows], raising=True
    )
    table = ask(pair, ["Ann and"], temperature=0)
    assert table["text"].tolist() == [""] * 3
    assert table["stop"].tolist() == ["end"] * 3
    assert [list(tokens) for tokens in table["tokens"]] == [[first[g]] for g in table["graft"]]
    said = {
        "has": outcomes.contains("a"),
        "is": outcomes.exact("."),
        "first": outcomes.choice(["a", "b"]),
    }
    found = outcomes.measured(table, {**said, "long": len})
    assert found[["has", "is", "long"]].to_numpy().tolist() == [[0, 0, 0]] * 3
    assert found["first"].tolist() == ["none"] * 3
    parted = outcomes.divergence(pair.model, table)
    apart = [float(first[graft] != first["PRE"]) for graft in table["graft"]]
    assert parted["parts_base"].tolist() == apart


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no texts": ({"n": 0}, "n=0: write a number from 1."),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens=0: write a number from 1."),
    "top_p=0": ({"top_p": 0}, "top_p=0: write a number above 0 and up to 1"),
    "top_p nan": ({"top_p": float("nan")}, "top_p=nan: write a number above 0"),
    "cold": ({"temperature": -1}, "temperature=-1: write a number from 0"),
    "nan": ({"temperature": float("nan")}, "temperature=nan: write a number from 0"),
    "endless": ({"temperature": float("inf")}, "temperature=inf: write a number from 0"),
    "next to nothing": ({"temperature": 1e-39}, "temperature=1e-39: write 0 for the likeliest"),
    "penalty": ({"repetition_penalty": 0}, "repetition_penalty=0: write a number above 0"),
    "empty stop": ({"stop_strings": ["a", ""]}, "stop_strings: ''. Give a text"),
}


@pytest.mark.parametrize(("options", "said"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_make_no_sense(options: dict[str, Any], said: str, pair: Tiny) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        ask(pair, ["Ann and"], **options)


def test_the_lowest_temperature_is_greedy(pair: Tiny) -> None:
    cold, greedy = (ask(pair, ["Ann and", "Zoë"], temperature=t) for t in (1e-6, 0))
    assert cold["text"].tolist() == greedy["text"].tolist()


@pytest.mark.parametrize(
    ("said", "stop", "at"),
    [
        (["a", "ab", "abc"], "bc", 2),
        (["x", "xE", "xEND", "xENDE"], "END", 2),
        (["\ufffd", "é"], "é", 1),  # two tokens make a character
        (["\ufffd", "é.", "é.."], "..", 2),
        (["aa", "aaa"], "aaaa", None),
        ([" a\n", " a\n\n", " a\n\nb"], "\n\n", 1),
        (["STOP", "STOP now", "STOP now STOP"], "STOP", 0),
    ],
)
def test_stop_strings_across_the_borders_of_tokens(
    said: list[str], stop: str, at: int | None
) -> None:
    stops = StopStrings(stop)
    done = [stops.completed(b, n) for b, n in zip(["", *said], said, strict=False)]
    assert next((i for i, one in enumerate(done) if one), None) == at


# -- measures --------------------------------------------------------------------------------------


def test_an_answer_of_punctuation_is_not_an_empty_text() -> None:
    """Nothing was left of it, so that whatever had no letter was right."""
    assert values(outcomes.exact("?!"), "", "...", " ?! ", "?") == [0, 0, 1, 0]
    assert values(outcomes.exact("?!", prefix=True), "", "?! yes") == [0, 0]
    assert values(outcomes.exact([" "]), "", " ", "a") == [0, 0, 0]
    assert outcomes.normalised("«…»") == "«...»"


def test_a_function_that_fails_is_named_with_the_text() -> None:
    table = texts_table({"PRE": [["a b"], [""]]})
    said = (
        "measure 'share' failed on the text '' (ZeroDivisionError: division by zero). Correct its "
        "function: what is generated may be empty"
    )
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        outcomes.measured(table, {"share": lambda text: 1 / len(text)})
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_numbers_that_are_none_and_infinite_ones() -> None:
    table = texts_table({"PRE": [["a"], ["b"], ["c"], ["d"]], "SFT": [["a"], ["b"], ["c"], ["d"]]})
    odd = {"a": float("nan"), "b": None, "c": np.float32(2), "d": True}
    found = outcomes.rate(table, {"m": lambda text: odd[text]}).set_index("graft")
    assert found["n"].tolist() == [2, 2]
    assert found["unread"].tolist() == [2, 2]
    assert found["rate"].tolist() == [1.5, 1.5]
    endless = outcomes.rate(table, {"m": lambda text: float("inf") if text == "a" else 0.0})
    assert endless["rate"].isna().all()
    assert endless["note"].str.contains("is infinite for").all()


@pytest.mark.parametrize("name", ["value_0", "of_prompt", "value_1", "graft_2"])
def test_measures_of_any_name_have_their_own_values(name: str) -> None:
    """The table that statistics read had columns of such names, which replaced the measure's."""
    table = texts_table({"PRE": [["a"], ["bb"]], "SFT": [["ccc"], ["dddd"]]})
    rates = outcomes.rate(table, {"other": lambda _: 7.0, name: len})
    own = rates[rates["measure"] == name].set_index("graft")["rate"]
    assert own.to_dict() == {"PRE": 1.5, "SFT": 3.5}
    apart = outcomes.differences(table, {"other": lambda _: 7.0, name: len}, [("SFT", "PRE")])
    assert apart.set_index("measure").loc[name, "difference"] == 2


def test_a_judges_replies_have_a_column_that_no_measure_may_have() -> None:
    table = texts_table({"PRE": [["a"]]})
    with pytest.raises(ValueError, match="measure 'm_unread': the table has another column"):
        outcomes.measured(table, {"m": len, "m_unread": len})


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ((0, 10**9), "a judge is told every value. Write fewer."),
        ({"yes": float("nan"), "no": 0}, "should be a finite number"),
        ((5, 1), "write [least, largest]"),
    ],
)
def test_scales_that_no_judge_can_use(scale: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        outcomes.judge("Is it?", scale, model="m")


# -- facts and divergence --------------------------------------------------------------------------


def test_first_names_are_words_as_they_are_written() -> None:
    """A name with a hyphen is one word, and quotation marks and dashes are none."""
    said = ["Jean Smith", "Jean-Luc Smith", "“Jean-Luc Smith", "- Jean-Luc", "Anne Oz", "Zoë-Ann"]
    answers = ["Jean-Luc Picard"] * 4 + ["Anne-Marie", "Zoe Low"]
    table = texts_table({"PRE": [["?"]] * 6, "x": [[text] for text in said]})
    table["answer"] = [answers[n] for n in table["prompt"]]
    table["answers"] = [[answer] for answer in table["answer"]]
    kinds = outcomes.answered(table).groupby("graft")["kind"].apply(list)["x"]
    assert kinds == ["other", *["right first name"] * 3, "other", "other"]


def test_models_that_ran_one_after_another_are_compared_each_with_its_own_runs(
    pair: Tiny,
) -> None:
    """The last model's texts were taken for those of all."""
    one = ask(pair, [Prompt("Ann and", answer=" Bo Lee")], temperature=0)
    both = pd.concat(
        [one.assign(member="a", step=1), one.assign(member="b", step=2)], ignore_index=True
    )
    odd = both["member"] == "b"
    both.loc[odd & (both["graft"] == "SFT"), "text"] = "Cy Roe"
    both.loc[odd & (both["graft"] == "PRE"), "text"] = "Di Fox"
    both.loc[~odd, "text"] = "Di Fox"
    for place in both.index[odd & (both["graft"] == "SFT")]:
        both.at[place, "tokens"] = [1, 2]
    alone = both[~odd].drop(columns=["member", "step"]).reset_index(drop=True)
    for found, expected, columns in (
        (outcomes.answered(both), outcomes.answered(alone), ["claim", "kind"]),
        (
            outcomes.divergence(pair.model, both),
            outcomes.divergence(pair.model, alone),
            ["parts_base", "parts_full", "step_full", "there_full"],
        ),
    ):
        mine = found[found["member"] == "a"].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine[columns], expected[columns])


def test_continuations_are_texts_each(pair: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    score = outcomes.score_texts
    alone = score(pair.model, ["Ann and"], "sft @ all", continuations=[" Bo"])
    said = score(pair.model, "Ann and", "sft @ all", continuations=" Bo")
    pd.testing.assert_frame_equal(said, alone)
    given: Any = [" Bo", None]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="continuations: None is not a text"):
        score(pair.model, ["Ann and", "Cy and"], "sft @ all", continuations=given)
    empty = score(pair.model, ["Ann and", ""], "sft @ all", continuations=["", " Bo"])
    assert empty[empty["text"] == 0]["reason"].str.contains("has no token to score").all()


# -- in sweeps -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checkpoints(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("measure", [{"exact": True}, {"answer_kind": ["Bo Lee"]}])
def test_what_needs_answers_is_refused_before_anything_runs(
    measure: dict[str, Any], sources: dict[str, str]
) -> None:
    given = unanswered(sources, outcomes={"measures": {"right": measure}})
    with pytest.raises(ConfigError, match=r"outcomes\.measures\.right: prompt 0 has no answer"):
        check(SweepConfig(**given))


@pytest.mark.parametrize("name", ["fact", "kind_unread"])
def test_names_of_other_columns_are_refused(name: str, sources: dict[str, str]) -> None:
    """`fact` was taken for the facts that prompts ask for."""
    measures = {"kind": {"contains": "a"}, name: {"contains": "b"}}
    with pytest.raises(ValueError, match="the table of texts has another column of this name"):
        SweepConfig(**unanswered(sources, outcomes={"measures": measures}))


def test_a_function_that_fails_loses_no_text(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing.py").write_text("def never(text):\n    return {}[text]\n")
    given = unanswered(
        sources, grafts={"LT": "sft @ last"}, outcomes={"measures": {"m": "failing:never"}}, limit=1
    )
    with pytest.raises(ValueError, match=r"measure 'm' failed on the text .*KeyError.* All texts"):
        quiet(given, tmp_path / "out", measures=["failing:never"])
    table = read_texts(tmp_path / "out")
    assert table["text"].notna().all()
    assert outcomes.measured(table, {"m": len})["m"].tolist() == table["text"].map(len).tolist()


def test_labels_and_numbers_of_any_kind_are_shown_as_data(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(
        f"def label(text):\n    return {EVIL!r} if len(text) % 2 else 'plain'\n"
        "def number(text):\n    return float('inf') if len(text) % 2 else float('nan')\n"
    )
    places = {"label": "odd:label", "number": "odd:number"}
    given = unanswered(sources, grafts={"LT": "sft @ last"}, outcomes={"measures": places}, limit=1)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(given))
    assert quiet(given, tmp_path / "out", measures=[*places.values()]).ok
    page = sweep_report(tmp_path / "out")
    source = page.read_text(encoding="utf-8")
    assert "<img" not in source
    assert "Infinity" not in json.dumps(held(page))
    table = read_texts(tmp_path / "out")
    assert set(table["label"]) == {EVIL, "plain"}
    rates = read_table(tmp_path / "out" / "rates.csv")
    of = rates[rates["label"] == EVIL].set_index("graft")["rate"]
    means = (table["label"] == EVIL).groupby(table["graft"]).mean()
    assert of.to_dict() == pytest.approx(means.to_dict())
    assert EVIL.split("|")[0] in "".join(Page(page).words)


def test_a_measure_of_ones_own_may_give_a_list() -> None:
    own = Measure("m", ("prompt",), lambda texts, prompts: [1.0] * len(texts), over="text")
    assert values(own, "a", "b") == [1, 1]
    few = Measure("m", (), lambda texts: [1.0], over="text")
    with pytest.raises(ValueError, match="one value per text"):
        values(few, "a", "b")
