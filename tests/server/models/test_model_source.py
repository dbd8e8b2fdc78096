"""Finding a model by what a person calls it."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch
from support.tiny_gguf import write_tiny_gguf
from support.tiny_models import ARCHITECTURES, tiny_model

from kvfold_server.models.cache_folder import cache_root, prepared_folder
from kvfold_server.models.errors import ModelSourceError
from kvfold_server.models.loading import load_model
from kvfold_server.models.source import resolve_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_complete_folder_is_used_as_it_is(tmp_path: Path) -> None:
    tiny_model(ARCHITECTURES["llama"]()).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_a_folder_lacks_is_named(tmp_path: Path, missing: str) -> None:
    for name in {"config.json", "model.safetensors", "tokenizer.json"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(ModelSourceError, match=missing.removeprefix("model.")):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["", "nothing", "./nothing", "nothing.gguf", "a/b/c", "some/model.gguf"])
def test_a_name_that_is_nothing_says_what_it_could_be(name: str, cache: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"default|config\.json"):
        resolve_model(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(ModelSourceError, match="GGUF"):
        resolve_model(str(file))


def test_a_hub_model_without_a_hub_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelSourceError, match="the hub cannot be reached"):
        resolve_model("nobody/nothing")


def test_a_gguf_file_becomes_a_folder_once(tmp_path: Path, cache: Path) -> None:
    model = tiny_model(ARCHITECTURES["llama"]())
    file = write_tiny_gguf(model, tmp_path / "tiny.gguf")
    folder = resolve_model(str(file))
    assert folder.is_relative_to(cache)
    loaded = load_model(folder, torch.float32, torch.device("cpu"))
    tokens = torch.arange(20)[None]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)

    copy = file.rename(tmp_path / "renamed.gguf")
    started = time.monotonic()
    assert resolve_model(str(copy)) == folder
    assert time.monotonic() - started < 1.0


def test_a_broken_gguf_file_says_what_is_wrong_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelSourceError, match=r"broken\.gguf cannot be converted"):
        resolve_model(str(file))
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVFOLD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "kvfold"
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def test_a_preparation_that_fails_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ModelSourceError("no")

    with pytest.raises(ModelSourceError):
        prepared_folder("model", fail)
    assert [path.name for path in (cache / "models").iterdir()] == ["model.lock"]
    assert prepared_folder("model", lambda folder: (folder / "whole").touch()).joinpath("whole").exists()


def test_two_processes_prepare_once(cache: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from kvfold_server.models.cache_folder import prepared_folder\n"
        "def prepare(folder):\n"
        "    with open(sys.argv[1], 'a') as log: log.write('x')\n"
        "    time.sleep(0.5); (folder / 'done').touch()\n"
        "assert (prepared_folder('model', prepare) / 'done').exists()\n"
    )
    log = tmp_path / "log"
    processes = [subprocess.Popen([sys.executable, "-c", script, str(log)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert log.read_text() == "x"


def test_resolving_imports_no_torch() -> None:
    script = (
        "import sys, kvfold_server.models.source; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
