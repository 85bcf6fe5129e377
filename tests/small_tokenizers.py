"""Small tokenizers of the kinds that checkpoints come with; their ids are arbitrary, so random ids give odd texts."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Rust
from transformers import PreTrainedTokenizerFast

import byte_pair
from simsd.models.tokenizer import Tokenizer
from stand_ins import END, MASK

WORDS = ["▁", "▁a", "▁the", "b", "ab", "▁▁", "\n", "é", "漢", "🙂", "."]


def byte_level() -> Tokenizer:
    """Qwen's kind: a token is some bytes, here one."""
    return _wrapped(byte_pair.byte_tokenizer())


def sentence_piece() -> Tokenizer:
    """Llama's kind: ▁ for a space, the text's first one dropped, bytes for what no piece has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    inner = Rust(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    return _wrapped(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>"))


def word_level() -> Tokenizer:
    """Words joined by spaces."""
    inner = Rust(models.WordLevel({word: i for i, word in enumerate(["<end>", "the", "a", "naïve", "b."])}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>"))


def word_piece() -> Tokenizer:
    """BERT's kind: ## goes on with a word."""
    pieces = ["[UNK]", "the", "##s", "##漢", "a", ".", ",", "n", "'", "t"]
    inner = Rust(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    return _wrapped(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]"))


ALL = {make.__name__: make for make in (byte_level, sentence_piece, word_level, word_piece)}


def _wrapped(backend: PreTrainedTokenizerFast) -> Tokenizer:
    return Tokenizer(backend, len(backend), mask_token_id=-1)


def for_stand_ins() -> PreTrainedTokenizerFast:
    """For `stand_ins`' models: letters, parts of words, bytes of longer characters, and their special tokens."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str

    def named(text: str) -> str:  # a letter for every byte, as ByteLevel writes them
        return "".join(piece for piece, _ in split(text))

    parts = "th he in er an qu ab ba aa bb abc ,a .b é 漢".split() + ["the ", " of", "\n\n"]
    tokens = [*named("abcdefghijklmnopqrstuvwxyz .\né漢🙂"), *map(named, parts)]
    vocabulary = {token: i for i, token in enumerate(tokens)} | {f"word{i}": i for i in range(len(tokens), END)}
    assert sorted(vocabulary.values()) == list(range(END))
    inner = Rust(models.BPE(vocabulary, []))
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<end>", "<mask>")])
    backend = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", mask_token="<mask>")
    assert backend.convert_tokens_to_ids(["<end>", "<mask>"]) == [END, MASK]
    return backend
