"""The tokenizers of the built-in worlds: real `tokenizers` files, of the pieces that a world's texts are made of."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

PAD, UNK, END, USER, ASSISTANT = "<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>"
ANSWER_OPEN = "\\boxed{"
PLACES = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿ"  # units, tens, ...
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build(pieces: Sequence[str], pattern: str) -> Tokenizer:
    """Vocabulary: special tokens, printable ASCII, and a world's own pieces, which `pattern` finds in a text; runs of
    newlines are pieces of their own, and what no piece holds falls into characters.
    """
    own = [PAD, UNK, END, USER, ASSISTANT, "\n\n", "\n", *map(chr, range(32, 127)), *pieces]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(own))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], ignore_merges=True, unk_token=UNK))
    split = rf"\n+|{pattern}|\\boxed\{{|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(split), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, UNK, END, USER, ASSISTANT)])
    return tokenizer


def literal(text: str) -> str:
    """A regular expression for the text itself."""
    return re.sub(r"([^A-Za-z0-9\n ])", r"\\\1", text)


def by_digit(place: int) -> str:
    """Where a digit of that place ends: units, tens, ... of a number."""
    return rf"(?<=[0-9])(?=[0-9]{{{place}}}(?![0-9{PLACES}]))"


BY_DIGIT = tuple(map(by_digit, range(len(PLACES))))


def know_places(tokenizer: Tokenizer, ends: Sequence[str] = BY_DIGIT) -> Tokenizer:
    """Let digits know their place: a digit's token carries its place value (3 in 1203 is "3 of the units"), written by
    the normaliser as a letter of `PLACES` and removed again by the decoder: text in and out is plain. Small models
    learn sums of columns only when digits of equal place are easy to find: the idea of Abacus embeddings (McLeish et
    al., arXiv 2405.17399), moved into the vocabulary so that any decoder can use it. ends: for each letter a regular
    expression for where it goes, for rows of other things; the last letters are written first.
    """
    tag = [normalizers.Replace(Regex(end), place) for end, place in reversed(list(zip(ends, PLACES)))]
    tokenizer.normalizer = normalizers.Sequence(tag)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex(f"[{PLACES}]"), ""), decoders.Fuse()])
    return tokenizer


def placed(number: str) -> str:
    """Digits with their places: 120 is 1ᶜ2ᵇ0ᵃ."""
    return "".join(f"{digit}{place}" for digit, place in zip(number, reversed(PLACES[: len(number)])))


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "unk_token": UNK,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
