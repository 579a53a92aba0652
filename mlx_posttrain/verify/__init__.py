"""``mlx-posttrain verify``: does this machine compute what it should? A Markdown table to paste.

Parity compares this machine's engines and devices with each other on small models and needs no network.
Anchors compare published figures with what is measured here, and need weights and data of the hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlx_posttrain.verify.checks import FAILED, SKIPPED, Check, failed


def verify(anchors: bool = False, engine: str = "auto") -> list[Check]:
    """Make all checks of parity and, with ``anchors``, those of published figures on ``engine``."""
    from mlx_posttrain.verify import anchors as published
    from mlx_posttrain.verify import parity

    return parity.compare() + (published.measure(engine) if anchors else [])


def machine() -> tuple[str, bool]:
    """Compare this machine's devices on the embedded model: a Markdown block to paste, and whether it holds.

    That is the GPU against the CPU, or without a GPU the installed engines on the CPU.
    """
    from mlx_posttrain.verify import parity

    names = parity.engine_names()
    checks = parity.compare("tiny")
    return f"{markdown(checks)}\n\n{verdict(names, checks)}", not failed(checks)


def verdict(names: Sequence[str], checks: Sequence[Check]) -> str:
    """One sentence on what was compared, and whether it agrees."""
    compared = [check for check in checks if check.verdict != SKIPPED]
    wrong = [check.name for check in compared if check.verdict == FAILED]
    where = "The GPU and the CPU" if "mlx-gpu" in names else f"There is no GPU; {' and '.join(names)}"
    if not compared:
        return f"Nothing was compared: {checks[0].measured}"
    if not wrong:
        return f"{where} compute the same: {len(compared)} of {len(compared)} checks hold."
    advice = "Train with engine=torch, or with what agrees, and report this block."
    return f"{where} do NOT compute the same: {'; '.join(wrong)}. {advice}"


def markdown(checks: Iterable[Check]) -> str:
    """The machine, its versions and the table of checks."""
    from mlx_posttrain.bench import describe_machine

    facts = describe_machine()
    name = ", ".join(facts[key] for key in ("chip", "memory", "system") if facts.get(key))
    versions = ", ".join(
        f"{key} {value}"
        for key, value in facts.items()
        if key not in ("chip", "memory", "system", "MLX's BLAS")
    )
    rows = [("check", "expected", "measured", "tolerance", "verdict")]
    rows += [(c.name, c.expected, c.measured, c.tolerance, c.verdict) for c in checks]
    cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"**{name}**", "", versions, "", cells[0], "|---" * len(rows[0]) + "|", *cells[1:]])
