"""Generated texts as the judge of places: `find.localise` and `find.interactions`."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeTiny, Tiny
from test_localise import prompts_of
from tinybase import tiny_base

from graftlens import GraftedTransformer, Prompt, find, outcomes, viz
from graftlens.configfile import ConfigError, settings_from
from graftlens.experiment.localising import run_localise
from graftlens.find.config import LocaliseConfig
from graftlens.find.rating import Rating
from graftlens.graft import Graft
from graftlens.prompts import PromptError

SAMPLING: dict[str, Any] = {"n": 2, "max_new_tokens": 4, "temperature": 0.8, "seed": 3}
PLACES = ["first_entity", "generated", "rest"]


def vowels(text: str) -> float:
    """A number that two random models disagree on."""
    return float(sum(letter in "aeiou" for letter in text.lower()))


@pytest.fixture(scope="module")
def pair(tiny: MakeTiny) -> Tiny:
    return tiny("llama", tokenizer="llama3")


def unanswered() -> list[Prompt]:
    return [Prompt(p.template, p.fields) for p in prompts_of()]


@pytest.fixture(scope="module")
def found(pair: Tiny) -> Any:
    return find.localise(
        pair.model,
        unanswered(),
        "sft",
        positions=PLACES,
        metric={"vowels": vowels},
        sampling=SAMPLING,
        target=0.6,
        goal="both",
        steps=4,
        rounds=1,
        random=3,
        resamples=2,
        compare={"new": "sft @ generated"},
    )


def test_what_judges_is_the_rate_of_the_same_grafts(pair: Tiny, found: Any) -> None:
    numbers = sorted(set(found.rows["prompt"]))
    assert len(numbers) == 8
    asked = [unanswered()[n] for n in numbers]
    grafts = {"found": found.graft, "complement": found.rest, "new": "sft @ generated"}
    texts = outcomes.sample(pair.model, asked, grafts, progress=False, **SAMPLING)
    rates = outcomes.rate(texts, {"vowels": vowels}).set_index("graft")
    rows = found.summary.set_index("graft")
    assert set(rows.index) == {"PRE", "SFT", *grafts}
    for graft in rows.index:
        assert rows.at[graft, "vowels"] == pytest.approx(rates.at[graft, "rate"])
        assert rows.at[graft, "recovery"] == pytest.approx(rates.at[graft, "recovery"], nan_ok=True)
    first = texts[texts["sample"] == 0].set_index(["prompt", "graft"])["text"]
    for row in found.rows.to_dict("records"):
        assert row["says"] == first[numbers.index(row["prompt"]), row["graft"]]
    assert {"rank", "top1", "kl_full"}.isdisjoint({*found.rows, *found.summary, *found.random})
    assert set(found.differences["metric"]) == {"recovery", "vowels"}


def greedy(pair: Tiny, source: str, prompt: Prompt, new: int) -> tuple[list[int], str]:
    """Hugging Face's own greedy text, in which a random model may write special tokens."""
    (tokens,) = pair.model.tokenized(prompt)
    ids = torch.tensor([list(tokens.ids)])
    out = pair.sources[source].generate(ids, do_sample=False, max_new_tokens=new)[0]
    made = out[ids.shape[1] :].tolist()
    assert pair.tokenizer is not None
    said = [token for token in made if token != pair.tokenizer.eos_token_id]
    return list(tokens.ids), pair.tokenizer.decode(said)


def logprob(pair: Tiny, source: str, before: list[int], whole: list[int]) -> float:
    said = pair.logits(source, whole).log_softmax(-1)
    return sum(said[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


def test_gradients_are_of_the_full_sources_own_greedy_texts(pair: Tiny, found: Any) -> None:
    held = set(found.rows["prompt"])
    searched = [p for n, p in enumerate(unanswered()) if n not in held]
    assert pair.tokenizer is not None
    texts, gains = [], []
    for prompt in searched:
        before, text = greedy(pair, "sft", prompt, SAMPLING["max_new_tokens"])
        whole = pair.tokenizer(prompt.text + text)["input_ids"]
        assert whole[: len(before)] == before
        texts.append(text)
        gains.append(logprob(pair, "sft", before, whole) - logprob(pair, "pre", before, whole))
    scores = find.attribute(
        pair.model,
        searched,
        "sft",
        positions=PLACES,
        metric="answer_logprob",
        continuations=texts,
        steps=4,
    )
    ends = scores.drop_duplicates("prompt")
    assert (ends["value_full"] - ends["value_base"]).tolist() == pytest.approx(gains, abs=1e-4)
    keys = ["component", "layer", "position"]
    means = scores.groupby(keys, dropna=False)["ig"].mean()
    listed = found.table.set_index(keys)["score"]
    assert listed.to_dict() == pytest.approx(means.reindex(listed.index).to_dict())
    assert listed.xs("generated", level="position").abs().max() > 0


def test_the_report_says_how_it_was_judged(found: Any, tmp_path: Any) -> None:
    said = (
        "Sets are judged by vowels in generated texts (n=2, max_new_tokens=4, temperature=0.8, "
        "seed=3). No gradient passes through it: the order is that of the log-probability of "
        "reference continuations (greedy texts of sft itself), in nats."
    )
    assert found.judged == found.notes[0] == said
    assert said in str(found)
    assert "the rate of vowels" in found.sentence
    page = html.unescape(viz.localisation_page(found, tmp_path / "page.html").read_text())
    assert said in page
    assert "the full source's" in page[page.index("What it says where it fails") :]
    assert "puts the answer first" not in page


def test_what_follows_counts_and_is_shown(pair: Tiny, found: Any) -> None:
    """Sites at generated tokens have sizes, and the example goes on after the prompt."""
    first = unanswered()[found.rows["prompt"].min()]
    before, text = greedy(pair, "sft", first, SAMPLING["max_new_tokens"])
    assert pair.tokenizer is not None
    whole = pair.tokenizer(first.text + text)["input_ids"]
    shown = found.example.drop_duplicates("pos")["token"].tolist()
    assert len(shown) > len(before)
    assert shown == [pair.model.to_single_str_token(token) for token in whole[:-1]]
    only = find.localise(
        pair.model,
        unanswered(),
        "sft",
        positions=["generated"],
        metric={"vowels": vowels},
        sampling=SAMPLING,
        steps=1,
        rounds=0,
        random=0,
        resamples=0,
    )
    assert only.total.parameters > 0


def test_failures_are_prompts_that_stay_with_the_base(found: Any) -> None:
    rows = {g: part.set_index("prompt")["vowels"] for g, part in found.rows.groupby("graft")}
    near = [
        prompt
        for prompt, value in rows["found"].items()
        if rows["SFT"][prompt] != rows["PRE"][prompt]
        and abs(value - rows["SFT"][prompt]) >= abs(value - rows["PRE"][prompt])
    ]
    assert (found.failures["prompt"].tolist() if len(found.failures) else []) == near
    if near:
        assert set(found.failures) == {
            *("prompt", "text", "vowels", "says", "full_vowels", "full_says", "base_vowels"),
            "base_says",
        }


def test_continuations_can_be_given(pair: Tiny) -> None:
    options: dict[str, Any] = {
        "positions": ["last", "rest"],
        "metric": {"vowels": vowels},
        "sampling": SAMPLING,
        "steps": 2,
        "rounds": 0,
        "random": 0,
        "resamples": 0,
    }
    answered = prompts_of()
    by_answers = find.localise(pair.model, answered, "sft", continuations="answers", **options)
    given = find.localise(pair.model, answered, "sft", continuations=[" Mara"] * 16, **options)
    pd.testing.assert_frame_equal(by_answers.table, given.table)
    pd.testing.assert_frame_equal(by_answers.rows, given.rows)
    assert "(the prompts' answers)" in by_answers.judged
    assert "(given texts)" in given.judged


def labels(text: str) -> str:
    assert not text, "it is refused before anything is generated"
    return "much" if vowels(text) > 2 else "little"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "two measures": (
        {"metric": {"a": vowels, "b": vowels}},
        "recovery is of one measure. Give one of these.",
    ),
    "labels": ({"metric": {"mine": labels}}, "metric='mine' gives labels, which have no mean."),
    "choice": ({"metric": outcomes.choice(["a", "b"])}, "metric='choice' gives labels"),
    "taken": ({"metric": {"rank": vowels}}, "measure 'rank': tables have another column of this"),
    "says": ({"metric": {"says": vowels}}, "measure 'says': tables have another column of this"),
    "not text": ({"metric": {"kl": "kl_full"}}, "'kl': 'kl_full' is not a measure. Give a"),
    "effects": ({"effects": True}, "effects=True measures every site by itself, which texts"),
    "option": ({"sampling": {"count": 3}}, "sampling={'count': 3}. Allowed: n max_new_tokens"),
    "value": ({"sampling": {"n": 0}}, "n=0: write a number from 1."),
    "count": ({"continuations": [" a"]}, "continuations=[' a'] (1 for 16 prompts). Write 'full'"),
    "word": ({"continuations": "own"}, "continuations='own'. Write 'full' (the greedy texts of"),
    "empty": ({"continuations": [""] * 16}, "prompt 0 has no continuation, so there is nothing"),
    "answers": ({"continuations": "answers"}, "prompt 0 has no answer, so there is nothing for"),
    "one token": (
        {"metric": "logprob", "sampling": SAMPLING},
        "is for measures of generated texts, and metric='logprob' is not one. Leave it out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_judged_is_said(case: str, pair: Tiny) -> None:
    given, said = BAD[case]
    options: dict[str, Any] = {"positions": ["last"], "metric": {"vowels": vowels}, "steps": 1}
    with pytest.raises(ValueError, match=re.escape(said)):
        find.localise(pair.model, unanswered(), "sft", **{**options, **given})


def test_options_are_a_mapping() -> None:
    with pytest.raises(
        ValueError, match=r"sampling=\[3\]: write the arguments of outcomes\.sample"
    ):
        Rating.of((), [3])


def test_continuations_of_attributions_are_checked(pair: Tiny) -> None:
    prompts = unanswered()[:2]
    with pytest.raises(ValueError, match=r"continuations=\[' a'\]: write a text for each prompt"):
        find.attribute(pair.model, prompts, "sft", positions=["last"], continuations=[" a"])
    with pytest.raises(PromptError, match="generated"):
        find.attribute(pair.model, prompts_of()[:2], "sft", positions=["generated"])


# -- interactions --------------------------------------------------------------------------------

PLAYERS = {
    "given attention": "sft @ prompt : attn",
    "given MLP": "sft @ prompt : mlp",
    "new": "sft @ generated",
}


def test_coalitions_are_judged_by_their_rates(pair: Tiny) -> None:
    asked = unanswered()[:4]
    found = find.interactions(
        pair.model,
        asked,
        PLAYERS,
        metrics={"vowels": vowels, "long": lambda text: len(text) > 8},
        sampling=SAMPLING,
        resamples=50,
        progress=False,
    )
    parsed = {name: Graft.parse(text) for name, text in PLAYERS.items()}
    every = {
        "nobody": Graft(),
        **parsed,
        "all": Graft(tuple(r for g in parsed.values() for r in g.rules)),
    }
    texts = outcomes.sample(pair.model, asked, every, progress=False, **SAMPLING)
    means = texts.assign(vowels=texts["text"].map(vowels)).groupby("graft")["vowels"].mean()
    rows = found.table[found.table["metric"] == "vowels"].set_index("player")
    for name in PLAYERS:
        assert rows.at[name, "alone"] == pytest.approx(means[name] - means["nobody"])
    assert rows["shapley"].sum() == pytest.approx(means["all"] - means["nobody"])
    assert set(found.table["metric"]) == {"vowels", "long"}
    assert set(found.results["prompt"]) == {0, 1, 2, 3}


def test_texts_and_tokens_side_by_side(pair: Tiny) -> None:
    players = {"attention": "sft @ all : attn", "MLP": "sft @ all : mlp"}
    asked = prompts_of()[:4]
    has = outcomes.regex("[aeiou]")
    found = find.interactions(
        pair.model,
        asked,
        players,
        metrics=["logprob", has],
        sampling=SAMPLING,
        resamples=50,
        progress=False,
    )
    alone = find.interactions(
        pair.model, asked, players, metrics="logprob", resamples=50, progress=False
    )
    both = found.table[found.table["metric"] == "logprob"].reset_index(drop=True)
    pd.testing.assert_frame_equal(both, alone.table)
    rates = outcomes.rate(
        outcomes.sample(pair.model, asked, players, progress=False, **SAMPLING), {"has": has}
    ).set_index("graft")
    rows = found.table[found.table["metric"] == "regex"].set_index("player")
    for name in players:
        expected = rates.at[name, "rate"] - rates.at["PRE", "rate"]
        assert rows.at[name, "alone"] == pytest.approx(expected)
    assert np.isfinite(found.results["regex"]).all()


def test_interactions_of_texts_that_cannot_be(pair: Tiny) -> None:
    def asked(players: Any, **more: Any) -> Any:
        options: dict[str, Any] = {"metrics": {"vowels": vowels}, "sampling": SAMPLING, **more}
        return find.interactions(pair.model, unanswered()[:2], players, progress=False, **options)

    with pytest.raises(ValueError, match=r"overlap in prompt 0: both graft .* at the answer's tok"):
        asked({"a": "sft @ generated", "b": "sft @ generated : mlp"})
    with pytest.raises(ValueError, match=r"metrics=\['logprob'\] has none. Leave it out"):
        asked(PLAYERS, metrics="logprob")
    with pytest.raises(ValueError, match="metric='mine' gives labels"):
        asked(PLAYERS, metrics={"mine": labels})


# -- in a folder -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a localisation of a tiny pair, judged by texts."""
    root = tmp_path_factory.mktemp("pair")
    pre = tiny_base(root / "pre")
    other = tiny_base(root / "sft", seed=1)
    prompts = [{"template": p.template, "fields": dict(p.fields)} for p in prompts_of()]
    return {
        "sources": {"pre": str(pre), "sft": str(other)},
        "prompts": prompts,
        "grafts": {"new": "sft @ generated"},
        "outcomes": {
            "sampling": {"max_new_tokens": 3, "temperature": 0},
            "measures": {"said": {"regex": "^ (with|to)"}},
        },
        "search": {
            "positions": ["generated", "rest"],
            "metric": "said",
            "target": 0.5,
            "steps": 2,
            "rounds": 0,
            "random": 2,
            "resamples": 1,
            "held_out": 0.5,
        },
    }


@pytest.mark.slow
def test_a_folder_judges_by_texts_as_memory_does(folders: Any, tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"progress": False, "say": lambda _: None}
    ran = run_localise(folders, tmp_path / "out", **quiet)
    assert ran.ok, ran.trust["text"]
    model = GraftedTransformer.from_pretrained(folders["sources"], verbose=False)
    sampling = folders["outcomes"]["sampling"]
    has = outcomes.regex(folders["outcomes"]["measures"]["said"]["regex"])
    search = {k: v for k, v in folders["search"].items() if k != "metric"}
    own = find.localise(
        model,
        unanswered(),
        "sft",
        metric={"said": has},
        sampling=sampling,
        compare=folders["grafts"],
        **search,
    )
    assert ran.found.text == own.text
    assert ran.found.judged == own.judged
    columns = ["prompt", "graft", "said"]
    order = ["graft", "prompt"]
    one, two = (f.rows[columns].astype({"graft": str}).sort_values(order) for f in (ran.found, own))
    assert one.to_numpy().tolist() == two.to_numpy().tolist()
    assert ran.found.judged in html.unescape(ran.page.read_text())
    kept = json.loads((tmp_path / "out" / "continuations.json").read_text())["texts"]
    greedy_texts = outcomes.sample(
        model, unanswered(), {"SFT": "sft @ all"}, temperature=0, max_new_tokens=3, progress=False
    )
    assert kept == greedy_texts[greedy_texts["graft"] == "SFT"]["text"].tolist()
    kept_files = [p for p in (tmp_path / "out" / "steps").rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in kept_files}
    assert any(p.name == "done.json" for p in before), "the trust report is not made again, either"
    again = run_localise(folders, tmp_path / "out", **quiet)
    assert again.found.text == ran.found.text
    assert {p: p.read_bytes() for p in kept_files} == before


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "metric": ({"metric": "sad"}, "search.metric: 'sad' is not one of outcomes.measures"),
    "effects": ({"effects": True}, "search.effects: every site by itself would take too long"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_texts_cannot_judge(case: str, folders: Any) -> None:
    given, said = WRONG[case]
    with pytest.raises(ConfigError, match=re.escape(said)):
        settings_from(LocaliseConfig, {**folders, "search": {**folders["search"], **given}})


def test_continuations_are_for_texts(folders: Any) -> None:
    search = {"positions": ["last"], "continuations": "answers"}
    answered = [{**one, "answer": " Mara"} for one in folders["prompts"]]
    rest = {k: v for k, v in folders.items() if k not in ("outcomes", "grafts")}
    with pytest.raises(
        ConfigError, match=r"search\.continuations: these are for texts as the judge"
    ):
        settings_from(LocaliseConfig, {**rest, "prompts": answered, "search": search})
