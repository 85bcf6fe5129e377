"""Prompts to token ids and back."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from simsd.errors import SimsdError, one_line
from simsd.values import is_integer, is_list, plain

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
MASK = "<|MASK|>"
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")
# Tokenizer -> its length and ids: to list 150,000 entries takes long, and every call of `hf_generate` asks.
_ids: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, frozenset[int]]] = weakref.WeakKeyDictionary()
# Of two tokenizers likewise: their lengths and `differing_ids`.
_unlike: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, weakref.WeakKeyDictionary]
_unlike = weakref.WeakKeyDictionary()


class Tokenizer:
    """A transformers tokenizer with the prompt format of a model.

    Args:
        backend: the transformers tokenizer.
        vocab_size: the model's, which may exceed the tokenizer's.
        mask_token_id: refused in prompts.
    """

    def __init__(self, backend: PreTrainedTokenizerBase, vocab_size: int, mask_token_id: int):
        self.backend = backend
        self.vocab_size = vocab_size
        self.mask_token_id = mask_token_id

    @property
    def ids(self) -> frozenset[int]:
        """The ids that have an entry: not always 0 .. n - 1. The model's further rows are padding."""
        return known_ids(self.backend)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        A string is a user's turn where there is a chat template, else raw text (empty: no tokens); a list of
        {"role", "content"} is a chat; a list of ids is taken as it is.

        Raises:
            SimsdError: the prompt is none of these, or contains the mask token or an id outside of the vocabulary.
        """
        if isinstance(prompt, str):
            if self.backend.chat_template is None:
                return self._checked(self.backend.encode(prompt) if prompt else [])
            prompt = [{"role": "user", "content": prompt}]
        if is_list(prompt) and prompt and all(isinstance(turn, dict) for turn in prompt):
            return self._checked(self._encode_chat(prompt))
        return check_ids(prompt, self.vocab_size, self.mask_token_id)

    def _encode_chat(self, chat: Sequence[dict[str, str]]) -> list[int]:
        if self.backend.chat_template is None:
            raise SimsdError("the tokenizer has no chat template: give the prompt as a string or as token ids")
        for turn in chat:
            if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
                raise SimsdError(f'a turn of a chat is {{"role": str, "content": str}}, got {turn!r}')
        try:
            text = self.backend.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like (jinja2, ValueError ...)
            raise SimsdError(f"the chat template refuses the chat: {one_line(error)}") from error
        return self.backend.encode(text, add_special_tokens=False)

    def _checked(self, ids: list[int]) -> list[int]:
        if self.mask_token_id in ids:
            raise SimsdError(_mask_message(self.backend.convert_ids_to_tokens(self.mask_token_id), self.mask_token_id))
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def check_ids(ids: object, vocab_size: int, mask_token_id: int) -> list[int]:
    """The ids (a list, an array or a tensor) as a list of ints.

    Raises SimsdError where they are none, out of the vocabulary, or the mask token's.
    """
    given, ids = ids, plain(ids)
    if is_list(ids):
        ids = [plain(i) for i in ids]
    if not isinstance(ids, list) or not all(map(is_integer, ids)):
        shown = " ".join(repr(given).split())
        raise SimsdError(
            f"a prompt is a string, a chat or a list of token ids, got {type(given).__name__}: {shown:.80}"
        )
    if outside := [i for i in ids if not 0 <= i < vocab_size]:
        raise SimsdError(f"the prompt has token id {outside[0]}, but ids go from 0 to {vocab_size - 1}")
    if mask_token_id in ids:
        raise SimsdError(_mask_message(MASK, mask_token_id))
    return ids


def _mask_message(token: str, token_id: int) -> str:
    return f"the prompt contains the mask token {token} (id {token_id}), which stands for what is to be generated"


def known_ids(backend: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that have an entry in a tokenizer."""
    length, ids = _ids.get(backend, (None, frozenset()))
    if length != len(backend):
        ids = frozenset(backend.get_vocab().values())
        _ids[backend] = (len(backend), ids)
    return ids


def differing_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that two tokenizers have different tokens for; ids that only one has are not among them."""
    if one is other:
        return frozenset()
    of_one = _unlike.setdefault(one, weakref.WeakKeyDictionary())
    *lengths, unlike = of_one.get(other, (None, None, frozenset()))
    if lengths != [len(one), len(other)]:
        mine, theirs = ({i: token for token, i in backend.get_vocab().items()} for backend in (one, other))
        unlike = frozenset(i for i in mine.keys() & theirs.keys() if mine[i] != theirs[i])
        of_one[other] = (len(one), len(other), unlike)
    return unlike


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer; None if it has none. Raises SimsdError where its files are damaged or disagree."""
    if not any((folder / name).exists() for name in _FILES):
        return None
    file = folder / "tokenizer.json"
    try:
        if file.exists():
            json.loads(file.read_text(encoding="utf-8"))
        backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        vocabulary, listed = backend.get_vocab(), _listed_ids(folder)
    except Exception as error:  # the tokenizers library raises bare Exception
        where = file if file.exists() else folder
        raise SimsdError(f"{where}: the tokenizer cannot be read ({one_line(error)})") from error
    # transformers makes a tokenizer of the added tokens alone, and numbers them anew where it has no tokenizer.json.
    if vocabulary.keys() == backend.get_added_vocab().keys():
        raise SimsdError(f"{folder} holds no vocabulary: tokenizer.json, or vocab.json with merges.txt, is missing")
    for token, token_id in listed.items():
        if vocabulary.get(token) != token_id:
            raise SimsdError(
                f"{folder}: its files give the token {token} the id {token_id}, transformers reads"
                f" {vocabulary.get(token)}: save the tokenizer again, with a tokenizer.json"
            )
    return backend


def _listed_ids(folder: Path) -> dict[str, int]:
    """Added tokens with the ids that the folder's own files give them.

    added_tokens.json only where nothing newer lists them: SDAR's published one is out of date (another mask token).
    """

    def fields(name: str) -> dict:
        file = folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    if by_id := fields("tokenizer_config.json").get("added_tokens_decoder"):
        return {entry["content"]: int(i) for i, entry in by_id.items()}
    return {} if (folder / "tokenizer.json").exists() else dict(fields("added_tokens.json"))
