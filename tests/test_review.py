"""Regressions that reviewers found: each names what was wrong before."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import MakeTiny
from families import save_checkpoint, tiny_pair
from peft import LoraConfig, PeftModel, get_peft_model
from reference import sequential_graft
from transformers import AutoModelForCausalLM

from graftlens.evaluation import evaluate
from graftlens.graft import Graft, Rule
from graftlens.model.grafted import GraftedTransformer
from graftlens.positions import At
from graftlens.prompts import Prompt, PromptError

load = GraftedTransformer.from_pretrained

TOKENS = torch.tensor([[5, 9, 33, 7, 21, 40]])


def _adapter(base: Path, folder: Path) -> Path:
    torch.manual_seed(3)
    settings = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_in_float32(tmp_path: Path) -> None:
    """On a bfloat16 base it was merged in bfloat16: 9e-3 off, and the probe could not see it."""
    pair = tiny_pair("llama", seed=2)
    base = save_checkpoint(pair["pre"].to(torch.bfloat16), tmp_path / "base")
    folder = _adapter(base, tmp_path / "adapter")
    wide = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(wide, folder).eval()
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), folder
    )
    for sft in (folder, loaded):
        model = load({"pre": base, "sft": sft}, verbose=False)
        assert model.cfg.dtype == torch.float32
        with torch.no_grad():
            wanted = theirs(TOKENS).logits
            ours = model(TOKENS, graft="sft @ all")
        assert float((ours - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_an_adapter_of_another_base_is_spoken_of(tmp_path: Path) -> None:
    pair = tiny_pair("llama", seed=2)
    bases = {n: save_checkpoint(m, tmp_path / n) for n, m in pair.items()}
    folder = _adapter(bases["pre"], tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    with pytest.warns(
        UserWarning, match=r"says that it was trained on .*pre; here it is applied to"
    ):
        load({"pre": bases["sft"], "sft": folder}, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load({"pre": bases["pre"], "sft": folder}, verbose=False)


def test_padding_that_no_mask_accounts_for_is_refused(tiny: MakeTiny) -> None:
    """Left padding in bare tokens was taken for the prompt: `bos` was a pad token."""
    model = tiny("llama", tokenizer="llama3").model
    model.tokenizer.pad_token = model.tokenizer.eos_token
    texts = ["Ann", "Ann plays with Tom in"]
    for side in ("left", "right"):
        tokens = model.to_tokens(texts, padding_side=side)
        with pytest.raises(PromptError, match=r"of its prompt is unknown\. Pass attention"):
            model(tokens, graft="sft @ bos")


def test_a_mask_belongs_to_its_batch(tiny: MakeTiny) -> None:
    """A mask of the same shape but other lengths was used in silence."""
    model = tiny("llama", tokenizer="llama3").model
    mask = model.resolve("sft @ last", ["Ann", "Ann plays with Tom in"])
    with pytest.raises(ValueError, match=r"was resolved for a batch of shape .* with prompts at"):
        model(["Ann plays with Tom in", "Ann"], graft=mask)
    other = TOKENS + 1
    reused = model(other, graft=model.resolve("sft @ last", TOKENS))
    assert torch.equal(reused, model(other, graft="sft @ last")), "other tokens, same places"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (-1,)}, "layers are counted from 0; -1 is not a layer"),
        ({"layers": ()}, "does not name a layer"),
        ({"components": ()}, "does not name a component"),
        ({"components": ("mpl",)}, "unknown component 'mpl'"),
    ],
)
def test_rules_made_by_hand_hold_the_vocabulary(change: dict[str, object], message: str) -> None:
    """`Rule(…)` with layers=(-1,) or no components selected nothing, silently."""
    with pytest.raises(ValueError, match=message):
        Rule("sft", At.parse("last"), **change)  # type: ignore[arg-type]


def test_expressions_made_by_hand_are_those_that_are_read() -> None:
    nested = (At.parse("a + b"), At.parse("c"))
    from graftlens.positions import Several

    assert Several("+", nested) == At.parse("a + b + c") == At.parse(str(Several("+", nested)))


def test_one_weight_under_a_graft_is_that_graft_s_or_an_error(tiny: MakeTiny) -> None:
    """With an unresolved graft in force, and in hooks, it was always the base's."""
    model = tiny("llama").model
    base, sft = (model.W_O[s, 0] for s in (0, 1))
    assert torch.equal(model.blocks[0].attn.W_O, base)
    with model.grafted("sft @ all"):
        assert torch.equal(model.blocks[0].attn.W_O, sft)
    with model.grafted("sft @ last : mlp"):
        assert torch.equal(model.blocks[0].attn.W_O, base), "that graft leaves o alone"
        with pytest.raises(ValueError, match="there is no single weight for mlp_out in layer 0"):
            _ = model.blocks[0].mlp.W_out
    seen: list[torch.Tensor] = []
    model.run_with_hooks(
        TOKENS,
        graft="sft @ all",
        fwd_hooks=[
            ("blocks.0.hook_resid_pre", lambda x, hook: seen.append(model.blocks[0].attn.W_O))
        ],
    )
    assert torch.equal(seen[0], sft)
    with pytest.raises(ValueError, match="there is no single weight for unembed"):
        model.run_with_hooks(
            TOKENS,
            graft="sft @ last",
            fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: model.unembed.W_U)],
        )
    assert torch.equal(model.blocks[0].attn.W_O, base), "nothing stays in force after an error"


@pytest.mark.parametrize("variant", ["gpt2", "gemma2", "olmo2"])
@pytest.mark.parametrize(
    "graft", ["none", "sft @ all", "sft @ [1, -1]", "sft @ last : ln_final + unembed"]
)
def test_the_logit_lens_reads_with_each_position_s_weights(
    tiny: MakeTiny, variant: str, graft: str
) -> None:
    """It failed under TransformerLens 4, and its parts under any graft that differs by position."""
    t = tiny(variant)
    logits, cache = t.model.run_with_cache(TOKENS, graft=graft)
    lens = cache.logit_lens(incl_mid=True)
    assert torch.allclose(lens[-1], logits, atol=1e-5)
    assert (
        len(lens)
        == (2 if "hook_resid_mid" in str(list(cache.keys())) else 1) * (t.model.cfg.n_layers) + 1
    )
    chosen = {"none": set(), "sft @ all": set(range(6))}.get(graft, {1, 5} if "[" in graft else {5})
    only = graft.partition(":")[2].replace("+", " ").split()

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        return "sft" if position in chosen and (not only or component in only) else "pre"

    _, resid = sequential_graft(t.sources, TOKENS[0].tolist(), choose, hidden=True)
    # The stream before layer 1, read by hand through each position's own norm and unembedding.
    rows = []
    for position in range(6):
        model = t.sources["sft" if choose("unembed", None, position, None) == "sft" else "pre"]
        norm = getattr(model, "transformer", None) or model.model
        norm = getattr(norm, "ln_f", None) or norm.norm
        with torch.no_grad():
            row = model.lm_head(norm(resid[1, position]))
        cap = getattr(model.config, "final_logit_softcapping", None)
        rows.append(row if cap is None else torch.tanh(row / cap) * cap)
    wanted = torch.stack(rows)
    ours = cache.logit_lens(layers=[1])[0, 0]
    assert float((ours - wanted).abs().max() / wanted.abs().max()) < 2e-5


def test_the_final_norm_applies_to_one_position_of_a_mixed_graft(tiny: MakeTiny) -> None:
    """`accumulated_resid(pos_slice=…, apply_ln=True)` did not cut the mask with the positions."""
    model = tiny("gpt2").model
    _, cache = model.run_with_cache(TOKENS, graft="sft @ [1, -1]")
    whole = cache.accumulated_resid(layer=-1, apply_ln=True)
    for position in (-1, 2):
        part = cache.accumulated_resid(layer=-1, apply_ln=True, pos_slice=position)
        assert torch.allclose(part, whole[:, :, position], atol=1e-6)


def test_what_is_too_long_or_unknown_is_a_row_with_a_reason(tiny: MakeTiny) -> None:
    """One prompt beyond GPT-2's context ended the whole table."""
    model = tiny("gpt2", tokenizer="gpt2").model
    prompts = [
        Prompt("{first_entity} with", {"first_entity": "Ann"}, " Al"),
        Prompt("{first_entity} with", {"first_entity": "Ann " * 60}, " Al"),
    ]
    with pytest.warns(UserWarning, match="3 of 6 rows could not be run; first reason: prompt and"):
        table = evaluate(model, prompts, "sft @ last", progress=False)
    assert table["reason"].isna().tolist() == [True, True, True, False, False, False]
    assert "more than the model's context of 64" in table["reason"][5]
    with pytest.warns(UserWarning, match="continues the prompt's last word. Did you mean ' Al'"):
        evaluate(model, Prompt("Ann with", {}, "Al"), Graft.rule("sft"), progress=False)


def test_fused_projections_are_kept_apart(tiny: MakeTiny) -> None:
    """A view of a fused tensor kept all of it alive: k and v where only q differs."""
    pair = tiny_pair("phi3", seed=2)
    sft = copy.deepcopy(pair["pre"])
    with torch.no_grad():
        sft.model.layers[0].self_attn.qkv_proj.weight[:4] += 0.5
    model = load({"pre": pair["pre"], "sft": sft}, verbose=False)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    held = sum(s.nbytes() for s in storages.values())
    once = sum(p.numel() * p.element_size() for p in pair["pre"].parameters())
    extra = model.blocks[0].attn.q.weight[1]
    assert held == once + extra.numel() * extra.element_size()


def test_missing_weights_say_what_is_missing(tiny: MakeTiny) -> None:
    """nn.Module's own message hid the reason."""
    with pytest.raises(AttributeError, match="gpt2 has no mlp_gate, so no W_gate"):
        _ = tiny("gpt2").model.W_gate
    with pytest.raises(AttributeError, match="llama has no pos_embed, so no W_pos"):
        _ = tiny("llama").model.W_pos


def test_the_config_follows_every_way_of_casting(tiny: MakeTiny) -> None:
    model = GraftedTransformer.from_pretrained(tiny("llama").sources, check=False, verbose=False)
    assert model.double().cfg.dtype == torch.float64
    assert model.bfloat16().cfg.dtype == torch.bfloat16
