"""Jobs in compiled code: the threads of torch's OpenMP pull them one by one, and none of them comes near Python.

Gains, over `openmp.parallel_for`: two threads begin and end in 1 µs instead of 33, and arguments of a compiled
function, some ten microseconds of them, are unpacked once a call instead of once a job, which holds the GIL
(one Xeon, two threads). Where torch's OpenMP can't be called: Python threads, as in `parallel_for`.
"""

# pyright: reportCallIssue=false, reportOptionalCall=false
# (numba.extending has no types that a checker understands)

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, typeof, types
from numba.core import cgutils
from numba.extending import intrinsic

from attngraph.kernels.cpu.compiler import compiled_with, renamed
from attngraph.kernels.cpu.openmp import callable_openmp, in_python_threads
from attngraph.kernels.cpu.simd import SIZE, pointer

_inner = partial(njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)
COUNT = types.intp
BYTES, NUMBER = ir.IntType(8).as_pointer(), ir.IntType(32)


@intrinsic
def next_of(typing, counter):
    """counter[0], which goes up by 1, as seen by all threads."""

    def generate(context, builder, sig, args):
        return builder.atomic_rmw("add", pointer(context, builder, counter, args[0], SIZE(0)), SIZE(1), "monotonic")

    return types.intp(counter), generate


@intrinsic
def call_in_threads(typing, gomp_parallel, num_threads, function, args):
    """function(*args) in each of so many threads, by the address of GOMP_parallel; whether any of them failed."""
    called = function.get_call_type(typing, args.types, {})

    def generate(context, builder, sig, values):
        address, threads, _, given = values
        compiled = function.dispatcher.overloads[called.args]
        context.add_linking_libs([compiled.library])
        shared = cgutils.alloca_once(builder, ir.LiteralStructType([given.type, NUMBER]))
        builder.store(given, cgutils.gep_inbounds(builder, shared, 0, 0))
        builder.store(NUMBER(0), cgutils.gep_inbounds(builder, shared, 0, 1))

        name = builder.module.get_unique_name(f"{compiled.fndesc.llvm_func_name}.thread")
        thread = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [BYTES]), name)
        thread.linkage = "internal"
        own = ir.IRBuilder(thread.append_basic_block())
        seen = own.bitcast(thread.args[0], shared.type)
        sides = cgutils.unpack_tuple(own, own.load(cgutils.gep_inbounds(own, seen, 0, 0)), len(args.types))
        status, _ = context.call_internal_no_propagate(own, compiled.fndesc, called, sides)
        with own.if_then(status.is_error):
            own.store(NUMBER(1), cgutils.gep_inbounds(own, seen, 0, 1))
        own.ret_void()

        parallel = ir.FunctionType(ir.VoidType(), [thread.type, BYTES, NUMBER, NUMBER]).as_pointer()
        sides = thread, builder.bitcast(shared, BYTES), builder.trunc(threads, NUMBER), NUMBER(0)
        builder.call(builder.inttoptr(address, parallel), sides)
        return builder.icmp_signed("!=", builder.load(cgutils.gep_inbounds(builder, shared, 0, 1)), NUMBER(0))

    return types.boolean(types.intp, types.intp, function, args), generate


class InThreads:
    """Of a function run(job, *args), what runs all of some jobs, each once: called with their number, and args.

    It is compiled with these options of Numba. No two jobs may write to one number. The only error that a thread can
    end by is a MemoryError, as kernels raise no other.
    """

    def __init__(self, run: Callable[..., None], **options: Any):
        run_one = _inner(**options)(renamed(run))

        @_inner()
        @renamed
        def pull(next_job, num_jobs, args):
            job = next_of(next_job)
            while job < num_jobs:
                run_one(job, *args)
                job = next_of(next_job)

        @compiled_with()
        def launch(gomp_parallel, num_threads, next_job, num_jobs, args):
            if num_threads == 1:
                pull(next_job, num_jobs, args)
            elif call_in_threads(gomp_parallel, num_threads, pull, (next_job, num_jobs, args)):
                raise MemoryError

        self.launch, self._compiled = launch, {}

    def __call__(self, num_jobs: int, *args: Any, kind: Hashable = None) -> None:
        """kind: tells args of these types from others; Numba then looks at them in the first such call alone.

        Gain: 1.8 µs instead of 8 for the 20 arrays and 15 numbers of `tiles_forward`.
        """
        num_threads, next_job = min(torch.get_num_threads(), num_jobs), np.zeros(1, np.int64)
        launch = self.launch if kind is None else self._compiled.get(kind) or self._compile(kind, args)
        if num_threads <= 1:
            launch(0, 1, next_job, num_jobs, args)
        elif (openmp := callable_openmp()) is not None:
            launch(openmp.address, num_threads, next_job, num_jobs, args)
        else:
            in_python_threads(lambda: launch(0, 1, next_job, num_jobs, args), num_threads)

    def serially(self, num_jobs: int, *args: Any) -> None:
        """The same by the calling thread alone."""
        self.launch(0, 1, np.zeros(1, np.int64), num_jobs, args)

    def _compile(self, kind: Hashable, args: tuple) -> Callable[..., None]:
        """The machine code for arguments of such types."""
        signature = COUNT, COUNT, typeof(np.zeros(1, np.int64)), COUNT, typeof(args)
        self.launch.compile(signature)
        self._compiled[kind] = self.launch.overloads[signature].entry_point
        return self._compiled[kind]


def in_threads(**options: Any) -> Callable[[Callable[..., None]], InThreads]:
    """The decorator of `InThreads`."""
    return partial(InThreads, **options)
