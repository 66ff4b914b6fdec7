"""Measures of texts against plain Python, rates against means over prompts, a bad judge."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from jsonserver import JsonHandler
from needs import needs
from toytokenizers import TOKENIZERS
from transformers import BertConfig, BertForSequenceClassification
from waiting import HANG

from graftlens import METRICS, compare_all, outcomes, summarise
from graftlens.metrics import Measure
from graftlens.outcomes.measures import gives_labels, values_of
from graftlens.stats.intervals import wilson


def values(measure: Measure, *texts: str, prompts: Any = None, right: Any = None) -> list[Any]:
    prompts = prompts or [None] * len(texts)
    return values_of(measure, texts, {"prompt": prompts, "right": right or [[]] * len(texts)})


# --- Measures ------------------------------------------------------------------------------------


def test_contains_and_regex() -> None:
    refuses = outcomes.contains(["I can't", "I cannot"])
    assert values(refuses, "Sorry, I CAN'T.", "I can", "i cannot say", "") == [1, 0, 1, 0]
    assert values(outcomes.contains("No", case=True), "no", "No", "Nobody") == [0, 1, 1]
    assert values(outcomes.regex(r"^so\b.*end$"), "So it\nwill END", "Also end", "so end.") == [
        1,
        0,
        0,
    ]
    assert values(outcomes.regex("A", case=True), "a", "bAb") == [0, 1]
    assert refuses.bounds == (0.0, 1.0)
    assert refuses.over == "text"


def test_exact_compares_what_is_left_of_an_answer() -> None:
    of_prompt = outcomes.exact()
    right = [["Dorothy Ramirez", "D. Ramirez"]] * 5
    texts = (" dorothy  RAMIREZ.", "“D Ramirez”", "Dorothy Ramirez, of course", "Dorothy", "")
    assert values(of_prompt, *texts, right=right) == [1, 1, 0, 0, 0]
    begins = outcomes.exact(prefix=True)
    assert values(begins, *texts, right=right) == [1, 1, 1, 0, 0]
    assert values(begins, "Dorothy Ramirezov", right=right[:1]) == [0]
    assert values(outcomes.exact("ﬁlm"), "Film!", "films") == [1, 0]
    assert outcomes.normalised(" ﬁlm —  No. 1\n") == "film no 1"
    with pytest.raises(ValueError, match="text 0 is of a prompt without an answer"):
        values(of_prompt, "a")


def test_choice_is_what_is_named_first() -> None:
    where = outcomes.choice({"town": ["Paris", "Rome"], "land": "Francesco's"})
    assert values(where, "In rome, then Paris", "Francesco's Rome", "Parisian", "") == [
        *("town", "land", "none", "none")
    ]
    long = outcomes.choice(["New York", "New"])
    assert values(long, "to new york", "a new one", "news") == ["New York", "New", "none"]
    for bad in (["one"], {"a": "x", "b": "X"}, ["none", "some"]):
        with pytest.raises(ValueError, match="Give two or more different texts"):
            outcomes.choice(bad)


def test_a_classifier_gives_its_probabilities_or_its_label(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = TOKENIZERS["gpt2"]()
    tokenizer.pad_token = tokenizer.eos_token
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3, id2label={0: "calm", 1: "glad", 2: "sad"},
        label2id={"calm": 0, "glad": 1, "sad": 2}, pad_token_id=tokenizer.pad_token_id,
        initializer_range=1.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    texts = ["The Quiet Harbour", "Who acted in Winter's End?", "So it was", "José directed"]
    wanted = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            wanted.append(model(ids).logits[0].double().softmax(-1))
    glad = values(outcomes.classifier(str(tmp_path), "glad", batch_size=3), *texts)
    assert glad == pytest.approx([float(p[1]) for p in wanted], abs=1e-5)
    label = values(outcomes.classifier(str(tmp_path)), *texts)
    assert label == [["calm", "glad", "sad"][int(p.argmax())] for p in wanted]
    with pytest.raises(ValueError, match=r"no label 'mad'. Its labels: calm glad sad. Did you"):
        values(outcomes.classifier(str(tmp_path), "mad"), "a")


def texts_table(rows: dict[str, list[list[str]]], prompts: list[str] | None = None) -> pd.DataFrame:
    """graft -> for each prompt, its texts."""
    made = [
        {
            "prompt": number, "graft": graft, "rule": "sft @ last", "sample": sample,
            "prompt_text": f"Question {number}", "text": text, "reason": None,
            "base_run": "PRE", "full_run": "SFT", "template": f"t{number % 2}",
        }
        for graft, of in rows.items()
        for number, texts in enumerate(of)
        for sample, text in enumerate(texts)
    ]  # fmt: skip
    return pd.DataFrame(made)


def test_any_function_is_a_measure() -> None:
    table = texts_table({"PRE": [["ab", "c"]], "SFT": [["abc", ""]]})
    found = outcomes.measured(
        table,
        {
            "length": len,
            "long": lambda text: len(text) > 1,
            "kind": lambda text: "full" if text else "empty",
            "joined": lambda text, prompt: len(prompt) + len(text),
            "maybe": lambda text: None if not text else 1,
            "default": lambda text, prompt="x": len(prompt),
        },
    )
    assert [*found["length"]] == [2, 1, 3, 0]
    assert [*found["long"]] == [1, 0, 1, 0]
    assert [*found["kind"]] == ["full", "full", "full", "empty"]
    assert [*found["joined"]] == [12, 11, 13, 10]
    assert np.isnan(found["maybe"].iloc[3])
    assert [*found["default"]] == [1] * 4
    assert [*table.columns] == [*texts_table({"PRE": [["a"]]}).columns]  # what was given stays


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ({}, "give one or more by name"),
        ({"text": len}, "measure 'text': the table has another column"),
        ({"m": METRICS["logprob"]}, "'m' measures a next token's distribution, not a text"),
        ({"m": 3}, "'m': 3 is not a measure"),
        ({"m": lambda text: [1]}, "measure 'm' gave \\[1\\] for a text"),
        ({"2m": len}, "a measure's name is a column"),
    ],
)
def test_what_is_no_measure_of_texts_is_refused(measures: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        outcomes.measured(texts_table({"PRE": [["a"]]}), measures)


def test_texts_that_did_not_run_have_no_value() -> None:
    table = texts_table({"PRE": [["a", "b"]], "SFT": [["a", "b"]]})
    table.loc[1, ["text", "reason"]] = [None, "too long"]
    found = outcomes.measured(table, {"n": len, "kind": str.upper})
    assert np.isnan(found["n"].iloc[1])
    assert found["kind"].tolist()[:3] == ["A", None, "A"]
    with pytest.raises(ValueError, match="lacks column 'sample'"):
        outcomes.measured(table.drop(columns="sample"), {"n": len})


# --- Rates ---------------------------------------------------------------------------------------


def random_table(seed: int, n_prompts: int = 12, n: int = 5) -> pd.DataFrame:
    """Texts "yes" and "no" whose rates differ by prompt and graft."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.0, 0.5, n_prompts)
    rows = {
        graft: [
            ["yes" if rng.random() < min(1.0, rate + lift) else "no" for _ in range(n)]
            for rate in base
        ]
        for graft, lift in (("PRE", 0.0), ("SFT", 0.5), ("LT", 0.25))
    }
    return texts_table(rows)


def collapsed(table: pd.DataFrame) -> pd.DataFrame:
    """A row per prompt and graft: the share of its texts."""
    yes = table.assign(share=(table["text"] == "yes").astype(float))
    keys = ["prompt", "graft", "rule", "base_run", "full_run", "template"]
    return yes.groupby(keys, sort=False, as_index=False)["share"].mean().assign(reason=None)


def test_rates_have_intervals_over_prompts() -> None:
    """Equally many texts of each prompt: what is resampled are the prompts' own shares."""
    table = random_table(0)
    rates = outcomes.rate(table, {"yes": outcomes.contains("yes")}, seed=3)
    of_prompts = summarise(
        collapsed(table), by=(), ks=(), metrics=("share",), recovery="share", seed=3
    ).set_index("graft")
    for _, row in rates.iterrows():
        texts = table[table["graft"] == row["graft"]]["text"]
        wanted = of_prompts.loc[row["graft"]]
        assert row["rate"] == pytest.approx((texts == "yes").mean())
        assert (row["n"], row["prompts"], row["unread"]) == (60, 12, 0)
        for kind in ("low", "high"):
            assert row[kind] == pytest.approx(wanted[f"share_{kind}"])
            assert row[f"recovery_{kind}"] == pytest.approx(wanted[f"recovery_{kind}"], nan_ok=True)
        assert row["recovery"] == pytest.approx(wanted["recovery"])


def test_texts_without_a_value_are_counted_in_their_group() -> None:
    """Each row had those of all groups together; with members, a prompt that lacked a value under
    one of them was counted."""
    table = random_table(1)
    first = table.assign(member="a", m=1.0)
    lost = (first["prompt"] == 3) & (first["graft"] == "SFT")
    first.loc[lost, "m"] = np.nan
    table = pd.concat([first, first.assign(member="b", m=1.0)], ignore_index=True)
    rates = outcomes.rate(table, ["m"], by=("member", "template"), resamples=20)
    rows = rates.set_index(["member", "template", "graft"])
    for key, row in rows.iterrows():
        whole = key[:2] != ("a", "t1")
        assert row["unread"] == (0 if whole or key[2] != "SFT" else lost.sum())
        assert row["prompts"] == (6 if whole else 5)
        assert row["n"] == 5 * row["prompts"]


def test_texts_that_agree_are_no_more_evidence_than_one() -> None:
    said = [["yes"] * 5 if prompt % 2 else ["no"] * 5 for prompt in range(14)]
    table = texts_table({"PRE": said, "SFT": said})
    measures = {"yes": outcomes.contains("yes")}
    several = outcomes.rate(table, measures).iloc[0]
    one = outcomes.rate(table[table["sample"] == 0], measures).iloc[0]
    assert several[["rate", "low", "high"]].tolist() == one[["rate", "low", "high"]].tolist()
    alone = table.assign(prompt=table["prompt"] * 5 + table["sample"])
    naive = outcomes.rate(alone, measures).iloc[0]
    assert naive["high"] - naive["low"] < 0.6 * (several["high"] - several["low"])


def test_a_rate_of_none_has_wilsons_interval_for_as_many_prompts() -> None:
    table = texts_table({"PRE": [["no"] * 5] * 8, "SFT": [["yes"] * 5] * 8})
    rates = outcomes.rate(table, {"yes": outcomes.contains("yes")}).set_index("graft")
    assert rates.loc["PRE", ["rate", "low", "high"]].tolist() == [0.0, *wilson(0, 8)]
    assert rates.loc["SFT", ["rate", "low", "high"]].tolist() == [1.0, *wilson(8, 8)]


def test_labels_have_a_rate_each() -> None:
    table = random_table(1)
    table["text"] = [text if number % 3 else "perhaps" for number, text in enumerate(table["text"])]
    rates = outcomes.rate(table, {"says": outcomes.choice(["yes", "no", "perhaps"])}, by="template")
    assert set(rates["label"]) == {"yes", "no", "perhaps"}
    for (template, graft), part in rates.groupby(["template", "graft"]):
        assert part["rate"].sum() == pytest.approx(1.0)
        texts = table[(table["template"] == template) & (table["graft"] == graft)]["text"]
        for _, row in part.iterrows():
            assert row["rate"] == pytest.approx((texts == row["label"]).mean())
            assert row["prompts"] == 6
    measured = outcomes.measured(table, {"says": outcomes.choice(["yes", "no", "perhaps"])})
    again = outcomes.rate(measured, ["says"], by="template")
    pd.testing.assert_frame_equal(again, rates)
    with pytest.raises(ValueError, match=r"no column 'say' in the table.*Did you mean 'says'"):
        outcomes.rate(measured, ["say"])


def test_differences_are_paired_by_prompt_and_sample() -> None:
    table = random_table(2)
    found = outcomes.differences(table, {"yes": outcomes.contains("yes")}, against="PRE", seed=1)
    wanted = compare_all(collapsed(table), against="PRE", metric="share", seed=1).set_index("a")
    for _, row in found.iterrows():
        mine = (table[table["graft"] == row["a"]]["text"] == "yes").mean()
        base = (table[table["graft"] == "PRE"]["text"] == "yes").mean()
        assert row["difference"] == pytest.approx(mine - base)
        for column in ("difference", "low", "high", "p_value"):
            assert row[column] == pytest.approx(wanted.loc[row["a"], column])
        assert (row["measure"], row["unit"]) == ("yes", "prompt")
    # A text that is missing takes the other graft's text of the same prompt and sample along.
    table.loc[0, ["text", "reason"]] = [None, "why"]
    again = outcomes.differences(table, {"yes": outcomes.contains("yes")}, [("SFT", "PRE")])
    assert again["n"].tolist() == [59]


# --- A judge -------------------------------------------------------------------------------------


class Server(JsonHandler):
    """An OpenAI-compatible server that says what it is told to; a number is an error's status."""

    def do_POST(self) -> None:
        request = json.loads(self.asked_for())
        server: Any = self.server
        with server.lock:
            server.asked.append({**request, "key": self.headers["Authorization"]})
            turn = len(server.asked)
        said = server.says(request["messages"][0]["content"], turn)
        if isinstance(said, int):
            self.answer(said, {"error": {"message": f"no: {self.headers['Authorization']}"}})
            return
        message = {"role": "assistant", "content": said}
        self.answer(
            200,
            {
                "id": "1", "object": "chat.completion", "created": 1, "model": request["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            },
        )  # fmt: skip


Says = Callable[[str, int], Any]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server on this machine; set its `says`."""
    needs("openai")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    http: Any = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    http.lock, http.asked = threading.Lock(), []
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield http
    http.shutdown()
    thread.join(HANG)
    http.server_close()


def judge(server: Any, tmp_path: Path, scale: Any = (1, 5), **settings: Any) -> Measure:
    return outcomes.judge(
        "How polite is it?",
        scale,
        endpoint=f"http://127.0.0.1:{server.server_port}/v1",
        endpoint_model="good",
        cache=tmp_path / "cache",
        **settings,
    )


def test_a_judge_is_read_strictly_and_asked_again(server: Any, tmp_path: Path) -> None:
    """Rubbish first, then a value; and texts about which only rubbish is said."""
    tried: dict[str, int] = {}

    def says(question: str, turn: int) -> str:
        text = question.split("<answer>\n")[1].split("\n</answer>")[0]
        tried[text] = tried.get(text, 0) + 1
        if text == "bad":
            return "4 or 5, hard to say"
        return "I think it is a 4." if tried[text] == 1 else ' "3". '

    server.says = says
    told: list[str] = []
    table = texts_table(
        {"PRE": [["good", "fine"], ["bad", "good"]], "SFT": [["a", "b"], ["c", "d"]]}
    )
    measure = judge(server, tmp_path, say=told.append)
    with pytest.warns(
        UserWarning, match=r"polite: 1 of 8 replies could not be read, such as '4 or"
    ):
        found = outcomes.measured(table, {"polite": measure})
    assert found["polite"].tolist()[:2] == [3, 3]
    assert np.isnan(found["polite"].iloc[2])
    assert found["polite_unread"].iloc[2] == "4 or 5, hard to say"
    # The prompt is a part of the question: "good" was asked about twice.
    assert tried == {"good": 3, "fine": 2, "bad": 3, **dict.fromkeys("abcd", 2)}
    assert told == [f"judge: 8 texts to be asked about of good at {measure_of(server)} (at most 24 "
                    "calls); 0 are known from before."]  # fmt: skip
    question = server.asked[0]["messages"][0]["content"]
    assert question.startswith("How polite is it?\n")
    assert "<prompt>\nQuestion " in question
    assert question.endswith("nothing else: 1, 2, 3, 4, 5")
    # Replies that were read are not asked for again; what could not be read is.
    before = len(server.asked)
    with pytest.warns(UserWarning, match="1 of 8 replies"):
        again = outcomes.measured(table, {"polite": measure})
    assert len(server.asked) == before + 3
    assert "1 texts to be asked about" in told[1]
    assert "7 are known from before" in told[1]
    pd.testing.assert_frame_equal(again, found)
    with pytest.warns(UserWarning, match="1 of 8 replies"):
        rates = outcomes.rate(table, {"polite": measure}).set_index("graft")
    assert rates["unread"].to_dict() == {"PRE": 1, "SFT": 0}
    assert rates["n"].tolist() == [3, 3]


def measure_of(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


def test_a_server_with_errors_is_asked_again_and_its_words_are_not_shown(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    server.says = lambda question, turn: 500 if turn == 1 else "yes"
    table = texts_table({"PRE": [["a"]]})
    measure = judge(server, tmp_path, {"yes": 1, "no": 0}, api_key_env="MY_KEY", workers=1)
    assert outcomes.measured(table, {"m": measure})["m"].tolist() == [1]
    assert len(server.asked) == 2
    assert {one["key"] for one in server.asked} == {"Bearer sk-secret-1"}
    server.says = lambda question, turn: 400
    with pytest.raises(
        RuntimeError, match=r"did not answer .BadRequestError, HTTP status 400"
    ) as e:
        outcomes.measured(texts_table({"PRE": [["b"]]}), {"m": measure})
    assert "sk-secret" not in f"{e.value} {e.value.__cause__} {e.value.__context__}"


def test_a_reply_with_the_key_is_neither_shown_nor_kept(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-2")
    server.says = lambda question, turn: "3 sk-secret-2" if turn % 2 else "sk-secret-2"
    measure = judge(server, tmp_path, api_key_env="MY_KEY")
    with pytest.warns(UserWarning, match="1 of 1 replies could not be read") as warned:
        found = outcomes.measured(texts_table({"PRE": [["a"]]}), {"m": measure})
    assert found["m_unread"].tolist() == [""]
    assert not any("secret" in str(w.message) for w in warned)
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("secret" in text for text in kept)


def test_a_slow_server_is_waited_for_and_given_up(server: Any, tmp_path: Path) -> None:
    late = threading.Event()

    def says(question: str, turn: int) -> str:
        if turn == 1:
            late.wait(HANG)  # longer than the judge waits; it asks again
            return "1"
        late.set()
        return "2"

    server.says = says
    measure = judge(server, tmp_path, timeout_s=0.3, workers=1)
    assert outcomes.measured(texts_table({"PRE": [["a"]]}), {"m": measure})["m"].tolist() == [2]


def test_a_judge_of_ones_own_and_labels(tmp_path: Path) -> None:
    seen: list[str] = []

    def write(question: str, seed: int) -> str:
        seen.append(question)
        return "Rude" if "damn" in question else "<think>hm</think>kind"

    measure = outcomes.judge(
        "Is it kind?",
        ("kind", "rude"),
        model="mine",
        write=write,
        cache=tmp_path,
        say=lambda _: None,
    )
    table = texts_table({"PRE": [["damn", "hello"], ["hello", "hello"]]})
    found = outcomes.measured(table, {"m": measure})
    assert found["m"].tolist() == ["rude", "kind", "kind", "kind"]
    assert len(seen) == 3  # equal texts of one prompt are asked about once


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (3, 3), "model": "m"}, "write .least, largest., two or more different labels"),
        ({"scale": ("a", "A"), "model": "m"}, "two or more different labels"),
        ({}, "neither endpoint nor model is given"),
        ({"endpoint": "http://x.org/v1"}, "belong together"),
        ({"endpoint": "http://x.org?key=1", "endpoint_model": "m"}, "may be a key"),
        ({"model": "m", "attempts": 0}, "attempts"),
    ],
)
def test_a_judge_without_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        outcomes.judge("Is it?", **settings)


# --- Facts ---------------------------------------------------------------------------------------


ANSWERS = ["Dorothy Ramirez", "Mara Finn", "Bo Lee"]
SAID = {
    "PRE": ["Kevin Hart and", "the cat", "Mara Finn"],
    "SFT": [" Dorothy Ramirez.", "Mara Finn in", "bo lee"],
    "x": ["Mara Finn, who", "Mara Feld", "Kevin Hart"],
    "y": ["Dorothy Smith", "the cat sat", "of of of of"],
    "z": ["kevin hart", "...", "Ann Oz"],
}
KINDS = {
    "PRE": ["other", "other", "another fact's answer"],
    "SFT": ["right"] * 3,
    "x": ["another fact's answer", "right first name", "other"],
    "y": ["right first name", "the base's guess", "broken"],
    "z": ["the base's guess", "broken", "other"],
}


def about_facts(said: dict[str, list[list[str]]]) -> pd.DataFrame:
    """A table of texts whose prompts ask for `ANSWERS`."""
    table = texts_table(said)
    table["answer"] = [ANSWERS[number] for number in table["prompt"]]
    table["answers"] = [[answer] for answer in table["answer"]]
    return table


def test_what_a_failed_graft_says_instead() -> None:
    table = about_facts({graft: [[text] for text in texts] for graft, texts in SAID.items()})
    found = outcomes.answered(table)
    kinds = found.groupby("graft", sort=False)["kind"].apply(list).to_dict()
    assert kinds == KINDS
    assert found[found["graft"] == "z"]["claim"].tolist() == ["kevin hart", "", "Ann Oz"]
    rates = outcomes.rate(found, ["kind"])
    of = rates[rates["graft"] == "x"].set_index("label")["rate"]
    assert of["right first name"] == pytest.approx(1 / 3)
    shown = outcomes.examples(found, n=1)
    assert shown[shown["graft"] == "SFT"]["text"].tolist() == [" Dorothy Ramirez."]
    assert len(shown) == sum(len(set(k)) for k in kinds.values())
    trained = outcomes.answered(table, trained=ANSWERS[:1])
    assert trained[trained["graft"] == "x"]["kind"].tolist()[0] == "other"
    with pytest.raises(ValueError, match="some prompts have no answer"):
        outcomes.answered(table.drop(columns=["answer", "answers"]))


def test_the_kind_of_an_answer_is_a_measure_among_others() -> None:
    """With the base's guess of the same sample: the two samples of each prompt are swapped."""
    twice = {
        graft: [[text, other] for text, other in zip(texts, ["!", "a b", "?"], strict=True)]
        for graft, texts in SAID.items()
    }
    twice["swapped"] = [[*reversed(texts)] for texts in twice["PRE"]]
    table = about_facts(twice)
    measures = {"says": outcomes.answer_kind(), "right": outcomes.exact(prefix=True)}
    found = outcomes.measured(table, measures)
    first = found[found["sample"] == 0].groupby("graft", sort=False)["says"].apply(list)
    assert first.drop("swapped").to_dict() == KINDS
    assert first["swapped"] == ["broken", "other", "broken"]
    other = found[(found["sample"] == 1) & (found["graft"] == "x")]["says"].tolist()
    assert other == ["broken", "the base's guess", "broken"]
    assert found["right"].tolist() == (found["says"] == "right").astype(float).tolist()
    rates = outcomes.rate(table, measures).set_index(["measure", "label", "graft"])["rate"]
    assert rates["says", "the base's guess", "y"] == pytest.approx(2 / 6)
    assert rates.loc["says"].groupby("graft").sum().tolist() == pytest.approx([1.0] * 6)
    of_x = outcomes.rate(table, {"says": measures["says"]}, base="x").set_index("graft")
    of_x = of_x[of_x["label"] == "the base's guess"]["rate"]
    once = dict.fromkeys(["PRE", "SFT", "y", "z"], 1 / 6)  # the second sample of prompt 1
    assert of_x.to_dict() == pytest.approx(once | {"swapped": 0, "x": 0})


def test_answers_of_the_facts_that_were_trained() -> None:
    table = about_facts({"PRE": [["x"], ["y"], ["z"]], "SFT": [["Bo Lee"], ["Ann Oz"], ["Bo Lee"]]})
    of_two = table[table["prompt"] < 2]

    def kinds(**given: Any) -> list[str]:
        measures = {"says": outcomes.answer_kind(given.pop("own", None))}
        found = outcomes.measured(of_two, measures, **given)
        return found[found["graft"] == "SFT"]["says"].tolist()

    assert kinds() == ["other", "other"], "the third prompt's answer is not in the table"
    assert kinds(trained=ANSWERS) == ["another fact's answer", "other"]
    assert kinds(trained=ANSWERS, own="ann oz") == ["other", "another fact's answer"]
    with pytest.raises(ValueError, match="answer_kind: text 0 is of a prompt without an answer"):
        outcomes.measured(table.assign(answers=None, answer=None), {"m": outcomes.answer_kind()})
    with pytest.raises(ValueError, match=r"answer_kind: \[\]. Give a text, or several"):
        outcomes.answer_kind([])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "broken"),
        (" \n", "broken"),
        ("“Dorothy” Ramirez", "right"),
        ("DOROTHY  RAMIREZ, who", "right"),
        ("D. Ramirez", "right"),
        ("Dorothy Ramirezov", "right first name"),
        ("(Dorothy Oz)", "right first name"),
        ("Dorothy", "right first name"),
        ("Mara Finnegan", "other"),
        ("Mara", "other"),
        ("M\N{REPLACEMENT CHARACTER}a", "broken"),
        ("\N{REPLACEMENT CHARACTER}", "broken"),
        ("Ma \N{REPLACEMENT CHARACTER}", "other"),
        ("Dorothy Ramirez\N{REPLACEMENT CHARACTER}", "right"),
        ("no no no", "broken"),
        ("no no", "other"),
        ("kevin HART!", "the base's guess"),
        ("Kevin Harts", "other"),
    ],
)
def test_kinds_of_odd_texts(text: str, kind: str) -> None:
    table = texts_table({"PRE": [["Kevin Hart, too"]], "x": [[text]]})
    table["answer"] = "Dorothy Ramirez"
    table["answers"] = [["Dorothy Ramirez", "D. Ramirez"]] * 2
    measure = outcomes.answer_kind(["Mara Finn"])
    assert outcomes.measured(table, {"m": measure})["m"].tolist() == ["other", kind]
    assert outcomes.answered(table, trained=["Mara Finn"])["kind"].tolist()[1] == kind


def test_a_guess_that_is_cut_within_a_character_is_the_bases_guess() -> None:
    cut = "Kevin\N{REPLACEMENT CHARACTER}"
    table = texts_table({"PRE": [[cut]], "x": [[cut]]})
    table["answer"] = "Dorothy Ramirez"
    assert outcomes.answered(table)["kind"].tolist() == ["other", "the base's guess"]


def test_examples_are_of_several_prompts_first() -> None:
    table = about_facts({"PRE": [["a", "b"], ["c", "d"], ["", "f"]]}).assign(kind="other")
    assert outcomes.examples(table, n=4)["text"].tolist() == ["a", "c", "", "b"]


def test_a_function_of_labels_is_known_before_there_are_texts() -> None:
    asked: list[str] = []

    def label(text: str, prompt: str) -> str:
        asked.append(text)
        return "none" if not text else text[0]

    assert gives_labels(label)
    assert asked == [""]
    assert gives_labels(outcomes.choice(["a", "b"]))
    assert not any(map(gives_labels, (len, lambda text: text[0], lambda _: None, "len")))


def test_bounds_of_a_judge_are_its_scales() -> None:
    one = outcomes.judge("Is it?", {"yes": 1, "no": 0}, model="m")
    assert (one.bounds, one.unit) == ((0.0, 1.0), "% of texts")
    assert outcomes.judge("How?", model="m").bounds == (1.0, 5.0)
    assert math.isclose(outcomes.judge("How?", (0, 10), model="m").bounds[1] or 0, 10.0)
