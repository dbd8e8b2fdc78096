"""What is left out when an engine loads its libraries and its model, and what stays as it was.

Each of these programs is a process of its own: in this one, transformers is imported as usual.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from support.tiny_models import ARCHITECTURES, tiny_model
from transformers.utils.import_utils import define_import_structure

LEFT_OUT = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp")
"""The compiler, and tensors that are spread over several processes."""

TOKENS = list(range(3, 23))


def run(program: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_engine_generates_without_compiler_and_without_distributed_tensors(tmp_path: Path) -> None:
    tiny_model(ARCHITECTURES["llama"]()).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    program = f"""
import sys
from kvfold_server.engine.options import EngineOptions
from kvfold_server.engine.stages import Stages
from kvfold_server.engine.starting import start_engine
from kvfold_server.generation.request import GenerationRequest, RequestId, SamplingParameters

engine = start_engine(EngineOptions(sys.argv[1], dtype="float32", kv_memory_bytes=4 << 20), Stages())
engine.submit(GenerationRequest(RequestId(1), tuple({TOKENS}), SamplingParameters(), max_tokens=4))
while engine.has_work:
    engine.step()
print(sorted(sys.modules.keys() & set({LEFT_OUT})))
"""
    assert run(program, tmp_path).strip() == "[]"


def exported_names() -> list[object]:
    structure = define_import_structure(Path(transformers.__file__).parent / "models", prefix="models")
    described = {
        "+".join(sorted(backends)): {module: sorted(names) for module, names in by_module.items()}
        for backends, by_module in structure.items()
    }
    return [described, sorted(transformers.__all__), sorted(transformers.models.__all__)]


def test_transformers_exports_the_same_names() -> None:
    program = f"""
import json
from pathlib import Path
from kvfold_server.models.lean_loading import lean_loading

with lean_loading():
    import transformers
    import transformers.models
from transformers.utils.import_utils import define_import_structure

{inspect.getsource(exported_names)}
print(json.dumps(exported_names()))
"""
    assert json.loads(run(program)) == exported_names()


def test_models_of_all_architectures_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    expected = {}
    for name, config in ARCHITECTURES.items():
        model = tiny_model(config())
        model.save_pretrained(tmp_path / name)
        expected[name] = model(torch.tensor([TOKENS])).logits
    program = f"""
import sys
from pathlib import Path
from kvfold_server.models.lean_loading import lean_loading

with lean_loading():
    import torch
    from safetensors.torch import save_file
    from kvfold_server.models.loading import load_model

    folders = sorted(Path(sys.argv[1]).iterdir())
    models = {{folder.name: load_model(folder, torch.float32, torch.device("cpu")) for folder in folders}}
tokens = torch.tensor([{TOKENS}])
save_file({{name: model(tokens).logits for name, model in models.items()}}, sys.argv[2])
"""
    run(program, tmp_path, tmp_path.with_suffix(".logits"))
    found = load_file(tmp_path.with_suffix(".logits"))
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, msg=lambda words, name=name: f"{name}: {words}")


def test_the_compiler_works_afterwards() -> None:
    program = """
import sys
from kvfold_server.models.lean_loading import lean_loading

with lean_loading():
    import torch
    import transformers.modeling_utils

graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

compiled = torch.compile(lambda x: x * 2 + 1, backend=backend)
print(compiled(torch.tensor([1.0, 2.0])).tolist(), len(graphs), torch.distributed.is_available())
"""
    assert run(program).strip() == f"[3.0, 5.0] 1 {torch.distributed.is_available()}"


def test_whoever_asks_the_compiler_for_more_than_marks_gets_it() -> None:
    program = """
import torch
from kvfold_server.models.lean_loading import lean_loading

with lean_loading():
    print(torch.compiler.list_backends(exclude_tags=()))
"""
    assert run(program).strip() == str(torch.compiler.list_backends(exclude_tags=()))
