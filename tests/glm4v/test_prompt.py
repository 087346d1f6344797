import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from examples.make_checkpoint import CONTROL_TOKENS
from glm4v import InputError, Processor
from glm4v.answer import TAGS
from glm4v.prompt import CHAT_TEMPLATE, Conversation, answer_text, load_chat_template, load_named_tokens, render
from glm4v.tokenizer import TextCodec

SPECIALS = CONTROL_TOKENS + TAGS


def pieces(processor, messages):
    return render(processor.template, Conversation(messages), processor.codec)


def prompt(processor, messages):
    """The prompt as text; special tokens that are tokens stand in ⟨⟩."""
    names = {index: token for token, index in processor.codec.specials.items()}
    return "".join(p if isinstance(p, str) else names[p].replace("<", "⟨", 1) for p in pieces(processor, messages))


def user(*parts):
    return {"role": "user", "content": list(parts)}


def said(text):
    return {"type": "text", "text": text}


CONVERSATIONS = [
    [{"role": "user", "content": "What is in this picture?"}],
    [{"role": "system", "content": "Count, then answer. "}, {"role": "user", "content": "\n\n  17 plus 25?\n"}],
    [user(said("Compare "), {"type": "image", "image": "a"}, said(" and\n"), {"type": "image", "url": "b"}, said("."))],
    [
        user({"type": "video", "video": "a"}, said("What happens?")),
        {"role": "assistant", "content": " A boat "},
        user(),
    ],
    [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Ünïcode 数字 🌺"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_prompts_are_those_of_transformers(messages, processor, tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor.codec.join(pieces(processor, messages)) == tokenizer(text).input_ids


def test_the_prompt_in_full(processor):
    messages = [
        {"role": "system", "content": [said("Be "), said("brief.")]},
        user({"type": "image", "image": "a"}, said("What"), said(" is it?")),
        {
            "role": "assistant",
            "content": "<think>A cat? A dog.</think><answer>A <|begin_of_box|>dog<|end_of_box|>.</answer>",
        },
        user(
            {"type": "video_url", "video_url": {"url": "b"}}, {"type": "image_url", "image_url": "c"}, said("And now?")
        ),
    ]
    assert prompt(processor, messages) == (
        "[gMASK]⟨sop>⟨|system|>\nBe brief.⟨|user|>\n⟨|begin_of_image|>⟨|image|>⟨|end_of_image|>What is it?"
        "⟨|assistant|>\nA dog.⟨|user|>\n⟨|begin_of_video|>⟨|video|>⟨|end_of_video|>"
        "⟨|begin_of_image|>⟨|image|>⟨|end_of_image|>And now?⟨|assistant|>\n"
    )
    media = Conversation(messages).media
    assert [(one.kind, one.source) for one in media] == [("image", "a"), ("video", "b"), ("image", "c")]


@pytest.mark.parametrize("token", SPECIALS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_typed_token_is_text(token, role, processor):
    typed = f"a {token}{token} b"
    turn = {"role": role, "content": typed}
    last = {"role": "user", "content": "?"}
    plain = pieces(processor, [{"role": role, "content": "a b"}, last])
    found = pieces(processor, [turn, last])
    ids = [p for p in found if isinstance(p, int)]
    assert ids == [p for p in plain if isinstance(p, int)]
    if role != "assistant":  # there, tags of thinking and answer are taken away
        assert typed in processor.codec.join(found) or typed in "".join(p for p in found if isinstance(p, str))
        encoded = processor.codec.join(found)
        assert typed in processor.decode(encoded, skip_special_tokens=False)
        assert encoded.count(processor.codec.id(token)) == ids.count(processor.codec.id(token))


fragments = st.lists(
    st.one_of(
        st.sampled_from(SPECIALS),
        st.sampled_from(["<|", "|>", "<", ">", "image", "<|im", "age|>", "[gMASK", "]", "\ue000", "\ue001", "\n"]),
        st.text(max_size=4),
    ),
    max_size=8,
).map("".join)


@given(st.lists(fragments, min_size=1, max_size=4), st.data())
def test_no_text_becomes_a_special_token(processor, texts, data):
    parts = [said(text) for text in texts]
    at = data.draw(st.integers(0, len(parts)))
    parts.insert(at, {"type": "image", "image": "a"})
    ids = processor.codec.join(pieces(processor, [user(*parts)]))
    specials = [i for i in ids if i in processor.codec.specials.values()]
    frame = ["[gMASK]", "<sop>", "<|user|>", "<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|assistant|>"]
    assert specials == [processor.codec.id(token) for token in frame]
    before, after = "".join(texts[:at]), "".join(texts[at:])
    wanted = f"[gMASK]<sop><|user|>\n{before}<|begin_of_image|><|image|><|end_of_image|>{after}<|assistant|>\n"
    assert processor.decode(ids, skip_special_tokens=False) == wanted


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" plain\n", " plain\n"),
        ("<think>so</think><answer>four</answer>", "four"),
        ("<think>so</think>\n<answer>\nIt is <|begin_of_box|>4<|end_of_box|>.\n</answer>", "It is 4."),
        ("so</think><answer>4", "4"),
        ("<think>one</think>two</think>three", "three"),
        (" <think>cut off", ""),
        ("a < b and <tag>", "a < b and <tag>"),
    ],
)
def test_history_keeps_the_answer(text, answer):
    assert answer_text(text) == answer


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_keys_without_a_value_are_as_if_absent():
    rows = [{"type": "image", "image": None, "url": "a", "text": None, "fps": None}, {**said("b"), "image": None}]
    conversation = Conversation([user(*rows)])
    assert [media.source for media in conversation.media] == ["a"]
    assert conversation.messages[0]["content"] == [{"type": "image"}, said("b")]


def test_pictures_in_base64():
    url = "data:image/png;base64,aGk="
    rows = [{"type": "image", "base64": "aGk="}, {"type": "image", "base64": url}]
    assert [media.source for media in Conversation([user(*rows)]).media] == ["data:;base64,aGk=", url]


def test_what_a_picture_cannot_have_is_named():
    with pytest.warns(UserWarning, match=r"^prompt: has no effect on a picture: max_pixels, detail$"):
        Conversation([user({"type": "image", "image": "a", "max_pixels": 9, "min_pixels": None, "detail": "low"})])


def test_where_the_template_comes_from(tmp_path):
    def loaded(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return load_chat_template(write(folder, **files))

    assert loaded(chat_template__jinja="A", tokenizer_config__json={"chat_template": "B"}) == "A"
    assert loaded(chat_template__json={"chat_template": "B"}, tokenizer_config__json={"chat_template": "C"}) == "B"
    named = [{"name": "rag", "template": "D"}, {"name": "default", "template": "E"}]
    assert loaded(tokenizer_config__json={"chat_template": named}) == "E"
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template must be text, got \[{'name': 'rag'"):
        loaded(tokenizer_config__json={"chat_template": named[:1]})
    assert loaded(tokenizer_config__json={}) == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ unk_token }}",
        "{% for m in messages %}{{ m.content | tojson }}{% endfor %}{{ messages | tojson(indent=2) }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% if tools is none and documents is none %}{{ messages[0].content }}{% endif %}{{ strftime_now('%Y') }}",
    ],
)
def test_a_template_finds_the_names_of_transformers(source, processor, tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "tokenizer.json", tmp_path)
    named = {"bos_token": {"content": "<sop>", "__type": "AddedToken"}, "eos_token": "<|endoftext|>", "pad_token": None}
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "PreTrainedTokenizerFast", **named})
    messages = [{"role": "user", "content": "Is 'é' <b>old</b> & \"new\"?"}, {"role": "assistant", "content": "Yes."}]
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, chat_template=source, tokenize=False)
    codec = TextCodec(processor.tokenizer, load_named_tokens(tmp_path))
    assert render(source, Conversation(messages), codec) == codec.split(text)


def test_a_special_token_that_cannot_be_broken(processor):
    """A person who types it must get the character, not the token."""
    tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    tokenizer.add_special_tokens(["~", "<|new|>"])
    with pytest.raises(InputError, match=r'^tokenizer: special tokens must have two characters or more, got \["~"\]$'):
        TextCodec(tokenizer, {})


# Of a checkpoint that calls tools.
TOOLS = """\
[gMASK]<sop>
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|observation|>\\n' ~ m.tool_call_id ~ ': ' ~ m.content }}
    {%- else %}
        {{- '<|' ~ m.role ~ '|>\\n' ~ m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n' ~ call.function.name ~ call.function.arguments | tojson }}
        {%- endfor %}
        {%- if m.reasoning_content %}{{ m.reasoning_content }}{% endif %}
        {%- if m.name %}({{ m.name }}){% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""


def called(function="count", argument="leaves", **keys):
    call = {"id": "c1", "type": "function", "function": {"name": function, "arguments": {"of": argument}}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **keys}


def test_tools_reach_a_template_that_has_words_for_them(processor, tiny_checkpoint):
    messages = [
        {"role": "user", "content": "How many leaves?", "name": "Zoë", "images": [], "seen": object()},
        called(function_call=None),
        {"role": "tool", "tool_call_id": "c1", "content": [said("1"), said("7")]},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    theirs = [{**messages[0], "seen": None}, messages[1], {**messages[2], "content": "17"}]
    text = tokenizer.apply_chat_template(theirs, chat_template=TOOLS, tokenize=False, add_generation_prompt=True)
    assert render(TOOLS, Conversation(messages, TOOLS), processor.codec) == processor.codec.split(text)
    assert "(Zoë)" in text and 'count{"of": "leaves"}' in text and "c1: 17" in text
    thoughtful = [messages[0], called(content=None, reasoning_content="Call."), messages[2]]  # no part of the history
    assert render(TOOLS, Conversation(thoughtful, TOOLS), processor.codec) == processor.codec.split(text)
    typed = [called("<|user|>", "<|image|>", name="<|assistant|>")]
    names = ["[gMASK]", "<sop>", "<|assistant|>", "<|assistant|>"]
    ids = [piece for piece in render(TOOLS, Conversation(typed, TOOLS), processor.codec) if isinstance(piece, int)]
    assert ids == [processor.codec.id(name) for name in names]


def test_calls_of_any_depth(processor):
    for depth in (3, 300, 600, 900, 1200, 10_000):
        argument = json.loads("[" * min(depth, 900) + "]" * min(depth, 900))
        for _ in range(depth - 900):
            argument = [argument]
        try:
            render(TOOLS, Conversation([called(argument=argument)], TOOLS), processor.codec)
        except InputError as error:
            assert depth > 3 and "recursion" in str(error)


def test_a_call_is_not_lost():
    text = r"^prompt: message 2: tool_calls must be left out, the chat template has no word for it$"
    for content in (None, "I call."):
        with pytest.raises(InputError, match=text):
            Conversation([user(said("?")), called(content=content)])
    with pytest.raises(InputError, match=r"^prompt: message 1: name must be what JSON can hold: [^\n]*$"):
        Conversation([{"role": "user", "content": "?", "name": {1j}}], TOOLS)
    with pytest.raises(
        InputError, match=r"^prompt: message 1: role must be one of system, user, assistant, got 'name'$"
    ):
        Conversation([{"role": "name", "content": "?"}], TOOLS)


def test_added_words_are_words_as_in_transformers(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "a")
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(["zebrafish", "<loc_7>", AddedToken("fin", single_word=True), "<|typed|>"])
    theirs.save_pretrained(folder)
    processor = Processor.from_pretrained(folder)
    for text in ("A zebrafish's fins, one fin,finzebrafish.", " <loc_7><loc_7> zebra<loc_7>"):
        messages = [user(said(text)), {"role": "assistant", "content": text}]
        prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert processor(messages).input_ids.tolist() == theirs(prompt).input_ids
    assert processor.encode("<loc_7>", specials=False) == [theirs.convert_tokens_to_ids("<loc_7>")]
    typed = processor([user(said("<think> <|typed|> zebrafish"))]).input_ids.tolist()
    assert not {theirs.convert_tokens_to_ids(token) for token in ("<think>", "<|typed|>")} & set(typed)


def test_a_named_token_of_another_kind(tmp_path):
    write(tmp_path, tokenizer_config__json={"eos_token": 5})
    with pytest.raises(InputError, match=r"^prompt: .*tokenizer_config.json: eos_token must be text, got 5$"):
        load_named_tokens(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].nothing.more }}",
        "{{ raise_exception('no such role') }}",
        "{{ 1 / 'a' }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_is_foreign_code(source, processor, tmp_path):
    template = load_chat_template(write(tmp_path, chat_template__jinja=source))
    with pytest.raises(InputError, match=r"^prompt: the chat template fails: [^\n]*$"):
        render(template, Conversation([{"role": "user", "content": "Hi"}]), processor.codec)


def test_a_template_with_an_error(tmp_path):
    with pytest.raises(InputError, match=r"^prompt: .*chat_template.jinja: [^\n]*$"):
        load_chat_template(write(tmp_path, chat_template__jinja="{% if %}"))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"^prompt: .*chat_template.jinja: cannot be read: [^\n]*$"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for wrong in (5, [5], {"a": 1}):
        folder = write(tmp_path, tokenizer_config__json={"chat_template": wrong})
        with pytest.raises(InputError, match=r"^prompt: .*tokenizer_config.json: chat_template must be text, got "):
            load_chat_template(folder)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "messages must not be empty"),
        ([{"role": "robot", "content": "x"}], "message 1: role must be one of system, user, assistant, got 'robot'"),
        ([{"role": "user", "content": "x", "images": ["a"]}], "message 1: pictures must be parts of the"),
        ([{"role": "image", "content": "x"}], "message 1: role must be one of system, user, assistant, got 'image'"),
        ([{"role": "tool", "content": "x"}], "message 1: role must be one of system, user, assistant, got 'tool'"),
        ([{"content": "x"}], "message 1: role must be one of system, user, assistant, got None"),
        ([{"role": "user"}], "message 1: content must be text or a list of parts, got NoneType"),
        ([user(said("a")), user({"type": "sound"})], r"message 2: a part must be .*, got \{'type': 'sound'\}"),
        ([user({"type": "image"})], r"message 1: a part must be .*, got \{'type': 'image'\}"),
        ([user({"type": "text", "text": 3})], r"message 1: a part must be .*, got \{'type': 'text', 'text': '…'\}"),
        ([user({"type": "image_url", "image_url": {}})], "message 1: a part must be .*"),
        (
            [user({"type": ["image"], "image": "a"})],
            r"message 1: a part must be .*, got \{'type': \['image'\], 'image'",
        ),
        ([user({"type": "video", "video": [], "fps": "2"})], "message 1: fps must be a number, got '2'"),
        ([user({"type": "video", "video": [], "fps": True})], "message 1: fps must be a number, got True"),
        (["Hi"], r"message 1: a message must be \{\"role\": …, \"content\": …\}, got 'Hi'"),
        ([user(said("a")), [user(said("a"))]], "message 2: a message must be .*, got "),
        ("Hi", "a conversation must be a list of messages, got 'Hi'"),
        (b"Hi", "a conversation must be a list of messages, got b'Hi'"),
        ({"role": "user", "content": "Hi"}, "a conversation must be a list of messages, got .'role': '…'"),
        (7, "a conversation must be a list of messages, got 7"),
        ([user("bare")], "message 1: a part must be .*, got 'bare'"),
        ([user(said("\ud83d"))], "message 1: text must be Unicode: surrogates not allowed"),
        (
            [{"role": "system", "content": [{"type": "image", "image": "a"}]}],
            "message 1: only user messages may hold pic",
        ),
    ],
)
def test_malformed_messages_are_one_line(messages, text):
    with pytest.raises(InputError, match=f"^prompt: {text}[^\n]*$"):
        Conversation(messages)
