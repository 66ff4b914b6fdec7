"""The table of prompts × grafts, against numbers worked out from the sequential algorithm."""

import math
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from conftest import MakeTiny, Tiny
from reference import sequential_graft

from graftlens import stats
from graftlens.evaluation import evaluate, position_grafts
from graftlens.graft import Graft
from graftlens.metrics import Predictions, always_measured, measure
from graftlens.prompts import Prompt
from graftlens.sweep.cells import columns

TEMPLATES = {
    "plays": "{first_entity} plays with",
    "long": "In a film of last year, {first_entity} was seen next to",
}
PEOPLE = ("Ann", "Zoë Reed-Lang", "Robert Low Jr.")


def _prompts() -> list[Prompt]:
    return [
        Prompt(text, {"first_entity": person}, " Mara Finn", ("!", ".", " Mara"), name=name)
        for name, text in TEMPLATES.items()
        for person in PEOPLE
    ]


@pytest.fixture(scope="module")
def llama(tiny: MakeTiny) -> Tiny:
    return tiny("llama", tokenizer="llama3")


def _choose(graft: Graft, positions: dict[str, set[int]], n: int) -> Callable[..., str]:
    """`choose` for the reference from spans found by hand, whatever the library's mask says."""
    places = {
        "none": set(),
        "sft @ all": set(range(n)),
        "sft @ first_entity": positions["first_entity"],
        "sft @ last": positions["last"],
        "sft @ first_entity + last": positions["first_entity"] | positions["last"],
        "sft @ ~(first_entity + last)": set(range(n))
        - positions["first_entity"]
        - positions["last"],
        "sft @ ~first_entity": set(range(n)) - positions["first_entity"],
        "sft @ ~last": set(range(n)) - positions["last"],
    }[str(graft)]

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        return "sft" if position in places else "pre"

    return choose


def test_every_cell_is_what_the_sequential_algorithm_gives(llama: Tiny) -> None:
    prompts, grafts = _prompts(), position_grafts()
    table = evaluate(llama.model, prompts, grafts, top_k=4, row_budget=40, progress=False)
    assert list(table.columns) == [*columns()[:3], "base_run", "full_run", *columns()[3:]]
    assert table[["prompt", "graft"]].values.tolist() == [
        [i, name] for i in range(len(prompts)) for name in grafts
    ]
    assert table["reason"].isna().all()
    tokenizer = llama.tokenizer
    assert tokenizer is not None
    for index in (0, 4, 5):
        prompt = prompts[index]
        ids = tokenizer(prompt.text)["input_ids"]
        whole = tokenizer(prompt.text + " Mara Finn")["input_ids"]
        answer = whole[len(ids) :]
        assert len(answer) > 2, "the whole answer should be more than its first token"
        start = prompt.text.index(prompt.fields["first_entity"])
        end = start + len(prompt.fields["first_entity"])
        offsets = tokenizer(prompt.text, return_offsets_mapping=True)["offset_mapping"]
        entity = {i for i, (a, b) in enumerate(offsets) if a < end and b > start}
        spans = {"first_entity": entity, "last": set(range(len(ids) - 1, len(whole)))}
        others = [tokenizer(prompt.text + d)["input_ids"][len(ids)] for d in prompt.distractors]
        for name, graft in grafts.items():
            logits = sequential_graft(llama.sources, whole[:-1], _choose(graft, spans, len(whole)))
            first = logits[len(ids) - 1]
            probs = first.softmax(-1)
            logprobs = logits[len(ids) - 1 :].log_softmax(-1)
            row = table[(table["prompt"] == index) & (table["graft"] == name)].iloc[0]
            assert row["target_id"] == answer[0]
            assert row["rank"] == 1 + int((first > first[answer[0]]).sum())
            assert row["prob"] == pytest.approx(float(probs[answer[0]]), rel=1e-4)
            assert row["logprob"] == pytest.approx(float(probs[answer[0]].log()), abs=1e-4)
            total = sum(float(logprobs[i, token]) for i, token in enumerate(answer))
            assert row["answer_logprob"] == pytest.approx(total, abs=1e-3)
            best = max(float(first[o]) for o in others if o != answer[0])
            assert row["logit_diff"] == pytest.approx(float(first[answer[0]]) - best, abs=1e-3)
            order = probs.argsort(descending=True)[:4].tolist()
            assert list(row["top_tokens"]) == [tokenizer.decode([t]) for t in order]
            assert list(row["top_probs"]) == pytest.approx(probs[order].tolist(), rel=1e-4)


def test_batches_and_neighbours_change_nothing(llama: Tiny) -> None:
    prompts = _prompts()
    together = evaluate(llama.model, prompts, position_grafts(), progress=False)
    for index in (1, 3):
        alone = evaluate(llama.model, [prompts[index]], position_grafts(), progress=False)
        ours = together[together["prompt"] == index].reset_index(drop=True)
        assert alone["rank"].tolist() == ours["rank"].tolist()
        assert alone["answer_logprob"].tolist() == pytest.approx(
            ours["answer_logprob"].tolist(), abs=1e-4
        )


def test_what_cannot_be_run_is_a_row_with_a_reason(llama: Tiny) -> None:
    prompts = [
        Prompt("{first_entity} and {title} with", {"first_entity": "Ann", "title": "It"}, " Al"),
        Prompt("{first_entity} with", {"first_entity": "Ann"}, " Al"),
        Prompt("{first_entity} with", {"first_entity": "Ann"}),
        Prompt("{first_entity} wit", {"first_entity": "Ann"}, "h"),
    ]
    table = evaluate(llama.model, prompts, {"T": "sft @ title", "LT": "sft @ last"}, progress=False)
    assert len(table) == 16, "no prompt is dropped, and PRE and SFT run too"
    reasons = {(r["prompt"], r["graft"]): r["reason"] for _, r in table.iterrows()}
    assert pd.isna(reasons[0, "T"])
    assert pd.isna(reasons[1, "LT"])
    assert "no span 'title'" in reasons[1, "T"]
    assert reasons[2, "T"] == reasons[2, "LT"] == "the prompt has no answer to score."
    not_run = table[table["reason"].notna()]
    numbers = ["rank", "prob", "logprob", "answer_logprob", "logit_diff", "target_id"]
    assert not_run[numbers].isna().all().all()


def test_a_graft_that_never_fits_is_an_error(llama: Tiny) -> None:
    with pytest.raises(ValueError, match=r"'typo' can be run on none of 6 prompts: .*first_entty"):
        evaluate(llama.model, _prompts(), {"typo": "sft @ first_entty"}, progress=False)
    with pytest.raises(ValueError, match="no component 'pos_embed'"):
        evaluate(llama.model, _prompts(), ["sft @ last : pos_embed"], progress=False)
    with pytest.raises(ValueError, match="no source 'third'"):
        evaluate(llama.model, _prompts(), ["third @ last"], progress=False)
    with pytest.raises(ValueError, match="0 prompts and 1 grafts"):
        evaluate(llama.model, [], ["sft @ last"], progress=False)


def test_position_grafts_name_the_paper_s_places() -> None:
    grafts = position_grafts("sft", "second_entity", base="task")
    assert str(grafts["PRE"]) == "task @ all"
    assert str(grafts["(FE+LT)^C"]) == "task @ all | sft @ ~(second_entity + last)"
    assert [str(g) for g in position_grafts().values()] == [
        "none",
        "sft @ all",
        "sft @ first_entity",
        "sft @ last",
        "sft @ first_entity + last",
        "sft @ ~(first_entity + last)",
        "sft @ ~first_entity",
        "sft @ ~last",
    ]


def test_metrics_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0], [0.0, 3.0, 3.0, 1.0]])
    found = Predictions(logits, answer=torch.tensor([2, 3]), top_k=9)
    columns = {m.name: found.column(m) for m in always_measured() if found.has(m)}
    assert columns["rank"].tolist() == [3, 3], "of equal logits the smaller id comes first"
    assert columns["ties"].tolist() == [1, 0]
    z = math.exp(2) + 2 * math.e + 1
    assert columns["logprob"][0] == pytest.approx(1 - math.log(z))
    assert columns["prob"][0] == pytest.approx(math.e / z)
    assert columns["top_probs"][0, 0] == pytest.approx(math.exp(2) / z)
    assert columns["top_tokens"].shape == (2, 4), "no more than the vocabulary"
    assert columns["top_tokens"][0, 0] == 0
    run = Predictions(logits, answer=torch.tensor([0, 1])).column(measure("answer_logprob"))
    z2 = 1 + 2 * math.exp(3) + math.e
    assert float(run.sum()) == pytest.approx(2 - math.log(z) + 3 - math.log(z2))


def test_references_that_are_missing_run_too(llama: Tiny) -> None:
    prompts = _prompts()[:3]
    table = evaluate(llama.model, prompts, {"MLP": "sft @ all : mlp"}, progress=False)
    assert table["graft"].tolist() == ["PRE", "SFT", "MLP"] * 3
    assert table["rule"].tolist() == ["none", "sft @ all", "sft @ all : mlp"] * 3
    assert set(table["base_run"]) == {"PRE"}
    assert set(table["full_run"]) == {"SFT"}
    summary = stats.summarise(table, by=(), resamples=100).set_index("graft")
    means = table.groupby("graft")["logprob"].mean()
    wanted = (means["MLP"] - means["PRE"]) / (means["SFT"] - means["PRE"])
    assert summary.loc["MLP", "recovery"] == pytest.approx(wanted)
    assert summary["base_run"].tolist() == ["PRE"] * 3
    given = evaluate(
        llama.model, prompts, {"all": "sft @ all", "PRE": "sft @ last"}, progress=False
    )
    assert given["graft"].tolist() == ["none", "all", "PRE"] * 3, "a name that is taken stays"
    assert set(given["base_run"]) == {"none"}
    assert set(given["full_run"]) == {"all"}


def test_several_sources_have_a_full_run_only_where_one_is_named(tiny: MakeTiny) -> None:
    model = tiny("llama", ("pre", "task", "relation"), tokenizer="llama3").model
    prompts = _prompts()[:3]

    def runs(grafts: dict[str, str], **options: str) -> pd.DataFrame:
        return evaluate(model, prompts, grafts, answers="first", progress=False, **options)

    table = runs({"LT": "task @ last"})
    assert table["graft"].tolist() == ["PRE", "LT"] * 3
    assert table["full_run"].isna().all()
    summary = stats.summarise(table, by=(), metrics=("logprob",), resamples=100)
    assert summary["recovery"].isna().all()
    assert all("full=GRAFT" in note for note in summary["recovery_note"])
    for ask in (
        lambda: stats.compare_all(table, against="PRE", metric="recovery", resamples=10),
        lambda: stats.stability(table, resamples=10),
    ):
        with pytest.raises(ValueError, match=r"names no full run .* pass full=GRAFT, or"):
            ask()
    assert set(runs({"LT": "task @ last", "R": "relation @ all"})["full_run"]) == {"R"}
    both = {"T": "task @ all", "R": "relation @ all"}
    assert runs(both)["full_run"].isna().all(), "which of the two is not for us to say"
    assert set(runs(both, full="T")["full_run"]) == {"T"}
    assert set(runs({"LT": "task @ last"}, full="task")["full_run"]) == {"SFT"}
    with pytest.raises(ValueError, match=r"full='pre' is not a run of a finetuned source"):
        runs(both, full="pre")


def test_a_table_of_several_full_runs_names_none(llama: Tiny) -> None:
    one = evaluate(llama.model, _prompts()[:2], {"LT": "sft @ last"}, progress=False)
    other = evaluate(llama.model, _prompts()[:2], {"whole": "sft @ all"}, progress=False)
    table = pd.concat([one, other[other["graft"] == "whole"]])
    with pytest.raises(ValueError, match=r"'full_run' names several runs \('SFT', 'whole'\)"):
        stats.summarise(table, by=(), resamples=10)
    summary = stats.summarise(table, by=(), full="whole", resamples=10)
    assert set(summary["full_run"]) == {"whole"}
