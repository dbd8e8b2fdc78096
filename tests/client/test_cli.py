"""The `kvfold` command, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from kvfold.v1 import generation_pb2, memory_pb2

COMMANDS = ("bench", "calibrate", "chat", "demo", "eval", "generate", "memory", "serve")


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name != "KVFOLD_SERVER"}
    return subprocess.Popen(
        [sys.executable, "-m", "kvfold_client.cli", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean | environment,
    )


def kvfold(*arguments: str, typed: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    with start(*arguments, **environment) as process:
        output, errors = process.communicate(typed, timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def test_help_lists_every_command_with_a_line() -> None:
    done = kvfold("--help")
    assert done.returncode == 0
    listed = dict(
        line.split(None, 1) for line in done.stdout.splitlines() if line.startswith("  ") and "--" not in line
    )
    assert set(COMMANDS) <= set(listed)
    assert listed["generate"] == "Generate text from a prompt and stream it to standard output."


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from kvfold_client.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'grpc', 'rich', 'torch', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['rich'] = None; from kvfold_client.cli.main import main; sys.exit(main(['memory']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "kvfold memory: needs rich: pip install 'kvfold[cli]'\n")


def test_the_version_is_printed() -> None:
    done = kvfold("--version")
    assert (done.returncode, done.stdout) == (0, "kvfold 0.1.0\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a command"),
        (("fly",), "no command 'fly'"),
        (("generate", "--max-tokens", "many", "x"), "--max-tokens"),
        (("generate", "x", "--tempo", "1"), "--tempo"),
        (("generate", "x", "--max-tokens", "-1"), "max_tokens=-1"),
        (("generate", "x", "--tls-ca", "no-such-file.pem"), "cannot read no-such-file.pem"),
    ],
)
def test_a_wrong_argument_is_one_line_and_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = kvfold(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("command", [("generate", "x"), ("chat",), ("memory",), ("memory", "--watch")])
def test_a_server_that_is_not_there_is_one_line_and_code_1(command: tuple[str, ...]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    done = kvfold(*command, "--server", address)
    assert done.returncode == 1
    assert done.stderr.startswith(f"kvfold: no server answers at {address}; start one with `kvfold serve`")
    assert done.stderr.count("\n") == 1


def test_generate_streams_text_and_reports_memory_beside_it(server: Any) -> None:
    done = kvfold("generate", "a prompt", "--server", server.address, "--shared-layers", "8", "--seed", "3")
    assert (done.returncode, done.stdout) == (0, "Hello world\n")
    assert done.stderr.startswith("8 shared layers | KV held 220 B of 300 B | saved 80 B (27%) | 2 tokens at ")
    request = server.calls[0].request
    assert (request.prompt, request.quality.shared_layers, request.sampling.seed) == ("a prompt", 8, 3)
    assert not request.sampling.HasField("temperature")


def test_generate_reads_the_prompt_from_standard_input(server: Any) -> None:
    done = kvfold("generate", "--stop", "a", "--stop", "b", typed="from a pipe\n", KVFOLD_SERVER=server.address)
    assert done.returncode == 0
    assert server.calls[0].request.prompt == "from a pipe\n"
    assert list(server.calls[0].request.stopping.stop_strings) == ["a", "b"]


def test_generate_can_send_a_chat(server: Any) -> None:
    kvfold("generate", "Hi", "--system", "Be brief.", "--server", server.address)
    roles = [message.role for message in server.calls[0].request.chat.messages]
    assert roles == [generation_pb2.ROLE_SYSTEM, generation_pb2.ROLE_USER]


def test_generate_prints_json(server: Any) -> None:
    done = kvfold("generate", "a prompt", "--json", "--server", server.address)
    answer = json.loads(done.stdout)
    assert answer["text"] == "Hello world"
    assert answer["finish"]["reason"] == "length"
    assert answer["finish"]["memory"]["kv_bytes_saved"] == 80


def test_what_the_server_refuses_is_one_line_and_code_2(server: Any) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.temperature", description="too hot")
    server.answers["GenerateStream"] = lambda request, context: server.fail(
        context,
        grpc.StatusCode.INVALID_ARGUMENT,
        "sampling.temperature: too hot",
        error_details_pb2.BadRequest(field_violations=[violation]),
    )
    done = kvfold("generate", "x", "--temperature", "1000", "--server", server.address)
    assert (done.returncode, done.stderr) == (2, "kvfold: sampling.temperature: too hot\n")


def test_ctrl_c_ends_quietly_and_cancels_the_request(server: Any) -> None:
    server.answers["GenerateStream"] = server.chunks_until_cancelled
    with start("generate", "x", "--server", server.address) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == "Hello"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")
    assert server.cancelled.wait(10)


def test_a_reader_that_has_enough_is_no_error(server: Any) -> None:
    server.answers["GenerateStream"] = server.chunks_until_cancelled
    with start("generate", "x", "--server", server.address) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == ""
    assert server.cancelled.wait(10)


def test_chat_keeps_the_conversation_and_shows_what_was_saved(server: Any) -> None:
    typed = "Hi\n/depth 4\nAgain\n/clear\nAnew\n/quit\nnever sent\n"
    done = kvfold("chat", "--system", "Be brief.", "--server", server.address, typed=typed)
    assert done.returncode == 0
    assert done.stdout.count("Hello world") == 3
    assert done.stdout.count("saved 80 B (27%)") == 3
    first, second, third = (call.request for call in server.calls if call.method == "GenerateStream")
    assert [message.content for message in first.chat.messages] == ["Be brief.", "Hi"]
    assert not first.quality.HasField("shared_layers")
    assert [message.content for message in second.chat.messages] == ["Be brief.", "Hi", "Hello world", "Again"]
    assert second.quality.shared_layers == 4
    assert [message.content for message in third.chat.messages] == ["Be brief.", "Anew"]


def test_chat_goes_on_after_a_refusal(server: Any) -> None:
    good = server.answers["GenerateStream"]

    def refuse_once(request: object, context: grpc.ServicerContext) -> Any:
        if server.attempts["GenerateStream"] == 1:
            server.fail(context, grpc.StatusCode.INVALID_ARGUMENT, "too long")
        return good(request, context)

    server.answers["GenerateStream"] = refuse_once
    done = kvfold("chat", "--server", server.address, typed="first\nsecond\n")
    assert done.returncode == 0
    assert "too long" in done.stdout
    assert [message.content for message in server.calls[-1].request.chat.messages] == ["second"]


def test_memory_shows_the_pool(server: Any) -> None:
    done = kvfold("memory", "--server", server.address, COLUMNS="120")
    assert done.returncode == 0
    for fact in ("tiny", "30% of 1000 B", "2 running", "1 waiting", "25%"):
        assert fact in done.stdout


def test_memory_prints_json(server: Any) -> None:
    done = kvfold("memory", "--json", "--server", server.address)
    (pool,) = json.loads(done.stdout)
    assert pool["state_bytes"] == {"free": 700, "prefill": 100, "decode": 200}


def test_memory_is_watched_until_ctrl_c(server: Any) -> None:
    def endless(request: object, context: grpc.ServicerContext) -> Any:
        while context.is_active():
            yield memory_pb2.WatchMemoryResponse(models=[memory_pb2.ModelMemory(model="tiny", ready=True)])
            time.sleep(0.02)

    server.answers["WatchMemory"] = endless
    with start("memory", "--watch", "--json", "--interval", "0.5", "--server", server.address) as process:
        assert process.stdout is not None
        seen = [json.loads(process.stdout.readline())[0]["model"] for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (seen, process.returncode, errors) == (["tiny"] * 3, 130, "")
    assert server.calls[0].request.interval.ToMilliseconds() == 500
