"""The tokenizers of the built-in worlds: real `tokenizers` files, of the pieces that a world's texts are made of."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

PAD, UNK, END, USER, ASSISTANT = "<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>"
ANSWER_OPEN = "\\boxed{"
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
