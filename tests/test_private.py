"""What this package uses of PyTorch, diffusers and others that they do not promise to keep: all of it, in one place.

A test each, of what the name does and not of its being there alone; `test_the_list_is_whole` looks for others.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from conftest import tiny_model, tiny_pipeline
from pixeldecoder.models.layers import ONEDNN, Linear

SOURCE = Path(__file__).parents[1] / "src/pixeldecoder"
LISTED = {
    "torch._foreach_norm", "torch._foreach_mul_", "torch.cpu._is_avx512_bf16_supported",
    "torch.cpu._is_amx_tile_supported", "torch.ops.mkldnn._linear_pointwise",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported", "torch._inductor", "torch._dynamo",
    "torch.utils._pytree", "torch.utils._python_dispatch", "torch.__version__",
    "diffusers.models.attention_dispatch._check_attention_backend_requirements",
    "diffusers.hooks.group_offloading._is_group_offload_enabled",
}  # fmt: skip


def test_the_list_is_whole():
    seen = set()
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        seen |= set(re.findall(r"\b(?:torch|diffusers|transformers|accelerate|peft)(?:\.[a-z]\w*)*\._\w+", text))
        for module, names in re.findall(
            r"^ *from ((?:torch|diffusers|transformers|peft)[\w.]*) import ([^(\n]+)", text, re.M
        ):
            seen |= {f"{module}.{name}" for name in re.split(r"[,\s]+", names) if name.startswith("_")}
    assert seen == LISTED


def test_foreach():
    values = [torch.tensor([3.0, -4.0]), torch.tensor([1.0])]
    assert [norm.item() for norm in torch._foreach_norm(values, float("inf"))] == [4, 1]
    torch._foreach_mul_(values, torch.tensor(2.0))
    assert values[0].tolist() == [6, -8]


def test_what_a_cpu_can():
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool) and isinstance(
        torch.cpu._is_amx_tile_supported(), bool
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN")
def test_linear_of_onednn():
    x, linear = torch.randn(5, 8), torch.nn.Linear(8, 3)
    with torch.no_grad():
        made = torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, "none", [], "")
    assert torch.allclose(made, linear(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_in_what_a_cpu_has_no_instructions_for(dtype):
    """oneDNN refuses those, which PyTorch computes all the same."""
    assert (torch.bfloat16 in ONEDNN) == (bool(ONEDNN) and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    x, linear = torch.randn(5, 8, dtype=dtype), Linear(8, 3).to(dtype)
    with torch.no_grad():
        assert torch.allclose(linear(x).float(), linear.float()(x.float()), atol=0.05)


def test_errors_of_compilation():
    import torch._dynamo.exc
    import torch._inductor.exc

    assert torch._dynamo.exc.Unsupported.__module__.startswith("torch._dynamo")
    assert torch._inductor.exc.InductorError.__module__.startswith("torch._inductor")


def test_trees():
    from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

    tree = {"a": [1, (2, 3)]}
    leaves, spec = tree_flatten(tree)
    assert tree_unflatten(leaves, spec) == tree and tree_leaves(tree) == [1, 2, 3]
    assert tree_map(lambda x: 2 * x, tree) == {"a": [2, (4, 6)]}


def test_dispatch_is_seen():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **kwargs or {})

    with Seen():
        torch.ones(2) @ torch.ones(2)
    assert "aten.dot.default" in Seen.names


def test_requirements_of_attention():
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    assert _check_attention_backend_requirements(AttentionBackendName.NATIVE) is None
    with pytest.raises((RuntimeError, ImportError)):
        _check_attention_backend_requirements(AttentionBackendName.SAGE)


def test_group_offload_is_seen():
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    model = tiny_model()
    assert not _is_group_offload_enabled(model)
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert _is_group_offload_enabled(model)


def test_what_a_pipeline_is_asked_for():
    """`_execution_device`, `_hf_hook`, and the names that callbacks set."""
    pipeline = tiny_pipeline()
    assert pipeline._execution_device == torch.device("cpu")
    assert isinstance(inspect.getattr_static(DiffusionPipeline, "_execution_device"), property)
    from accelerate.hooks import ModelHook, add_hook_to_module

    assert hasattr(add_hook_to_module(torch.nn.Linear(1, 1), ModelHook()), "_hf_hook")
    from diffusers.callbacks import SDCFGCutoffCallback

    assert "pipeline._guidance_scale = " in inspect.getsource(SDCFGCutoffCallback)
