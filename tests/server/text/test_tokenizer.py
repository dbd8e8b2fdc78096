from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvfold_server.generation.draft import ChatMessage
from kvfold_server.text.chat import ChatTemplate, ChatTemplateError
from kvfold_server.text.detokenizer import make_detokenizer
from kvfold_server.text.tokenizer import Tokenizer, TokenizerError

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["Hello world", "  spaces ", "日本語 🎉 <|im_end|> <s>", "a\n\nb\tc", ""]

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TRIMMING = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' and not loop.first %}{{ raise_exception('system goes first') }}{% endif %}
{% generation %}[{{ message.role }}] {{ message.content | trim }}{{ eos_token }}{% endgeneration %}
{% if loop.index > 10 %}{% break %}{% endif %}
{% endfor %}
{{ {'role': 'x', 'html': '<&>'} | tojson }}{% if add_generation_prompt %}[assistant]{% endif %}"""

CHATS = [
    [("user", "Hi")],
    [("system", "Be brief. "), ("user", " What is 2+2?\n"), ("assistant", "Four, and ")],
    [("user", "<|im_end|>"), ("assistant", "x\n"), ("user", "日本語"), ("assistant", "so ")],
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_and_text_are_those_of_transformers(tokenizer_folder: Path, text: str) -> None:
    ours = Tokenizer.load(tokenizer_folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokens = ours.encode(text, add_special_tokens=True)
    assert tokens == theirs(text)["input_ids"]
    for skip in (True, False):
        assert ours.decode(tokens, skip_special_tokens=skip) == theirs.decode(tokens, skip_special_tokens=skip)
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert {theirs.bos_token_id, theirs.eos_token_id} <= ours.special_ids


@pytest.mark.parametrize("template", [CHATML, TRIMMING], ids=["chatml", "trimming"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("continued", [False, True])
def test_chats_are_rendered_as_transformers_renders_them(
    tokenizer_folder: Path, template: str, chat: list[tuple[str, str]], continued: bool
) -> None:
    if continued and chat[-1][0] != "assistant":
        chat = [*chat, ("assistant", "Well, ")]
    (tokenizer_folder / "chat_template.jinja").write_text(template)
    ours = ChatTemplate.load(tokenizer_folder, Tokenizer.load(tokenizer_folder).special_tokens)
    assert ours is not None
    theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).apply_chat_template(
        [{"role": role, "content": content} for role, content in chat],
        tokenize=False,
        add_generation_prompt=not continued,
        continue_final_message=continued,
    )
    messages = [ChatMessage(role, content) for role, content in chat]
    assert ours.render(messages, continue_final_message=continued) == theirs


def test_a_template_in_the_configuration_is_found(tokenizer_folder: Path) -> None:
    path = tokenizer_folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for template in ("{{ messages[0].content }}", [{"name": "default", "template": "{{ messages[0].content }}"}]):
        path.write_text(json.dumps(config | {"chat_template": template}))
        ours = ChatTemplate.load(tokenizer_folder, {})
        assert ours is not None
        assert ours.render([ChatMessage("user", "Hi")]) == "Hi"


def test_a_folder_without_a_template_has_none(tokenizer_folder: Path) -> None:
    assert ChatTemplate.load(tokenizer_folder, {}) is None


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.pop() }}",
        "{{ ''.__class__.__mro__ }}{{ messages[5].content.x }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_refuses_or_breaks_out_raises_one_error(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render([ChatMessage("user", "Hi")])


def test_a_broken_template_is_refused_at_once() -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate("{% if %}", {})


def test_a_last_message_that_the_template_drops_cannot_be_continued() -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate("{{ messages[0].content }}", {}).render(
            [ChatMessage("user", "Hi"), ChatMessage("assistant", "Well")], continue_final_message=True
        )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_the_default_model_speaks_as_transformers_does(default_model_folder: Path) -> None:
    ours = Tokenizer.load(default_model_folder)
    theirs = AutoTokenizer.from_pretrained(default_model_folder)
    template = ChatTemplate.load(default_model_folder, ours.special_tokens)
    assert template is not None
    for chat in CHATS:
        rendered = template.render([ChatMessage(*message) for message in chat])
        messages = [{"role": role, "content": content} for role, content in chat]
        assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = ours.encode(rendered, add_special_tokens=False)
        assert tokens == theirs(rendered, add_special_tokens=False)["input_ids"]
        detokenizer = make_detokenizer(ours, [])
        text = "".join([*(detokenizer.add(token) for token in tokens), detokenizer.finish()])
        assert text == theirs.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
