"""What one device does in one run of a compiled program, counted in its optimised HLO.

`read(jax.jit(f).lower(...).compile().as_text())` reads the text of TPU (also compiled ahead of
time, where there is no TPU), GPU and CPU. Instructions and attributes: as parsed and printed by
https://github.com/openxla/xla/tree/main/xla/hlo, explained at
https://openxla.org/xla/operation_semantics.
"""

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

_NAME = r"%?([\w.-]+)"
_HEAD = re.compile(rf"(ENTRY )?{_NAME} \(.*\{{$")
_LINE = re.compile(rf"\s+(ROOT )?{_NAME} = (.*?) ([a-z][a-z0-9-]*)\((.*?)\)(?:, (.*)|$)")
_RECEIVED = {  # bytes, by the operands' bytes and the devices of a group
    "all-gather": lambda size, n: size * (n - 1),
    "all-reduce": lambda size, n: 2 * size * (n - 1) // n,
    "all-to-all": lambda size, n: size * (n - 1) // n,
    "collective-permute": lambda size, n: size,
    "reduce-scatter": lambda size, n: size * (n - 1) // n,
}
_KERNELS = re.compile(r'_target="[^"]*(tpu_custom_call|mosaic|triton|cublas|cudnn|onednn)')
_PLUMBING = ("", "body", "checkpoint", "closed_call", "cond", "pallas_call",
             "rematted_computation", "shard_map", "while")  # fmt: skip
_SAME = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape")  # of operand 0


@dataclasses.dataclass
class Program:
    """Counts of one device and one run; of a conditional, those of the largest branch.

    matmul_flops: 2 for every pair of numbers that a dot or convolution multiplies, where padding
        and the holes of a dilation are not multiplied: so it is the FLOPs of the program's own
        dots, whatever convolutions the TPU compiler makes of them.
    kernels: executions of custom calls whose FLOPs the text does not show (Pallas; libraries),
        by the innermost name scope or `pallas_call(name=...)`, else by the instruction's name.
    collective_bytes: bytes received over the network, by kind. Of an array of b bytes on n
        devices these are b (n-1)/n for all-gather and reduce-scatter (b of the whole array) and
        all-to-all, twice that for all-reduce, as of a ring; b for collective-permute. What TPU
        slices send one another, whatever for, is "between-slices": b.
    all_reduces: executions, bytes and op_name of every array that is all-reduced.
    unknown_loops: while instructions that count as one turn, because the number is not known.
    """

    matmul_flops: int = 0
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    collective_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    all_reduces: list[tuple[int, int, str]] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    def whole_all_reduces(self, min_bytes: int) -> list[tuple[int, int, str]]:
        """The all-reduces of arrays of `min_bytes` or more, such as a weight's whole gradient."""
        return [x for x in self.all_reduces if x[1] >= min_bytes]

    def _add(self, other: "Program", times: int = 1):
        self.matmul_flops += other.matmul_flops * times
        self.kernels.update({name: n * times for name, n in other.kernels.items()})
        self.collective_bytes.update({k: n * times for k, n in other.collective_bytes.items()})
        self.all_reduces += [(n * times, size, name) for n, size, name in other.all_reduces]
        self.unknown_loops += [x for x in other.unknown_loops if x not in self.unknown_loops]

    def _size(self):
        return self.matmul_flops, self.collective_bytes.total(), self.kernels.total()


def read(text: str) -> Program:
    """Counts what the entry computation executes; ValueError if the text has none."""
    header = text.partition("\n")[0]
    devices = math.prod(map(int, re.findall(r"(?:replica_count|num_partitions)=(\d+)", header)))
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    return _Counting(computations, devices).total(entry)


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    inside: str  # the parentheses, as they stand
    attributes: str

    def called(self, attribute: str) -> str:
        return re.search(rf"\b{attribute}={_NAME}", self.attributes)[1]

    def op_name(self) -> str:
        found = re.search(r'\bop_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class _Computation(dict):
    """Instructions by name, operands before users."""

    root = ""  # name of the instruction that is the result


def _parse(text: str) -> tuple[dict[str, _Computation], str | None]:
    computations, computation, entry = {}, _Computation(), None
    for line in text.splitlines():
        if found := _LINE.match(line):
            root, name, shape, opcode, inside, attributes = found.groups("")
            operands = re.findall(r"%([\w.-]+)", inside)
            computation[name] = _Instruction(name, shape, opcode, operands, inside, attributes)
            computation.root = name if root else computation.root
        elif found := _HEAD.match(line):
            computation = computations[found[2]] = _Computation()
            entry = found[2] if found[1] else entry
    return computations, entry


class _Counting:
    def __init__(self, computations: dict[str, _Computation], devices: int):
        self.computations, self.devices, self.totals = computations, devices, {}

    def total(self, name: str, fused: bool = False) -> Program:
        if (name, fused) not in self.totals:
            total = self.totals[name, fused] = Program()
            for x in self.computations[name].values():
                self.count(x, self.computations[name], fused, total)
        return self.totals[name, fused]

    def count(self, x: _Instruction, home: _Computation, fused: bool, total: Program):
        opcode = x.opcode.removesuffix("-start")
        if opcode in ("call", "fusion", "async"):
            called = x.called("to_apply" if "to_apply=" in x.attributes else "calls")
            total._add(self.total(called, opcode == "fusion"))
        elif opcode == "while":
            turns = self.turns(x, home)
            total.unknown_loops += [x.name] * (turns is None)
            total._add(self.total(x.called("body")), 1 if turns is None else turns)
            total._add(self.total(x.called("condition")), 1 if turns is None else turns + 1)
        elif opcode == "conditional":
            found = re.search(r"branch_computations=\{(.*?)\}", x.attributes)
            pair = ("true_computation", "false_computation")
            names = re.findall(_NAME, found[1]) if found else map(x.called, pair)
            total._add(max(map(self.total, names), key=Program._size))
        elif opcode == "convolution":
            total.matmul_flops += _convolution_flops(x, *(_dims(home[y].shape) for y in x.operands))
        elif opcode == "dot" or opcode == "custom-call" and "lhs_contracting_dim" in x.attributes:
            total.matmul_flops += _dot_flops(x, _dims(home[x.operands[0]].shape))
        elif opcode == "custom-call" and _KERNELS.search(x.attributes):
            scopes = [re.sub(r".*\(|\)", "", part) for part in x.op_name().split("/")[1:]]
            total.kernels[[x.name, *(s for s in scopes if s not in _PLUMBING)][-1]] += 1
        elif opcode == "recv-done" and "megascale" in x.attributes:
            total.collective_bytes["between-slices"] += _bytes(x.shape)
        elif opcode in _RECEIVED and not _continues(x, home):
            n, sizes = self.group(x), [_bytes(home[y].shape) for y in x.operands]
            if opcode == "all-reduce" and fused and _sliced(x, home):
                opcode = "reduce-scatter"
            elif opcode == "all-reduce" and n > 1:
                names = [x.op_name() or _origin(home, y).op_name() for y in x.operands]
                total.all_reduces += [(1, *found) for found in zip(sizes, names, strict=True)]
            total.collective_bytes[opcode] += _RECEIVED[opcode](sum(sizes), n)

    def group(self, x: _Instruction) -> int:
        """Devices in a group: {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=8,'b'=2] {'a':(1)4,'b'}."""
        if found := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", x.attributes):
            sizes = dict(axis.split("=") for axis in found[1].split(","))
            axes = [axis.partition(":(") for axis in found[2].split(",") if axis]
            return math.prod(int(sub.split(")")[1] if sub else sizes[a]) for a, _, sub in axes)
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]", x.attributes):
            return int(found[1])
        found = re.search(r"replica_groups=\{\{([\d,]+)\}", x.attributes)
        return len(found[1].split(",")) if found else self.devices

    def turns(self, loop: _Instruction, home: _Computation) -> int | None:
        """How often a while loop turns: as noted, or by its counter's start, step and limit."""
        if found := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
            return int(found[1])
        condition, body = (self.computations[loop.called(x)] for x in ("condition", "body"))
        test = _origin(condition, condition.root)
        direction = re.search(r"\bdirection=([LG])([TE])", test.attributes)
        if not direction:
            return None

        def at_start(k, c):
            start_k, start = (None, 0) if k is None else _element(home, loop.operands[0], k)
            return start + c if start_k is None else math.nan

        sides = [_value(condition, x) for x in test.operands]
        counter, limit = sides if direction[1] == "L" else sides[::-1]
        stepped, step = _element(body, body.root, counter[0])
        fixed = limit[0] is None or _element(body, body.root, limit[0]) == (limit[0], 0)
        left = at_start(*limit) + (direction[2] == "E") - at_start(*counter)
        known = fixed and stepped == counter[0] and step >= 1 and not math.isnan(left)
        return max(0, -(-left // step)) if known else None


def _origin(home: _Computation, name: str) -> _Instruction:
    """The instruction that makes a value, past copies and tuples."""
    x = home[name]
    if x.opcode in _SAME:
        return _origin(home, x.operands[0])
    if x.opcode == "get-tuple-element":
        made = _origin(home, x.operands[0])
        return _origin(home, made.operands[_index(x)]) if made.opcode == "tuple" else x
    return x


def _index(x: _Instruction) -> int:
    return int(re.search(r"\bindex=(\d+)", x.attributes)[1])


def _value(home: _Computation, name: str) -> tuple[int | None, float]:
    """(k, c) is element k of the computation's parameter plus c; (None, c) a constant or nan."""
    x = _origin(home, name)
    if x.opcode == "constant" and re.fullmatch(r"-?\d+", x.inside):
        return None, int(x.inside)
    if x.opcode == "get-tuple-element" and home[x.operands[0]].opcode == "parameter":
        return _index(x), 0
    if x.opcode == "add":
        (k, c), (other, d) = (_value(home, y) for y in x.operands)
        if k is None or other is None:
            return other if k is None else k, c + d
    return None, math.nan


def _element(home: _Computation, name: str, k: int | None) -> tuple[int | None, float]:
    """The same of element k of a tuple."""
    made = _origin(home, name)
    known = k is not None and made.opcode == "tuple"
    return _value(home, made.operands[k]) if known else (None, math.nan)


def _sliced(x: _Instruction, home: _Computation) -> bool:
    """Whether a piece is cut out of x's result: what TPU's fused reduce-scatter looks like."""
    same = {x.name}
    users = [y for y in home.values() if y.opcode in (*_SAME, "get-tuple-element")]
    same.update(y.name for y in users if y.operands[0] in same)
    return any(y.opcode == "dynamic-slice" and y.operands[0] in same for y in home.values())


def _continues(x: _Instruction, home: _Computation) -> bool:
    """Whether x only stands for one that another fusion started: TPU's async collective fusion.

    Such a collective stands in the fusion that starts it, in those that run meanwhile, and in
    the one that waits for it.
    """
    started = any("AsyncCollectiveStart" in y.attributes for y in home.values())
    return "async_collective_fusion_config" in x.attributes and not started


def _dims(shape: str) -> list[int]:
    """Of the first array of a shape."""
    return [int(x) for x in re.findall(r"\d+", re.search(r"\[(.*?)\]", shape)[1])]


def _bytes(shape: str) -> int:
    """Of all arrays of a shape. The number in a type's name is its bits; a pred has a byte."""
    arrays = re.findall(r"\b(pred|[a-z]+(\d+)\w*)(\[[\d,<=]*\])", shape)
    return sum(math.prod(_dims(dims)) * int(bits or 8) // 8 for _, bits, dims in arrays)


def _dot_flops(x: _Instruction, lhs: list[int]) -> int:
    """Of a dot, or of a cuBLAS call, whose backend_config says what is contracted."""
    found = re.search(r"lhs_contracting_dim\w+\W*?[\[{]([^\]}]*)", x.attributes)
    contracted = math.prod(lhs[int(i)] for i in re.findall(r"\d+", found[1]))
    return 2 * math.prod(_dims(x.shape)) * contracted


def _convolution_flops(x: _Instruction, lhs: list[int], rhs: list[int]) -> int:
    """Feature groups are in the kernel's input features, batch groups in the output's batch."""
    labels = re.search(r"dim_labels=([0-9a-z]+)_([0-9a-z]+)->([0-9a-z]+)", x.attributes).groups()
    lhs, rhs, out = map(dict, map(zip, labels, (lhs, rhs, _dims(x.shape))))
    found = re.search(r"window=\{(.*?)\}", x.attributes)
    window = dict(y.split("=") for y in found[1].split()) if found else {}
    flops = 2 * out["b"] * out["f"] * rhs["i"]
    for i in map(str, range(len(out) - 2)):
        low, stride, lhs_dilate, rhs_dilate = (
            int(window[key].split("x")[int(i)].split("_")[0]) if key in window else usual
            for key, usual in (("pad", 0), ("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        # Where in the dilated input a pair of an output and a kernel element looks.
        there = np.add.outer(np.arange(out[i]) * stride - low, np.arange(rhs[i]) * rhs_dilate)
        inside = (there >= 0) & (there < lhs[i] * lhs_dilate) & (there % lhs_dilate == 0)
        flops *= int(inside.sum())
    return flops
