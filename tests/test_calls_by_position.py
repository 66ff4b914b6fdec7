"""HookedTransformer's calls under grafts by position, against formulas and the sequential peer.

What a call gives at a place is computed here from that place's own weights.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeTiny, Tiny
from reference import sequential_graft
from torch import Tensor
from transformer_lens import TransformerLensKeyValueCache
from transformer_lens.utilities import Slice

from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt

N = 9
GRAFT = (
    "sft @ [2] + last | sft @ [4] : embed + pos_embed + v + o + mlp_out + unembed + ln2"
    " | 0.25*sft @ [5] : mlp_out + unembed | sft @ [6] : mlp_out : 1 : n3-7"
)
ALSO = ("embed", "pos_embed", "v", "o", "mlp_out", "unembed", "ln2")
#: Without strengths and single neurons, for the sequential peer.
PLAIN = GRAFT.split(" | 0.25")[0]
SHAPES = pytest.mark.parametrize("variant", ["gpt2", "llama", "neox-parallel"])


def _ids(seed: int, n: int = N) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


TOKENS = torch.tensor([_ids(1), _ids(2)])


def _fit(graft: str, model: GraftedTransformer) -> str:
    """The graft without the components that an architecture lacks."""
    return graft if model.arch.rotary_dim == 0 else graft.replace(" + pos_embed", "")


def _share(component: str, position: int) -> float:
    """The share of `sft` at a place under GRAFT, but for single neurons."""
    if position in (2, N - 1) or (position == 4 and component in ALSO):
        return 1.0
    return 0.25 if position == 5 and component in ("mlp_out", "unembed") else 0.0


def _choose(component: str, layer: int | None, position: int, head: int | None) -> str:
    return "sft" if _share(component, position) == 1.0 else "pre"


def _row(stacked: Tensor, component: str, position: int) -> Tensor:
    """A place's own weight, of [source, …]."""
    share = _share(component, position)
    return (1 - share) * stacked[0] + share * stacked[1]


def _rows(component: str, apply: Callable[[int, Tensor], Tensor], stacked: Tensor) -> Tensor:
    """[pos, …] of `apply(position, the place's own weight)`."""
    return torch.stack([apply(p, _row(stacked, component, p)) for p in range(N)])


def _close(ours: Tensor, theirs: Tensor, what: str = "", tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-3), what


def _hidden(t: Tiny) -> tuple[Tensor, Tensor]:
    """Logits [batch, pos, d_vocab] and residual streams [layer, batch, pos, d_model]."""
    runs = [sequential_graft(t.sources, row, _choose, hidden=True) for row in TOKENS.tolist()]
    return torch.stack([run[0] for run in runs]), torch.stack([run[1] for run in runs], dim=1)


# -- forward --------------------------------------------------------------------------------------


@SHAPES
def test_a_run_starts_at_any_layer(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    logits, hidden = _hidden(t)
    graft = _fit(PLAIN, t.model)
    mask = t.model.resolve(graft, TOKENS)
    for layer in (0, 1, 2, 3, -1):
        given = hidden[layer if layer >= 0 else 3 + layer]
        for chosen in (graft, mask):
            _close(t.model(given, start_at_layer=layer, graft=chosen), logits, f"{layer}")
    out = t.model(hidden[1], start_at_layer=1, stop_at_layer=-1, graft=graft)
    _close(out, hidden[2])
    both = t.model(hidden[2], "both", start_at_layer=2, tokens=TOKENS, graft=graft)
    targets = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    _close(both.loss, targets)
    with t.model.grafted(mask):
        _close(t.model(hidden[2], start_at_layer=2), logits)
    _, cache = t.model.run_with_cache(hidden[1], start_at_layer=1, graft=graft)
    _close(cache["resid_post", 1], hidden[2])
    assert "blocks.0.hook_resid_pre" not in cache


def test_names_of_a_prompt_reach_a_run_that_starts_later(tiny: MakeTiny) -> None:
    t = tiny("llama", tokenizer="gpt2")
    prompts = [Prompt("{who} starred in", {"who": who}) for who in ("Anders", "Renée Zellner")]
    graft = "sft @ who"
    logits, cache = t.model.run_with_cache(prompts, graft=graft)
    found = t.model(cache["resid_pre", 1], start_at_layer=1, tokens=prompts, graft=graft)
    real = torch.from_numpy(t.model.batch(prompts).real)
    _close(found[real], logits[real])
    with pytest.raises(ValueError, match="no span 'who'"):
        t.model(cache["resid_pre", 1], start_at_layer=1, graft=graft)


@SHAPES
@pytest.mark.parametrize("frozen", [False, True])
def test_a_cache_of_keys_and_values_is_continued(
    tiny: MakeTiny, variant: str, frozen: bool
) -> None:
    """Positions of a graft are those of the tokens that are given."""
    t = tiny(variant)
    cache = TransformerLensKeyValueCache.init_cache(t.model.cfg, t.model.cfg.device, 2)
    mask = torch.ones(2, 6, dtype=torch.long)
    ours = [
        t.model(
            TOKENS[:, :6],
            past_kv_cache=cache,
            attention_mask=mask,
            graft="sft @ [2] | sft @ [4] : k",
        )
    ]
    if frozen:
        cache.freeze()
    for _ in range(2 if frozen else 1):
        last = t.model(TOKENS[:, 6:], past_kv_cache=cache, graft="sft @ last | sft @ [0] : v")
    held = 6 if frozen else N
    assert {e.past_keys.shape[1] for e in cache.entries} == {held}
    assert tuple(cache.previous_attention_mask.shape) == (2, held)

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        chosen = position in (2, N - 1) or (component, position) in (("k", 4), ("v", 6))
        return "sft" if chosen else "pre"

    for row, found in zip(TOKENS.tolist(), torch.cat([*ours, last], dim=1), strict=True):
        _close(found, sequential_graft(t.sources, row, choose))


def test_a_cache_of_keys_and_values_outlives_runs_that_fail(tiny: MakeTiny) -> None:
    """Entries of the layers that had run kept what a failed run had added."""
    model = tiny("llama").model
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, 2)
    model(TOKENS[:, :5], past_kv_cache=cache, graft="sft @ [1]")

    def fail(value: Tensor, hook: Any) -> None:
        raise KeyError(hook.name)

    for name in ("blocks.1.hook_mlp_out", "unembed.hook_out"):
        with pytest.raises(KeyError, match=name), model.hooks([(name, fail)]):
            model(TOKENS[:, 5:], past_kv_cache=cache)
        assert {e.past_values.shape[1] for e in cache.entries} == {5}
        assert cache.previous_attention_mask.shape == (2, 5)
    found = model(TOKENS[:, 5:], past_kv_cache=cache, graft="sft @ last")
    _close(found, model(TOKENS, graft="sft @ [1] + last")[:, 5:])


def test_a_cache_that_layers_do_not_share_is_refused(tiny: MakeTiny) -> None:
    model = tiny("llama").model
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, 2)
    model(TOKENS[:, :5], past_kv_cache=cache, stop_at_layer=2)
    with pytest.raises(ValueError, match="0 earlier positions in layer 2, but 5 in the first"):
        model(TOKENS[:, 5:], past_kv_cache=cache)
    model.set_ungroup_grouped_query_attention(True)
    try:
        with pytest.raises(ValueError, match="2 key-value heads, but 4 are hooked separately"):
            model(TOKENS[:, 5:], past_kv_cache=cache)
    finally:
        model.set_ungroup_grouped_query_attention(False)


@SHAPES
def test_the_residual_made_by_hand_has_each_places_embeddings(tiny: MakeTiny, variant: str) -> None:
    model = tiny(variant).model
    graft = _fit(GRAFT, model)
    with model.grafted(model.resolve(graft, TOKENS)):
        found, none = model.get_residual(model.embed(TOKENS), model.get_pos_offset(None, 2))
        assert none is None
        _close(found, model(TOKENS, stop_at_layer=0))
    wanted = _rows("embed", lambda p, weight: weight[TOKENS[1, p]], model.W_E)
    if variant == "gpt2":
        wanted = wanted + _rows("pos_embed", lambda p, weight: weight[p], model.W_pos)
    _close(found[1], wanted)


def test_what_a_run_cannot_start_from_is_refused(tiny: MakeTiny) -> None:
    model = tiny("llama").model
    x = torch.zeros(2, N, model.cfg.d_model)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, 3)
    for wrong, message in (
        (lambda: model(TOKENS, start_at_layer=1), r"start_at_layer=1 needs the residual stream"),
        (lambda: model(x[..., :5], start_at_layer=1), r"a residual stream of shape \[2, 9, 5\]"),
        (lambda: model(x, start_at_layer=1.0), "start_at_layer=1.0: write a whole number"),
        (lambda: model(x, "loss", start_at_layer=1), r"needs to know the tokens.*tokens=…"),
        (lambda: model(TOKENS, tokens=TOKENS), r"Without it, give the tokens as the input"),
        (
            lambda: model(x, start_at_layer=1, tokens=TOKENS[:, :4]),
            r"\[2, 9, 24\] and tokens of shape \[2, 4\]",
        ),
        (lambda: model(TOKENS, past_kv_cache=cache), r"has shape \[3, 0, 2, 6\]; this run needs"),
        (lambda: model(TOKENS, past_kv_cache={}), "past_kv_cache is a dict. Give a Transformer"),
        (lambda: model.loss_fn(model(TOKENS), TOKENS, TOKENS[:1]), r"shape \[1, 9\], tokens have"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    cache.entries.pop()
    with pytest.raises(ValueError, match="past_kv_cache has 2 layers, the model 3"):
        model(TOKENS, past_kv_cache=cache)


# -- parts called by themselves -------------------------------------------------------------------


@SHAPES
def test_layers_called_by_themselves_use_each_places_weights(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    logits, hidden = _hidden(t)
    model = t.model
    with model.grafted(model.resolve(_fit(PLAIN, model), TOKENS)):
        x = model.embed(TOKENS)
        if model.arch.rotary_dim == 0:
            x = x + model.pos_embed(TOKENS)
        _close(x, hidden[0])
        for layer, block in enumerate(model.blocks):
            _close(block(hidden[layer]), hidden[layer + 1], f"layer {layer}")
            if not model.arch.parallel:
                normed = block.ln1(hidden[layer])
                mid = hidden[layer] + block.attn(normed, normed, normed)
                _close(mid + block.mlp(block.ln2(mid)), hidden[layer + 1], f"parts of {layer}")
        _close(model.unembed(model.ln_final(hidden[-1])), logits)
        # A stack of residual streams: the lens recipe.
        lens = model.unembed(model.ln_final(hidden))
        _close(lens[-1], logits)
        _close(lens[1], model.unembed(model.ln_final(hidden[1])))


def test_attention_called_by_itself_is_the_formula(tiny: MakeTiny) -> None:
    model = tiny("gpt2").model
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, N, 24, generator=generator) for _ in range(3))

    def project(x: Tensor, c: str, letter: str) -> Tensor:
        weight, bias = (getattr(model, f"{p}_{letter}")[:, 1] for p in "Wb")
        return torch.stack(
            [
                torch.einsum("bi,hio->bho", x[:, p], _row(weight, c, p)) + _row(bias, c, p)
                for p in range(N)
            ],
            dim=1,
        )

    q, k, v = project(query, "q", "Q"), project(key, "k", "K"), project(value, "v", "V")
    scores = torch.einsum("bqho,bkho->bhqk", q, k) / 6**0.5
    scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    z = torch.einsum("bhqk,bkho->bqho", scores.softmax(-1), v)
    wanted = torch.stack(
        [
            torch.einsum("bho,hoi->bi", z[:, p], _row(model.W_O[:, 1], "o", p))
            + _row(model.b_O[:, 1], "o", p)
            for p in range(N)
        ],
        dim=1,
    )
    with model.grafted(model.resolve(GRAFT, TOKENS)):
        _close(model.blocks[1].attn(query, key, value), wanted)


def test_units_that_differ_everywhere_need_no_batch(tiny: MakeTiny) -> None:
    """A graft of some heads or neurons at all positions has one answer for rows of any shape."""
    model = tiny("gpt2").model
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(3))
    graft = "sft @ all : mlp_out : 1 : n3-7 | 0.5*sft @ all : mlp_in : 1"
    weight, out = (model.W_in[:, 1], model.b_in[:, 1]), model.W_out[:, 1].clone()
    out[0, 3:8] = out[1, 3:8]
    hidden = x @ weight[0].mean(0) + weight[1].mean(0)
    wanted = F.gelu(hidden, approximate="tanh") @ out[0] + model.b_out[0, 1]
    for chosen in (graft, model.resolve(graft, TOKENS)):
        with model.grafted(chosen):
            _close(model.blocks[1].mlp(x), wanted)
            _close(model.blocks[1].mlp(x[0]), wanted[0])
            _close(model.blocks[1].ln1(x[0]), model.blocks[1].ln1(x)[0])


def test_rows_that_are_not_the_masks_are_refused(tiny: MakeTiny) -> None:
    model = tiny("llama").model
    x = torch.zeros(2, N - 1, model.cfg.d_model)
    block = model.blocks[1]
    normed = (x, x, x)
    calls: dict[str, Callable[[], Any]] = {
        "embed": lambda: model.embed(TOKENS[:, 1:]),
        "ln1 in layer 1": lambda: block.ln1(x),
        "q in layer 1": lambda: block.attn(*normed),
        "ln1 in layer 2": lambda: model.blocks[2](x),
        "mlp_(in|gate) in layer 1": lambda: block.mlp(x),
        "unembed": lambda: model.unembed(x),
    }
    graft = "sft @ last"
    for what, call in calls.items():
        with (
            model.grafted(model.resolve(graft, TOKENS)),
            pytest.raises(
                ValueError,
                match=rf"{what} was called directly on \[2, 8\] vectors under graft 'sft @ last', "
                r"for which the positions of its batch of \[2, 9\] use different weights\. Give it "
                r"\[batch, pos",
            ),
        ):
            call()
        with (
            model.grafted(graft),
            pytest.raises(ValueError, match=rf"{what} was called directly .* needs a prompt"),
        ):
            call()
        with model.grafted("sft @ all"):
            call()
    with pytest.raises(
        ValueError, match=r"queries read \[2, 8, 24\], keys and values \[2, 3, 24\]"
    ):
        block.attn(x, x[:, :3], x[:, :3])
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 3\]"):
        block(x, attention_mask=torch.ones(2, 3))
    gpt2 = tiny("gpt2").model
    with pytest.raises(ValueError, match="position 64 is beyond the model's context, 64"):
        gpt2.pos_embed(TOKENS, 56)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 9\], but with those"):
        gpt2.pos_embed(TOKENS, 3, torch.ones_like(TOKENS))


def test_copies_of_a_model_call_parts_of_their_own(tiny: MakeTiny) -> None:
    model = tiny("llama").model
    other = copy.deepcopy(model)
    x = torch.randn(2, N, 24, generator=torch.Generator().manual_seed(3))
    with model.grafted("sft @ all"):
        mine, theirs = model.blocks[1](x), other.blocks[1](x)
    _close(other.blocks[1](x), theirs)
    assert float((mine - theirs).abs().max()) > 0.1
    assert other.blocks[1].attn.alone.active is other.active
    assert other.blocks[1].attn.alone.rotary is other.rotary


# -- decompositions -------------------------------------------------------------------------------


@pytest.fixture(params=["gpt2", "llama", "neox-parallel"])
def filled(request: pytest.FixtureRequest, tiny: MakeTiny) -> tuple[GraftedTransformer, Any, Any]:
    """A model, its cache under GRAFT, and the same cache of one prompt without its batch axis."""
    model = tiny(request.param).model
    graft = _fit(GRAFT, model)
    _, cache = model.run_with_cache(TOKENS, graft=graft)
    _, alone = model.run_with_cache(TOKENS[:1], remove_batch_dim=True, graft=graft)
    return model, cache, alone


def _neurons(model: GraftedTransformer, acts: Tensor, layer: int) -> Tensor:
    """[batch, pos, neuron, d_model] from each row's own W_out."""
    rows = []
    for p in range(N):
        weight = _row(model.W_out[:, layer], "mlp_out", p).clone()
        if p == 6 and layer == 1:
            weight[3:8] = model.W_out[1, 1, 3:8]
        rows.append(acts[:, p, :, None] * weight)
    return torch.stack(rows, dim=1)


def test_neurons_have_their_rows_own_output_weights(filled: Any) -> None:
    model, cache, alone = filled
    onto = torch.randn(24, 3, generator=torch.Generator().manual_seed(4))
    onto = torch.cat([onto] * 2)[: model.cfg.d_model]
    made = [_neurons(model, cache["post", layer], layer) for layer in range(3)]
    _close(cache.get_neuron_results(-2), made[1])
    for layer in range(3):
        _close(cache.get_neuron_results(layer), made[layer], f"layer {layer}")
    for s, cut in ((-1, -1), (Slice(4), 4), ((2, 7), slice(2, 7)), ([6, 0], [6, 0])):
        _close(cache.get_neuron_results(1, pos_slice=s), made[1][:, cut], str(s))
        found = cache.get_neuron_results(1, (2, 9, 3), s, onto)
        _close(found, (made[1][:, :, 2:9:3] @ onto)[:, cut], str(s))
        _close(alone.get_neuron_results(1, pos_slice=s), made[1][0, cut], f"{s}, alone")
        found = cache.get_neuron_results(1, 5, s, onto[:, 0])
        _close(found, (made[1][:, :, 5] @ onto[:, 0])[:, cut], f"{s}, one neuron")
    stack = torch.cat(made[:2], dim=2).movedim(2, 0)
    _close(cache.stack_neuron_results(2), stack)
    found, labels = cache.stack_neuron_results(2, incl_remainder=True, return_labels=True)
    assert labels[-2:] == [f"L1N{model.cfg.d_mlp - 1}", "remainder"]
    _close(found.sum(0), cache["resid_post", 1], tolerance=5e-5)
    centred = stack if model.cfg.normalization_type == "RMS" else stack - stack.mean(-1, True)
    scaled = centred / cache["blocks.2.ln1.hook_scale"]
    _close(cache.stack_neuron_results(2, apply_ln=True), scaled, tolerance=5e-5)
    found = cache.stack_neuron_results(2, apply_ln=True, project_output_onto=onto)
    _close(found, scaled @ onto, tolerance=5e-5)
    found = cache.stack_neuron_results(
        2, pos_slice=-1, neuron_slice=[4], apply_ln=True, project_output_onto=onto[:, 0]
    )
    _close(found, (scaled @ onto[:, 0]).unflatten(0, (2, -1))[:, 4, :, -1], tolerance=5e-5)


def test_the_whole_decomposition_adds_up_to_the_stream(filled: Any) -> None:
    model, cache, alone = filled
    for layer, whole in ((None, cache["resid_post", 2]), (2, cache["resid_pre", 2])):
        _close(cache.get_full_resid_decomposition(layer).sum(0), whole, tolerance=5e-5)
    found, labels = cache.get_full_resid_decomposition(return_labels=True)
    where = labels.index("L1N4")
    wanted = _neurons(model, cache["post", 1], 1)[:, :, 4]
    _close(found[where], wanted)
    for s, cut in ((-1, -1), (Slice(5), 5), ((2, 7), slice(2, 7)), (Slice([6, 0]), [6, 0])):
        _close(cache.get_full_resid_decomposition(pos_slice=s), found[:, :, cut], str(s))
        _close(alone.get_full_resid_decomposition(pos_slice=s), found[:, 0, cut], f"{s}, alone")
    onto = torch.randn(model.cfg.d_model, 2, generator=torch.Generator().manual_seed(4))
    normed = cache.get_full_resid_decomposition(apply_ln=True)
    projected = cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=onto)
    _close(projected, normed @ onto, tolerance=1e-4)


def test_directions_of_tokens_are_each_places_own(filled: Any) -> None:
    model, cache, alone = filled
    each = torch.stack([_rows("unembed", lambda p, w, r=r: w.T[r[p]], model.W_U) for r in TOKENS])
    seventh = _rows("unembed", lambda p, w: w.T[7], model.W_U)
    two = torch.stack([_rows("unembed", lambda p, w, t=t: w.T[t], model.W_U) for t in (7, 11)])
    wanted = {
        "each": (TOKENS, each),
        "one": (7, seventh.expand(2, -1, -1)),
        "one, a tensor": (torch.tensor([7]), seventh.expand(2, -1, -1)),
        "by prompt": (torch.tensor([7, 11]), two),
        "by position": (TOKENS[0], each[:1].expand(2, -1, -1)),
    }
    for what, (tokens, rows) in wanted.items():
        _close(cache.tokens_to_residual_directions(tokens), rows, what)
        with model.grafted(cache.mask):
            _close(model.tokens_to_residual_directions(tokens), rows, what)
    _close(alone.tokens_to_residual_directions(TOKENS[:1]), each[0])
    with model.grafted(cache.mask), pytest.raises(ValueError, match=r"tokens of shape \[3\] under"):
        model.tokens_to_residual_directions(TOKENS[0, :3])
    with (
        model.grafted("sft @ last"),
        pytest.raises(ValueError, match="no single weight for unembed"),
    ):
        model.tokens_to_residual_directions(7)
    with model.grafted("0.5*sft @ all"):
        _close(model.tokens_to_residual_directions(7), model.W_U.mean(0)[:, 7])


def test_the_lens_recipe_reads_a_stack_of_streams(filled: Any) -> None:
    model, cache, alone = filled
    logits = model(TOKENS, graft=cache.mask)
    for found in (cache, alone):
        with model.grafted(found.mask):
            normed = found.accumulated_resid(apply_ln=True)
            stack = normed if found is cache else normed[:, None]
            read = model.unembed(stack)
        _close(read[-1], logits if found is cache else logits[:1])
        _close(read if found is cache else read[:, 0], found.logit_lens())
    weights = torch.stack([_row(model.W_U, "unembed", p) for p in range(N)])
    bias = torch.stack([_row(model.b_U, "unembed", p) for p in range(N)])
    normed = cache.accumulated_resid(apply_ln=True)
    _close(
        cache.logit_lens(), torch.einsum("lbpd,pdv->lbpv", normed, weights) + bias, tolerance=5e-5
    )


# -- generation -----------------------------------------------------------------------------------


@SHAPES
def test_a_repetition_penalty_is_hugging_faces(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    for source, model in t.sources.items():
        theirs = model.generate(
            TOKENS,
            attention_mask=torch.ones_like(TOKENS),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.7,
            eos_token_id=None,
            pad_token_id=0,
        )
        ours = t.model.generate(
            TOKENS, 12, repetition_penalty=1.7, stop_at_eos=False, graft=f"{source} @ all"
        )
        assert torch.equal(ours, theirs)


def test_stop_strings_end_a_row(tiny: MakeTiny) -> None:
    """Also one that several tokens make together; what the prompt says does not count."""
    t = tiny("gpt2", tokenizer="gpt2")
    prompts = ["Anders Lindqvist", "The Quiet Harbour with", "Renée"]
    options: dict[str, Any] = {"graft": "sft @ last", "stop_at_eos": False, "new_only": True}
    tokens = t.model.generate(prompts, 12, return_type="tokens", **options)
    start = len(t.model.to_tokens(prompts[0])[0])
    ids = [*t.model.to_tokens(prompts[0])[0].tolist(), *tokens[0].tolist()]
    texts = [t.model.to_string(ids[:n]) for n in range(start, len(ids) + 1)]
    # The end of the fourth new token's text and all of the fifth's.
    stop = texts[5][len(texts[4]) - 1 :]
    first = next(n for n, text in enumerate(texts) if text[len(texts[0]) :].count(stop))
    assert 0 < first <= 5
    found = t.model.generate(prompts, 12, stop_strings=["no such text", stop], **options)
    assert found[0] == texts[first][len(texts[0]) :]
    kept = t.model.generate(prompts, 12, stop_strings=stop, return_type="tokens", **options)
    assert kept[0, :first].tolist() == tokens[0, :first].tolist()
    whole = t.model.generate(prompts, 12, **options)
    for text, every in zip(found, whole, strict=True):
        assert every.startswith(text)
        assert (stop in text) == (stop in every)
    assert t.model.generate(["Anders"], 3, stop_strings="Anders", **options) == [
        t.model.generate(["Anders"], 3, **options)[0]
    ]
    for wrong in ("", [], ["a", ""]):
        with pytest.raises(ValueError, match="stop_strings: "):
            t.model.generate(prompts, 3, stop_strings=wrong)


@SHAPES
def test_a_generations_cache_is_what_each_step_computed(tiny: MakeTiny, variant: str) -> None:
    """Every generated position, and the prompt's end, ran as `last`."""
    t = tiny(variant)
    graft = "sft @ [1] : mlp | sft @ last : v + o + mlp_out"
    short = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS[1:, :6]], dim=1)
    tokens, mask = torch.cat([TOKENS[:1], short]), torch.ones(2, N, dtype=torch.long)
    mask[1, :3] = 0
    ids, cache = t.model.generate(
        tokens, 5, graft=graft, attention_mask=mask, return_cache=True, stop_at_eos=False
    )
    for row, start, length in ((0, 0, N), (1, 3, 6)):

        def choose(c: str, layer: int | None, p: int, head: int | None, n: int = length) -> str:
            late = p >= n - 1 and c in ("v", "o", "mlp_out")
            return "sft" if late or (p == 1 and c.startswith("mlp_")) else "pre"

        _, hidden = sequential_graft(t.sources, ids[row, start:].tolist(), choose, hidden=True)
        _close(cache["resid_post", 2][row, start:], hidden[-1])
    with pytest.raises(ValueError, match="these prompts are embeddings"):
        t.model.generate(t.model.embed(TOKENS), 2, return_cache=True)
    _, few = t.model.generate(
        TOKENS, 2, return_cache=True, names_filter="blocks.1.hook_resid_post", stop_at_eos=False
    )
    assert list(few) == ["blocks.1.hook_resid_post"]


@SHAPES
@pytest.mark.parametrize("cached", [True, False])
def test_embeddings_are_continued_as_their_tokens_are(
    tiny: MakeTiny, variant: str, cached: bool
) -> None:
    t = tiny(variant)
    graft = _fit(PLAIN, t.model)
    mask = torch.ones_like(TOKENS)
    mask[1, 6:] = 0  # padded on the right, so moved to the left
    options = {"attention_mask": mask, "stop_at_eos": False, "use_past_kv_cache": cached}
    with t.model.grafted("sft @ all"):
        embeds = t.model.embed(TOKENS)
    everywhere = f"{graft} | sft @ all : embed"
    wanted = t.model.generate(TOKENS, 6, graft=everywhere, **options)
    found = t.model.generate(embeds, 6, graft=everywhere, return_type="tokens", **options)
    assert torch.equal(found, wanted[:, N:])
    grown = t.model.generate(embeds, 6, graft=everywhere, **options)
    with t.model.grafted("sft @ all"):
        new = t.model.embed(wanted[:, N:])
    _close(grown[:, N:], new)
    assert torch.equal(t.model.generate(embeds, 6, graft=everywhere, new_only=True, **options), new)
    with pytest.raises(ValueError, match=r"count the tokens so far"):
        t.model.generate(embeds, 2, repetition_penalty=1.2)
    with pytest.raises(ValueError, match='return_type="embeds" is for prompts given as'):
        t.model.generate(TOKENS, 2, return_type="embeds")


def test_pieces_add_up_to_what_is_generated(tiny: MakeTiny) -> None:
    t = tiny("gpt2", tokenizer="gpt2")
    prompts = ["Anders Lindqvist", "The Quiet Harbour with", "Renée"]
    options = {"graft": "sft @ last", "do_sample": True, "top_p": 0.9}
    for kind in ("tokens", "str"):
        for most in (1, 4, 100):

            def seeded() -> torch.Generator:
                return torch.Generator().manual_seed(3)

            whole = t.model.generate(prompts, 11, return_type=kind, generator=seeded(), **options)
            pieces = list(
                t.model.generate_stream(
                    prompts,
                    11,
                    return_type=kind,
                    max_tokens_per_yield=most,
                    generator=seeded(),
                    **options,
                )
            )
            if kind == "tokens":
                assert torch.equal(torch.cat(pieces, dim=1), whole)
            else:
                assert ["".join(texts) for texts in zip(*pieces, strict=True)] == whole
    one = list(t.model.generate_stream(prompts[0], 3, max_tokens_per_yield=1, return_type="str"))
    assert all(isinstance(text, str) for text in one)
    for wrong, message in (
        ({"max_tokens_per_yield": 0}, "max_tokens_per_yield=0"),
        ({"graft": "sft @ title"}, "no span 'title'"),
    ):
        with pytest.raises(ValueError, match=message):  # before the first piece is asked for
            t.model.generate_stream(prompts, 3, **wrong)
    with pytest.raises(ValueError, match="which embeddings do not have"):
        t.model.generate_stream(torch.zeros(1, 2, 24))


def test_transformerlens_assertions_are_refusals_here(tiny: MakeTiny) -> None:
    """Code that catches its AssertionError goes on working."""
    model = tiny("llama").model
    x = torch.zeros(2, N, model.cfg.d_model)
    for wrong in (
        lambda: model.generate(TOKENS, do_sample=True, top_k=0),
        lambda: model(x, "loss", start_at_layer=1),
        lambda: model.set_use_attn_in(True),
        lambda: model.set_tokenizer("gpt2"),
        lambda: model.to_string([5]),
    ):
        with pytest.raises(AssertionError) as caught:
            wrong()
        assert isinstance(caught.value, ValueError)
    both = model.generate(TOKENS, 2, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(both.sequences, model.generate(TOKENS, 2, return_dict_in_generate=True))


def test_a_bar_is_shown_only_where_it_is_asked_for(
    tiny: MakeTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("gpt2").model
    model.generate(TOKENS, 3)
    assert capsys.readouterr().err == ""
    model.generate(TOKENS, 3, verbose=True, stop_at_eos=False)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "top_p=0.0: write a number above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0: write a whole number from 1"),
        ({"top_k": 2, "top_p": 0.5}, "give one of them"),
        ({"temperature": -1.0}, "temperature=-1.0: write a number from 0"),
        ({"freq_penalty": -1.0}, "freq_penalty=-1.0: write a number from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: write a number above 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"stop_strings": "a"}, "without a tokenizer|has no tokenizer|no tokenizer"),
    ],
)
def test_options_outside_their_range_are_refused(
    tiny: MakeTiny, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("gpt2").model.generate(TOKENS, 2, do_sample=True, **options)
