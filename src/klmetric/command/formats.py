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
    """As CSV: a table with one line for each model, and one for each of its groups and bands of confidence."""
    lines = []
    for model in [*report["models"], *([report["floor"]] if "floor" in report else [])]:
        values = {key: value for key, value in model.items() if key not in ("groups", "bands", "worst")}
        lines.append({"name": model["name"], "group": "", "classes": report["classes"], **_flat(values)})
        groups = [*model.get("groups", {}).items()]
        groups += [(f"confidence {band}", values) for band, values in model.get("bands", {}).items()]
        lines += [{"name": model["name"], "group": name, **values} for name, values in groups]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The values in values, under the names of both: perplexity_ratio for that itself, perplexity_ratio_low..."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {key if inner == "value" else f"{key}_{inner}": x for inner, x in _flat(value).items()}
        else:
            found[key] = value
    return found
