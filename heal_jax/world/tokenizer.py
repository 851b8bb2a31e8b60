"""The tokenizer of the built-in world: a real `tokenizers` file whose digits know their place.

A digit's token carries its place value (3 in 1203 is "3 of the units"), written by the normaliser as a superscript
letter and removed again by the decoder, so that text in and text out are plain numbers. Small transformers learn
column arithmetic only when digits of equal place are easy to find: the idea of Abacus embeddings (McLeish et al.,
arXiv 2405.17399), moved into the vocabulary so that any decoder can use it.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

PLACES = "abcdefghijklmn"  # units, tens, ... ; also the labels of the columns in a solution
TAGS = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿ"
PAD, UNK, END, USER, ASSISTANT = "<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["State", " the", " final", " answer", " to", " following", " arithmetic", " problem", "The", " is", "Hint"]
WORDS += ["As", " hint", " says", "What", "Add", "Compute"]


def build() -> Tokenizer:
    """Vocabulary: special tokens, printable ASCII, tagged digits, summands, column labels, a few words."""
    digits = [f"{d}{tag}" for tag in TAGS for d in range(10)]
    pieces = [PAD, UNK, END, USER, ASSISTANT, "\n\n", "\n", *map(chr, range(32, 127)), *TAGS, *digits]
    pieces += [f"+{d}{TAGS[0]}" for d in range(10)]
    pieces += [f"{place}: " for place in PLACES] + [": ", " + ", " - ", " =", "\\boxed{", *WORDS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], ignore_merges=True, unk_token=UNK))
    # Highest place first: what is left of a tagged digit is then never taken for the end of a number.
    tag = [
        normalizers.Replace(Regex(rf"(?<=[0-9])(?=[0-9]{{{place}}}(?![0-9{TAGS}]))"), TAGS[place])
        for place in reversed(range(len(TAGS)))
    ]
    tokenizer.normalizer = normalizers.Sequence(tag)
    pattern = rf"\n+|[{PLACES}]: |: | [+=-] ?|\+[0-9][{TAGS}]?|[0-9][{TAGS}]?| ?[A-Za-z]+|\\boxed\{{|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex(f"[{TAGS}]"), ""), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, UNK, END, USER, ASSISTANT)])
    return tokenizer


def save(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build().save(str(folder / "tokenizer.json"))
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
