"""What ptxas made of a kernel: registers, spills, and whether matrix descriptors are PTX's.

Hopper's matrix products (``HGMMA``) take operands in shared memory by 64-bit descriptors, which lie
in pairs of uniform registers. Their upper half (strides and swizzle) is a constant, their lower
half an address in shared memory. ptxas 12.8 sometimes loses the copy with which a chain of
additions to such a pair begins, and adds to whatever the registers held before: products then read
other memory, without any error. So what registers hold is followed from a kernel's start, each
value a number or a symbol that knows what it comes from.

Knows nothing of kernels of ours, nor of what is computed: registers alone.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

__all__ = ["Usage", "descriptors", "listed_descriptors", "ptxas_version", "usage"]

_WORD = 0xFFFFFFFF

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Of a descriptor's address: nothing that differs from launch to launch or block to block.
_FOREIGN = ("ULDC", "LDC", "LDG", "LDL", "S2UR SR_CTAID", "undefined")
_PAIRS = (".64", "WIDE")
_STORES = ("ST", "RED", "LDGSTS", "BAR", "BRA", "UBLK", "UTMA", "USTS", "SYNCS", "UCGA", "R2UR.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Registers of a thread, bytes that it keeps in memory for want of them."""

    registers: int
    spilled: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of SASS; ``defines`` names registers ("R7", "UR7") and stack slots ("L16")."""

    address: int
    guard: str
    name: str
    operands: list[str]
    defines: frozenset[str]


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def ptxas_version() -> str:
    """Of the assembler that Triton takes for Hopper."""
    command = [str(_TOOLS / "ptxas"), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d[\d.]+)", said)
    assert found is not None
    return found[1]


def usage(cubin: bytes) -> Usage:
    """By the binary's own account."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", cubin))
    assert found is not None
    return Usage(registers=int(found[1]), spilled=int(found[2]))


def _registers(name: str, first: str) -> Iterable[str]:
    """What an instruction with ``first`` as its target writes."""
    found = re.fullmatch(r"(U?R)(\d+)(?:\.64)?", first)
    if found is None or name.startswith(_STORES):
        return ()
    count = 2 if name == "CS2R" or any(part in name for part in _PAIRS) else 1
    product = re.match(r"[HIQ]GMMA\.64x(\d+)x", name)
    if product:
        count = int(product[1]) // 2
    elif ".128" in name or re.match(r"[HIQ]MMA|LDSM.*\.4$", name):
        count = 4
    return (f"{found[1]}{int(found[2]) + i}" for i in range(count))


def _slots(name: str, operand: str) -> list[str]:
    """The words on the stack that a local load or store is about."""
    found = re.fullmatch(r"\[R1(?:\+(0x[0-9a-f]+))?\]", operand)
    if found is None:
        return []
    count = 4 if ".128" in name else 2 if ".64" in name else 1
    return [f"L{int(found[1] or '0', 16) + 4 * i}" for i in range(count)]


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;", line)
    if found is None:
        return None
    name, operands = found[3], [part.strip() for part in found[4].split(",") if part.strip()]
    if name.startswith("STL"):
        written: Iterable[str] = _slots(name, operands[0])
    else:
        targets = [part for part in operands[:3] if not re.fullmatch(r"!?U?P(T|\d)", part)]
        written = _registers(name, targets[0]) if targets else ()
    return Instruction(int(found[1], 16), found[2] or "", name, operands, frozenset(written))


@dataclass(frozen=True, slots=True)
class Value:
    """Symbols and a number, exclusive-or'ed; ptxas swaps registers by three such operations."""

    number: int = 0
    symbols: frozenset[int] = frozenset()

    @property
    def is_number(self) -> bool:
        return not self.symbols


@dataclass(slots=True)
class _Symbols:
    """Equal computations have equal names; each knows the instructions that it comes from."""

    names: dict[object, int] = field(default_factory=dict)
    origins: list[set[str]] = field(default_factory=list)

    def of(self, key: object, origins: Iterable[str]) -> Value:
        name = self.names.setdefault(key, len(self.origins))
        if name == len(self.origins):
            self.origins.append(set())
        self.origins[name] |= set(origins)
        return Value(0, frozenset((name,)))

    def origins_of(self, value: Value) -> set[str]:
        return set().union(*(self.origins[name] for name in value.symbols))


State = dict[str, Value]


class _Code:
    """Instructions, which may run after which, and what registers hold before each."""

    def __init__(self, text: str) -> None:
        self.lines = [i for line in text.splitlines() if (i := _instruction(line))]
        at = {line.address: k for k, line in enumerate(self.lines)}
        self.symbols = _Symbols()
        self.after: list[list[int]] = []
        for k, line in enumerate(self.lines):
            follows = [k + 1]
            if line.name.startswith(("BRA", "CALL")):
                target = int(re.findall(r"0x[0-9a-f]+", line.operands[-1])[-1], 16)
                may_pass = line.guard or len(line.operands) > 1 or line.name.startswith("CALL")
                follows = [at[target], *([k + 1] if may_pass else [])]
            elif line.name.startswith(("EXIT", "RET")) and not line.guard:
                follows = []
            self.after.append([other for other in follows if other < len(self.lines)])

    def run(self, look: Callable[[Instruction, State], None]) -> None:
        """Call ``look`` with each instruction and what registers hold then, once that is known."""
        entered: dict[int, State] = {0: {}}
        heads = {k for line in self.after for k in line[1:]} | {
            other for k, line in enumerate(self.after) for other in line if other != k + 1
        }  # fmt: skip
        todo = [0]
        while todo:
            first = todo.pop()
            for k, state in self._block(first, heads, entered[first]):
                todo += [o for o in self.after[k] if self._merge(o, state, entered)]
        for first, state in entered.items():
            self._block(first, heads, state, look)

    def _block(
        self, first: int, heads: set[int], before: State,
        look: Callable[[Instruction, State], None] | None = None,
    ) -> list[tuple[int, State]]:  # fmt: skip
        """Run on to the next place where ways part or meet; its last instruction, what holds."""
        state, k = dict(before), first
        while True:
            line = self.lines[k]
            if look is not None:
                look(line, state)
            written = self._written(line, state)
            for register, value in written.items():
                old = state.get(register)
                if line.guard and old != value:
                    value = self._one_of((line.address, register), old, value)
                state[register] = value
            if self.after[k] != [k + 1] or k + 1 in heads:
                return [(k, state)]
            k += 1

    def _one_of(self, key: object, old: Value | None, new: Value) -> Value:
        origins = {"undefined"} if old is None else self.symbols.origins_of(old)
        return self.symbols.of(("one of", key), origins | self.symbols.origins_of(new))

    def _merge(self, k: int, state: State, entered: dict[int, State]) -> bool:
        """Let ``state``, too, come to instruction ``k``; whether that changes what holds there."""
        known = entered.get(k)
        if known is None:
            entered[k] = dict(state)
            return True
        changed = False
        for register in known.keys() | state.keys():
            old, new = known.get(register), state.get(register)
            if old == new:
                continue
            size = len(self.symbols.origins)
            both = self._one_of((k, register), old, Value() if new is None else new)
            if new is None:
                both = self.symbols.of(("one of", (k, register)), {"undefined"})
            changed |= old != both or len(self.symbols.origins) > size
            known[register] = both
        return changed

    def get(self, operand: str, state: State, half: int = 0) -> Value:
        """Of a number or register, or of the upper half of the pair that it names."""
        operand = operand.removesuffix(".reuse")
        if operand in ("RZ", "URZ", "SRZ"):
            return Value()
        if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand):
            return Value((int(operand, 0) >> (32 * half)) & _WORD)
        found = re.fullmatch(r"([-~]?)(U?R|L)(\d+)", operand)
        if found is None:
            return self.symbols.of(operand, {operand})
        register = f"{found[2]}{int(found[3]) + half}"
        value = state.get(register)
        if value is None:
            return self.symbols.of(f"undefined {register}", {"undefined"})
        if found[1] and value.is_number:
            # The lower half of a negated pair borrows.
            return Value((-value.number - half if found[1] == "-" else ~value.number) & _WORD)
        if found[1]:
            return self.symbols.of((found[1], value), self.symbols.origins_of(value))
        return value

    def _written(self, line: Instruction, state: State) -> State:
        name, operands = line.name, line.operands
        if not line.defines:
            return {}
        if name.startswith(("LDL", "STL")):
            slots = _slots(name, operands[name.startswith("LDL")])
            first = re.match(r"R(\d+)", operands[name.startswith("STL")])
            registers = [f"R{int(first[1]) + i}" if first else "RZ" for i in range(len(slots))]
            pairs = zip(registers, slots, strict=True)
            if slots and name.startswith("LDL"):
                return {register: self.get(slot, state) for register, slot in pairs}
            if slots:
                return {slot: self.get(register, state) for register, slot in pairs}
        sources = [part for part in operands if not re.match(r"!?U?P(T|\d)", part)][1:]
        first_name = re.match(r"(U?R)(\d+)", next(iter(sorted(line.defines))))
        if name == "CS2R" and sources == ["SRZ"]:
            return dict.fromkeys(line.defines, Value())
        if first_name and name == "UIADD3.64":
            number = min(int(register[2:]) for register in line.defines)
            return {f"UR{number + half}": self._added(sources, state, half) for half in (0, 1)}
        if len(line.defines) == 1:
            value = self._computed(line, sources, state)
            if value is not None:
                return dict.fromkeys(line.defines, value)
        return {
            register: self.symbols.of((line.address, register), self._comes_from(line, state))
            for register in line.defines
        }

    def _computed(self, line: Instruction, sources: list[str], state: State) -> Value | None:
        """Moves, sums and logic; None: something else."""
        name = line.name
        if name in ("MOV", "UMOV", "R2UR"):
            return self.get(sources[-1], state)
        if re.match(r"IMAD\.(MOV|U32|X)", name) and sources[:2] == ["RZ", "RZ"]:
            return self.get(sources[2], state)
        if re.match(r"U?IADD3|VIADD", name):
            return self._added(sources, state, 0)
        if "LOP3.LUT" in name:
            table = int(sources[3], 16)
            a, b, c = (self.get(part, state) for part in sources[:3])
            if table == 0x3C:
                return Value(a.number ^ b.number, a.symbols ^ b.symbols)
            if a.is_number and b.is_number and c.is_number:
                return Value(_lop3(table, a.number, b.number, c.number))
        return None

    def _added(self, sources: list[str], state: State, half: int) -> Value:
        """Carries aside: addresses in shared memory have fourteen bits."""
        values = [self.get(part, state, half) for part in sources]
        number = sum(v.number for v in values if v.is_number) & _WORD
        others = [v for v in values if not v.is_number]
        if not others or (len(others) == 1 and not number):
            return others[0] if others else Value(number)
        origins = set().union(*(self.symbols.origins_of(v) for v in others))
        return self.symbols.of(("sum", number, tuple(others)), origins)

    def _comes_from(self, line: Instruction, state: State) -> set[str]:
        """Loads and special registers are origins; uniform results are what they are made of."""
        if not line.name.startswith("U") or line.name.startswith("ULDC"):
            return {" ".join([line.name, *line.operands[1:]])}
        parts = [p for p in line.operands[1:] if re.fullmatch(r"[-~]?UR\d+", p)]
        return set().union(*(self.symbols.origins_of(self.get(p, state)) for p in parts))


def _lop3(table: int, a: int, b: int, c: int) -> int:
    """Of each bit of ``a``, ``b`` and ``c`` the bit that they select of the table."""
    result = 0
    for place in range(32):
        index = (a >> place & 1) << 2 | (b >> place & 1) << 1 | (c >> place & 1)
        result |= (table >> index & 1) << place
    return result


def descriptors(cubin: bytes) -> tuple[int, Sequence[str]]:
    """How many matrix descriptors a kernel uses, and what is wrong with some of them."""
    return listed_descriptors(_cuobjdump("-sass", cubin))


def listed_descriptors(listing: str) -> tuple[int, Sequence[str]]:
    """As ``descriptors``, of what cuobjdump wrote."""
    code = _Code(listing)
    count, wrong = 0, []

    def look(line: Instruction, state: State) -> None:
        nonlocal count
        found = re.search(r"gdesc\[UR(\d+)\]", " ".join(line.operands))
        if not re.match(r"[HIQ]GMMA", line.name) or found is None:
            return
        # Four registers; of the first two nothing is used where the left side is in registers.
        left_in_registers = re.fullmatch(r"R\d+(\.reuse)?", line.operands[1]) is not None
        for first in range(int(found[1]) + (2 if left_in_registers else 0), int(found[1]) + 4, 2):
            count += 1
            lower, upper = (code.get(f"UR{first + half}", state) for half in (0, 1))
            foreign = sorted(p for p in code.symbols.origins_of(lower) if p.startswith(_FOREIGN))
            if not upper.is_number or foreign:
                strange = sorted(code.symbols.origins_of(upper)) + foreign
                wrong.append(f"{line.name} at {line.address:#x}: {'; '.join(strange)}")

    code.run(look)
    return count, wrong
