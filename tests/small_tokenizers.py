"""Small tokenizers of the kinds that checkpoints come with; their ids are arbitrary, so random ids give odd texts."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Rust
from transformers import PreTrainedTokenizerFast

import byte_pair
from simsd.models.tokenizer import Tokenizer

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
