"""The tokenizer, chat template and end tokens of a GGUF file, rebuilt from its metadata.

A GGUF file holds the vocabulary, the merges or scores, and the name of a pre-tokenizer. Their
meaning is defined by llama.cpp (src/llama-vocab.cpp) and the models' own tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gguf import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.exporters.sources.source import one_template

# Contractions, words, numbers, punctuation, spaces: these patterns differ in how many digits make
# a piece and in what counts as a word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{word}+|\p{{N}}{digits}"
    r"| ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS = {"word": r"\p{L}", "letters": r"\p{L}"}  # GenAI cannot read `[\p{L}]+`
_MARKED = {"word": r"[\p{L}\p{M}]", "letters": r"\p{L}\p{M}"}
_CASED = (
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    r"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{contraction}"
    r"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
    r"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{contraction}"
    r"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Pre:
    """How a byte-level BPE vocabulary was made.

    Attributes:
        first: patterns whose matches become pieces before `split`, in this order.
        split: pattern whose matches are merged separately; None uses GPT-2's.
        digits_apart: whether each digit becomes a piece before that.
        compose: whether text is normalized to Unicode NFC first.
        whole_words: whether a piece that is a token is taken without merges.
        starts: whether texts begin with the start token if the file does not say.
    """

    first: tuple[str, ...] = ()
    split: str | None = None
    digits_apart: bool = False
    compose: bool = False
    whole_words: bool = False
    starts: bool = False


_GPT2 = _Pre()
_NEOX = _Pre(compose=True)
_DIGITS = _Pre(digits_apart=True)
_CL100K = _Pre(split=_WORDS.format(digits="{1,3}", **_LETTERS))
_LLAMA3 = replace(_CL100K, whole_words=True, starts=True)
_ONE_DIGIT = _Pre(split=_WORDS.format(digits="", **_LETTERS))
_QWEN2 = replace(_ONE_DIGIT, compose=True)
_QWEN35 = _Pre(split=_WORDS.format(digits="", **_MARKED), compose=True)
_O200K = _Pre(split=_CASED.format(digits="{1,3}", contraction="(?i:'s|'t|'re|'ve|'m|'ll|'d)?"))
_HUNYUAN = _Pre(
    first=(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
    split=r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_TEKKEN = _Pre(split=_CASED.format(digits="", contraction=""), whole_words=True, starts=True)

PRE_TOKENIZERS = {
    "default": _GPT2,  # also for files that name none
    **dict.fromkeys(("gpt-2", "phi-2", "jais", "trillion", "granite-docling", "exaone4"), _GPT2),
    **dict.fromkeys(("mpt", "olmo"), _NEOX),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _DIGITS
    ),
    "command-r": replace(_DIGITS, compose=True),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _CL100K),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral", "midm-2.0"), _LLAMA3
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "qwen35": _QWEN35,
    "hunyuan-dense": _HUNYUAN,
    **dict.fromkeys(("stablelm2", "hunyuan"), _ONE_DIGIT),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _O200K),
    "tekken": _TEKKEN,
}
"""Pre-tokenizers by `tokenizer.ggml.pre`."""

_UNNAMED = {
    ("llama", 128_256): "llama-bpe",
    ("qwen2", 151_936): "qwen2",
    ("qwen2", 152_064): "qwen2",
}
"""By architecture and number of tokens, pre-tokenizers of the first files, which name none."""

# Tokens that end an answer, of those in llama.cpp; a file names only one or two of them. Not
# `</s>`: Gemma 4 has it as text.
_ENDS = {
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|return|>",
    "<|call|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<turn|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "<end_of_utterance>",
    "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}


class _Vocabulary:
    """The tokenizer's part of the metadata."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values
        tokens = self.get("tokens")
        if not isinstance(tokens, list) or not tokens:
            raise SourceError("the GGUF file has no tokenizer")
        self.tokens: list[str] = tokens
        types = self.get("token_type") or [TokenType.NORMAL] * len(tokens)
        self.ids = {token: index for index, token in enumerate(tokens)}
        if len(self.ids) != len(tokens) or len(types) != len(tokens):
            raise SourceError("the GGUF file's tokenizer has a token twice, or too few types")
        # As in llama.cpp, a token of this text is one that controls, whatever the file says.
        normal = TokenType.NORMAL
        self.types: list[int] = [
            TokenType.CONTROL if kind == normal and token in _ENDS else kind
            for token, kind in zip(tokens, types, strict=True)
        ]

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(f"tokenizer.ggml.{key}", default)

    def of(self, *kinds: TokenType) -> dict[str, int]:
        """Ids of the tokens of some types."""
        pairs = zip(self.tokens, self.types, strict=True)
        return {token: self.ids[token] for token, kind in pairs if kind in kinds}

    def special(self, key: str, default: int | None = None) -> str | None:
        """The token whose id the file gives under a key."""
        index = self.get(f"{key}_token_id", default)
        return self.tokens[index] if index is not None and 0 <= index < len(self.tokens) else None


def tokenizer_of(architecture: str, values: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Builds the tokenizer from all metadata, by key.

    Raises:
        SourceError: the file has none, or a damaged one.
        UnsupportedError: its kind is not known.
    """
    vocabulary = _Vocabulary(values)
    kind = vocabulary.get("model")
    if kind == "gpt2":
        unnamed = _UNNAMED.get((architecture, len(vocabulary.tokens)), "default")
        name = vocabulary.get("pre", unnamed)
        if name not in PRE_TOKENIZERS:
            raise UnsupportedError(
                f"the GGUF file's pre-tokenizer {name!r} is not known, its text would be split "
                "wrongly; export the safetensors release of the model instead"
            )
        pre = PRE_TOKENIZERS[name]
        tokenizer, starts = _byte_level(vocabulary, pre), pre.starts
        default = {}
    elif kind == "llama":
        tokenizer, starts = _sentencepiece(vocabulary, _merges_of_scores(vocabulary)), True
        default = {"bos": 1, "eos": 2, "unknown": 0}
    elif kind == "gemma4":
        tokenizer, starts = _sentencepiece(vocabulary, _merges(vocabulary), prefixed=False), True
        default = {}
    else:
        raise UnsupportedError(
            f"the GGUF file's tokenizer is {kind!r}; supported: gpt2 (byte-level BPE), llama "
            "(SentencePiece) and gemma4"
        )
    special = {
        name: vocabulary.special(key, default.get(key))
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    _add_tokens(tokenizer, vocabulary, strip=architecture == "phi3" and kind == "llama")
    # llama.cpp adds the start token to every Gemma 4 text, whatever its files say.
    starts = kind == "gemma4" or vocabulary.get("add_bos_token", starts)
    before = special["bos_token"] if starts else None
    after = special["eos_token"] if vocabulary.get("add_eos_token", False) else None
    _add_frame(tokenizer, vocabulary, before, after)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
    key = "tokenizer.chat_template"
    fast.chat_template = one_template(
        {"default": values.get(key), "tool_use": values.get(f"{key}.tool_use")}
    )
    return fast


def end_tokens(values: Mapping[str, Any]) -> int | list[int] | None:
    """Ids that end an answer: the end token first, then the other tokens that end a chat turn."""
    vocabulary = _Vocabulary(values)
    named = [vocabulary.get(f"{key}_token_id") for key in ("eos", "eot", "eom")]
    if vocabulary.get("model") == "llama" and named[0] is None:
        named[0] = 2
    special = vocabulary.of(TokenType.CONTROL, TokenType.USER_DEFINED)
    ends = _ENDS & special.keys()
    if "<|return|>" in ends:  # gpt-oss: ends reasoning and text in between
        ends -= {"<|end|>"}
        named = [index for index in named if index != special.get("<|end|>")]
    known = sorted(special[token] for token in ends)
    ids = list(dict.fromkeys(index for index in (*named, *known) if index is not None))
    return (ids[0] if len(ids) == 1 else ids) if ids else None


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The merges that the file lists."""
    merges = vocabulary.get("merges")
    if merges is None:
        raise SourceError("the GGUF file's tokenizer has no merges")
    # A token may contain a space, but never begins with one.
    cuts = [(merge, merge.find(" ", 1)) for merge in merges]
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]


def _byte_level(vocabulary: _Vocabulary, pre: _Pre) -> Tokenizer:
    pairs = _merges(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=pairs, ignore_merges=pre.whole_words)
    )
    if pre.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pre_tokenizer(pre: _Pre) -> pre_tokenizers.PreTokenizer:
    """What splits a text into pieces, in steps that GenAI's tokenizer can run, too."""
    steps: list[Any] = []
    if pre.digits_apart:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    patterns = [*pre.first, *([] if pre.split is None else [pre.split])]
    steps += [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(
    vocabulary: _Vocabulary, merges: list[tuple[str, str]], prefixed: bool = True
) -> Tokenizer:
    """Builds a tokenizer that merges characters, with a byte fallback for unknown ones.

    Args:
        vocabulary: vocabulary of the file.
        merges: merges by rank.
        prefixed: whether texts get a leading space if the file does not say.
    """
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=merges,
            unk_token=vocabulary.special("unknown", 0),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = vocabulary.get("add_space_prefix", prefixed)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_of_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece merges the pair with the highest-scoring result; BPE needs a list of merges."""
    scores = vocabulary.get("scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise SourceError("the GGUF file's tokenizer has no scores")
    normal = vocabulary.of(TokenType.NORMAL)
    merges = []
    for token in sorted(normal, key=lambda token: (-scores[normal[token]], normal[token])):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(a, b) for a, b in cuts if a in normal and b in normal]
        merges += sorted(pairs, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    return merges


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary, strip: bool) -> None:
    """Adds the tokens that are matched in a text before anything else.

    Args:
        strip: whether they absorb the spaces after them (Phi 3; no key says so).
    """
    keep = ("<unk>", "<s>", "<|endoftext|>")

    def added(kind: TokenType) -> list[AddedToken]:
        return [
            AddedToken(
                token,
                normalized=False,
                special=kind == TokenType.CONTROL,
                rstrip=strip and token not in keep,
            )
            for token in vocabulary.of(kind)
        ]

    # Each call indexes all added tokens again, and Gemma 3 has 6,000 of them.
    tokenizer.add_special_tokens(added(TokenType.CONTROL))
    tokenizer.add_tokens(added(TokenType.USER_DEFINED))


def _add_frame(
    tokenizer: Tokenizer, vocabulary: _Vocabulary, before: str | None, after: str | None
) -> None:
    """Puts start and end tokens around texts."""
    frame = [token for token in (before, after) if token is not None]
    if frame:
        single = [*([before] if before else []), "$A", *([after] if after else [])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, vocabulary.ids[token]) for token in set(frame)]
        )
