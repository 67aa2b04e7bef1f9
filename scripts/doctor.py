"""``mlxtx doctor``: is this machine ready, and are its Metal kernels right and fast?

    mlxtx doctor [--quick] [--json]

On a Mac every kernel runs against its reference; one that does not compile or disagrees is switched
off on this machine, and the faster of two paths is remembered. Elsewhere it says that Metal was not
exercised: there the references run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from mlxtx.command_line import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """0: all well (or no Metal to look at); 1: a kernel was switched off."""
    parser = Parser(prog="mlxtx doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="check the kernels, time nothing")
    parser.add_argument("--json", action="store_true", help="machine and findings as JSON")
    options = parser.parse_args(argv)

    from mlxtx.metal_kernels import dispatch

    from mlxtx.diagnostics import doctor

    machine = doctor.machine()
    if not options.json:
        print_machine(machine)
    findings = []
    if dispatch.on_metal():
        for finding in doctor.examine(timed=not options.quick):
            findings.append(finding)
            if not options.json:
                print(describe(finding), flush=True)
        doctor.remember(findings)
    if options.json:
        report = {
            "machine": dataclasses.asdict(machine),
            "metal_exercised": bool(findings),
            "kernels": [dataclasses.asdict(f) | {"choice": f.choice} for f in findings],
        }
        print(json.dumps(report, indent=2))
    elif not findings:
        print("Metal: not exercised, this machine has no Metal GPU for MLX.")
        print("       The kernels' plain references run instead, with the same results.")
    else:
        print(f"Remembered in {dispatch.memory_file()}")
    return int(any(finding.problem for finding in findings))


def print_machine(machine) -> None:  # type: ignore[no-untyped-def]
    from mlxtx.metal_kernels.chips import bandwidth_of

    speed = bandwidth_of(machine.chip)
    memory = f", {machine.memory_gb:.0f} GB" if machine.memory_gb else ""
    bandwidth = f", {speed} GB/s by its data sheet" if speed else ""
    print(f"chip   {machine.chip}{memory}{bandwidth}")
    print(f"system {machine.system}; mlx {machine.mlx}, mlxtx {machine.mlxtx}")


def describe(finding) -> str:  # type: ignore[no-untyped-def]
    """One line for a kernel."""
    name = f"{finding.operation:18}"
    if finding.problem:
        return f"{name} OFF on this machine: {finding.problem}"
    line = f"{name} agrees with its reference in {finding.cases} cases"
    if finding.kernel_ms is not None and finding.other_ms is not None:
        line += f"; {finding.kernel_ms:.2f} ms, {finding.other} {finding.other_ms:.2f} ms"
        if finding.bound_ms is not None:
            line += f", memory bound {finding.bound_ms:.2f} ms"
        line += f": uses {'the kernel' if finding.choice == 'kernel' else finding.other}"
    return line


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(main, sys.argv[1:]))
