"""The oracle is tested against Hugging Face alone, before anything is tested against the oracle."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import N_CTX, VARIANTS, save_checkpoint, tiny_model, tiny_pair, tiny_sources
from reference import (
    HEAD_COMPONENTS,
    MODEL_COMPONENTS,
    components_of,
    n_heads_of,
    sequential_graft,
)
from torch import Tensor, nn
from toytokenizers import TOKENIZERS, sentencepiece_style
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
ONE_OF_EACH_FAMILY = (
    *("gpt2", "neox-parallel", "neox-sequential", "llama-biased", "mistral-window", "gemma"),
    *("gemma2", "gemma3", "olmo", "olmo2", "qwen2-window", "qwen3", "phi3"),
)


def _tokens(n: int = 11, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _full(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def _assert_equal_logits(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def _graft(**wanted: object) -> Callable[[str, int | None, int, int | None], str]:
    """Choose sft where component, layer, position and head are those given, else pre."""

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        asked = {"component": component, "layer": layer, "position": position, "head": head}
        return "sft" if all(asked[key] == value for key, value in wanted.items()) else "pre"

    return choose


def _record(module: nn.Module, part: Callable[[tuple[Tensor, ...], object], Tensor]) -> list:
    """Collect a part of a module's input or output; copies of the module collect here too."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _, args, output: seen.append(part(args, output).clone()))
    return seen


def _attention(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The first layer's attention and the projection of its output."""
    block = model.base_model.get_submodule("h" if model.config.model_type == "gpt2" else "layers")
    name, out = {"gpt2": ("attn", "c_proj"), "gpt_neox": ("attention", "dense")}.get(
        model.config.model_type, ("self_attn", "o_proj")
    )
    attention = block[0].get_submodule(name)
    return attention, attention.get_submodule(out)


# --- The models --------------------------------------------------------------------------------


@EVERY_VARIANT
def test_two_sources_share_no_parameter(variant: str) -> None:
    pair = tiny_pair(variant, seed=1)
    others = dict(pair["sft"].named_parameters())
    for name, parameter in pair["pre"].named_parameters():
        assert parameter.dtype == torch.float32
        assert (parameter != others[name]).all(), name


@EVERY_VARIANT
def test_logits_are_of_a_useful_size_and_depend_on_early_tokens(variant: str) -> None:
    model = tiny_model(variant, seed=2)
    tokens = _tokens()
    logits = _full(model, tokens)
    assert 0.5 < logits.std() < 5.0
    changed = _full(model, [tokens[0], tokens[1] - 1, *tokens[2:]])
    assert (changed - logits)[5].abs().max() > 1e-3


@EVERY_VARIANT
def test_a_saved_checkpoint_loads_as_it_was(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant, seed=3)
    save_checkpoint(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.float32
    assert torch.equal(_full(loaded, _tokens()), _full(model, _tokens()))


def test_the_same_seed_gives_the_same_model() -> None:
    first, again = tiny_model("gpt2", seed=4), tiny_model("gpt2", seed=4)
    for parameter, same in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, same)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="build the model with vocab_size="):
        save_checkpoint(tiny_model("llama", seed=0), tmp_path, sentencepiece_style())


# --- The sequential algorithm ------------------------------------------------------------------


@EVERY_VARIANT
def test_one_source_throughout_is_that_model(variant: str) -> None:
    """Holds only if the components together own every parameter, and the cache masks as a full
    pass does: eleven tokens are longer than every window."""
    pair = tiny_pair(variant, seed=5)
    tokens = _tokens()
    for source, model in pair.items():
        logits = sequential_graft(pair, tokens, lambda *_, source=source: source)
        _assert_equal_logits(logits, _full(model, tokens))


def test_rotary_frequencies_are_those_of_the_whole_prompt() -> None:
    """Read token by token, longrope would use its short factors for the first 32 of 40 tokens."""
    pair = tiny_pair("phi3-longrope", seed=5)
    tokens = _tokens(40)
    assert len(tokens) < N_CTX
    logits = sequential_graft(pair, tokens, lambda *_: "sft")
    _assert_equal_logits(logits, _full(pair["sft"], tokens))


@pytest.mark.parametrize("variant", ["gpt2", "gemma3", "olmo2"])
def test_hidden_states_are_those_of_the_model(variant: str) -> None:
    pair = tiny_pair(variant, seed=6)
    tokens = _tokens()
    _, hidden = sequential_graft(pair, tokens, lambda *_: "sft", hidden=True)
    with torch.no_grad():
        theirs = pair["sft"](torch.tensor([tokens]), output_hidden_states=True).hidden_states
    n_layers = pair["sft"].config.num_hidden_layers
    assert hidden.shape == (n_layers + 1, len(tokens), pair["sft"].config.hidden_size)
    for layer in range(n_layers):
        torch.testing.assert_close(hidden[layer], theirs[layer][0], rtol=1e-4, atol=1e-5)
    final_norm = pair["sft"].base_model.get_submodule("ln_f" if variant == "gpt2" else "norm")
    torch.testing.assert_close(final_norm(hidden[-1]), theirs[-1][0], rtol=1e-4, atol=1e-5)


@EVERY_VARIANT
def test_a_graft_changes_its_position_and_nothing_before(variant: str) -> None:
    pair = tiny_pair(variant, seed=7)
    tokens = _tokens()
    base = sequential_graft(pair, tokens, lambda *_: "pre")
    for component in components_of(pair["pre"]):
        layer = None if component in MODEL_COMPONENTS else 0
        choose = _graft(component=component, layer=layer, position=5)
        change = (sequential_graft(pair, tokens, choose) - base).abs().amax(-1)
        assert (change[:5] == 0).all(), component
        if component in ("ln_final", "unembed"):
            assert change[5] > 1e-4
            assert (change[6:] == 0).all(), component
        else:
            assert (change[5:] > 1e-6).all(), component


@pytest.mark.parametrize("variant", ONE_OF_EACH_FAMILY)
def test_in_the_last_layer_only_what_makes_keys_and_values_reaches_on(variant: str) -> None:
    """This tells q from k and v, and the norm before attention from those after it."""
    pair = tiny_pair(variant, seed=8)
    tokens = _tokens(8)
    last = pair["pre"].config.num_hidden_layers - 1
    base = sequential_graft(pair, tokens, lambda *_: "pre")
    for component in components_of(pair["pre"]):
        if component in MODEL_COMPONENTS:
            continue
        choose = _graft(component=component, layer=last, position=0)
        change = (sequential_graft(pair, tokens, choose) - base).abs().amax(-1)
        reaches_on = component in ("ln1", "k", "k_norm", "v")
        assert bool(change[1] > 1e-6) == reaches_on, component
        # The first token sees itself alone: its pattern is 1 whatever its query and key are.
        attends = component in ("q", "q_norm", "k", "k_norm")
        assert bool(change[0] > 1e-6) != attends, component


@pytest.mark.parametrize("variant", ["gpt2", "neox-parallel", "phi3", "llama-head-dim", "gemma3"])
@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_one_head_reaches_its_own_attention_alone(variant: str, component: str) -> None:
    pair = tiny_pair(variant, seed=9)
    attention, out = _attention(pair["pre"])
    patterns = _record(attention, lambda args, output: output[1][0, :, 0])
    mixed = _record(out, lambda args, output: args[0][0, 0])
    n_heads = n_heads_of(pair["pre"], "q")
    group = n_heads // n_heads_of(pair["pre"], component)
    tokens = _tokens(2)

    def run(choose: Callable[..., str]) -> tuple[list[Tensor], list[Tensor]]:
        patterns.clear()
        mixed.clear()
        sequential_graft(pair, tokens, choose)
        return list(patterns), [z.view(n_heads, -1) for z in mixed]

    base_patterns, base_mixed = run(_graft(component="none"))
    for head in range(n_heads_of(pair["pre"], component)):
        position = 1 if component == "q" else 0
        new_patterns, new_mixed = run(
            _graft(component=component, layer=0, position=position, head=head)
        )
        own = set(range(head * group, (head + 1) * group))
        moved = (new_patterns[1] - base_patterns[1]).abs().amax(-1) > 1e-6
        assert set(moved.nonzero().flatten().tolist()) == (set() if component == "v" else own)
        for at in (0, 1):
            moved = (new_mixed[at] - base_mixed[at]).abs().amax(-1) > 1e-6
            expected = own if component == "v" or at == 1 else set()
            assert set(moved.nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("variant", ["gpt2", "neox-parallel", "llama-biased", "phi3"])
def test_heads_of_o_add_up_and_its_bias_goes_with_all_of_them(variant: str) -> None:
    pair = tiny_pair(variant, seed=10)
    (_, pre), (_, sft) = (_attention(model) for model in pair.values())
    outputs = _record(pre, lambda args, output: output[0, 0])
    tokens = _tokens(1)

    def run(choose: Callable[..., str]) -> Tensor:
        outputs.clear()
        sequential_graft(pair, tokens, choose)
        return outputs[0]

    base = run(_graft(component="none"))
    whole = run(_graft(component="o", layer=0))
    heads = range(n_heads_of(pair["pre"], "o"))
    alone = [run(_graft(component="o", layer=0, head=head)) - base for head in heads]
    assert all(part.abs().max() > 1e-3 for part in alone)
    bias = 0.0 if pre.bias is None else sft.bias - pre.bias
    torch.testing.assert_close(whole - base, sum(alone) + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "olmo", "phi3"])
def test_the_gate_passes_through_the_nonlinearity_and_mlp_in_does_not(variant: str) -> None:
    pair = {"pre": tiny_model(variant, seed=11)}
    pair["sft"] = copy.deepcopy(pair["pre"])
    for name, parameter in pair["sft"].named_parameters():
        if "gate" in name or "up" in name:
            parameter.mul_(2)
    outputs = _record(pair["pre"].base_model.layers[0].mlp, lambda args, output: output[0, 0])
    for component in ("none", "mlp_in", "mlp_gate"):
        sequential_graft(pair, _tokens(1), _graft(component=component, layer=0))
    base, doubled, gated = outputs
    torch.testing.assert_close(doubled, 2 * base)
    assert (gated - 2 * base).abs().max() > 1e-2


def test_tied_embeddings_are_two_components() -> None:
    pair = tiny_pair("llama3-rope-tied", seed=12)
    tokens = _tokens()
    base, hidden = sequential_graft(pair, tokens, lambda *_: "pre", hidden=True)
    logits, same = sequential_graft(pair, tokens, _graft(component="unembed"), hidden=True)
    assert torch.equal(hidden, same)
    assert (logits - base).abs().amax(-1).min() > 1e-2
    _, other = sequential_graft(pair, tokens, _graft(component="embed"), hidden=True)
    table = pair["sft"].get_input_embeddings().weight
    assert torch.equal(other[0], table[tokens])


def test_three_sources_and_the_models_are_left_as_they_were() -> None:
    sources = tiny_sources("neox-sequential", ("pre", "task", "relation"), seed=13)
    before = {name: copy.deepcopy(model.state_dict()) for name, model in sources.items()}
    tokens = _tokens()
    for name, model in sources.items():
        logits = sequential_graft(sources, tokens, lambda *_, name=name: name)
        _assert_equal_logits(logits, _full(model, tokens))
    for name, model in sources.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[name][key])


def test_choose_is_asked_about_heads_and_layers_where_there_are_any() -> None:
    pair = tiny_pair("gemma3", seed=14)
    asked = set()

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        asked.add((component, layer, position, head))
        return "pre"

    sequential_graft(pair, _tokens(2), choose)
    expected = set()
    for component in components_of(pair["pre"]):
        n_heads = {"q": 6, "o": 6, "k": 3, "v": 3}.get(component)
        for layer in [None] if component in MODEL_COMPONENTS else range(4):
            for head in range(n_heads) if component in HEAD_COMPONENTS else [None]:
                expected |= {(component, layer, position, head) for position in (0, 1)}
    assert asked == expected


def test_components_are_those_that_have_parameters() -> None:
    middle = ("q", "k", "v", "o")
    assert components_of(tiny_model("gpt2", 0)) == (
        *("embed", "pos_embed", "ln1", *middle, "ln2", "mlp_in", "mlp_out", "ln_final", "unembed"),
    )
    # OLMo's norms have no weights.
    assert components_of(tiny_model("olmo", 0)) == (
        *("embed", *middle, "mlp_gate", "mlp_in", "mlp_out", "unembed"),
    )
    assert components_of(tiny_model("olmo2", 0)) == (
        *("embed", "q", "k", "v", "q_norm", "k_norm", "o", "ln1_post"),
        *("mlp_gate", "mlp_in", "mlp_out", "ln2_post", "ln_final", "unembed"),
    )


# --- The tokenizers ----------------------------------------------------------------------------

TEXTS = (
    "Renée Zellner-Ortiz starred in The Quiet Harbour with Anders Lindqvist.",
    "Robert Okafor Jr. and Siobhán O'Malley",
    "Łukasz isn't in  日本 since 2004 🎬!",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("style", TOKENIZERS)
def test_offsets_slice_the_text_into_its_tokens(style: str, text: str) -> None:
    tokenizer = TOKENIZERS[style]()
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert len(tokenizer) <= 400
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == text
    covered: set[int] = set()
    for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        if token in tokenizer.all_special_ids:
            assert (start, end) == (0, 0)
            continue
        covered.update(range(start, end))
        if (style, start, tokenizer.convert_ids_to_tokens(token)) == ("sentencepiece", 0, "▁"):
            assert end == 1  # the mark put before the text points at its first letter
            continue
        if "�" in tokenizer.decode([token]):  # a letter's bytes all point at that letter
            assert end == start + 1
        else:
            assert tokenizer.decode([token]).strip() == text[start:end].strip()
    assert {at for at, letter in enumerate(text) if letter != " "} <= covered


@pytest.mark.parametrize(
    ("style", "bos", "space_in_offsets", "first_word_as_inside"),
    [
        ("gpt2", None, True, False),
        ("llama3", "<|begin_of_text|>", False, False),
        ("sentencepiece", "<s>", True, True),
        ("gemma", "<bos>", True, False),
    ],
)
def test_each_tokenizer_has_its_manner(
    style: str, bos: str | None, space_in_offsets: bool, first_word_as_inside: bool
) -> None:
    tokenizer = TOKENIZERS[style]()
    encoded = tokenizer("starred in", return_offsets_mapping=True)
    if bos is not None:
        assert tokenizer.convert_ids_to_tokens(encoded.input_ids[0]) == bos
    assert encoded.offset_mapping[-1] == (7 if space_in_offsets else 8, 10)
    alone = tokenizer("in", add_special_tokens=False).input_ids
    assert (encoded.input_ids[-1] == alone[0]) == first_word_as_inside


@pytest.mark.parametrize(
    ("style", "variant"),
    [("gpt2", "neox-parallel"), ("llama3", "llama"), ("sentencepiece", "mistral"),
     ("gemma", "gemma2")],
)  # fmt: skip
def test_a_tokenizer_is_saved_with_its_model(style: str, variant: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[style]()
    model = tiny_model(variant, seed=15, vocab_size=len(tokenizer))
    save_checkpoint(model, tmp_path, tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ours = tokenizer(text, return_offsets_mapping=True)
        theirs = loaded(text, return_offsets_mapping=True)
        assert ours.input_ids == theirs.input_ids
        assert ours.offset_mapping == theirs.offset_mapping
    assert loaded.bos_token == tokenizer.bos_token
    assert loaded.pad_token == tokenizer.pad_token


@pytest.mark.parametrize("style", TOKENIZERS)
def test_training_a_tokenizer_again_gives_the_same_one(style: str) -> None:
    first, again = TOKENIZERS[style](), TOKENIZERS[style]()
    assert first.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
