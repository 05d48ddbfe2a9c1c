"""Structural validation by a CustomResourceDefinition, as the API server does it with fieldValidation=Strict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import yaml


def validator(crd: Path, version: str) -> jsonschema.Draft202012Validator:
    """For objects of `version` of the CRD in the file; a field that the CRD does not name is an error."""
    definition = yaml.load(crd.read_text(), Loader=yaml.CSafeLoader)
    (schema,) = [each["schema"]["openAPIV3Schema"] for each in definition["spec"]["versions"]
                 if each["name"] == version]
    closed = _closed(schema)
    # The API server's own part.
    closed["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(closed)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    out = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("anyOf", None)
        # The pattern is one of strings, and says nothing of numbers.
        out["type"] = ["integer", "string"]
    if "properties" in schema:
        out["properties"] = {key: _closed(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = _closed(schema["additionalProperties"])
    if "items" in schema:
        out["items"] = _closed(schema["items"])
    if schema.get("nullable"):
        out["type"] = [schema["type"], "null"]
    return out
