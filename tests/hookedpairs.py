"""TransformerLens 3.9's HookedTransformers of the tiny models, and the grafted models of the same.

The HookedTransformer of a source has that source's very weights, unprocessed: it is the oracle for
whatever a grafted model under that source's uniform graft gives. TransformerLens 4 does not have
the class, so tests that need it carry `needs_hooked`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformer_lens
from families import N_CTX, NORM_EPS, WINDOW, tiny_pair
from torch import Tensor
from toytokenizers import gpt2_style
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlens.model.grafted import GraftedTransformer

needs_hooked = pytest.mark.skipif(
    "HookedTransformer" not in dir(transformer_lens),
    reason="TransformerLens 4 has no HookedTransformer: run `pytest -m compat` in an environment "
    "with 'transformer-lens>=3.9,<4', as .ci/run does",
)

#: GPT-2's learned positions and biases, grouped-query Llama, and NeoX's parallel blocks.
SHAPES = ("gpt2", "llama", "neox-parallel")
EACH_SHAPE = pytest.mark.parametrize("variant", SHAPES)


N = 11


def ids(seed: int = 0, n: int = N) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


TOKENS = torch.tensor([ids(1), ids(2)])


def close(ours: Tensor, theirs: Tensor, what: str = "", tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    assert torch.equal(ours.isinf(), theirs.isinf()), what
    ours, theirs = (x.nan_to_num(neginf=0.0) for x in (ours, theirs))
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-3), what


# --- HookedTransformers of the tiny models -------------------------------------------------------


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "d_head": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        "d_vocab": config.vocab_size,
        "n_ctx": N_CTX,
        "eps": NORM_EPS,
        "device": "cpu",
        "original_architecture": type(model).__name__,
        "default_prepend_bos": False,
    }


def _rotary(model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    """A Llama-like architecture in HookedTransformer's words."""
    config = model.config
    values = {
        "d_mlp": config.intermediate_size,
        "n_key_value_heads": config.num_key_value_heads,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_base": 50,
        "gated_mlp": True,
        "final_rms": True,
    }
    return {**_sizes(model), **values, **options}


def _neox(model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    values = {
        "d_mlp": 44,
        "act_fn": model.config.hidden_act,
        "normalization_type": "LN",
        "positional_embedding_type": "rotary",
        "rotary_base": 50,
        "rotary_dim": 4,
        "parallel_attn_mlp": model.config.use_parallel_residual,
    }
    return {**_sizes(model), **values, **options}


def _windowed(n_layers: int, kinds: list[str]) -> dict[str, Any]:
    repeated = (kinds * n_layers)[:n_layers]
    return {"use_local_attn": True, "window_size": WINDOW, "attn_types": repeated}


# variant -> (name of the converter, config options)
HOOKED: dict[str, tuple[str, Callable[[PreTrainedModel], dict[str, Any]]]] = {
    "gpt2": (
        "convert_gpt2_weights",
        lambda m: {
            **_sizes(m),
            "d_mlp": 40,
            "act_fn": "gelu_new",
            "normalization_type": "LN",
            "positional_embedding_type": "standard",
        },
    ),
    "neox-parallel": ("convert_neox_weights", _neox),
    "neox-sequential": ("convert_neox_weights", _neox),
    "llama": ("convert_llama_weights", _rotary),
    "mistral-window": (
        "convert_mistral_weights",
        lambda m: _rotary(m, **_windowed(3, ["local"])),
    ),
    "gemma": (
        "convert_gemma_weights",
        lambda m: _rotary(m, act_fn="gelu_pytorch_tanh"),
    ),
    "gemma2": (
        "convert_gemma_weights",
        lambda m: _rotary(
            m,
            act_fn="gelu_pytorch_tanh",
            attn_scale=7**0.5,
            attn_scores_soft_cap=1.5,
            output_logits_soft_cap=3.0,
            use_normalization_before_and_after=True,
            **_windowed(4, ["local", "global"]),
        ),
    ),
    "qwen2": ("convert_qwen2_weights", _rotary),
    "qwen3": ("convert_qwen3_weights", lambda m: _rotary(m, use_qk_norm=True)),
    "phi3": ("convert_phi3_weights", _rotary),
}
EACH_HOOKED = pytest.mark.parametrize("variant", HOOKED)

#: Values that HookedTransformer flattens to [batch · pos · head, …].
FLATTENED = tuple(f"{a}_norm.hook_{b}" for a in "qk" for b in ("scale", "normalized"))


def hooked_model(
    variant: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> Any:
    """A HookedTransformer with the very weights of a Hugging Face model, unprocessed.

    Texts get a BOS only where it is asked for (`default_prepend_bos` is False).
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    converter, options = HOOKED[variant]
    cfg = HookedTransformerConfig(**options(model))
    hooked = HookedTransformer(cfg)
    state = getattr(weight_conversions, converter)(model, cfg)
    hooked.load_and_process_state_dict(
        {name: tensor.detach().clone() for name, tensor in state.items()},
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    if tokenizer is not None:
        # As `set_tokenizer`, which would load it from its folder again, to begin texts with BOS.
        hooked.tokenizer = copy.deepcopy(tokenizer)
        hooked.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0
    return hooked.eval().requires_grad_(False)


# --- both kinds of model with the same weights ---------------------------------------------------


@dataclass(frozen=True)
class HookedPair:
    """A grafted model of `pre` and `sft`, and a HookedTransformer of each.

    Attributes:
        variant: the name of the tiny family.
        model: the grafted model.
        hooked: source name -> its HookedTransformer.
        tokenizer: of all three, gpt2's style; texts get no BOS unless it is asked for.
    """

    variant: str
    model: GraftedTransformer
    hooked: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase

    @property
    def tokens(self) -> Tensor:
        """Token ids [2, 11] that no special token is among."""
        return TOKENS

    def close(
        self, call: Callable[[Any, str | None], Any], what: str = "", tolerance: float = 2e-5
    ) -> None:
        """Assert that `call(model, graft)` gives the same everywhere.

        That is the grafted model under each source's uniform graft, and that source's
        HookedTransformer, whose graft is None: `graft_of` makes arguments of it.
        """
        for source, hooked in self.hooked.items():
            ours, theirs = call(self.model, f"{source} @ all"), call(hooked, None)
            same(ours, theirs, f"{what} of {source}", tolerance)


def graft_of(graft: str | None) -> dict[str, str]:
    """The argument `graft=` for a grafted model; none for a HookedTransformer."""
    return {} if graft is None else {"graft": graft}


def same(ours: Any, theirs: Any, what: str = "", tolerance: float = 2e-5) -> None:
    """Assert that two values are equal, tensors of floats within a tolerance, part by part."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), (what, type(ours))
        if theirs.is_floating_point():
            close(ours, theirs, what, tolerance)
        else:
            assert torch.equal(ours, theirs), (what, ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), what
        for key, value in theirs.items():
            same(ours[key], value, f"{what}, {key}", tolerance)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), (what, len(ours), len(theirs))
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            same(mine, other, f"{what}, {index}", tolerance)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=tolerance), what
    else:
        assert ours == theirs, (what, ours, theirs)


@cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return gpt2_style()


@cache
def _parts(variant: str) -> tuple[dict[str, PreTrainedModel], dict[str, Any]]:
    models = tiny_pair(variant, seed=1, vocab_size=len(_tokenizer()))
    known = "HookedTransformer" in dir(transformer_lens)
    return models, {
        name: hooked_model(variant, model, _tokenizer()) if known else None
        for name, model in models.items()
    }


def hooked_pair(variant: str) -> HookedPair:
    """The models of one variant: the HookedTransformers built once per session (reset what a test
    changes on them), the grafted model anew."""
    models, hooked = _parts(variant)
    reader = copy.deepcopy(_tokenizer())
    model = GraftedTransformer.from_pretrained(models, tokenizer=reader, check=False, verbose=False)
    return HookedPair(variant, model, hooked, reader)
