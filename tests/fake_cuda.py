"""
Runs a script on tensors that say they are on cuda:0 and compute on the CPU: no GPU, a CPU build of torch.

    python tests/fake_cuda.py ppo.py --scale=tiny --device=cuda --out=DIR

Ends with exit status 1 and a traceback at the first device error. How: a shim of 20 lines of C++ (compiled
once by g++, loaded before torch) registers CUDA's hooks and a device guard, without which autograd on a CPU
build cannot hold a CUDA tensor; a tensor subclass carries the device and a CPU tensor; a dispatch mode runs
each aten operation on the latter. So control flow and values are real, and autocast("cuda") decides the
types.

Covers: operations that mix devices (a CPU tensor of one or more dimensions beside a CUDA one; one without
dimensions where other than elementwise operations take it; a CUDA index of a CPU tensor; .numpy()); the
types that CUDA's autocast gives and the type errors that follow; generators of the wrong device; moving,
tying, copying, saving and loading of networks and optimizers.
Does not cover: kernels, and what only they refuse or round otherwise (an index out of range, alignment,
unsupported types), which attention kernel is picked (one operation stands in for all), non-determinism,
streams and waits, CUDA graphs, several GPUs, memory, speed. An index on the CPU of a CUDA tensor passes, as
on a GPU: there it is copied.
"""

import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import zlib

SHIM = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
struct CUDAHooks : at::CUDAHooksInterface {  // the name under which torch looks for it
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
};
namespace at { using ::CUDAHooks; REGISTER_CUDA_HOOKS(CUDAHooks) }
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>) }
"""


def load_shim():
    """Compile and load the shim, before torch is imported: torch asks for the hooks once."""
    torch_at = os.path.dirname(importlib.util.find_spec("torch").origin)
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__pycache__")
    path = os.path.join(folder, f"fake_cuda_{zlib.crc32((torch_at + SHIM).encode())}.so")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        made = f"{path}.{os.getpid()}.tmp"  # renamed: two processes may begin at once
        command = f"g++ -O0 -std=c++20 -shared -fPIC -xc++ - -I{torch_at}/include -L{torch_at}/lib"
        command += f" -lc10 -ltorch_cpu -Wl,-rpath,{torch_at}/lib -Wl,--no-as-needed -o {made}"
        subprocess.run(command.split(), input=SHIM, text=True, check=True)
        os.replace(made, path)
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


load_shim()
import torch
import torch._dynamo  # before pretend(): it lists torch's functions by name, and refuses one under two
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class Cuda(torch.Tensor):
    """Says it is on cuda:0; `elem` is the CPU tensor that holds the numbers."""

    @staticmethod
    def __new__(cls, elem):
        layout = dict(strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, elem.size(), device="cuda:0", **layout)

    def __init__(self, elem):
        self.elem = elem

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"Cuda({self.elem})"

    def tolist(self):
        return self.cpu().tolist()


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


RANDOM = set("rand randn normal_ uniform_ bernoulli_ exponential_ randint randperm multinomial".split())
ELEMENTWISE = set("where masked_fill masked_fill_ fill_ lerp lerp_ copy_ clamp clamp_".split())
INDEXING = set("index index_put index_put_ _index_put_impl_ _unsafe_index".split())
cuda_generators = set()  # addresses: torch hands out new objects for the same generator


def dispatch(func, args, kwargs):
    """Run one aten operation on the CPU tensors inside, after checking what CUDA would refuse."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    cpu = [x for x in tensors if not isinstance(x, Cuda)]
    name, device = func._schema.name.removeprefix("aten::"), kwargs.get("device")
    to_cuda = len(tensors) > len(cpu) if device is None else torch.device(device).type == "cuda"
    if len(tensors) > len(cpu) > 0 and name not in ("_to_copy", "copy_"):
        check_devices(func, name, args, cpu)
    generator = kwargs.get("generator")
    if name in RANDOM and generator is not None and (generator._cdata in cuda_generators) != to_cuda:
        raise RuntimeError(f"{name}: expected a generator on {'cuda' if to_cuda else 'cpu'}")
    a, k = tree_map(lambda x: x.elem if isinstance(x, Cuda) else x, (args, kwargs))
    if device is not None:
        k["device"] = torch.device("cpu")
    out = func(*a, **k)
    if func._schema.is_mutable:
        return kwargs.get("out", args[0]) if func._schema.returns else None
    if to_cuda and name != "_local_scalar_dense":
        return tree_map(lambda x: Cuda(x) if isinstance(x, torch.Tensor) else x, out)
    return out


def check_devices(func, name, args, cpu):
    """Raise as CUDA does where plain CPU tensors stand beside CUDA tensors."""
    if name in INDEXING:
        if not isinstance(args[0], Cuda):
            raise RuntimeError("Expected indices on cpu, the device of the indexed tensor, but found cuda:0")
        indices = {id(x) for x in args[1]}
        cpu = [x for x in cpu if id(x) not in indices and x.dim()]  # a value may be a number on the CPU
    elif name in ELEMENTWISE or torch.Tag.pointwise in func.tags:
        cpu = [x for x in cpu if x.dim()]
    if cpu:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in cpu)
        message = "Expected all tensors to be on the same device, but found cuda:0 and cpu"
        raise RuntimeError(f"aten::{name}: {message} (on the CPU: {shapes})")


def attention(q, k, v, is_causal=False, sdpa=F.scaled_dot_product_attention):
    """Stands for the fused kernels of CUDA."""
    if not isinstance(q, Cuda):
        return sdpa(q, k, v, is_causal=is_causal)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(f"sdpa: query, key, value of types {q.dtype}, {k.dtype}, {v.dtype}")
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        new = torch._C.Generator.__new__(cls)
        is_cuda = torch.device(device).type == "cuda"
        (cuda_generators.add if is_cuda else cuda_generators.discard)(new._cdata)
        return new


def pretend():
    """Patch torch where the dispatch mode does not see what a project calls: CUDA is there."""
    torch._C._set_only_lift_cpu_tensors(True)
    cuda, yes, nothing = torch.cuda, lambda *a, **k: True, lambda *a: None
    cuda._lazy_init = cuda.set_device = cuda.manual_seed_all = cuda.manual_seed = cuda.synchronize = nothing
    cuda.is_available = cuda.is_bf16_supported = yes
    cuda.device_count, cuda.current_device, cuda.max_memory_allocated = lambda: 1, lambda: 0, lambda *a: 10**9
    torch.utils._foreach_utils._foreach_supported_types.append(Cuda)  # for fused optimizers
    torch.Generator, F.scaled_dot_product_attention = Generator, attention
    torch.__future__.set_swap_module_params_on_conversion(True)  # .to() of a network
    tensor, save = torch.tensor, torch.save
    torch.tensor = lambda data, *, device=None, **k: tensor(data, **k).to(device or "cpu")
    to_cpu = lambda x: x.detach().cpu() if isinstance(x, Cuda) else x
    torch.save = lambda x, *a, **k: save(tree_map(to_cpu, x), *a, **k)  # loaded by map_location="cpu" anyway


if __name__ == "__main__":
    del sys.argv[0]  # the script finds its own name and flags there
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    torch.set_num_threads(1)
    pretend()
    with Mode():
        runpy.run_path(sys.argv[0], run_name="__main__")
