"""Tokenizers of the two common kinds, through the wrapper: pieces, spans, EOS ids."""

import json
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from heal_jax.errors import InputError
from heal_jax.model.tokenizer import Tokenizer


def byte_level() -> Fast:
    """As GPT-2's and Qwen's: every byte a token, a few merges, newlines merged with a full stop."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<eos>", "<pad>", *alphabet, "ĊĊ", ".ĊĊ", "Ġa"]
    merges = [("Ċ", "Ċ"), (".", "ĊĊ"), ("Ġ", "a")]
    fast = Fast(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    return fast


def sentencepiece_like() -> Fast:
    """As Llama 2's: spaces as ▁ and stripped at the start, bytes as <0x..>."""
    pieces = ["<eos>", "<pad>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abc.\\{}x", "▁a"]
    fast = Fast(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)}, merges=[("▁", "a")], byte_fallback=True, unk_token="<pad>"
        )
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast


@pytest.fixture(scope="module", params=[byte_level, sentencepiece_like])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=request.param(), eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    (folder / "config.json").write_text("{}")
    return Tokenizer(folder, 300)


@given(st.text(alphabet="ab c.\n√é日\\{}x", max_size=30))
def test_spans_spell_the_text(tokenizer, text):
    # After a first letter, so that a stripped leading space is not at stake.
    ids = tokenizer.encode("a" + text)
    spans = tokenizer.spans([*ids, 0])
    whole = "".join(piece for piece, _ in spans)
    assert whole.lstrip(" ") == "a" + text and tokenizer.text([*ids, 0]) == whole
    assert len(spans) == len(ids)
    for piece, start in spans:
        assert whole[start : start + len(piece)] == piece


@given(st.text(alphabet="ab c.\n√é日\\{}x", max_size=30))
@example(" a")
@example("\n\na")
def test_text_inside_a_turn_is_encoded_without_a_space_before_it(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.text(ids) == text
    # Whatever is before it, by the library's own decoder.
    before = tokenizer.hf.encode("b", add_special_tokens=False)
    assert tokenizer.hf.decode([*before, *ids], clean_up_tokenization_spaces=False) == "b" + text
    assert tokenizer.turn(text) == (*ids, 0)


def test_newline_table(tokenizer):
    table = tokenizer.newlines
    (newline,) = [i for i, piece in enumerate(tokenizer.pieces) if piece == "\n"][:1]
    assert table.only[newline] and table.lead[newline] == table.trail[newline] == 1 and table.blank[newline]
    for i, piece in enumerate(tokenizer.pieces):
        assert bool(table.inner[i]) == ("\n\n" in piece.rstrip("\n")), piece
        if piece == ".\n\n":
            assert table.trail[i] == 2 and not table.lead[i] and not table.only[i] and not table.blank[i]


def test_all_eos_ids_count(tokenizer):
    assert set(tokenizer.eos_ids) == {0, 1}
    assert tokenizer.without_eos([5, 6, 1]) == [5, 6] and tokenizer.without_eos([5, 6]) == [5, 6]
    assert tokenizer.prompt("a") == tokenizer.hf.encode("a")  # no chat template


def test_a_vocabulary_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(InputError, match="the tokenizer has ids up to"):
        Tokenizer(tokenizer.folder, 100)
    with pytest.raises(InputError, match="no tokenizer.json"):
        Tokenizer(tokenizer.folder / "nothing", 300)


def test_prompts_do_not_change_overnight(teacher, tmp_path):
    """A chat template that asks for the date gets the same one every day, in prompts and at the end of a turn."""
    shutil.copytree(teacher.folder, tmp_path / "model")
    folder = tmp_path / "model"
    for path in folder.glob("chat_template*"):
        path.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ strftime_now('%d %b %Y %S %f') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(folder, teacher.tokenizer.vocab_size)
    assert tokenizer.text(tokenizer.prompt("1 + 2")) == "26 Jul 2024 00 0000001 + 2"
