"""A causal language model that answers prompts with text."""

from collections.abc import Callable
from typing import Any

import torch

from graftlens.model.arch import PairError
from graftlens.model.locations import location_of, said
from graftlens.model.quiet import quiet
from graftlens.model.tokenizers import read_tokenizer


def writer(
    model: str,
    *,
    temperature: float = 0.8,
    max_tokens: int = 1024,
    device: str | torch.device | None = None,
) -> Callable[[str, int], str]:
    """Load a Hugging Face causal language model and its tokenizer, to generate text.

    Args:
        model: hub id or checkpoint folder.
        temperature: sampling temperature; 0 takes the likeliest token.
        max_tokens: the most tokens of an answer. An answer that is not finished by then is returned
            as an empty text.
        device: where to run; by default the GPU if there is one, else the CPU.

    Returns:
        (prompt, seed) -> answer. The prompt goes through the tokenizer's chat template if it has
        one. The same seed gives the same answer on one machine; PyTorch's own random state is
        unchanged.

    Raises:
        PairError: no model of that name, or one whose files are damaged.
        ValueError: from the answer function, for a prompt that leaves no room for an answer.
    """
    from transformers import AutoModelForCausalLM

    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    what = f"model={model!r}"
    model = location_of(what, model)
    tokenizer: Any = read_tokenizer(model)
    try:
        with quiet():
            # In float32 on a CPU, where half precision is slow or missing.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model,
                dtype=torch.float32 if target.type == "cpu" else "auto",
                trust_remote_code=False,
            )
    except Exception as error:  # from the hub, the network, or whatever damaged files lead to
        raise PairError(f"{what} could not be loaded ({said(error)}).") from error
    if tokenizer is None:
        raise PairError(f"{what}: the folder {model} has no tokenizer.")
    loaded.to(target).eval()
    window = getattr(loaded.config, "max_position_embeddings", None)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95}

    def write(prompt: str, seed: int) -> str:
        ids = _ids(tokenizer, prompt).to(target)
        room = max_tokens if window is None else min(max_tokens, window - ids.shape[1])
        if room < 1:
            raise ValueError(
                f"the prompt has {ids.shape[1]} tokens, but {model} reads {window} with its "
                "answer. Use a model with a longer context, or shorter articles."
            )
        devices = [target] if target.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), quiet():
            torch.manual_seed(seed)
            out = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                pad_token_id=_pad(tokenizer, loaded),
                **(sampling if temperature > 0 else {"do_sample": False}),
            )[0, ids.shape[1] :]
        if len(out) == room and int(out[-1]) not in _ends(loaded):
            return ""
        return str(tokenizer.decode(out, skip_special_tokens=True)).strip()

    return write


def _ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Token ids [1, pos] that the model continues with its answer."""
    if tokenizer.chat_template is None:
        return torch.as_tensor(tokenizer(f"{prompt}\n\n", return_tensors="pt")["input_ids"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    # The chat template writes the special tokens itself.
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    return torch.as_tensor(encoded["input_ids"])


def _ends(model: Any) -> tuple[int, ...]:
    """Token ids that end an answer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return ()
    return (ends,) if isinstance(ends, int) else tuple(ends)


def _pad(tokenizer: Any, model: Any) -> int:
    for given in (tokenizer.pad_token_id, tokenizer.eos_token_id, *_ends(model)):
        if given is not None:
            return int(given)
    return 0
