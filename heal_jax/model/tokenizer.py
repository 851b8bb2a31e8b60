"""Text to ids and back, and what the compiled graphs need to know of each token's text."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from heal_jax.deadline import deadline
from heal_jax.errors import InputError

# For templates that ask for the date: prompts must not change overnight. Llama 3.2's own default.
TODAY = (
    '{%- macro strftime_now(format) -%}{%- if format == "%Y-%m-%d" -%}2024-07-26{%- elif format == "%d %B %Y" -%}'
    "26 July 2024{%- else -%}26 Jul 2024{%- endif -%}{%- endmacro -%}"
)
WHITE_SPACE = " \t\n\r\v\f"  # what makes a step blank; ASCII only, since wider white space may be split over tokens
TEMPLATE_SECONDS = 10.0  # for one prompt; templates take less than a millisecond, and may loop
LONGEST_PROMPT = 1 << 20  # characters, more than any model has positions for: a template may make text without end
LONGEST_CHARACTER = 4  # bytes of UTF-8, so at most as many tokens


@dataclasses.dataclass(frozen=True, eq=False)
class NewlineTable:
    """For each token id what its text contributes to runs of newlines. All [V]; counts are capped at 2.

    lead, trail: newlines at the start and the end; only: nothing but newlines (lead = trail = their number), or no
    text at all; inner: a run of two or more ends inside, before other text; blank: white space alone.
    """

    lead: np.ndarray  # int8
    trail: np.ndarray  # int8
    only: np.ndarray  # bool
    inner: np.ndarray  # bool
    blank: np.ndarray  # bool


def newline_table(pieces: list[str]) -> NewlineTable:
    """Tables from the text of each token."""
    rows = []
    for piece in pieces:
        lead = len(piece) - len(piece.lstrip("\n"))
        trail = len(piece) - len(piece.rstrip("\n"))
        only = lead == len(piece)
        inner = not only and "\n\n" in piece[lead : len(piece) - trail]
        rows.append(
            (min(lead, 2), min(trail, 2), only, inner or (lead >= 2 and not only), not piece.strip(WHITE_SPACE))
        )
    columns = [np.array(column) for column in zip(*rows)]
    return NewlineTable(columns[0].astype(np.int8), columns[1].astype(np.int8), *columns[2:])


class Tokenizer:
    """A Hugging Face tokenizer folder: prompts, text, and the ids that end a rollout.

    Raises InputError where the folder has no tokenizer, or one whose ids do not fit the model's vocabulary.
    """

    def __init__(self, folder: str | Path, vocab_size: int):
        from transformers import AutoTokenizer  # two seconds: only where a model is used

        self.folder = Path(folder)
        _check_files(self.folder)
        try:
            self.hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds for a broken folder
            raise InputError(f"{folder}: no usable tokenizer ({' '.join(str(error).split())[:200]})") from None
        self.hf.model_max_length = LONGEST_PROMPT  # whether a text fits is checked against the model's positions
        # Tokens that were added beyond the model's vocabulary (Gemma 3's for images) are refused where a text has one.
        vocabulary, added = self.hf.get_vocab(), self.hf.get_added_vocab()
        self._known = {i for i in vocabulary.values() if i < vocab_size}
        if (highest := max((i for token, i in vocabulary.items() if token not in added), default=-1)) >= vocab_size:
            raise InputError(
                f"{folder}: the tokenizer has ids up to {highest}, the model's vocabulary ends at {vocab_size - 1}; "
                "put the files of one model together"
            )
        self.vocab_size = vocab_size
        self.eos_ids = self._eos_ids()
        pad = self.hf.pad_token_id
        self.pad_id: int = pad if pad is not None else self.eos_ids[0]

    def _eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn: of the tokenizer, generation_config.json and config.json."""
        ids = [self.hf.eos_token_id]
        for name in ("generation_config.json", "config.json"):
            path = self.folder / name
            if path.is_file():
                try:
                    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
                except (ValueError, AttributeError, RecursionError):
                    raise InputError(f"{path}: not a JSON object; restore the file from its source") from None
                ids += value if isinstance(value, list) else [value]
        found = [i for i in ids if i is not None]
        if not found or any(not isinstance(i, int) or not 0 <= i < self.vocab_size for i in found):
            raise InputError(
                f"{self.folder}: no valid eos_token_id in tokenizer, generation_config.json or config.json "
                f"(found: {str(found)[:200]}; the model's vocabulary ends at {self.vocab_size - 1}); restore the files"
            )
        return tuple(dict.fromkeys(found))

    @functools.cached_property
    def turn_end(self) -> int:
        """The EOS id that ends an assistant's turn: the first in what the chat template puts after one.

        The first EOS id where it puts none (as with base models whose template ends turns with a token of no meaning).
        """
        said = "SAID"
        turns = [{"role": "user", "content": "ASKED"}, {"role": "assistant", "content": said}]
        after = ""
        if self.hf.chat_template is not None:
            with contextlib.suppress(Exception):  # a template may know no finished turn: nothing follows one then
                _, found, rest = self._render(turns).rpartition(said)
                after = rest if found else ""
        return next((i for i in self.encode(after) if i in self.eos_ids), self.eos_ids[0])

    @functools.cached_property
    def _template(self) -> str:
        template = str(self.hf.get_chat_template())
        if any(token[1:] == ("operator", "**") for token in jinja2.Environment().lex(template)):
            raise ValueError("it raises numbers to powers, which may take for ever")
        return TODAY + template if "strftime_now" in template else template

    def prompt(self, question: str) -> list[int]:
        """Ids of a user turn up to where the assistant begins; the bare text where there is no chat template.

        Raises InputError where the template is broken.
        """
        if self.hf.chat_template is None:
            return self._encode(question, True)
        try:
            text = self._render([{"role": "user", "content": question}], add_generation_prompt=True)
        except Exception as error:  # whatever a template from elsewhere raises
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{self.folder}: its chat template cannot be applied ({reason}); restore it") from None
        return self._encode(text)

    def keeps(self, question: str, said: str) -> bool:
        """Whether the chat template gives an assistant's finished turn as it was written: some drop what it thought."""
        user = {"role": "user", "content": question}
        try:
            asked = self._render([user], add_generation_prompt=True)
            return self._render([user, {"role": "assistant", "content": said}]).startswith(asked + said)
        except Exception:  # whatever a template from elsewhere raises
            return False

    def _render(self, turns: list[dict[str, str]], **settings: Any) -> str:
        """The text that the chat template makes of turns. Raises whatever the template does."""
        with deadline(TEMPLATE_SECONDS):
            text = str(self.hf.apply_chat_template(turns, tokenize=False, chat_template=self._template, **settings))
        if len(text) > LONGEST_PROMPT:
            raise ValueError(f"it makes a prompt of {len(text)} characters")
        return text

    def _encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of text. Raises InputError where there are none, or the model has no such token."""
        try:
            ids = self.hf.encode(text, add_special_tokens=special)
        except Exception as error:  # such as a vocabulary without the token for what is unknown
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.folder}: its tokenizer cannot encode {text[:40]!r} ({reason})") from None
        return self._checked(ids)

    def _checked(self, ids: Any) -> list[int]:
        """The ids. Raises InputError where the model has no such token."""
        if max(ids, default=0) >= self.vocab_size:
            token = self.hf.convert_ids_to_tokens(max(ids))
            raise InputError(
                f"{self.folder}: a text holds {token!r}, a token that the model does not have; leave it out"
            )
        return list(ids)

    def encode(self, text: str) -> list[int]:
        """Ids of text inside a turn: no special tokens added, and no space before it, where the tokenizer can."""
        ids = self._encode(text)
        if self._after_anchor(ids) != text:  # some put a space before the first word of whatever they encode
            line, second = self._encode("\n"), self._encode("\n" + text)
            if second[: len(line)] == line and self._after_anchor(second[len(line) :]) == text:
                return second[len(line) :]
        return ids

    def turn(self, text: str) -> tuple[int, ...]:
        """Ids of an assistant's whole turn that says `text`, its EOS at the end.

        Empty where the ids would not say the same text again: characters that the vocabulary lacks or that are
        normalised away, an EOS within the text, broken characters in it.
        """
        ids = self.encode(text)
        if "\ufffd" in text or set(ids) & set(self.eos_ids) or self.text(ids) != text:
            return ()
        return (*ids, self.turn_end)

    @functools.cached_property
    def pieces(self) -> list[str]:
        """The text that each id adds after other text, [V] strings; ids without a token add none."""
        return [self._after_anchor([i]) if i in self._known else "" for i in range(self.vocab_size)]

    def _after_anchor(self, ids: list[int]) -> str:
        """What ids add to other text."""
        anchor, length = self._anchor
        return self._decode([*anchor, *ids])[length:]

    @functools.cached_property
    def _anchor(self) -> tuple[list[int], int]:
        """A token to decode after, and the length of its text: some decoders strip what begins a text."""
        ids = self._encode("a")[-1:]
        return ids, len(self._decode(ids))

    @functools.cached_property
    def newlines(self) -> NewlineTable:
        return newline_table(self.pieces)

    def _decode(self, ids: list[int]) -> str:
        return str(self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def without_eos(self, ids: list[int]) -> list[int]:
        """The ids before the end-of-sequence token, where there is one at the end."""
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids

    def text(self, ids: list[int]) -> str:
        """Text of a rollout, its EOS left out."""
        return "".join(text for text, _ in self.spans(ids))

    def spans(self, ids: list[int]) -> list[tuple[str, int]]:
        """For each id of a rollout (EOS left out) the text it adds and where that begins in the whole text."""
        ids = self.without_eos(ids)
        texts = [self.pieces[i] for i in ids]
        # Parts of characters say what they are only together: the last of them gets the text.
        first = 0
        for i, text in enumerate(texts):
            if "\ufffd" not in text:
                first = i + 1
                continue
            whole = self._after_anchor(ids[first : i + 1])
            done = "\ufffd" not in whole or i + 1 - first == LONGEST_CHARACTER
            texts[i] = whole if done else ""
            first = i + 1 if done else first
        starts = np.cumsum([0, *map(len, texts)])
        return list(zip(texts, map(int, starts)))


def _check_files(folder: Path) -> None:
    """Raise InputError unless the tokenizer is a tokenizer.json: a format that holds data alone.

    Other formats would be read as whatever they claim to be, by classes or code that the folder names.
    """
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder}: no tokenizer.json, the only format that is read (never pickles or code); "
            "save the tokenizer in that format"
        )
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore the file from its source") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: a JSON object is expected; restore the file from its source")
    for name in ("auto_map", "fast_tokenizer_files"):
        if settings.get(name):
            raise InputError(
                f"{path}: {name} names code or files beside tokenizer.json, which are never loaded; "
                "use a folder whose tokenizer is tokenizer.json alone"
            )
