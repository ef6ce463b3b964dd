from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
from conftest import TEMPLATE, refusal_of
from gguf import TokenType as Kind
from gguf_files import add_byte_level, write_model
from gguf_models import FAMILIES, tiny_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import GemmaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen3_5 import tokenization_qwen3_5 as qwen3_5

from dash_onnx.core.errors import SourceError, UnsupportedError
from dash_onnx.exporters.sources import Source, open_source

SAMPLES = [
    "The keeper counts the ships; it's 1984, isn't it? We'LL see, I'VE said DON'T.",
    "Straße, naïve café, Ærøskøbing: “quotes” … 50 % über",
    "Привет, мир! Корабли плывут 12345 раз.",
    "Γειά σου Κόσμε, τα πλοία ½ ¾ ²³ Ⅷ",  # noqa: RUF001
    "漢字とカタカナ、ひらがな。東京２０２４年",
    "안녕하세요 세계, 배가 7척",
    "नमस्ते दुनिया, जहाज़ १२३",
    "مرحبا بالعالم، السفن ٤٥٦",
    "שלום עולם, ספינות",
    "สวัสดีชาวโลก เรือ ๗ ลำ",
    "ქართული ხომალდი",
    "Xin chào thế giới, tiếng Việt",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # note\n\n\nclass A:\n\tpass',
    "for(int i=0;i<n;++i){a[i]+=b[i]*3.14e-10;} 12345678901234567890 1,000,000 0x1F",
    "🚀🙂👩‍👩‍👧‍👦🇫🇷",
    "!!!???...,,,---===///\\\\\\ http://example.org/a?b=c&d=%20#frag <b>bold</b>",
    "  in front,  between  and behind  ",
    "\ttabs\tand\n\nlines\r\n  mixed \n \n\n\n end\u00a0of\u2003spaces\u3000\u200b.",
    "CamelCaseWords HTTPServer snake_case",
    "<s>user</s> <think>\n so </think>    <|im_end|>",
    "",
    " ",
]
DECOMPOSED = "cafe\u0301 A\u030a"
CONTROL = ["<s>", "</s>", "<|im_end|>"]
LLAMA3 = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default


def split(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
DIGITS = [pre_tokenizers.Digits(individual_digits=True), *GPT2]

HUNYUAN = [
    pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
    pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),  # noqa: RUF001
    *split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
]

# As the tokenizer.json of the models has it: (Unicode's form NFC, pieces, whole words need no
# merges, texts begin with a start token).
BYTE_LEVEL = {
    "gpt-2": (False, GPT2, False, False),
    "smollm": (False, DIGITS, False, False),  # SmolLM 2
    "refact": (False, DIGITS, False, False),  # Granite
    "olmo": (True, GPT2, False, False),  # GPT-NeoX, Pythia, OLMo
    "dbrx": (False, split(LLAMA3), False, False),  # OLMo 2, Phi 4
    "glm4": (False, split(LLAMA3), False, False),  # GLM 4
    "llama-bpe": (False, split(LLAMA3), True, True),  # Llama 3
    "qwen35": (True, split(qwen3_5.PRETOKENIZE_REGEX), False, False),
    "hunyuan-dense": (False, HUNYUAN, False, False),  # as llama.cpp has it
    "qwen2": (True, split(PRETOKENIZE_REGEX), False, False),  # Qwen 2 and 3
}


def trained(compose: bool, steps: list, whole_words: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of another making, trained on the samples."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    if compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLES * 4, trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "    ")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def written(
    path: Path, tokenizer: Callable[[gguf.GGUFWriter], None], family: str = "llama"
) -> Source:
    """A file with this tokenizer, opened."""
    model = tiny_model(family, num_hidden_layers=1, vocab_size=992)
    write_model(path, model, tokenizer=tokenizer)
    return open_source(str(path), FAMILIES)


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_a_byte_level_tokenizer_gives_the_ids_of_its_model(pre: str, tmp_path: Path) -> None:
    compose, steps, whole_words, starts = BYTE_LEVEL[pre]
    reference = trained(compose, steps, whole_words)
    source = written(tmp_path / "t.gguf", lambda w: add_byte_level(w, reference, 992, pre))
    assert len({len(reference(text)["input_ids"]) for text in SAMPLES}) > 10
    for text in (*SAMPLES, DECOMPOSED):
        wanted = reference(text, add_special_tokens=False)["input_ids"]
        assert source.tokenizer(text, add_special_tokens=False)["input_ids"] == wanted, text
        assert source.tokenizer(text)["input_ids"] == [0] * starts + wanted
        assert source.tokenizer.decode(wanted) == reference.decode(wanted)
    assert source.tokenizer.chat_template == TEMPLATE
    assert source.tokenizer.bos_token == "<s>" and source.tokenizer.eos_token == "</s>"
    assert source.generation_config.eos_token_id == [1, 2]  # a chat ends with <|im_end|>
    assert source.generation_config.bos_token_id == 0


@pytest.mark.parametrize(
    ("control", "ends"),
    [
        (["<|end|>", "<|return|>", "<|call|>"], {"</s>", "<|return|>", "<|call|>"}),  # gpt-oss
        (["<|end|>", "<|assistant|>"], {"</s>", "<|end|>"}),  # Phi 3
    ],
)
def test_an_answer_ends_where_llama_cpp_ends_it(
    control: list[str], ends: set[str], tmp_path: Path
) -> None:
    tokenizer = trained(*BYTE_LEVEL["gpt-2"][:3])
    tokenizer.add_special_tokens({"additional_special_tokens": control})

    def add(writer: gguf.GGUFWriter) -> None:
        add_byte_level(writer, tokenizer, 992, "gpt-2")
        writer.add_eot_token_id(tokenizer.convert_tokens_to_ids("<|end|>"))

    source = written(tmp_path / "t.gguf", add)
    ids = source.generation_config.eos_token_id
    found = set(source.tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids]))
    assert found - {"<|im_end|>"} == ends


@pytest.mark.parametrize("kind", [Kind.NORMAL, Kind.CONTROL, Kind.USER_DEFINED])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|tool_response>"])
def test_a_token_that_ends_a_turn_may_be_of_any_kind(
    token: str, kind: Kind, tmp_path: Path
) -> None:
    tokenizer = trained(*BYTE_LEVEL["gpt-2"][:3])
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    end = tokenizer.convert_tokens_to_ids(token)

    def add(writer: gguf.GGUFWriter) -> None:
        add_byte_level(writer, tokenizer, 992, "gpt-2")
        writer.kv_data[0]["tokenizer.ggml.token_type"].value[end] = kind

    source = written(tmp_path / "t.gguf", add)
    ids = source.generation_config.eos_token_id
    assert end in (ids if isinstance(ids, list) else [ids])
    assert end in source.tokenizer(f"a{token}")["input_ids"]


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("gpt-4o", ["HTTPServer's", "Ġcamel", "Case", "Ġ", "123", "4", "/Ċ"]),
        ("tekken", ["HTTPServer", "'s", "Ġcamel", "Case", "Ġ", "1", "2", "3", "4", "/Ċ"]),
    ],
)
def test_pieces_by_letter_case(pre: str, wanted: list[str], tmp_path: Path) -> None:
    reference = trained(False, GPT2, False)
    source = written(tmp_path / "t.gguf", lambda w: add_byte_level(w, reference, 992, pre))
    split_up = source.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in split_up("HTTPServer's camelCase 1234/\n")] == wanted


def test_where_texts_begin_and_end_is_what_the_file_says(tmp_path: Path) -> None:
    reference = trained(False, split(LLAMA3), True)

    def tokenizer(writer: gguf.GGUFWriter) -> None:
        add_byte_level(writer, reference, 992, "llama-bpe")
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)

    ids = written(tmp_path / "t.gguf", tokenizer).tokenizer("the ships")["input_ids"]
    assert ids == [*reference("the ships", add_special_tokens=False)["input_ids"], 1]


SPACES = ["  ", "   ", "    "]


def sentencepiece() -> tuple[list[str], list[float], list[gguf.TokenType]]:
    """A vocabulary of the samples: control, byte and user-defined tokens, pieces by rank."""
    kind = gguf.TokenType
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=600, limit_alphabet=250, show_progress=False)
    texts = ["▁" + text.replace(" ", "▁") for text in SAMPLES if "<s>" not in text]
    tokenizer.train_from_iterator(texts * 4, trainer)
    learnt = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    pieces = [piece for piece in learnt if piece.strip("▁")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *SPACES, "▁", *pieces]
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256]
    types += [*[kind.USER_DEFINED] * len(SPACES), *[kind.NORMAL] * (len(pieces) + 1)]
    scores = [-float(i) if kind.NORMAL == t else -1000.0 for i, t in enumerate(types)]
    fill = 992 - len(tokens)
    tokens += [f"[PAD{i}]" for i in range(fill)]
    return tokens, scores + [-1000.0] * fill, types + [kind.UNUSED] * fill


def joined(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's BPE: the neighbours of the best joint score become one, the first first."""
    ids = {token: index for index, token in enumerate(tokens) if scores[index] > -1000.0}
    parts = list(text)
    while True:
        pairs = [(ids.get(a + b), i) for i, (a, b) in enumerate(pairwise(parts))]
        known = [(scores[index], -i) for index, i in pairs if index is not None]
        if not known:
            break
        at = -max(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = ([ids[part]] if part in ids else [3 + b for b in part.encode()] for part in parts)
    return [index for part in found for index in part]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_joins_what_scores_best(prefix: bool, tmp_path: Path) -> None:
    tokens, scores, types = sentencepiece()
    source = written(tmp_path / "t.gguf", adder(tokens, scores, types, prefix))
    for text in SAMPLES:
        if "<s>" in text:
            continue
        wanted, rest = [], text
        while rest:  # user-defined tokens are cut out first, the longest at each place
            at, space = min(
                ((rest.find(space), -len(space)) for space in SPACES if space in rest),
                default=(len(rest), 0),
            )
            piece, rest = rest[:at], rest[at - space :]
            if piece:
                marked = ("▁" if prefix else "") + piece.replace(" ", "▁")
                wanted += joined(marked, tokens, scores)
            if space:
                wanted.append(tokens.index(" " * -space))
        ids = source.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == wanted, text
        assert source.tokenizer(text)["input_ids"] == [1, *wanted]
    for text in ("the ships", " in front", "é☃\x07"):
        ids = source.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert source.tokenizer.decode(ids) == text
    assert any(3 <= i < 259 for i in source.tokenizer("☃\x07")["input_ids"])  # as bytes
    assert source.generation_config.eos_token_id == 2


def gemma4() -> GemmaTokenizer:
    """A tokenizer of Gemma 4's making, trained on the samples."""
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=600, limit_alphabet=250, show_progress=False)
    learner.train_from_iterator([text.replace(" ", "▁") for text in SAMPLES] * 4, trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(vocabulary, [tuple(pair) for pair in learnt["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn|>"]})
    return tokenizer


def test_gemma_4_merges_characters_by_the_merges_of_the_file(tmp_path: Path) -> None:
    reference = gemma4()
    state = json.loads(reference.backend_tokenizer.to_str())
    ids, special = reference.get_vocab(), {one["content"] for one in state["added_tokens"]}
    tokens, kind = sorted(ids, key=ids.__getitem__), gguf.TokenType
    fill = 992 - len(tokens)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gemma4")
        writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(fill))])
        writer.add_token_types(
            [kind.CONTROL if token in special else kind.NORMAL for token in tokens]
            + [kind.UNUSED] * fill
        )
        writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
        writer.add_pad_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_bos_token_id(2)
        writer.add_unk_token_id(3)
        writer.add_add_bos_token(False)  # which llama.cpp does not believe

    source = written(tmp_path / "t.gguf", add)
    assert len({len(reference(text)["input_ids"]) for text in SAMPLES}) > 10
    for text in (*SAMPLES, DECOMPOSED, "the☃\x07<turn|>"):
        wanted = reference(text, add_special_tokens=False)["input_ids"]
        assert source.tokenizer(text, add_special_tokens=False)["input_ids"] == wanted, text
        assert source.tokenizer(text)["input_ids"] == [2, *wanted]
        assert source.tokenizer.decode(wanted) == reference.decode(wanted)
    assert source.generation_config.eos_token_id == [1, tokens.index("<turn|>")]


def adder(
    tokens: list[str], scores: list[float], types: list[gguf.TokenType], prefix: bool = True
) -> Callable[[gguf.GGUFWriter], None]:
    """Adds a SentencePiece tokenizer to a file; it names no special token."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        if not prefix:
            writer.add_add_space_prefix(False)

    return add


def test_special_tokens_of_phi_3_take_the_spaces_behind_them(tmp_path: Path) -> None:
    tokens, scores, types = sentencepiece()
    tokens[-1], types[-1] = "<|user|>", gguf.TokenType.CONTROL
    user = len(tokens) - 1
    path = tmp_path / "t.gguf"
    for family, same in (("phi3", True), ("llama", False)):
        tokenizer = written(path, adder(tokens, scores, types), family).tokenizer
        loose = tokenizer("<|user|>\nthe", add_special_tokens=False)["input_ids"]
        tight = tokenizer("<|user|>the", add_special_tokens=False)["input_ids"]
        assert loose[0] == user and (loose == tight) == same


def refusal(kind: type[Exception], path: Path, add: Callable[[gguf.GGUFWriter], None]) -> str:
    return refusal_of(kind, lambda: written(path, add))


def test_tokenizers_that_would_be_wrong_are_refused(tmp_path: Path) -> None:
    path, reference = tmp_path / "t.gguf", trained(False, GPT2, False)
    tokens, scores, types = sentencepiece()

    def without_merges(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)

    def of_another_kind(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("bert")
        writer.add_token_list(tokens)

    def unheard(writer: gguf.GGUFWriter) -> None:
        add_byte_level(writer, reference, 992, "unheard-of")

    assert "'unheard-of'" in refusal(UnsupportedError, path, unheard)
    assert "'bert'" in refusal(UnsupportedError, path, of_another_kind)
    assert "merges" in refusal(SourceError, path, without_merges)
    assert "scores" in refusal(SourceError, path, adder(tokens, scores[:-1], types))
    assert "twice" in refusal(SourceError, path, adder([*tokens[:-1], "▁"], scores, types))
