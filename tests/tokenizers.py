"""Small tokenizers of every kind, built by hand: what their tokens are is known."""

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxgen import demo

VOCAB = 768  # of the model: more than any tokenizer here has
WORDS = (
    " a", " st", " stop", "a", "aa", "aab", "ab", "at", "b", "c", "e", "he", "her", "hers", "las", "op", "opera", "p",
    "pped", "pper", "s", "sh", "she", "st", "sto", "stop", "t", "tion", "to", "topper", "\n", "\nQ", "\nQ:", ":", "é",
    "日本",
)  # fmt: skip
SPECIAL = ("<unk>", "<s>", "</s>", "<|é end|>")  # with a space and an accent: byte-level vocabularies spell neither
BYTES = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256), strict=True))  # ids, not bytes


def spell(text: bytes) -> str:
    """Bytes in GPT-2's alphabet, made by the tokenizers library."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(byte_alphabet(pieces)[byte] for byte in text)


@functools.cache
def byte_alphabet(pieces: pre_tokenizers.ByteLevel) -> dict[int, str]:
    letters = {}
    for point in [*range(0x801), *range(0x1000, 0x10FFFF, 0x1000)]:
        if not 0xD800 <= point < 0xE000:
            encoded = chr(point).encode()
            letters.update(zip(encoded, pieces.pre_tokenize_str(chr(point))[0][0], strict=True))
    return letters


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2 and Tekken: a token is bytes, some of them half a character. One says nothing at all."""
    words = [*map(spell, [word.encode() for word in WORDS]), spell(b"op\xc3"), spell(b"\xa9a"), ""]
    vocabulary = dict(BYTES)
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(backend)


@functools.cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Mistral v0.1: whole characters, a bar for the space, <0xNN> for what is not in the vocabulary."""
    words = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefpst▁"]
    words += [word.replace(" ", "▁") for word in WORDS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(backend)


@functools.cache
def characters() -> PreTrainedTokenizerFast:
    """Whole characters only, without bytes to fall back to."""
    words = [*SPECIAL[:3], *"abcdefpst▁", *(word.replace(" ", "▁") for word in WORDS)]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(backend)


@functools.cache
def of_the_demo() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo.path())


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "characters": characters, "demo": of_the_demo}


def ids_of(tokenizer: PreTrainedTokenizerFast, *tokens: str | bytes | int) -> list[int]:
    """Token by token: bytes as one byte-level token, str as it stands in the vocabulary, ints as they are."""
    vocabulary = tokenizer.get_vocab()
    spelled = (spell(token) if isinstance(token, bytes) else token for token in tokens)
    return [token if isinstance(token, int) else vocabulary[token] for token in spelled]


@functools.cache
def alone(name: str) -> dict[int, bytes]:
    """What each of the tokenizer's plain tokens says, from its spelling: the tests' own reading."""
    unspell = {letter: byte for byte, letter in byte_alphabet(pre_tokenizers.ByteLevel(add_prefix_space=False)).items()}
    said = {}
    for token, index in TOKENIZERS[name]().get_vocab().items():
        if index in TOKENIZERS[name]().added_tokens_decoder:
            continue
        if name in ("byte_level", "demo"):
            if set(token) <= unspell.keys():  # 13 bytes occur in no text
                said[index] = bytes(unspell[letter] for letter in token)
        elif name == "byte_fallback" and token.startswith("<0x"):
            said[index] = bytes.fromhex(token[3:5])
        else:
            said[index] = token.replace("▁", " ").encode()
    return said
