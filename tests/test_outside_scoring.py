"""Equal logits: one order of tokens everywhere, by logit and then by id, and ties that are told."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from families import tiny_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from toytokenizers import TOKENIZERS

from graftlens.evaluation import evaluate
from graftlens.graft import Graft
from graftlens.lens import emergence, logit_lens
from graftlens.lens.patching import patching
from graftlens.metrics import Predictions, likeliest
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt
from graftlens.sweep.results import (
    SHARD,
    Manifest,
    prompt_table,
    read_results,
    read_shard,
    shard_path,
    to_bytes,
)
from graftlens.sweep.trust import trust_report

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def by_sorting(row: list[float]) -> list[int]:
    """All ids, best first: by logit, then by id. Python's sort compares tuples."""
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 40).flatmap(
        lambda n: st.lists(
            st.lists(
                st.sampled_from([-np.inf, -2.0, -0.0, 0.0, 1.0, 1.5, 3.0]), min_size=n, max_size=n
            ),
            min_size=1,
            max_size=4,
        )
    ),
    k=st.integers(1, 45),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_ranks_ties_and_the_likeliest_are_of_one_order(
    rows: list[list[float]], k: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Two answers with equal logits both had rank 1, and a top-5 counted up to nine tokens."""
    targets = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    found = Predictions(torch.tensor(rows, dtype=dtype), answer=torch.tensor(targets), top_k=k)
    rank, ties = found.standing
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        order = by_sorting(row)
        assert found.top[i].tolist() == order[:k]
        assert rank[i] == order.index(target) + 1
        assert ties[i] == row.count(row[target]) - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_vocabulary_of_few_values(dtype: torch.dtype) -> None:
    """`torch.topk` takes any of equal logits, and puts them in any order."""
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 50_000, generator=rng) * 4).round().to(dtype)
    ids = likeliest(logits, 50)
    for row, found in zip(logits.tolist(), ids.tolist(), strict=True):
        assert found == by_sorting(row)[:50]
    ranks = [
        Predictions(logits, answer=ids[:, i]).standing[0].tolist()
        for i in range(0, ids.shape[1], 7)
    ]
    assert ranks == [[i + 1] * 7 for i in range(0, 50, 7)], "never more than k within rank k"


def test_float64_logits_are_not_made_equal() -> None:
    """A rank was counted in float32, where logits that float64 keeps apart are equal."""
    logits = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 - 1e-12]], dtype=torch.float64)
    found = Predictions(logits, answer=torch.tensor([0]), top_k=3)
    assert [x.tolist() for x in found.standing] == [[2], [0]]
    assert found.top.tolist() == [[1, 0, 2]]


def test_logits_that_are_no_numbers() -> None:
    """Such rows have no numbers in the tables; they raise nothing here."""
    logits = torch.tensor([[np.nan] * 4, [0.0, np.inf, np.inf, 1.0], [-np.inf, 1.0, np.nan, 1.0]])
    found = Predictions(logits, answer=torch.tensor([1, 2, 1]), top_k=2)
    assert found.logprobs.isnan().all()
    assert found.standing[1].tolist() == [0, 1, 1]
    assert found.top[1].tolist() == [1, 2]


# -- in the tables -----------------------------------------------------------------------------


class Level(NamedTuple):
    """A pair that unembeds every odd token with zeros: all of them have the logit 0 exactly."""

    model: GraftedTransformer
    odd: int

    @classmethod
    def make(cls, dtype: torch.dtype = torch.float32) -> "Level":
        tokenizer = TOKENIZERS["llama3"]()
        pair = tiny_pair("llama", 1, len(tokenizer))
        for model in pair.values():
            with torch.no_grad():
                model.lm_head.weight[1::2] = 0.0
        made = GraftedTransformer.from_pretrained(
            pair, tokenizer=tokenizer, dtype=dtype, check=False, verbose=False
        )
        return cls(made, made.arch.d_vocab // 2)


@pytest.fixture(scope="module")
def level() -> Level:
    return Level.make()


NAMES, ANSWERS = ("Ann", "Robert"), (" Mara", "!", ".")
PROMPTS = [
    Prompt("{first_entity} plays with", {"first_entity": name}, answer)
    for name in NAMES
    for answer in ANSWERS
]
GRAFTS = {"PRE": "none", "SFT": "sft @ all", "LT": "sft @ last"}


def test_every_table_has_the_same_order(level: Level) -> None:
    """`evaluate`, `logit_lens`, `emergence` and `patching`, held against sorted logits."""
    model = level.model
    table = evaluate(model, PROMPTS, GRAFTS, top_k=level.odd, progress=False)
    lens = logit_lens(model, PROMPTS, GRAFTS, at="last", top_k=level.odd)
    scores = patching(model, PROMPTS, {"LT": "sft @ last"}, top_k=level.odd)
    kept = (table, lens[lens["stream"] == "final_post"], scores[scores["how"] == "graft"])
    assert str(table["ties"].dtype) == str(lens["ties"].dtype) == "Int64"
    tied = 0
    for index, prompt in enumerate(PROMPTS):
        for name, graft in GRAFTS.items():
            order = by_sorting(model(prompt, graft=graft)[0, -1].tolist())
            for rows in kept:
                (row,) = rows[(rows["prompt"] == index) & (rows["graft"] == name)].to_dict(
                    "records"
                )
                target = row["target_id"]
                assert row["rank"] == order.index(target) + 1
                assert row["ties"] == (level.odd - 1 if target % 2 else 0)
                top = [model.to_single_str_token(token) for token in order[: level.odd]]
                assert list(row["top_tokens"]) == top
                tied += row["ties"] > 0
    assert 0 < tied < 3 * len(table), "targets of both kinds"
    for k in (1, 30, 150):
        up = emergence(lens, k=k).set_index(["prompt", "graft"])["layer"].notna()
        within = table.set_index(["prompt", "graft"])["rank"] <= k
        assert up.equals(within.reindex(up.index).astype(bool).rename("layer"))


def test_in_bfloat16_too() -> None:
    """There equal logits are frequent."""
    model = Level.make(torch.bfloat16).model
    table = evaluate(model, PROMPTS, GRAFTS, top_k=model.arch.d_vocab, progress=False)
    assert (table["ties"] > 0).any()
    for _, row in table.iterrows():
        listed = [p for p in row["top_probs"] if p >= row["prob"]]
        assert row["rank"] <= len(listed) <= row["rank"] + row["ties"]


def test_the_trust_report_knows_ties(level: Level) -> None:
    """It compared with a rank that ties do not push down; a wrong number of ties is seen."""
    model = level.model
    grafts = {name: Graft.parse(text) for name, text in GRAFTS.items()}
    table = evaluate(model, PROMPTS, grafts, top_k=4, progress=False)
    prompts = dict(enumerate(PROMPTS))
    report = trust_report(model, prompts, grafts, table, seed=0)
    assert report.ok, report.text()
    assert all(c.ranks is not None and c.ranks[0] == c.ranks[1] for c in report.cells)
    wrong = table.assign(ties=table["ties"] + 1000)
    found = trust_report(model, prompts, grafts, wrong, seed=0).problems
    assert any(re.search(r"ties is 1\d{3}, Hugging Face has \d+ tokens near", p) for p in found)
    assert trust_report(model, prompts, grafts, table.drop(columns="ties"), seed=0).ok


# -- folders of version 0.1.0 ------------------------------------------------------------------


def test_a_folder_without_ties_is_read(tmp_path: Path) -> None:
    """Shards that version 0.1.0 wrote have no column of ties: it is NA, the rest as it was."""
    out = tmp_path / "old"
    manifest = Manifest(
        identity={},
        config={"sources": {"pre": "a", "sft": "b"}},
        overrides=(),
        grafts=[{"name": n, "rule": n} | dict.fromkeys(
            ("source", "span", "component", "layer", "head")) for n in ("x", "y")],
        duplicates={},
        recovery={},
        prompt_blocks=[1, 1],
        graft_blocks=[[0, 2]],
        versions={},
        models={"dtype": "float32", "fingerprints": {}, "row_budget": 1},
    )  # fmt: skip
    (out / "shards").mkdir(parents=True)
    (out / "sweep.json").write_text(manifest.to_json())
    texts = [Prompt(f"prompt {i}", answer=" a") for i in range(2)]
    (out / "prompts.parquet").write_bytes(to_bytes(prompt_table(texts, ["d"] * 2, [0, 1])))
    for shard in range(2):
        columns: dict[str, Any] = {n: pa.nulls(2, SHARD.field(n).type) for n in SHARD.names}
        columns |= {"prompt": [shard] * 2, "graft": [0, 1], "rank": [1, 3], "prob": [0.5, 0.1]}
        schema = SHARD if shard else SHARD.remove(SHARD.get_field_index("ties"))
        table = pa.table({n: columns[n] for n in schema.names}, schema=schema)
        bearing = table.replace_schema_metadata({"graftlens.key": manifest.key})
        shard_path(out, shard).write_bytes(to_bytes(bearing))
    whole = read_shard(out, manifest, 0)
    assert whole is not None
    assert whole.schema.names == SHARD.names
    read = read_results(out)
    assert isinstance(read, pd.DataFrame)
    assert str(read["ties"].dtype) == "Int64"
    assert read["ties"].isna().all()
    assert read["rank"].tolist() == [1, 3, 1, 3]
    some = read_results(out, columns=["ties", "prob", "graft"])
    assert isinstance(some, pd.DataFrame)
    assert list(some.columns) == ["ties", "prob", "graft"]
    assert some["prob"].tolist() == [0.5, 0.1] * 2
