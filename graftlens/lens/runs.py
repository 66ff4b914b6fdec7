"""What all lens functions share: the runs to look into, prompts in chunks, and rows of places."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftlens.components import suggest
from graftlens.graft import At, Graft, Grafts, named_grafts
from graftlens.model.cache import GraftedCache
from graftlens.model.grafted import GraftedTransformer, Input
from graftlens.model.inputs import Batch
from graftlens.prompts import PromptError, Tokenized, continuation

#: Prompts that run together; what is kept of them is one cache a run.
CHUNK = 8


@dataclass(frozen=True)
class Runs:
    """Named grafts, with the two runs that the others are held against among them.

    Attributes:
        grafts: name -> graft; the base alone first, then one source everywhere, then the rest.
        base: the name of the run without a graft.
        full: the name of the run that is one source everywhere.
    """

    grafts: Mapping[str, Graft]
    base: str
    full: str

    @classmethod
    def of(
        cls, model: GraftedTransformer, grafts: Grafts | None, full: Graft | str | None
    ) -> "Runs":
        """The base (PRE) and one source everywhere (SFT), and `grafts`.

        Those of `grafts` that are one of the two keep the names they have there.

        Raises:
            ValueError: a model of several finetuned sources, of which `full` must name one, or a
                graft that is no graft.
        """
        given = {} if grafts is None else named_grafts(grafts)
        if full is None:
            if len(model.sources) != 2:
                raise ValueError(
                    f"this model has the sources {' '.join(model.sources)}: say which one the runs "
                    f'are held against, such as full="{model.sources[-1]} @ all".'
                )
            full = Graft.rule(model.sources[1])
        full = Graft.parse(full) if isinstance(full, str) else full
        names = []
        for usual, graft in (("PRE", Graft()), ("SFT", full)):
            known = next((name for name, g in given.items() if g == graft), None)
            names.append(known or (usual if usual not in given else str(graft)))
        first = dict(zip(names, (Graft(), full), strict=True))
        return cls(first | given, *names)

    def columns(self, name: str) -> dict[str, str]:
        """What a table says of a run."""
        return {"graft": name, "rule": str(self.grafts[name])}


@dataclass(frozen=True)
class Places:
    """Positions of the prompts of one batch, as rows.

    Attributes:
        batch: the prompts.
        prompt: per place, the row of its prompt in the batch.
        position: per place, its position in its prompt.
        rows: per place, its row in `[batch · pos]`.
        table: prompt (its number in the whole input), position and token of each place.
    """

    batch: Batch
    prompt: Int[np.ndarray, " place"]
    position: Int[np.ndarray, " place"]
    rows: Int[np.ndarray, " place"]
    table: pd.DataFrame

    def pick(self, x: Float[Tensor, "batch pos *width"]) -> Float[Tensor, "place *width"]:
        """The places of an activation."""
        index = torch.from_numpy(self.rows).to(x.device)
        return x.flatten(0, 1).index_select(0, index)


def chunks(
    model: GraftedTransformer, prompts: Input, at: At | str, prepend_bos: bool | None
) -> Iterator[Places]:
    """The places `at` of the prompts, a few prompts at a time, in their order.

    Raises:
        PromptError: prompts that cannot be run, or that have no such place.
        ValueError: `at` is no expression over spans.
    """
    where = At.parse(at)
    if isinstance(prompts, Batch):
        items = prompts.prompts
    else:
        items = model.batch(prompts, prepend_bos=prepend_bos).prompts
    for start in range(0, len(items), CHUNK):
        batch = model.batch(items[start : start + CHUNK])
        yield _places(model, batch, start, where)


def _places(model: GraftedTransformer, batch: Batch, first: int, where: At) -> Places:
    prompt, position, rows, tokens = [], [], [], []
    width = batch.real.shape[1]
    for row, item in enumerate(batch.prompts):
        try:
            chosen = np.flatnonzero(where.select(item.runs, len(item)))
        except ValueError as error:
            raise PromptError(f"prompt {first + row}, at={str(where)!r}: {error}") from None
        if not len(chosen):
            raise PromptError(f"prompt {first + row}: at={str(where)!r} selects no position.")
        prompt += [row] * len(chosen)
        position += chosen.tolist()
        rows += (row * width + batch.starts[row] + chosen).tolist()
        tokens += [token_text(model, item.ids[i]) for i in chosen]
    table = pd.DataFrame(
        {"prompt": first + np.array(prompt), "position": position, "token": tokens}
    )
    return Places(batch, np.array(prompt), np.array(position), np.array(rows), table)


def token_text(model: GraftedTransformer, token: int) -> str:
    """A token as text; its number where the model has no tokenizer."""
    return str(token) if model.tokenizer is None else model.to_single_str_token(token)


def target_ids(
    model: GraftedTransformer, prompts: Sequence[Tokenized], prepend_bos: bool | None
) -> list[int | None]:
    """The first token of each prompt's answer; None where a prompt has none."""
    return [
        None
        if item.prompt is None or item.prompt.answer is None
        else continuation(item, item.prompt.answer, model._tokenizer(), prepend_bos)[0]
        for item in prompts
    ]


@torch.no_grad()
def cached(
    model: GraftedTransformer, batch: Batch, graft: Graft, names: Sequence[str]
) -> GraftedCache:
    """The named activations of one run; it is unembedded only where they ask for it."""
    after = any(name.startswith(("ln_final", "unembed")) for name in names)
    kind = "logits" if after else None
    _, cache = model.run_with_cache(batch, graft=graft, return_type=kind, names_filter=list(names))
    assert isinstance(cache, GraftedCache)
    return cache


def hook_names(model: GraftedTransformer, wanted: str | Sequence[str]) -> list[str]:
    """Full hook names; a name without a module, such as `hook_resid_post`, is that of every layer.

    Raises:
        ValueError: a name that no hook has.
    """
    names: list[str] = []
    for want in [wanted] if isinstance(wanted, str) else wanted:
        found = [n for n in model.hook_dict if n == want or n.endswith(f".{want}")]
        if not found:
            short = dict.fromkeys(n.rsplit(".", 1)[-1] for n in model.hook_dict)
            raise ValueError(
                f"no hook {want!r}. Write a hook's name, or its last part for every layer: "
                f"{' '.join(short)}.{suggest(want, short)}"
            )
        names += found
    return list(dict.fromkeys(names))


def layer_of(hook: str) -> int | None:
    """The layer that a hook belongs to, None for those outside the layers."""
    return int(hook.split(".")[1]) if hook.startswith("blocks.") else None


def joined(parts: Sequence[pd.DataFrame], whole: Sequence[str] = ()) -> pd.DataFrame:
    """One table of all parts, in order; `whole` names columns of whole numbers that may be NA."""
    table = pd.concat(parts, ignore_index=True)
    return table.astype({name: "Int64" for name in whole if name in table})


def repeated(table: pd.DataFrame, columns: Mapping[str, Any]) -> pd.DataFrame:
    """`table` with further columns, values or one for all."""
    return table.assign(**dict(columns))
