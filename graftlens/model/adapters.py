"""PEFT adapters as sources: put on the base, read in parts or merged, checked against PEFT.

LoRA adapters are kept in their factors beside the base's own tensors, which all of them share
(`lora.py`); every other kind is merged in float32. PEFT only warns about tensors that a folder
lacks and drops those that it does not know, merges an adapter of one of two tied embeddings into
both, and matches a folder's patterns without a time limit. Here the first is refused, the second
is untied, and the third has a time limit.
"""

import copy
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from graftlens.folder import read_json
from graftlens.model.arch import PairError, UnsupportedArchitectureError
from graftlens.model.lora import in_parts
from graftlens.model.source import (
    Source,
    language_model,
    own_logits,
    read_transformers,
    renew_rotary,
)
from graftlens.model.tokenizers import read_tokenizer
from graftlens.model.weights import Weights, read_weights

#: `init_lora_weights` under which the base stays unchanged, or (the last two) changes in a way that
#: PEFT can repeat. The others change it by data or at random, and the folder does not record how.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora")

#: Those of them that change the base, as PEFT does again whenever it makes such an adapter.
_CHANGING_STARTS = ("pissa", "olora")

#: An embedding or a head that an adapter's file holds whole.
_TABLE = re.compile(r"\.(wte|embed_tokens|embed_in|lm_head|embed_out)\.(base_layer\.)?weight$")

#: A factor of LoRA, or the bias of its B, in an adapter's file.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_((?P<a>A\.weight|embedding_A)|B\.(weight|bias)|embedding_B)"
)

#: What PEFT puts into a pattern literally: a name, or the end of a name, without repetition.
_PLAIN = re.compile(r"[\w.^$\\-]+")

#: CPU seconds that all patterns of one adapter may take; honest ones take far less.
_PATTERN_SECONDS = 0.4


@dataclass(frozen=True)
class Base:
    """What adapters are put on.

    Attributes:
        given: what the user gave as the base.
        source: what was read of it.
        model: its model in float32 or wider, which is never changed: what is put on stands on a
            copy that has the same tensors.
    """

    given: Any
    source: Source
    model: Any

    @classmethod
    def of(cls, name: str, given: Any, source: Source) -> "Base":
        """The base for adapters.

        Args:
            name: the first source that is an adapter, for messages.
            given: what the user gave as the base.
            source: what was read of it.

        Raises:
            PairError: a base that adapters cannot be put on.
        """
        if "PeftModel" in {cls.__name__ for cls in type(given).__mro__}:
            raise PairError(
                f"source {name!r} is a PEFT adapter, and so is the base. Give as the base a "
                "model that has its adapter merged: base.merge_and_unload()."
            )
        known = isinstance(given, str | Path) or hasattr(given, "save_pretrained")
        if source.model is None or not known:
            raise PairError(
                f"source {name!r} is a PEFT adapter, and the base is a {type(given).__name__}. "
                "Adapters are applied to a checkpoint or a transformers model."
            )
        half = any(torch.finfo(p.dtype).bits < 32 for p in source.model.parameters())
        return cls(given, source, widened(copy.deepcopy(source.model)) if half else source.model)

    @property
    def called(self) -> str:
        """A checkpoint's location, or what a model says that it was loaded from; empty if that is
        unknown."""
        if isinstance(self.given, str | Path):
            return str(self.given)
        return str(getattr(self.given.config, "_name_or_path", "") or "")

    @cached_property
    def weights(self) -> Weights:
        """The model's own tensors, as in `source` but for their dtype."""
        return read_weights(dict(language_model(self.model).state_dict()), self.source.arch)

    def copy(self, config: Any) -> Any:
        """A model for an adapter of this `config` to be put on, around the same tensors if PEFT
        then leaves them as they are."""
        start = str(getattr(config, "init_lora_weights", "")).lower()
        if _kind(config) not in ("LORA", "TRAINABLE_TOKENS") or start in _CHANGING_STARTS:
            return copy.deepcopy(self.model)
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.model.parameters()
        }
        return copy.deepcopy(self.model, shared | {id(b): b for b in self.model.buffers()})


def refuse_as_base(name: str) -> None:
    """Refuse an adapter in the place of the base.

    Raises:
        PairError: always.
    """
    raise PairError(
        f"source {name!r}, the base, is a PEFT adapter. Put the model that it adapts first: "
        '{"pre": base, "sft": adapter}.'
    )


def read_adapter(name: str, folder: Path, base: Base) -> Source:
    """An adapter's folder as a source: the base's tensors, and what the adapter adds to them.

    Args:
        name: the source's name.
        folder: where `save_pretrained` wrote the adapter.
        base: the model to apply it to.

    Raises:
        PairError: an adapter that is damaged or that does not fit the base.
        UnsupportedArchitectureError: a kind or option of adapter whose merge is not exact, or
            tensors that are missing or unknown.
    """
    config = read_settings(name, folder)
    _check_weights(name, folder, needed=True)
    stated = config.base_model_name_or_path
    if (
        base.called
        and isinstance(stated, str)
        and stated
        and Path(stated).name != Path(base.called).name
    ):
        warnings.warn(
            f"source {name!r}: the adapter {folder} says that it was trained on {stated}; here it "
            f"is applied to {base.called}. Its numbers are meaningful only if these are the same "
            "weights.",
            stacklevel=2,
        )
    tokenizer = read_tokenizer(str(folder))
    adapter = _put_on(name, folder, config, base.copy(config))
    source = read_peft(name, adapter, f"{folder} ({_kind(config)} adapter)", base)
    dtypes = base.source.dtypes or tuple({t.dtype for t in base.source.weights.values()})
    return replace(source, dtypes=dtypes, tokenizer=tokenizer)


def preview_adapter(name: str, folder: Path) -> tuple[Any, int, int | None]:
    """An adapter's tokenizer, or None, how many rows the tables have that it brings whole (0
    without any), and the largest rank that it can change a matrix by (None where that is not known
    or matrices are changed as a whole); its settings and, if there are any, the headers of its
    weights are checked.

    Raises:
        PairError: as `read_adapter`, as far as that is possible without the base and the weights.
        UnsupportedArchitectureError: likewise.
    """
    config = read_settings(name, folder)
    _check_weights(name, folder, needed=False)
    rows, rank = 0, None
    if (safe := folder / "adapter_model.safetensors").is_file():
        with safe_open(safe, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        tables = [shape for key, shape in shapes.items() if _TABLE.search(key)]
        rows = max((shape[0] for shape in tables if len(shape) == 2), default=0)
        rank = _rank(config, shapes)
    return read_tokenizer(str(folder)), rows, rank


def _rank(config: Any, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The largest rank that plain LoRA's factors of these shapes can change a matrix by; None for
    whatever changes matrices as a whole: other tensors, merged variants, starts that move the base.
    """
    variants = [f.name for f in fields(config) if f.metadata.get("is_lora_variant")]
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if start in _CHANGING_STARTS or any(getattr(config, name) for name in variants):
        return None
    ranks: dict[str, int] = {}
    for key, shape in shapes.items():
        if (factor := _FACTOR.fullmatch(key)) is None:
            return None
        if factor["a"]:
            # A parameter's factors and its module's add up in one matrix.
            place = factor["module"].replace(".base_layer", "")
            ranks[place] = ranks.get(place, 0) + shape[0]
    return max(ranks.values(), default=None)


def read_settings(name: str, folder: Path) -> Any:
    """An adapter's PEFT config, checked as far as possible without the base and its weights.

    Raises:
        PairError: missing or damaged settings, or the package peft is missing.
        UnsupportedArchitectureError: a kind or option of adapter whose merge is not exact.
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise PairError(
            f"source {name!r} is a PEFT adapter, which needs the package peft: "
            'pip install "graftlens[peft]".'
        ) from None
    place = folder / "adapter_config.json"
    try:
        given = read_json(place, "Save the adapter again, or download the file again.")
    except ValueError as error:
        raise PairError(f"source {name!r}: {error}") from None
    if not isinstance(given, dict) or not isinstance(given.get("peft_type"), str):
        raise PairError(
            f"source {name!r}: {place} does not say which kind of adapter it is (peft_type), as "
            "PEFT's save_pretrained writes it. Save the adapter again, or download the file again."
        )
    kind = given["peft_type"]
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UnsupportedArchitectureError(
            f"source {name!r}: {place} has peft_type {kind!r}, which the installed peft does not "
            f"know. It knows: {' '.join(sorted(map(str, PEFT_TYPE_TO_CONFIG_MAPPING)))}."
        )
    _check_kind(name, kind, str(folder))
    known = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    names = {field.name for field in fields(known)} | {"runtime_config"}
    # A newer PEFT writes all its options; those that are off change nothing.
    strange = {key: value for key, value in given.items() if key not in names and value}
    if strange:
        raise UnsupportedArchitectureError(
            f"source {name!r}: {place} has options that the installed peft does not know: "
            f"{', '.join(f'{k}={v!r}'[:80] for k, v in list(strange.items())[:5])}. "
            "Install the version of peft that the adapter was saved with "
            f"({given.get('peft_version') or 'or a newer one'})."
        )
    task = given.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedArchitectureError(
            f"source {name!r}: the adapter {folder} was trained for the task {task}, but a source "
            "must be a causal language model (CAUSAL_LM)."
        )
    start = given.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    if kind == "LORA" and not (start is None or start in _STARTS):
        raise UnsupportedArchitectureError(
            f"source {name!r}: the adapter {folder} began with init_lora_weights={start!r}, which "
            "changes the base's weights in a way that the folder does not record. Save it as a "
            "plain adapter of the original base (PEFT's path_initial_model_for_weight_conversion), "
            "or give the merged model."
        )
    if given.get("layer_replication"):
        raise UnsupportedArchitectureError(
            f"source {name!r}: the adapter {folder} repeats layers of the base "
            f"(layer_replication={given['layer_replication']!r}), which makes a different "
            "architecture."
        )
    with _told(name, f"PEFT could not read {place}"):
        given = {key: value for key, value in given.items() if key in names}
        given.pop("runtime_config", None)
        return known.from_peft_type(**known.check_kwargs(**given))


def widened(model: Any) -> Any:
    """Half-precision weights in float32: adding an adapter in half precision would round it off."""
    half = any(torch.finfo(p.dtype).bits < 32 for p in model.parameters())
    if not half:
        return model
    renew_rotary(model.float())
    return model


def copied(adapter: Any) -> Any:
    """A PeftModel of one's own."""
    # Layers that PEFT ties keep what they were made from, which torch may refuse to copy.
    made = [getattr(module, "kwargs", None) or {} for module in adapter.modules()]
    return copy.deepcopy(adapter, {id(k["tied_adapter"]): {} for k in made if "tied_adapter" in k})


def read_peft(name: str, adapter: Any, origin: str, base: Base | None = None) -> Source:
    """A PeftModel with the adapters that are active in it, in parts if that is possible, else
    merged.

    Args:
        name: the source's name.
        adapter: the PeftModel; it stays unchanged.
        origin: what it is, for messages.
        base: what it was put on, whose tensors the source shares; without it, the source has
            tensors of its own.

    Raises:
        PairError: an adapter that PEFT cannot merge.
        UnsupportedArchitectureError: a kind of adapter that has nothing to merge, or whose merged
            weights give different logits from the adapter itself.
    """
    active = adapter.active_adapters
    kinds = [
        _kind(adapter.peft_config[each])
        for each in ([active] if isinstance(active, str) else active)
    ]
    for kind in kinds:
        _check_kind(name, kind, origin)
    model = adapter.get_base_model()
    parts = in_parts(name, language_model(model))
    if parts is None:
        source = replace(_merged(name, adapter, origin), merged=" and ".join(dict.fromkeys(kinds)))
    else:
        source = read_transformers(
            name,
            model,
            origin,
            copied=False,
            parts=parts if base is not None else parts.cloned(),
            logits=own_logits(adapter, copied),
        )
    if base is None:
        return source
    weights = {
        site: base.source.weights[site] if _same(tensor, base.weights.get(site)) else tensor
        for site, tensor in source.weights.items()
    }
    return replace(source, weights=weights)


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are one, or hold the same."""
    if other is None or tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    memory = [(t.data_ptr(), t.stride()) for t in (tensor, other)]
    return memory[0] == memory[1] or torch.equal(tensor, other)


def _merged(name: str, adapter: Any, origin: str) -> Source:
    """A PeftModel merged in float32, which is proved against PEFT's own forward."""
    ours = widened(copied(adapter)).eval()
    unmerged = own_logits(adapter, copied)
    with _told(name, f"PEFT could not merge {origin}"):
        _untie(ours)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer")
            merged = ours.merge_and_unload()
    source = read_transformers(name, merged, f"{origin}, merged", copied=False)
    draw = torch.Generator().manual_seed(0)
    length = min(source.arch.n_ctx, 24)
    tokens = torch.randint(source.arch.d_vocab, (2, length), generator=draw)
    dtype = next(merged.parameters()).dtype
    with _told(name, f"PEFT could not run {origin}"):
        theirs = unmerged(tokens, dtype)
    assert source.logits is not None
    ours = source.logits(tokens, dtype)
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-9))
    # Values that are not finite are reported by name when the pair is checked.
    if off > 1e-4:
        raise UnsupportedArchitectureError(
            f"source {name!r}: merged into the weights, {origin} gives different logits than as "
            f"an adapter (off by {off:.1e}, relative). Adapters that are switched off, that repeat "
            "layers or that depend on the prompt cannot be merged exactly."
        )
    return replace(source, logits=unmerged)


# -- the adapter's folder ----------------------------------------------------------------------


def _kind(config: Any) -> str:
    """PEFT's name for a kind of adapter."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def _check_kind(name: str, kind: str, origin: str) -> None:
    """Refuse an adapter that does not change weights."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "merge_and_unload"):
        raise UnsupportedArchitectureError(
            f"source {name!r}: {origin} is an adapter of the kind {kind}, which trains additions "
            "to the prompt or to the layers' outputs, and not weights that could be grafted. "
            "Adapters that PEFT can merge into the weights, such as LORA, are supported."
        )


def _check_weights(name: str, folder: Path, *, needed: bool) -> None:
    """Check that the folder holds weights, if they are `needed`, complete as far as the headers
    tell."""
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.is_file():
        damaged = f"the weights {safe} are damaged; save or download them again"
        with _told(name, damaged), safe_open(safe, framework="pt"):
            pass
    elif needed and not pickled.is_file():
        raise PairError(
            f"source {name!r}: the adapter's folder {folder} has no weights "
            f"({safe.name} or {pickled.name}). Save the adapter again, or download the file."
        )


def _put_on(name: str, folder: Path, config: Any, model: Any) -> Any:
    """A PeftModel of the model and of all of the folder's tensors."""
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    renamed = getattr(model, "_checkpoint_conversion_mapping", None)
    with _told(name, f"the weights in {folder} are damaged; save or download them again"):
        tensors = load_peft_weights(str(folder), device="cpu", key_mapping=renamed)
    if isinstance(tensors, dict):
        _resize(model, tensors)
    _check_token_indices(name, folder, config, model)
    with _told(name, f"the adapter {folder} does not fit the base"):
        _bound_patterns(name, folder, config, [key for key, _ in model.named_modules() if key])
        config.inference_mode = True
        with warnings.catch_warnings():
            # Tied embeddings, which PEFT warns about, are untied before the merge.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            # PEFT asks by a name that transformers has renamed.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapter = PeftModel(model, config)
        state = adapter.state_dict()
        wanted: dict[str, Tensor] = get_peft_model_state_dict(
            adapter, state_dict=state, save_embedding_layers=False
        )
    known = {**state, **wanted}
    _check_tensors(name, folder, tensors, known)
    _separate(adapter, [known[key] for key in tensors if key in known])
    with _told(name, f"the adapter {folder} does not fit the base"):
        try:
            found = set_peft_model_state_dict(adapter, tensors)
            missing, unknown = found.missing_keys, found.unexpected_keys
        except (
            KeyError
        ) as error:  # a whole module that is saved along with the adapter's own tensors
            missing, unknown = [error.args[0]], []
        except RuntimeError as error:
            raise PairError(_misfit(name, folder, tensors, known)) from error
    spelled = {id(tensor): key for key, tensor in wanted.items()}
    lacking = {spelled.get(id(state.get(key)), "" if key in state else key) for key in missing}
    held = set(map(id, state.values()))
    # Some kinds save derived values, such as a mask's indices.
    lacking |= {key for key, tensor in wanted.items() if id(tensor) not in held} - tensors.keys()
    for problem, keys in (("lacks", lacking - {""}), ("holds unused", set(unknown))):
        if keys:
            listed = sorted(keys)
            raise UnsupportedArchitectureError(
                f"source {name!r}: the adapter {folder} {problem} tensors: {', '.join(listed[:5])}"
                f"{' …' if len(listed) > 5 else ''}. graftlens refuses what it cannot run exactly: "
                "save the adapter with the save_pretrained of PEFT's model, without wrappers."
            )
    return adapter


def _resize(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a model's tables as many rows as those that an adapter brings whole; the base's own keep
    their rows. Without all of them there is none for the tokens that were added."""
    tables = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = [name for name, module in model.named_modules() if module in tables]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ends = ("weight", "base_layer.weight")
    rows = [
        {len(tensors[key]) for end in ends if (key := f"base_model.model.{name}.{end}") in tensors}
        for name in names
    ]
    counts = set().union(*rows)
    if len(counts) == 1 and (tied or all(rows)):
        (count,) = counts
        if count > model.get_input_embeddings().num_embeddings:
            with torch.random.fork_rng(devices=[]):
                model.resize_token_embeddings(count, mean_resizing=False)


def _check_token_indices(name: str, folder: Path, config: Any, model: Any) -> None:
    """Refuse single trained tokens for which the base has no row."""
    rows = model.get_input_embeddings().num_embeddings
    for option in ("trainable_token_indices", "token_indices"):
        given = getattr(config, option, None) or []
        listed = given.values() if isinstance(given, Mapping) else [given]
        odd = [token for tokens in listed for token in tokens if token not in range(rows)]
        if odd:
            here = f"source {name!r}: the adapter {folder} has {option} with {odd[0]!r}"
            advice = "Ids count from 0: write them so."
            if all(isinstance(token, int) and token >= rows for token in odd):
                advice = (
                    "Where finetuning added tokens, give a base that has rows for them: "
                    f"base.resize_token_embeddings({max(odd) + 1})."
                )
            raise PairError(f"{here}, but the base has the tokens 0 to {rows - 1}. {advice}")


def _separate(adapter: Any, written: Iterable[Tensor]) -> None:
    """Give an adapter tensors of its own where the base's would be written to (biases, tables)."""
    targets = {tensor.data_ptr() for tensor in written}
    for parameter in adapter.parameters():
        if parameter.data_ptr() in targets:
            parameter.data = parameter.data.clone()


def _check_tensors(name: str, folder: Path, tensors: Any, wanted: Mapping[str, Tensor]) -> None:
    """Refuse a file that holds anything but floating-point tensors by name."""
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise PairError(
            f"source {name!r}: the weights in {folder} are not tensors by name. Save the adapter "
            "with PEFT's save_pretrained."
        )
    for key, tensor in tensors.items():
        asked = wanted.get(key)
        whole = asked is not None and not asked.is_floating_point()
        if not whole and not (tensor.is_floating_point() and torch.finfo(tensor.dtype).bits >= 16):
            raise PairError(
                f"source {name!r}: {key} in {folder} is {tensor.dtype}: quantised weights cannot "
                "be grafted exactly."
            )


def _misfit(
    name: str, folder: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> str:
    """The message about tensors with a different shape from what the base and the adapter's config
    imply."""
    here = f"source {name!r}: the adapter {folder} does not fit the base"
    for key, tensor in tensors.items():
        if key in wanted and tensor.shape != wanted[key].shape:
            told = (
                f"{here}: {key} has shape {tuple(tensor.shape)}; the base and the adapter's config "
                f"say {tuple(wanted[key].shape)}. "
            )
            if re.search(r"embed|lm_head|wte", key) and tensor.shape[1:] == wanted[key].shape[1:]:
                return (
                    f"{told}Where finetuning added tokens, resize the base's embeddings to match: "
                    f"base.resize_token_embeddings({len(tensor)})."
                )
            return f"{told}Give the model that it was trained on as the base."
    return f"{here}: its tensors have different shapes. Give the model that it was trained on."


def _untie(adapter: Any) -> None:
    """Make sure that an adapter of one of two tied embeddings is merged into that one alone."""
    wrapped = adapter.get_base_model().get_input_embeddings().modules()
    weight = next(module for module in wrapped if isinstance(module, nn.Embedding)).weight
    tied = [(k, m) for k, m in adapter.named_modules() if m._parameters.get("weight") is weight]
    if any(key.endswith((".base_layer", ".original_module")) for key, _ in tied):
        for _, module in tied[1:]:
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


@contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    """Another library's exception as one sentence that says what it was about."""
    try:
        yield
    except (PairError, UnsupportedArchitectureError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise PairError(f"source {name!r}: {what} ({type(error).__name__}: {reason}).") from error


# -- patterns ----------------------------------------------------------------------------------


def _bound_patterns(name: str, folder: Path, config: Any, modules: list[str]) -> None:
    """Put the names of the base's modules in the place of every pattern that PEFT would match.

    A pattern comes with the adapter, and Python's own matcher can take longer than the age of
    the universe; PEFT is given the names that it matches.
    """
    matcher = _Matcher(name, folder)
    for option in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = getattr(config, option, None)
        if isinstance(value, str) and value.lower() != "all-linear":
            # PEFT also checks whether a pattern matches these two alone, to tie what is put on
            # them.
            found = matcher.names(option, value, [*modules, "embed_tokens", "lm_head"])
            setattr(config, option, "|".join(map(re.escape, found)))
            if option == "target_modules" and not set(found) & set(modules):
                raise PairError(
                    f"source {name!r}: target_modules={value!r} of the adapter {folder} matches no "
                    "module of the base. Give the model that it was trained on as the base."
                )
        elif value:
            # In a list PEFT compares names; anything that cannot be a name matches nothing.
            setattr(config, option, [each for each in value if _PLAIN.fullmatch(str(each))])
    for option in ("modules_to_save", "layers_pattern", "target_parameters"):
        value = getattr(config, option, None) or []
        for each in [value] if isinstance(value, str) else value:
            if not _PLAIN.fullmatch(str(each)):
                raise UnsupportedArchitectureError(
                    f"source {name!r}: {option} of the adapter {folder} has {each!r}, which is not "
                    "a module's name. Write the names of the modules."
                )
    for option, value in vars(config).items():
        if option.endswith("_pattern") and isinstance(value, dict):
            bounded: dict[str, Any] = {}
            for key, each in value.items():
                # PEFT looks for the pattern at the end of a module's name, the first one wins.
                at_end = rf"(?:.*\.)?(?:{key})"
                plain = _PLAIN.fullmatch(key)
                for end in [key] if plain else matcher.names(option, at_end, modules):
                    bounded.setdefault(end, each)
            setattr(config, option, bounded)


class _Matcher:
    """Full matches of patterns from one adapter, within a bound for all of them."""

    def __init__(self, name: str, folder: Path) -> None:
        self._where = f"source {name!r}: the adapter {folder}"
        self._left = _PATTERN_SECONDS

    def names(self, option: str, pattern: str, modules: Iterable[str]) -> list[str]:
        """The modules whose whole name matches."""
        import regex  # its matcher stops when told to

        try:
            re.compile(pattern)
            compiled = regex.compile(pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise PairError(
                f"{self._where} has {option}={pattern[:80]!r}, which is not a pattern ({error})."
            ) from None
        found = []
        for module in modules:
            begun = time.process_time()
            try:
                if compiled.fullmatch(module, timeout=self._left):
                    found.append(module)
            except TimeoutError:
                raise PairError(
                    f"{self._where} has {option}={pattern[:80]!r}, which takes too long to match. "
                    "Write the names of the modules into its adapter_config.json."
                ) from None
            self._left = max(0.01, self._left - (time.process_time() - begun))
        return found
