from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kvfold_server.byte_size import parse_bytes
from kvfold_server.settings import SettingsError, default_name, load_settings, split_model

MODEL = {"source": "default"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000", 1000),
        ("1KB", 1000),
        ("2k", 2000),
        ("1KiB", 1024),
        ("512MiB", 2**29),
        ("1.5 GiB", 3 * 2**29),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_are_read_with_their_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MiB", "-1", "0", "1 XB", "1e9", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("default", "default"),
        ("/models/Llama-3.2-1B", "Llama-3.2-1B"),
        ("./tiny/", "tiny"),
        ("HuggingFaceTB/SmolLM2-360M", "SmolLM2-360M"),
        ("models/my model.gguf", "my-model.gguf"),
    ],
)
def test_a_model_is_named_after_its_source(source: str, name: str) -> None:
    assert default_name(source) == name


def test_a_model_can_be_given_a_name() -> None:
    assert split_model("small=/models/a=b") == {"name": "small", "source": "/models/a=b"}
    assert split_model("/models/a=b") == {"source": "/models/a=b"}


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "kvfold.yaml"
    config.write_text(
        "host: 10.0.0.1\nport: 1\ngrace: 5\nmodels:\n  - source: default\n    kv_memory: 256MiB\n"
        "  - {name: other, source: /models/x, plan: plan.json}\n"
    )
    monkeypatch.setenv("KVFOLD_PORT", "2")
    monkeypatch.setenv("KVFOLD_GRACE", "6")
    settings = load_settings({"grace": "7"}, config)
    assert (settings.host, settings.port, settings.grace) == ("10.0.0.1", 2, 7.0)
    assert [model.name for model in settings.models] == ["default", "other"]
    assert settings.models[0].engine_options().kv_memory_bytes == 2**28
    assert settings.models[1].engine_options().plan == "plan.json"
    assert [model.name for model in load_settings({"models": [MODEL]}, config).models] == ["default"]


def test_settings_are_frozen() -> None:
    settings = load_settings({"models": [MODEL]})
    with pytest.raises(ValidationError):
        settings.port = 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"models": []}, "models: "),
        ({"models": [MODEL, MODEL]}, "several models are named default"),
        ({"models": [{"source": ""}]}, "models.0.source"),
        ({"models": [MODEL | {"name": "a b"}]}, "models.0.name"),
        ({"models": [MODEL | {"kv_memory": "lots"}]}, "'lots' is no size"),
        ({"models": [MODEL | {"kv_memory": "0"}]}, "models.0.kv_memory"),
        ({"models": [MODEL | {"dtype": "int3"}]}, "models.0.dtype"),
        ({"models": [MODEL | {"colour": "red"}]}, "models.0.colour"),
        ({"models": [MODEL | {"max_running": 600}]}, "step_tokens .* must be at least max_running"),
        ({"models": [MODEL], "port": 70000}, "port: "),
        ({"models": [MODEL], "tls_cert": "cert.pem"}, "TLS needs both"),
        ({"models": [MODEL], "grace": "nan"}, "grace: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        load_settings(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[", "- 1\n- 2", "just text", "models: {a: 1}"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str) -> None:
    config = tmp_path / "kvfold.yaml"
    config.write_text(content)
    with pytest.raises(SettingsError):
        load_settings({}, config)


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"there is no configuration file nowhere\.yaml"):
        load_settings({"models": [MODEL]}, Path("nowhere.yaml"))


def test_without_any_model_the_default_one_is_served() -> None:
    assert [(model.name, model.source) for model in load_settings({}).models] == [("default", "default")]
