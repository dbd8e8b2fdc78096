"""A folder that stands for a model: a tokenizer of single bytes, a chat template, settings of the fake engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

FAKE_FACTORY = "kvfold_server.engine.fake:start_engine"

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if messages[0].content == 'refuse me' %}{{ raise_exception('I was told to') }}{% endif %}"
)


class MakeFakeModel(Protocol):
    """Writes a folder that stands for a model and returns it; keywords are those of FakeSettings."""

    def __call__(self, *, name: str = "fake", template: str | None = CHAT_TEMPLATE, **settings: object) -> Path: ...


@pytest.fixture
def fake_factory() -> str:
    return FAKE_FACTORY


@pytest.fixture
def make_fake_model(tmp_path: Path) -> MakeFakeModel:
    def make(*, name: str = "fake", template: str | None = CHAT_TEMPLATE, **settings: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(specials)
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        (folder / "fake_engine.json").write_text(json.dumps(settings))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make
