"""The table that the demo ends with, made of summary.json."""

from collections.abc import Sequence
from typing import Any

ROWS = {
    "popularity": "popularity",
    "markov": "first-order Markov",
    "model_without_content": "model without content",
    "model": "model",
    "oracle": "oracle",
}
COLUMNS = {
    "hr@10": "HR@10",
    "ndcg@10": "NDCG@10",
    "mrr": "MRR",
    "coverage": "coverage",
    "few_hr@10": "few events",
    "cold_hr@10": "cold",
}


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows of summary.json out as a table; a figure that does not exist is a dash."""
    found = {row["row"]: row for row in rows}
    users = next((row["users"] for row in rows if row.get("users")), 0)
    lines = [f"{f'{users:,} users, full catalog':<28}" + "".join(f"{title:>12}" for title in COLUMNS.values())]
    for name in [*(name for name in ROWS if name in found), *(name for name in found if name not in ROWS)]:
        lines.append(f"{ROWS.get(name, name):<28}" + "".join(f"{_figure(found[name].get(key)):>12}" for key in COLUMNS))
    lines.append("few events: HR@10 on targets with at most 5 training events; cold: HR@10 on targets with none")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.4f}"
