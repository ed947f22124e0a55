"""MkDocs hook: fills docs/reference/parameters.md from the pydantic models in pipeline/core/config.py."""  # noqa: INP001

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.core import config

SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("{{ parameters }}", parameter_tables()) if "{{ parameters }}" in markdown else markdown


def parameter_tables() -> str:
    """Return a heading and a table for each section of a profile, and for each data source of `download`."""
    params = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8"))
    tables = []
    for section, field in config.Profile.model_fields.items():
        values = {name: profile[section] for name, profile in params.items() if isinstance(profile, dict)}
        if section != "download":
            tables.append(section_table(section, field.annotation, values))
            continue
        for source, model in config.SOURCES.items():
            of_source = {name: value for name, value in values.items() if value["source"] == source}
            tables.append(section_table(f"download, source: {source}", model, of_source))
    return "\n".join(tables)


def section_table(title: str, model: Any, values: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table with a row per parameter of `model`, its default, and its value in each profile."""
    schema = model.model_json_schema()
    header = ["parameter", "type", "meaning", "default", *values]
    rows = [header, ["---"] * len(header)]
    for key, field in parameters(schema, schema):
        settings = [field.get("default"), *(value.get(key) for value in values.values())]
        meaning = html.escape(field.get("description", "")).replace("*", "\\*")
        rows.append([f"`{key}`", describe_type(field), meaning, *(f"`{json.dumps(value)}`" for value in settings)])
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in rows]
    return "\n".join([f"## {title}\n\n{model.__doc__}\n", *lines, ""])


def parameters(section: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the JSON schema of each parameter, also of those in a section or list of sections."""
    for key, field in section["properties"].items():
        reference = field.get("$ref") or field.get("items", {}).get("$ref", "")
        target = schema.get("$defs", {}).get(reference.rpartition("/")[2], field)
        if "properties" in target:
            yield from parameters(target, schema, f"{prefix}{key}.")
        else:
            yield prefix + key, field


def describe_type(field: dict[str, Any]) -> str:
    """Return the type and range of a parameter, or its choices."""
    if "anyOf" in field:
        return " or ".join(describe_type(option) for option in field["anyOf"])
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        items = field.get("prefixItems") or [field["items"]]
        return f"list of {describe_type(items[0])}"
    kinds = [field["type"]] if isinstance(field["type"], str) else field["type"]
    return ", ".join([" or ".join(kinds), *(f"{sign} {field[key]}" for key, sign in SIGNS.items() if key in field)])
