"""A PTX interpreter in NumPy, which tests hand-written kernels without a GPU.

A warp's 32 lanes execute together under a mask. Divergent lanes at the lowest instruction run
first, so that lanes reconverge. The warps of a block run one after another, each to its next
barrier. Their order is random, by seed, and changes at every barrier, so a missing barrier shows.

Blocks start in random order, a few at once, and interleave at random. A block that polls with an
acquiring load yields to others and lets one more start, so all blocks of a launch are resident.
Relaxed stores become visible late, to a later load. Bulk copies are as late as allowed: bytes land
when a thread tries their barrier. Shared memory is read, and global memory stored, when the copy's
group is waited for. wgmma is in flight until its wait (tests/ptx/wgmma.py).

It supports the instructions of the kernels in ptx/ and refuses all others. It reports out-of-bounds
and misaligned access, and reads of unwritten memory or registers. It also reports lanes missing at
a shuffle or barrier, warps that exit while others wait, and endless loops.

`InterpretedRuntime` stands in for cuda.stream.CudaRuntime, so ops.GpuOps runs on it unchanged.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.kernels.ptx import Kernel
from osmium.ops import Fill
from osmium.quant.floats import bf16_from_f32, f32_from_bf16, f32_from_e4m3
from tests.ptx.faults import PtxFault
from tests.ptx.stand_ins import STAND_INS
from tests.ptx.wgmma import AsyncProxy, Product, Products, matrix_units, sums_of

__all__ = ["InterpretedArray", "InterpretedRuntime", "PtxFault"]

LANES = 32
FULL = np.ones(LANES, np.bool_)
"""All lanes. Masks are compared as bytes, which takes a tenth of the time of any() or all()."""
ALL, NONE = FULL.tobytes(), bytes(LANES)
STEPS = 2_000_000
"""Instructions of one warp after which a loop counts as endless."""

AT_ONCE = 3
"""Blocks of a launch that run concurrently, not counting those that poll."""

Values = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_] | None
"""Active lanes; None means all."""

TYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "pred": np.bool_, "f32": np.float32, "f16": np.float16, "b8": np.uint8, "u8": np.uint8,
        "b16": np.uint16, "u16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
        "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    }.items()
}  # fmt: skip


# -- memory ----------------------------------------------------------------------------------------


WORDS: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64),
    16: np.dtype(np.complex128),
}  # fmt: skip
"""Unsigned types by size in bytes, for moves of any value."""

TRUE = b"\1" * 4 * LANES
"""Bytes of a store of 4 bytes per lane."""


class Block:
    """Memory with a record of its written bytes."""

    def __init__(self, nbytes: int, name: str, pdl: bool = False) -> None:
        """With `pdl` each byte records the launch that wrote it last."""
        self.nbytes, self.name = nbytes, name
        room = -(-nbytes // 16) * 16
        self.data, self.written = np.full(room, 0xA5, np.uint8), np.zeros(room, np.bool_)
        self.launch = np.zeros(room, np.int32) if pdl else None
        """The launch that wrote a byte last; 0 if none did."""
        self._data = {size: self.data.view(kind) for size, kind in WORDS.items()}
        self._written = {size: self.written.view(kind) for size, kind in WORDS.items()}

    def put(self, at: npt.NDArray[np.int64], data: npt.NDArray[np.uint8], launch: int) -> None:
        """Store bytes `data` at the offsets `at`, of one shape."""
        self.data[at], self.written[at] = data, True
        if self.launch is not None:
            self.launch[at] = launch

    def take(self, at: npt.NDArray[np.int64], size: int) -> npt.NDArray[Any]:
        """`size` bytes at each of these multiples of `size`."""
        found: npt.NDArray[Any] = self._data[size][at // size]
        return found

    def set(self, at: npt.NDArray[np.int64], data: npt.NDArray[Any], launch: int) -> None:
        """Store words `data` at multiples of their size."""
        size = data.itemsize
        index = at // size
        self._data[size][index] = data.view(WORDS[size])
        self._written[size][index] = _TRUE_WORD[size]
        if self.launch is not None:
            self.launch.reshape(-1, size)[index] = launch

    def known(self, at: npt.NDArray[np.int64], size: int) -> bool:
        """Whether all of those bytes are written."""
        there = self._written[size][at // size].tobytes()
        return bool(there == (TRUE if len(there) == len(TRUE) else b"\1" * len(there)))


_TRUE_WORD = {size: np.frombuffer(b"\1" * size, kind)[0] for size, kind in WORDS.items()}


@dataclass(eq=False)
class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes have come."""

    count: int
    maker: tuple["Warp", int]
    """The initialising lane, whose fence makes the barrier visible to bulk copies."""
    pending: int
    nbytes: int = 0
    phase: int = 0
    fenced: bool = False

    def arrive(self, nbytes: int, where: str) -> None:
        if not self.pending:
            raise PtxFault(f"{where}: more arrivals in a phase than {self.count}")
        self.pending -= 1
        self.nbytes += nbytes
        self._turn()

    def come(self, nbytes: int, where: str) -> None:
        self.nbytes -= nbytes
        if self.nbytes < 0 and not self.pending:
            raise PtxFault(f"{where}: {-self.nbytes} bytes more have come than were expected")
        self._turn()

    def _turn(self) -> None:
        if not self.pending and not self.nbytes:
            self.phase, self.pending = 1 - self.phase, self.count


class Shared(Block):
    """A block's shared memory, with its barriers and the bulk copies in flight to it."""

    def __init__(self, nbytes: int, name: str) -> None:
        super().__init__(nbytes, name)
        self.barriers: dict[int, Barrier] = {}
        """By offset."""
        self.loads: list[tuple[Barrier, npt.NDArray[np.int64], npt.NDArray[np.uint8]]] = []
        self.proxy: AsyncProxy | None = None
        """Of kernels with wgmma."""

    def land(self, rng: np.random.Generator, where: str) -> None:
        """Let bulk copies land at random, in any order."""
        on_their_way, self.loads = self.loads, []
        for at in rng.permutation(len(on_their_way)):
            barrier, rows, data = on_their_way[at]
            if rng.random() < 0.5:
                self.data[rows], self.written[rows] = data, True
                barrier.come(len(rows), where)
            else:
                self.loads.append(on_their_way[at])

    def leave(self) -> None:
        """Raises: PtxFault if a block ends before its copies."""
        if self.loads or any(barrier.nbytes for barrier in self.barriers.values()):
            raise PtxFault(f"{self.name}: its block has left, and bytes are still to come")
        if self.proxy is not None:
            self.proxy.leave()


@dataclass(eq=False)
class BulkStore:
    """A bulk copy out of shared memory."""

    source: Shared
    rows: npt.NDArray[np.int64]
    out: Block
    to: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8] | None = None
    """The bytes, once they are read."""
    read: bool = False
    """Whether its group was waited for."""

    def take(self, where: str) -> npt.NDArray[np.uint8]:
        if self.data is None:
            if not self.source.written[self.rows].all():
                raise PtxFault(f"{where}: what is stored is being overwritten")
            self.data = self.source.data[self.rows]
        return self.data


SPAN = 32
"""log2 of the address range of each array, so that any overrun hits unmapped addresses."""


class InterpretedArray:
    """Stands in for cuda.DeviceArray, on a Block."""

    def __init__(
        self, block: Block, ptr: int, offset: int, shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> None:
        self.block, self.offset, self.shape = block, offset, shape
        self.ptr = ptr
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize

    def __getitem__(self, key: int | slice) -> "InterpretedArray":
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if isinstance(key, slice):
            start, stop, step = key.indices(self.shape[0])
            assert step == 1, "device arrays are sliced in steps of 1"
            shape = (max(0, stop - start), *self.shape[1:])
        else:
            start, shape = key, self.shape[1:]
            assert 0 <= key < self.shape[0], f"index {key} of {self.shape}"
        by = start * row
        return InterpretedArray(self.block, self.ptr + by, self.offset + by, shape, self.dtype)

    def reshape(self, *shape: int) -> "InterpretedArray":
        assert math.prod(shape) == math.prod(self.shape), f"{self.shape} to {shape}"
        return InterpretedArray(self.block, self.ptr, self.offset, shape, self.dtype)

    def view(self, dtype: npt.DTypeLike) -> "InterpretedArray":
        last = self.shape[-1] * self.dtype.itemsize // np.dtype(dtype).itemsize
        shape = (*self.shape[:-1], last)
        return InterpretedArray(self.block, self.ptr, self.offset, shape, dtype)

    def numpy(self) -> Values:
        """The bytes as a NumPy view."""
        raw = self.block.data[self.offset : self.offset + self.nbytes]
        return raw.view(self.dtype).reshape(self.shape)

    def touch(self) -> None:
        """Mark these bytes as written."""
        part = slice(self.offset, self.offset + self.nbytes)
        self.block.written[part] = True
        if self.block.launch is not None:
            self.block.launch[part] = 0


class InterpretedRuntime:
    """An ops.runtime.DeviceRuntime. `seed` orders warps and blocks."""

    sm_count = 3
    max_shared_per_block = 99 << 10
    l2 = 1 << 20

    def __init__(
        self,
        seed: int = 0,
        without: tuple[str, int] | None = None,
        pdl: bool = False,
        has_wgmma: bool = False,
    ) -> None:
        """`without` is an entry and the number of its barrier to leave out.

        With `pdl` kernels run as with programmatic dependent launch. Reading what the previous
        kernel wrote before the wait is then a fault. `has_wgmma`: a GPU of compute capability 9.0.
        """
        self.has_wgmma = has_wgmma
        self.blocks: list[Block] = []
        self.prefetched: list[int] = []
        """Addresses requested by prefetch.global.L2, with repetitions."""
        self.stream = InterpretedStream(self, seed, without, pdl)
        self._staged: dict[int, Sequence[tuple[InterpretedArray, InterpretedArray]]] = {}
        """Copies by buffer, which run as late as allowed."""
        self._unreleased: dict[int, list[InterpretedArray]] = {}
        """Copied arrays by buffer that launches may still read."""

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> InterpretedArray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        name = f"array {len(self.blocks)}, {np.dtype(dtype)} {shape}"
        self.blocks.append(Block(nbytes, name, self.stream.pdl))
        return InterpretedArray(self.blocks[-1], len(self.blocks) << SPAN, 0, shape, dtype)

    def empty_mapped(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None
    ) -> InterpretedArray:
        made = self.empty(shape, dtype)
        if fill is not None:
            fill(self.host_view(made).reshape(-1).view(np.uint8))
        return made

    def zeros_mapped(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> InterpretedArray:
        made = self.empty(shape, dtype)
        self.host_view(made)[...] = 0
        return made

    def release(self, array: InterpretedArray) -> None:
        array.block.written[:] = False  # a later read is a fault

    def host_view(self, array: InterpretedArray) -> Values:
        array.touch()
        return array.numpy()

    def copy_h2d(self, out: InterpretedArray, source: Values) -> None:
        out.numpy()[...] = source
        out.touch()

    def copy_d2h(self, source: InterpretedArray) -> Values:
        self._unreleased.clear()  # all launches have ended
        return source.numpy().copy()

    def copy(self, out: InterpretedArray, source: InterpretedArray) -> None:
        out.numpy().reshape(-1).view(np.uint8)[...] = source.numpy().reshape(-1).view(np.uint8)
        out.touch()

    def memset(self, out: InterpretedArray, byte: int) -> None:
        out.numpy().reshape(-1).view(np.uint8)[...] = byte
        out.touch()

    def synchronize(self) -> None:
        pass

    def capture_graph(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def fork_side_stream(self, prefetch: bool) -> "InterpretedStream | SideStream":
        return SideStream(self.stream) if prefetch else self.stream

    def join_side_stream(self, prefetch: bool) -> None:
        if prefetch:
            self.stream.wake(1)

    def stage(
        self, buffer: int, copies: Sequence[tuple[InterpretedArray, InterpretedArray]]
    ) -> None:
        if buffer in self._staged:
            raise PtxFault(f"buffer {buffer} is staged again, and nothing has waited for it")
        for out, _ in copies:
            for read in self._unreleased.get(buffer, ()):
                if (
                    out.block is read.block
                    and out.offset < read.offset + read.nbytes
                    and read.offset < out.offset + out.nbytes
                ):
                    raise PtxFault(f"buffer {buffer} is staged before it was released")
        self._staged[buffer] = copies

    def wait_staged(self, buffer: int) -> None:
        for out, source in self._staged.pop(buffer):
            self.copy(out, source)
            self._unreleased.setdefault(buffer, []).append(out)

    def release_staged(self, buffer: int) -> None:
        self._unreleased.pop(buffer, None)

    def start_timer(self) -> None:
        pass

    def record_readback(self) -> None:
        pass

    def wait_readback(self) -> float:
        return 0.0

    def limit_queue(self, depth: int) -> None:
        pass


def _check(block: Block, at: npt.NDArray[np.int64], size: int, w: "Warp", *, read: bool) -> None:
    """Check that `size` bytes at each of these offsets may be read, or written."""
    low, high = int(at.min()), int(at.max()) + size
    if low < 0 or high > block.nbytes:
        raise PtxFault(f"{w.where}: bytes {low} to {high} of {block.name}")
    if size > 1 and (at & (size - 1)).tobytes().strip(b"\0"):
        raise PtxFault(f"{w.where}: {size} bytes at offset {at[at % size > 0][0]} of {block.name}")
    if read and not block.known(at, size):
        raise PtxFault(f"{w.where}: reads bytes of {block.name} that are not written")
    if block is w.shared:
        if w.shared.barriers:
            rows = at[:, None] + np.arange(size)
            if np.isin(rows // 8, [at // 8 for at in w.shared.barriers]).any():
                raise PtxFault(f"{w.where}: a barrier is there")
        if w.shared.proxy is not None and not read:
            w.shared.proxy.check_store(at, w.where)
    elif not w.waited:
        last = w.machine.stream.launches - 1
        if last and block.launch is not None:
            if not read or (block.launch.reshape(-1, size)[at // size] == last).any():
                raise PtxFault(f"{w.where}: {block.name} is the last kernel's; it has not waited")


def _rows(at: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Offsets of bytes, one row per lane."""
    rows: npt.NDArray[np.int64] = at[:, None] + np.arange(size)
    return rows


# -- programs --------------------------------------------------------------------------------------

Run = Callable[["Warp", Mask], None]


@dataclass
class Instruction:
    """One instruction of a kernel."""

    text: str
    kind: str
    """plain, bra, uni (a uniform bra), ret, bar or sleep."""
    guard: str = ""
    negated: bool = False
    target: int = -1
    run: Run | None = None


@dataclass
class Program:
    """A parsed kernel."""

    name: str
    code: list[Instruction] = field(default_factory=list)
    registers: dict[str, np.dtype[Any]] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    """Offsets of shared arrays."""
    shared: int = 0
    params: dict[str, np.dtype[Any]] = field(default_factory=dict)
    has_wgmma: bool = False


KINDS = {"bra": "bra", "bra.uni": "uni", "ret": "ret", "exit": "ret",
         "nanosleep.u32": "sleep"}  # fmt: skip

_GUARD = re.compile(r"@(!?)(%\w+)\s+(.*)", re.S)


@functools.cache
def parse_program(text: str, without: int | None = None) -> Program:
    """Parse a module's only entry. `without` leaves out one barrier, counted from 0.

    Programs are immutable after parsing, so runtimes share them.
    """
    code = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", code, re.S)
    if not entry:
        raise PtxFault("the text has no entry")
    program = Program(entry[1])
    for kind, name in re.findall(r"\.param\s+\.(\w+)\s+(\w+)", entry[2]):
        program.params[name] = TYPES[kind]
    body = code[code.index("{", entry.end()) + 1 : code.rindex("}")]
    labels: dict[str, int] = {}
    pending: list[tuple[Instruction, str]] = []
    barriers = 0
    for statement in re.findall(r"\s*(?:(\w+):(?!:)|([^;]+);)", body):
        label, line = statement[0], " ".join(statement[1].split())
        if label:
            labels[label] = len(pending)
        elif line.startswith(".reg"):
            _declare(program, line)
        elif line.startswith(".shared"):
            found = re.fullmatch(r"\.shared \.align (\d+) \.b(8|64) (\w+)\[(\d+)\]", line)
            if not found:
                raise PtxFault(f"{program.name}: {line}")
            align = int(found[1])
            program.symbols[found[3]] = -(-program.shared // align) * align
            program.shared = program.symbols[found[3]] + int(found[2]) // 8 * int(found[4])
        else:
            guarded = _GUARD.match(line)
            rest = guarded[3] if guarded else line
            opcode = rest.split(" ")[0]
            kind = KINDS.get(opcode, "plain")
            if rest == "bar.sync 0":
                kind = "bar"
                barriers += 1
                if barriers - 1 == without:
                    continue
            made = Instruction(line, kind)
            if guarded:
                made.negated, made.guard = bool(guarded[1]), guarded[2]
            pending.append((made, rest))
    dynamic = re.search(r"\.extern \.shared \.align (\d+) \.b8 (\w+)\[\];", code)
    if dynamic:  # dynamic shared memory comes after the declared arrays
        program.shared = -(-program.shared // int(dynamic[1])) * int(dynamic[1])
        program.symbols[dynamic[2]] = program.shared
    for made, rest in pending:
        if made.kind in ("bra", "uni"):
            made.target = labels[rest.split()[1]]
        elif made.kind == "plain":
            made.run = _compile(program, rest)
        program.code.append(made)
    return program


def _declare(program: Program, line: str) -> None:
    kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", line).groups()  # type: ignore[union-attr]
    for name in re.split(r"\s*,\s*", names):
        many = re.fullmatch(r"(%\w+?)<(\d+)>", name)
        for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            program.registers[one] = TYPES[kind]


# -- execution -------------------------------------------------------------------------------------


class Warp:
    """32 lanes of one block."""

    def __init__(
        self, program: Program, values: dict[str, Any], machine: InterpretedRuntime, shared: Shared,
        block: tuple[int, int, int], grid: tuple[int, int, int], threads: int, index: int,
    ) -> None:  # fmt: skip
        self.program, self.values, self.machine, self.shared = program, values, machine, shared
        self.index = index
        self.products = None if shared.proxy is None else Products(shared.proxy, index)
        """wgmma in flight."""
        self.types = program.registers
        lane = np.arange(LANES, dtype=np.uint32)
        self.special: dict[str, Values] = {
            "%tid.x": lane + np.uint32(LANES * index),
            "%laneid": lane,
            "%ntid.x": np.full(LANES, threads, np.uint32),
        }
        for axis, here, count in zip("xyz", block, grid, strict=True):
            self.special[f"%ctaid.{axis}"] = np.full(LANES, here, np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(LANES, count, np.uint32)
        self.registers: dict[str, Values] = {}
        self.known: dict[str, npt.NDArray[np.bool_]] = {}
        """Lanes with a value, for registers that not every lane has written."""
        self.groups: dict[int, npt.NDArray[np.bool_]] = {0: FULL}
        """The lanes at each instruction."""
        self.copies: list[list[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]] = [[]]
        """Groups of copies in flight to shared memory, the open one last."""
        self.stores: dict[int, list[list[BulkStore]]] = {}
        """Groups of bulk copies that a lane has not waited for, the open one last."""
        self.steps = 0
        self.at: Instruction | None = None
        self.waited = not machine.stream.pdl
        """Whether the previous kernel's results may be read, and anything be written."""
        self.acquired = False
        """Whether an acquiring load has read the previous kernel's last store."""
        self.looks = False
        """Whether the last load was an acquiring one, which yields to other blocks."""

    @property
    def where(self) -> str:
        """The current instruction, for error messages."""
        return f"{self.program.name}: {self.at.text if self.at else ''}"

    @property
    def alive(self) -> bool:
        return bool(self.groups)

    def settled(self) -> None:
        """Raises: PtxFault if stores that a flag announces may not be visible."""
        if any(map(any, self.stores.values())):
            raise PtxFault(f"{self.where}: bulk copies before it may not be stored")

    def leave(self) -> None:
        """Raises: PtxFault if it exits before its bulk copies have read shared memory."""
        groups = [group for of_lane in self.stores.values() for group in of_lane]
        if not all(store.read for group in groups for store in group):
            raise PtxFault(f"{self.program.name}: a warp has left; its bulk copies may still read")
        if self.products is not None:
            self.products.leave(self.program.name)

    def read(self, name: str, mask: Mask) -> Values:
        """A register's 32 values; all must be defined where the mask is set."""
        value = self.registers.get(name)
        if value is None:
            return self._special(name)
        if name in self.known:
            known = self.known[name]
            # undefined in some masked lanes, or defined in all
            here = known if mask is None else known | ~mask
            if here.tobytes() != ALL:
                raise PtxFault(f"{self.where}: {name} was not written by every lane that reads it")
        return value

    def _special(self, name: str) -> Values:
        if name in self.special:
            return self.special[name]
        if name == "%globaltimer":
            self.machine.stream.clock += self.machine.stream.tick
            return np.full(LANES, self.machine.stream.clock, np.uint64)
        if self.products is not None:
            self.products.check(name, self.where)
        raise PtxFault(f"{self.where}: {name} was never written")

    def write(self, name: str, value: Values, mask: Mask) -> None:
        """Set a register where the mask is set."""
        if self.products is not None:
            if name in self.products.values:
                self.products.check(name, self.where)
            self.products.unfenced.add(name)
        dtype = self.types.get(name)
        if value.dtype is not dtype:
            if dtype is None:
                raise PtxFault(f"{self.where}: {name} is not declared")
            if value.dtype != dtype:
                if value.dtype.itemsize != dtype.itemsize:
                    raise PtxFault(f"{self.where}: {value.dtype} into {name}, which is {dtype}")
                value = value.view(dtype)
        if mask is None:
            self.registers[name] = value
            if name in self.known:
                del self.known[name]
            return
        old = self.registers.get(name)
        if old is None:
            self.registers[name], self.known[name] = value, mask
            return
        new = old.copy()
        np.copyto(new, value, where=mask)
        self.registers[name] = new
        if name in self.known:
            known = self.known[name] | mask
            if known.tobytes() == ALL:
                del self.known[name]
            else:
                self.known[name] = known

    def go(self) -> None:
        """Run until all lanes have exited, or all live ones wait at a barrier, or some poll."""
        code, groups, end, self.looks = (
            self.program.code,
            self.groups,
            len(self.program.code),
            False,
        )
        while groups:
            pc = min(groups)
            lanes = groups.pop(pc)
            every = lanes.tobytes()
            mask = None if every == ALL else lanes
            next_group = min(groups, default=end)
            while pc < end:  # the end of the text is a ret
                if pc >= next_group:
                    if pc > next_group:
                        self._join(pc, lanes)
                        break
                    lanes = lanes | groups.pop(pc)  # these lanes waited here
                    every = lanes.tobytes()
                    mask = None if every == ALL else lanes
                    next_group = min(groups, default=end)
                self.steps += 1
                self.at = instruction = code[pc]
                if self.steps > STEPS:
                    raise PtxFault(f"{self.where}: {STEPS} instructions and no end")
                taking, active_bytes = lanes, every
                if instruction.guard:
                    taking = self.read(instruction.guard, mask)
                    if instruction.negated:
                        taking = ~taking
                    if mask is not None:
                        taking = taking & lanes
                    active_bytes = taking.tobytes()
                kind = instruction.kind
                if kind == "plain":
                    pc += 1
                    if active_bytes != NONE:
                        instruction.run(self, None if active_bytes == ALL else taking)  # type: ignore[misc]
                        if self.looks:
                            self._join(pc, lanes)
                            return
                elif kind in ("bar", "sleep"):
                    if kind == "bar" and active_bytes != ALL:
                        raise PtxFault(f"{self.where}: lanes are missing at a barrier")
                    groups[pc + 1] = lanes
                    return
                else:
                    if active_bytes == every:  # all lanes branch, and none remains
                        if kind != "ret":
                            self._join(instruction.target, lanes)
                        break
                    if active_bytes != NONE:
                        if kind == "uni":
                            raise PtxFault(f"{self.where}: lanes part at a branch of all or none")
                        if kind != "ret":
                            self._join(instruction.target, taking)
                            next_group = min(groups)
                        lanes = lanes & ~taking
                        every, mask = lanes.tobytes(), lanes
                    pc += 1

    def _join(self, pc: int, lanes: npt.NDArray[np.bool_]) -> None:
        there = self.groups.get(pc)
        self.groups[pc] = lanes if there is None else there | lanes

    def memory(self, space: str, address: Values, mask: Mask) -> tuple[Block, Values]:
        """The block that the active lanes' addresses are in, and their offsets."""
        taking = address if mask is None else address[mask]
        if space == "shared":
            return self.shared, taking.astype(np.int64)
        index = int(taking[0]) >> SPAN
        if 0 < index <= len(self.machine.blocks):
            offsets = (taking - _base(index)).view(np.int64)
            if int(offsets.min()) >= 0 and int(offsets.max()) < 1 << SPAN:
                return self.machine.blocks[index - 1], offsets
        raise PtxFault(f"{self.where}: address {int(taking[0]):#x} is in no array, or in two")


def _by_array(space: str, address: Values, mask: Mask) -> list[Mask]:
    """Masks of the active lanes by array, because one load may access several."""
    if space == "shared":
        return [mask]
    index = address >> _SPANS
    taking = index if mask is None else index[mask]
    if (taking == taking[:1]).tobytes() == ALL[: len(taking)]:
        return [mask]
    there = np.unique(taking)
    return [index == one if mask is None else (index == one) & mask for one in there]


_SPANS = np.full(LANES, SPAN, np.uint64)


@functools.cache
def _base(index: int) -> npt.NDArray[np.uint64]:
    """The address of an array."""
    return np.array([index << SPAN], np.uint64)


class InterpretedStream:
    """A stream for launches."""

    def __init__(
        self, machine: InterpretedRuntime, seed: int, without: tuple[str, int] | None, pdl: bool
    ) -> None:
        self.machine, self.without, self.pdl = machine, without, pdl
        self.launches = 0
        self.rng = np.random.default_rng(seed)
        self.programs: dict[str, Program] = {}
        self.late: list[tuple[Block, npt.NDArray[np.int64], npt.NDArray[np.uint8]]] = []
        """Relaxed stores that are not visible yet."""
        self.stores: list[BulkStore] = []
        """Stores of bulk copies that are not visible yet."""
        self.concurrent: list[Callable[[], None]] = []
        """Callbacks that run concurrently, in this order.

        The next one may run when a lane polls or adds atomically.
        """
        self.clock = 0
        """%globaltimer, ns."""
        self.tick = 1_000_000
        """ns per read of the timer."""
        self.asleep: list[Iterator[bool]] = []
        """Blocks of the side stream, which continue between launches."""

    def land(self, chance: float) -> None:
        """Make relaxed stores visible at random; those to one address stay in order."""
        stays = self.rng.random(len(self.late)) >= chance
        late, self.late = self.late, []
        places: set[tuple[int, int]] = set()  # addresses with stores that are still pending
        for (block, at, data), stay in zip(late, stays, strict=True):
            place = (id(block), int(at[0]))
            if stay or place in places:
                places.add(place)
                self.late.append((block, at, data))
            else:
                block.put(at, data, self.launches)
        for store in self.stores.copy():
            if store.data is not None and self.rng.random() < chance:
                self.store(store, "")

    def store(self, store: BulkStore, where: str) -> None:
        """Make a bulk copy's store visible."""
        if store in self.stores:
            self.stores.remove(store)
            store.out.put(store.to, store.take(where), self.launches)

    def meanwhile(self) -> None:
        """Run the next concurrent callback at random."""
        if self.concurrent and self.rng.random() < 0.5:
            self.concurrent.pop(0)()

    def wake(self, chance: float) -> None:
        """Let each sleeping block run at random, until it sleeps again; with `chance` 1 until it
        exits."""
        tick, self.tick = self.tick, self.tick if chance == 1 else 1
        with np.errstate(all="ignore"):
            for block in self.asleep.copy():
                going = True
                while going and self.rng.random() < chance:
                    going = next(block, None) is not None
                if not going:
                    self.asleep.remove(block)
        self.tick = tick
        self.land(1)

    def launch(self, kernel: Kernel, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        """Run every block of a launch."""
        self.launches += 1
        if kernel.name in STAND_INS:
            STAND_INS[kernel.name](values)
        else:
            self._run(self.blocks(kernel, grid, values))
        if self.asleep:
            self.wake(0.7)

    def blocks(
        self, kernel: Kernel, grid: tuple[int, ...], values: tuple[Any, ...]
    ) -> list[Iterator[bool]]:
        """Every block of a launch, in random order, not started."""
        contract = kernel.contract
        if contract.block % LANES:
            raise PtxFault(f"{contract.entry}: {contract.block} threads are not whole warps")
        kernel.pack(values)  # the checks of the ABI
        program = self.programs.get(contract.entry)
        if program is None:
            entry, which = self.without or ("", None)
            text = contract.pdl_text if self.pdl else contract.text
            program = parse_program(text, which if entry == contract.entry else None)
            self.programs[contract.entry] = program
        named = {
            name: np.full(LANES, getattr(value, "ptr", value), kind)
            for (name, kind), value in zip(program.params.items(), values, strict=True)
        }
        whole: tuple[int, int, int] = (*grid, 1, 1)[:3]  # type: ignore[assignment]
        blocks = [
            (x, y, z) for x in range(whole[0]) for y in range(whole[1]) for z in range(whole[2])
        ]
        more = 0
        if contract.dynamic is not None:
            pairs = zip(contract.params, values, strict=True)
            more = contract.dynamic({p.name: v for p, v in pairs if p.type == "u32"})
        return [
            self._block(program, named, blocks[at], whole, contract.block, more)
            for at in self.rng.permutation(len(blocks))
        ]

    def _run(self, left: list[Iterator[bool]]) -> None:
        with np.errstate(all="ignore"):
            there: list[Iterator[bool]] = []
            looking: set[Iterator[bool]] = set()
            while left or there:
                while left and len(there) - len(looking) < AT_ONCE:
                    there.append(left.pop())
                block = there[int(self.rng.integers(len(there)))]
                looking.discard(block)
                # a block may end while another sleeps
                for _ in range(1 << int(self.rng.integers(6))):
                    looks = next(block, None)
                    if looks is None:
                        there.remove(block)
                    elif looks:
                        looking.add(block)
                    if looks is not False:
                        break
        self.land(1)

    def _block(
        self, program: Program, values: dict[str, Any], block: tuple[int, int, int],
        grid: tuple[int, int, int], threads: int, dynamic: int,
    ) -> Iterator[bool]:  # fmt: skip
        """Run a block, one warp at a time to its next barrier or poll.

        Yields whether it polls, until it exits.
        """
        shared = Shared(program.shared + dynamic, f"{program.name}'s shared memory")
        if program.has_wgmma:
            shared.proxy = AsyncProxy(shared.nbytes, threads // LANES)
        warps = [
            Warp(program, values, self.machine, shared, block, grid, threads, i)
            for i in range(threads // LANES)
        ]
        all_warps = warps
        while warps:
            for i in self.rng.permutation(len(warps)):
                warps[i].go()
                while warps[i].looks:
                    yield True
                    warps[i].go()
                if not warps[i].alive:
                    warps[i].leave()
                yield False
            waiting = [warp for warp in warps if warp.alive]
            if waiting and len(waiting) < len(warps):
                raise PtxFault(f"{program.name}: a warp has left while others wait at a barrier")
            if any(warp.acquired for warp in waiting):  # after one lane's acquire, all may read
                for warp in waiting:
                    warp.waited = True
            warps = waiting
        if not any(warp.waited for warp in all_warps):
            raise PtxFault(f"{program.name}: a block has ended, and none of its warps has waited")
        shared.leave()


class SideStream:
    """A stream whose kernels run concurrently with others.

    Blocks start at launch, and continue between later launches from one sleep to the next.
    """

    def __init__(self, main: InterpretedStream) -> None:
        self.main = main

    def launch(self, kernel: Kernel, grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        self.main.launches += 1
        self.main.asleep += self.main.blocks(kernel, grid, values)


# -- instructions ----------------------------------------------------------------------------------

Operand = Callable[[Warp, Mask], Values]


def _operand(program: Program, text: str, dtype: np.dtype[Any]) -> Operand:
    """A register, a number, or the address of a shared array, as 32 values of a type."""
    if text.startswith("%"):

        def register(w: Warp, m: Mask) -> Values:
            value = w.registers.get(text)
            if value is None or text in w.known:
                value = w.read(text, m)
            if value.dtype is dtype or value.dtype == dtype:
                return value
            if value.dtype.itemsize != dtype.itemsize:
                raise PtxFault(f"{w.where}: {text} is {value.dtype}, {dtype} is wanted")
            return value.view(dtype)

        return register
    if text in program.symbols:
        constant = np.full(LANES, program.symbols[text], dtype)
    elif text.startswith("0f"):
        constant = np.full(LANES, int(text[2:], 16), np.uint32).view(np.float32)
    else:
        number = int(text.rstrip("U"), 0)
        constant = np.full(LANES, number & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}")
        constant = constant.view(dtype)
    return lambda w, m: constant


def _arguments(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def _shift(left: bool) -> Callable[[Values, Values], Values]:
    def run(a: Values, b: Values) -> Values:
        if b.itemsize == 4 and b.tobytes() == b.item(0).to_bytes(4, "little") * LANES:
            return constant(a, b.item(0))
        by = b.astype(np.uint64)
        bits = 8 * a.dtype.itemsize
        kept = np.minimum(by, bits - 1).astype(a.dtype)
        out = np.asarray(a << kept if left else a >> kept)
        if a.dtype.kind == "i":
            return out
        return np.asarray(np.where(by >= bits, a.dtype.type(0), out))

    def constant(a: Values, by: int) -> Values:
        """All lanes shift by the same number, the common case."""
        bits = 8 * a.itemsize
        if by >= bits and a.dtype.kind != "i":
            return np.zeros(LANES, a.dtype)
        kept = _shift_by(min(by, bits - 1), a.dtype)
        return np.asarray(a << kept if left else a >> kept)

    return run


@functools.cache
def _shift_by(by: int, dtype: np.dtype[Any]) -> Values:
    return np.full(LANES, by, dtype)


def _divide(a: Values, b: Values) -> Values:
    if a.dtype.kind == "f":
        return np.asarray((a.astype(np.float64) / b.astype(np.float64)).astype(a.dtype))
    down = np.asarray(a // b)
    return np.asarray(down + ((down < 0) & (down * b != a)))  # toward zero, like PTX


_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)


def _fma(a: Values, b: Values, c: Values) -> Values:
    # The product is exact in float64; double rounding differs in one case of 2^29.
    return (a.astype(_F64) * b + c).astype(_F32)


def _approx(f: Callable[[Values], Values]) -> Callable[[Values], Values]:
    return lambda a: f(a.astype(np.float64)).astype(np.float32)


ARITHMETIC: dict[str, Callable[..., Values]] = {
    "mov": lambda a: a, "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide,
    "mad": lambda a, b, c: a * b + c, "fma": _fma, "min": np.fmin, "max": np.fmax,
    "max.NaN": np.maximum,
    "neg": np.negative, "abs": np.abs, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    "bfind": lambda a: (np.frexp(a.astype(np.float64))[1] - 1).astype(np.uint32),
    "shl": _shift(True), "shr": _shift(False),
    "ex2": _approx(np.exp2), "lg2": _approx(np.log2), "rcp": _approx(np.reciprocal),
    "sqrt": _approx(np.sqrt), "rsqrt": _approx(lambda a: 1 / np.sqrt(a)),
    "sin": _approx(np.sin), "cos": _approx(np.cos),
}  # fmt: skip

COUNT = {"fma": 3, "mad": 3, "mov": 1, "neg": 1, "abs": 1, "not": 1, "popc": 1, "bfind": 1,
         "ex2": 1, "lg2": 1, "rcp": 1, "sqrt": 1, "rsqrt": 1, "sin": 1, "cos": 1}  # fmt: skip
"""Number of operands of each; 2 if not listed."""

MODIFIERS = {"rn", "approx", "approx.ftz", "lo", "pred"}
"""Subnormals are not flushed to zero; results must not depend on flushing."""

COMPARE: dict[str, Callable[[Values, Values], Values]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b), "geu": lambda a, b: ~(a < b),
}  # fmt: skip
"""All are false for NaN, including ne, but geu is true."""


def _compile(program: Program, line: str) -> Run:
    """One instruction as a function of a warp and a mask."""
    opcode, _, rest = line.partition(" ")
    base, *parts = opcode.split(".")
    args = _arguments(rest)
    special: dict[str, Callable[[Program, list[str], list[str]], Run]] = {
        "ld": _load, "st": _store, "red": _reduce, "shfl": _shuffle, "cvt": _convert,
        "vote": _vote, "setp": _compare, "selp": _select, "lop3": _lop3, "prmt": _permute,
        "mma": _mma, "cp": _copy, "atom": _atomic, "redux": _redux, "bar": _warp,
        "griddepcontrol": _dependent, "ldmatrix": _matrices, "movmatrix": _transpose,
        "fence": _fence, "trap": _trap, "prefetch": _prefetch, "mbarrier": _barrier,
        "wgmma": _wgmma,
    }  # fmt: skip
    try:
        if base in special:
            return special[base](program, parts, args)
        if base in ("mul", "mad") and parts[0] == "wide":
            return _wide(program, parts[1], args)
        if base == "mov" and "{" in rest:
            return _halves(program, parts[0], args)
        if parts[-1] in ("f16x2", "bf16x2"):
            return _packed(program, base, parts[-1], args)
        if base == "max" and parts == ["NaN", "f32"]:
            base, parts = "max.NaN", ["f32"]
        if parts[:-1] == ["approx", "ftz"]:
            parts = ["approx.ftz", parts[-1]]
        if base not in ARITHMETIC or not set(parts[:-1]) <= MODIFIERS or parts[-1] not in TYPES:
            raise KeyError(opcode)
        return _arithmetic(program, base, TYPES[parts[-1]], args)
    except (KeyError, IndexError, ValueError) as error:
        raise PtxFault(f"{program.name}: {line}: not known ({error})") from error


def _arithmetic(program: Program, base: str, dtype: np.dtype[Any], args: list[str]) -> Run:
    if len(args) != 1 + COUNT.get(base, 2):
        raise ValueError(f"{len(args)} operands")
    function, out = ARITHMETIC[base], args[0]
    kinds = [dtype] * (len(args) - 1)
    if base in ("shl", "shr"):
        kinds[1] = TYPES["u32"]  # shift counts are always 32 bits
    operands = [_operand(program, a, kind) for a, kind in zip(args[1:], kinds, strict=True)]
    if len(operands) == 1:
        (only,) = operands
        return lambda w, m: w.write(out, function(only(w, m)), m)
    if len(operands) == 2:
        first, second = operands

        def run(w: Warp, m: Mask) -> None:
            a, b = first(w, m), second(w, m)
            if base == "div" and dtype.kind != "f" and not (b if m is None else b[m]).all():
                raise PtxFault(f"{w.where}: a division by zero")
            w.write(out, function(a, b), m)

        return run
    a, b, c = operands
    return lambda w, m: w.write(out, function(a(w, m), b(w, m), c(w, m)), m)


def _wide(program: Program, kind: str, args: list[str]) -> Run:
    dtype = TYPES[kind]
    double = np.dtype(f"{dtype.kind}8")
    a, b = (_operand(program, arg, dtype) for arg in args[1:3])
    c = _operand(program, args[3], double) if len(args) == 4 else None

    def run(w: Warp, m: Mask) -> None:
        product = a(w, m).astype(double) * b(w, m).astype(double)
        w.write(args[0], product if c is None else product + c(w, m), m)

    return run


def _packed(program: Program, base: str, kind: str, args: list[str]) -> Run:
    """Two halves at once."""
    functions: dict[str, Callable[..., Values]] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": lambda a, b, c: a * b + c,
    }  # fmt: skip
    function = functions[base]
    operands = [_operand(program, arg, TYPES["u32"]) for arg in args[1:]]
    if kind == "bf16x2" and base != "fma":
        raise KeyError(f"{base}.bf16x2")  # sm_90

    def run(w: Warp, m: Mask) -> None:
        pairs = [operand(w, m) for operand in operands]
        if kind == "f16x2":
            halves = [pair.view(np.float16).astype(np.float64) for pair in pairs]
            made: npt.NDArray[Any] = function(*halves).astype(np.float16)
        else:
            halves = [f32_from_bf16(pair.view(np.uint16)).astype(np.float64) for pair in pairs]
            made = bf16_from_f32(function(*halves).astype(np.float32))
        w.write(args[0], made.view(np.uint32), m)

    return run


def _bf16(value: Values) -> Values:
    return (value.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


_FRAGMENTS: dict[str, tuple[int, str, Callable[[Values], Values]]] = {
    "m16n8k16.row.col.f32.f16.f16.f32": (2, "f32", lambda value: value.view(np.float16)),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (2, "f32", _bf16),
    "m16n8k32.row.col.s32.s8.s8.s32": (4, "u32", lambda value: value.view(np.int8)),
}
"""Per operand format: values per register, the type of sums, and how to read a register."""


def _mma(program: Program, parts: list[str], args: list[str]) -> Run:
    """Fragments of the PTX ISA, n values per register; lane (g, q) = (lane / 4, lane % 4).

    Of a it holds rows g and g + 8, columns n q .. n q + n - 1 and 4 n on; of b those rows and
    column g. Of c and d it holds rows g and g + 8, columns 2q and 2q + 1.
    """
    if parts[:2] != ["sync", "aligned"]:
        raise KeyError(".".join(parts))
    each, sums, read = _FRAGMENTS[".".join(parts[2:])]
    names = [[name.strip() for name in arg.strip("{}").split(",")] for arg in args]
    if [len(group) for group in names] != [4, 4, 2, 4]:
        raise ValueError("registers of a fragment")
    a, b = ([_operand(program, n, TYPES["u32"]) for n in group] for group in names[1:3])
    c = [_operand(program, name, TYPES[sums]) for name in names[3]]
    (first, second), out = _fragments(each), TYPES[sums]

    def run(w: Warp, m: Mask) -> None:
        if m is not None:
            raise PtxFault(f"{w.where}: lanes are missing at an mma")
        x = read(np.concatenate([operand(w, m) for operand in a])).astype(np.float64)
        y = read(np.concatenate([operand(w, m) for operand in b])).astype(np.float64)
        product = (x[first] @ y[second]).reshape(-1)[_OF_C]  # integers are exact too
        for name, operand, part in zip(names[0], c, product, strict=True):
            found = part + operand(w, m)
            w.write(name, (found.astype(np.int64) if sums == "u32" else found).astype(out), m)

    return run


def _wgmma(program: Program, parts: list[str], args: list[str]) -> Run:
    """wgmma with A from registers, as those of mma, and B from shared memory; see wgmma.py."""
    how, program.has_wgmma = parts[0], True
    if parts[1:3] != ["sync", "aligned"] or (len(parts) > 3) != (how == "mma_async"):
        raise KeyError(".".join(parts))

    def products(w: Warp, m: Mask) -> Products:
        if m is not None:
            raise PtxFault(f"{w.where}: lanes are missing at a wgmma")
        assert w.products is not None, "the program has wgmma"
        return w.products

    if how == "fence":
        return lambda w, m: products(w, m).fence()
    if how == "commit_group":
        return lambda w, m: products(w, m).groups.append([])
    if how == "wait_group":
        left = int(args[0])
        return lambda w, m: w.registers.update(products(w, m).wait(left))
    shape = re.fullmatch(r"m64n(\d+)k32", parts[3])
    if how != "mma_async" or shape is None or parts[4:] != ["s32", "s8", "s8"]:
        raise KeyError(".".join(parts))
    n = int(shape[1])
    sums, inputs = ([name.strip() for name in arg.strip("{}").split(",")] for arg in args[:2])
    if len(sums) != n // 2 or len(inputs) != 4 or len({*sums, *inputs}) != n // 2 + 4:
        raise ValueError("registers of a fragment")
    descriptor = _operand(program, args[2], TYPES["u64"])
    accumulates = _operand(program, args[3], TYPES["pred"])
    first, _ = _fragments(4)

    def run(w: Warp, m: Mask) -> None:
        there = products(w, m)

        def value(name: str) -> Values:
            return there.values[name] if name in there.values else w.read(name, m)

        matrices, adds = (set(one(w, m).tolist()) for one in (descriptor, accumulates))
        if len(matrices) > 1 or len(adds) > 1:
            raise PtxFault(f"{w.where}: lanes differ in the matrix, or in whether they accumulate")
        (matrix,), (adding,) = matrices, adds
        units = matrix_units(matrix, n, w.where).reshape(-1)
        _check(w.shared, 16 * units, 16, w, read=True)
        after = {name: value(name).view(np.uint32) for name in inputs}
        x = np.concatenate([after[name] for name in inputs]).view(np.int8).astype(np.float64)
        y = w.shared.take(16 * units, 16).view(np.int8).reshape(n, 32).astype(np.float64)
        for name, part in zip(sums, sums_of(x[first] @ y.T), strict=True):
            after[name] = (part + value(name).view(np.int32) if adding else part).astype(np.uint32)
        there.issue(Product((*sums, *inputs), units), after, matrix, w.where)
        for name in (*sums, *inputs):
            w.registers.pop(name, None)

    return run


def _fragments(each: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions of the values of a [16, 8 n] and b [8 n, 8] among the joined registers:

    i32 of (register, lane, value).
    """
    g, q = np.arange(LANES) // 4, np.arange(LANES) % 4
    first, second = np.zeros((16, 8 * each), np.int64), np.zeros((8 * each, 8), np.int64)
    for j in range(each):
        for i in range(4):
            place = (i * LANES + np.arange(LANES)) * each + j
            first[g + 8 * (i % 2), each * (q + 4 * (i // 2)) + j] = place
        for i in range(2):
            place = (i * LANES + np.arange(LANES)) * each + j
            second[each * (q + 4 * i) + j, g] = place
    return first, second


def _sums() -> npt.NDArray[np.int64]:
    """Positions of the values of each register of c in [16, 8]."""
    g, q = np.arange(LANES) // 4, np.arange(LANES) % 4
    return np.stack([8 * (g + 8 * (i // 2)) + 2 * q + i % 2 for i in range(4)])


_OF_C = _sums()


def _vote(program: Program, parts: list[str], args: list[str]) -> Run:
    if parts != ["sync", "ballot", "b32"] or int(args[2], 0) != 0xFFFFFFFF:
        raise KeyError(".".join(parts))
    which = _operand(program, args[1], TYPES["pred"])
    bits = np.uint32(1) << np.arange(LANES, dtype=np.uint32)

    def vote(w: Warp, m: Mask) -> None:
        if m is not None:
            raise PtxFault(f"{w.where}: lanes are missing at a vote")
        w.write(args[0], np.full(LANES, bits[which(w, m)].sum(), np.uint32), m)

    return vote


def _warp(program: Program, parts: list[str], args: list[str]) -> Run:
    """bar.warp.sync: no effect, because a warp's lanes already run together."""
    if parts != ["warp", "sync"] or int(args[0], 0) != 0xFFFFFFFF:
        raise KeyError(".".join(parts))

    def meet(w: Warp, m: Mask) -> None:
        if m is not None:
            raise PtxFault(f"{w.where}: lanes are missing where a warp meets")

    return meet


def _dependent(program: Program, parts: list[str], args: list[str]) -> Run:
    """griddepcontrol: wait makes the previous kernel's results readable.

    launch_dependents has no effect, but must come after the wait.
    """
    if parts not in (["wait"], ["launch_dependents"]):
        raise KeyError(".".join(parts))

    def control(w: Warp, m: Mask) -> None:
        if parts == ["wait"]:
            w.waited = True
        elif not w.waited:
            raise PtxFault(f"{w.where}: it has not waited")

    return control


def _fence(program: Program, parts: list[str], args: list[str]) -> Run:
    """fence: ordinary stores are visible at once, bulk copies are not.

    fence.proxy.async makes the barriers of a lane visible to bulk copies.
    """
    known = (["acq_rel", "gpu"], ["proxy", "async"], ["proxy", "async", "shared::cta"])
    if parts not in known or args:
        raise KeyError(".".join(parts))

    def proxy(w: Warp, m: Mask) -> None:
        for barrier in w.shared.barriers.values():
            warp, lane = barrier.maker
            barrier.fenced |= warp is w and (m is None or bool(m[lane]))
        if w.shared.proxy is not None:
            if m is not None:
                raise PtxFault(f"{w.where}: lanes are missing at a fence before wgmma")
            w.shared.proxy.fence(w.index)

    return proxy if parts[0] == "proxy" else lambda w, m: w.settled()


def _trap(program: Program, parts: list[str], args: list[str]) -> Run:
    def trap(w: Warp, m: Mask) -> None:
        raise PtxFault(f"{w.where}: it gives up")

    return trap


def _prefetch(program: Program, parts: list[str], args: list[str]) -> Run:
    """prefetch.global.L2: no effect; the addresses are recorded."""
    if parts != ["global", "L2"]:
        raise KeyError(".".join(parts))
    address = _address(program, args[0], "global")

    def prefetch(w: Warp, m: Mask) -> None:
        lines = address(w, m)
        w.machine.prefetched.extend(int(one) for one in (lines if m is None else lines[m]))

    return prefetch


def _redux(program: Program, parts: list[str], args: list[str]) -> Run:
    if parts[:2] != ["sync", "max"] or parts[2] not in ("u32", "s32"):
        raise KeyError(".".join(parts))
    if int(args[2], 0) != 0xFFFFFFFF:
        raise ValueError("only whole warps reduce")
    value = _operand(program, args[1], TYPES[parts[2]])

    def largest(w: Warp, m: Mask) -> None:
        if m is not None:
            raise PtxFault(f"{w.where}: lanes are missing at a reduction")
        w.write(args[0], np.full(LANES, value(w, m).max()), m)

    return largest


def _halves(program: Program, kind: str, args: list[str]) -> Run:
    """mov between a register and a pair of its halves."""
    small, big, bits = {"b32": ("u16", "u32", 16), "b64": ("u32", "u64", 32)}[kind]
    half, double = TYPES[small], TYPES[big]
    names = [name.strip() for name in args[1 if "{" in args[1] else 0].strip("{}").split(",")]
    if "{" in args[1]:
        low, high = (_operand(program, name, half) for name in names)

        def join(w: Warp, m: Mask) -> None:
            value = high(w, m).astype(double) << double.type(bits) | low(w, m).astype(double)
            w.write(args[0], value, m)

        return join
    whole = _operand(program, args[1], double)

    def split(w: Warp, m: Mask) -> None:
        value = whole(w, m)
        w.write(names[0], value.astype(half), m)
        w.write(names[1], (value >> double.type(bits)).astype(half), m)

    return split


_ADDRESS = re.compile(r"\[\s*(%?\w+)\s*(?:\+\s*(\d+))?\s*\]")


def _address(program: Program, text: str, space: str) -> Operand:
    found = _ADDRESS.fullmatch(text)
    if not found:
        raise ValueError(f"address {text}")
    base = _operand(program, found[1], TYPES["u32" if space == "shared" else "u64"])
    more = int(found[2] or 0)
    if not more:
        return base
    by = np.full(LANES, more, TYPES["u32" if space == "shared" else "u64"])
    return lambda w, m: base(w, m) + by


def _vector(parts: list[str]) -> int:
    return next((int(part[1:]) for part in parts if part in ("v2", "v4")), 1)


def _load(program: Program, parts: list[str], args: list[str]) -> Run:
    acquires = parts[0] == "acquire"
    relaxed, parts = _relaxed(["relaxed", *parts[1:]] if acquires else parts)
    space, dtype = parts[0], TYPES[parts[-1]]
    if space == "param":
        name = args[1].strip("[] ")

        def parameter(w: Warp, m: Mask) -> None:
            w.write(args[0], w.values[name], m)

        return parameter
    _known(space, parts[1:-1])
    address, count = _address(program, args[1], space), _vector(parts)
    names = [name.strip() for name in args[0].strip("{}").split(",")]
    if len(names) != count:
        raise ValueError(f"{len(names)} registers for v{count}")
    size = dtype.itemsize * count

    def load(w: Warp, m: Mask) -> None:
        if relaxed:
            w.machine.stream.land(0.5)
            w.machine.stream.meanwhile()
        if acquires:
            acquire(w, m)
            w.looks = True
        for lanes in _by_array(space, address(w, m), m):
            load_one(w, lanes)

    def acquire(w: Warp, m: Mask) -> None:
        stream = w.machine.stream
        block, at = w.memory(space, address(w, m), m)
        last = stream.launches - 1
        if block.launch is not None and (block.launch[at] % last == 0).all():
            w.waited = w.acquired = True

    def load_one(w: Warp, m: Mask) -> None:
        block, at = w.memory(space, address(w, m), m)
        _check(block, at, size, w, read=True)
        found = block.take(at, size).view(dtype)  # [lanes * count]
        for i, name in enumerate(names):
            value = found if count == 1 else np.ascontiguousarray(found[i::count])
            if m is not None:
                wide = np.zeros(LANES, dtype)
                wide[m] = value
                value = wide
            if dtype.itemsize < w.program.registers[name].itemsize:
                value = value.astype(w.program.registers[name])
            w.write(name, value, m)

    return load


def _matrices(program: Program, parts: list[str], args: list[str]) -> Run:
    """ldmatrix: four matrices of eight rows of 16 bytes; lane 8 i + row has the address of a row.

    Lane (g, q) gets word q of row g of each, or transposed halves g of rows 2q and 2q + 1.
    """
    trans = "trans" in parts
    if [p for p in parts if p != "trans"] != ["sync", "aligned", "m8n8", "x4", "shared", "b16"]:
        raise KeyError(".".join(parts))
    address = _address(program, args[1], "shared")
    names = [name.strip() for name in args[0].strip("{}").split(",")]
    if len(names) != 4:
        raise ValueError("registers of four matrices")

    def load(w: Warp, m: Mask) -> None:
        if m is not None:
            raise PtxFault(f"{w.where}: lanes are missing at an ldmatrix")
        block, at = w.memory("shared", address(w, m), m)
        _check(block, at, 16, w, read=True)
        rows = block.take(at, 16).view(np.uint16)
        for name, matrix in zip(names, rows.reshape(4, 8, 8), strict=True):
            found = np.ascontiguousarray(matrix.T if trans else matrix)
            w.write(name, found.reshape(-1).view(np.uint32), m)

    return load


def _transpose(program: Program, parts: list[str], args: list[str]) -> Run:
    """movmatrix: lane (g, q) has word q of row g of a matrix of halves, and gets it transposed."""
    if parts != ["sync", "aligned", "m8n8", "trans", "b16"]:
        raise KeyError(".".join(parts))
    source = _operand(program, args[1], TYPES["u32"])

    def move(w: Warp, m: Mask) -> None:
        if m is not None:
            raise PtxFault(f"{w.where}: lanes are missing at a movmatrix")
        matrix = np.ascontiguousarray(source(w, m)).view(np.uint16).reshape(8, 8)
        w.write(args[0], np.ascontiguousarray(matrix.T).reshape(-1).view(np.uint32), m)

    return move


def _known(space: str, modifiers: list[str]) -> None:
    fine = {"nc", "cg", "L1::no_allocate", "v2", "v4"}
    if space not in ("global", "shared") or not set(modifiers) <= fine:
        raise KeyError(".".join([space, *modifiers]))


def _low_byte(program: Program, text: str, dtype: np.dtype[Any]) -> Operand:
    """The low bytes of a wider register, as st stores them (PTX ISA, operand size exceeding
    instruction-type size)."""

    def register(w: Warp, m: Mask) -> Values:
        value = np.ascontiguousarray(w.read(text, m))
        return value.view(dtype)[:: value.dtype.itemsize].copy()

    return register


def _store(program: Program, parts: list[str], args: list[str]) -> Run:
    relaxed, parts = _relaxed(parts)
    space, dtype = parts[0], TYPES[parts[-1]]
    _known(space, parts[1:-1])
    address, count = _address(program, args[0], space), _vector(parts)
    source = _low_byte if dtype.itemsize == 1 else _operand
    values = [source(program, n.strip(), dtype) for n in args[1].strip("{}").split(",")]
    if len(values) != count:
        raise ValueError(f"{len(values)} registers for v{count}")
    size = dtype.itemsize * count

    def store(w: Warp, m: Mask) -> None:
        block, at = w.memory(space, address(w, m), m)
        _check(block, at, size, w, read=False)
        columns = [value(w, m) if m is None else value(w, m)[m] for value in values]
        data = np.ascontiguousarray(columns[0]) if count == 1 else np.stack(columns, axis=1)
        if relaxed:
            rows, raw = _rows(at, size), data.reshape(-1, count).view(np.uint8)
            w.machine.stream.late += [(block, *one) for one in zip(rows, raw, strict=True)]
            return
        block.set(at, data.reshape(-1).view(WORDS[size]), w.machine.stream.launches)
        if block is w.shared and w.shared.proxy is not None:
            w.shared.proxy.store(at, w.index)

    return store


def _relaxed(parts: list[str]) -> tuple[bool, list[str]]:
    """Whether a load or store is relaxed at gpu scope, and the rest of its name."""
    if parts[0] != "relaxed":
        return False, parts
    if parts[1:3] != ["gpu", "global"]:
        raise KeyError(".".join(parts))
    return True, parts[2:]


def _reduce(program: Program, parts: list[str], args: list[str]) -> Run:
    # Earlier stores of the warp are visible with or without a fence, except bulk copies.
    releases = parts[0] == "release"
    _, parts = _relaxed(["relaxed", *parts[1:]] if releases else parts)
    if parts[:2] not in (["global", "add"], ["global", "inc"]):
        raise KeyError(".".join(parts))
    turns_over, dtype = parts[1] == "inc", TYPES[parts[2]]
    address, value = _address(program, args[0], "global"), _operand(program, args[1], dtype)

    def reduce(w: Warp, m: Mask) -> None:
        if releases:
            w.settled()
        block, at = w.memory("global", address(w, m), m)
        _check(block, at, dtype.itemsize, w, read=True)
        if block.launch is not None:
            block.launch[_rows(at, dtype.itemsize)] = w.machine.stream.launches
        mine, words = value(w, m) if m is None else value(w, m)[m], block.data.view(dtype)
        if not turns_over:
            np.add.at(words, at // dtype.itemsize, mine)
            return
        for i, most in zip(at // dtype.itemsize, mine, strict=True):
            words[i] = 0 if words[i] >= most else words[i] + 1

    return reduce


def _atomic(program: Program, parts: list[str], args: list[str]) -> Run:
    """An atomic addition that returns the old value, by one lane.

    Relaxed or acquiring, it does not publish earlier stores; pending ones stay pending.
    """
    if parts[0] not in ("relaxed", "acquire") or parts[1:] != ["gpu", "global", "add", "u32"]:
        raise KeyError(".".join(parts))
    address, value = _address(program, args[1], "global"), _operand(program, args[2], TYPES["u32"])

    def add(w: Warp, m: Mask) -> None:
        block, at = w.memory("global", address(w, m), m)
        _check(block, at, 4, w, read=True)
        if len(at) != 1:
            raise PtxFault(f"{w.where}: {len(at)} lanes, in undefined order")
        w.machine.stream.meanwhile()
        word = block.data.view(np.uint32)[at // 4]
        block.data.view(np.uint32)[at // 4] = word + value(w, m)[m][0]
        w.write(args[0], np.full(LANES, word[0], np.uint32), m)

    return add


def _copy(program: Program, parts: list[str], args: list[str]) -> Run:
    """cp.async: reads at once; the bytes are visible after a wait for their group.

    A fourth operand limits the bytes read; zeros follow.
    """
    if parts[:2] == ["async", "bulk"]:
        return _bulk(program, parts[2:], args)
    if parts == ["async", "commit_group"]:
        return lambda w, m: w.copies.append([])
    if parts == ["async", "wait_group"]:
        left = int(args[0])

        def wait(w: Warp, m: Mask) -> None:
            if m is not None:
                raise PtxFault(f"{w.where}: lanes are missing at a wait")
            while len(w.copies) > left + 1:
                for there, data in w.copies.pop(0):
                    w.shared.set(there, data, 0)
                    if w.shared.proxy is not None:
                        w.shared.proxy.store(there, w.index)

        return wait
    size = int(args[2])
    hints = [[], ["L2::128B"], ["L2::256B"]]  # hints for the size of L2 prefetch
    if parts[0] != "async" or parts[2:4] != ["shared", "global"] or parts[4:] not in hints:
        raise KeyError(".".join(parts))
    if size not in {"cg": (16,), "ca": (4, 8, 16)}[parts[1]]:
        raise KeyError(f"{size} bytes")
    to, source = _address(program, args[0], "shared"), _address(program, args[1], "global")
    taken = _operand(program, args[3], TYPES["u32"]) if len(args) == 4 else None

    def copy(w: Warp, m: Mask) -> None:
        lanes = np.ones(LANES, np.bool_) if m is None else m
        there = w.memory("shared", to(w, m), m)[1]
        _check(w.shared, there, size, w, read=False)
        data = np.zeros((len(there), size), np.uint8)
        counts = np.full(LANES, size) if taken is None else taken(w, m)
        for count in set(counts[lanes].tolist()) - {0}:
            for some in _by_array("global", source(w, m), lanes & (counts == count)):
                assert some is not None, "lanes are named"
                block, at = w.memory("global", source(w, m), some)
                if count > size or (at % size).any():
                    raise PtxFault(f"{w.where}: {count} bytes of {size} at {at[0]} of {block.name}")
                if count == size:
                    _check(block, at, size, w, read=True)
                    data[some[lanes]] = block.take(at, size).view(np.uint8).reshape(-1, size)
                    continue
                each = _rows(at, count)
                _check(block, each.reshape(-1), 1, w, read=True)
                data[some[lanes], :count] = block.data[each]
        w.copies[-1].append((there, data.reshape(-1).view(WORDS[size])))

    return copy


def _one(w: Warp, m: Mask) -> int:
    """The only active lane."""
    lanes = _lanes(m)
    if len(lanes) != 1:
        raise PtxFault(f"{w.where}: {len(lanes)} lanes; one does it for all")
    return lanes[0]


def _lanes(m: Mask) -> list[int]:
    return list(range(LANES)) if m is None else [int(lane) for lane in np.flatnonzero(m)]


def _barrier_at(w: Warp, address: Values, m: Mask) -> Barrier:
    """The barrier that all active lanes address."""
    there = set((address if m is None else address[m]).tolist())
    found = w.shared.barriers.get(there.pop())
    if found is None or there:
        raise PtxFault(f"{w.where}: no barrier was made there, or two are named")
    return found


def _barrier(program: Program, parts: list[str], args: list[str]) -> Run:
    """mbarrier. While a warp waits, no other of its block runs, so its bytes must already be
    requested."""
    how = ".".join(parts)
    if how == "init.shared::cta.b64":
        address = _address(program, args[0], "shared")
        count = _operand(program, args[1], TYPES["u32"])

        def make(w: Warp, m: Mask) -> None:
            lane = _one(w, m)
            at, number = w.memory("shared", address(w, m), m)[1], int(count(w, m)[lane])
            _check(w.shared, at, 8, w, read=False)
            w.shared.written[_rows(at, 8)] = False
            if not 0 < number < 1 << 20:
                raise PtxFault(f"{w.where}: {number} arrivals")
            w.shared.barriers[int(at[0])] = Barrier(number, (w, lane), number)

        return make
    if how == "arrive.expect_tx.shared::cta.b64":
        if args[0] != "_":
            raise ValueError("the state of a phase")
        address = _address(program, args[1], "shared")
        count = _operand(program, args[2], TYPES["u32"])

        def arrive(w: Warp, m: Mask) -> None:
            lane = _one(w, m)
            _barrier_at(w, address(w, m), m).arrive(int(count(w, m)[lane]), w.where)

        return arrive
    if how != "try_wait.parity.shared::cta.b64" or len(args) != 3:
        raise KeyError(how)
    address, parity = _address(program, args[1], "shared"), _operand(program, args[2], TYPES["u32"])

    def wait(w: Warp, m: Mask) -> None:
        barrier, lanes = _barrier_at(w, address(w, m), m), _lanes(m)
        phases = set(parity(w, m)[lanes].tolist())
        if len(phases) > 1 or not phases <= {0, 1}:
            raise PtxFault(f"{w.where}: parities {phases}")
        w.shared.land(w.machine.stream.rng, w.where)
        over = {barrier.phase} != phases
        if not over and all(one[0] is not barrier for one in w.shared.loads):
            raise PtxFault(
                f"{w.where}: never; {barrier.pending} are to arrive, {barrier.nbytes} bytes to come"
            )
        w.write(args[0], np.full(LANES, over), m)

    return wait


def _bulk(program: Program, parts: list[str], args: list[str]) -> Run:
    """cp.async.bulk, by one lane.

    To shared memory: the source is read at once. The bytes land at random when a thread tries a
    barrier, and must not be read before.

    From shared memory: the source is read at once or at its wait, at random. The store becomes
    visible like a relaxed one, or at its wait.
    """
    how = ".".join(parts)
    if how == "commit_group" and not args:

        def commit(w: Warp, m: Mask) -> None:
            for lane in _lanes(m):
                w.stores.setdefault(lane, [[]]).append([])

        return commit
    if how in ("wait_group", "wait_group.read"):
        left = int(args[0])

        def wait(w: Warp, m: Mask) -> None:
            for lane in _lanes(m):
                groups = w.stores.get(lane, [[]])
                over = groups[: max(len(groups) - 1 - left, 0)]
                for store in (store for group in over for store in group):
                    store.take(w.where)
                    store.read = True
                    if how == "wait_group":
                        w.machine.stream.store(store, w.where)
                if how == "wait_group":
                    del groups[: len(over)]

        return wait
    loads = how == "shared::cta.global.mbarrier::complete_tx::bytes"
    if len(args) != 3 + loads or not (loads or how == "global.shared::cta.bulk_group"):
        raise KeyError(how)
    spaces = ("shared", "global") if loads else ("global", "shared")
    ends = [_address(program, *end) for end in zip(args[:2], spaces, strict=True)]
    nbytes = _operand(program, args[2], TYPES["u32"])
    bar = _address(program, args[3], "shared") if loads else None

    def copy(w: Warp, m: Mask) -> None:
        lane = _one(w, m)
        size = int(nbytes(w, m)[lane])
        if not size or size % 16:
            raise PtxFault(f"{w.where}: {size} bytes")
        (out, to), (source, at) = (
            w.memory(space, end(w, m), m) for space, end in zip(spaces, ends, strict=True)
        )
        steps = np.arange(0, size, 16)
        _check(out, to + steps, 16, w, read=False)
        _check(source, at + steps, 16, w, read=True)
        to, rows = _rows(to + steps, 16).reshape(-1), _rows(at + steps, 16).reshape(-1)
        if bar is None:
            store = BulkStore(w.shared, rows, out, to)
            if w.machine.stream.rng.random() < 0.5:
                store.take(w.where)
            w.stores.setdefault(lane, [[]])[-1].append(store)
            w.machine.stream.stores.append(store)
            return
        barrier = _barrier_at(w, bar(w, m), m)
        if not barrier.fenced:
            raise PtxFault(f"{w.where}: no fence since its barrier was made")
        w.shared.written[to] = False
        w.shared.loads.append((barrier, to, source.data[rows]))

    return copy


def _shuffle(program: Program, parts: list[str], args: list[str]) -> Run:
    sync, mode, _ = parts
    if sync != "sync" or mode not in ("bfly", "idx") or args[3] != "31":
        raise KeyError(".".join(parts))
    value = _operand(program, args[1], TYPES["b32"])
    by = _operand(program, args[2], TYPES["u32"])
    if int(args[4], 0) != 0xFFFFFFFF:
        raise ValueError("only whole warps shuffle")
    lane = np.arange(LANES, dtype=np.uint32)

    def shuffle(w: Warp, m: Mask) -> None:
        if m is not None:
            raise PtxFault(f"{w.where}: lanes are missing at a shuffle")
        source = by(w, m) & np.uint32(31)
        if mode == "bfly":
            source = lane ^ source
        w.write(args[0], value(w, m)[source], m)

    return shuffle


def _convert(program: Program, parts: list[str], args: list[str]) -> Run:
    *modes, to, source = parts
    if to == "bf16":
        if modes != ["rn"] or source != "f32":
            raise KeyError(".".join(parts))
        bits = _operand(program, args[1], TYPES["u32"])

        def narrow(w: Warp, m: Mask) -> None:
            x = bits(w, m)
            even = (x >> np.uint32(16)) & np.uint32(1)
            rounded = (x + np.uint32(0x7FFF) + even) >> np.uint32(16)
            nan = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            w.write(args[0], np.where(nan, np.uint32(0x7FFF), rounded).astype(np.uint16), m)

        return narrow
    if to == "f16x2" and source == "e4m3x2":
        if modes != ["rn"]:
            raise KeyError(".".join(parts))
        codes = _operand(program, args[1], TYPES["u16"])

        def widen(w: Warp, m: Mask) -> None:
            pair = f32_from_e4m3(codes(w, m).view(np.uint8)).astype(np.float16)
            w.write(args[0], pair.view(np.uint32), m)

        return widen
    if to in ("f16x2", "bf16x2"):  # the second operand is the lower half
        if modes != ["rn"] or source != "f32":
            raise KeyError(".".join(parts))
        high, low = (_operand(program, arg, TYPES["f32"]) for arg in args[1:3])

        def pack(w: Warp, m: Mask) -> None:
            pair = [x(w, m) for x in (low, high)]
            bits = [x.astype(np.float16).view(np.uint16) for x in pair]
            if to == "bf16x2":
                bits = [bf16_from_f32(x) for x in pair]
            w.write(args[0], np.stack(bits, axis=1).reshape(-1).view(np.uint32), m)

        return pack
    value, dtype = _operand(program, args[1], TYPES[source]), TYPES[to]
    floats = (dtype.kind == "f", TYPES[source].kind == "f")
    if modes == ["rni"] and floats == (True, True):
        return lambda w, m: w.write(args[0], np.rint(value(w, m)), m)
    if modes == ["rni"] and to == "s32" and source == "f32":
        return lambda w, m: w.write(args[0], _nearest(value(w, m)), m)
    if modes == ["rni"] and to == "s64" and source == "f32":
        return lambda w, m: w.write(args[0], _nearest_s64(value(w, m)), m)
    wanted = ["rn"] if floats == (True, False) or to == "f16" else []
    if modes != wanted or floats == (False, True):
        raise KeyError(".".join(parts))
    return lambda w, m: w.write(args[0], value(w, m).astype(dtype), m)


def _nearest(x: Values) -> Values:
    """f32 to s32, ties to even; out of range the nearest integer, and 0 for NaN."""
    exact = np.clip(np.rint(np.nan_to_num(x.astype(np.float64))), -(2**31), 2**31 - 1)
    return exact.astype(np.int32)


def _nearest_s64(x: Values) -> Values:
    """f32 to s64, ties to even; out of range the nearest integer, and the lowest for NaN."""
    exact = np.rint(x.astype(np.float64))
    is_large = exact >= 2.0**63
    whole = np.where(np.isnan(exact) | (exact < -(2.0**63)) | is_large, -(2.0**63), exact)
    return np.where(is_large, np.int64(2**63 - 1), whole.astype(np.int64))


def _compare(program: Program, parts: list[str], args: list[str]) -> Run:
    how, kind = parts
    compare = COMPARE[how]
    a, b = (_operand(program, arg, TYPES[kind]) for arg in args[1:3])
    return lambda w, m: w.write(args[0], compare(a(w, m), b(w, m)), m)


def _select(program: Program, parts: list[str], args: list[str]) -> Run:
    (kind,) = parts
    a, b = (_operand(program, arg, TYPES[kind]) for arg in args[1:3])
    which = _operand(program, args[3], TYPES["pred"])
    return lambda w, m: w.write(args[0], np.where(which(w, m), a(w, m), b(w, m)), m)


def _lop3(program: Program, parts: list[str], args: list[str]) -> Run:
    if parts != ["b32"]:
        raise KeyError(".".join(parts))
    inputs = [_operand(program, arg, TYPES["u32"]) for arg in args[1:4]]
    terms = _products(int(args[4], 0))

    def run(w: Warp, m: Mask) -> None:
        values = [one(w, m) for one in inputs]
        out = np.zeros(LANES, np.uint32)
        for first, *others in terms:
            product = values[first]
            for other in others:
                product = product & values[other]
            out ^= product
        w.write(args[0], ~out if int(args[4], 0) & 1 else out, m)

    return run


def _products(table: int) -> list[list[int]]:
    """A function of three bits as a sum modulo 2 of products: the inputs of each, without the
    constant.

    Bit 4 a + 2 b + c of the table is its value.
    """
    found = []
    # Moebius inversion: a term is present if an odd number of those below it are
    for term in range(1, 8):
        below = sum(table >> row & 1 for row in range(8) if row & term == row)
        if below % 2:
            found.append([i for i, bit in enumerate((4, 2, 1)) if term & bit])
    return found


def _permute(program: Program, parts: list[str], args: list[str]) -> Run:
    if parts != ["b32"]:
        raise KeyError(".".join(parts))
    a, b, how = (_operand(program, arg, TYPES["u32"]) for arg in args[1:4])
    digits = 0 if args[3].startswith("%") else int(args[3].rstrip("U"), 0)
    if digits and not digits & 0x8888:
        picks = np.array([digits >> 4 * i & 7 for i in range(4)])

        def pick(w: Warp, m: Mask) -> None:
            both = np.stack([a(w, m), b(w, m)], axis=1).view(np.uint8)
            w.write(args[0], both[:, picks].reshape(-1).view(np.uint32), m)

        return pick

    def run(w: Warp, m: Mask) -> None:
        both = a(w, m).astype(np.uint64) | b(w, m).astype(np.uint64) << np.uint64(32)
        out = np.zeros(LANES, np.uint32)
        for i in range(4):
            pick = (how(w, m) >> np.uint32(4 * i)) & np.uint32(0xF)
            byte = both >> (np.uint64(8) * (pick & np.uint32(7)).astype(np.uint64))
            byte = (byte & np.uint64(0xFF)).astype(np.uint32)
            sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
            out |= np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * i)
        w.write(args[0], out, m)

    return run
