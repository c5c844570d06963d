"""A report as JSON and as CSV."""

import csv
import io
import json
import math
from typing import Any


def to_json(report: dict[str, Any]) -> str:
    """As JSON. It has no NaN and no infinity: they are null and "Infinity"."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(value) for value in x]
        if isinstance(x, float) and not math.isfinite(x):
            return None if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"
        return x

    return json.dumps(plain(report), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def to_csv(report: dict[str, Any]) -> str:
    """As CSV: a table with one line for each model, and one for each of its groups."""
    lines = []
    for model in report["models"]:
        difference = {f"difference_{key}": value for key, value in model.get("difference", {}).items()}
        scalars = {key: value for key, value in model.items() if not isinstance(value, (dict, list))}
        lines.append({"name": model["name"], "group": "", "classes": report["classes"], **scalars, **difference})
        lines += [{"name": model["name"], "group": name, **group} for name, group in model.get("groups", {}).items()]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
