"""Communication of a compiled program, parsed from its HLO text: every collective, multiplied by its loops' lengths.

The text is parsed because `cost_analysis` counts a loop's body once. Bytes are what each chip sends under the ring
algorithms, with N chips in a group and a per-chip operand of b bytes (Thakur et al. 2005; Chan et al. 2007):

    all-gather          b (N - 1)          the operand is one shard
    reduce-scatter      b (N - 1) / N      the operand is the full array
    all-reduce          2 b (N - 1) / N    a reduce-scatter and an all-gather
    all-to-all          b (N - 1) / N
    collective-permute  b

The TPU compiler writes a reduce-scatter as a fusion named all-reduce-scatter, which contains an all-reduce and a slice,
and a collective between slices as a send to the host whose attributes name its kind (the runtime does the rest).
"""

import dataclasses
import functools
import math
import re

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "bf16": 2, "f16": 2,
    "f32": 4, "f64": 8, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective op. group: chips that take part; sent: bytes that a chip sends per execution; times: number of
    executions; crosses: whether it crosses slices, over the data-center network; source: the op's JAX name."""

    kind: str
    group: int
    sent: float
    times: int
    crosses: bool
    source: str

    @property
    def total(self) -> float:
        """Bytes that a chip sends in all executions."""
        return self.sent * self.times


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a program. endless: loops with collectives whose trip count is unknown (counted once)."""

    collectives: tuple[Collective, ...]
    endless: tuple[str, ...]

    def sent(self, crosses: bool | None = None) -> int:
        """Bytes that a chip sends; with `crosses` only those between slices (True) or within one (False)."""
        return round(sum(c.total for c in self.collectives if crosses is None or c.crosses == crosses))

    def by_kind(self) -> dict[str, dict]:
        """{kind: {'ops', 'executions', 'bytes'}}, the bytes being what a chip sends; largest first."""
        result = {}
        for c in self.collectives:
            entry = result.setdefault(c.kind, {"ops": 0, "executions": 0, "bytes": 0})
            entry["ops"] += 1
            entry["executions"] += c.times
            entry["bytes"] += round(c.total)
        return dict(sorted(result.items(), key=lambda item: -item[1]["bytes"]))


@dataclasses.dataclass(frozen=True)
class _Op:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes; for constants and parameters also what is in the parentheses
    root: bool


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_OP = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


def traffic(text: str, num_slices: int = 1) -> Traffic:
    """The collectives that one execution of a program runs.

    Args:
        text: `compiled.as_text()` of any backend.
        num_slices: number of slices that take part in collectives between slices.
    """
    program = _Program(text)
    found, endless = program.walk(program.entry, num_slices)
    return Traffic(tuple(found), tuple(dict.fromkeys(endless)))


def array_bytes(type_text: str) -> float:
    """Bytes of all arrays in an HLO type, without padding."""
    return sum(
        BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_text)
    )


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Op]] = {}
        current, self.entry = None, None
        for line in text.splitlines():
            if not line.startswith(" "):
                if header := _HEADER.match(line):
                    current = self.computations.setdefault(header[2], {})
                    self.entry = header[2] if header[1] else self.entry
            elif current is not None and (op := _OP.match(line)):
                inside = op[5].split(")", 1)[0]
                operands = tuple(re.findall(r"%([\w.\-]+)", inside)) if "%" in inside else ()
                current[op[2]] = _Op(op[2], op[3], op[4], operands, op[5], bool(op[1]))

    def walk(self, name: str, num_slices: int, times: int = 1) -> tuple[list[Collective], list[str]]:
        found, endless = [], []
        ops = self.computations.get(name, {})
        for op in ops.values():
            kind = op.opcode.removesuffix("-start")
            if kind in KINDS:
                size = sum(array_bytes(ops[o].type) for o in op.operands if o in ops)
                group = max(map(len, _groups(op.rest)), default=1)
                if kind == "all-reduce" and "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                found.append(_collective(op, kind, size, group, times, crosses=False))
                continue
            if op.opcode == "send" and (kind := re.search(r'megascale_transfer_type="(\w+)"', op.rest)):
                kind = kind[1].lower().replace("_", "-")
                size = array_bytes(ops[op.operands[0]].type)
                found.append(_collective(op, kind, size, num_slices, times, crosses=True))
                continue
            if op.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", op.rest)[1]
                trips = self.trip_count(op, ops)
                inner = self.walk(body, num_slices, times * (1 if trips is None else trips))
                if trips is None and inner[0]:
                    endless.append(body)
            elif op.opcode == "conditional":  # only one branch runs: assume the one that sends most
                branches = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
                names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else _branches(op.rest)
                inner = max((self.walk(n, num_slices, times) for n in names), key=lambda w: sum(c.total for c in w[0]))
            elif op.opcode in ("fusion", "call", "async-start") and (called := _CALLED.search(op.rest)):
                # A gather that the TPU compiler overlaps with compute appears in full in each of its pieces: count it
                # where it starts.
                if op.name.startswith("async-collective-done") or called[1].startswith("async_collective_fusion"):
                    continue
                inner = self.walk(called[1], num_slices, times)
            else:
                continue
            found += inner[0]
            endless += inner[1]
        return found, endless

    # --- trip counts ---

    def trip_count(self, op: _Op, ops) -> int | None:
        """Trip count of a while loop: as annotated, or from its counter's start, step and bound; None = unknown.

        An upper bound if a second condition may end the loop earlier.
        """
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', op.rest):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", op.rest)[1]]
        body = self.computations[re.search(r"body=%?([\w.\-]+)", op.rest)[1]]
        start = ops.get(op.operands[0]) if op.operands else None
        if start is None or start.opcode != "tuple":
            return None
        initial = lambda index: self._constant(start.operands[index], ops)
        for left, right, direction in self._comparisons(condition):
            index, bound = left.get("index"), right.get("value")
            if bound is None and right.get("index") is not None:
                bound = initial(right["index"])
            if index is None or bound is None:
                continue
            first, step = initial(index), self._step(body, index)
            if first is None or not step:
                continue
            distance = bound - first + {"LE": 1, "GE": -1}.get(direction, 0)
            return max(0, math.ceil(distance / step))
        return None

    def _comparisons(self, condition):
        """(counter, bound, direction) of each compare that must hold for the loop to continue, also inside fusions."""
        root = next(o for o in condition.values() if o.root)
        waiting = [(root, condition, lambda name: self._leaf(name, condition))]
        while waiting:
            op, ops, leaf = waiting.pop()
            if op.opcode == "compare" and (direction := re.search(r"direction=(\w+)", op.rest)):
                yield leaf(op.operands[0]), leaf(op.operands[1]), direction[1]
            elif op.opcode in ("and", "copy", "bitcast"):
                waiting += [(ops[o], ops, leaf) for o in op.operands if o in ops]
            elif op.opcode in ("fusion", "call") and (called := _CALLED.search(op.rest)):
                inner = self.computations[called[1]]
                waiting.append((next(o for o in inner.values() if o.root), inner, _through(self, op, inner, leaf)))

    def _leaf(self, name, ops) -> dict:
        op = ops.get(name)
        while op is not None and op.opcode in ("copy", "bitcast", "convert") and op.operands:
            op = ops.get(op.operands[0])
        if op is None:
            return {}
        if op.opcode == "constant":
            return {"value": _integer(op)}
        if op.opcode == "get-tuple-element":
            return {"index": int(re.search(r"index=(\d+)", op.rest)[1])}
        return {"parameter": int(op.rest.split(")")[0])} if op.opcode == "parameter" else {}

    def _constant(self, name, ops) -> int | None:
        return self._leaf(name, ops).get("value")

    def _step(self, body, index) -> int | None:
        """The constant that each iteration adds to element `index` of the loop's tuple; None = not a constant."""
        root = next(o for o in body.values() if o.root)
        if root.opcode != "tuple":
            return None
        op = body.get(root.operands[index])
        while op is not None and op.opcode in ("copy", "bitcast") and op.operands:
            op = body.get(op.operands[0])
        if op is None:
            return None
        leaf = functools.partial(self._leaf, ops=body)
        if op.opcode == "fusion" and (called := _CALLED.search(op.rest)):
            inner = self.computations[called[1]]
            leaf, op = _through(self, op, inner, leaf), next(o for o in inner.values() if o.root)
        if op.opcode != "add":
            return None
        values = [leaf(o).get("value") for o in op.operands]
        return next((v for v in values if v is not None), None)


def _collective(op, kind, size, group, times, crosses) -> Collective:
    ring = (group - 1) / group
    factor = {"all-gather": group - 1, "all-reduce": 2 * ring, "collective-permute": 1, "one-to-one": 1}.get(kind, ring)
    source = re.search(r'op_name="([^"]*)"', op.rest)
    return Collective(kind, group, size * factor, times, crosses, source[1] if source else op.name)


def _through(program, call, inner, outer):
    """Function to the leaves of a called computation, with the caller's operands for its parameters."""

    def leaf(name):
        found = program._leaf(name, inner)
        return outer(call.operands[found["parameter"]]) if "parameter" in found else found

    return leaf


def _integer(op) -> int | None:
    value = re.match(r"-?\d+(?=\))", op.rest)
    return int(value[0]) if value else None


def _branches(rest) -> list[str]:
    return [m[1] for m in re.finditer(r"(?:true|false)_computation=%?([\w.\-]+)", rest)]


def _groups(rest: str) -> list[list[int]]:
    """Groups of partitions of a collective, in any of HLO's notations; of a permute its (source, target) pairs."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)", pairs[1] + "}")]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(int(iota[2]), iota[3], iota[4])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*)\))? ?\{([^}]*)\}", rest):
        names = [(n, int(size)) for n, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])]
        chosen = re.findall(r"'([^']+)'", mesh[3])
        keep = [i for i, (n, _) in enumerate(names) if n not in chosen]
        order = keep + [i for n in chosen for i, (m, _) in enumerate(names) if m == n]
        size = math.prod(s for n, s in names if n in chosen)
        return _iota(size, ",".join(str(s) for _, s in names), ",".join(map(str, order)), mesh[2])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return [[int(p) for p in g.split(",") if p] for g in re.findall(r"\{([\d,]*)\}", listed[1])]
    return []


def _iota(size: int, dims: str, transpose: str | None, devices: str | None = None) -> list[list[int]]:
    """Groups of `size` from range(product of dims), reshaped to dims, transposed and flattened."""
    import numpy as np

    shape = [int(d) for d in dims.split(",")]
    ids = np.arange(math.prod(shape))
    if devices and (iota := re.match(r"\[([\d,]+)\]T?\(?([\d,]*)", devices)):
        ids = np.array(_iota(len(ids), iota[1], iota[2] or None)).ravel()
    ids = ids.reshape(shape)
    ids = ids.transpose([int(t) for t in transpose.split(",")]) if transpose else ids
    return ids.reshape(-1, size).tolist()
