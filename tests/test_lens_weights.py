"""The weight difference, against numpy on Hugging Face's own parameters."""

import copy
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from conftest import MakeTiny
from families import tiny_model
from lensoracle import columns, module, n_layers
from reference import MODEL_COMPONENTS, components_of, n_heads_of
from transformers import PreTrainedModel

from graftlens.lens import weight_difference
from graftlens.model.grafted import GraftedTransformer

COLUMNS = [
    *("source", "base", "component", "layer", "parameter", "entries"),
    *("frobenius", "relative_frobenius", "spectral", "relative_spectral"),
    *("effective_rank", "stable_rank", "share_changed"),
]


def _tensors(model: PreTrainedModel, component: str, layer: int | None) -> dict[str, np.ndarray]:
    """A component's weight [out, in] and bias, cut out of its module by hand."""
    found = module(model, component, layer)
    assert found is not None
    weight, bias = reference._weight_and_bias(found)
    rows = [slice(None)]
    if component in ("q", "k", "v"):
        heads = range(n_heads_of(model, component) or 0)
        rows = [columns(model, component, head) for head in heads]
    elif component in ("mlp_in", "mlp_gate"):
        rows = [columns(model, component, None)]
    return {
        part: np.concatenate([x[r].detach().double().numpy() for r in rows])
        for part, x in (("weight", weight), ("bias", bias))
        if x is not None
    }


def _measures(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    delta = after - before
    values = np.linalg.svd(np.atleast_2d(delta), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return {
        "entries": delta.size,
        "frobenius": np.sqrt((delta**2).sum()),
        "relative_frobenius": np.sqrt((delta**2).sum() / (before**2).sum()),
        "spectral": values[0],
        "relative_spectral": values[0] / np.linalg.norm(np.atleast_2d(before), 2),
        "effective_rank": np.prod(shares**-shares),
        "stable_rank": (values**2).sum() / values[0] ** 2,
        "share_changed": np.count_nonzero(delta) / delta.size,
    }


def _model(sources: Mapping[str, PreTrainedModel]) -> GraftedTransformer:
    return GraftedTransformer.from_pretrained(sources, check=False, verbose=False)


def _row(table: pd.DataFrame, component: str, layer: int | None, part: str) -> pd.Series:
    there = table["layer"].isna() if layer is None else table["layer"] == layer
    rows = table[(table["component"] == component) & there & (table["parameter"] == part)]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.mark.parametrize(
    "variant",
    ["gpt2", "gpt2-untied", "neox-parallel", "phi3", "llama-biased", "gemma3", "olmo", "olmo2"],
)
def test_every_row(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    table = weight_difference(t.model)
    assert list(table.columns) == COLUMNS
    assert set(table["source"]) == {"sft"}
    assert set(table["base"]) == {"pre"}
    assert str(table["layer"].dtype) == "Int64"
    pre, sft = t.sources["pre"], t.sources["sft"]
    rows = 0
    for component in components_of(pre):
        outside = component in MODEL_COMPONENTS
        for layer in [None] if outside else range(n_layers(pre)):
            before, after = (_tensors(m, component, layer) for m in (pre, sft))
            for part in before:
                row = _row(table, component, layer, part)
                for name, value in _measures(before[part], after[part]).items():
                    assert row[name] == pytest.approx(value, rel=1e-6), (component, layer, name)
                rows += 1
    assert rows == len(table)


@pytest.mark.parametrize("sizes", [(3.0, 3.0), (4.0, 1.0)])
def test_a_change_of_low_rank(sizes: tuple[float, float]) -> None:
    """As LoRA makes it: two directions, whatever the matrix's size and float32's rounding."""
    pre = tiny_model("llama", 1)
    sft = copy.deepcopy(pre)
    draw = torch.randn(64, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out, into = (torch.linalg.qr(part)[0] for part in (draw[:24], draw[24:]))
    with torch.no_grad():
        change = out @ torch.diag(torch.tensor(sizes, dtype=torch.float64)) @ into.T
        sft.model.layers[1].mlp.down_proj.weight += change
    row = _row(weight_difference(_model({"pre": pre, "sft": sft})), "mlp_out", 1, "weight")
    a, b = (size / sum(sizes) for size in sizes)
    assert row["effective_rank"] == pytest.approx(a**-a * b**-b, abs=1e-3)
    assert row["stable_rank"] == pytest.approx(1 + (b / a) ** 2, abs=1e-4)
    assert row["spectral"] == pytest.approx(sizes[0], rel=1e-5)
    assert row["frobenius"] == pytest.approx((sizes[0] ** 2 + sizes[1] ** 2) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_one_entry_is_one_direction(shape: str) -> None:
    pre = tiny_model("llama", 1)
    sft = copy.deepcopy(pre)
    name = "up_proj" if shape == "tall" else "down_proj"
    with torch.no_grad():
        getattr(sft.model.layers[0].mlp, name).weight[3, 5] += 2.0
    table = weight_difference(_model({"pre": pre, "sft": sft}))
    row = _row(table, "mlp_in" if shape == "tall" else "mlp_out", 0, "weight")
    assert row["share_changed"] == 1 / (24 * 40)
    assert row["entries"] == 24 * 40
    assert row["spectral"] == pytest.approx(2.0, rel=1e-6)
    assert row["effective_rank"] == pytest.approx(1.0, abs=1e-5)
    assert row["stable_rank"] == pytest.approx(1.0)
    others = table.drop(index=row.name)
    zero = ["frobenius", "relative_frobenius", "spectral", "relative_spectral"]
    zero += ["effective_rank", "stable_rank", "share_changed"]
    assert (others[zero] == 0).all().all()


def test_shares_count_entries_of_any_size() -> None:
    pre = tiny_model("gpt2", 1)
    sft = copy.deepcopy(pre)
    with torch.no_grad():
        sft.transformer.h[2].attn.c_attn.weight[:, :24][0, :7] += 1e-3  # 7 entries of q
        sft.transformer.h[2].attn.c_attn.bias[-24:] *= -1.0  # all of v's bias
        sft.transformer.h[0].ln_1.weight[:6] += 1e-6
    table = weight_difference(_model({"pre": pre, "sft": sft}))
    assert _row(table, "q", 2, "weight")["share_changed"] == 7 / 24**2
    for component in ("k", "v"):
        assert _row(table, component, 2, "weight")["share_changed"] == 0
    bias = pre.transformer.h[2].attn.c_attn.bias[-24:].double().numpy()
    row = _row(table, "v", 2, "bias")
    assert row["share_changed"] == 1
    assert row["relative_frobenius"] == pytest.approx(2.0)
    assert row["frobenius"] == row["spectral"] == pytest.approx(2 * np.linalg.norm(bias))
    assert row["effective_rank"] == row["stable_rank"] == 1.0
    assert _row(table, "q", 2, "bias")["share_changed"] == 0
    assert _row(table, "ln1", 0, "weight")["share_changed"] == 6 / 24
    assert _row(table, "ln1", 0, "bias")["share_changed"] == 0


def test_tied_embeddings_are_two_rows_of_one_tensor(tiny: MakeTiny) -> None:
    table = weight_difference(tiny("llama3-rope-tied").model)
    numbers = COLUMNS[5:]
    embed, unembed = (_row(table, c, None, "weight")[numbers] for c in ("embed", "unembed"))
    assert embed.tolist() == unembed.tolist()
    assert embed["share_changed"] == 1


def test_without_spectra(tiny: MakeTiny) -> None:
    model = tiny("gpt2").model
    table, whole = weight_difference(model, spectra=False), weight_difference(model)
    assert list(table.columns) == COLUMNS
    spectral = ["spectral", "relative_spectral", "effective_rank", "stable_rank"]
    assert table[spectral].isna().all().all()
    rest = [c for c in COLUMNS if c not in spectral]
    pd.testing.assert_frame_equal(table[rest], whole[rest])


def test_which_source_against_which(tiny: MakeTiny) -> None:
    t = tiny("gpt2", ("pre", "task", "relation"))
    for source, base in (("task", None), ("relation", "task"), ("pre", "relation")):
        table = weight_difference(t.model, source, base, spectra=False)
        assert set(table["source"]) == {source}
        assert set(table["base"]) == {base or "pre"}
        before, after = (
            _tensors(t.sources[name], "k", 1)["weight"] for name in (base or "pre", source)
        )
        row = _row(table, "k", 1, "weight")
        assert row["frobenius"] == pytest.approx(np.linalg.norm(after - before))
        assert row["relative_frobenius"] == pytest.approx(
            np.linalg.norm(after - before) / np.linalg.norm(before)
        )
    # Of a pair, the other one.
    pair = weight_difference(tiny("gpt2").model, base="sft", spectra=False)
    assert set(pair["source"]) == {"pre"}
    with pytest.raises(ValueError, match=r"sources pre task relation: .*source='relation'"):
        weight_difference(t.model)
    with pytest.raises(ValueError, match=r"source='tsk' is not a source .*task relation.*Did you"):
        weight_difference(t.model, "tsk")
    with pytest.raises(ValueError, match=r"base='base' is not a source .*pre task relation"):
        weight_difference(t.model, "task", "base")


def test_sources_of_narrow_dtype(tiny: MakeTiny) -> None:
    """Differences are taken in float64 of what is stored, also of bfloat16."""
    t = tiny("llama")
    table = weight_difference(t.model.to(torch.bfloat16))
    before, after = (
        copy.deepcopy(m).to(torch.bfloat16).model.layers[2].mlp.gate_proj.weight
        for m in t.sources.values()
    )
    row = _row(table, "mlp_gate", 2, "weight")
    wanted = _measures(before.double().numpy(), after.double().numpy())
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, rel=1e-6)
    assert wanted["share_changed"] > 0.9


def test_a_change_from_zero_is_infinite() -> None:
    pre = tiny_model("llama-biased", 1)
    sft = copy.deepcopy(pre)
    with torch.no_grad():
        pre.model.layers[0].self_attn.o_proj.bias.zero_()
    table = weight_difference(_model({"pre": pre, "sft": sft}))
    row = _row(table, "o", 0, "bias")
    assert row["relative_frobenius"] == row["relative_spectral"] == float("inf")
    assert row["frobenius"] > 0


def test_a_source_against_itself_is_refused(tiny: MakeTiny) -> None:
    with pytest.raises(ValueError, match="source='pre' is the base itself"):
        weight_difference(tiny("gpt2").model, "pre")
