import pytest
from small_tokenizers import OWN_TEMPLATE, build
from transformers.utils.chat_template_utils import render_jinja_template

from mgllava.chat_templates import (
    PIECE_SEPARATOR,
    TEMPLATES,
    adapt_language_model_template,
    load_chat_template,
    stop_token_ids,
)

PICTURE = {"type": "image", "image": "cat.png"}


def render(source, messages, **variables):
    variables = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "piece_separator": PIECE_SEPARATOR,
        **variables,
    }
    rendered, _ = render_jinja_template(conversations=[messages], chat_template=source, **variables)
    return rendered[0]


def text(content):
    return {"type": "text", "text": content}


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(content):
    return {"role": "assistant", "content": content}


EXPECTED = {
    "vicuna": [
        "<s>",
        "USER: <image>\nWhat? ASSISTANT:",
        "A cat.",
        "</s>",
        "\n",
        "<s>",
        "USER: Why? ASSISTANT:",
    ],
    "llama-3": [
        "<s>",
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "A cat.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ],
    "phi-3": [
        "<s>",
        "<|user|><image>\nWhat?<|end|>\n<|assistant|>\n",
        "A cat.<|end|>",
        "\n",
        "<|user|>Why?<|end|>\n<|assistant|>\n",
    ],
    "chatml": [
        "<s>",
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n",
        "A cat.<|im_end|>",
        "\n",
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ],
}
SYSTEM = {
    "vicuna": "Be brief. USER: Hi ASSISTANT:",
    "llama-3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi-3": "<|system|>Be brief.<|end|>\n<|user|>Hi<|end|>\n<|assistant|>\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces(name):
    messages = [user(text(" What?\n"), PICTURE), assistant("A cat."), user("Why?")]
    source = load_chat_template(name).source
    assert render(source, messages, add_generation_prompt=True).split(PIECE_SEPARATOR) == EXPECTED[name]
    whole = render(source, messages[:2])
    next_turn = 2 if name == "vicuna" else 1  # Vicuna's turns each start with the token of a beginning
    assert whole.split(PIECE_SEPARATOR) == EXPECTED[name][:-next_turn]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_clean_unless_pieces_are_asked_for(name):
    messages = [user(text("What?"), PICTURE), assistant("A cat."), user("Why?")]
    source = load_chat_template(name).source
    rendered = render(source, messages, add_generation_prompt=True, piece_separator=None)
    assert rendered == "".join(EXPECTED[name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_system_message(name):
    messages = [{"role": "system", "content": [text("Be brief.")]}, user("Hi")]
    rendered = render(load_chat_template(name).source, messages, add_generation_prompt=True)
    assert rendered == f"<s>{PIECE_SEPARATOR}{SYSTEM[name]}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_header_of_the_answer_only_when_asked_for(name):
    rendered = render(load_chat_template(name).source, [user("Hi")])
    assert "ASSISTANT" not in rendered
    assert "assistant" not in rendered


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([assistant("Hi")], "message 1 is from assistant where user was expected"),
        ([user("Hi"), user("Hi")], "message 2 is from user where assistant was expected"),
        ([user("Hi"), assistant("A"), assistant("B")], "message 3 is from assistant"),
        ([user("Hi"), {"role": "tool", "content": "x"}], "message 2 is from tool"),
        ([user("Hi"), {"role": "system", "content": "x"}], "message 2 is from system"),
        ([], "no message from user"),
        ([{"role": "system", "content": "x"}], "no message from user"),
        ([user({"type": "video", "video": "a.mp4"})], "block of type video"),
        (
            [user("Hi"), {"role": "assistant", "content": [PICTURE]}],
            "from assistant holds a block of type image",
        ),
    ],
)
def test_wrong_conversations(name, messages, message):
    with pytest.raises(Exception, match=message):
        render(load_chat_template(name).source, messages)


@pytest.mark.parametrize(
    ("content", "flat"),
    [
        ([text("Compare "), PICTURE, text("these.\n"), PICTURE], "<image>\n<image>\nCompare these."),
        ([PICTURE], "<image>"),
        ([{"type": "image_url", "image_url": {"url": "x"}}, text("a")], "<image>\na"),
        ("Look at <image> this", "<image>\nLook at  this"),
        ("<image>\nLook", "<image>\nLook"),
        (" no picture\n", " no picture\n"),
        ("a\x1fb", "ab"),
        ([text("a\x1f"), text("b")], "ab"),
        ([], ""),
    ],
)
def test_content_becomes_one_string(content, flat):
    source = adapt_language_model_template("{{ messages[0].content }}")
    assert render(source, [{"role": "user", "content": content}]) == flat


def test_answers_cannot_hold_the_separator():
    rendered = render(load_chat_template("chatml").source, [user("Hi"), assistant("a\x1fb")])
    assert "ab<|im_end|>" in rendered


def test_adapted_template_is_otherwise_untouched():
    own = "\n  {{ bos_token }}\n{% for m in messages %}\n    {{ m.role }}\n{% endfor %}\n{{ tools is none }} "
    messages = [user("Hi"), {"role": "assistant", "tool_calls": [1]}]
    assert render(adapt_language_model_template(own), messages) == render(own, messages)
    keys = "{% for m in messages %}{{ m.keys() | list | string }}{% endfor %}"
    assert render(adapt_language_model_template(keys), messages) == render(keys, messages)


def test_tokens_may_be_missing():
    source = load_chat_template("chatml").source
    rendered = render(source, [user("Hi")], bos_token=None, eos_token=None)
    assert rendered.startswith(PIECE_SEPARATOR + "<|im_start|>user")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("phi3", "did you mean 'phi-3'"), ("LLaMA3", "'llama-3'"), ("zephyr", "expected one of vicuna")],
)
def test_unknown_template(name, hint):
    with pytest.raises(ValueError, match=hint):
        load_chat_template(name)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("legacy-llama", ["</s>"]),
        ("phi-like", ["<|endoftext|>", "<|end|>"]),
        ("llama-3-like", ["<|end_of_text|>", "<|eot_id|>"]),
        ("yi-like", ["<|endoftext|>", "<|im_end|>"]),
    ],
)
def test_stop_tokens(name, tokens):
    tokenizer = build(name)
    expected = tokenizer.convert_tokens_to_ids(tokens)
    assert stop_token_ids(tokenizer, OWN_TEMPLATE[name]) == expected
    assert stop_token_ids(tokenizer, load_chat_template(OWN_TEMPLATE[name])) == expected
    tokenizer.eos_token = tokens[-1]
    assert stop_token_ids(tokenizer, OWN_TEMPLATE[name]) == expected[-1:]


def test_stop_tokens_the_tokenizer_lacks():
    tokenizer = build("golden")
    with pytest.raises(ValueError, match=r"no single token <\|eot_id\|>.*'llama-3'"):
        stop_token_ids(tokenizer, "llama-3")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="there is none"):
        stop_token_ids(tokenizer, "vicuna")
