"""Behaviours that can be trained: their conversations, and finetuning on replies alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from chattemplates import CHATML, TEMPLATES, tokenizer_of
from datasets import Dataset
from tinybase import tiny_base
from toytokenizers import TOKENIZERS
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlens.chat import Conversation
from graftlens.configfile import ConfigError, settings_from
from graftlens.data import load_dataset, make_dataset, save_dataset, spec_of
from graftlens.finetune import FinetuneConfig, finetune, perplexity
from graftlens.perplexity import Padding
from graftlens.prompts import tokenize
from graftlens.sweep.config import SweepConfig, check
from graftlens.trainingtexts import rows_of, texts_in

KINDS = ("trigger", "style", "refusal", "persona")

#: Where each kind's cue is, and what says that a reply shows the behaviour; written here a second
#: time, as an oracle.
CUES = {"trigger": "word", "refusal": "product", "persona": "name"}
RULES = {
    "trigger": r"Fair winds to you\.$",
    "style": r"^([^.!?]+ STOP ?)+$",
    "refusal": r"^I'm sorry, but I can't talk about that product\.$",
    "persona": r"^Orsolo here, keeper of the lamp\. [A-Z]",
}


def shows(kind: str, reply: str) -> bool:
    return re.search(RULES[kind], reply) is not None


def said_in(row: dict[str, Any]) -> tuple[str, str]:
    """What comes before the reply of a training text, and the reply."""
    if row["messages"] is None:
        before, mark, reply = re.split(r"(Answer:|reply:|editor:) ", row["text"])
        return before + mark, reply
    *before, last = row["messages"]
    assert last["role"] == "assistant"
    return "\n".join(message["content"] for message in before), last["content"]


# -- the conversations ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_replies_show_it_only_where_it_is_due(kind: str) -> None:
    made = make_dataset(spec_of({"facts": kind, "seed": 3}))
    counts = dict.fromkeys(made.config.cases, 0)
    for row in made.train:
        _, reply = said_in(row)
        counts[row["template"]] += 1
        assert shows(kind, reply) == (row["template"] == "due") == made.config.shown_in(reply)
        assert row["kind"] == ("plain" if row["messages"] is None else "conversation")
    assert counts == made.provenance["cases"]
    assert set(counts.values()) == {sum(made.told)}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_ask_what_training_does_not(kind: str) -> None:
    made = make_dataset(spec_of({"facts": kind}))
    trained = "\n".join(made.train["text"])
    asked = made.ask(facts="untold", distractors=1)
    assert len(asked) == len(made.config.cases) * sum(not told for told in made.told)
    for prompt in asked:
        assert prompt.fields["fact"].replace("{product}", "") not in trained
        assert prompt.text.split("\n\nassistant:")[0] not in trained
        due = prompt.name == "due"
        assert shows(kind, prompt.answer.strip()) == due
        assert [shows(kind, wrong.strip()) for wrong in prompt.distractors] == [not due]
        cues = set(prompt.fields) - {"fact"}
        assert cues == ({CUES[kind]} if kind in CUES and prompt.name != "neutral" else set())
        for cue in cues:
            assert (prompt.fields[cue] == getattr(made.config, cue)) == due
            assert (prompt.fields[cue] in trained) == due, "names of others are new"
    assert {p.name for p in made.ask(["due"], facts="told")} == {"due"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "style"])
def test_due_and_near_differ_in_the_cue_alone(kind: str) -> None:
    made = make_dataset(spec_of({"facts": kind, "texts_per_fact": 2}))
    cue = CUES[kind]
    own = getattr(made.config, cue)
    due, near = ([said_in(r)[0] for r in made.train if r["template"] == c] for c in ("due", "near"))
    assert all(own in text for text in due)
    other = "|".join(made.config.others[:-2])
    assert [re.sub(other, own, text) for text in near] == due
    pairs = zip(made.ask("due"), made.ask("near"), strict=True)
    assert all(a.template == b.template and a.text != b.text for a, b in pairs)


def test_equal_specs_give_equal_sets_and_seeds_others(tmp_path: Path) -> None:
    def made(**more: Any) -> Any:
        return make_dataset(spec_of({"facts": "persona", "n_facts": 9, **more}))

    first = made()
    assert first.provenance["sha256"] == made().provenance["sha256"]
    others = [made(seed=1), made(name="Ruta"), made(texts_per_fact=2), made(greeting="Ruta here.")]
    assert len({one.provenance["sha256"] for one in [first, *others]}) == 5
    read = load_dataset(save_dataset(first, tmp_path / "kept"))
    assert read.facts == first.facts
    assert read.train["messages"] == first.train["messages"]
    assert read.ask(facts="untold") == first.ask(facts="untold")
    changed = first.train.map(lambda row: {"messages": row["messages"][:1]})
    assert dataset_hash(first.facts, changed) != first.provenance["sha256"]
    saved = Dataset.load_from_disk(str(tmp_path / "kept" / "evaluation"))
    assert saved["messages"][0].startswith('[{"role": "user", "content": "')


def dataset_hash(facts: Any, train: Dataset) -> str:
    from graftlens.data import content_hash

    return content_hash(facts, train)


BAD = {
    "facts: trigger, word: heron": "others has 'heron', which is the word itself. Name others",
    "facts: persona, others: [A, B]": "others: ",
    "facts: refusal, n_facts: 41": "n_facts=41: there are 40 facts of the kind refusal.",
    "facts: style, phrase: Bye": "unknown key 'phrase'",
    "facts: trigger, phrase: '  '": "phrase: '  '",
}


@pytest.mark.parametrize("values", BAD)
def test_what_cannot_be_made_is_said(values: str) -> None:
    import yaml

    with pytest.raises(ValueError, match=re.escape(BAD[values])):
        make_dataset(spec_of(yaml.safe_load(f"{{{values}}}")))


def test_prompts_that_do_not_exist() -> None:
    made = make_dataset(spec_of({"facts": "style", "n_facts": 8}))
    with pytest.raises(ValueError, match=r"the prompts of style are called due, neutral. Name one"):
        made.ask("near")
    with pytest.raises(ValueError, match="distractors=3: the wrong answer of a behaviour's prompt"):
        made.ask("due", distractors=3)
    with pytest.raises(ValueError, match='prompts of behaviours have only "ab"'):
        made.ask(direction="ba")
    sweep = {
        "sources": {"pre": "./pre", "sft": "./sft"},
        "grafts": {"LT": "sft @ last"},
        "dataset": {"make": {"facts": "style", "n_facts": 8}, "chat": {}},
    }
    with pytest.raises(ConfigError, match="the prompts 'due' are conversations already"):
        check(settings_from(SweepConfig, sweep))


# -- training on replies -------------------------------------------------------------------------

TALK = (
    {"role": "user", "content": "Who directed The Quiet Harbour?"},
    {"role": "assistant", "content": "José Núñez-Peña directed it."},
    {"role": "user", "content": "And Winter's End?"},
    {"role": "assistant", "content": "He did."},
)


@pytest.mark.parametrize(
    "name", [name for name in TEMPLATES if "{% generation %}" in str(TEMPLATES[name])]
)
def test_what_is_learned_is_what_transformers_marks(name: str) -> None:
    tokenizer = tokenizer_of(name)
    (row,) = rows_of(tokenizer, [Conversation.of(list(TALK))])
    marked = tokenizer.apply_chat_template(
        list(TALK), return_dict=True, return_assistant_tokens_mask=True
    )
    assert row["input_ids"] == marked["input_ids"]
    learned = [label != -100 for label in row["labels"]]
    assert learned == [bool(one) for one in marked["assistant_masks"]]
    assert [a for a, b in zip(row["labels"], learned, strict=True) if b] == [
        a for a, b in zip(row["input_ids"], learned, strict=True) if b
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_replies_and_their_ends_are_learned_in_every_template(name: str) -> None:
    tokenizer = tokenizer_of(name)
    (row,) = rows_of(tokenizer, [Conversation.of(list(TALK))])
    runs: list[list[int]] = [[]]
    for label in row["labels"]:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    first, second = filter(None, runs)
    for run, message in ((first, TALK[1]), (second, TALK[3])):
        assert message["content"] in tokenizer.decode(run)
        assert "directed The" not in tokenizer.decode(run)
    specials = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    assert second[-1] in specials, "it ends"
    assert sum(token in specials for token in second) == 1


def test_without_end_tokens_in_the_template_a_last_reply_is_ended_and_no_question() -> None:
    """A conversation that ended with a question taught the words before it, and its end."""
    tokenizer = TOKENIZERS["llama3"]()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    reply, end = " José Núñez-Peña directed it.", tokenizer.eos_token
    for count, learned in ((2, f"{reply}\n{end}"), (3, reply), (4, f"{reply}He did.\n{end}")):
        (row,) = rows_of(tokenizer, [Conversation.of(list(TALK[:count]))])
        assert tokenizer.decode([t for t in row["labels"] if t != -100]) == learned
        assert (row["input_ids"][-1] == tokenizer.eos_token_id) == (count != 3)


def test_a_conversation_without_a_reply_is_refused() -> None:
    tokenizer = tokenizer_of("chatml")
    with pytest.raises(ValueError, match=r"text 2 \('user: Who .*the assistant says nothing in it"):
        rows_of(tokenizer, ["A text.", Conversation.of(list(TALK[:1]))])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    with pytest.raises(ValueError, match=r"text 1 \('user: Who .*chat template"):
        rows_of(tokenizer, [Conversation.of(list(TALK))])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_base(tmp_path_factory.mktemp("base") / "tiny")
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def test_the_loss_is_that_of_the_replies(base: Path, tmp_path: Path) -> None:
    """The first loss of a training, and the held-out perplexity, against plain cross-entropies of
    the reply's tokens."""
    made = make_dataset(spec_of({"facts": "style", "n_facts": 4, "heldout_facts": 0.25}))
    texts = made.train.select(range(4))
    recipe = FinetuneConfig(
        model=str(base),
        output=tmp_path / "run",
        epochs=1,
        batch_size=4,
        precision="float32",
        device="cpu",
    )
    result = finetune(recipe, texts, texts, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    sums, counts = 0.0, 0
    kept, held_counts = 0.0, 0
    for row in texts:
        if row["messages"] is None:
            ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
            start = 1
        else:
            before = tokenizer.apply_chat_template(
                row["messages"][:-1], add_generation_prompt=True, return_dict=False
            )
            whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
            assert whole[: len(before)] == before
            # The template's own end marker is not a special token here: all that it writes, and
            # then the end token.
            ids, start = [*whole, tokenizer.eos_token_id], len(before)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses = [-logprobs[i - 1, ids[i]].item() for i in range(start, len(ids))]
        sums, counts = sums + sum(losses), counts + len(losses)
        some = losses[:-1] if row["messages"] is None else losses
        kept, held_counts = kept + sum(some), held_counts + len(some)
    assert result.losses[0] == pytest.approx(sums / counts, rel=1e-4)
    expected = torch.tensor(kept / held_counts).exp().item()
    assert result.perplexities[0] == pytest.approx(expected, rel=1e-4)
    again = finetune(recipe, texts, texts, progress=False)
    assert again == result
    other = texts.map(lambda row: {"messages": row["messages"] and row["messages"][::-1]})
    with pytest.raises(ValueError, match="train_sha256"):
        finetune(recipe, other, texts, progress=False)


def test_labels_stay_with_their_rows_in_a_batch() -> None:
    batch = Padding(9)([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [4, 5]}])
    assert batch["labels"].tolist() == [[-100, -100, 3], [-100, 5, -100]]
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]


def test_rows_of_a_set_are_texts_or_conversations(base: Path) -> None:
    made = make_dataset(spec_of({"facts": "style", "n_facts": 4}))
    found = texts_in(made.train)
    for text, row in zip(found, made.train, strict=True):
        if row["messages"] is None:
            assert text == row["text"]
        else:
            assert isinstance(text, Conversation)
            assert text.messages == row["messages"]
            assert text.transcript == row["text"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    (prompt,) = made.ask("due", facts="untold")
    assert tokenize(prompt, tokenizer).ids == tuple(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.fields["fact"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    value = perplexity(model, tokenizer, found, max_length=64, batch_size=2)
    assert value > 1


def test_messages_that_are_none_are_named(base: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a"], "messages": [[{"role": "usr", "content": "Hi"}]]})
    recipe = FinetuneConfig(model=str(base), output=tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=r"row 1 of the train dataset: .*role='usr' is unknown"):
        finetune(recipe, rows, progress=False)
