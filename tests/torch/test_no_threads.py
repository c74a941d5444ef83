"""Filling an adapter in another thread where none is to be had, and memory that is not to be had: on the build that people
use, under a library that lets pthread_create and mmap fail on demand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>

int no_threads, threads_refused, mmap_countdown, mmap_refused;

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg)
{
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    if (no_threads) {
        threads_refused++;
        return EAGAIN;
    }
    return real(thread, attr, run, arg);
}

void *mmap(void *at, size_t bytes, int protection, int flags, int file, off_t offset)
{
    static void *(*real)(void *, size_t, int, int, int, off_t);
    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "mmap");
    if (mmap_countdown > 0 && --mmap_countdown == 0) {
        mmap_refused++;
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return real(at, bytes, protection, flags, file, offset);
}
"""

PROGRAM = """
import ctypes, gc, os, sys, tempfile, traceback, warnings
import torch
from torch import nn
import peftc
from peftc import _core

warnings.simplefilter("ignore")
shim = ctypes.CDLL(sys.argv[1])
flag = lambda name: ctypes.c_int.in_dll(shim, name)
no_threads, refused = flag("no_threads"), flag("threads_refused")
countdown, no_memory = flag("mmap_countdown"), flag("mmap_refused")
_core.set_num_threads(2)


class Model(peftc.PeftAdapterMixin, nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(24))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def config(dtype=None):
    return peftc.LoraConfig(r=16, target_modules="layers[.]\\\\d+", init_lora_weights=False)


x, folder = torch.ones(2, 256), tempfile.mkdtemp()
plain = Model()(x)  # torch has its threads now
saved = Model()
saved.add_adapter(config())
state = {key: tensor.clone() for key, tensor in saved.get_adapter_state_dict().items()}
saved.save_adapter(folder)
want = saved(x)
half = {key: tensor.half() for key, tensor in state.items()}
sources = {
    "file": lambda m: m.load_adapter(folder),
    "state": lambda m: m.load_adapter(adapter_state_dict=state, peft_config=config()),
    "half": lambda m: m.load_adapter(adapter_state_dict=half, peft_config=config()),
    "fresh": lambda m: m.add_adapter(config()),
}
"""

THREADS = """
def try_without(name, make):
    model, before = Model(), refused.value
    no_threads.value = 1
    try:
        make(model)
    finally:
        no_threads.value = 0
    assert refused.value > before, name
    got = model(x)
    if name == "fresh":
        again = Model()
        again.add_adapter(config())
        for key, tensor in again.get_adapter_state_dict().items():
            assert tensor.shape == model.get_adapter_state_dict()[key].shape and tensor.std() > 0
        assert not torch.equal(got, plain)
    elif name != "half":
        assert torch.equal(got, want), name
    else:
        assert (got - want).abs().max() < 0.05 * want.abs().max()
    model.delete_adapter("default")
    assert torch.equal(model(x), plain)


for name, make in sources.items():
    child = os.fork()  # where the thread that filled `saved`, and may be waiting for more to do, is not
    if child == 0:
        code = 1
        try:
            try_without(name, make)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, name
print("good")
"""

MEMORY = """
for name, make in sources.items():
    failures = 0
    for n in range(1, 200):
        model = Model()
        keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
        before = no_memory.value
        countdown.value = n
        try:
            make(model)
        except (MemoryError, OSError):
            failures += 1
            countdown.value = 0
            assert list(model.state_dict()) == keys, (name, n)
            assert [p.requires_grad for p in model.parameters()] == flags
            assert not model._hf_peft_config_loaded and "peft_config" not in model.__dict__
            assert torch.equal(model(x), plain)
            make(model)
        countdown.value = 0
        if name != "half":
            assert not torch.equal(model(x), plain) and (name == "fresh" or torch.equal(model(x), want)), (name, n)
        if no_memory.value == before:
            break
    assert failures > 0, name
    assert n < 199
print("good")
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC", "cc").split()[-1]) or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, folder / "shim.c", "-ldl"], check=True)
    return str(library)


@pytest.mark.parametrize("part", [THREADS, MEMORY], ids=["threads", "memory"])
def test_what_is_not_to_be_had(shim, part):
    environment = {**os.environ, "LD_PRELOAD": shim, "OMP_NUM_THREADS": "1"}
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(part)
    done = subprocess.run(
        [sys.executable, "-c", program, shim], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0 and done.stdout == "good\n", done.stderr[-3000:]
