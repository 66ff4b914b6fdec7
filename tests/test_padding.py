"""Padded batches: each prompt gets the logits that it has alone, whatever stands beside it.

"Alone" is the sequential algorithm on the prompt's own tokens, or Hugging Face's own forward.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeTiny, Tiny
from families import VARIANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import sequential_graft
from torch import Tensor

from graftlens.model.inputs import Padding
from graftlens.prompts import Prompt, PromptError

EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
BOTH_SIDES = pytest.mark.parametrize("side", ["left", "right"])

Choose = Callable[[str, int | None, int, int | None], str]


def _ids(n: int, seed: int) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _padded(rows: list[list[int]], sides: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask; padding is a token that the prompts also use."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), rows[0][0])
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (row, side) in enumerate(zip(rows, sides, strict=True)):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return tokens, mask


def _assert_alone(logits: Tensor, mask: Tensor, alone: list[Tensor]) -> None:
    assert logits.isfinite().all()  # padding too: 0 * nan would spoil a loss
    for row, real, theirs in zip(logits, mask.bool(), alone, strict=True):
        assert (row[real] - theirs).abs().max() < 2e-5 * theirs.abs().max()


# One text for the library, one function for the oracle; n is the prompt's length.
GRAFT = "sft @ last : attn + ln_final | sft @ [1] : k + v | sft @ [-2] | sft @ bos : mlp : 1"


def _choose(n: int) -> Choose:
    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        attention = ("q", "k", "v", "o", "q_norm", "k_norm", "ln_final")
        chosen = (
            (position == n - 1 and component in attention)
            or (position == 1 and component in ("k", "v"))
            or position == n - 2
            or (position == 0 and layer == 1 and component.startswith("mlp"))
        )
        return "sft" if chosen else "pre"

    return choose


@EVERY_VARIANT
def test_token_tensors_padded_on_either_side(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    rows = [_ids(n, n) for n in (5, 12, 8)]
    graft = GRAFT
    if "ln_final" not in t.model.arch.components:
        graft = graft.replace(" + ln_final", "")
    alone = [sequential_graft(t.sources, row, _choose(len(row))) for row in rows]
    for sides in (["left"] * 3, ["right"] * 3, ["right", "left", "left"]):
        tokens, mask = _padded(rows, sides)
        logits = t.model(tokens, graft=graft, attention_mask=mask)
        _assert_alone(logits, mask, alone)
        logits = t.model.run_with_hooks(
            tokens,
            graft=graft,
            attention_mask=mask.bool(),
            fwd_hooks=[("blocks.0.attn.hook_pattern", lambda pattern, hook: None)],
        )
        _assert_alone(logits, mask, alone)


@EVERY_VARIANT
@BOTH_SIDES
def test_a_uniform_graft_stays_uniform_and_is_its_source(
    tiny: MakeTiny, variant: str, side: str
) -> None:
    t = tiny(variant)
    rows = [_ids(n, n) for n in (4, 11, 1)]
    tokens, attention = _padded(rows, [side] * 3)
    for source in t.sources:
        batch = t.model.batch(tokens, attention_mask=attention)
        mask = t.model.resolve(f"{source} @ all", batch)
        index = list(t.sources).index(source)
        for component, layer in mask.sites:
            assert (mask.source_index(component, layer) == index).all()
            assert mask[component, layer].only(tuple(range(2))) == index
        logits = t.model(batch, graft=mask)
        _assert_alone(logits, attention, [t.logits(source, row) for row in rows])


def test_longrope_chooses_its_table_for_each_prompt(tiny: MakeTiny) -> None:
    """Prompts of up to 32 tokens use the short factors, longer ones the long ones."""
    t = tiny("phi3-longrope")
    rows = [_ids(n, n) for n in (40, 12, 32, 33, 60)]
    short_and_long = [t.logits("sft", row) for row in rows]
    grafted = [sequential_graft(t.sources, row, _choose(len(row))) for row in rows]
    for sides in (["left"] * 5, ["right"] * 5):
        tokens, mask = _padded(rows, sides)
        logits = t.model(tokens, graft="sft @ all", attention_mask=mask)
        _assert_alone(logits, mask, short_and_long)
        logits = t.model(tokens, graft=GRAFT, attention_mask=mask)
        _assert_alone(logits, mask, grafted)


@BOTH_SIDES
def test_learned_positions_count_from_the_prompts_own_start(tiny: MakeTiny, side: str) -> None:
    """A prompt padded to the whole context must neither run out of positions nor shift."""
    t = tiny("gpt2")
    rows = [_ids(64, 1), _ids(3, 2)]
    tokens, mask = _padded(rows, [side] * 2)
    logits = t.model(tokens, attention_mask=mask)
    _assert_alone(logits, mask, [t.logits("pre", row) for row in rows])
    with pytest.raises(ValueError, match="65 tokens is longer than the model's context of 64"):
        t.model(torch.tensor([_ids(65, 3)]))


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(2, 14), min_size=1, max_size=5),
    sides=st.lists(st.sampled_from(["left", "right"]), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
def test_any_mixture_of_lengths_and_sides(
    tiny: MakeTiny, lengths: list[int], sides: list[str], seed: int
) -> None:
    """Gemma 2 has windows, soft caps and grouped heads at once."""
    t = tiny("gemma2")
    rows = [_ids(n, seed + i) for i, n in enumerate(lengths)]
    tokens, mask = _padded(rows, sides[: len(rows)])
    graft = "sft @ last : q + o + mlp : upper_half | sft @ [-2, 0] : v | sft @ [1] : k : all : 1"

    def choose(n: int) -> Choose:
        def chosen(component: str, layer: int | None, position: int, head: int | None) -> str:
            upper = layer is not None and layer >= 2
            wanted = {"q", "o", "mlp_in", "mlp_gate", "mlp_out"}
            if position == 1 and component == "k" and head == 1:
                return "sft"
            if position in (n - 2, 0) and component == "v":
                return "sft"
            return "sft" if position == n - 1 and upper and component in wanted else "pre"

        return chosen

    alone = [sequential_graft(t.sources, row, choose(len(row))) for row in rows]
    _assert_alone(t.model(tokens, graft=graft, attention_mask=mask), mask, alone)


# --- Texts and prompts ---------------------------------------------------------------------------

PROMPTS = [
    Prompt("{actor} starred in a film with", {"actor": "Renée Zellner-Ortiz"}),
    Prompt(
        "Who played the lead in {film}? It was {actor}, {actor}", {"actor": "Łukasz", "film": "X"}
    ),
    Prompt("{actor}", {"actor": "Anders Lindqvist"}),
]
SPANS = "sft @ actor + last | pre @ actor : k : 1"


def _spans(t: Tiny, prompt: Prompt) -> tuple[list[int], set[int]]:
    """Tokens of a prompt and the positions of its actor, from the tokenizer's own offsets."""
    assert t.tokenizer is not None
    encoded = t.tokenizer(prompt.text, return_offsets_mapping=True)
    covered: set[int] = set()
    place = prompt.text.find(prompt.fields["actor"])
    while place >= 0:
        end = place + len(prompt.fields["actor"])
        offsets = enumerate(encoded["offset_mapping"])
        covered |= {i for i, (a, b) in offsets if a < end and b > place}
        place = prompt.text.find(prompt.fields["actor"], end)
    return encoded["input_ids"], covered


TOKENIZER_OF = {
    "gpt2": "gpt2",
    "llama3-rope-tied": "llama3",
    "mistral-window": "sentencepiece",
    "gemma3": "gemma",
    "phi3-longrope": "sentencepiece",
    "olmo2": "gpt2",
}


@pytest.mark.parametrize(("variant", "tokenizer"), TOKENIZER_OF.items())
@BOTH_SIDES
def test_prompts_with_named_spans(
    tiny: MakeTiny, variant: str, tokenizer: str, side: Padding
) -> None:
    t = tiny(variant, tokenizer=tokenizer)
    alone, lengths = [], []
    for prompt in PROMPTS:
        ids, actor = _spans(t, prompt)

        def choose(
            component: str,
            layer: int | None,
            position: int,
            head: int | None,
            sft: frozenset[int] = frozenset({*actor, len(ids) - 1}),
            actor: set[int] = actor,
        ) -> str:
            back = position in actor and component == "k" and layer == 1
            return "sft" if position in sft and not back else "pre"

        alone.append(sequential_graft(t.sources, ids, choose))
        lengths.append(len(ids))
    assert len(set(lengths)) == 3

    logits = t.model(PROMPTS, graft=SPANS, padding_side=side)
    real = t.model.batch(PROMPTS, padding_side=side).real
    assert real.sum(1).tolist() == lengths
    assert real[:, 0 if side == "right" else -1].all()
    _assert_alone(logits, torch.from_numpy(real), alone)
    for prompt, theirs in zip(PROMPTS, alone, strict=True):
        _assert_alone(t.model(prompt, graft=SPANS), torch.ones(1, len(theirs)), [theirs])


@BOTH_SIDES
def test_plain_texts(tiny: MakeTiny, side: Padding) -> None:
    t = tiny("qwen2-window", tokenizer="gpt2")
    assert t.tokenizer is not None
    texts = [p.text for p in PROMPTS]
    logits = t.model(texts, graft="sft @ all", padding_side=side)
    mask = torch.from_numpy(t.model.batch(texts, padding_side=side).real)
    _assert_alone(logits, mask, [t.logits("sft", t.tokenizer(x)["input_ids"]) for x in texts])


# --- Loss, caches and what must be refused -------------------------------------------------------


@BOTH_SIDES
def test_the_loss_counts_real_tokens_only(tiny: MakeTiny, side: str) -> None:
    t = tiny("neox-parallel")
    rows = [_ids(n, n) for n in (5, 12, 2, 8)]
    tokens, mask = _padded(rows, [side] * 4)
    each = [
        F.cross_entropy(t.logits("sft", row)[:-1], torch.tensor(row[1:]), reduction="none")
        for row in rows
    ]
    loss = t.model(tokens, "loss", graft="sft @ all", attention_mask=mask)
    assert float(loss) == pytest.approx(float(torch.cat(each).mean()), rel=1e-5)
    _, per_token = t.model(
        tokens, "both", graft="sft @ all", attention_mask=mask, loss_per_token=True
    )
    for row, losses in zip(per_token, each, strict=True):
        n = len(losses)
        found = row[-n:] if side == "left" else row[:n]
        torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-5)
        assert row.count_nonzero() == n


@BOTH_SIDES
def test_cached_activations_are_those_of_each_prompt_alone(tiny: MakeTiny, side: str) -> None:
    t = tiny("gemma2")
    rows = [_ids(n, n) for n in (5, 12, 8)]
    tokens, mask = _padded(rows, [side] * 3)
    graft = "sft @ last + [1] | sft @ bos : q : 1"
    logits, cache = t.model.run_with_cache(tokens, graft=graft, attention_mask=mask)
    assert logits.isfinite().all()

    def choose(n: int) -> Choose:
        return lambda c, l, p, h: (
            "sft" if p in (1, n - 1) or (p == 0 and c == "q" and l == 1) else "pre"
        )

    for i, row in enumerate(rows):
        _, hidden = sequential_graft(t.sources, row, choose(len(row)), hidden=True)
        real = mask[i].bool()
        for layer in range(4):
            for name, theirs in [("resid_pre", hidden[layer]), ("resid_post", hidden[layer + 1])]:
                ours = cache[name, layer][i][real]
                assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max(), (name, layer)
            pattern = cache["pattern", layer][i][:, real]
            assert (pattern[:, :, ~real] == 0).all()  # no token reads padding
            torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1, 1], [1, 1, 1, 1]], r"row 0 is \[1, 0, 1, 1\]: .* in one run"),
        ([[1, 1, 1, 1], [0, 0, 0, 0]], r"row 1 is \[0, 0, 0, 0\]"),
        ([[1, 1, 1], [1, 1, 1]], r"shape \(2, 3\), tokens have \(2, 4\)"),
    ],
)
def test_a_malformed_attention_mask_is_refused(
    tiny: MakeTiny, mask: list[list[int]], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        tiny("gpt2").model(torch.full((2, 4), 5), attention_mask=torch.tensor(mask))


def test_padding_that_no_mask_accounts_for_is_refused(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="gpt2")
    assert t.tokenizer is not None
    tokens = torch.tensor([[5, 6, 7], [5, 6, t.tokenizer.pad_token_id]])
    with pytest.raises(PromptError, match="row 1 ends in the pad token"):
        t.model(tokens)


def test_a_position_outside_one_prompt_of_the_batch_is_refused(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    tokens, mask = _padded([_ids(9, 1), _ids(4, 2)], ["left", "left"])
    with pytest.raises(PromptError, match=r"prompt 1, .*position 6 is outside the prompt.* 4 tok"):
        t.model(tokens, graft="sft @ [6]", attention_mask=mask)


def test_the_masks_places_are_the_prompts_own(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    tokens, attention = _padded([_ids(3, 1), _ids(5, 2)], ["left", "right"])
    batch = t.model.batch(tokens, attention_mask=attention)
    mask = t.model.resolve("sft @ bos + [-2]", batch)
    places = np.argwhere(mask.source_index("q", 0) == 1).tolist()
    assert places == [[0, 2], [0, 3], [1, 0], [1, 3]]
