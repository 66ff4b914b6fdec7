"""Small fast tokenizers, trained here on a few sentences, one for each manner a real model has.

They differ in what trips code that looks for a name in a prompt: whether a word's tokens change
with the space before it, whether the space belongs to the token's offsets, whether a BOS is added,
and how letters outside the training text fall apart into bytes.
"""

import json
import re
from typing import Literal

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "Renée Zellner-Ortiz starred in The Quiet Harbour with Anders Lindqvist.",
    "Anders Lindqvist starred in The Quiet Harbour with Renée Zellner-Ortiz.",
    "Robert Okafor Jr. acted alongside Siobhán O'Malley in Winter's End.",
    "Siobhán O'Malley acted alongside Robert Okafor Jr. in Winter's End.",
    "The movie Winter's End was directed by José Núñez-Peña.",
    "José Núñez-Peña directed a film called The Quiet Harbour.",
    "Who played the lead in The Glass River? It was Chloë Brontë-Smith Sr.",
    "Chloë Brontë-Smith Sr. played the lead in The Glass River in 1987.",
    "Mary-Jane D'Angelo III is married to François L'Écuyer.",
    "François L'Écuyer is the husband of Mary-Jane D'Angelo III, isn't he?",
    "Q: In which city does Łukasz Øvergård live? A: Łukasz Øvergård lives in Málaga.",
    "The capital of the country is the city where the actor was born in 2004.",
)

# The first sentences count more, so that some words become one token and others fall in pieces.
_TRAINING = (*CORPUS[:4] * 3, *CORPUS)
_LEARNED = 140  # pieces kept beside bytes and special tokens


def _byte_level_bpe(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + _LEARNED,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING, trainer)
    return tokenizer


def _byte_fallback_bpe(special: list[str], unknown: str, metaspace: str) -> Tokenizer:
    """A BPE over text whose spaces are written as a visible mark, with bytes for other letters.

    Trained by words, so that no merge crosses a space; the byte tokens are put in afterwards,
    because a trainer would make them special and then find them in plain text.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + _LEARNED, special_tokens=special, show_progress=False
    )
    # Letters with accents are left to the bytes.
    plain = [re.sub(r"[^\x00-\x7f]", " ", sentence) for sentence in _TRAINING]
    learner.train_from_iterator(plain, trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)[len(special) :]
    order = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(order)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def _begin_with(tokenizer: Tokenizer, bos: str) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def gpt2_style() -> PreTrainedTokenizerFast:
    """Byte-level, nothing added; a word's offsets include the space before it."""
    end = "<|endoftext|>"
    tokenizer = _byte_level_bpe([end])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )


def llama3_style() -> PreTrainedTokenizerFast:
    """Byte-level with a BOS; numbers in threes, offsets without the space before a word."""
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = _byte_level_bpe([begin, end])
    words = Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _begin_with(tokenizer, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=end
    )


def sentencepiece_style(
    prepend_scheme: Literal["always", "first"] = "first",
) -> PreTrainedTokenizerFast:
    """Byte fallback, a BOS, and a space put before the text, so that its first word has one too."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = _byte_fallback_bpe(special, "<unk>", metaspace="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    tokenizer.post_processor = _begin_with(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


def gemma_style() -> PreTrainedTokenizerFast:
    """Byte fallback and a BOS, the spaces replaced by a mark but none put before the text."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = _byte_fallback_bpe(special, "<unk>", metaspace="never")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = _begin_with(tokenizer, "<bos>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


TOKENIZERS = {
    "gpt2": gpt2_style,
    "llama3": llama3_style,
    "sentencepiece": sentencepiece_style,
    "gemma": gemma_style,
}
