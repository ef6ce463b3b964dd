"""Text in and out: tokens, chat templates, streaming, stop strings."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from dash_onnx.core.bundle import Bundle, list_files
from dash_onnx.core.conversation import _takes_system, rendered
from dash_onnx.core.errors import BundleError, PolicyError, SourceError
from dash_onnx.core.text import Detokenizer, TextCodec, read_text
from dash_onnx.runtime.results import Chunk, FinishReason, GeneratedToken
from dash_onnx.runtime.writer import TextWriter

UNICODE = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"))
WIDE = ["\u00e9", "中", "文", "😀", "👩\u200d👩\u200d👧", "e\u0301", "ﷺ", "\U0010ffff"]


@pytest.fixture(scope="module")
def codec(tiny_bundle: Path) -> TextCodec:
    """Byte-level BPE; each letter of an English sentence may be merged into words."""
    return TextCodec(Bundle(tiny_bundle))


def test_other_threads_run_while_a_long_text_becomes_tokens(codec: TextCodec) -> None:
    ticks, ended = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not ended.wait(0.002):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks
    try:
        codec.encode("the keeper counts 12 ships " * 40_000)
        assert ticks > before + 5
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def fallback_codec(tiny_bundle: Path) -> TextCodec:
    """A codec as Llama 2 has it: words start with U+2581, unknown characters become bytes."""
    vocab = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdef", "\u2581a"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocab)},
            merges=[("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    codec = TextCodec(Bundle(tiny_bundle))
    codec.tokenizer = tokenizer
    return codec


@pytest.fixture
def chat(tiny_bundle: Path) -> TextCodec:
    """A codec whose template a test may replace."""
    return TextCodec(Bundle(tiny_bundle))


def replaced(source: Path, target: Path, files: dict[str, str | None]) -> Bundle:
    """A copy of a bundle with other text files, checksums in order; None leaves one out."""
    folder = Path(shutil.copytree(source, target))
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content, "utf-8")
    manifest = json.loads((folder / "dash.json").read_text("utf-8"))
    manifest["files"] = {n: dataclasses.asdict(f) for n, f in list_files(folder).items()}
    (folder / "dash.json").write_text(json.dumps(manifest), "utf-8")
    return Bundle(folder)


def pieces(codec: TextCodec, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(codec)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


# Tokens


@given(UNICODE)
def test_decoding_undoes_encoding(codec: TextCodec, text: str) -> None:
    assert codec.decode(codec.encode(text).tolist()) == text


HELLO = [{"role": "user", "content": "hello"}]


def test_ids_are_a_vector_of_int64(codec: TextCodec) -> None:
    for ids in (codec.encode("the ships"), codec.encode(""), codec.encode_chat(HELLO)):
        assert ids.dtype == "int64"
        assert ids.ndim == 1
    assert len(codec.encode("")) == 0


def test_special_tokens_are_named_but_not_decoded(codec: TextCodec) -> None:
    ids = codec.encode("<s>the</s>").tolist()
    assert [codec.token(i) for i in ids] == ["<s>", "the", "</s>"]
    assert codec.decode(ids) == "the"
    assert codec.token(10**6) == ""


def test_a_tokenizer_that_truncates_or_pads_does_neither_here(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))
    plain = tokenizer.encode("the ships that pass").ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    bundle = replaced(tiny_bundle, tmp_path / "b", {"tokenizer.json": tokenizer.to_str()})
    assert TextCodec(bundle).encode("the ships that pass").tolist() == plain


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ('{"eos_token_id": 7}', {7}),
        ('{"eos_token_id": [7, 9]}', {7, 9}),
        ('{"eos_token_id": 0}', {0}),
        ('{"eos_token_id": null}', set()),
        ("{}", set()),
        (None, set()),
    ],
)
def test_end_tokens_come_from_the_generation_config(
    tiny_bundle: Path, tmp_path: Path, config: str | None, ids: set[int]
) -> None:
    bundle = replaced(tiny_bundle, tmp_path / "b", {"generation_config.json": config})
    assert TextCodec(bundle).eos_token_ids == ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json is not a readable tokenizer"),
        ("tokenizer.json", None, r"has no tokenizer\.json"),
        ("generation_config.json", "{", r"generation_config\.json is not valid JSON"),
        ("tokenizer_config.json", "", r"tokenizer_config\.json is not valid JSON"),
    ],
)
def test_text_files_that_are_not_what_they_should_be_are_named(
    tiny_bundle: Path, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    bundle = replaced(tiny_bundle, tmp_path / "b", {name: content})
    with pytest.raises(BundleError, match=message):
        TextCodec(bundle)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file"),
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_a_text_file_that_cannot_be_used_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_text(path)


# Chat templates


def test_a_conversation_is_rendered_up_to_the_answer(codec: TextCodec) -> None:
    messages = [{"role": "system", "content": "Be\nbrief."}, {"role": "user", "content": "Hi 中"}]
    assert codec.render_chat(messages) == (
        "<s>system\nBe\nbrief.</s>\n<s>user\nHi 中</s>\n<s>assistant\n"
    )


def test_a_conversation_is_encoded_as_transformers_does(
    codec: TextCodec, tiny_folder: Path
) -> None:
    messages = [{"role": "user", "content": "the ships"}, {"role": "assistant", "content": "pass"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    messages += messages[:1]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert codec.encode_chat(messages).tolist() == wanted
    wanted = theirs.apply_chat_template(
        messages[:2], continue_final_message=True, return_dict=False
    )
    assert codec.encode_chat(messages[:2]).tolist() == wanted


def test_an_empty_question_is_refused_unless_there_are_instructions(codec: TextCodec) -> None:
    """Pydantic AI sends it if an agent has nothing else."""
    asked = {"role": "user", "content": " "}
    with pytest.raises(PolicyError, match="the last message is empty"):
        codec.encode_chat([asked])
    told = {"role": "system", "content": "Tell a joke."}
    assert "joke" in codec.render_chat([told, asked])


@pytest.mark.parametrize("begun", ["<", "|", "i", "_", "\n", " a ", "{", "</s"])
@pytest.mark.parametrize("after", ["<|im_end|>\n", "<|eot_id|>", "</s>\n"])
def test_an_answer_is_continued_where_it_ends(begun: str, after: str) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + after + "{% endfor %}"
    messages = [{"role": "user", "content": "a|_i"}, {"role": "assistant", "content": begun}]
    text = rendered(template, messages, {"add_generation_prompt": True}, {})
    assert text == f"<user>a|_i{after}<assistant>{begun}"
    assert rendered(template, messages, {}, {}) == text + after
    silent = template.replace("m.content", "m.content[:0]")
    with pytest.raises(PolicyError, match="cannot be continued"):
        rendered(silent, messages, {"add_generation_prompt": True}, {})


def test_variables_of_a_template_are_no_special_tokens(codec: TextCodec) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text, probes = codec.render_chat(messages), _takes_system.cache_info().misses
    for value in (["a"], "b", {"c": []}):
        assert codec.render_chat(messages, variables={"x_token": value}) == text
    assert _takes_system.cache_info().misses == probes


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}",
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.role }}\n"
        "{% endfor %}\n",
        "{{ messages | tojson }}",
        "{{ messages[0] | tojson(indent=2) }}",
        "{{ messages[0] | tojson(ensure_ascii=True, indent=4) }}{{ messages | tojson(True) }}",
        "{% if tools %}{{ tools }}{% endif %}{{ messages|length }}",
        "{% if tools is not none %}T{{ tools | tojson }}{% endif %}{{ documents is none }}",
        "{{ strftime_now('%Y') }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ],
)
def test_templates_mean_what_they_mean_in_transformers(
    chat: TextCodec, tiny_folder: Path, template: str
) -> None:
    messages = [{"role": "user", "content": "<é> & 'x'"}, {"role": "user", "content": "2"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    chat.chat_template = template
    wanted = theirs.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert chat.render_chat(messages) == wanted


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'text' "
        "%}{{ part.text }}{% endif %}{% endfor %};{% endfor %}",  # SmolVLM's
        "{% for m in messages %}{{ m.role }}: {{ m.content[0]['text'] }};{% endfor %}",
    ],
)
def test_a_template_that_takes_only_parts_gets_parts(chat: TextCodec, template: str) -> None:
    chat.chat_template = template
    for content in ("Hi <é>", [{"type": "text", "text": "Hi "}, {"type": "text", "text": "<é>"}]):
        system = {"role": "system", "content": "Be brief."}
        told = chat.render_chat([system, {"role": "user", "content": content}])
        assert told == "system: Be brief.;user: Hi <é>;"


def test_a_bundle_without_template_asks_for_plain_text(tiny_bundle: Path, tmp_path: Path) -> None:
    codec = TextCodec(replaced(tiny_bundle, tmp_path / "b", {"chat_template.jinja": None}))
    for render in (codec.render_chat, codec.encode_chat):
        with pytest.raises(PolicyError, match="has no chat template; give a plain text prompt"):
            render([{"role": "user", "content": "Hi"}])
    assert codec.decode(codec.encode("plain").tolist()) == "plain"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].tool.name }}", "no attribute 'tool'"),
        ("{{ messages[0]['content'] + '!' }}", "NoneType"),  # what real templates do with content
        ("{{ messages[0]['content'].strip() }}", "NoneType|strip"),
    ],
)
def test_a_template_that_fails_on_the_messages_is_a_policy_error(
    chat: TextCodec, template: str, reason: str
) -> None:
    chat.chat_template = template
    with pytest.raises(PolicyError, match=f"the chat template refuses these messages: .*{reason}"):
        chat.render_chat([{"role": "assistant", "content": None}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(chat: TextCodec, template: str) -> None:
    chat.chat_template = template
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(PolicyError, match="the chat template refuses these messages"):
        chat.render_chat(messages)
    assert messages == [{"role": "user", "content": "x"}]


# Streaming


@given(UNICODE)
@example("a<<s>s></s>")
def test_streamed_pieces_join_to_the_text(codec: TextCodec, text: str) -> None:
    found = pieces(codec, codec.encode(text).tolist())
    assert "".join(found) == re.sub("</?s>", "", text)  # special tokens are not shown
    assert not any("\ufffd" in piece for piece in found)


@given(UNICODE)
def test_streamed_pieces_join_to_the_text_with_byte_fallback(
    fallback_codec: TextCodec, text: str
) -> None:
    ids = fallback_codec.encode(text).tolist()
    found = pieces(fallback_codec, ids)
    assert "".join(found) == fallback_codec.decode(ids)
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("text", WIDE)
def test_a_wide_character_appears_at_once_with_its_last_byte(codec: TextCodec, text: str) -> None:
    ids = codec.encode(text).tolist()
    assert len(ids) == len(text.encode())  # the tokenizer has never seen it: a token per byte
    ends = [len(text[: i + 1].encode()) - 1 for i in range(len(text))]
    wanted = [""] * len(ids)
    for end, character in zip(ends, text, strict=True):
        wanted[end] = character
    assert pieces(codec, ids) == [*wanted, ""]


@pytest.mark.parametrize("text", [*WIDE, "ab", "the night"])
def test_text_is_not_held_longer_than_its_characters_need(codec: TextCodec, text: str) -> None:
    detokenizer = Detokenizer(codec)
    ids, said = codec.encode(text).tolist(), ""
    for count, token in enumerate(ids, 1):
        said += detokenizer.add(token)
        assert said == codec.decode(ids[:count]).rstrip("\ufffd")


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_an_incomplete_character_at_the_end_is_one_replacement(
    codec: TextCodec, missing: int
) -> None:
    ids = codec.encode("ab😀").tolist()[:-missing]
    found = pieces(codec, ids)
    assert "".join(found[:-1]) == "ab"
    assert found[-1] == "\ufffd"


@given(st.text("abc é中", min_size=1), st.text("abc é中", min_size=1))
def test_a_continuation_keeps_its_first_space(
    fallback_codec: TextCodec, before: str, text: str
) -> None:
    """Tokenizers with SentencePiece's decoder leave it out at the beginning of a text."""
    ids = fallback_codec.encode(before + text).tolist()
    for cut in range(1, len(ids)):
        detokenizer = Detokenizer(fallback_codec, ids[:cut])
        told = "".join(map(detokenizer.add, ids[cut:])) + detokenizer.finish()
        if (known := fallback_codec.decode(ids[:cut])) + told != before + text:
            assert "\ufffd" in known  # it begins inside a character


@given(st.text("abc é中안😀", min_size=2))
def test_the_end_of_a_text_is_enough_to_continue_it(fallback_codec: TextCodec, text: str) -> None:
    ids = fallback_codec.encode(text).tolist()
    for cut in range(1, len(ids)):
        detokenizer = Detokenizer(fallback_codec, fallback_codec.end(ids[:cut]))
        told = "".join(map(detokenizer.add, ids[cut:])) + detokenizer.finish()
        if "\ufffd" not in (known := fallback_codec.decode(ids[:cut])):  # not inside a character
            assert known + told == text


def test_finishing_twice_says_nothing_more(codec: TextCodec) -> None:
    detokenizer = Detokenizer(codec)
    for token in codec.encode("a😀").tolist()[:-1]:
        detokenizer.add(token)
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("text", ["\ufffd", "a\ufffd", "a\ufffdb", "\ufffd\ufffd", "a\ufffd\ufffd"])
def test_a_replacement_character_of_the_text_itself_is_kept(codec: TextCodec, text: str) -> None:
    assert "".join(pieces(codec, codec.encode(text).tolist())) == text


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["<0xF0>", "<0x9F>", "<0xC3>", "<0x82>", *"ab", "\u2581a"])))
@example(["<0xC3>", "<0x9F>", "<0xF0>", "\u2581a"])
def test_bytes_that_are_no_character_do_not_stop_the_stream(
    fallback_codec: TextCodec, tokens: list[str]
) -> None:
    """They may turn what was a character into several broken ones, after it was said."""
    vocabulary = fallback_codec.tokenizer.get_vocab()
    ids = [vocabulary[token] for token in tokens]
    said = "".join(pieces(fallback_codec, ids))
    letters = [character for character in said if character in "ab "]
    wanted = [character for character in fallback_codec.decode(ids) if character in "ab "]
    assert letters == wanted


@settings(max_examples=300)
@given(st.data())
def test_any_tokens_stream_to_what_they_decode_to(codec: TextCodec, data: st.DataObject) -> None:
    size = codec.tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=30))
    assert "".join(pieces(codec, ids)) == codec.decode(ids)


def test_special_tokens_in_an_answer_are_silent(codec: TextCodec) -> None:
    first, rest = codec.encode("the").tolist(), codec.encode(" ships").tolist()
    found = pieces(codec, [0, *first, 1, 0, *rest, 1])
    assert "".join(found) == "the ships"


# Stop strings


class Feed:
    """Tokens as `generate_step` yields them; counts how many were taken."""

    def __init__(self, ids: Sequence[int], reason: FinishReason = "length"):
        self.taken = 0
        self._ids = ids
        self._reason = reason

    def __iter__(self) -> Iterator[GeneratedToken]:
        for number, token in enumerate(self._ids, 1):
            self.taken = number
            last = number == len(self._ids)
            reason = self._reason if last else None
            yield GeneratedToken(token, ("full",) * 4, float(number), reason)


def split(codec: TextCodec, text: str) -> list[int]:
    """A token per byte, whatever the tokenizer would merge."""
    ids = [i for character in text for i in codec.encode(character).tolist()]
    assert len(ids) == len(text.encode())
    return ids


def run(codec: TextCodec, feed: Feed, *stop: str) -> list[Chunk]:
    """The chunks up to one that ends the text, as a request writes them."""
    writer = TextWriter(codec, 5, stop)
    chunks: list[Chunk] = []
    for step in feed:
        chunks.append(writer.add(step))
        if chunks[-1].finish_reason is not None:
            break
    return chunks


def texts(chunks: list[Chunk]) -> list[str]:
    return [chunk.text for chunk in chunks]


def test_chunks_carry_their_token(codec: TextCodec) -> None:
    ids = split(codec, "abc")
    chunks = run(codec, Feed(ids))
    assert texts(chunks) == ["a", "b", "c"]
    assert [chunk.token for chunk in chunks] == ids
    assert [chunk.ms for chunk in chunks] == [1.0, 2.0, 3.0]
    assert [chunk.generated_tokens for chunk in chunks] == [1, 2, 3]
    assert {chunk.prompt_tokens for chunk in chunks} == {5}
    assert {chunk.path for chunk in chunks} == {("full",) * 4}
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]


@pytest.mark.parametrize("reason", ["length", "context"])
def test_the_last_token_is_text_unless_it_is_the_end_token(
    codec: TextCodec, reason: FinishReason
) -> None:
    assert texts(run(codec, Feed(split(codec, "abc"), reason))) == ["a", "b", "c"]
    assert texts(run(codec, Feed(split(codec, "abc"), "stop"))) == ["a", "b", ""]


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(codec: TextCodec) -> None:
    feed = Feed(split(codec, "one END two"))
    chunks = run(codec, feed, "END")
    assert texts(chunks) == ["o", "n", "e", " ", "", "", ""]
    assert chunks[-1].finish_reason == "stop"
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * 6
    assert feed.taken == 7  # nothing is generated after it


def test_what_turns_out_to_be_no_stop_string_is_given_back(codec: TextCodec) -> None:
    assert texts(run(codec, Feed(split(codec, "aENbENDc")), "END")) == [
        *("a", "", "", "ENb", "", "", ""),
    ]
    assert texts(run(codec, Feed(split(codec, "aEN")), "END")) == ["a", "", "EN"]
    assert texts(run(codec, Feed([*split(codec, "aEN"), 1], "stop"), "END")) == ["a", "", "", "EN"]


def test_a_stop_string_that_begins_inside_its_own_beginning_is_found(codec: TextCodec) -> None:
    chunks = run(codec, Feed(split(codec, "xaabaaac")), "aaac")
    assert "".join(texts(chunks)) == "xaab"
    assert chunks[-1].finish_reason == "stop"
    assert "".join(texts(run(codec, Feed(split(codec, "\n\n\n!")), "\n\n!"))) == "\n"


def test_a_stop_string_inside_one_token_cuts_it(codec: TextCodec) -> None:
    the = codec.tokenizer.token_to_id("the")
    assert the is not None
    feed = Feed([the, the])
    chunks = run(codec, feed, "h")
    assert texts(chunks) == ["t"]
    assert chunks[0].finish_reason == "stop"
    assert feed.taken == 1


def test_the_first_of_several_stop_strings_ends_the_text(codec: TextCodec) -> None:
    assert "".join(texts(run(codec, Feed(split(codec, "a.b!c?d")), "?", "!", "c"))) == "a.b"
    the = codec.tokenizer.token_to_id("the")
    assert texts(run(codec, Feed([the]), "e", "h")) == ["t"]  # the earlier, not the first listed
    assert "".join(texts(run(codec, Feed(split(codec, "abXYc")), "XY", "bXY"))) == "a"


def test_a_stop_string_that_needs_the_last_token_is_a_stop(codec: TextCodec) -> None:
    chunks = run(codec, Feed(split(codec, "aEND"), "length"), "END")
    assert "".join(texts(chunks)) == "a"
    assert chunks[-1].finish_reason == "stop"


def test_stop_strings_of_wide_characters(codec: TextCodec) -> None:
    chunks = run(codec, Feed(split(codec, "中文😀好")), "😀")
    assert "".join(texts(chunks)) == "中文"
    assert not any("\ufffd" in chunk.text for chunk in chunks)
    # 😁 shares three bytes with 😀, but no character
    assert "".join(texts(run(codec, Feed(split(codec, "a😁b")), "😀"))) == "a😁b"


def test_an_answer_that_ends_inside_a_character_says_so(codec: TextCodec) -> None:
    assert texts(run(codec, Feed(split(codec, "a😀")[:-1]))) == ["a", "", "", "\ufffd"]
    chunks = run(codec, Feed([*split(codec, "aE😀")[:-1], 1], "stop"), "END")
    assert "".join(texts(chunks)) == "aE\ufffd"


@settings(max_examples=300)
@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_is_the_text_up_to_the_first_complete_stop_string(
    codec: TextCodec, text: str, stop: list[str]
) -> None:
    ids = split(codec, text + "Z")
    said, taken = text + "Z", len(ids)
    for end in range(1, len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            said, taken = text[: end - max(map(len, complete))], end
            break
    feed = Feed(ids)
    chunks = run(codec, feed, *stop)
    assert "".join(texts(chunks)) == said
    assert feed.taken == len(chunks) == taken
    assert chunks[-1].finish_reason == ("length" if taken == len(ids) else "stop")
    # Nothing is held that cannot become a stop string.
    for count in range(1, taken):
        so_far = "".join(texts(chunks[:count]))
        held = text[len(so_far) : count]
        assert not held or any(word.startswith(held) for word in stop)
